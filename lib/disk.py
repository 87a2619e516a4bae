"""Files: written whole or not at all, locked, named by what they hold."""
import contextlib
import fcntl
import hashlib
import json
import math
import os
import secrets
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


def user_path(text: str | Path) -> Path:
    """The path that somebody wrote, ~ and ~USER being home directories. Raises InputError."""
    expanded = os.path.expanduser(text)
    if "\0" in expanded or not encodable(expanded):
        raise InputError(f"{str(text)!r} is no path; allowed is one without NUL, of characters "
                         "that file names can hold")
    if expanded.startswith("~"):
        raise InputError(f"{str(text)!r} is in no home directory that is known here; allowed is a "
                         f"path, ./{text} for one of that name")
    return Path(expanded)


def encodable(name: str) -> bool:
    """Whether the name of a file can hold these characters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def is_step(name: str) -> bool:
    """Whether a name is a number of steps, in plain digits."""
    return name.isascii() and name.isdigit()


def digest(value: Any) -> str:
    """A short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def write(path: Path, content: bytes | str):
    """Write a file whole or not at all, whoever else writes it; then it is on the disk."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Containers that share a directory may share a process id too.
    partial = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except BaseException:  # of Python, an interrupt too: half a file must not stay
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def copy(file: Path, place: Path):
    """Copy a file, in the place of what is there, be that a link or not to be written."""
    content = file.read_bytes()
    if not place.is_symlink() and place.is_file() and place.read_bytes() == content:
        return
    partial = place.with_name(f"{place.name}.{secrets.token_hex(8)}.partial")
    partial.write_bytes(content)
    partial.rename(place)


def sync_directory(path: Path):
    """Force to disk which files a directory has."""
    directory = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot, or need not
            os.fsync(directory)
    finally:
        os.close(directory)


# ------------------------------------------------------------------------------------- checksums


def content_hash(content: bytes) -> bytes:
    """16 bytes that a content is known by."""
    return hashlib.blake2b(content, digest_size=16).digest()


def file_hash(path: Path) -> str:
    """The same of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_checked(path: Path, content: bytes):
    """Write a file that `read_checked` reads: its content, then the hash of that."""
    write(path, content + content_hash(content))


def read_checked(path: Path) -> bytes | None:
    """What `write_checked` wrote; None where the file is missing or anything else."""
    try:
        written = path.read_bytes()
    except FileNotFoundError:
        return None
    content, known = written[:-16], written[-16:]
    return content if content_hash(content) == known else None


def with_checksum(facts: dict) -> dict:
    """A JSON object with a hash of all else in it, as "checksum"."""
    facts = json.loads(json.dumps(facts))  # as it comes back
    return facts | {"checksum": digest(facts)}


def without_checksum(written: Any) -> dict | None:
    """What `with_checksum` was given; None where that is not what comes back."""
    if not isinstance(written, dict):
        return None
    facts = {name: value for name, value in written.items() if name != "checksum"}
    return facts if written.get("checksum") == digest(facts) else None


# ------------------------------------------------------------------------------------------ JSON


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metric_rows(path: Path) -> tuple[list[dict], list[int]]:
    """(the rows of a metrics.jsonl, the numbers, from 1, of its lines that are none: damaged)."""
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        row = metric_row(line)
        if row is None:
            damaged.append(number)
        else:
            rows.append(row)
    return rows, damaged


def metric_row(line: bytes) -> dict | None:
    """The row in a line of metrics.jsonl; None in what is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_object(path: Path) -> dict:
    """A JSON object from a file; empty if there is none, or part of one."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


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
    with open(path, "a") as file:  # the system drops the lock when the process ends in any way
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
