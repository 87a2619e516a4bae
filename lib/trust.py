"""Whose code runs: which files a run's directory may name functions of.

A run's config.json, the metadata of its checkpoints and its tokenizer name functions by file. Who
reads a directory that somebody else made runs none of its code unasked. A file runs if

- it is of this repository and made for configs: OFFERED;
- or it runs in this process already, such as the config file of the command line;
- or this user's own run recorded it. A run copies such files to source/ and writes their hashes to
  source/code.json, under a signature by a secret of the user's cache directory. Where the file has
  changed since, or is gone, the copy runs in its place;
- or the command says `--trust`. Then another's record holds as if it were one's own, and a run that
  has none names files as it likes.
"""
import contextlib
import hmac
import json
import os
import secrets
import sys
import sysconfig
from pathlib import Path
from typing import Any

from lib.disk import cache_home, copy, digest, file_hash, read_object, write
from lib.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
# Files and folders whose functions are made for configs: they run no file and write none.
OFFERED = (
    *("model.py", "data.py", "configs", "lib/families"),
    *("lib/any_text.py", "lib/biases.py", "lib/core_tasks.py", "lib/duplicates.py", "lib/edits.py"),
    *("lib/freezing.py", "lib/lora.py", "lib/matrices.py", "lib/neighbours.py"),
    *("lib/objectives.py", "lib/optim.py", "lib/packing.py", "lib/probe.py", "lib/prune.py"),
    *("lib/readers.py", "lib/schedule.py", "lib/scores.py", "lib/seq2seq.py", "lib/sources.py"),
    *("lib/tasks.py", "lib/teacher.py", "lib/vocabulary.py", "lib/widen.py"),
)
HOUSE = "train.py", "model.py", "data.py", "lib", "tools"  # what a run need not keep to be read
PACKAGES = {"site-packages", "dist-packages"}
asked: list[str] = []  # "--trust", while a command runs that says it
recorded: dict[str, list[Path]] = {}  # {file as a run names it: what may run in its place}


@contextlib.contextmanager
def trust(given: bool):
    """Let the code of other people's runs run, if it is `given`."""
    before = list(asked)
    if given:
        asked.append("--trust")
    try:
        yield
    finally:
        asked[:] = before


# ------------------------------------------------------------------------------------- which files

def may_run(file: str, name: str) -> list[Path]:
    """The files to look in, in turn, for the function `name` of a file that a run names.

    Raises InputError where none may run.
    """
    path = (ROOT / file).resolve()
    if is_offered(path):
        return [path]
    found = [place for place in recorded.get(file, []) if place != path]
    if path in recorded.get(file, []) or is_running(path):
        found.insert(0, path)
    if asked and not found:
        found.append(path)
    if not found:
        gone = "" if path.is_file() else ", a file that is gone"
        raise InputError(
            f"the config has the function {name} of {file}{gone}, which is not code of this "
            "repository for configs, nor was it recorded by a run of yours; if you trust who made "
            "the run, add --trust, and it is run")
    return found


def is_offered(path: Path) -> bool:
    """Whether a file is of this repository and made for configs."""
    return any(path.is_relative_to(ROOT / part) for part in OFFERED)


def is_running(path: Path) -> bool:
    """Whether a file runs in this process already, and is neither the house's nor a package's."""
    house = any(path.is_relative_to(ROOT / part) for part in HOUSE)
    library = path.is_relative_to(sysconfig.get_path("stdlib")) or PACKAGES & set(path.parts)
    if house or library:
        return False
    return any(getattr(module, "__file__", None) == str(path) for module in [*sys.modules.values()])


# ---------------------------------------------------------------------------------------- records

def named_files(written: Any) -> set[str]:
    """The files of all functions in a config's JSON, also of those in other functions' settings."""
    found = set()
    if isinstance(written, list):
        found = set().union(*map(named_files, written))
    elif isinstance(written, dict):
        found = set().union(*map(named_files, written.values()))
        if isinstance(written.get("function"), str):
            found.add(written["function"].rpartition(":")[0])
    return found


def record(source: Path, names: set[str]):
    """Copy files that functions are of into a run's source/, and sign what they were."""
    files = {}
    for name in sorted(names):
        path = (ROOT / name).resolve()
        if is_offered(path) or not path.is_file():
            continue
        kept = path.name
        if kept in HOUSE or kept in [each["copy"] for each in files.values()]:
            kept = f"{digest(name)[:8]}-{kept}"
        if path != (source / kept).resolve():
            copy(path, source / kept)
        files[name] = {"copy": kept, "hash": file_hash(source / kept)}
    known = {"files": files, "signature": signature(files)}
    write(source / "code.json", json.dumps(known, indent=1))


def read_record(directory: Path):
    """Let the code run that a run recorded, if it is this user's run or is trusted."""
    source = directory / "source"
    known = read_object(source / "code.json")
    files = known.get("files")
    if not isinstance(files, dict) or not all(isinstance(of, dict) for of in files.values()):
        return
    if not asked and not hmac.compare_digest(str(known.get("signature")), signature(files)):
        return
    for name, each in files.items():
        copy = source / Path(str(each.get("copy"))).name
        for place in ((ROOT / name).resolve(), copy.resolve()):
            whole = place.is_file() and file_hash(place) == each.get("hash")
            if whole and place not in recorded.setdefault(name, []):
                recorded[name].append(place)


def signature(files: dict) -> str:
    """What only this user can write below a record."""
    said = json.dumps(files, sort_keys=True).encode()
    return hmac.new(secret(), said, "sha256").hexdigest()


def secret() -> bytes:
    """Random bytes that no other user can read, made once."""
    path = cache_home() / "secret"
    while not path.exists() or path.stat().st_size != 32:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        own = path.with_name(f"secret.{secrets.token_hex(8)}.partial")
        handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(own, path)
        own.unlink()
    return path.read_bytes()
