"""Runs of equal configs are made once, whichever study asks for them.

RUNS/.equal/KEY holds the path, below RUNS, of the run that was made by what KEY stands for. Another
study that wants the same makes a link to it in the place of a run. What was stopped and resumed is
not found by a key: other code may have begun it.
"""

import importlib.metadata
import os
from pathlib import Path

from lib.config import ROOT, to_json, walk
from lib.disk import digest, write
from lib.keys import function_key, read_key

NO_MATTER = "name", "runs", "tracker"  # fields in which equal configs may differ
PACKAGES = "jax", "jaxlib", "optax", "numpy"  # whose versions matter
CODE = "*.py", "lib/*.py", "configs/*.py"  # files whose every change matters


def key_of(config, device: str) -> str:
    """What a run is known by: its config, what that reads and names, the code, and the device.

    The code is the house's and, of other files, those of the config's functions and the config
    files that these take names from, up to their configs. config: a `train.Config`, in which the
    run that it needs is named by its own key.
    """
    written = to_json(config)
    for name in NO_MATTER:
        del written[name]
    functions = []
    for _, value, _ in walk(config):
        if callable(value):
            functions.append(function_key(value))
    start = read_key("init_from", config.init_from, given=True)
    tokenizer = read_key("tokenizer", config.data.tokenizer, given=True)
    versions = map(importlib.metadata.version, PACKAGES)
    known = {
        "config": written,
        "functions": functions,
        "start": start,
        "tokenizer": tokenizer,
        "versions": list(versions),
        "device": device,
        "code": house(),
    }
    return digest(known)


def house() -> list[str]:
    """What the code of the house is known by."""
    files = []
    for pattern in CODE:
        files += sorted(ROOT.glob(pattern))
    return [digest(file.read_text("utf-8")) for file in files]


def find(runs: Path, key: str) -> Path | None:
    """The run in RUNS that was made by what a key stands for, if it is still there."""
    place = runs / ".equal" / key
    if not place.is_file():
        return None
    run = runs / place.read_text("utf-8")
    own = run / ".key"  # of what lies there now
    if not (run / "summary.json").is_file() or not own.is_file():
        return None
    if own.read_text("utf-8") != key:
        return None
    return run


def remember(runs: Path, key: str, run: Path):
    """Let a run that has ended be found by its key."""
    write(run / ".key", key)
    write(runs / ".equal" / key, os.path.relpath(run, runs))


def link(run: Path, made: Path):
    """Make a run's directory a link to that of an equal run; they may be moved together."""
    run.parent.mkdir(parents=True, exist_ok=True)
    run.symlink_to(os.path.relpath(made, run.parent))
