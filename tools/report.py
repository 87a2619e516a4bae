"""One HTML page that compares runs and studies: curves, final figures, samples, configs. It needs no network.

    python train.py report RUN... [--out FILE]

RUN is a run's directory, complete or not, or a study's: its result, and the runs that it compares (all of its runs
where it has none yet). The page is RUN/report.html for one, report.html here for several. What tools/report.html
leaves open is filled in; curves are thinned to a few hundred points each, with the least and the greatest between.
"""
import base64
import collections
import html
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import train
from data import InputError

COLORS, DASHES = 7, ("", "7 3", "2 2.5", "9 3 2 3")  # the colours are in tools/report.html
NUMBERS = 250_000  # in all curves of a page, about 2 MB
SMOOTH = "train/loss", "train/grad_norm", "perf/tokens_per_s"  # trailing means; of all else, the value itself
CHARTS = {"train/loss": "Training loss (nats per token)", "eval/mean/bpb": "Dev, mean over sources (bits per byte)",
          "train/lr": "Learning rate", "train/grad_norm": "Gradient norm",
          "perf/tokens_per_s": "Throughput (tokens per second)"}
AXES = "step", "tokens", "flops"


class Shown(NamedTuple):
    """A run on the page."""

    path: Path
    name: str
    group: str  # runs of one arm of a study have its colour in common
    rows: list[dict]  # of metrics.jsonl
    damaged: int  # lines of it that are left out
    config: dict
    summary: dict  # empty until the run has ended


# -------------------------------------------------------------------------------------------------- what is there


def read(path: Path) -> dict:
    """A JSON object from a file; empty where there is none, or half of one."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rows_of(path: Path) -> tuple[list[dict], int]:
    """(the rows of a metrics.jsonl, how many lines of it are none)."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            rows += [row] if {"step", "train/tokens", "train/flops"} <= row.keys() else []
        except (ValueError, AttributeError):  # a torn line; one that holds something else
            continue
    return rows, len(lines) - len(rows)


def collect(paths: list[Path]) -> tuple[list[Shown], list[tuple[Path, dict]]]:
    """(the runs, the studies with their results) that the arguments name."""
    runs, studies = [], []
    for path in paths:
        result = read(path / "study.json")
        if (path / "config.json").is_file():
            inside = [(path, "")]
        elif result:
            studies.append((path, result))
            inside = [(path / run["run"], arm) for arm, f in result["arms"].items() for run in f["runs"].values()]
        else:
            inside = [(p.parent, p.parent.name.split("-")[0]) for p in sorted(path.glob("*/config.json"))]
        if not inside:
            raise InputError(f"{str(path)!r} is neither a run (it has no config.json) nor a study "
                             "(no study.json, and no run in it)")
        runs += [(p, group and f"{path}:{group}") for p, group in inside if p.is_dir()]
    runs = list(dict(runs).items())
    names = [p.resolve().name for p, _ in runs]
    shown = []
    for (path, group), name in zip(runs, names, strict=True):
        name = name if names.count(name) == 1 else os.path.join(*path.resolve().parts[-2:])
        shown.append(Shown(path, name, group or str(path), *rows_of(path / "metrics.jsonl"),
                           read(path / "config.json"), read(path / "summary.json")))
    return shown, studies


def sources(row: dict, end: str) -> dict[str, float]:
    """{source: value} of a row's or summary's figures eval/SOURCE<end>."""
    found = {k.removeprefix("eval/").removesuffix(end): v for k, v in row.items()
             if k.startswith("eval/") and k.endswith(end) and v is not None}
    return {name: v for name, v in found.items() if not name.endswith(".test")}


# --------------------------------------------------------------------------------------------------------- curves


def thin(rows: list[dict], keys: list[str], points: int) -> dict:
    """Rows cut into so many pieces: where each ends on the axes, and by metric its value there (or a trailing mean,
    see SMOOTH) with the least and the greatest of the piece. Null where there is none.
    """
    edges = np.linspace(0, len(rows), min(len(rows), points) + 1).astype(int)
    out: dict = {a: [rows[e - 1].get(a, rows[e - 1].get(f"train/{a}")) for e in edges[1:]] for a in AXES}
    out["flops"], out["y"] = [float(f"{x:.5g}") for x in out["flops"]], {}
    for key in keys:
        values = np.array([r.get(key, math.nan) for r in rows], float)  # None becomes NaN
        width = max(1, len(rows) // 50) if key in SMOOTH else 1
        found = []
        for a, b in zip(edges, edges[1:], strict=False):
            near, piece = (v[np.isfinite(v)] for v in (values[max(0, min(a, b - width)):b], values[a:b]))
            mean = near[-width:].mean() if len(near) else math.nan
            least, most = (piece.min(), piece.max()) if len(piece) else (math.nan, math.nan)
            found.append([float(f"{v:.5g}") if math.isfinite(v) else None for v in (mean, least, most)])
        out["y"][key] = [list(column) for column in zip(*found, strict=True)] if found else [[], [], []]
    return out


def curves(runs: list[Shown]) -> dict:
    """What the page's script draws: the charts by section, and the curves of each run."""
    keys, distinct, several = {}, collections.defaultdict(set), False
    for run in runs:
        for row in run.rows:
            own = sources(row, "/bpb")
            if len(own) > 1:
                row["eval/mean/bpb"], several = statistics.fmean(own.values()), True
            for k, v in row.items():
                if isinstance(v, (int, float)) and not k.endswith("_se") and ".test/" not in k:
                    keys.setdefault(k, "train/loss" in row)
                    if len(distinct[k]) < 2:
                        distinct[k].add(v)
    hidden = {"step", "phase", "train/tokens", "train/flops", "perf/step_ms"}
    first = [k for k in CHARTS if k in keys]
    held = sorted(k for k in keys if k.startswith("eval/") and k.endswith("/bpb") and k not in first)
    by_source = sorted(k for k in keys if k.startswith("eval/") and k.endswith("/loss")) if several else []
    more = sorted(k for k in keys if k not in {*hidden, *first, *held, *by_source} and len(distinct[k]) > 1)
    first = first[:1] + ["eval/mean/bpb"] * several + ([] if several else held) + [
        k for k in first[1:] if k != "eval/mean/bpb"]
    sections = {"Curves": first, "Dev, by source": held + by_source if several else [], "More figures": more}
    titles = CHARTS | {k: f"Dev, {k.split('/')[1]} ({unit})" for end, unit in (
        ("/bpb", "bits per byte"), ("/loss", "nats per token")) for k in held + by_source if k.endswith(end)}
    points = int(np.clip(NUMBERS / 3 / max(1, len(runs) * (len(keys) + 2)), 60, 500))
    drawn = [k for section in sections.values() for k in section]
    groups = list(dict.fromkeys(run.group for run in runs))
    out = []
    for run in runs:
        place = [r.path for r in runs if r.group == run.group].index(run.path)
        number = groups.index(run.group)
        steps = [r for r in run.rows if "train/loss" in r]
        evals = [r for r in run.rows if "train/loss" not in r and not any(".test/" in k for k in r)]
        starts = [r for a, r in zip([{}, *steps], steps, strict=False) if r.get("phase") != a.get("phase")]
        out.append(dict(
            name=run.name, color=number % COLORS, dash=DASHES[(number // COLORS + place) % len(DASHES)],
            steps=thin(steps, [k for k in drawn if keys[k]], points),
            evals=thin(evals, [k for k in drawn if not keys[k]], 500),
            phases=[dict(step=r["step"] - 1, tokens=r["train/tokens"], flops=r["train/flops"],
                         text=f"phase {r['phase']}", size=r.get("model/params")) for r in starts[1:]]))
    return dict(runs=out, sections=[dict(title=title, charts=[dict(key=k, title=titles.get(k, k)) for k in own])
                                    for title, own in sections.items() if own])


# --------------------------------------------------------------------------------------------------------- tables


def text(value) -> str:
    """Anything as HTML text."""
    return html.escape(str(value))


def number(value, form: str = ".3f", half: float | None = None) -> str:
    """A figure as HTML, with half its interval's width where that is known; a dash for none."""
    if value is None or not math.isfinite(value):
        return "<span class=none>–</span>"
    known = half is not None and math.isfinite(half)
    return format(value, form) + (f" <span class=half>± {format(half, form.strip('+'))}</span>" if known else "")


def short(value: float | None) -> str:
    """A count with three digits: 1.71M."""
    if not value:
        return number(value, ".0f")
    power = min(4, max(0, int(math.log10(value) // 3)))
    return f"{value / 1e3 ** power:.3g}{' kMBT'[power].strip()}" if value < 1e15 else f"{value:.2e}"


def table(head: list[str], body: list[list[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first of each row stays in sight."""
    rows = "".join(f"<tr><th scope=row>{row[0]}</th>{''.join(f'<td>{c}</td>' for c in row[1:])}</tr>" for row in body)
    heads = "".join(f"<th scope=col>{h}</th>" for h in head)
    return f'<div class="scroll {kind}"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def key(i: int, run: dict) -> str:
    """A run's name beside a piece of its curve."""
    return (f'<span class=key data-run={i}><svg width=26 height=10><line x1=1 x2=25 y1=5 y2=5 stroke="var(--c'
            f'{run["color"]})" stroke-dasharray="{run["dash"]}" /></svg>{text(run["name"])}</span>')


def ranges(values: list[tuple[float, float]], marks: dict[str, float]) -> list[str]:
    """Intervals (middle, half) as small pictures on one scale that has the marks too, each with its name."""
    known = [m for m in marks.values() if m] + [m + s * h for m, h in values for s in (-1, 1) if math.isfinite(m)]
    if not known:
        return [""] * len(values)
    low, span = min(known), (max(known) - min(known)) or 1.0

    def x(v: float) -> float:
        return round(6 + 148 * (v - low) / span, 1)

    lines = "".join(f'<line class=mark x1={x(m)} x2={x(m)} y1=2 y2=20><title>{text(name)} {m:.3f}</title></line>'
                    for name, m in marks.items() if m)
    return [f'<svg class=range width=160 height=22 role=img aria-label="{m:.3f} ± {h:.3f}">{lines}<line x1={x(m - h)} '
            f'x2={x(m + h)} y1=11 y2=11 /><circle cx={x(m)} cy=11 r=3.5 /></svg>' if math.isfinite(m) else ""
            for m, h in values]


def status(run: Shown) -> str:
    """Where a run is, and what is wrong with its files."""
    total = sum(phase.get("steps", 0) for phase in run.config.get("phases", []))
    at = max((r["step"] for r in run.rows), default=0)
    said = [("good", "complete") if run.summary else ("wait", f"at step {at:,} of {total:,}") if at else
            ("wait", "no metrics yet")]
    said += [("bad", f"{run.damaged} damaged line{'s' * (run.damaged > 1)} left out")] if run.damaged else []
    said += [] if run.config else [("bad", "config.json is damaged")]
    return " ".join(f"<span class={kind}>{words}</span>" for kind, words in said)


def overview(runs: list[Shown], keys: list[str]) -> str:
    """The runs at a glance, with their test figures beside gzip and xz."""
    body, tests, marks = [], [], {}
    for run in runs:
        steps = [r for r in run.rows if "train/loss" in r] or [{}]
        evals = [statistics.fmean(own.values()) for r in run.rows if (own := sources(r, "/bpb"))]
        test, errors = ([*sources(run.summary, f".test/{k}").values()] for k in ("bpb", "bpb_se"))
        mean = statistics.fmean(test) if test else math.nan
        error = math.hypot(*errors) / len(errors) if errors else math.nan  # that of a mean of independent ones
        tests.append((mean, 1.96 * error if math.isfinite(error) else 0.0))
        marks |= {name: run.summary.get(f"{name}_bpb") for name in ("gzip", "xz") if run.summary.get(f"{name}_bpb")}
        speed = [r["perf/tokens_per_s"] for r in steps if r.get("perf/tokens_per_s")]
        last = [r["train/loss"] for r in steps[-max(1, len(steps) // 50):] if r.get("train/loss") is not None]
        body.append([status(run), short(steps[-1].get("model/params")), short(steps[-1].get("train/tokens")),
                     number(steps[-1].get("train/flops"), ".2e"), number(statistics.fmean(last) if last else None),
                     number(evals[-1] if evals else None), number(mean, half=error), "",
                     *(number(run.summary.get(f"{name}_bpb")) for name in ("gzip", "xz")),
                     short(statistics.median(speed) if speed else None)])
    for row, picture in zip(body, ranges(tests, marks), strict=True):
        row[7] = picture
    head = ["run", "state", "parameters", "tokens", "FLOPs", "train loss", "dev", "test ± s.e.",
            "95 %, gzip, xz" if marks else "95 %", "gzip -9", "xz -9", "tokens/s"]
    return table(head, [[k, *row] for k, row in zip(keys, body, strict=True)], "numbers")


def by_source(runs: list[Shown], keys: list[str]) -> str:
    """Test bits per byte of each source, where there are several, and what else was evaluated at the end."""
    known = ("train/", "perf/", "data/", "model/", "eval/")
    names = list(dict.fromkeys(n for run in runs for n in sources(run.summary, ".test/bpb")))
    names = names if len(names) > 1 else []
    other = list(dict.fromkeys(k for run in runs for k, v in run.summary.items() if isinstance(v, float)
                               and not k.startswith(known) and not k.endswith(("_se", "_bpb", "norm", "_ratio"))))
    body = [[k, *(number(run.summary.get(f"eval/{n}.test/bpb"), half=run.summary.get(f"eval/{n}.test/bpb_se"))
                  for n in names), *(number(run.summary.get(n), half=run.summary.get(f"{n}_se")) for n in other)]
            for run, k in zip(runs, keys, strict=True) if run.summary]
    head = ["run", *(f"{text(n)} (bits per byte)" for n in names), *map(text, other)]
    return f"<h2>Test figures</h2>{table(head, body, 'numbers')}" if len(head) > 1 and body else ""


def differences(found: list[dict], keys: list[str], same: str) -> str:
    """Flat dictionaries beside each other: a table of what differs, and in a sentence or a list what does not."""
    names = list(dict.fromkeys(name for own in found for name in own))
    differ = [n for n in names if len({json.dumps(own.get(n), sort_keys=True) for own in found}) > 1]
    rows = [["", *map(text, differ)]] + [[k, *(text("–" if own.get(n) is None else own[n]) for n in differ)]
                                         for own, k in zip(found, keys, strict=True)]
    if len(differ) > len(found):  # the longer side goes down the page
        rows = [list(column) for column in zip(*rows, strict=True)]
    alike = table(["field", "value"], [[text(n), text(found[0][n])] for n in names if n not in differ])
    return (table(rows[0], rows[1:], "fields") if differ else "") + (
        f"<details><summary>{text(same)} ({len(names) - len(differ)})</summary>{alike}</details>"
        if len(names) > len(differ) else "")


def study(path: Path, result: dict) -> str:
    """A study's result: its table with intervals, its picture, and what became of its claims."""
    control, arms = result["control"], result["arms"]
    tested = any(f["bpb"][0] is not None for f in arms.values())
    ends = [f["less_control"]["bpb"] for f in arms.values()]
    pictures = ranges([(d["mean"], d["half"] or 0.0) if arm != control and d["mean"] is not None else (math.nan, 0.0)
                       for arm, d in zip(arms, ends, strict=True)], {control: 1e-12})
    body = []
    for (arm, f), picture in zip(arms.items(), pictures, strict=True):
        rate = f"{f['rate']:g}" if f["rate"] else "its own"
        cells = [text(arm), rate + (" <span class=wait>not bracketed</span>" if f["bracketed"] is False else ""),
                 short(f["tokens"]), number(f["flops"], ".2e")]
        if tested:
            own = [number(d["mean"], form, d["half"]) if arm != control else "control" if m == "bpb" else ""
                   for (m, d), form in zip(f["less_control"].items(), ("+.4f", "+.1%", "+.1%"), strict=True)]
            cells += [number(f["bpb"][0], ".4f", f["bpb"][1]), own[0], picture, *own[1:]]
        body.append(cells)
    head = ["arm", "rate", "tokens", "FLOPs"] + (["test (bits per byte)", f"less {text(control)}'s", "95 %",
                                                  "speed-up, FLOPs", "speed-up, tokens"] if tested else [])
    claims = "".join(
        f"<li><span class={c['verdict']}>{c['verdict']}</span> {text(c['says'])} <small>{text(c['measure'])}, "
        f"{text(c['arm'])} less {text(c['control'])}: {number(c['mean'], '+.4f', c['half'])}; claimed "
        f"{'above' if 'above' in c else 'below'} {c.get('above', c.get('below'))}</small></li>" for c in result["claims"])
    measures = [[text(name), *(number(by[a]["own"][0], ".4f", by[a]["own"][1]) + (
        "" if a == control or by[a]["mean"] is None else f"<br>{number(by[a]['mean'], '+.4f', by[a]['half'])}")
        for a in arms)] for name, by in result["measures"].items()]
    notes = ["--quick: too short to say anything of the question"] if result["quick"] else []
    notes += [f"{run} failed, {why}" for run, why in result["failed"].items()]
    notes += ["not all runs were made by the same versions, commit and device"] if len(result["made_by"]) > 1 else []
    picture = path / "study.png"
    image = base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    cost, n = result["cost"], result["seeds"]
    intervals = f"{n} paired seeds; ± is half a 95 % interval." if n > 1 else "One seed: no intervals."
    return "".join([
        f"<section><h2>Study {text(result['study'])}</h2><p>{intervals} The runs compared took {cost['flops']:.3g} "
        f"FLOPs and {cost['tokens']:,} tokens, tuning took {cost['tuning_flops']:.3g} and {cost['tuning_tokens']:,}.</p>",
        *(f"<p class=note>{text(note)}</p>" for note in notes), table(head, body, "numbers"),
        f"<ul class=claims>{claims}</ul>" if claims else "",
        table([f"(less {text(control)}'s)", *map(text, arms)], measures, "numbers") if measures else "",
        f'<img alt="Curves on dev and differences to {text(control)}" src="data:image/png;base64,{image}">' if image else
        "", "</section>"])


def samples(runs: list[Shown], keys: list[str]) -> str:
    """What each run continued its prompts with."""
    found = [(k, (run.path / "samples.txt").read_text("utf-8", "replace")) for run, k in zip(runs, keys, strict=True)
             if (run.path / "samples.txt").is_file()]
    return "<h2>Samples</h2><div class=samples>" + "".join(
        f"<details{' open' * (i < 4)}><summary>{k}</summary><pre>{text(s)}</pre></details>"
        for i, (k, s) in enumerate(found)) + "</div>" if found else ""


def made_by(run: Shown) -> dict:
    """What made a complete run."""
    found = {k: run.summary.get(k) for k in ("host", "device", "devices", "processes", "commit")}
    return {k: v for k, v in (found | run.summary.get("versions", {})).items() if v is not None}


def page(runs: list[Shown], studies: list[tuple[Path, dict]]) -> str:
    """The page; everything in it that somebody else wrote is escaped."""
    drawn = curves(runs)
    keys = [key(i, run) for i, run in enumerate(drawn["runs"])]
    ended = [(made_by(run), k) for run, k in zip(runs, keys, strict=True) if run.summary]
    configs = [train.flatten({k: v for k, v in run.config.items() if k not in ("name", "runs")}) for run in runs]
    parts = dict(
        title=text(", ".join([r["study"] for _, r in studies] or [run.name for run in runs[:3]])
                   + (f" and {len(runs) - 3} more" if not studies and len(runs) > 3 else "")),
        made=time.strftime("%Y-%m-%d %H:%M"), runs=str(len(runs)),
        studies="".join(study(*s) for s in studies), overview=overview(runs, keys), by_source=by_source(runs, keys),
        legend="".join(f'<button type=button aria-pressed=true data-run={i}>{k}</button>' for i, k in enumerate(keys)),
        samples=samples(runs, keys),
        configs=differences(configs, keys, "Fields that are the same" if len(runs) > 1 else "Every field"),
        made_by=differences(*map(list, zip(*ended, strict=True)), "The same for all") if ended else
        "<p>No run has ended yet.</p>",
        data=json.dumps(drawn, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    pieces = (train.ROOT / "tools/report.html").read_text("utf-8").split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (p.partition("}}") for p in pieces[1:]))


def main(arguments: list[str]):
    """Command line."""
    parser = train.Arguments("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run or a study")
    parser.add_argument("--out", type=Path, help="the page; RUN/report.html for one RUN, else report.html")
    a = parser.parse_args(arguments)
    runs, studies = collect([path.expanduser() for path in a.runs])
    out = a.out or (a.runs[0].expanduser() if len(a.runs) == 1 else Path()) / "report.html"
    data.write(out, page(runs, studies))
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {out.stat().st_size / 1e6:.1f} MB")
