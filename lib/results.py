"""Records: what came out of the studies in configs/, as JSON under results/.

results/CHAPTER/METHOD.json belongs to configs/CHAPTER/METHOD.py. It holds every figure that may be
shown of the study: means with half a 95 % interval, each seed's value, the rates chosen, verdicts,
what it cost and what it was made by. It holds no curves.
"""
from pathlib import Path

from lib.errors import InputError

NOT_RECORDED = "not recorded yet"  # the verdict of a study that has no record


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
