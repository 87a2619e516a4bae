"""A study: arms over paired seeds, each at its own best peak learning rate, beside a control.

    python train.py study FILE [--seeds N] [--arms A,B] [--quick] [--jobs N] [--runs DIR]
                               [--record] [--json] [--tracker NAME]

FILE defines `study = Study(...)`; lib/study.py says what that may hold.

Each arm is tuned on seed 0 over the study's peak_lrs, by its last bits per byte on dev or by the
study's `tuned_by`. It then runs with seeds 1 to N at the rate found. A peak learning rate is the
run's schedule.peak; a phase's own schedule keeps its peak's ratio to that. Where an arm's best rate
is an end of the grid, the grid is extended for it by its own ratio, at most twice; if that does not
bracket the best, the table says so. Equal seeds mean equal data order and initial draws, so
differences are paired. `±` is half a 95 % interval by Student's t.

Runs that the study `needs` are made first, for each seed of an arm that needs them. Their FLOPs are
added to the arm's. A run is made once for equal configs: what another study in RUNS made, or this
one for another arm, by the same code, is linked to in the place of a new run.

--quick takes the study's `quick` fields, the middle rate and two seeds. It shows that the study
runs and gives no verdict. --record writes results/CHAPTER/METHOD.json of a study in configs/, and
beside it a picture of the study's charts. --json prints the same as one line, the last one.
--tracker is that of each run, see docs/runs.md.

Runs are ordinary ones, RUNS/STUDY/ARM-RATE-sSEED, each made by the ordinary command in a process of
its own: one a GPU at a time or, without GPUs, --jobs at a time, each on its share of the cores.
What is complete is not run again. Beside them are study.json, a log of each run, and study.png:
the study's `charts`, or a curve for each arm.
"""
import argparse
import json
import math
import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation, LogLocator

from lib import equal, results
from lib.arguments import Arguments
from lib.config import ROOT, flatten, load_module, run_json, to_json, walk
from lib.curves import Series, above
from lib.disk import digest, finite, read_object, user_path, write
from lib.errors import InputError, user_errors
from lib.fields import allowed_names
from lib.schedule import Schedule
from lib.seams import CURVES, require_gave
from lib.statistics import (
    NOT_JUDGED,
    PLUS_MINUS,
    best_rate,
    compare,
    conclude,
    dev_curve,
    gap_curve,
    interval,
    next_rate,
    run_figures,
    stacked,
    tested_alike,
    value_of,
    verdict,
)
from lib.study import (
    NEED,
    OF_RUN,
    PAIRED,
    Chart,
    Claim,
    Study,
    every_phase,
    need_named,
    needs_of,
    path_rule,
)
from train import Config, check, parse

# Fields of a config that change nothing of what a study reads of a run.
HARMLESS = ("name", "runs", "prompts", "sample_tokens", "sample_temperature", "save_every", "keep",
            "tracker", "stop_code")
# Small programs are kept in the compilation cache too, for the runs to come.
KEEP_COMPILED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                 "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
QUICK_SEEDS = 2
STARTED = ".needs.json"  # in a run's directory: how those ended that it needed
MARKED = 8  # places of a chart that have a mark each, at most
NOT_RUN = "not run"  # the verdict of a claim about an arm that was left out


class Job(NamedTuple):
    """One run of a study."""

    arm: str  # or the name of a run that arms need
    rate: float | None  # peak learning rate; None: the arm's own
    seed: int

    @property
    def name(self) -> str:
        """Of its directory."""
        rate = "own" if self.rate is None else f"{self.rate:g}"
        return f"{self.arm}-{rate}-s{self.seed}"


class Request(NamedTuple):
    """What a command line asks for."""

    path: str  # of the study's file
    study: Study
    directory: Path  # of its runs
    arms: list[str]  # that run, the control first
    seeds: int
    quick: bool
    jobs: int  # runs at a time where there are no GPUs
    tracker: str = ""  # of its runs; empty: what their configs say

    @property
    def whole(self) -> bool:
        """Do all arms run that the study has without --arms?"""
        return set(self.study.default_arms or self.study.arms) <= set(self.arms)

    @property
    def claims(self) -> list[Claim]:
        """Those about arms that run, and about conclusions where these are drawn."""
        known = []
        for claim in self.study.claims:
            arms = {claim.arm, self.study.control_of(claim)} - {"", None}
            if arms <= set(self.arms) and (arms or self.whole):
                known.append(claim)
        return known


# ------------------------------------------------------------------------------- what is asked for

def load_study(path: str) -> Study:
    """The study that a file defines; raises InputError with what to do where it defines none."""
    place = Path(path)
    if (place / "study.json").is_file():
        raise InputError(f"{path} is the directory of a study; allowed is the study's file, "
                         f"and `python train.py report {path}` shows its result")
    if (place / "config.json").is_file():
        raise InputError(f"{path} is the directory of a run; allowed is a study's file, "
                         f"and `python train.py report {path}` shows the run")
    file, _, arm = path.partition(":")
    if arm and Path(file).is_file():
        raise InputError(f"{path} names an arm; allowed is the file, with --arms {arm}")
    module = load_module(path)
    study = getattr(module, "study", None)
    if isinstance(study, Study):
        return study
    sentence = f"{path} defines no `study = Study(...)`"
    if isinstance(getattr(module, "config", None), Config):
        sentence += f" but one config, which `python train.py {path}` trains"
    raise InputError(f"{sentence}; configs/README.md lists the files that are studies")


def choose_arms(path: str, study: Study, names: str) -> list[str]:
    """The arms that run, the control first; names: those of --arms, separated by commas."""
    chosen = names.split(",") if names else list(study.default_arms or study.arms)
    for name in chosen:
        if name not in study.arms:
            raise InputError(f"{path} defines no arm {name!r}; {allowed_names(name, study.arms)}")
    return list(dict.fromkeys([study.first, *chosen]))


def read(a: argparse.Namespace) -> Request:
    """What the arguments ask for; raises InputError for what is wrong with them or their file."""
    study = load_study(a.file)
    arms = choose_arms(a.file, study, a.arms)
    cores = os.cpu_count() or 1
    if a.seeds is not None and a.seeds < 1:
        raise InputError(f"--seeds is {a.seeds}; allowed is 1 or more, 2 or more for intervals")
    if not 1 <= a.jobs <= cores:
        raise InputError(f"--jobs is {a.jobs}; allowed is 1 to {cores}, the cores here")
    if a.quick and not study.quick:
        raise InputError(f"{a.file} has no `quick` in its study; allowed is it without --quick")
    seeds = a.seeds or (QUICK_SEEDS if a.quick else study.seeds)
    name = Path(a.file).stem + ("-quick" if a.quick else "")
    directory = user_path(a.runs) / name
    return Request(a.file, study, directory, arms, seeds, a.quick, a.jobs, a.tracker)


def check_record(request: Request) -> Path:
    """Where this study is recorded; raises InputError where it may not be."""
    place = results.record_path(ROOT, request.path)
    if request.quick:
        raise InputError("--record is given with --quick, which gives no verdict; "
                         "allowed is one of the two")
    if request.seeds < 2:
        raise InputError("--record is given with one seed, which has no interval; "
                         "allowed is --seeds 2 or more")
    study = request.study
    wanted = study.default_arms or study.arms
    missing = [arm for arm in wanted if arm not in request.arms]
    if missing:
        raise InputError(f"--record is given, but --arms leaves out {', '.join(missing)}; allowed "
                         f"are the arms that run without --arms ({', '.join(wanted)}) and more")
    return place


# -------------------------------------------------------------------------------------- the runs

def schedules(config) -> dict[str, Schedule]:
    """Every schedule of a `train.Config` by its path: of the run, of phases, of their groups."""
    found = {"schedule": config.schedule}
    for i, phase in enumerate(config.phases):
        for group, own in phase.lr.items():
            found[f"phases.{i}.lr.{group}"] = own
        found[f"phases.{i}.schedule"] = phase.schedule
    return {path: own for path, own in found.items() if isinstance(own, Schedule)}


def needed_by(request: Request, job: Job) -> list[Job]:
    """The runs that this one starts from or reads, of its own seed, each once."""
    names = dict.fromkeys(needs_of(request.study.config_of(job.arm)).values())
    return [Job(name, None, job.seed) for name in names]


def command(request: Request, job: Job, keys: dict[str, str] | None = None) -> list[str]:
    """The arguments of `python train.py` that make a run.

    keys: {needed run: what it is known by}, in the place of its directory.
    """
    config = request.study.config_of(job.arm)
    fields = {"seed": job.seed}
    if job.rate is not None:
        for path, schedule in schedules(config).items():
            fields[f"{path}.peak"] = job.rate * (schedule.peak / config.schedule.peak)
    if request.quick:
        for path, value in request.study.quick.items():
            for one in every_phase(path, len(config.phases)):
                if job.arm in request.study.arms or not path_rule(config, one, "")[0]:
                    fields[one] = value
    for path, value, _ in walk(config):
        named = need_named(value)
        if named:
            name, step = named
            directory = request.directory / Job(name, None, job.seed).name
            fields[path] = f"{keys[name] if keys else directory}{step}"
    fields |= {"runs": request.directory, "name": job.name}
    if request.tracker:
        fields["tracker"] = request.tracker
    words = [f"{request.path}:{job.arm}"]
    for path, value in fields.items():
        words += [f"--{path}", str(value)]
    return words


def key_of(request: Request, job: Job, device: str) -> str:
    """What a run is known by, whichever study makes it; those that it needs by their own keys."""
    keys = {}
    for need in needed_by(request, job):
        keys[need.arm] = f"{NEED}{key_of(request, need, device)}"
    return equal.key_of(parse(command(request, job, keys))[0], device)


def complete(request: Request, job: Job) -> bool:
    """Has this run ended?

    Raises InputError for a config that is refused, for one that the run was not made by, and where
    a run that it needs was made anew since. A link to a run of another config is taken away.
    """
    config, _ = parse(command(request, job))
    check(config)
    run = request.directory / job.name
    whole = bool(read_object(run / "summary.json"))
    changed = changed_fields(run, config, request, job) if whole else []
    if run.is_symlink():
        if changed or not whole:
            run.unlink()
        return whole and not changed
    if changed:
        raise InputError(f"run {run} was made by another config ({', '.join(changed)}); delete it, "
                         "or use another --runs")
    started = run / STARTED
    if whole and started.exists():
        now = ends_of(request, job)
        for name, end in read_kept(started, dict).items():
            if now.get(name, end) != end:
                raise InputError(f"run {run} needs {name}, which was made anew since; delete {run}, "
                                 "or use another --runs")
    return whole


def read_kept(place: Path, kind: type):
    """What a study has written into a file. Raises InputError where it holds anything else."""
    said = f"{place} is damaged ({{reason}}); delete it, and the same command goes on"
    with user_errors((TypeError, ValueError, RecursionError), sentence=said):
        return kind(json.loads(place.read_text()))


def ends_of(request: Request, job: Job) -> dict[str, str]:
    """{run that this one needs: a digest of how it ended}, of those that have."""
    found = {}
    for need in needed_by(request, job):
        end = request.directory / need.name / "summary.json"
        if end.is_file():
            found[need.name] = digest(end.read_text())
    return found


def changed_fields(run: Path, config: Config, request: Request, job: Job) -> list[str]:
    """Fields in which a run's config is another one; where runs lie that it needs is none."""
    old = flatten(run_json(run))
    now = flatten(json.loads(json.dumps(to_json(config))))
    now["model.vocab"] = now["model.vocab"] or old["model.vocab"]  # 0 becomes the tokenizer's
    given = ("model.", "data.tokenizer") if config.init_from else ()  # by the run it starts from
    places = tuple(str(request.directory / need.name) for need in needed_by(request, job))
    changed = []
    for path in sorted(old.keys() | now.keys()):
        known = path.startswith(given) or path.split(".")[0] in HARMLESS
        needed = places and isinstance(old.get(path), str) and str(now.get(path)).startswith(places)
        if old.get(path) != now.get(path) and not known and not needed:
            changed.append(path)
    return changed


def gpus() -> list[str]:
    """The GPUs that may be used, without waking them: this process is to hold none of them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [d for d in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if d]
    line = ["nvidia-smi", "--list-gpus"]
    try:
        found = subprocess.run(line, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return []
    return [str(i) for i, line in enumerate(found.splitlines()) if line.startswith("GPU ")]


class Runner:
    """Makes the runs of a study that are not complete, each in a process of its own."""

    def __init__(self, request: Request):
        self.request = request
        self.failed: dict[str, str] = {}  # run: why
        self.needed: dict[Job, dict | None] = {}  # figures of runs that others need
        self.keys: dict[Job, str] = {}  # what runs are known by
        self.running: set[subprocess.Popen] = set()
        self.stopping = False  # after a signal
        self.refused = False  # something is wrong with the study: no further run begins
        has_cores = hasattr(os, "sched_getaffinity")
        cores = sorted(os.sched_getaffinity(0)) if has_cores else []
        shares = [cores[i::request.jobs] for i in range(request.jobs)]
        found = gpus()
        self.kind = "gpu" if found else "cpu"
        self.devices = found or shares  # names of GPUs, or lists of cores
        self.free: queue.SimpleQueue = queue.SimpleQueue()
        for device in self.devices:
            self.free.put(device)

    def make(self, jobs: list[Job]) -> dict[Job, dict]:
        """The figures of runs, made where they are missing; those that fail are left out.

        First those that they need, then each that is equal to none before it, then the others.
        """
        needed = [need for job in jobs for need in needed_by(self.request, job)]
        missing = [need for need in dict.fromkeys(needed) if need not in self.needed]
        if missing:
            made = self.make(missing)
            self.needed |= {need: made.get(need) for need in missing}
        first = {}
        for job in jobs:
            self.keys[job] = key_of(self.request, job, self.kind)
            first.setdefault(self.keys[job], job)
        again = [job for job in jobs if job not in first.values()]
        return self.make_all([*first.values()]) | self.make_all(again)

    def make_all(self, jobs: list[Job]) -> dict[Job, dict]:
        """The figures of runs of which none is equal to another; those that fail are left out."""
        signals = signal.SIGTERM, signal.SIGINT
        before = {number: signal.signal(number, self.stop) for number in signals}
        begun = clock()
        try:
            with ThreadPoolExecutor(len(self.devices)) as pool:
                found = dict(zip(jobs, pool.map(self.one, jobs), strict=True))
        finally:
            add_spent(self.request.directory, clock() - begun)
            for number, handler in before.items():
                signal.signal(number, handler)
        return {job: figures for job, figures in found.items() if figures}

    def stop(self, *_):
        """End after a signal: the runs in flight save and exit."""
        self.stopping = True
        for process in [*self.running]:
            process.terminate()
        raise SystemExit(0)

    def one(self, job: Job) -> dict | None:
        """The figures of a run, made if need be; None where it fails, or another was refused."""
        if self.refused:
            return None
        try:
            return self.figures_of(job)
        except InputError:
            self.refused = True
            raise

    def figures_of(self, job: Job) -> dict | None:
        """The figures of a run, made if need be; None where it fails."""
        request, study = self.request, self.request.study
        needed = [Job(name, None, job.seed) for name in study.needed_by(job.arm)]
        without = [need.name for need in needed if not self.needed[need]]
        if without:
            self.failed[job.name] = f"it needs {', '.join(without)}"
            return None
        if not complete(request, job) and not self.provide(job):
            return None
        is_arm = job.arm in study.arms
        of_needs = sum(self.needed[need]["flops"] for need in needed) if is_arm else 0.0
        elsewhere = study.teacher_flops.get(job.arm, 0.0) + of_needs
        measures = study.measures if is_arm else {}
        found = run_figures(request.directory / job.name, elsewhere, measures)
        found["needs_flops"] = of_needs
        check_claimed(request, job, found["last"])
        dev, test = show(found["dev"]), show(found["bpb"])
        own = "".join(f"; {name} {show(found['last'][name])}" for name in measures)
        print(f"{job.name}: {dev} bits per byte on dev, {test} on test{own}", flush=True)
        return found

    def provide(self, job: Job) -> bool:
        """Make a run, or link to an equal one that has been made; False where it fails."""
        run, key = self.request.directory / job.name, self.keys[job]
        begun = run.exists()  # perhaps by other code
        made = equal.find(run.parent.parent, key)
        if made and not begun:
            equal.link(run, made)
            if complete(self.request, job):
                print(f"{job.name} is {made}, a run of an equal config", flush=True)
                return True
        device = self.free.get()
        code = self.run(job, device)
        self.free.put(device)
        if not self.succeeded(job, code):
            return False
        if needed_by(self.request, job):
            write(run / STARTED, json.dumps(ends_of(self.request, job)))
        if not begun and key_of(self.request, job, self.kind) == key:
            equal.remember(run.parent.parent, key, run)
        return True

    def run(self, job: Job, device: str | list[int]) -> int:
        """Make a run on a GPU or on some cores; returns its exit code."""
        on_gpu = isinstance(device, str)
        where = {"CUDA_VISIBLE_DEVICES": device} if on_gpu else {}
        words = command(self.request, job)
        line = [sys.executable, ROOT / "train.py", *words]
        with open(self.log_of(job), "ab") as out:
            env = KEEP_COMPILED | grouped(self.request, job) | os.environ | where
            process = subprocess.Popen(line, stdout=out, stderr=out, env=env)
        self.running.add(process)
        if not on_gpu and self.request.jobs > 1 and device:
            os.sched_setaffinity(process.pid, device)  # its threads, which come later, inherit it
        if self.stopping:  # since this job was begun
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        return code

    def succeeded(self, job: Job, code: int) -> bool:
        """Has a run that has exited come to its end? Raises for a signal or a refused config."""
        log = self.log_of(job)
        lines = log.read_text(errors="replace").splitlines()
        said = lines[-1] if lines else ""
        whole = bool(read_object(self.request.directory / job.name / "summary.json"))
        if self.stopping or (code == 0 and not whole):
            print(f"{job.name} was stopped; the same command resumes the study", flush=True)
            raise SystemExit(0)
        if code == 2 and "not finite" not in said:
            raise InputError(f"run {job.name}: {said.removeprefix('error: ')}")
        if code:
            self.failed[job.name] = f"exit code {code}: {said}"
            print(f"{job.name} failed, {self.failed[job.name]}; see {log}", flush=True)
        return code == 0

    def log_of(self, job: Job) -> Path:
        """Where a run's output goes."""
        return self.request.directory / f"{job.name}.log"


def grouped(request: Request, job: Job) -> dict[str, str]:
    """What a run's tracker reads, unless the environment says otherwise: its study and its tags."""
    rate = "own" if job.rate is None else f"{job.rate:g}"
    tags = job.arm, f"peak {rate}", f"seed {job.seed}"
    return {"WANDB_RUN_GROUP": request.directory.name, "WANDB_TAGS": ",".join(tags)}


def check_claimed(request: Request, job: Job, last: dict):
    """Refuse a claim by a metric that a run of its arms turns out not to have."""
    for claim in request.claims:
        about = claim.arm, request.study.control_of(claim)
        known = *PAIRED, *OF_RUN, *last
        if job.arm in about and claim.measure not in known:
            raise InputError(f"{request.path}: the claim {claim.says!r} has the measure "
                             f"{claim.measure!r}, which run {job.name} does not have; "
                             f"{allowed_names(claim.measure, last)}")


def clock() -> np.ndarray:
    """Seconds that have passed, and CPU seconds of the processes that this one saw end."""
    spent = os.times()
    return np.array([time.monotonic(), spent.children_user + spent.children_system])


def two_numbers(found) -> np.ndarray:
    """What is kept of `clock`. Raises TypeError or ValueError for anything else."""
    kept = np.array(found, np.float64)
    if kept.shape != (2,) or not np.isfinite(kept).all():
        raise ValueError(f"{found!r} is not two numbers")
    return kept


def add_spent(directory: Path, seconds: np.ndarray | float) -> list[float]:
    """Add to the seconds, see `clock`, that a study's runs took so far, all commands together."""
    place = directory / "spent.json"
    before = read_kept(place, two_numbers) if place.is_file() else np.zeros(2)
    spent = list(before + seconds)
    write(place, json.dumps(spent))
    return spent


def loss_of(request: Request, found: dict | None) -> float:
    """What a rate is chosen by: the least is best; infinite for a run that failed."""
    if found is None:
        return math.inf
    tuned_by = request.study.tuned_by
    loss = found["last"].get(tuned_by) if tuned_by else found["dev"]
    return math.inf if loss is None or math.isnan(loss) else loss


def tune(request: Request, runner: Runner) -> tuple[dict[str, dict], list[dict]]:
    """({arm: its rate, whether that is bracketed, loss by rate}, figures of the runs for that)."""
    grid = list(request.study.peak_lrs)
    if len(grid) < 2 or request.quick:
        rate = grid[len(grid) // 2] if grid else None
        untuned = dict(rate=rate, bracketed=None, tuning={})
        return {arm: dict(untuned) for arm in request.arms}, []
    tried: dict[str, dict[float, float]] = {arm: {} for arm in request.arms}
    jobs = [Job(arm, rate, 0) for rate in grid for arm in request.arms]
    runs = []
    while jobs:
        found = runner.make(jobs)
        runs += found.values()
        for job in jobs:
            tried[job.arm][job.rate] = loss_of(request, found.get(job))
        further = {arm: next_rate(losses, grid) for arm, losses in tried.items()}
        jobs = [Job(arm, rate, 0) for arm, rate in further.items() if rate]
    arms = {}
    for arm, losses in tried.items():
        rate, bracketed = best_rate(losses)
        by_rate = {f"{rate:g}": losses[rate] for rate in sorted(losses)}
        arms[arm] = dict(rate=rate, bracketed=bracketed, tuning=finite(by_rate))
    return arms, runs


# ------------------------------------------------------------------------------------ the result

def result_of(request: Request) -> dict:
    """What study.json holds: the runs, made where they are missing, and what follows from them."""
    study, runner = request.study, Runner(request)
    arms, tuned = tune(request, runner)
    jobs = [Job(arm, arms[arm]["rate"], seed)
            for seed in range(1, request.seeds + 1) for arm in request.arms]
    found = runner.make(jobs)
    runs = {arm: {} for arm in request.arms}
    for job, figures in found.items():
        runs[job.arm][job.seed] = figures
    for arm, own in runs.items():
        if not own:
            raise InputError(f"no run of {arm} came to its end: {runner.failed}")
        arms[arm] |= arm_figures(own, runs[study.first])
    control = runs[study.first]
    measures = {}
    for name in study.measures:
        measures[name] = {arm: own_figures(own, control, name) for arm, own in runs.items()}
    needed = {job: figures for job, figures in runner.needed.items() if figures}
    tuned += [figures for job, figures in needed.items() if job.seed == 0]
    compared = [*found.values(), *(figures for job, figures in needed.items() if job.seed > 0)]
    concluded = conclusions(request, runs)
    return dict(
        study=request.directory.name, control=study.first, seeds=request.seeds,
        tuned_on_test=tuned_on_test(request), quick=request.quick, failed=runner.failed, measures=measures,
        made_by=makers([*tuned, *compared]), cost=cost_of(request, tuned, compared),
        claims=[judged(request, claim, runs, concluded) for claim in request.claims],
        conclusions=concluded, charts=charts(request, runs), needs=needs_figures(needed),
        arms={arm: arms[arm] | {"needs": study.needed_by(arm)} for arm in request.arms})


def tuned_on_test(request: Request) -> bool:
    """Are rates chosen on the documents that are reported, as those of `data.held_out` may be?"""
    held_out = []
    for arm in request.arms:
        held_out += request.study.config_of(arm).data.held_out.values()
    both = any(source.split in ("", "held_out") for source in held_out)
    return both and len(request.study.peak_lrs) > 1 and not request.study.tuned_by


def needs_figures(needed: dict[Job, dict]) -> dict[str, dict]:
    """{needed run: its tokens and FLOPs, and what its runs came to by seed}."""
    found = {}
    for job, figures in sorted(needed.items(), key=lambda one: one[0].seed):
        own = found.setdefault(job.arm, dict(tokens=figures["tokens"], flops=figures["flops"],
                                             runs={}))
        own["runs"][job.seed] = {of: figures[of] for of in ("run", "bpb", "dev")}
    return found


def all_figures(request: Request, runs: dict[str, dict[int, dict]]) -> dict | None:
    """{arm: {measure: values by seed}} of all arms.

    None where --arms leaves out arms, or where no seed has a run of each arm.
    """
    if not request.whole or not set.intersection(*(set(own) for own in runs.values())):
        return None
    return stacked(runs)


def conclusions(request: Request, runs: dict[str, dict[int, dict]]) -> dict[str, dict]:
    """{what it says: value, half its interval} of the study's conclusions; none of some arms."""
    figures, found = all_figures(request, runs), {}
    if figures:
        for name, function in request.study.conclusions.items():
            found |= conclude(name, function, figures)
    return found


def charts(request: Request, runs: dict[str, dict[int, dict]]) -> list[dict]:
    """The study's charts, as numbers; none of some arms."""
    figures = all_figures(request, runs)
    if not figures:
        return []
    return [charted(chart, figures) for chart in request.study.charts]


def charted(chart: Chart, figures: dict[str, dict[str, np.ndarray]]) -> dict:
    """A chart of a study as study.json has it; see lib/study.py."""
    sentence = f"the chart {chart.title!r} ends in {{reason}}; allowed is figures -> curves"
    arrays = {}
    with user_errors(Exception, InputError, sentence):  # of the study's function
        for name, (x, y) in chart.curves(figures).items():
            arrays[str(name)] = np.array(x, float), np.array(y, float)
    curves = {}
    for name, (x, y) in arrays.items():
        fine = x.ndim == 1 and y.ndim in (1, 2) and len(x) == len(y)
        require_gave(fine, CURVES, chart.curves, {name: x, "y": y})
        curves[name] = curve_shown(x, y)
    return dict(title=chart.title, across=chart.across, up=chart.up, curves=curves)


def curve_shown(x: np.ndarray, y: np.ndarray) -> dict:
    """A curve in lists: places x [n], values y [n], halves of their intervals or None."""
    if y.ndim == 1:
        return dict(x=x.tolist(), y=y.tolist(), half=None)
    means, halves = zip(*map(interval, y.tolist()), strict=True)
    half = None if None in halves else list(halves)
    return dict(x=x.tolist(), y=list(means), half=half)


def arm_figures(own: dict[int, dict], control: dict[int, dict]) -> dict:
    """What is known of an arm by its runs {seed: figures} and those of the control."""
    ends = [run["bpb"] for run in own.values() if run["bpb"] is not None]
    one = next(iter(own.values()))
    return dict(
        other_documents=other_documents(one, next(iter(control.values()))),
        tokens=one["tokens"], flops=one["flops"],
        bpb=interval(ends) if ends else (None, None),
        less_control={measure: compare(own, control, measure) for measure in PAIRED},
        runs=own)


def alike(arm: dict[int, dict], control: dict[int, dict], measure: str) -> bool:
    """Were the runs of two arms {seed: figures} tested on the same documents? See `tested_alike`."""
    both = arm.keys() & control
    return all(tested_alike(arm[seed], control[seed], measure) for seed in both)


def other_documents(run: dict, control: dict) -> str:
    """What is said of runs that were tested on other documents than the control's; else ""."""
    if tested_alike(run, control, "bpb"):
        return ""
    sizes = []
    for one in (run, control):
        own = (f"{name} {number:,}" for name, (number, _) in one["held_out"].items())
        sizes.append(", ".join(own))
    return (f"tested on other documents than the control ({sizes[0]}; the control: {sizes[1]}), so "
            "that their bits per byte are not compared")


def own_figures(own: dict[int, dict], control: dict[int, dict], name: str) -> dict:
    """One of the study's measures for an arm: less the control's, and by itself ("own")."""
    values = [run["last"][name] for run in own.values()]
    return compare(own, control, name) | {"own": interval(values)}


def judged(request: Request, claim: Claim, runs: dict[str, dict[int, dict]],
           concluded: dict[str, dict]) -> dict:
    """A claim with what came of it; concluded: the study's conclusions."""
    control = request.study.control_of(claim)
    other = runs.get(control)
    if claim.arm:
        found = compare(runs[claim.arm], other, claim.measure)
    else:
        found = found_of(request, claim, concluded)
    said = NOT_JUDGED if request.quick else verdict(found["mean"], found["half"], claim)
    if other and not alike(runs[claim.arm], other, claim.measure):
        said = NOT_JUDGED
    about = dict(says=claim.says, arm=claim.arm, control=control) | claim.bound
    return about | found | {"verdict": said}


def found_of(request: Request, claim: Claim, concluded: dict[str, dict]) -> dict:
    """The conclusion that a claim is about, in the form of a difference."""
    one = dict(value=None, half=None)
    if concluded and claim.measure not in concluded:
        raise InputError(f"{request.path}: the claim {claim.says!r} has the measure "
                         f"{claim.measure!r}, which no conclusion says; "
                         f"{allowed_names(claim.measure, concluded)}")
    one = concluded.get(claim.measure, one)
    return dict(measure=claim.measure, values={}, mean=one["value"], half=one["half"])


def makers(runs: list[dict]) -> list[dict]:
    """The versions, commits, hosts and devices that made some runs, each set of them once."""
    texts = {json.dumps(run["made_by"], sort_keys=True) for run in runs}
    return [json.loads(text) for text in sorted(texts)]


def cost_of(request: Request, tuned: list[dict], compared: list[dict]) -> dict[str, float]:
    """Tokens and FLOPs of the runs compared and of those that tuned the rates; seconds of all.

    Runs that are needed are among them, and count once here.
    """
    passed, processors = add_spent(request.directory, 0.0)
    cost = {"seconds": passed, "processor_seconds": processors}
    for kind, runs in {"": compared, "tuning_": tuned}.items():
        cost[f"{kind}tokens"] = sum(run["tokens"] for run in runs)
        cost[f"{kind}flops"] = sum(run["flops"] - run["needs_flops"] for run in runs)
    return cost


# ------------------------------------------------------------------------------------ the record

def compared(found: dict) -> dict:
    """A paired difference as a record has it."""
    return dict(mean=found["mean"], half=found["half"], by_seed=found["values"])


def ends(own: tuple[float, float | None], runs: dict[int, dict], measure: str) -> dict:
    """A measure of one arm as a record has it; own: (mean, half)."""
    by_seed = {seed: value_of(run, measure) for seed, run in runs.items()}
    return dict(mean=own[0], half=own[1], by_seed=by_seed)


def arm_record(arm: str, result: dict) -> dict:
    """An arm's rate and figures; those of the control are no differences."""
    of = result["arms"][arm]
    is_control = arm == result["control"]
    record = dict(
        peak_lr=of["rate"],
        bracketed=of["bracketed"],
        tuning=of["tuning"],
        tokens=of["tokens"],
        flops=of["flops"],
        needs=of["needs"],
        bpb=ends(of["bpb"], of["runs"], "bpb"),
        measures={})
    if not is_control:
        less = of["less_control"]
        record["less_control"] = {name: compared(less[name]) for name in PAIRED}
    for name, by in result["measures"].items():
        figures = ends(by[arm]["own"], of["runs"], name)
        if not is_control:
            figures["less_control"] = compared(by[arm])
        record["measures"][name] = figures
    return record


def claim_record(study: Study, claim: Claim, result: dict) -> dict:
    """A claim and what came of it, also where its arms were not run."""
    control = study.control_of(claim)
    about = dict(says=claim.says, arm=claim.arm, control=control, measure=claim.measure)
    about |= claim.bound
    for found in result["claims"]:
        if about.items() <= found.items():
            return about | compared(found) | {"verdict": found["verdict"]}
    return about | dict(mean=None, half=None, by_seed={}, verdict=NOT_RUN)


def make_record(root: Path, file: str, study: Study, result: dict, chosen: bool) -> dict:
    """The record of a study's result, as study.json has it; chosen: did --arms give its arms?"""
    name = results.library_file(root, file).as_posix()
    command = f"python train.py study {name}"
    if result["seeds"] != study.seeds:
        command += f" --seeds {result['seeds']}"
    if chosen:
        command += f" --arms {','.join(result['arms'])}"
    record = dict(
        file=name,
        question=study.question,
        papers=[asdict(paper) for paper in study.papers],
        command=f"{command} --record",
        seeds=result["seeds"],
        quick=result["quick"],
        control=result["control"],
        arms={arm: arm_record(arm, result) for arm in result["arms"]},
        needs={name: {of: own[of] for of in OF_RUN} for name, own in result["needs"].items()},
        conclusions=result["conclusions"],
        claims=[claim_record(study, claim, result) for claim in study.claims],
        cost=result["cost"],
        failed=result["failed"],
        made_by=without_hosts(result["made_by"]))
    return finite(record)


def without_hosts(found: list[dict]) -> list[dict]:
    """What the runs were made by, but for the names of the machines."""
    made_by = []
    for by in found:
        own = {key: by[key] for key in ("commit", "versions", "device", "devices")}
        if own not in made_by:
            made_by.append(own)
    return made_by


# ----------------------------------------------------------------------------------- the reports

def show(value: float | None, half: float | None = None, form: str = ".4f") -> str:
    """A figure, with half its interval where that is known."""
    if value is None:
        return "-"
    text = format(value, form)
    return text if half is None else f"{text} ± {format(half, form.strip('+'))}"


def row(cells: list[str]) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def arm_row(arm: str, f: dict, control: bool) -> list[str]:
    """The cells of an arm in the table."""
    warned = " (!)" if f["bracketed"] is False else ""
    cells = [arm, show(f["rate"], form="g") + warned, f"{f['tokens']:,}", f"{f['flops']:.3g}"]
    if f["other_documents"]:
        return [*cells, "-", "other documents", "-", "-"]
    cells.append(show(*f["bpb"]))
    forms = "+.4f", "+.1%", "+.1%"
    for less, form in zip(f["less_control"].values(), forms, strict=True):
        cells.append("" if control else show(less["mean"], less["half"], form))
    return cells


def measure_row(name: str, by: dict, control: str) -> list[str]:
    """The cells of one of the study's own measures: each arm's, and less the control's."""
    cells = [name]
    for arm, found in by.items():
        text = show(*found["own"])
        if arm != control and found["mean"] is not None:
            text += f" ({show(found['mean'], found['half'], '+.4f')})"
        cells.append(text)
    return cells


def claim_line(claim: dict) -> str:
    """A claim, its verdict and its figures."""
    side = "above" if "above" in claim else "below"
    form = "+.4f" if claim["control"] else ".4f"
    found = show(claim["mean"], claim["half"], form)
    whose = f", {claim['arm']}" if claim["arm"] else ""
    if claim["control"]:
        whose += f" against {claim['control']}"
    return (f"{claim['verdict']}: {claim['says']} ({claim['measure']}{whose}: {found}; "
            f"claimed {side} {claim[side]})")


def notes(result: dict) -> list[str]:
    """What to know of the figures."""
    seeds, cost = result["seeds"], result["cost"]
    lines = ["--quick: too short to say anything of the question"] if result["quick"] else []
    lines.append(f"{seeds} paired seeds; {PLUS_MINUS}" if seeds > 1 else "one seed: no intervals")
    lines.append(f"the runs compared took {cost['flops']:.3g} FLOPs and {cost['tokens']:,} tokens, "
                 f"tuning took {cost['tuning_flops']:.3g} and {cost['tuning_tokens']:,}")
    if result["tuned_on_test"]:
        lines.append("rates were chosen on the documents that are tested on: in data.held_out, split "
                     '"dev" and "test" tell them apart')
    for arm, f in result["arms"].items():
        if f["needs"]:
            spent = [f"{name} {result['needs'][name]['flops']:.3g}" for name in f["needs"]]
            lines.append(f"{arm}: its FLOPs are with those of the runs that it needs: "
                         f"{', '.join(spent)}")
        if f["other_documents"]:
            lines.append(f"{arm}: {f['other_documents']}")
        if f["bracketed"] is False:
            lines.append(f"(!) {arm}: its best rate is an end of those tried, "
                         f"{', '.join(f['tuning'])}: not bracketed")
    lines += [f"{run} failed, {why}" for run, why in result["failed"].items()]
    if len(result["made_by"]) > 1:
        lines.append("not all runs were made by the same versions, commit and device: "
                     "see study.json")
    return lines


def table(result: dict) -> str:
    """The result as a table in Markdown, what to know of it, and a line for each claim."""
    arms, control = result["arms"], result["control"]
    columns = ["arm", "rate", "tokens", "FLOPs"]
    if any(f["bpb"][0] is not None for f in arms.values()):  # else nothing was tested
        columns += ["bits per byte", f"less {control}'s", "speed-up, FLOPs", "tokens"]
    lines = [row(columns), "|---" * len(columns) + "|"]
    for arm, f in arms.items():
        cells = arm_row(arm, f, arm == control)
        lines.append(row(cells[:len(columns)]))
    if result["measures"]:
        lines += ["", row([f"(less {control}'s)", *arms])]
        lines.append("|---" * (len(arms) + 1) + "|")
    for name, by in result["measures"].items():
        lines.append(row(measure_row(name, by, control)))
    if result["conclusions"]:
        lines += ["", row(["conclusion", "value"]), "|---|---|"]
    for says, found in result["conclusions"].items():
        lines.append(row([says, show(found["value"], found["half"], ".4g")]))
    claims = [claim_line(claim) for claim in result["claims"]]
    return "\n".join([*lines, "", *notes(result), *claims])


def finish_panel(panel):
    """A grid, and a legend where something has a label."""
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def draw_measures(panel, result: dict):
    """Differences to the control in each of a study's measures, with intervals."""
    places = np.arange(len(result["measures"]))
    for color, arm in enumerate(result["arms"]):
        ends = [by[arm] for by in result["measures"].values()]
        if arm != result["control"] and all(end["half"] is not None for end in ends):
            means, halves = ([end[of] for end in ends] for of in ("mean", "half"))
            panel.errorbar(places + 0.1 * color, means, halves, fmt="o", capsize=4,
                           color=f"C{color}", label=arm)
    panel.set_xticks(range(len(result["measures"])), result["measures"])
    panel.set(ylabel=f"less {result['control']}'s")
    panel.axhline(0, color="black", linewidth=0.8)
    finish_panel(panel)


def draw_arm(top, bottom, axis: str, arm: str, found: dict, control: dict | None, color: str):
    """An arm's mean dev curve and its differences to the control's runs, None for the control.

    A curve that begins above its panel says so.
    """
    curve = dev_curve(found["runs"], axis)
    if curve is None:
        return
    label = f"{arm}, other documents" if found.get("other_documents") else arm
    label += above(Series(*curve), top.get_ylim()[1])
    top.plot(*curve, ".-", label=label, color=color)
    end = found["less_control"]["bpb"]
    if control is None or not end["values"]:
        return
    points, mean, half = gap_curve(found["runs"], control, end["values"], axis)
    bottom.plot(points, mean, label=f"{arm}, on dev", color=color)
    bottom.fill_between(points, mean - half, mean + half, alpha=0.15, linewidth=0, color=color)
    bottom.errorbar(
        np.array(found[axis]), end["mean"], end["half"],
        fmt="o", capsize=4, label=f"{arm}, on test", color=color)


def draw_curves(figure: Figure, result: dict) -> np.ndarray:
    """Dev curves above, differences to the control below; by tokens and by FLOPs. Returns axes."""
    axes = figure.subplots(2, 2, sharex="col")
    name = result["control"]
    control = result["arms"][name]["runs"]
    ends = []
    for found in result["arms"].values():
        ends += [run["dev"] for run in found["runs"].values() if run["dev"]]
    limits = (0.97 * min(ends), 1.5 * max(ends)) if ends else None
    for (top, bottom), axis in zip(axes.T, ("tokens", "flops"), strict=True):
        top.set(ylabel="bits per byte on dev", ylim=limits)
        for color, (arm, found) in enumerate(result["arms"].items()):
            other = None if arm == name else control
            draw_arm(top, bottom, axis, arm, found, other, f"C{color}")
        label = "model FLOPs" if axis == "flops" else axis
        bottom.set(xlabel=label, ylabel=f"bits per byte less {name}'s")
        bottom.axhline(0, color="black", linewidth=0.8)
        finish_panel(top)
        finish_panel(bottom)
    return axes


def draw_chart(panel, chart: dict):
    """One of a study's own charts."""
    places = set()
    for color, (name, curve) in enumerate(chart["curves"].items()):
        alone = curve["half"] is None and len(curve["x"]) > MARKED
        panel.errorbar(curve["x"], curve["y"], curve["half"], capsize=3, label=name,
                       color=f"C{color % 10}", marker="" if alone else "o")
        places |= set(curve["x"])
    panel.set(title=chart["title"], xlabel=chart["across"], ylabel=chart["up"], xscale="log")
    if len(places) <= MARKED:
        panel.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
    else:
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    panel.minorticks_off()
    finish_panel(panel)


def draw_charts(charts: list[dict]) -> Figure:
    """A study's own charts, three in a row."""
    rows, columns = math.ceil(len(charts) / 3), min(3, len(charts))
    figure = Figure(figsize=(max(7, 4.5 * columns), 4.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, chart in zip(panels, charts, strict=False):
        draw_chart(panel, chart)
    for panel in [*panels][len(charts):]:
        panel.remove()
    return figure


def draw(result: dict) -> Figure:
    """A study's own charts; without any, dev curves, and differences to the control.

    These are on dev along the way and on test at the end. Where a study has `measures`, the
    differences in these are below the curves, or alone where nothing was tested.
    """
    if result["charts"]:
        return draw_charts(result["charts"])
    untested = all(f["bpb"][0] is None for f in result["arms"].values())
    if result["measures"] and untested:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        draw_measures(figure.subplots(), result)
        return figure
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = draw_curves(figure, result)
    if result["measures"]:
        below = axes[1, 0].get_gridspec()[1, :]
        draw_measures(figure.add_subplot(below), result)
        for top, bottom in axes.T:
            top.set_xlabel(bottom.get_xlabel())
            top.tick_params(labelbottom=True)
            bottom.remove()
    return figure


# ------------------------------------------------------------------------------- the command line

def arguments_of(words: list[str]) -> argparse.Namespace:
    """The command line's words, understood."""
    parser = Arguments("study", __doc__)
    parser.add_argument("file", help="a file that defines `study = Study(...)`")
    parser.add_argument("--seeds", type=int, help="how many; the study's, or 2 with --quick")
    parser.add_argument("--arms", default="",
                        help="names, separated by commas; the control runs in any case")
    parser.add_argument("--quick", action="store_true", help="small: to see that all of it runs")
    parser.add_argument("--jobs", type=int, default=1,
                        help="runs at a time where there are no GPUs; 1")
    parser.add_argument("--runs", default="runs", help="where the study's directory is; runs")
    parser.add_argument("--tracker", default="", help="of the runs, as --tracker of a run")
    parser.add_argument("--record", action="store_true",
                        help="write the figures to results/CHAPTER/METHOD.json")
    parser.add_argument("--json", action="store_true",
                        help="print them as one JSON object, the last line")
    return parser.parse_args(words)


def main(arguments: list[str]) -> dict:
    """Command line; returns what study.json holds."""
    a = arguments_of(arguments)
    request = read(a)
    place = check_record(request) if a.record else None
    grid = request.study.peak_lrs
    for arm in request.arms:  # a mistake in the last one shows before the first one runs
        complete(request, Job(arm, grid[0] if grid else None, 0))
        for name in request.study.needed_by(arm):
            complete(request, Job(name, None, 0))
    request.directory.mkdir(parents=True, exist_ok=True)
    result = result_of(request)
    write(request.directory / "study.json", json.dumps(finite(result), indent=1))
    picture = draw(result)
    picture.savefig(request.directory / "study.png", dpi=110)
    print(f"\n{table(result)}\n\n{request.directory} has study.json and study.png")
    record = make_record(ROOT, request.path, request.study, result, bool(a.arms))
    if place:
        write(place, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if request.study.charts:
            picture.savefig(place.with_suffix(".png"), dpi=110)
        print(f"{place} has the record; `python train.py papers --write` shows it in the pages")
    if a.json:
        print(json.dumps(record))
    return result
