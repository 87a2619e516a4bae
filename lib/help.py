"""What `--help` of a run prints."""
import ast
import collections.abc
import contextlib
import dataclasses
import inspect
import os
import textwrap
import typing
import warnings
from collections.abc import Callable
from pathlib import Path

from lib.config import ROOT, verbs, walk
from lib.errors import user_errors
from lib.fields import changed_settings, describe, kind, options, plain, settings

USAGE = """\
python train.py [CONFIG] [--path.to.field VALUE ...]    train, or resume
python train.py VERB ...                                one of these; VERB --help says more

"""
FUNCTIONS = """\
Functions of this config. A config file names them; what they take, in the order of the call, is in
brackets before the *. What comes after it are settings: --FIELD.SETTING VALUE.
"""


def show_help(found, made: type, file: str):
    """Print the verbs, the fields of a config with its values, and the functions that it holds."""
    wide = min(100, int(os.environ.get("COLUMNS", 100)))
    print(USAGE + "\n".join(verb_lines(wide)) + "\n")
    config = found
    if not isinstance(found, made):
        for name, parameter in inspect.signature(found).parameters.items():
            print(f"of {file} itself: --{name} VALUE{said(parameter)}")
        config = made()
    show_fields(config, made, os.path.relpath(file))
    unset = f"Not set here, and only by a config file: {', '.join(unset_fields(config))}."
    print("\n".join([*textwrap.wrap(unset, wide), "", FUNCTIONS, *function_lines(config, wide)]))


def said(parameter: inspect.Parameter) -> str:
    """What the help says of a parameter of a file's `config` function."""
    words = ""
    if parameter.annotation is not parameter.empty:
        words = f", {getattr(parameter.annotation, '__name__', parameter.annotation)}"
        if kind(parameter.annotation) in (typing.Literal, typing.Annotated):
            words = f", {describe(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return f"{words}, needed; what follows are the defaults of every config"
    return f"{words}, {parameter.default!r} without it"


def verb_lines(wide: int) -> list[str]:
    """A line for each verb: its name, and how its file begins."""
    out = []
    for name in verbs():
        module = ast.parse((ROOT / "tools" / f"{name}.py").read_text("utf-8"))
        first = (ast.get_docstring(module) or "").splitlines()[0]
        out.append(f"  {name:10}" + textwrap.shorten(first, wide - 12, placeholder=" ..."))
    return out


def show_fields(config, made: type, file: str):
    """Print the fields by tyro, which a machine may lack. Raises InputError then."""
    with user_errors(ImportError, sentence="--help needs the package tyro; pip install tyro"):
        import tyro
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def function_rule(info):
        """Fields that may hold a function are shown by its name."""
        if all(kind(of) is not collections.abc.Callable for of in options(info.type)):
            return None
        metavar = "NAME" if str in options(info.type) else "FUNCTION"
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar=metavar, instance_from_str=lambda words: words[0],
            is_instance=lambda value: True, str_from_instance=lambda value: [short(value)])

    how = tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands
    with registry, warnings.catch_warnings(), contextlib.suppress(SystemExit):
        warnings.simplefilter("ignore")  # that a function is no text, and the like
        tyro.cli(made, default=config, args=["--help"], prog=f"python train.py {file}",
                 use_underscores=True, config=how)


def unset_fields(config) -> list[str]:
    """The paths of fields that tyro leaves out: those that may hold dataclasses, and hold none."""
    out = []
    for path, part, hint in walk(config):
        may_hold = options(hint)
        for outer in options(hint):
            may_hold += [of for item in typing.get_args(outer) for of in options(item)]
        if not part and any(dataclasses.is_dataclass(of) for of in may_hold):
            out.append(path)
    return out


def short(value) -> str:
    """A value that may be a function, or hold some by name, in a few words."""
    if isinstance(value, dict) and any(map(callable, value.values())):
        return ", ".join(f"{name}: {short(part)}" for name, part in value.items())
    if not callable(value):
        return str(value)
    given = ", ".join(f"{name}={part!r}" for name, part in changed_settings(value).items())
    name = getattr(plain(value), "__name__", repr(value))
    return f"{name}({given})" if given else name


def function_lines(config, wide: int) -> list[str]:
    """Lines for each function of a config: the fields that hold it, its call and its first line."""
    places = {}
    for path, part, _ in walk(config):
        if callable(part):
            places.setdefault(call(part), (part, []))[1].append(path)
    out = []
    for text, (function, paths) in places.items():
        out.append(f"  {', '.join(paths)}")
        out += textwrap.wrap(text, wide, initial_indent=" " * 6, subsequent_indent=" " * 10)
        first = (inspect.getdoc(plain(function)) or "").splitlines()[:1]
        out += textwrap.wrap(" ".join(first), wide, initial_indent=" " * 6,
                             subsequent_indent=" " * 6)
    return out


def call(function: Callable) -> str:
    """A function's file, name, inputs and settings with their values."""
    inner, values = plain(function), settings(function)
    shown = []
    for name, parameter in inspect.signature(inner).parameters.items():
        if name not in values and parameter.default is parameter.empty:
            shown.append(name)
    if values:
        shown.append("*")
    shown += [f"{name}={part!r}" for name, part in values.items()]
    file = Path(inspect.getsourcefile(inner))
    if file.is_relative_to(ROOT):
        file = file.relative_to(ROOT)
    return f"{file}: {inner.__name__}({', '.join(shown)})"
