"""One HTML page that compares runs and studies: curves, final figures, samples, configs. It needs no network.

RUN is the directory of a run, ended or not, or of a study: its result, and the runs that it compares (all its
runs where it has no result yet). The page is tools/report.html with the gaps filled in. Curves are thinned to
some hundred points, with the least and the greatest value around each.
"""
import base64
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
from lib.config import flatten
from lib.disk import write
from lib.errors import InputError
from train import ROOT

COLORS, DASHES = 7, ("", "7 3", "2 2.5", "9 3 2 3")  # the page has the colours
NUMBERS = 250_000  # in all curves of a page, which makes about 2 MB
SMOOTH = "train/loss", "train/grad_norm", "perf/tokens_per_s"  # means over a 50th of the run
CHARTS = {"train/loss": "Training loss (nats per token)",
          "eval/mean/bpb": "Dev, mean over sources (bits per byte)",
          "train/lr": "Learning rate", "train/grad_norm": "Gradient norm",
          "perf/tokens_per_s": "Throughput (tokens per second)"}
UNITS = {"bpb": "bits per byte", "loss": "nats per token"}
UNCHARTED = {"step", "phase", "train/tokens", "train/flops", "perf/step_ms"}


class Shown(NamedTuple):
    """A run on the page."""

    path: Path
    name: str
    group: str  # runs of one arm of a study have its colour in common
    rows: list[dict]  # of metrics.jsonl
    damaged: int  # lines of it that are left out
    config: dict  # empty where it cannot be read
    summary: dict  # empty until the run has ended


# ---------------------------------------------------------------------------------------------- what is there

def read(path: Path) -> dict:
    """A JSON object from a file; empty where there is none, or part of one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rows_of(path: Path) -> tuple[list[dict], int]:
    """(the rows of a metrics.jsonl, how many of its lines are none)."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(row, dict) and {"step", "phase", "train/tokens", "train/flops"} <= row.keys():
            rows.append(row)
    return rows, len(lines) - len(rows)


def collect(paths: list[Path]) -> tuple[list[Shown], list[tuple[Path, dict]]]:
    """(the runs, the studies with their results) that the arguments name."""
    runs, studies = {}, []
    for path in paths:
        result, inside = read(path / "study.json"), {}  # directory: colour
        if (path / "config.json").is_file():
            inside = {path: str(path)}
        elif result:
            studies.append((path, result))
            inside = {path / run["run"]: f"{path}:{arm}" for arm, f in result["arms"].items()
                      for run in f["runs"].values() if (path / run["run"]).is_dir()}
        elif not (inside := {p.parent: f"{path}:{p.parent.name.split('-')[0]}"
                             for p in sorted(path.glob("*/config.json"))}):
            raise InputError(f"{str(path)!r} is neither a run (it has no config.json) nor a study (it has no "
                             "study.json, and no run in it)")
        runs |= inside
    names, shown = collections.Counter(path.resolve().name for path in runs), []
    for path, group in runs.items():
        *_, above, name = path.resolve().parts
        name = name if names[name] == 1 and (path in paths or len(paths) == 1) else f"{above}/{name}"
        shown.append(Shown(path, name, group, *rows_of(path / "metrics.jsonl"), read(path / "config.json"),
                           read(path / "summary.json")))
    return shown, studies


def of_sources(row: dict, end: str) -> dict[str, float]:
    """{source: value} of the figures eval/SOURCE<end> in a row or a summary."""
    found = {k.removeprefix("eval/").removesuffix(end): v for k, v in row.items()
             if k.startswith("eval/") and k.endswith(end) and v is not None}
    return {name: v for name, v in found.items() if not name.endswith(".test")}


# ----------------------------------------------------------------------------------------------------- curves

def thin(rows: list[dict], keys: list[str], points: int) -> dict:
    """Rows in so many pieces: step, tokens and flops at the end of each, and `y`, {metric: (its last value or
    mean, see SMOOTH, its least in the piece, its greatest)}; None where it has none there.
    """
    edges = np.linspace(0, len(rows), min(len(rows), points) + 1).astype(int).tolist()
    ends = [rows[e - 1] for e in edges[1:]]
    out = dict(step=[r["step"] for r in ends], tokens=[r["train/tokens"] for r in ends],
               flops=[float(f"{r['train/flops']:.5g}") for r in ends], y={})
    for key in keys:
        values = np.array([r.get(key) for r in rows], float)  # None becomes NaN
        width, found = max(1, len(rows) // 50) if key in SMOOTH else 1, []
        for a, b in zip(edges, edges[1:], strict=False):
            near, piece = (v[np.isfinite(v)] for v in (values[max(0, min(a, b - width)):b], values[a:b]))
            three = (near[-width:].mean() if len(near) else None,
                     *((piece.min(), piece.max()) if len(piece) else (None, None)))
            found.append([None if v is None else float(f"{v:.5g}") for v in three])
        out["y"][key] = [list(column) for column in zip(*found, strict=True)] or [[], [], []]
    return out


def chart(runs: list[Shown]) -> tuple[dict[str, list[str]], dict[str, bool]]:
    """({section: metrics to chart}, {metric: is it one of training steps?}); adds the mean over sources."""
    of_steps, values = {}, collections.defaultdict(set)
    for row in (row for run in runs for row in run.rows):
        own = of_sources(row, "/bpb")
        row |= {"eval/mean/bpb": statistics.fmean(own.values())} if len(own) > 1 else {}
        for k, v in row.items():
            if isinstance(v, (int, float)) and not k.endswith("_se") and ".test/" not in k:
                of_steps.setdefault(k, "train/loss" in row)
                if len(values[k]) < 2:
                    values[k].add(v)
    dev = sorted(k for k in of_steps if k.startswith("eval/") and k.endswith("/bpb") and k not in CHARTS)
    losses = sorted(k for k in of_steps if k.startswith("eval/") and k.endswith("/loss"))
    first, several = [k for k in CHARTS if k in of_steps], "eval/mean/bpb" in of_steps
    first[1:1] = [] if several else dev
    by_source = dev + losses if several else []
    more = [k for k in sorted(of_steps) if len(values[k]) > 1 and k not in {*UNCHARTED, *first, *by_source}]
    sections = {"Curves": first, "Dev, by source": by_source, "More figures": more}
    return {title: keys for title, keys in sections.items() if keys}, of_steps


def curves(runs: list[Shown]) -> dict:
    """What the page's script draws: charts by section, and each run's curves, colour, dashes and phases."""
    sections, of_steps = chart(runs)
    drawn = [k for keys in sections.values() for k in keys]
    titles = CHARTS | {k: f"Dev, {k[5:].rpartition('/')[0]} ({UNITS[k.rpartition('/')[2]]})" for k in drawn
                       if k.startswith("eval/") and k.rpartition("/")[2] in UNITS and k not in CHARTS}
    points = int(np.clip(NUMBERS / 3 / max(1, len(runs) * (len(drawn) + 1)), 60, 500))
    groups, members, out = list(dict.fromkeys(run.group for run in runs)), collections.Counter(), []
    for run in runs:
        steps = [r for r in run.rows if "train/loss" in r]
        evals = [r for r in run.rows if "train/loss" not in r and not any(".test/" in k for k in r)]
        begins = [r for last, r in zip(steps, steps[1:], strict=False) if r.get("phase") != last.get("phase")]
        number, place = groups.index(run.group), members[run.group]
        members[run.group] += 1
        out.append(dict(
            name=run.name, color=number % COLORS, dash=DASHES[(number // COLORS + place) % len(DASHES)],
            steps=thin(steps, [k for k in drawn if of_steps[k]], points),
            evals=thin(evals, [k for k in drawn if not of_steps[k]], points),
            phases=[dict(step=r["step"] - 1, tokens=r["train/tokens"], flops=r["train/flops"],
                         text=f"phase {r['phase']}", size=r.get("model/params")) for r in begins]))
    charts = {title: [dict(key=k, title=titles.get(k, k)) for k in keys] for title, keys in sections.items()}
    return dict(runs=out, sections=[dict(title=title, charts=own) for title, own in charts.items()])


# ----------------------------------------------------------------------------------------------------- tables

def text(value) -> str:
    """Anything as HTML text."""
    return html.escape(str(value))


def span(kind: str, value) -> str:
    """Text of some kind, which the page's style knows."""
    return f"<span class={kind}>{text(value)}</span>"


def figure(value: float | None, form: str = ".3f", half: float | None = None) -> str:
    """A figure, with half the width of its interval where that is known; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return span("half", "–")
    known = half is not None and math.isfinite(half)
    return format(value, form) + (" " + span("half", f"± {format(half, form.strip('+'))}") if known else "")


def count(value: float | None) -> str:
    """A number of things, to three digits: 1.71M."""
    power = min(4, int(math.log10(value) // 3)) if value and value >= 1_000 else 0
    return figure(value, ".0f") if power == 0 else f"{value / 1e3 ** power:.3g}{' kMBT'[power]}"


def table(rows: list[list[str]], kind: str) -> str:
    """A table of cells that are HTML already; the first row and column stay in sight."""
    head = "".join(f"<th scope=col>{cell}</th>" for cell in rows[0])
    body = "".join(f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
                   for row in rows[1:])
    return (f'<div class="scroll {kind}" tabindex=0><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def intervals(values: list[tuple[float | None, float | None]], marks: dict[str, float]) -> list[str]:
    """Pictures of intervals (middle, half) on one scale, with lines at the marks."""
    values = [(m, h or 0.0) for m, h in values]
    known = [*marks.values(), *(end for m, h in values if m is not None for end in (m - h, m + h))]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0) or 1.0
    x = {v: round(6 + 148 * (v - low) / span, 1) for v in known}
    lines = "".join(f"<line class=mark x1={x[v]} x2={x[v]} y1=2 y2=20><title>{text(name)} {v:.3f}</title>"
                    "</line>" for name, v in marks.items())
    return ["" if m is None else
            f'<svg class=interval width=160 height=22 role=img aria-label="{m:.3f} ± {h:.3f}">{lines}'
            f'<line x1={x[m - h]} x2={x[m + h]} y1=11 y2=11 />'
            f'<circle cx={(x[m - h] + x[m + h]) / 2:.1f} cy=11 r=3.5 /></svg>' for m, h in values]


def state(run: Shown) -> str:
    """Where a run is, and what is wrong with its files."""
    total = sum(phase["steps"] for phase in run.config.get("phases", []))
    at = max((row["step"] for row in run.rows), default=0)
    said = span("wait", f"at step {at:,} of {total:,}" if at else "no metrics yet")
    said = span("good", "complete") if run.summary else said
    if run.damaged:
        said += " " + span("bad", f"{run.damaged} damaged line{'s' * (run.damaged > 1)} left out")
    return said if run.config else said + " " + span("bad", "config.json cannot be read")


def overview(runs: list[Shown], names: list[str]) -> str:
    """The runs at a glance, with their test figures beside those of gzip and xz."""
    rows, tests, marks = [], [], {}
    for run, name in zip(runs, names, strict=True):
        steps = [row for row in run.rows if "train/loss" in row] or [{}]
        end, summary = steps[-1], run.summary
        tail = steps[-max(1, len(steps) // 50):]
        losses = [row["train/loss"] for row in tail if row.get("train/loss") is not None]
        dev = [statistics.fmean(own.values()) for row in run.rows if (own := of_sources(row, "/bpb"))]
        test, errors = (list(of_sources(summary, f".test/{k}").values()) for k in ("bpb", "bpb_se"))
        mean = statistics.fmean(test) if test else None
        error = math.hypot(*errors) / len(errors) if errors else math.nan  # of a mean of independent figures
        tests.append((mean, 1.96 * error if math.isfinite(error) else None))
        marks |= {k: summary[f"{k}_bpb"] for k in ("gzip", "xz") if f"{k}_bpb" in summary}
        speed = [row["perf/tokens_per_s"] for row in steps if row.get("perf/tokens_per_s")]
        rows.append([name, state(run), count(end.get("model/params")), count(end.get("train/tokens")),
                     figure(end.get("train/flops"), ".2e"),
                     figure(statistics.fmean(losses) if losses else None),
                     figure(dev[-1] if dev else None), figure(mean, half=error), "",
                     *(figure(summary.get(f"{k}_bpb")) for k in ("gzip", "xz")),
                     count(statistics.median(speed) if speed else None)])
    for row, picture in zip(rows, intervals(tests, marks), strict=True):
        row[8] = picture
    return table([["run", "state", "parameters", "tokens", "FLOPs", "train loss", "dev", "test ± s.e.",
                   f"95 %{', '.join(['', *marks])}", "gzip -9", "xz -9", "tokens/s"], *rows], "numbers")


def at_the_end(runs: list[Shown], names: list[str]) -> str:
    """Test bits per byte by source, where there are several, and what else was evaluated at the end."""
    several = list(dict.fromkeys(n for run in runs for n in of_sources(run.summary, ".test/bpb")))
    keys = {f"{n} (bits per byte)": f"eval/{n}.test/bpb" for n in several} if len(several) > 1 else {}
    of_steps = {k for run in runs for row in run.rows for k in row}
    keys |= {k: k for run in runs for k, v in run.summary.items() if isinstance(v, float) and not
             (k in of_steps or k.endswith(("_se", "_bpb")) or k.startswith("eval/"))}
    rows = [[name, *(figure(run.summary.get(k), half=run.summary.get(f"{k}_se")) for k in keys.values())]
            for run, name in zip(runs, names, strict=True) if run.summary]
    return f"<h2>Test figures</h2>{table([['run', *map(text, keys)], *rows], 'numbers')}" if keys else ""


def differences(found: list[tuple[str, dict]], same: str) -> str:
    """Flat dictionaries by name: a table of what differs between them, and folded away what does not."""
    if not found:
        return "<p>Nothing is known of this yet.</p>"
    keys = list(dict.fromkeys(k for _, own in found for k in own))
    differ = [k for k in keys if len({json.dumps(own.get(k)) for _, own in found}) > 1]
    rows = [["", *map(text, differ)]]
    rows += [[name, *(text("–" if own.get(k) is None else own[k]) for k in differ)] for name, own in found]
    if len(differ) > len(found):  # the longer side goes down the page
        rows = [list(column) for column in zip(*rows, strict=True)]
    alike = [[text(k), text(found[0][1].get(k))] for k in keys if k not in differ]
    return (table(rows, "fields") if differ else "") + (
        f"<details><summary>{same}: {len(alike)}</summary>{table([['', 'value'], *alike], 'fields')}"
        "</details>" if alike else "")


def samples(runs: list[Shown], names: list[str]) -> str:
    """What each run continued its prompts with."""
    found = [(name, file.read_text("utf-8", "replace")) for run, name in zip(runs, names, strict=True)
             if (file := run.path / "samples.txt").is_file()]
    return "<h2>Samples</h2><div class=samples>" + "".join(
        f"<details{' open' * (i < 4)}><summary>{name}</summary><pre>\n{text(sample)}</pre></details>"
        for i, (name, sample) in enumerate(found)) + "</div>" if found else ""


def made_by(run: Shown) -> dict:
    """Where a run was made, and by which versions; known once it has ended."""
    keys = "host", "device", "devices", "processes", "commit"
    return {k: run.summary[k] for k in keys if k in run.summary} | run.summary.get("versions", {})


# -------------------------------------------------------------------------------------------------- the study

def arms_of(result: dict) -> str:
    """A study's arms, and their differences to the control with 95 % intervals."""
    control, arms = result["control"], result["arms"]
    rows = [["arm", "rate", "tokens", "FLOPs"]]
    tested = any(f["bpb"][0] is not None for f in arms.values())
    rows[0] += ["test (bits per byte)", f"less {text(control)}'s", "95 %", "speed-up, FLOPs",
                "speed-up, tokens"] if tested else []
    ends = {arm: f["less_control"]["bpb"] for arm, f in arms.items() if arm != control}
    pictures = dict(zip(ends, intervals([(d["mean"], d["half"]) for d in ends.values()], {control: 0.0}),
                        strict=True))
    for arm, f in arms.items():
        warned = " " + span("wait", "not bracketed") if f["bracketed"] is False else ""
        rows.append([text(arm), figure(f["rate"], "g") + warned, count(f["tokens"]),
                     figure(f["flops"], ".2e")])
        less, *faster = [figure(d["mean"], form, d["half"]) for d, form in zip(
            f["less_control"].values(), ("+.4f", "+.1%", "+.1%"), strict=True)]
        own = [less, pictures[arm], *faster] if arm in pictures else ["control", "", "", ""]
        rows[-1] += [figure(f["bpb"][0], ".4f", f["bpb"][1]), *own] if tested else []
    return table(rows, "numbers")


def study(path: Path, result: dict) -> str:
    """A study's result: claims with their verdicts, tables with intervals, and its picture."""
    control, cost, n = result["control"], result["cost"], result["seeds"]
    notes = ["--quick: too short to say anything of the question"] * result["quick"]
    notes += [f"{run} failed, {why}" for run, why in result["failed"].items()]
    notes += ["not all runs were made by the same versions, commit and device"] * (len(result["made_by"]) > 1)
    claims = [f"<li>{span(c['verdict'], c['verdict'])} {text(c['says'])} <small>({text(c['measure'])}, "
              f"{text(c['arm'])} less {text(c['control'])}: {figure(c['mean'], '+.4f', c['half'])}; claimed "
              f"{'above' if 'above' in c else 'below'} {c.get('above', c.get('below'))})</small></li>"
              for c in result["claims"]]
    measures = [[text(name), *(figure(by[arm]["own"][0], ".4f", by[arm]["own"][1]) + (
        "" if arm == control else f"<br>{figure(by[arm]['mean'], '+.4f', by[arm]['half'])}")
        for arm in result["arms"])] for name, by in result["measures"].items()]
    picture = path / "study.png"
    image = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    return "".join([
        f"<section><h2>Study: {text(result['study'])}</h2>",
        f"<p>{f'{n} paired seeds; ± is half a 95 % interval.' if n > 1 else 'One seed: no intervals.'} "
        f"The runs compared took {cost['flops']:.3g} FLOPs and {cost['tokens']:,} tokens, tuning took "
        f"{cost['tuning_flops']:.3g} and {cost['tuning_tokens']:,}.</p>",
        *(f"<p class=wait>{text(note)}</p>" for note in notes),
        f"<ul class=claims>{''.join(claims)}</ul>" if claims else "", arms_of(result),
        table([[f"(less {text(control)}'s)", *map(text, result["arms"])], *measures], "numbers")
        if measures else "",
        f'<img alt="Dev curves, and differences to {text(control)}" src="data:image/png;base64,{image}">'
        if image else "", "</section>"])


def page(titles: list[str], runs: list[Shown], studies: list[tuple[Path, dict]]) -> str:
    """The page; whatever somebody else wrote is escaped in it."""
    drawn = curves(runs)
    names = ['<span class=key><svg width=26 height=10><line x1=1 x2=25 y1=5 y2=5 '
             f'stroke="var(--c{run["color"]})" stroke-dasharray="{run["dash"]}" /></svg>'
             f'{text(run["name"])}</span>' for run in drawn["runs"]]
    configs = [(name, flatten({k: v for k, v in run.config.items() if k not in ("name", "runs")}))
               for run, name in zip(runs, names, strict=True) if run.config]
    gaps = dict(
        title=text(", ".join(titles[:4]) + (f" and {len(titles) - 4} more" if len(titles) > 4 else "")),
        made=time.strftime("%Y-%m-%d %H:%M"), runs=str(len(runs)), overview=overview(runs, names),
        studies="".join(study(*s) for s in studies), at_the_end=at_the_end(runs, names),
        samples=samples(runs, names),
        legend="".join(f"<button type=button aria-pressed=true data-run={i}>{name}</button>"
                       for i, name in enumerate(names)),
        configs=differences(configs, "fields that are the same" if len(runs) > 1 else "every field"),
        made_by=differences([(n, made_by(run)) for run, n in zip(runs, names, strict=True) if run.summary],
                            "the same for all" if len(runs) > 1 else "versions and place"),
        data=json.dumps(drawn, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    first, *rest = (ROOT / "tools/report.html").read_text("utf-8").split("{{")
    return first + "".join(gaps[name] + after for name, _, after in (piece.partition("}}") for piece in rest))


def main(arguments: list[str]):
    """Command line."""
    parser = Arguments("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run or a study")
    parser.add_argument("--out", type=Path, help="of the page; RUN/report.html for one RUN, else report.html")
    a = parser.parse_args(arguments)
    paths = [path.expanduser() for path in a.runs]
    runs, studies = collect(paths)
    out = (a.out or (paths[0] if len(paths) == 1 else Path()) / "report.html").expanduser()
    write(out, page([path.resolve().name for path in paths], runs, studies))
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 1e6:.1f} MB")
