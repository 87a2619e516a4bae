"""Records: what came out of the studies in configs/, as JSON under results/.

results/CHAPTER/METHOD.json belongs to configs/CHAPTER/METHOD.py. It holds every figure that may be
shown of the study: means with half a 95 % interval, each seed's value, the rates chosen, verdicts,
what it cost and what it was made by. It holds no curves.
"""
import json
from dataclasses import asdict
from pathlib import Path

from lib.disk import finite, write
from lib.errors import InputError
from lib.statistics import value_of
from lib.study import PAIRED, Claim, Study

NOT_RUN = "not run"  # the verdict of a claim about an arm that was left out
NOT_RECORDED = "not recorded yet"  # ... and of a study that has no record


# ---------------------------------------------------------------------------------- where they are

def library_file(root: Path, file: str | Path) -> Path:
    """A file's path below `root`, or its own where it lies elsewhere."""
    place = Path(file).resolve()
    return place.relative_to(root) if place.is_relative_to(root) else place


def record_path(root: Path, file: str | Path) -> Path:
    """Where the record of a study's file is; raises InputError unless it is in a chapter."""
    parts = library_file(root, file).parts
    if len(parts) != 3 or parts[0] != "configs":
        raise InputError(f"{file} cannot be recorded; allowed is a file configs/CHAPTER/METHOD.py "
                         f"of {root}")
    return root / "results" / parts[1] / f"{Path(parts[2]).stem}.json"


def read_record(root: Path, file: str | Path) -> dict | None:
    """The record of a study's file, None where there is none yet."""
    place = record_path(root, file)
    if not place.is_file():
        return None
    try:
        return json.loads(place.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({error}); restore it, or record the study again"
                         ) from None


def write_record(place: Path, record: dict):
    """Write a record whole or not at all."""
    write(place, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


# ------------------------------------------------------------------------------ what is in them

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
    name = library_file(root, file).as_posix()
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
        claims=[claim_record(study, claim, result) for claim in study.claims],
        cost=result["cost"],
        failed=result["failed"],
        made_by=makers(result["made_by"]))
    return finite(record)


def makers(found: list[dict]) -> list[dict]:
    """What the runs were made by, but for the names of the machines."""
    made_by = []
    for by in found:
        own = {key: by[key] for key in ("commit", "versions", "device", "devices")}
        if own not in made_by:
            made_by.append(own)
    return made_by
