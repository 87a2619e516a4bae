"""What a study's runs say: figures of each run, paired differences, intervals and verdicts."""
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from lib.disk import digest, metric_rows, read_object
from lib.errors import InputError, user_errors
from lib.fields import allowed_names
from lib.seams import MEASURE, is_number, require_gave
from lib.study import OF_RUN, Claim

MADE_BY = "versions", "commit", "host", "device", "devices"  # of a run's summary
EXTRA = 2  # rates tried beyond the grid before an arm's best one is reported as not bracketed
NOT_JUDGED = "not judged"  # the verdict of --quick, which shows that a study runs and no more
RESAMPLES = 1_000  # of the seeds, for a conclusion's interval, at most
PLUS_MINUS = "± is half a 95 % interval"  # said wherever such figures are shown


# -------------------------------------------------------------------------------------- intervals

def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half of its 95 % interval by Student's t); the latter is None for one value."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return mean, None
    return mean, half_width(n) * statistics.stdev(values) / math.sqrt(n)


def half_width(n: int) -> float:
    """Half a 95 % interval of n values by Student's t, in standard errors."""
    return float(stdtrit(n - 1, 0.975))


def verdict(mean: float | None, half: float | None, claim: Claim) -> str:
    """Which side of a claim's bound the interval lies on.

    "confirmed": all of it on the side claimed; "reversed": all on the other; else "undecided".
    """
    if mean is None or half is None:
        return "undecided"
    if claim.above is None:
        ahead = claim.below - mean
    else:
        ahead = mean - claim.above
    if ahead > half:
        return "confirmed"
    if ahead < -half:
        return "reversed"
    return "undecided"


# ------------------------------------------------------------------------------- figures of a run

def mean_bpb(row: dict, split: str) -> float | None:
    """The mean over sources of a row's bits per byte on "dev" or "test"; None where it has none."""
    values = []
    for name, value in row.items():
        tested = name.endswith(".test/bpb")
        if name.endswith("/bpb") and tested == (split == "test"):
            values.append(value)
    if not values or None in values:
        return None
    return statistics.fmean(values)


def run_figures(
        run: Path,
        elsewhere: float = 0.0,
        measures: dict[str, Callable | str] | None = None) -> dict:
    """What a study needs of a complete run.

    elsewhere: FLOPs spent on it in other places, which its own are added to. Raises InputError for
    a measure that names a metric which the run does not have. Returns

        bpb, dev   means over sources on test and dev, at the end; None where there is no such split
        held_out   {source: its test documents, as number and digest}; {} where it does not say
        last       every metric's last value, and the study's `measures` of the rows
        curve      tokens, flops and dev bits per byte at each evaluation
        made_by    versions, commit, host and device
    """
    rows, _ = metric_rows(run / "metrics.jsonl")
    summary = read_object(run / "summary.json")
    last = {}
    for row in rows:
        last |= row
    last.pop("final", None)  # which marks the row that ends a run
    for name, measure in (measures or {}).items():
        if not isinstance(measure, str):
            last[name] = measured(name, measure, rows)
        elif measure in last:
            last[name] = last[measure]
        else:
            raise InputError(f"measures.{name} is {measure!r}, which run {run.name} does not have; "
                             f"{allowed_names(measure, last)}")
    curve = curve_of(rows, elsewhere)
    return dict(
        run=run.name,
        tokens=rows[-1]["train/tokens"],
        flops=rows[-1]["train/flops"] + elsewhere,
        bpb=mean_bpb(last, "test"),
        dev=curve["dev"][-1] if curve["dev"] else None,
        held_out=documents_of(summary),
        last=last,
        curve=curve,
        made_by={name: summary[name] for name in MADE_BY})


def documents_of(summary: dict) -> dict[str, list]:
    """{source: [number of test documents, digest of their texts]} of a run's summary."""
    texts = summary.get("held_out_texts", {})
    return {name: [len(own), digest(sorted(own))] for name, own in texts.items()}


def tested_alike(arm: dict, control: dict, measure: str) -> bool:
    """Were two runs tested on the same documents, as far as a measure depends on that?

    By `eval/SOURCE/` that is so of the source's alone, by bits per byte and speed-ups of all of
    them. Those of dev are not known; they are as alike as those of test. Runs that do not say what
    they were tested on are taken for alike.
    """
    one, other = arm["held_out"], control["held_out"]
    if not one or not other:
        return True
    if measure == "bpb" or measure.startswith("speed_up_"):
        return sorted(one.values()) == sorted(other.values())
    for name in one.keys() & other.keys():
        if measure.startswith((f"eval/{name}/", f"eval/{name}.test/")):
            return one[name] == other[name]
    return True


def curve_of(rows: list[dict], elsewhere: float) -> dict[str, list[float]]:
    """Tokens, FLOPs and dev bits per byte of the rows that have the latter."""
    curve = dict(tokens=[], flops=[], dev=[])
    for row in rows:
        dev = mean_bpb(row, "dev")
        if dev is not None:
            curve["tokens"].append(row["train/tokens"])
            curve["flops"].append(row["train/flops"] + elsewhere)
            curve["dev"].append(dev)
    return curve


# ------------------------------------------------------------------------------------- two arms

def dev_curve(runs: dict, axis: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(places on an axis, the mean there of an arm's runs in bits per byte on dev), or None.

    runs: of a study's result, by seed. axis: "tokens" or "flops".
    """
    curves = []
    for run in runs.values():
        curve = run.get("curve", {})
        if not curve.get("dev"):
            return None
        curves.append(curve)
    points = np.array(curves[0][axis], float)
    dev = [curve["dev"] for curve in curves]
    return points, np.mean(dev, 0)


def gap_curve(runs: dict, control: dict, seeds, axis: str) -> tuple[np.ndarray, ...]:
    """(places on an axis, mean difference to the control's dev curve, half its 95 % interval).

    Only where the control's curve is known; runs and control are those of a result, by seed.
    """
    seeds = list(seeds)
    points = np.array(runs[seeds[0]]["curve"][axis], float)
    first = control[seeds[0]]["curve"][axis]
    begun = points >= first[0]
    ended = points > first[-1]
    known = begun & ~ended
    gaps = []
    for seed in seeds:
        own = runs[seed]["curve"]
        other = control[seed]["curve"]
        dev_of_other = np.interp(points, other[axis], other["dev"])
        gap = own["dev"] - dev_of_other
        gaps.append(gap[known])
    by_point = np.transpose(gaps)
    bands = [interval(values) for values in by_point.tolist()]
    bands = np.array(bands, float)
    bands = bands.reshape(-1, 2)
    mean, half = bands.T
    return points[known], mean, half


def reach(budget: list[float], losses: list[float], target: float) -> float:
    """The budget at which a curve first comes down to `target`, linear between its points.

    Infinite if it never does; the first point's where that is below already.
    """
    before = None
    for spent, loss in zip(budget, losses, strict=True):
        if loss <= target:
            if before is None:
                return spent
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (spent - before[0])
        before = spent, loss
    return math.inf


def speed_up(arm: dict, control: dict, axis: str) -> float:
    """How much more of a budget ("flops" or "tokens") the control needs than the arm.

    0.5 is half as much again. Both are to reach the same dev loss, the worse one of their two ends;
    the better run does so before its rate has decayed, which understates the difference.
    """
    target = max(arm["dev"], control["dev"])
    needs = []
    for run in (control, arm):
        curve = run["curve"]
        needs.append(reach(curve[axis], curve["dev"], target))
    return needs[0] / needs[1] - 1


def difference(arm: dict, control: dict, measure: str) -> float | None:
    """A measure of two runs: arm less control, or the speed-up.

    None where one does not have it, or where it is of other documents.
    """
    if not tested_alike(arm, control, measure):
        return None
    if measure.startswith("speed_up_"):
        if arm["dev"] is None or control["dev"] is None:
            return None
        return speed_up(arm, control, measure.removeprefix("speed_up_"))
    ends = [value_of(run, measure) for run in (arm, control)]
    if None in ends:
        return None
    return ends[0] - ends[1]


def value_of(run: dict, measure: str) -> float | None:
    """The last value of a metric in a run's figures; None where it has none."""
    if measure == "bpb" or measure in OF_RUN:
        return run[measure]
    return run["last"].get(measure)


def compare(arm: dict[int, dict], control: dict[int, dict] | None, measure: str) -> dict:
    """A measure of two arms {seed: figures}, paired by seed: values, mean, half an interval.

    Without a control it is the measure of the arm alone.
    """
    values = {}
    for seed in sorted(arm):
        value = None
        if control is None:
            value = value_of(arm[seed], measure)
        elif seed in control:
            value = difference(arm[seed], control[seed], measure)
        if value is not None:
            values[seed] = value
    mean, half = interval([*values.values()]) if values else (None, None)
    return dict(measure=measure, values=values, mean=mean, half=half)


# --------------------------------------------------------------------------------- conclusions

def stacked(runs: dict[str, dict[int, dict]]) -> dict[str, dict[str, np.ndarray]]:
    """What a conclusion is drawn from: {arm: {measure: float64 [seeds]}}, of seeds all arms have.

    runs: {arm: {seed: figures}}. A figure that is not a number is NaN.
    """
    every = map(set, runs.values())
    seeds = sorted(set.intersection(*every))
    found = {}
    for arm, own in runs.items():
        chosen = [own[seed] for seed in seeds]
        metrics = [set(run["last"]) for run in chosen]
        names = {"bpb", *OF_RUN} | set.intersection(*metrics)
        found[arm] = {}
        for name in sorted(names):
            values = [value_of(run, name) for run in chosen]
            found[arm][name] = np.array(values, np.float64)
    return found


def resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(int [r n], float64 [r]): draws of n out of n with replacement, and their shares.

    All that there are, in any order, or as many as RESAMPLES of them for a larger n.
    """
    if math.comb(2 * n - 1, n) > RESAMPLES:
        rng = np.random.default_rng(0)
        drawn = rng.integers(n, size=(RESAMPLES, n))
        return drawn, np.full(RESAMPLES, 1 / RESAMPLES)
    drawn = list(itertools.combinations_with_replacement(range(n), n))
    shares = []
    for one in drawn:
        orders = math.factorial(n)
        for times in Counter(one).values():
            orders //= math.factorial(times)
        shares.append(orders / n**n)
    return np.array(drawn), np.array(shares)


def conclude(
        name: str,
        function: Callable,
        figures: dict[str, dict[str, np.ndarray]],
        ) -> dict[str, dict[str, float | None]]:
    """{what it says: value, half a 95 % interval} of a conclusion; see lib/study.py.

    The interval is by the bootstrap over seeds: Student's t times the standard deviation over all
    resamples of the seeds, times sqrt(n / (n - 1)). Of a mean it is `interval`. Resamples whose
    value is not finite are left out; if they are half of all or more, there is no interval.
    """
    n = seeds_of(figures)
    drawn, shares = resamples(n)
    again = []
    for seeds in drawn:
        resampled = {}
        for arm, own in figures.items():
            resampled[arm] = {measure: x[seeds] for measure, x in own.items()}
        again.append(numbers(name, function, resampled))
    concluded = {}
    for says, value in numbers(name, function, figures).items():
        values = [found.get(says, math.nan) for found in again]
        half = bootstrapped(np.array(values), shares, n)
        concluded[says] = dict(value=value, half=half)
    return concluded


def measured(name: str, measure: Callable, rows: list[dict]) -> float:
    """What a measure gives of a run's rows; raises InputError for what is no number."""
    value = measure(rows)
    require_gave(is_number(value), MEASURE, measure, value, f" for {name}")
    return value


def seeds_of(figures: dict[str, dict[str, np.ndarray]]) -> int:
    """How many seeds the figures are of."""
    first = next(iter(figures.values()))
    return len(first["bpb"])


def numbers(name: str, function: Callable, figures: dict) -> dict[str, float]:
    """{what it says: value} of a conclusion's function. Raises InputError for what is no number."""
    sentence = f"the conclusion {name!r} ends in {{reason}}; allowed is figures -> number"
    with user_errors(Exception, InputError, sentence):  # of the study's function
        with np.errstate(all="ignore"):
            given = function(figures)
        if not isinstance(given, dict):
            return {name: float(given)}
        found = {}
        for key, value in given.items():
            found[f"{name}: {key}"] = float(value)
        return found


def bootstrapped(values: np.ndarray, shares: np.ndarray, n: int) -> float | None:
    """Half a 95 % interval by the values [r] of resamples of n seeds, and their shares [r].

    None for one seed, and where half of the values or more are not finite.
    """
    finite = np.isfinite(values)
    if n == 1 or shares[finite].sum() <= 0.5:
        return None
    values, shares = values[finite], shares[finite]
    mean = np.average(values, weights=shares)
    variance = np.average((values - mean) ** 2, weights=shares)
    return half_width(n) * math.sqrt(variance / (n - 1) * n)


# -------------------------------------------------------------------------------- rates to try

def best_rate(tried: dict[float, float]) -> tuple[float, bool]:
    """(the rate of {rate: loss} with the least loss, whether rates on both sides were tried)."""
    rate = min(tried, key=tried.get)
    return rate, min(tried) < rate < max(tried)


def next_rate(tried: dict[float, float], grid: list[float]) -> float | None:
    """The rate to try next where the best so far is an end of what was tried; None: no further."""
    rate, bracketed = best_rate(tried)
    known = sorted(tried)
    if bracketed or len(known) - len(grid) >= EXTRA:
        return None
    if rate == known[-1]:
        ratio = known[-1] / known[-2]
    else:
        ratio = known[0] / known[1]
    return float(f"{rate * ratio:.3g}")
