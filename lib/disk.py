"""Files: written whole or not at all, locked, named by what they hold."""
import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lib.errors import InputError

FORMAT = 2  # of the cache on disk; part of every key


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/coppice`, or `~/.cache/coppice`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coppice"


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def write(path: Path, content: bytes | str):
    """Write a file whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partly = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partly.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    partly.rename(path)


@contextlib.contextmanager
def locked(path: Path, busy: str = ""):
    """Hold an exclusive lock on `path`: wait for it or, where `busy` says what it guards, refuse to wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:  # the system drops the lock when the process ends, however it ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy:
                raise InputError(f"{busy} is being trained by another process; "
                                 "wait for it, or use another --name") from None
            print(f"waiting for another process that is building {path.with_suffix('')}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
