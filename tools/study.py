"""A study: arms over paired seeds, each at its own best learning rate, beside a control, with intervals.

    python train.py study CONFIG [--seeds N] [--arms A,B] [--quick] [--jobs N] [--runs DIR]

CONFIG is a file that defines `arms = {name: Config}` and, where it wants them,

    control        the arm that the others are compared to; the first one by default
    default_arms   names of the arms that run without --arms; all by default
    rates          peak learning rates to tune each arm over; without them, each arm's own. A rate is the
                   run's schedule.peak; a phase's own schedule keeps its peak's ratio to that
    quick          {field: value} to set in every arm with --quick; `phases.*.steps` means each phase's
    teacher_flops  {arm: FLOPs spent on it elsewhere, say on a teacher or on a run that it starts from}
    measures       {name: function of the rows of a metrics.jsonl -> float}, shown in a table of their own
    tuned_by       the one of them whose least value decides on a rate; without it, the last dev bits per byte
    claims         what is expected, written down before it is run. Each is a dictionary:
        says            in words
        arm, control    names of arms
        measure         bpb: arm less control in bits per byte of the test split, means over sources (the
                        default); speed_up_flops, speed_up_tokens: see `speed_up`; one of `measures`; or the
                        name of any figure in metrics.jsonl, whose last values are subtracted
        below or above  the bound on whose one side the whole 95 % interval is expected to lie

Each arm is tuned on seed 0, by its last bits per byte on dev (or `tuned_by`), and runs with seeds 1 to N at
the rate found.
Equal seeds mean equal data order and initial draws, so differences are paired. Where an arm's best rate is
an end of the grid, the grid is extended for it by its own ratio, at most twice; if that does not bracket the
best, the table says so. --quick: the middle rate, untuned, and two seeds.

Runs are ordinary ones, RUNS/STUDY/ARM-RATE-sSEED, made by the ordinary command in a process of their own, one
a GPU at a time or, without GPUs, --jobs at a time, each on its share of the cores; what is complete is not
run again. Beside them: study.json, study.png, a log of each run.
"""
import json
import math
import os
import queue
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.special import stdtrit

from lib.arguments import Arguments
from lib.config import flatten, load_file, to_json
from lib.disk import write
from lib.errors import InputError
from lib.schedule import schedules
from train import ROOT, check, load_config, parse

EXTRA = 2  # rates tried beyond the grid before an arm's best one is reported as not bracketed
HARMLESS = "name runs prompts sample_tokens sample_temperature save_every keep tracker".split()  # at its end
KEEP = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small programs too, for the runs to come
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
MEASURES = "bpb", "speed_up_flops", "speed_up_tokens"


class Job(NamedTuple):
    """One run of a study."""

    arm: str
    rate: float | None  # None: the arm's own
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        return f"{self.arm}-{'own' if self.rate is None else format(self.rate, 'g')}-s{self.seed}"


class Study(NamedTuple):
    """A study's file and what a command asks of it."""

    path: str  # of the file
    directory: Path
    arms: list[str]  # that run, the control first
    rates: list[float]  # ascending; none: each arm's own
    quick: dict
    teacher: dict[str, float]  # FLOPs spent elsewhere, by arm
    claims: list[dict]  # about these arms
    failed: dict[str, str]  # run: why
    measures: dict[str, Callable]  # of a run's rows
    tuned_by: str  # one of these, or "" for the last bits per byte on dev
    jobs: int  # runs at a time where there are no GPUs


# ----------------------------------------------------------------------------------------------- the figures


def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half the width of its 95 % interval by Student's t); the latter is None for one value."""
    n, mean = len(values), statistics.fmean(values)
    return mean, float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def reach(budget: list[float], losses: list[float], target: float) -> float:
    """The budget at which a curve first comes down to `target`, linear between its points; inf if never."""
    i = next((i for i, loss in enumerate(losses) if loss <= target), None)
    if not i:  # before the first point nothing is known
        return math.inf if i is None else budget[0]
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return budget[i - 1] + share * (budget[i] - budget[i - 1])


def speed_up(arm: dict, control: dict, axis: str) -> float:
    """How much more of a budget ("flops" or "tokens") the control needs than the arm for the same dev loss.

    0.5 is half as much again. The loss is the worse one of the two ends, so that both reach it; the better
    run does so before its rate has decayed, which understates the difference between them.
    """
    target = max(arm["dev"], control["dev"])
    needs = [reach(run["curve"][axis], run["curve"]["dev"], target) for run in (control, arm)]
    return needs[0] / needs[1] - 1


def verdict(mean: float | None, half: float | None, claim: dict) -> str:
    """confirmed: the whole interval is on the side claimed; reversed: on the other; undecided: neither."""
    if half is None:
        return "undecided"
    ahead = mean - claim["above"] if "above" in claim else claim["below"] - mean
    return "confirmed" if ahead > half else "reversed" if ahead < -half else "undecided"


def best(tried: dict[float, float]) -> tuple[float, bool]:
    """(the rate with the least dev loss of {rate: loss}, whether rates on both sides of it were tried)."""
    rate = min(tried, key=tried.get)
    return rate, min(tried) < rate < max(tried)


def extension(tried: dict[float, float], grid: list[float]) -> float | None:
    """The next rate to try where the best so far is an end of what was tried, or None."""
    (rate, bracketed), known = best(tried), sorted(tried)
    if bracketed or len(known) - len(grid) >= EXTRA:
        return None
    return float(f"{rate * (known[-1] / known[-2] if rate == known[-1] else known[0] / known[1]):.3g}")


def figures(run: Path, elsewhere: float = 0.0, measures: dict[str, Callable] | None = None) -> dict:
    """What a study needs of a complete run; its FLOPs include those spent elsewhere.

    bpb (test) and dev are means over sources, or None where there is no such split; last: every metric's
    last value, and the study's own `measures`.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    def mean(row: dict, test: bool) -> float | None:
        found = [v for k, v in row.items() if k.endswith("/bpb") and k.endswith(".test/bpb") == test]
        return statistics.fmean(found) if found and None not in found else None

    points = [(r["train/tokens"], r["train/flops"] + elsewhere, mean(r, False)) for r in rows]
    known = [p for p in points if p[2] is not None]
    curve = {name: [p[i] for p in known] for i, name in enumerate(("tokens", "flops", "dev"))}
    last, summary = {k: v for r in rows for k, v in r.items()}, json.loads((run / "summary.json").read_text())
    last |= {name: measure(rows) for name, measure in (measures or {}).items()}
    made_by = {k: summary[k] for k in ("versions", "commit", "host", "device", "devices")}
    return dict(run=run.name, tokens=points[-1][0], flops=points[-1][1], bpb=mean(last, True), last=last,
                dev=known[-1][2] if known else None, curve=curve, made_by=made_by)


def compare(arm: dict[int, dict], control: dict[int, dict], measure: str) -> dict:
    """The values of a measure paired by seed, {seed: run's figures}, their mean and half its interval."""
    values = {}
    for seed in sorted(arm.keys() & control.keys()):
        pair = arm[seed], control[seed]
        if measure.startswith("speed_up_"):
            known = None not in (pair[0]["dev"], pair[1]["dev"])
            values |= {seed: speed_up(*pair, measure.removeprefix("speed_up_"))} if known else {}
        else:
            ends = [(run["last"] | {"bpb": run["bpb"]}).get(measure) for run in pair]
            values |= {} if None in ends else {seed: ends[0] - ends[1]}
    mean, half = interval([*values.values()]) if values else (None, None)
    return dict(measure=measure, values=values, mean=mean, half=half)


# -------------------------------------------------------------------------------------------------- the runs


def command(study: Study, job: Job) -> list[str]:
    """The arguments of `python train.py` that make a run."""
    config, fields = load_config(f"{study.path}:{job.arm}"), {"seed": job.seed}
    if job.rate is not None:
        fields |= {f"{path}.peak": job.rate * (schedule.peak / config.schedule.peak)
                   for path, schedule in schedules(config).items()}
    for path, value in study.quick.items():
        phases = range(len(config.phases)) if path.startswith("phases.*.") else [0]
        fields |= {path.replace("*", str(i), 1): value for i in phases}
    fields |= {"runs": study.directory, "name": job.name}
    return [f"{study.path}:{job.arm}", *(w for path, v in fields.items() for w in (f"--{path}", str(v)))]


def complete(study: Study, job: Job) -> bool:
    """Has this run ended? Raises InputError for a config that is refused, or is not what it was made by."""
    config, run = parse(command(study, job))[0], study.directory / job.name
    check(config)
    if not (run / "summary.json").exists():
        return False
    old = flatten(json.loads((run / "config.json").read_text()))
    now = flatten(json.loads(json.dumps(to_json(config))))
    now["model.vocab"] = now["model.vocab"] or old["model.vocab"]  # 0 becomes the tokenizer's
    given = ("model.", "data.tokenizer") if config.init_from else ()  # by the run that it starts from
    if changed := sorted(k for k in old.keys() | now.keys() if old.get(k) != now.get(k)
                         and k.split(".")[0] not in HARMLESS and not k.startswith(given)):
        raise InputError(f"run {run} was made by another config ({', '.join(changed)}); delete it, or use "
                         "another --runs")
    return True


def gpus() -> list[str]:
    """The GPUs that may be used, without waking them: this process is to hold none of their memory."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d]
    try:
        found = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except FileNotFoundError:
        return []
    return [str(i) for i, line in enumerate(found.splitlines()) if line.startswith("GPU ")]


def make(study: Study, jobs: list[Job]) -> dict[Job, dict]:
    """The figures of runs, made where they are not complete; those that fail are noted and left out."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    shares = [cores[i::study.jobs] for i in range(study.jobs)]
    devices, free, running, stopping = gpus() or shares, queue.SimpleQueue(), set(), []
    for device in devices:
        free.put(device)

    def one(job: Job) -> dict | None:
        if not complete(study, job):
            device, log = free.get(), study.directory / f"{job.name}.log"
            where = {"CUDA_VISIBLE_DEVICES": device} if isinstance(device, str) else {}
            line = [sys.executable, ROOT / "train.py", *command(study, job)]
            with open(log, "ab") as out:
                process = subprocess.Popen(line, stdout=out, stderr=out, env=KEEP | os.environ | where)
            running.add(process)
            if not where and study.jobs > 1 and device:
                os.sched_setaffinity(process.pid, device)  # before it starts threads, which inherit it
            if stopping:  # since this job was begun
                process.terminate()
            code = process.wait()
            running.discard(process)
            free.put(device)
            said = (log.read_text(errors="replace").splitlines() or [""])[-1]
            if stopping or (code == 0 and not (study.directory / job.name / "summary.json").exists()):
                print(f"{job.name} was stopped; the same command resumes the study", flush=True)
                raise SystemExit(0)
            if code == 2 and "not finite" not in said:
                raise InputError(f"run {job.name}: {said.removeprefix('error: ')}")
            if code:
                study.failed[job.name] = f"exit code {code}: {said}"
                print(f"{job.name} failed, {study.failed[job.name]}; see {log}", flush=True)
                return None
        found = figures(study.directory / job.name, study.teacher.get(job.arm, 0.0), study.measures)
        dev, test = show(found["dev"]), show(found["bpb"])
        own = "".join(f"; {name} {show(found['last'][name])}" for name in study.measures)
        print(f"{job.name}: {dev} bits per byte on dev, {test} on test{own}", flush=True)
        return found

    def stop(*_):
        stopping.append(True)
        for process in [*running]:
            process.terminate()  # they save and exit
        raise SystemExit(0)

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ThreadPoolExecutor(len(devices)) as pool:
            return {j: found for j, found in zip(jobs, pool.map(one, jobs), strict=True) if found}
    finally:
        for pair in before.items():
            signal.signal(*pair)


def tune(study: Study) -> tuple[dict[str, dict], list[dict]]:
    """({arm: its rate, whether that is bracketed, dev by rate}, figures of the runs that this took)."""
    if len(study.rates) < 2 or study.quick:
        rate = study.rates[len(study.rates) // 2] if study.rates else None
        return {arm: dict(rate=rate, bracketed=None, tuning={}) for arm in study.arms}, []
    jobs, tried, runs = [Job(arm, r, 0) for r in study.rates for arm in study.arms], {}, []
    while jobs:
        found = make(study, jobs)
        runs += found.values()
        for job in jobs:
            of = {"": None} if job not in found else {"": found[job]["dev"]} | found[job]["last"]
            dev = of.get(study.tuned_by)
            tried.setdefault(job.arm, {})[job.rate] = math.inf if dev is None else dev
        further = {arm: extension(tried[arm], study.rates) for arm in study.arms}
        jobs = [Job(arm, rate, 0) for arm, rate in further.items() if rate]
    return {arm: dict(rate=best(devs)[0], bracketed=best(devs)[1],
                      tuning={f"{r:g}": d if d < math.inf else None for r, d in sorted(devs.items())})
            for arm, devs in tried.items()}, runs


# ----------------------------------------------------------------------------------------------- the reports


def show(value: float | None, half: float | None = None, form: str = ".4f") -> str:
    """A figure, with half its interval's width where that is known."""
    return "-" if value is None else format(value, form) + (
        "" if half is None else f" ± {format(half, form.strip('+'))}")


def table(result: dict) -> str:
    """The result as a table (in Markdown), what to know of it, and a line for each claim."""
    n, arms, cost, control = (result[k] for k in ("seeds", "arms", "cost", "control"))
    columns = ["arm", "rate", "tokens", "FLOPs"]
    if any(f["bpb"][0] is not None for f in arms.values()):  # a study of `measures` alone may have no test
        columns += ["bits per byte", f"less {control}'s", "speed-up, FLOPs", "tokens"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for arm, f in arms.items():
        cells = [arm, show(f["rate"], form="g") + ("" if f["bracketed"] is not False else " (!)"),
                 f"{f['tokens']:,}", f"{f['flops']:.3g}", show(*f["bpb"])]
        cells += [show(d["mean"], d["half"], form) if arm != control else "" for d, form in zip(
            f["less_control"].values(), ("+.4f", "+.1%", "+.1%"), strict=True)]
        lines.append(f"| {' | '.join(cells[:len(columns)])} |")
    if result["measures"]:
        lines += ["", f"| (less {control}'s) | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for name, by in result["measures"].items():
        cells = [show(*by[arm]["own"]) + ("" if arm == control or by[arm]["mean"] is None else
                 f" ({show(by[arm]['mean'], by[arm]['half'], '+.4f')})") for arm in arms]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(["--quick: too short to say anything of the question"] if result["quick"] else []),
              f"{n} paired seeds; ± is half a 95 % interval" if n > 1 else "one seed: no intervals",
              f"the runs compared took {cost['flops']:.3g} FLOPs and {cost['tokens']:,} tokens, tuning took "
              f"{cost['tuning_flops']:.3g} and {cost['tuning_tokens']:,}"]
    lines += [f"(!) {arm}: its best rate is an end of those tried, {', '.join(f['tuning'])}: not bracketed"
              for arm, f in arms.items() if f["bracketed"] is False]
    lines += [f"{run} failed, {why}" for run, why in result["failed"].items()]
    if len(result["made_by"]) > 1:
        lines.append("not all runs were made by the same versions, commit and device: see study.json")
    return "\n".join(lines + [
        f"{c['verdict']}: {c['says']} ({c['measure']}, {c['arm']} against {c['control']}: "
        f"{show(c['mean'], c['half'], '+.4f')}; claimed {'above' if 'above' in c else 'below'} "
        f"{c.get('above', c.get('below'))})" for c in result["claims"]])


def draw_measures(panel, result: dict):
    """Differences to the control in each of a study's measures, with intervals."""
    for color, arm in enumerate(result["arms"]):
        ends = [by[arm] for by in result["measures"].values()]
        if arm != result["control"] and all(e["half"] is not None for e in ends):
            panel.errorbar(np.arange(len(ends)) + 0.1 * color, [e["mean"] for e in ends],
                           [e["half"] for e in ends], fmt="o", capsize=4, color=f"C{color}", label=arm)
    panel.set_xticks(range(len(result["measures"])), result["measures"])
    panel.set(ylabel=f"less {result['control']}'s")
    panel.axhline(0, color="black", linewidth=0.8)
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def draw(result: dict):
    """A figure of dev curves, and of differences to the control: on dev along the way, on test at the end; by
    both axes. Where a study has `measures`, below the curves the differences in these, or these alone
    where nothing was tested.
    """
    if result["measures"] and all(f["bpb"][0] is None for f in result["arms"].values()):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        draw_measures(figure.subplots(), result)
        return figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col")
    name = result["control"]
    control = result["arms"][name]["runs"]
    for (top, bottom), axis in zip(axes.T, ("tokens", "flops"), strict=True):
        for color, (arm, found) in enumerate(result["arms"].items()):
            x, end, style = np.array(found[axis]), found["less_control"]["bpb"], dict(color=f"C{color}")
            curves = {seed: run["curve"] for seed, run in found["runs"].items()}
            if not all(c["dev"] for c in curves.values()):
                continue
            points = np.array(next(iter(curves.values()))[axis])
            top.plot(points, np.mean([c["dev"] for c in curves.values()], 0), ".-", label=arm, **style)
            pairs = [(curves[seed], control[seed]["curve"]) for seed in end["values"]]
            if found["runs"] is control or not pairs:
                continue
            known = (points >= pairs[0][1][axis][0]) & (points <= pairs[0][1][axis][-1])
            gaps = [(a["dev"] - np.interp(points, c[axis], c["dev"]))[known] for a, c in pairs]
            bands = [interval(values) for values in np.transpose(gaps).tolist()]
            mean, half = np.array(bands, float).reshape(-1, 2).T
            bottom.plot(points[known], mean, label=f"{arm}, on dev", **style)
            bottom.fill_between(points[known], mean - half, mean + half, alpha=0.15, linewidth=0, **style)
            bottom.errorbar(x, end["mean"], end["half"], fmt="o", capsize=4, label=f"{arm}, on test", **style)
        ends = [run["dev"] for f in result["arms"].values() for run in f["runs"].values() if run["dev"]]
        top.set(ylabel="bits per byte on dev", ylim=(0.97 * min(ends), 1.5 * max(ends)) if ends else None)
        bottom.set(xlabel=axis.replace("flops", "model FLOPs"), ylabel=f"bits per byte less {name}'s")
        bottom.axhline(0, color="black", linewidth=0.8)
        for part in (top, bottom):
            part.grid(alpha=0.3)
            if part.get_legend_handles_labels()[0]:
                part.legend(fontsize=8)
    if result["measures"]:
        draw_measures(figure.add_subplot(axes[1, 0].get_gridspec()[1, :]), result)
        for top, bottom in axes.T:
            top.set_xlabel(bottom.get_xlabel())
            top.tick_params(labelbottom=True)
            bottom.remove()
    return figure


# ------------------------------------------------------------------------------------------ the command line


def read(a) -> Study:
    """The study that the arguments ask for; raises InputError for what they or its file have wrong."""
    try:
        file = vars(load_file(a.config))
    except Exception:
        load_config(a.config)  # says what is wrong with it
        raise
    known, quick = file.get("arms", {}), file.get("quick", {}) if a.quick else {}
    arms = a.arms.split(",") if a.arms else [*file.get("default_arms", known)]
    arms = list(dict.fromkeys([file.get("control", next(iter(known), "")), *arms]))
    claims = [{"measure": "bpb", "control": arms[0]} | claim for claim in file.get("claims", ())]
    for arm in [*arms, *(c[k] for c in claims for k in ("arm", "control"))]:
        if arm not in known:
            raise InputError(f"{a.config} defines no arm {arm!r}; its arms: {', '.join(known) or 'none'}")
    if a.seeds is not None and a.seeds < 1:
        raise InputError(f"--seeds is {a.seeds}; allowed is 1 or more, 2 or more for intervals")
    if not 1 <= a.jobs <= (os.cpu_count() or 1):
        raise InputError(f"--jobs is {a.jobs}; allowed is 1 to {os.cpu_count()}, the cores here")
    if a.quick and not quick:
        raise InputError(f"{a.config} defines no `quick`; allowed is a study without --quick")
    rates = sorted(file.get("rates", ()))
    if len(rates) > 1 and not all(known[arm].data.dev for arm in arms):
        raise InputError("data.dev is 0 in an arm; allowed is a share to tune its rate on, or no `rates`")
    directory = Path(a.runs).expanduser() / (Path(a.config).stem + ("-quick" if a.quick else ""))
    claims = [c for c in claims if {c["arm"], c["control"]} <= {*arms}]
    measures, tuned_by = file.get("measures", {}), file.get("tuned_by", "")
    if tuned_by and tuned_by not in measures:
        raise InputError(f"{a.config}: tuned_by is {tuned_by!r}; allowed is one of its `measures`: "
                         f"{', '.join(measures) or 'none'}")
    return Study(a.config, directory, arms, rates, quick, file.get("teacher_flops", {}), claims, {},
                 measures, tuned_by, a.jobs)


def conclude(study: Study, seeds: int) -> dict:
    """What study.json holds: the runs, made where they are missing, and all that follows from them."""
    arms, tuned = tune(study)
    found = make(study, [Job(arm, arms[arm]["rate"], s + 1) for s in range(seeds) for arm in study.arms])
    runs = {arm: {job.seed: f for job, f in found.items() if job.arm == arm} for arm in study.arms}
    for arm, own in runs.items():
        if not own:
            raise InputError(f"no run of {arm} came to its end: {study.failed}")
        ends, one = [f["bpb"] for f in own.values() if f["bpb"] is not None], next(iter(own.values()))
        arms[arm] |= dict(
            tokens=one["tokens"], flops=one["flops"], bpb=interval(ends) if ends else (None, None),
            less_control={m: compare(own, runs[study.arms[0]], m) for m in MEASURES}, runs=own)
    claims = [c | compare(runs[c["arm"]], runs[c["control"]], c["measure"]) for c in study.claims]
    measures = {name: {arm: compare(own, runs[study.arms[0]], name) | {"own": interval(
        [f["last"][name] for f in own.values()])} for arm, own in runs.items()} for name in study.measures}
    made_by = {json.dumps(f["made_by"], sort_keys=True) for f in [*tuned, *found.values()]}
    return dict(
        study=study.directory.name, control=study.arms[0], seeds=seeds, failed=study.failed,
        quick=bool(study.quick), measures=measures,
        made_by=[json.loads(m) for m in sorted(made_by)],
        cost={name + axis: sum(f[axis] for f in some) for axis in ("tokens", "flops")
              for name, some in (("", found.values()), ("tuning_", tuned))},
        claims=[c | dict(verdict=verdict(c["mean"], c["half"], c)) for c in claims],
        arms={arm: arms[arm] for arm in study.arms})


def main(arguments: list[str]) -> dict:
    """Command line; gives what study.json holds."""
    parser = Arguments("study", __doc__)
    parser.add_argument("config", help="file with arms")
    parser.add_argument("--seeds", type=int, help="how many; 5, or 2 with --quick")
    parser.add_argument("--arms", help="names, separated by commas; the control runs in any case")
    parser.add_argument("--quick", action="store_true", help="small: to see that all of it runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time where there are no GPUs; 1")
    parser.add_argument("--runs", default="runs", help="where the study's directory is; runs")
    a = parser.parse_args(arguments)
    study, seeds = read(a), a.seeds or (2 if a.quick else 5)
    for arm in study.arms:  # so that a mistake in the last one shows before the first one runs
        complete(study, Job(arm, study.rates[0] if study.rates else None, 0))
    study.directory.mkdir(parents=True, exist_ok=True)
    result = conclude(study, seeds)
    write(study.directory / "study.json", json.dumps(result, indent=1))
    figure = draw(result)
    figure.savefig(study.directory / "study.png", dpi=110)
    print(f"\n{table(result)}\n\n{study.directory} has study.json and study.png")
    return result
