"""Keys: what a function of a config computes, as JSON, so that what it made can be found again."""
import ast
import contextlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from lib.disk import digest, is_step, user_path
from lib.errors import InputError
from lib.fields import changed_settings, settings
from lib.sources import files


def function_key(function: Callable | None) -> Any:
    """What a function of a config computes, as JSON; None for None.

    It depends on the function's source, on its file's up to the config, on its arguments, on the
    files and runs that these name, and on Python's minor version, not on its patch release.
    """
    if function is None:
        return None
    inner = getattr(function, "func", function)
    arguments = changed_settings(function)
    read = {name: read_key(name, value, name in arguments)
            for name, value in settings(function).items()}
    return {
        "source": inspect.getsource(inner),
        "file": digest(source_above(inner)),
        "arguments": arguments,
        "read": read,
        "python": list(sys.version_info[:2]),
    }


def source_above(function: Callable) -> str:
    """The source of a function's file up to its config; of Coppice's own files nothing.

    Those are fixed by FORMAT in lib/disk.py: an edit there must not make every cache be built anew.
    Config files, and files beside it, that it takes names from follow it, and so on.
    """
    module = function.__module__
    if in_house(module):
        return ""
    file = inspect.getmodule(function)
    if file is None:
        return inspect.getsource(function)
    found, todo = {}, {module: file}
    while todo:
        name, file = todo.popitem()
        found[name] = re.split(r"(?m)^(?:config|arms|study)\b", inspect.getsource(file))[0]
        for other, place in helpers(file).items():
            if other not in found:
                todo[other] = place
    return "".join(found.values())


def in_house(module: str) -> bool:
    """Whether a module is one of Coppice's own, no config file."""
    return module in ("data", "model", "train") or module.startswith("lib.")


def helpers(file: ModuleType) -> dict[str, ModuleType]:
    """{name: module} of what a file takes names from: config files, and files beside it."""
    here = Path(inspect.getsourcefile(file)).parent
    found = {}
    for name in names_imported(inspect.getsource(file)):
        place = getattr(sys.modules.get(name), "__file__", None)
        if place is None or in_house(name):
            continue
        if name.startswith("configs.") or Path(place).parent == here:
            found[name] = sys.modules[name]
    return found


def names_imported(text: str) -> list[str]:
    """The modules that a Python file imports, or takes names from."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [each.name for each in node.names]
    return found


def read_key(name: str, value: Any, given: bool) -> list:
    """What is known of the files or runs that a setting, or each item of it, names; else [].

    A default such as "train" is no file, even if one of that name happens to be there.
    """
    if isinstance(value, list | tuple):
        return [read_key("", item, given) for item in value]
    if not isinstance(value, str) or not value:
        return []
    if is_run(value):
        return run_key(value)
    run, step = run_step(value)
    if is_run(run):
        return run_key(run, step)
    if name == "path" or (given and os.path.exists(os.path.expanduser(value))):
        with contextlib.suppress(InputError):  # no such file: whoever reads it will say so
            return files_key(value)
    return []


def names_place(name: str, value: Any) -> bool:
    """Whether a setting says where files or a run are."""
    if isinstance(value, list | tuple):
        return any(names_place("", item) for item in value)
    if not isinstance(value, str) or not value:
        return False
    run, _ = run_step(value)
    return name == "path" or is_run(run) or os.path.exists(os.path.expanduser(value))


def files_key(path: str) -> list:
    """[[name, size, time of the last change]] of each file that a path means.

    Owner, permissions and inode do not matter: a copy that keeps times, or a backup, is the same
    file. A file system that is not this machine's says a file's version in its own way.
    """
    fs, found = files(path)
    if isinstance(fs, LocalFileSystem):
        return [[name, *file_key(Path(place))[1:]] for name, place in found]
    return [[name, fs.ukey(place)] for name, place in found]


def run_step(name: str) -> tuple[str, int | None]:
    """RUN or RUN@STEP as (run, step), where a step is given."""
    run, at, step = name.rpartition("@")
    if at and is_step(step):
        return run, int(step)
    return name, None


def is_run(path: str) -> bool:
    """Whether a directory is a run's."""
    directory = os.path.expanduser(path)
    begun = os.path.isdir(os.path.join(directory, "checkpoints"))
    return begun and os.path.isfile(os.path.join(directory, "config.json"))


def run_key(run: str, step: int | None = None) -> list:
    """[[step, key]] of a run's checkpoints, or of one; a run trained anew has other ones."""
    directory = user_path(run)
    if step is not None:
        return [[step, checkpoint_key(directory, step)]]
    places = directory.glob("checkpoints/*")
    steps = sorted(int(place.name) for place in places if is_step(place.name))
    return [[step, checkpoint_key(directory, step)] for step in steps]


def checkpoint_key(run: Path, step: int) -> Any:
    """The checksums of a checkpoint or, where it has none, its files' names, sizes and times."""
    directory = run / "checkpoints" / str(step) / "meta"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return digest(json.loads((directory / "metadata").read_text("utf-8"))["checksums"])
    places = [*directory.glob("*"), run / "summary.json"]
    return [file_key(path) for path in sorted(places) if path.exists()]


def file_key(path: Path) -> list:
    """[name, size, time of the last change in ns] of a file."""
    facts = path.stat()
    return [path.name, facts.st_size, facts.st_mtime_ns]
