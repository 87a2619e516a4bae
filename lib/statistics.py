"""What a study's runs say: figures of each run, paired differences, intervals and verdicts."""
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

from scipy.special import stdtrit

from lib.disk import read_rows
from lib.study import Claim

MADE_BY = "versions", "commit", "host", "device", "devices"  # of a run's summary
EXTRA = 2  # rates tried beyond the grid before an arm's best one is reported as not bracketed
NOT_JUDGED = "not judged"  # the verdict of --quick, which shows that a study runs and no more
PLUS_MINUS = "± is half a 95 % interval"  # said wherever such figures are shown


# -------------------------------------------------------------------------------------- intervals

def interval(values: list[float]) -> tuple[float, float | None]:
    """(mean, half of its 95 % interval by Student's t); the latter is None for one value."""
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return mean, None
    width = float(stdtrit(n - 1, 0.975))  # in standard errors
    return mean, width * statistics.stdev(values) / math.sqrt(n)


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
        run: Path, elsewhere: float = 0.0, measures: dict[str, Callable] | None = None) -> dict:
    """What a study needs of a complete run.

    elsewhere: FLOPs spent on it in other places, which its own are added to. Returns

        bpb, dev   means over sources on test and dev, at the end; None where there is no such split
        last       every metric's last value, and the study's `measures` of the rows
        curve      tokens, flops and dev bits per byte at each evaluation
        made_by    versions, commit, host and device
    """
    rows = read_rows(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    last = {}
    for row in rows:
        last |= row
    for name, measure in (measures or {}).items():
        last[name] = measure(rows)
    curve = curve_of(rows, elsewhere)
    return dict(
        run=run.name,
        tokens=rows[-1]["train/tokens"],
        flops=rows[-1]["train/flops"] + elsewhere,
        bpb=mean_bpb(last, "test"),
        dev=curve["dev"][-1] if curve["dev"] else None,
        last=last,
        curve=curve,
        made_by={name: summary[name] for name in MADE_BY})


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
    """A measure of two runs: arm less control, or the speed-up; None where one does not have it."""
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
    if measure == "bpb":
        return run["bpb"]
    return run["last"].get(measure)


def compare(arm: dict[int, dict], control: dict[int, dict], measure: str) -> dict:
    """A measure of two arms {seed: figures}, paired by seed: values, mean, half an interval."""
    values = {}
    for seed in sorted(arm.keys() & control.keys()):
        value = difference(arm[seed], control[seed], measure)
        if value is not None:
            values[seed] = value
    mean, half = interval([*values.values()]) if values else (None, None)
    return dict(measure=measure, values=values, mean=mean, half=half)


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
