"""One HTML page that compares runs: curves, final figures, samples, configs. It needs no network.

RUN is the directory of a run, ended or not, or of a study: its result, and the runs that it
compares (all its runs while it has no result). The page is tools/report.html with the gaps filled
in. Curves are thinned to some hundred points, with the least and the greatest value around each.
"""
import collections
import html
import json
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.arguments import Arguments
from lib.charts import Line, chart
from lib.config import ROOT, flatten
from lib.disk import metric_rows, read_object, user_path, write
from lib.errors import InputError
from lib.statistics import dev_curve, gap_curve
from lib.tables import HALF_95

COLORS = 7  # the page has them
WIDTH = 190  # of the picture of an interval, in pixels
EDGE = 26  # pixels to the left and right of its scale, where the name of a mark may stand
POWERS = " kMBT"  # of 1, 10^3, 10^6, 10^9 and 10^12
DASHES = "", "7 3", "2 2.5", "9 3 2 3"
NUMBERS = 250_000  # in all curves of a page, which makes about 2 MB
SMOOTH = "train/loss", "train/grad_norm", "perf/tokens_per_s"  # means over a 50th of the run
CHARTS = {
    "eval/mean/bpb": "Dev, mean over sources (bits per byte)",
    "train/loss": "Training loss (nats per token)",
    "train/lr": "Learning rate",
    "train/grad_norm": "Gradient norm",
    "perf/tokens_per_s": "Throughput (tokens per second)",
}
UNITS = {"bpb": "bits per byte", "loss": "nats per token", "loglikelihood": "nats"}
UNCHARTED = {"step", "phase", "train/tokens", "train/flops", "perf/step_ms"}
ALONE = "bits per byte,\neach document\nalone"
TOGETHER = "bits per byte,\nall documents\nat once"
COMPRESSED = {  # key of a summary: the head of its column
    "gzip_bpb": ("gzip -9", ALONE),
    "xz_bpb": ("xz -9", ALONE),
    "gzip_together_bpb": ("gzip -9", TOGETHER),
    "xz_together_bpb": ("xz -9", TOGETHER),
}
NAMED = {"gzip", "xz"}  # marks whose names stand beside them
MEASURES = {  # of a claim, in words
    "bpb": "test, bits per byte",
    "dev": "dev, bits per byte",
    "train/loss": "training loss, nats per token",
}
VERDICTS = "confirmed", "reversed", "undecided"  # which the page's style knows
NOT_JUDGED = "not judged"


# -------------------------------------------------------------------------------- pieces of a page
# What comes from a file is a value here, never HTML: each function escapes it. Only cells are HTML
# already; these functions make them.

class Interval(NamedTuple):
    """A figure with half the width of its interval, and what to compare it to."""

    middle: float | None
    half: float | None
    marks: dict[str, float]  # values by names, which the page's style knows


def text(value) -> str:
    """Anything as text."""
    return html.escape(str(value))


def span(kind: str, value) -> str:
    """Text of a kind that the page's style knows."""
    return f'<span class="{text(kind)}">{text(value)}</span>'


def number(value) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return None
    return value


def figure(value, form: str = ".3f", half=None) -> str:
    """A figure, with half the width of its interval if that is known; a dash if there is none."""
    if number(value) is None:
        return span("half", "–")
    if number(half) is None:
        return format(value, form)
    width = format(half, form.strip("+"))
    return f"{format(value, form)} {span('half', f'± {width}')}"


def count(value) -> str:
    """A number of things, to three digits: 1.71M."""
    if number(value) is None or value < 1_000:
        return figure(value, ".0f")
    power = min(4, int(math.log10(value) // 3))
    return f"{value / 1e3 ** power:.3g}{POWERS[power]}"


def head(name, unit="") -> str:
    """The head of a column: its name, and in a second line its unit."""
    if not unit:
        return text(name)
    return f"{text(name)}<small>{text(unit)}</small>"


def table(rows: list[list[str]], kind: str) -> str:
    """A table of cells, the first row being its heads; the first row and column stay in sight."""
    heads = "".join(f"<th scope=col>{cell}</th>" for cell in rows[0])
    body = []
    for first, *others in rows[1:]:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f"<tr><th scope=row>{first}</th>{cells}</tr>")
    return (
        f'<div class="scroll {kind}" tabindex=0><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def pictures(intervals: list[Interval]) -> list[str]:
    """A picture of each interval with its own marks, all on one scale; "" where there is none."""
    shown = [interval for interval in intervals if interval.middle is not None]
    ends = [end for interval in shown for end in ends_of(interval)]
    ends += [mark for interval in shown for mark in interval.marks.values()]
    low = min(ends, default=0.0)
    high = max(ends, default=0.0)
    return [picture(interval, low, high) for interval in intervals]


def ends_of(interval: Interval) -> tuple[float, float]:
    """The ends of an interval; its middle twice where its width is not known."""
    half = interval.half or 0.0
    return interval.middle - half, interval.middle + half


def picture(interval: Interval, low: float, high: float) -> str:
    """A picture of an interval with its marks, on a scale from `low` to `high`."""
    if interval.middle is None:
        return ""

    def place(value: float) -> str:
        share = (value - low) / ((high - low) or 1.0)
        return f"{EDGE + (WIDTH - 2 * EDGE) * share:.1f}"

    lines = []
    least = min(interval.marks.values(), default=0.0)
    for name, value in interval.marks.items():
        x = place(value)
        title = f"<title>{text(name)} {value:.3f}</title>"
        lines.append(f'<line class="mark {text(name)}" x1={x} x2={x} y1=2 y2=20>{title}</line>')
        if name in NAMED:  # of two marks one is named on the left, the other on the right
            side = "end" if value == least else "start"
            lines.append(f"<text x={x} y=32 text-anchor={side}>{text(name)}</text>")
    left, right = ends_of(interval)
    label = f"{interval.middle:.3f} ± {interval.half or 0:.3f}"
    height = 34 if interval.marks.keys() & NAMED else 22
    return (
        f'<svg class=interval width={WIDTH} height={height} role=img aria-label="{label}">'
        f"{''.join(lines)}<line x1={place(left)} x2={place(right)} y1=11 y2=11></line>"
        f"<circle cx={place(interval.middle)} cy=11 r=3.5></circle></svg>"
    )


# ----------------------------------------------------------------------------------- what is read

class Run(NamedTuple):
    """A run on the page."""

    path: Path
    name: str
    group: str  # runs of one arm of a study have its colour in common
    rows: list[dict]  # of metrics.jsonl
    damaged: int  # lines of it that are left out
    config: dict  # empty if it cannot be read
    summary: dict  # empty until the run has ended


# ---------------------------------------------------------------------------------- what is there

def read_rows(path: Path) -> tuple[list[dict], int]:
    """(the rows of a metrics.jsonl, the number of its lines that are no rows)."""
    if not path.exists():
        return [], 0
    found, damaged = metric_rows(path)
    rows = [row for row in found if {"step", "phase", "train/tokens", "train/flops"} <= row.keys()]
    return rows, len(damaged) + len(found) - len(rows)


def runs_inside(path: Path, result: dict) -> dict[Path, str]:
    """{directory: group} of the runs that an argument of the command line names."""
    if (path / "config.json").is_file():
        return {path: str(path)}
    inside = {}
    if result:
        for arm, of_arm in result["arms"].items():
            for run in of_arm["runs"].values():
                if (path / run["run"]).is_dir():
                    inside[path / run["run"]] = f"{path}:{arm}"
        return inside
    for file in sorted(path.glob("*/config.json")):
        arm = file.parent.name.split("-")[0]
        inside[file.parent] = f"{path}:{arm}"
    if not inside:
        raise InputError(
            f"{str(path)!r} is neither a run (it has no config.json) nor a study (it has no "
            "study.json, and no run in it)"
        )
    return inside


def collect(paths: list[Path]) -> tuple[list[Run], list[tuple[Path, dict]]]:
    """(the runs, the studies with their results) that the arguments name."""
    groups, studies = {}, []
    for path in paths:
        result = read_object(path / "study.json")
        if result and not (path / "config.json").is_file():
            studies.append((path, result))
        groups |= runs_inside(path, result)
    times = collections.Counter(path.resolve().name for path in groups)
    runs = []
    for path, group in groups.items():
        *_, above, name = path.resolve().parts
        told_apart = times[name] == 1 and (path in paths or len(paths) == 1)
        if not told_apart:
            name = f"{above}/{name}"
        rows, damaged = read_rows(path / "metrics.jsonl")
        config = read_object(path / "config.json")
        summary = read_object(path / "summary.json")
        runs.append(Run(path, name, group, rows, damaged, config, summary))
    return runs, studies


def by_source(row: dict, end: str) -> dict[str, float]:
    """{source: value} of the figures eval/SOURCE<end> in a row or a summary."""
    found = {}
    for key, value in row.items():
        if key.startswith("eval/") and key.endswith(end) and number(value) is not None:
            name = key.removeprefix("eval/").removesuffix(end)
            if not name.endswith(".test"):
                found[name] = value
    return found


def training_rows(run: Run) -> list[dict]:
    """The rows of a run's steps."""
    return [row for row in run.rows if "train/loss" in row]


def evaluation_rows(run: Run) -> list[dict]:
    """The rows of a run's evaluations on dev."""
    found = []
    for row in run.rows:
        tested = any(".test/" in key for key in row)
        if "train/loss" not in row and not tested:
            found.append(row)
    return found


# ---------------------------------------------------------------------------------- the documents

class Group(NamedTuple):
    """Runs whose test figures can be compared."""

    members: list[int]  # places in the list of runs
    note: str  # what to know of them, as HTML; empty where all runs are in one group


def documents(run: Run) -> tuple | None:
    """A run's test documents: what their texts are known by, source by source, or their paths.

    None if it was not tested or does not say. Texts are known wherever they lie, so that a corpus
    has the same documents as JSON Lines and as a directory.
    """
    texts, paths = (run.summary.get(f"held_out_{what}") for what in ("texts", "paths"))
    if isinstance(texts, dict):
        return tuple(sorted(tuple(sorted(map(str, own))) for own in texts.values()))
    if isinstance(paths, list):
        return (tuple(sorted(map(str, paths))),)
    return None


def in_common(one: tuple, other: tuple) -> tuple[int, int]:
    """(the number of some test documents, how many of them are among others); see `documents`."""
    own = [document for source in one for document in source]
    others = {document for source in other for document in source}
    return len(own), len(others.intersection(own))


def group_by_documents(runs: list[Run], names: list[str]) -> list[Group]:
    """The runs in groups that were tested on the same documents, in their order.

    If all that were tested had the same documents, there is one group of all runs.
    """
    places = collections.defaultdict(list)
    for place, run in enumerate(runs):
        places[documents(run)].append(place)
    unknown = places.pop(None, [])
    if len(places) <= 1:
        return [Group(list(range(len(runs))), "")]
    groups = []
    for paths, members in places.items():
        said = some([names[place] for place in members])
        number, shared = in_common(paths, next(iter(places)))
        note = f"<p>{said}: tested on {number:,} documents.</p>"
        if groups:
            first = some([names[place] for place in groups[0].members])
            note = (
                f"<p class=note>{said}: tested on other documents than {first}; not comparable "
                f"with them. ({number:,} documents, {shared:,} of them in common.)</p>"
            )
        groups.append(Group(members, note))
    if unknown:
        said = some([names[place] for place in unknown])
        note = f"<p class=note>{said}: no list of test documents (yet).</p>"
        groups.append(Group(unknown, note))
    return groups


def some(cells: list[str], most: int = 4) -> str:
    """The first few of a list of cells, and how many more there are."""
    said = ", ".join(cells[:most])
    if len(cells) > most:
        said += f" and {len(cells) - most} more"
    return said


# ----------------------------------------------------------------------------------------- curves

def thin(rows: list[dict], keys: list[str], points: int) -> dict:
    """Rows in so many pieces: step, tokens and flops at the end of each, and each metric's values.

    Gives y = {metric: three columns}: its last value or mean in the piece (see SMOOTH), its least
    and its greatest; None where it has none there.
    """
    edges = np.linspace(0, len(rows), min(len(rows), points) + 1).astype(int).tolist()
    ends = [rows[edge - 1] for edge in edges[1:]]
    return {
        "step": [row["step"] for row in ends],
        "tokens": [row["train/tokens"] for row in ends],
        "flops": [float(f"{row['train/flops']:.5g}") for row in ends],
        "y": {key: thin_metric(rows, key, edges) for key in keys},
    }


def thin_metric(rows: list[dict], key: str, edges: list[int]) -> list[list[float | None]]:
    """The three columns of a metric, see `thin`; edges: where its pieces begin and end."""
    values = np.array([row.get(key) for row in rows], float)  # None becomes NaN
    width = 1
    if key in SMOOTH:
        width = max(1, len(rows) // 50)
    columns = [], [], []
    for begin, end in zip(edges, edges[1:], strict=False):
        near = finite(values[max(0, min(begin, end - width)):end])
        piece = finite(values[begin:end])
        columns[0].append(rounded(near[-width:], np.mean))
        columns[1].append(rounded(piece, np.min))
        columns[2].append(rounded(piece, np.max))
    return [*columns]


def finite(values: np.ndarray) -> np.ndarray:
    """The finite ones of values [n]."""
    return values[np.isfinite(values)]


def rounded(values: np.ndarray, reduce) -> float | None:
    """A reduction of values [n] to five digits; None if there are none."""
    if not len(values):
        return None
    return float(f"{reduce(values):.5g}")


def add_means(runs: list[Run]):
    """Add to each evaluation the mean of its sources' bits per byte, if any run has several."""
    evaluations = [(row, by_source(row, "/bpb")) for run in runs for row in run.rows]
    if all(len(bits) <= 1 for _, bits in evaluations):
        return
    for row, bits in evaluations:
        if bits:
            row["eval/mean/bpb"] = statistics.fmean(bits.values())


def chartable(runs: list[Run]) -> tuple[dict[str, bool], set[str]]:
    """({metric: is it one of training steps?}, the metrics that change)."""
    of_steps, first, changing = {}, {}, set()
    for run in runs:
        for row in run.rows:
            for key, value in row.items():
                if number(value) is None or key.endswith("_se") or ".test/" in key:
                    continue
                of_steps.setdefault(key, "train/loss" in row)
                if value != first.setdefault(key, value):
                    changing.add(key)
    return of_steps, changing


def sections_of(of_steps: dict[str, bool], changing: set[str]) -> dict[str, list[str]]:
    """{section of the page: metrics to chart}."""
    held_out = sorted(key for key in of_steps if key.startswith("eval/") and key not in CHARTS)
    bits = [key for key in held_out if key.endswith("/bpb")]
    losses = [key for key in held_out if key.endswith("/loss")]
    first = [key for key in CHARTS if key in of_steps]
    sources = []
    if "eval/mean/bpb" in of_steps:
        sources = bits + losses
    else:
        first = bits + first
    shown = {*UNCHARTED, *first, *sources}
    more = sorted(key for key in changing if key not in shown)
    sections = {"Curves": first, "Dev, by source": sources, "More figures": more}
    return {title: keys for title, keys in sections.items() if keys}


def chart_title(key: str) -> str:
    """What a chart is called."""
    if key in CHARTS:
        return CHARTS[key]
    name, _, unit = key.removeprefix("eval/").rpartition("/")
    if key.startswith("eval/") and unit in UNITS:
        return f"Dev, {name} ({UNITS[unit]})"
    return key


def curves(runs: list[Run]) -> dict:
    """What the page's script draws: charts by section, and each run's curves."""
    add_means(runs)
    of_steps, changing = chartable(runs)
    sections = sections_of(of_steps, changing)
    drawn = [key for keys in sections.values() for key in keys]
    points = NUMBERS / 3 / max(1, len(runs) * (len(drawn) + 1))
    points = int(np.clip(points, 60, 500))
    of_steps = {key: of_steps[key] for key in drawn}
    charts = []
    for title, keys in sections.items():
        own = [chart_of(key, title) for key in keys]
        charts.append({"title": title, "charts": own})
    groups = list(dict.fromkeys(run.group for run in runs))
    members = collections.Counter()
    out = []
    for run in runs:
        color, place = groups.index(run.group), members[run.group]
        members[run.group] += 1
        dash = DASHES[(color // COLORS + place) % len(DASHES)]
        look = {"name": run.name, "color": color % COLORS, "dash": dash}
        out.append(look | curves_of(run, of_steps, points))
    return {"runs": out, "sections": charts}


def chart_of(key: str, section: str) -> dict:
    """A chart for the page's script; gzip and xz are of all sources, not of one of several."""
    compressed = section == "Curves" and key.endswith("/bpb")
    return {"key": key, "title": chart_title(key), "compressed": compressed}


def curves_of(run: Run, of_steps: dict[str, bool], points: int) -> dict:
    """A run's curves, the places where its phases begin, and its marks of gzip and xz."""
    steps = training_rows(run)
    phases = []
    for before, row in zip(steps, steps[1:], strict=False):
        if row["phase"] != before["phase"]:
            begin = {
                "step": row["step"] - 1,
                "tokens": row["train/tokens"],
                "flops": row["train/flops"],
                "text": f"phase {row['phase']}",
                "size": row.get("model/params"),
            }
            phases.append(begin)
    return {
        "steps": thin(steps, [key for key in of_steps if of_steps[key]], points),
        "evals": thin(evaluation_rows(run), [key for key in of_steps if not of_steps[key]], points),
        "phases": phases,
        "marks": marks_of(run),
    }


def marks_of(run: Run) -> dict[str, float]:
    """Bits per byte of gzip and xz on a run's own test documents, each compressed alone."""
    found = {name: number(run.summary.get(f"{name}_bpb")) for name in ("gzip", "xz")}
    return {name: value for name, value in found.items() if value is not None}


# ----------------------------------------------------------------------------------------- tables

def state(run: Run) -> str:
    """How far a run is, and what is wrong with its files."""
    total = sum(phase["steps"] for phase in run.config.get("phases", []))
    at = max((row["step"] for row in run.rows), default=0)
    if run.summary:
        said = span("good", "complete")
    elif at:
        said = span("wait", f"at step {at:,} of {total:,}")
    else:
        said = span("wait", "no metrics yet")
    if run.damaged:
        lines = "line" if run.damaged == 1 else "lines"
        said += " " + span("bad", f"{run.damaged} damaged {lines} left out")
    if not run.config:
        said += " " + span("bad", "config.json cannot be read")
    return said


def half_of(error) -> float | None:
    """Half of the 95 % interval of a figure with this standard error."""
    if number(error) is None:
        return None
    return HALF_95 * error


def test_of(run: Run) -> tuple[float | None, float | None]:
    """(test bits per byte, half of its 95 % interval), of the mean over a run's sources."""
    bits = by_source(run.summary, ".test/bpb")
    errors = by_source(run.summary, ".test/bpb_se")
    if not bits:
        return None, None
    mean = statistics.fmean(bits.values())
    if errors.keys() != bits.keys():
        return mean, None
    return mean, half_of(math.hypot(*errors.values()) / len(errors))  # sources are independent


def mean_of(values: list) -> float | None:
    """The mean of those values that are numbers, if any are."""
    known = [value for value in values if number(value) is not None]
    if not known:
        return None
    return statistics.fmean(known)


def overview(runs: list[Run], names: list[str]) -> str:
    """The runs at a glance: a table for each group of them that can be compared."""
    pieces = []
    for group in group_by_documents(runs, names):
        members = [runs[i] for i in group.members]
        own_names = [names[i] for i in group.members]
        pieces += [group.note, overview_table(members, own_names)]
    return "".join(pieces)


def overview_table(runs: list[Run], names: list[str]) -> str:
    """The final figures of runs that can be compared."""
    compressed = [key for key in COMPRESSED if any(key in run.summary for run in runs)]
    heads = [
        head("run"),
        head("state"),
        head("test", "bits per byte"),
        head("95 % interval", "bits per byte"),
        *(head(*COMPRESSED[key]) for key in compressed),
        head("dev", "bits per byte"),
        head("training loss", "nats per token"),
        head("parameters"),
        head("trained", "parameters"),
        head("optimiser", "bytes"),
        head("training", "tokens"),
        head("training", "FLOPs"),
        head("speed", "tokens per second"),
    ]
    tests = [test_of(run) for run in runs]
    marks = [marks_of(run) for run in runs]
    intervals = [Interval(*test, own) for test, own in zip(tests, marks, strict=True)]
    images = pictures(intervals)
    rows = [heads]
    for run, name, test, image in zip(runs, names, tests, images, strict=True):
        bits = [figure(run.summary.get(key)) for key in compressed]
        row = [name, state(run), figure(test[0], half=test[1]), image, *bits, *training_cells(run)]
        rows.append(row)
    return table(rows, "numbers")


def training_cells(run: Run) -> list[str]:
    """The cells of a run's training: last dev figure, last loss, sizes, tokens, FLOPs, speed."""
    steps = training_rows(run)
    end = steps[-1] if steps else {}
    last = steps[-max(1, len(steps) // 50):]
    dev = [by_source(row, "/bpb") for row in evaluation_rows(run)]
    dev = [statistics.fmean(bits.values()) for bits in dev if bits]
    speeds = [row["perf/tokens_per_s"] for row in steps if number(row.get("perf/tokens_per_s"))]
    return [
        figure(dev[-1] if dev else None),
        figure(mean_of([row["train/loss"] for row in last])),
        count(end.get("model/params")),
        count(end.get("model/trained")),
        count(end.get("model/opt_bytes")),
        count(end.get("train/tokens")),
        figure(end.get("train/flops"), ".2e"),
        count(statistics.median(speeds) if speeds else None),
    ]


def at_the_end(runs: list[Run], names: list[str]) -> str:
    """Test bits per byte by source, if there are several, and other figures of the end."""
    keys = final_keys(runs)
    if not keys:
        return ""
    pieces = ["<h2>Test figures</h2>"]
    for group in group_by_documents(runs, names):
        rows = [[head("run"), *(head(name, unit) for name, unit in keys.values())]]
        for place in group.members:
            summary = runs[place].summary
            if summary:
                rows.append([names[place], *(final_figure(summary, key) for key in keys)])
        if len(rows) > 1:
            pieces += [group.note, table(rows, "numbers")]
    return "".join(pieces)


def final_keys(runs: list[Run]) -> dict[str, tuple[str, str]]:
    """{key of summaries: (name, unit)} of what `at_the_end` shows."""
    keys = {}
    for run in runs:
        for name in by_source(run.summary, ".test/bpb"):
            keys[f"eval/{name}.test/bpb"] = name, UNITS["bpb"]
    if len(keys) == 1:  # the overview has it
        keys = {}
    in_rows = {key for run in runs for row in run.rows for key in row}
    for run in runs:
        for key, value in run.summary.items():
            if isinstance(value, float) and key not in in_rows and is_own_figure(key):
                keys[key] = key, UNITS.get(key.rpartition("/")[2], "")
    return keys


def is_own_figure(key: str) -> bool:
    """Is a key of a summary a figure of the config's own, not an interval's part or one of ours?"""
    if key in COMPRESSED or key.startswith("eval/"):
        return False
    return not key.endswith(("_se", "_low", "_high"))


def final_figure(summary: dict, key: str) -> str:
    """A figure of a summary with its 95 % interval: both ends if these are known, else half."""
    low, high = number(summary.get(f"{key}_low")), number(summary.get(f"{key}_high"))
    if low is None or high is None:
        return figure(summary.get(key), half=half_of(summary.get(f"{key}_se")))
    return f"{figure(summary.get(key))} {span('half', f'({low:.3f} to {high:.3f})')}"


def differences(found: list[tuple[str, dict]], same: str) -> str:
    """Flat dictionaries by name: a table of what differs, and folded away what does not."""
    if not found:
        return "<p>Nothing is known of this yet.</p>"
    keys = list(dict.fromkeys(key for _, own in found for key in own))
    differ = [key for key in keys if len({json.dumps(own.get(key)) for _, own in found}) > 1]
    alike = [key for key in keys if key not in differ]
    out = ""
    if differ:
        rows = [["", *map(text, differ)]]
        for name, own in found:
            rows.append([name, *(field(own.get(key)) for key in differ)])
        if len(differ) > len(found):  # the longer side goes down the page
            rows = [list(column) for column in zip(*rows, strict=True)]
        out += table(rows, "fields")
    if alike:
        rows = [["", "value"], *([text(key), text(found[0][1].get(key))] for key in alike)]
        out += f"<details><summary>{same}: {len(alike)}</summary>{table(rows, 'fields')}</details>"
    return out


def field(value) -> str:
    """The value of a config's field; a dash if it has none."""
    if value is None:
        return "–"
    return text(value)


def samples(runs: list[Run], names: list[str]) -> str:
    """What each run continued its prompts with; the first four are open."""
    pieces = []
    for run, name in zip(runs, names, strict=True):
        file = run.path / "samples.txt"
        if file.is_file():
            sample = text(file.read_text("utf-8", "replace"))
            is_open = " open" if len(pieces) < 4 else ""
            summary = f"<summary>{name}</summary>"
            pieces.append(f"<details{is_open}>{summary}<pre>\n{sample}</pre></details>")
    if not pieces:
        return ""
    return f"<h2>Samples</h2><div class=samples>{''.join(pieces)}</div>"


def made_by(run: Run) -> dict:
    """Where a run was made, and by which versions; known once it has ended."""
    keys = "host", "device", "devices", "processes", "commit"
    place = {key: run.summary[key] for key in keys if key in run.summary}
    return place | run.summary.get("versions", {})


# -------------------------------------------------------------------------------------- the study

def arms_of(result: dict) -> str:
    """A study's arms, and their differences to the control with 95 % intervals."""
    control, arms = result["control"], result["arms"]
    tested = any(arm["bpb"][0] is not None for arm in arms.values())
    heads = [head("arm")]
    if tested:
        heads += [
            head("test", "bits per byte"),
            head(f"less {control}'s", "bits per byte"),
            head("95 % interval", f"line: {control}"),
            head("speed-up", "share of FLOPs"),
            head("speed-up", "share of tokens"),
        ]
    heads += [head("learning rate"), head("training", "tokens"), head("training", "FLOPs")]
    less = {name: arm["less_control"] for name, arm in arms.items() if name != control}
    bits = [own["bpb"] for own in less.values()]
    intervals = [Interval(own["mean"], own["half"], {"zero": 0.0}) for own in bits]
    images = dict(zip(less, pictures(intervals), strict=True))
    rows = [heads]
    for name, arm in arms.items():
        row = [text(name)]
        if tested:
            row.append(figure(arm["bpb"][0], ".4f", arm["bpb"][1]))
            if name == control:
                row += ["control", "", "", ""]
            elif arm.get("other_documents"):
                row[-1] = figure(None)  # not among figures that it cannot be compared with
                row += ["tested on other documents", "", "", ""]
            else:
                row += compared(less[name], images[name])
        row += [rate_of(arm), count(arm["tokens"]), figure(arm["flops"], ".2e")]
        rows.append(row)
    return table(rows, "numbers")


def rate_of(arm: dict) -> str:
    """An arm's learning rate, and whether those around it were tried."""
    said = figure(arm["rate"], "g")
    if arm["bracketed"] is False:
        said += " " + span("wait", "not bracketed")
    return said


def compared(less: dict, image: str) -> list[str]:
    """The cells of an arm that is compared to the control."""
    cells = []
    for found, form in zip(less.values(), ("+.4f", "+.1%", "+.1%"), strict=True):
        cells.append(figure(found["mean"], form, found["half"]))
    return [cells[0], image, *cells[1:]]


def in_words(measure: str) -> str:
    """What a claim is about, with its unit where that is known."""
    name, _, unit = measure.removeprefix("eval/").rpartition("/")
    if measure.startswith("eval/") and unit in UNITS:
        split = "test" if name.endswith(".test") else "dev"
        return f"{split} of {name.removesuffix('.test')}, {UNITS[unit]}"
    return MEASURES.get(measure, measure)


def claim_of(claim: dict, quick: bool) -> str:
    """A claim with its verdict, the figure behind it, and the bound that was claimed."""
    verdict = claim["verdict"]
    if quick:
        verdict = NOT_JUDGED
    side = "above" if "above" in claim else "below"
    kind = verdict if verdict in VERDICTS else "unjudged"
    whose, form = "", ".4f"
    if claim["arm"]:
        whose = f", {claim['arm']}"
    if claim["control"]:
        whose, form = f"{whose} less {claim['control']}", "+.4f"
    measure = in_words(claim["measure"])
    return (
        f"<li>{span(kind, verdict)} {text(claim['says'])} <small>({text(measure + whose)}: "
        f"{figure(claim['mean'], form, claim['half'])}; "
        f"claimed {side} {text(claim.get(side))})</small></li>"
    )


def measures_of(result: dict) -> str:
    """A study's own measures: each arm's mean, and below it the difference to the control."""
    if not result["measures"]:
        return ""
    rows = [[text(f"(less {result['control']}'s)"), *map(text, result["arms"])]]
    for name, by_arm in result["measures"].items():
        row = [text(name)]
        for arm in result["arms"]:
            own = by_arm[arm]
            cell = figure(own["own"][0], ".4f", own["own"][1])
            if arm != result["control"]:
                cell += f"<br>{figure(own['mean'], '+.4f', own['half'])}"
            row.append(cell)
        rows.append(row)
    return table(rows, "numbers")


def conclusions_of(result: dict) -> str:
    """What a study concludes from all of its arms."""
    found = result.get("conclusions")
    if not found:
        return ""
    rows = [[head("conclusion"), head("value")]]
    rows += [[text(says), figure(one["value"], ".4g", one["half"])] for says, one in found.items()]
    return table(rows, "numbers")


def notes_of(result: dict) -> list[str]:
    """What one must know of a study before one reads its figures."""
    notes = []
    if result["quick"]:
        notes.append("--quick: too short to say anything of the question, so no claim is judged")
    notes += [f"{run} failed, {why}" for run, why in result["failed"].items()]
    for name, arm in result["arms"].items():
        if arm.get("other_documents"):
            notes.append(f"{name}: {arm['other_documents']}")
        if arm.get("needs"):
            notes.append(f"{name}: its FLOPs are with those of the runs that it needs, "
                         f"{', '.join(arm['needs'])}")
    if len(result["made_by"]) > 1:
        notes.append("not all runs were made by the same versions, commit and device")
    return notes


def study(result: dict) -> str:
    """A study's result: claims with their verdicts, tables with intervals, and curves."""
    seeds, cost = result["seeds"], result["cost"]
    said = f"{text(seeds)} paired seeds."
    if seeds == 1:
        said = "One seed: no intervals."
    pieces = [
        f"<section><h2>Study: {text(result['study'])}</h2>",
        f"<p>{said} The runs compared took {figure(cost['flops'], '.3g')} FLOPs and "
        f"{figure(cost['tokens'], ',')} tokens, tuning took {figure(cost['tuning_flops'], '.3g')} "
        f"and {figure(cost['tuning_tokens'], ',')}.</p>",
    ]
    pieces += [f"<p class=wait>{text(note)}</p>" for note in notes_of(result)]
    claims = [claim_of(claim, bool(result["quick"])) for claim in result["claims"]]
    if claims:
        pieces.append(f"<ul class=claims>{''.join(claims)}</ul>")
    pieces += [arms_of(result), measures_of(result), conclusions_of(result)]
    charts = charts_of(result)
    if charts:
        pieces.append(f"<div class=charts>{''.join(charts)}</div>")
    return "".join([*pieces, "</section>"])


def charts_of(result: dict) -> list[str]:
    """Dev curves of a study's arms, and their differences to the control's, by tokens and FLOPs."""
    name = result["control"]
    control = result["arms"][name]["runs"]
    charts = []
    for axis, across in (("tokens", "training tokens"), ("flops", "model FLOPs")):
        curves, gaps = [], []
        for place, (arm, found) in enumerate(result["arms"].items()):
            color, curve = place % COLORS, dev_curve(found["runs"], axis)
            if curve is None:
                continue
            other = ", other documents" if found.get("other_documents") else ""
            curves.append(Line(arm + other, color, *curve))
            end = found["less_control"]["bpb"]
            if arm != name and end["values"]:
                gap = gap_curve(found["runs"], control, end["values"], axis)
                gaps.append(Line(arm, color, *gap, (found[axis], end["mean"], end["half"])))
        if curves:
            charts.append(chart("Dev (bits per byte)", across, curves))
        if gaps:
            title = f"Less {name}'s (bits per byte): dev along the way, test at the end"
            charts.append(chart(title, across, gaps, zero=True))
    return charts


# --------------------------------------------------------------------------------------- the page

def key_of(look: dict) -> str:
    """A run's name with a piece of its line, as HTML."""
    line = f'stroke="var(--c{look["color"]})" stroke-dasharray="{look["dash"]}"'
    return (
        f"<span class=key><svg width=26 height=10><line x1=1 x2=25 y1=5 y2=5 {line}></line></svg>"
        f"{text(look['name'])}</span>"
    )


def page(titles: list[str], runs: list[Run], studies: list[tuple[Path, dict]]) -> str:
    """The page; whatever somebody else wrote is escaped in it."""
    drawn = curves(runs)
    names = [key_of(look) for look in drawn["runs"]]
    same_config, same_place = "every field", "versions and place"
    if len(runs) > 1:
        same_config, same_place = "fields that are the same", "the same for all"
    places = [(name, made_by(run)) for run, name in zip(runs, names, strict=True) if run.summary]
    content = json.dumps(drawn, separators=(",", ":"), allow_nan=False)
    return fill({
        "title": some([text(title) for title in titles]),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "runs": str(len(runs)),
        "studies": "".join(study(result) for _, result in studies),
        "overview": overview(runs, names),
        "documents": documents_note(runs),
        "at_the_end": at_the_end(runs, names),
        "samples": samples(runs, names),
        "legend": legend(names),
        "configs": differences(configs_of(runs, names), same_config),
        "made_by": differences(places, same_place),
        "data": content.replace("<", "\\u003c"),
    })


def documents_note(runs: list[Run]) -> str:
    """What to know of the dev curves where not all runs were tested on the same documents."""
    if len({documents(run) for run in runs} - {None}) <= 1:
        return ""
    return (
        "<p class=note>Not all runs were tested on the same documents, so their dev documents may "
        "differ too: compare curves of bits per byte only within one table above.</p>"
    )


def legend(names: list[str]) -> str:
    """A button for each run."""
    start = "<button type=button aria-pressed=true"
    return "".join(f"{start} data-run={i}>{name}</button>" for i, name in enumerate(names))


def configs_of(runs: list[Run], names: list[str]) -> list[tuple[str, dict]]:
    """Each run's name and flat config, without what says only where it is."""
    found = []
    for run, name in zip(runs, names, strict=True):
        config = {key: value for key, value in run.config.items() if key not in ("name", "runs")}
        if config:
            found.append((name, flatten(config)))
    return found


def fill(gaps: dict[str, str]) -> str:
    """tools/report.html with its gaps filled in."""
    first, *pieces = (ROOT / "tools/report.html").read_text("utf-8").split("{{")
    out = [first]
    for piece in pieces:
        name, _, after = piece.partition("}}")
        out += [gaps[name], after]
    return "".join(out)


def main(arguments: list[str]):
    """Command line."""
    parser = Arguments("report", __doc__)
    runs_help = "directory of a run or a study"
    out_help = "of the page; RUN/report.html for one RUN, else report.html"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=runs_help)
    parser.add_argument("--out", help=out_help)
    given = parser.parse_args(arguments)
    paths = [user_path(path) for path in given.runs]
    runs, studies = collect(paths)
    out = Path("report.html")
    if len(paths) == 1:
        out = paths[0] / "report.html"
    if given.out is not None:
        out = user_path(given.out)
    if given.out == "" or out.is_dir():
        parser.error(f"--out is {given.out!r}; allowed is a file")
    write(out, page([path.resolve().name for path in paths], runs, studies))
    many = "run" if len(runs) == 1 else "runs"
    print(f"{out}: {len(runs)} {many}, {out.stat().st_size / 1e6:.1f} MB")
