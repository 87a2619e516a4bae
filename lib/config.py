"""Configs: read from files, and written as JSON."""
import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lib.disk import digest
from lib.errors import InputError
from lib.fields import (
    RENAMED,
    allowed_names,
    changed_settings,
    check_value,
    describe,
    field_types,
    inside,
    join,
    kind,
    options,
    plain,
    setting_types,
    settings,
)
from lib.trust import ROOT, may_run, read_record

FUNCTION = {"function", "arguments"}  # keys of a function in JSON, which has "source" besides
HOUSE = "lib", "tools", "configs"  # whose files import one another by dotted names


# -------------------------------------------------------------------------------- files of Python

LOADING: list[Path] = []  # the files that `load_file` is running


def load_file(path: str | Path) -> ModuleType:
    """Run a Python file as a module, once per process, by the name that an import gives it."""
    path = Path(path).resolve()
    in_house = path.parent == ROOT or any(path.is_relative_to(ROOT / part) for part in HOUSE)
    if in_house and "." not in path.stem:
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    name = f"{path.stem}_{digest(str(path))[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        LOADING.append(path)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:  # of the file, whatever it raises: half a module must not stay
            del sys.modules[name]
            raise
        finally:
            LOADING.pop()
    return sys.modules[name]


def refuse_while_loading():
    """A file that trained as it is loaded would train again when its run loads the file's copy."""
    if LOADING:
        raise InputError(f"train() is called while {LOADING[-1].name} is loaded, as a run loads "
                         'what defines its functions; put the call under if __name__ == "__main__"')


def load_module(path: str) -> ModuleType:
    """The module of a config file. Raises InputError for whatever is wrong with it."""
    refuse_no_file(path)
    with config_errors(path):
        return load_file(path)


@contextlib.contextmanager
def config_errors(path: str):
    """Whatever a config file does wrong, as one InputError that names the file and its line."""
    try:
        yield
    except (Exception, SystemExit) as error:  # of a config file, which may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(Path(path).resolve())]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        line = f", line {lines[-1]}" if lines else ""
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"config file {path}{line}: {said}") from error


def verbs() -> list[str]:
    """The names of tools/ that are verbs of the command line: the files that have a `main`."""
    files = sorted((ROOT / "tools").glob("*.py"))
    return [file.stem for file in files if "\ndef main(" in file.read_text("utf-8")]


def refuse_no_file(path: str):
    """Raise InputError, with what was probably meant, for a path that is no config file."""
    place = Path(path)
    if (place / "config.json").is_file():
        raise InputError(f"{path} is the directory of a run; resume it by the command that began "
                         f"it, or by `python train.py {place / 'config.json'}`")
    if (place / "study.json").is_file():
        raise InputError(f"{path} is the directory of a study; allowed is the study's file, and "
                         f"`python train.py report {path}` shows its result")
    if place.is_dir():
        raise InputError(f"{path} is a directory; allowed is a config file, such as "
                         "configs/quickstart.py")
    if not place.is_file():
        raise InputError(f"{path!r} is neither a config file, such as configs/quickstart.py, nor a "
                         f"verb ({', '.join(verbs())}); {nearest(place)}")
    if place.suffix not in (".py", ".json"):
        raise InputError(f"{path} is neither a config file, NAME.py, nor the config.json of a run")


# Words that were verbs, or are elsewhere, with what does the same here.
NO_VERBS = {
    "track": "a tracker is a field of a run: --tracker tensorboard, wandb or trackio",
    "train": "a run needs no verb: python train.py CONFIG",
    "resume": "the command that began a run resumes it",
}


def nearest(place: Path) -> str:
    """Which config file or verb a path that does not exist may mean, by its name."""
    if str(place) in NO_VERBS:
        return NO_VERBS[str(place)]
    files = sorted((ROOT / "configs").rglob("*.py"))
    known = {file.stem: file.relative_to(ROOT).as_posix() for file in files}
    known |= {verb: verb for verb in verbs()}
    near = difflib.get_close_matches(place.stem, known, 1, 0.75)
    return f"did you mean {known[near[0]]}?" if near else "configs/README.md lists the configs"


# ------------------------------------------------------------------------------- configs of a file

def load_config(path: str, kind: type, /, **given):
    """The config of a file, FILE.py, FILE.py:ARM or a run's config.json; see `find_config`.

    given: arguments, where the file defines a function `config`. Raises InputError.
    """
    found, file = find_config(path, kind)
    return found if isinstance(found, kind) else build(found, given, file, kind)


def find_config(path: str, kind: type) -> tuple[Any, str]:
    """(the config of a file or the function that builds it, FILE or FILE:ARM that names it).

    FILE:ARM is an arm of the file's study, or of its dictionary `arms`. FILE is its `config`, or
    the control of its study. kind: `train.Config`.
    """
    path, _, arm = path.partition(":")
    if path.endswith(".json") and Path(path).is_file():
        return read_json(path, kind), path
    module = load_module(path)
    config = getattr(module, "config", None)
    if not arm and (isinstance(config, kind) or inspect.isfunction(config)):
        return config, path
    arms, control = arms_of(module)
    arm = arm or control
    if isinstance(arms.get(arm), kind):
        return arms[arm], f"{path}:{arm}"
    names = ", ".join(arms)
    if arm:
        raise InputError(f"config file {path} defines no arm {arm!r}; its arms: {names or 'none'}")
    hint = f"; its arms: {names}, each of them {path}:ARM" if arms else ""
    raise InputError(f"config file {path} defines no `config = Config(...)`{hint}")


def arms_of(module: ModuleType) -> tuple[dict[str, Any], str]:
    """(configs by name that a file's study or its dictionary `arms` has, its control or "").

    A study has its arms and the runs that these need.
    """
    study = getattr(module, "study", None)
    arms = getattr(study, "arms", getattr(module, "arms", None))
    if not isinstance(arms, dict):
        return {}, ""
    return arms | getattr(study, "needs", {}), getattr(study, "first", "")


def build(function: Callable, given: dict[str, Any], file: str, kind: type):
    """The config that a file's function `config` makes of arguments by name. Raises InputError."""
    hints = setting_types(function)
    for name, value in given.items():
        check_value(value, hints.get(name, Any), f"--{name} of {file}")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise InputError(f"config file {file} needs --{name} VALUE")
    with config_errors(file):
        config = function(**given)
    if not isinstance(config, kind):
        raise InputError(f"`config` of {file} gives {config!r}; allowed is a {kind.__name__}")
    return config


# ------------------------------------------------------------------------------------------ parts

def parts(value) -> dict[str, tuple[Any, Any]]:
    """{name: (part, its type)}: fields, entries of a dictionary, items, settings of a function."""
    if callable(value):
        hints = setting_types(value)
        return {name: (part, hints.get(name, Any)) for name, part in settings(value).items()}
    return {name: (part, of) for name, part, of in inside(value, Any)}


def walk(value, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, part, its type) of all that is inside a value, each part before what is in it."""
    for name, (part, hint) in parts(value).items():
        below = join(path, name)
        yield below, part, hint
        yield from walk(part, below)


# ------------------------------------------------------------------------------------------- JSON

def to_json(value):
    """A config as JSON. A function is its `file:name`, all settings and a hash of its source."""
    if callable(value):
        function = plain(value)
        file = Path(inspect.getsourcefile(function)).resolve()
        if file.is_relative_to(ROOT):
            file = file.relative_to(ROOT)
        return {"function": f"{file.as_posix()}:{function.__qualname__}",
                "arguments": {name: to_json(part) for name, part in settings(value).items()},
                "source": digest(inspect.getsource(function))}
    if isinstance(value, tuple | list):
        return [to_json(part) for part in value]
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return {name: to_json(part) for name, part, _ in inside(value, Any)}
    return value


def read_json(path: str, kind: type):
    """The config in a run's config.json. Raises InputError for what is none."""
    read_record(Path(path).parent)
    with config_errors(path):
        written = json.loads(Path(path).read_text("utf-8"))
        if isinstance(written, dict):
            return from_json(kind, written)
    raise InputError(f"config file {path} is not the config.json of a run: it is no object")


def run_json(directory: Path) -> dict:
    """What a run's config.json holds. Raises InputError where it is not a config's."""
    read_record(directory)
    path = directory / "config.json"
    with config_errors(str(path)):
        written = json.loads(path.read_text("utf-8"))
    if isinstance(written, dict) and {"model", "optimizer"} <= written.keys():
        return written
    raise InputError(f"{path} is not the config.json of a run: it has no model or no optimizer")


def from_json(hint, value):
    """The inverse of `to_json` for a type; the files of the functions must be where they were.

    Raises InputError for a field or a function that is not there.
    """
    if isinstance(value, dict) and FUNCTION <= value.keys():
        if not option(hint, lambda of: kind(of) is Callable):
            raise InputError(f"the config has the function {value['function']!r} where "
                             f"{describe(hint)} is allowed")
        return function_of(value)
    if isinstance(value, dict):
        made = option(hint, dataclasses.is_dataclass)
        if made:
            return make(made, value)
        named = option(hint, lambda of: typing.get_origin(of) is dict) or dict[str, Any]
        return {name: from_json(typing.get_args(named)[1], part) for name, part in value.items()}
    if isinstance(value, list):
        several = option(hint, lambda of: typing.get_origin(of) is tuple) or tuple[Any, ...]
        return tuple(from_json(typing.get_args(several)[0], part) for part in value)
    return value


def option(hint, holds: Callable[[Any], bool]):
    """The first type that an annotation allows and that `holds`; None where there is none."""
    return next((of for of in options(hint) if holds(of)), None)


def make(made: type, value: dict):
    """A dataclass from JSON; fields that an older run has by another name are known by it."""
    hints, given = field_types(made), {}
    for name, part in value.items():
        if name not in hints:
            name = RENAMED.get(name, name)
        if name not in hints:
            raise InputError(f"{made.__name__} has no field {name!r}; {allowed_names(name, hints)}")
        given[name] = from_json(hints[name], part)
    return made(**given)


def function_of(written: dict) -> Callable:
    """The function that JSON names, a partial where settings are not its defaults.

    It is the same object for the same JSON, so that configs made of it are equal.
    """
    return function_of_text(json.dumps(written))


@functools.cache
def function_of_text(text: str) -> Callable:
    """The same for a text of JSON. Raises InputError for what may not run; see lib/trust.py."""
    written = json.loads(text)
    file, _, name = str(written["function"]).rpartition(":")
    found = []
    for place in may_run(file, name):
        if not place.is_file():
            raise InputError(f"the config has the function {name} of {file}, a file that is gone")
        function = getattr(load_module(str(place)), name, None)
        own = inspect.isfunction(function) or inspect.isclass(function)
        if own and Path(inspect.getsourcefile(function)).resolve() == place:
            found.append(function)
    if not found:
        raise InputError(f"the config has the function {name}, which {file} does not define")
    same = [one for one in found if digest(inspect.getsource(one)) == written.get("source")]
    function = [*same, *found][0]  # the file may have changed since a copy was made of it
    partial = functools.partial(function, **written["arguments"])
    changed = changed_settings(partial)
    return functools.partial(function, **changed) if changed else function


def flatten(value, path: str = "") -> dict[str, Any]:
    """Leaves of a JSON value by dotted path."""
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        return {path: value}
    out = {}
    for key, child in items:
        out |= flatten(child, f"{path}.{key}".strip("."))
    return out
