"""Configs: read from files and the command line, checked, and written as JSON."""
import ast
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
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import typeguard
import tyro

from lib.disk import digest
from lib.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
HOUSE = "lib", "tools", "configs"  # whose files import one another by dotted names
RENAMED = {"weights": "reparam", "rates": "lr"}  # fields by the names that they once had


def load_file(path: str | Path):
    """Run a Python file as a module of its own, once per process."""
    path = Path(path).resolve()
    if path.parent == ROOT or any(path.is_relative_to(ROOT / part) for part in HOUSE):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    name = f"{path.stem}_{digest(str(path))[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def find_config_file(path: str):
    """Raise InputError unless a file is there, with the config or verb whose name is the nearest."""
    if Path(path).is_file():
        return
    configs = sorted(place.relative_to(ROOT) for place in (ROOT / "configs").rglob("*.py"))
    verbs = sorted(place.stem for place in (ROOT / "tools").glob("*.py"))
    names = {place.stem: place.as_posix() for place in configs} | {verb: verb for verb in verbs}
    near = difflib.get_close_matches(Path(path).stem, names, 1)
    hint = f"did you mean {names[near[0]]}?" if near else "configs/README.md lists the configs"
    raise InputError(f"{path!r} is neither a config file, such as configs/quickstart.py, nor a verb "
                     f"({', '.join(verbs)}); {hint}")


@contextlib.contextmanager
def config_errors(path: str):
    """Whatever a config file does wrong, said in one InputError that names the file and its line."""
    try:
        yield
    except Exception as error:  # a config file may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == str(Path(path).resolve())]
        line = f", line {lines[-1]}" if lines else ""
        said = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise InputError(f"config file {path}{line}: {said}") from error


def load_module(path: str):
    """The module of a config file; raises InputError for whatever is wrong with it."""
    find_config_file(path)
    with config_errors(path):
        return load_file(path)


def load_config(path: str, kind: type):
    """The `config` of a config file or, of FILE:ARM, an arm of its study or of its dictionary `arms`.

    kind: train.Config, which what is found has to be.
    """
    path, _, arm = path.partition(":")
    if path.endswith(".json"):  # of a run
        find_config_file(path)
        with config_errors(path):
            return from_json(kind, json.loads(Path(path).read_text()))
    module = load_module(path)
    arms = getattr(getattr(module, "study", module), "arms", {})
    found = arms.get(arm) if arm else getattr(module, "config", None)
    if isinstance(found, kind):
        return found
    if arm:
        raise InputError(f"config file {path} defines no arm {arm!r}; its arms: {', '.join(arms) or 'none'}")
    hint = f"; it has arms, one of which {path}:{next(iter(arms))} names" if arms else ""
    raise InputError(f"config file {path} defines no `config = Config(...)`{hint}")


def parts(value) -> dict[str, tuple[Any, Any]]:
    """{name: (part, type)} of a config value: fields, dictionary entries, items, a partial's arguments."""
    if dataclasses.is_dataclass(value):
        return {n: (getattr(value, n), hint) for n, hint in typing.get_type_hints(type(value)).items()}
    if isinstance(value, dict):
        return {name: (part, Any) for name, part in value.items()}
    if isinstance(value, tuple):
        return {str(i): (part, Any) for i, part in enumerate(value)}
    if isinstance(value, functools.partial):
        takes = inspect.signature(value.func).parameters.items()
        return {name: (value.keywords.get(name, p.default), Any) for name, p in takes}
    return {}


def to_json(value):
    """A config as JSON; a function is its `file:name`, its arguments and a hash of its source."""
    if callable(value):
        function = getattr(value, "func", value)
        file = Path(inspect.getsourcefile(function)).resolve()
        file = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
        return {"function": f"{file.as_posix()}:{function.__qualname__}",
                "arguments": {k: to_json(v) for k, v in getattr(value, "keywords", {}).items()},
                "source": digest(inspect.getsource(function))}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
        return {name: to_json(part) for name, (part, _) in parts(value).items()}
    return value


def from_json(hint, value):
    """The inverse of `to_json` for a type; the files of the functions must be where they were."""
    if isinstance(value, dict) and {"function", "arguments"} <= value.keys():
        file, name = value["function"].rsplit(":", 1)
        function = getattr(load_file(ROOT / file), name)
        return functools.partial(function, **value["arguments"]) if value["arguments"] else function
    options = [h for h in typing.get_args(hint) if h is not type(None)]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        value = {k if k in hints else RENAMED.get(k, k): v for k, v in value.items()}  # of an older run
        return hint(**{k: from_json(hints[k], v) for k, v in value.items()})
    if isinstance(value, dict):
        return from_json(options[0], value) if typing.get_origin(hint) is not dict else \
            {k: from_json(options[1], v) for k, v in value.items()}
    return tuple(from_json(options[0], v) for v in value) if isinstance(value, list) else value


def flatten(value, path: str = "") -> dict[str, Any]:
    """Leaves of a JSON value by dotted path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        return {path: value}
    return {k: v for key, child in items for k, v in flatten(child, f"{path}.{key}".strip(".")).items()}


def override(value, names: list[str], word: str, flag: str):
    """`value` with the part at a path set from a word of the command line; `check` judges its type."""
    if not names:
        if isinstance(value, str):
            return word
        try:
            parsed = ast.literal_eval(word.capitalize() if word in ("true", "false", "none") else word)
        except (ValueError, SyntaxError):
            return word
        return float(parsed) if isinstance(value, float) and type(parsed) is int else parsed
    inside = parts(value)
    name = names[0] if names[0] in inside else names[0].replace("-", "_")
    if name not in inside and RENAMED.get(name) in inside:
        raise InputError(f"unknown field {flag}: {name!r} is now {RENAMED[name]!r}")
    if name not in inside:
        close = difflib.get_close_matches(name, inside, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"allowed are: {', '.join(inside) or 'none'}"
        raise InputError(f"unknown field {flag}: there is no {name!r} here; {hint}")
    part = override(inside[name][0], names[1:], word, flag)
    if isinstance(value, functools.partial):
        return functools.partial(value.func, **value.keywords | {name: part})
    if isinstance(value, tuple):
        return tuple(part if str(i) == name else v for i, v in enumerate(value))
    return value | {name: part} if isinstance(value, dict) else replace(value, **{name: part})


def parse(arguments: list[str], kind: type) -> tuple[Any, str]:
    """(config, its file) from the command line of a run."""
    arguments = list(arguments)
    named = arguments and not arguments[0].startswith("-")
    file = arguments.pop(0) if named else str(ROOT / "configs/quickstart.py")
    config = load_config(file, kind)
    if {"-h", "--help"} & set(arguments):
        tyro.cli(kind, default=config, args=["--help"], prog=f"python train.py {file}",
                 use_underscores=True, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands))
    while arguments:
        flag, equals, word = arguments.pop(0).partition("=")
        if not flag.startswith("--"):
            raise InputError(f"{flag!r} is not understood here; fields are set by --path.to.field VALUE")
        if not equals and (not arguments or arguments[0].startswith("--")):
            raise InputError(f"{flag} needs a value: {flag} VALUE")
        config = override(config, flag[2:].split("."), word if equals else arguments.pop(0), flag)
    return replace(config, name=config.name or Path(file.replace(".py:", "-")).name.removesuffix(".py")), file


def check_types(value, hint, path: str):
    """Raise InputError unless a config value has its declared type, and its functions can be written down."""
    if callable(value):
        inner = getattr(value, "func", value)
        if not inspect.isfunction(inner) or "<" in inner.__qualname__ or getattr(value, "args", ()):
            raise InputError(f"{path} is {getattr(inner, '__qualname__', inner)!r}; allowed is a top-level "
                             "function of a file, or a functools.partial of one with keyword arguments")
        for name, part in getattr(value, "keywords", {}).items():
            try:
                json.dumps(part)
            except TypeError:
                raise InputError(f"{path}.{name} is {part!r}; allowed is what JSON can hold") from None
    try:
        every = typeguard.CollectionCheckStrategy.ALL_ITEMS
        typeguard.check_type(value, hint, collection_check_strategy=every)
        if isinstance(value, bool) and hint is not bool:
            raise typeguard.TypeCheckError(f"is not {hint}")
    except typeguard.TypeCheckError:
        options = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        allowed = " or ".join(map(repr, options)) or getattr(hint, "__name__", str(hint))
        raise InputError(f"{path} is {value!r} ({type(value).__name__}); allowed is {allowed}") from None
    for name, (part, part_hint) in parts(value).items() if not callable(value) else ():
        check_types(part, part_hint, f"{path}.{name}".strip("."))
