"""Files: written whole or not at all, locked, named by what they hold."""
import contextlib
import fcntl
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from lib.errors import InputError

# The version of what is kept in the cache; a part of every key there. Raise it when lib/ makes
# something else of the same documents and settings.
FORMAT = 4


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/coppice`, or `~/.cache/coppice`."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "coppice"


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def write(path: Path, content: bytes | str):
    """Write a file whole or not at all, whoever else writes it."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.rename(path)


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON Lines file, such as a run's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def finite(value: Any) -> Any:
    """A JSON value in which numbers that are not finite have become None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def locked(path: Path, busy: str = ""):
    """Hold an exclusive lock on the file `path`. Where another process has it, wait.

    busy: what the lock guards, if waiting is no use; then another's lock is an InputError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:  # the system drops the lock when the process ends in any way
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy:
                raise InputError(f"{busy} is being trained by another process; "
                                 "wait for it, or use another --name") from None
            built = path.with_suffix("")
            print(f"waiting for another process that is building {built}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
