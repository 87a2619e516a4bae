"""Draws a run's curves.png from its metrics.jsonl.

The top panel has bits per byte, which is what to compare by, beside what gzip and xz need.
Below it are the training loss, in nats per token, and the learning rate. All three share an axis
of training FLOPs.
"""
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.disk import metric_rows, read_object
from lib.tables import HALF_95

MOST_TIME = 0.05  # share of a run's time that drawing may take
SETTLED = 0.1  # share of the FLOPs after which values decide what a panel shows
MOST_NAMED = 12  # sources that the legend names
HEIGHT = 8.5  # inches; the width is 9

last_drawing = {"took": 2.0, "ended": time.monotonic()}  # seconds; a first drawing takes about two


class Series(NamedTuple):
    """Points of a curve: training FLOPs and values, both float [n] and finite."""

    x: np.ndarray
    y: np.ndarray


class Test(NamedTuple):
    """A source's bits per byte on all its test documents."""

    flops: float
    mean: float
    half: float  # of the 95 % interval; 0 where it is not known


def follow(directory: Path, flush: Callable[[], None]):
    """Draw a run that goes on, unless drawing would take more than its share of the time.

    flush: brings the rows that are still on their way into metrics.jsonl. One process alone calls
    this.
    """
    begun = time.monotonic()
    if last_drawing["took"] > MOST_TIME * (begun - last_drawing["ended"]):
        return
    flush()
    draw(directory)
    ended = time.monotonic()
    last_drawing["took"] = ended - begun
    last_drawing["ended"] = ended


def draw(directory: Path):
    """Write curves.png into a run's directory; nothing while the run has no finite loss."""
    from matplotlib.figure import Figure  # takes a second: a short run spends it at its end alone
    rows, _ = metric_rows(directory / "metrics.jsonl")
    steps = [row for row in rows if row.get("train/loss") is not None]
    if not steps:
        return
    figure = Figure(figsize=(9, HEIGHT), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=(5, 4, 1.4))
    draw_bits_per_byte(panels[0], rows, read_compressors(directory))
    draw_loss(panels[1], read_series(steps, "train/loss"))
    draw_learning_rate(panels[2], read_series(steps, "train/lr"))
    draw_phases(panels, steps)
    figure.suptitle(directory.name, fontweight="bold")
    partly = directory / "curves.partial"
    figure.savefig(partly, format="png", dpi=110)
    partly.rename(directory / "curves.png")


# ------------------------------------------------------------------------------------ what is drawn

def read_compressors(directory: Path) -> dict[str, float]:
    """{name: bits per byte} of gzip and xz; empty before a run's first test.

    Each test document is compressed alone, as the model predicts each document alone.
    """
    found = {}
    for name in ("summary.json", "eval.json"):  # eval.json is the newer one
        found |= read_object(directory / name)
    bits = {}
    for name, key in (("gzip -9", "gzip_bpb"), ("xz -9", "xz_bpb")):
        if found.get(key) is not None:
            bits[name] = found[key]
    return bits


def read_series(rows: list[dict], key: str) -> Series:
    """The values of a metric where it has any."""
    known = [row for row in rows if row.get(key) is not None]
    x = np.array([row["train/flops"] for row in known], float)
    y = np.array([row[key] for row in known], float)
    finite = np.isfinite(y)
    return Series(x[finite], y[finite])


def read_test(rows: list[dict], name: str) -> Test | None:
    """A source's last test, if there was one."""
    key = f"eval/{name}.test/bpb"
    tested = [row for row in rows if row.get(key) is not None]
    if not tested:
        return None
    row = tested[-1]
    error = row.get(f"{key}_se")
    if error is None or not np.isfinite(error):  # there was one document
        error = 0.0
    return Test(row["train/flops"], row[key], HALF_95 * error)


def source_names(rows: list[dict]) -> list[str]:
    """The sources that bits per byte were measured on."""
    names = set()
    for key in {key for row in rows for key in row}:
        if key.startswith("eval/") and key.endswith("/bpb"):
            name = key.removeprefix("eval/").removesuffix("/bpb")
            names.add(name.removesuffix(".test"))
    return sorted(names)


def settled(curve: Series) -> np.ndarray:
    """A curve's values after its steep beginning."""
    if not len(curve.x):
        return curve.y
    return curve.y[curve.x >= SETTLED * curve.x[-1]]


def limits(curves: list[Series], also: list[float]) -> tuple[float, float]:
    """The y limits of a panel: what curves reach after their steep beginning, and `also`.

    Everything is shown where that makes the panel less than half as high again.
    """
    marks = np.array(also, float)
    everything = np.concatenate([*(curve.y for curve in curves), marks])
    shown = np.concatenate([*map(settled, curves), marks])
    low = float(shown.min())
    high = float(shown.max())
    highest = float(everything.max())
    if highest - high < 0.5 * (high - low):
        high = highest
    room = 0.06 * (high - low)
    if room == 0:
        room = 0.05 * abs(high) or 1.0
    return low - room, high + room


def above(curve: Series, high: float) -> str:
    """What to say of the points of a curve that lie above its panel."""
    hidden = int(np.sum(curve.y > high))
    if not hidden:
        return ""
    if curve.y[0] > high:
        return f"; starts above the chart, at {curve.y[0]:.2f}"
    return f"; {hidden} of {len(curve.y)} points lie above the chart, up to {curve.y.max():.2f}"


def smooth(curve: Series, width: int) -> Series:
    """The mean of each value with the `width` - 1 before it."""
    padded = np.pad(curve.y, (width - 1, 0), "edge")
    means = np.convolve(padded, np.ones(width) / width, "valid")
    return Series(curve.x, means)


# ------------------------------------------------------------------------------------------- panels

def draw_bits_per_byte(panel, rows: list[dict], compressors: dict[str, float]):
    """Each source's dev curve, its test as a star with its interval, and a line per compressor."""
    panel.set_ylabel("bits per byte (lower is better)")
    names = source_names(rows)
    if not names:
        panel.set_yticks([])
        said = "no bits per byte were measured"
        panel.text(0.5, 0.5, said, ha="center", transform=panel.transAxes)
        return
    curves = [read_series(rows, f"eval/{name}/bpb") for name in names]
    tests = [read_test(rows, name) for name in names]
    marks = [*compressors.values()]
    for test in filter(None, tests):
        marks += [test.mean - test.half, test.mean + test.half]
    low, high = limits(curves, marks)
    panel.set_ylim(low, high)
    panel.grid(alpha=0.3)
    aside = np.linspace(-0.02, 0.02, len(names) + 2)  # so that stars stand side by side
    for number, name in enumerate(names):
        color = f"C{number % 10}"
        draw_dev(panel, name, curves[number], color, high)
        draw_test(panel, name, tests[number], color, 1 + aside[number + 1])
    draw_compressors(panel, compressors)
    draw_legend(panel, len(names))


def draw_dev(panel, name: str, curve: Series, color: str, high: float):
    """A source's curve on its dev documents."""
    if not len(curve.x):
        return
    label = f"dev, {name}{above(curve, high)}"
    panel.plot(curve.x, curve.y, "o-", color=color, markersize=4, label=label)


def draw_test(panel, name: str, test: Test | None, color: str, aside: float):
    """A source's star; `aside` is a factor on its place."""
    if test is None:
        return
    label = f"test, {name}: {test.mean:.3f}"
    if test.half:
        label += f" ± {test.half:.3f} (95 %)"
    panel.errorbar(
        test.flops * aside,
        test.mean,
        test.half,
        fmt="*",
        color=color,
        markersize=14,
        markeredgecolor="black",
        capsize=5,
        zorder=5,
        label=label,
    )


def draw_compressors(panel, compressors: dict[str, float]):
    """A labelled line for each compressor; labels stand above the upper, below the lower line."""
    upper = max(compressors.values(), default=0.0)
    for name, value in compressors.items():
        panel.axhline(value, color="dimgray", linestyle="--", linewidth=1.2)
        side, gap = "top", -3
        if value == upper:
            side, gap = "bottom", 2
        label = f"{name}, each test document alone: {value:.3f}"
        panel.annotate(
            label,
            (1, value),
            (-4, gap),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va=side,
            fontsize=9,
            color="dimgray",
        )


def draw_legend(panel, sources: int):
    """The legend: in the panel, or below the figure where it would hide curves."""
    if sources <= 2:
        panel.legend(fontsize=9)
        return
    handles, labels = panel.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    dev = [label for label in labels if label.startswith("dev, ")][:MOST_NAMED]
    test = [label for label in labels if label.startswith("test, ")][:MOST_NAMED]
    figure = panel.figure
    figure.set_figheight(HEIGHT + 0.2 * max(len(dev), len(test)))
    shown = [named[label] for label in dev + test]
    figure.legend(shown, dev + test, fontsize=9, ncols=2, loc="outside lower center")


def draw_loss(panel, curve: Series):
    """The training loss of each step, faint, and its mean over a fiftieth of the run."""
    width = max(1, len(curve.y) // 50)
    mean = smooth(curve, width)
    usual = np.quantile(settled(curve), (0.01, 0.99))
    low, high = limits([mean], [*usual])
    label = "training loss"
    if width > 1:
        label += f", mean of {width} steps"
    panel.plot(curve.x, curve.y, color="tab:blue", alpha=0.3, linewidth=0.8)
    panel.plot(mean.x, mean.y, color="tab:blue", label=label + above(curve, high))
    panel.set_ylim(low, high)
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.3)
    panel.legend(loc="upper right", fontsize=9)


def draw_learning_rate(panel, curve: Series):
    """The learning rate, from 0."""
    panel.plot(curve.x, curve.y, color="tab:gray")
    panel.set_ylim(bottom=0)
    panel.set_xlim(0, 1.03 * curve.x[-1])
    panel.set_xlabel("training FLOPs")
    panel.set_ylabel("learning\nrate")
    panel.grid(alpha=0.3)


def draw_phases(panels, steps: list[dict]):
    """A line where each phase begins; its number and size above the top panel, if there is room."""
    end = steps[-1]["train/flops"]
    filled = [0.0, 0.0]  # two rows of labels: the share of the axis that each takes already
    phase, flops = None, 0.0
    for row in steps:
        if row["phase"] != phase:
            for panel in panels:
                panel.axvline(flops, color="black", linestyle=":", linewidth=1)
            label = phase_label(row)
            place = flops / end
            level = int(place < filled[0])
            if place >= filled[level]:
                filled[level] = place + 0.0095 * len(label)
                write_above(panels[0], flops, 5 + 13 * level, label)
        phase, flops = row["phase"], row["train/flops"]


def write_above(panel, x: float, points: float, label: str):
    """A label so many points above a panel, that begins at `x`."""
    panel.annotate(label, (x, 1), (1, points), xycoords=("data", "axes fraction"),
                   textcoords="offset points", fontsize=9)


def phase_label(row: dict) -> str:
    """The phase of a row of metrics.jsonl, and the number of the model's parameters in it."""
    label = f"phase {row['phase']}"
    size = row.get("model/params")
    if not size:
        return label
    unit, factor = "", 1.0
    for larger, its_factor in (("K", 1e3), ("M", 1e6), ("B", 1e9)):
        if size >= its_factor:
            unit, factor = larger, its_factor
    return f"{label}: {size / factor:.3g}{unit} parameters"
