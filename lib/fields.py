"""What a field of a config may hold: types with bounds, which judge values."""
import collections.abc
import dataclasses
import difflib
import functools
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from lib.errors import InputError
from lib.seams import Seam, broken_call

# Fields by the names that they once had.
RENAMED = {"weights": "reparam", "rates": "lr"}


class Bound(NamedTuple):
    """One end of the numbers that a field may hold."""

    holds: Callable[[float], bool]
    words: str


def at_most(most: int) -> Bound:
    """The upper end of what a field may hold."""
    return Bound(lambda value: value <= most, f"at most {most:,}")


FROM_0 = Bound(lambda value: value >= 0, "0 or more")
FROM_1 = Bound(lambda value: value >= 1, "1 or more")
ABOVE_0 = Bound(lambda value: value > 0, "more than 0")
BELOW_1 = Bound(lambda value: value < 1, "less than 1")

Count = Annotated[int, FROM_1]
Whole = Annotated[int, FROM_0]
Positive = Annotated[float, ABOVE_0]
NotNegative = Annotated[float, FROM_0]
Share = Annotated[float, FROM_0, at_most(1)]
Decay = Annotated[float, FROM_0, BELOW_1]  # what a moving average keeps of its past
ExitCode = Annotated[int, FROM_0, at_most(255)]
PositiveShare = Annotated[float, ABOVE_0, at_most(1)]
Layers = Annotated[int, FROM_1, at_most(10_000)]
Size = Annotated[int, FROM_1, at_most(2**24)]  # of an axis
Seed = Annotated[int, FROM_0, at_most(2**32 - 1)]  # JAX's keys take no more without float64

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which UTF-8 cannot encode

# A rule about several fields: whether it is broken, and the sentence that says so.
Rules = Iterator[tuple[Any, str]]


# -------------------------------------------------------------------------------------- sentences

def allowed_names(found: str, known: Iterable[str]) -> str:
    """What is allowed in the place of an unknown name: its new name, the nearest one, or all."""
    names = [str(name) for name in known]
    if RENAMED.get(found) in names:
        return f"it is now {RENAMED[found]!r}"
    near = difflib.get_close_matches(found, names, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"allowed are: {', '.join(names) or 'none'}"


def strict(made: type) -> type:
    """Let a dataclass refuse unknown and missing fields by an InputError that names them."""
    plain = made.__init__
    _, *parameters = inspect.signature(plain).parameters.values()
    names = [p.name for p in parameters]
    needed = [p.name for p in parameters if p.default is p.empty]

    @functools.wraps(plain)
    def checked(self, *values, **given):
        for name in given:
            if name not in names:
                raise InputError(f"{made.__name__} has no field {name!r}; "
                                 f"{allowed_names(name, names)}")
        for name in needed[len(values):]:
            if name not in given:
                raise InputError(f"{made.__name__} lacks its field {name!r}; "
                                 f"it needs: {', '.join(needed)}")
        plain(self, *values, **given)

    made.__init__ = checked
    return made


def describe(hint) -> str:
    """A type in words."""
    base, bounds = unwrap(hint)
    if base in WORDS:
        words = WORDS[base]
    elif is_union(base):
        words = " or ".join(describe(option) for option in typing.get_args(base))
    elif typing.get_origin(base) is Literal:
        words = " or ".join(repr(option) for option in typing.get_args(base))
    elif typing.get_origin(base) is tuple:
        words = f"a tuple, each item {describe(typing.get_args(base)[0])}"
    elif typing.get_origin(base) is dict:
        words = f"a dictionary by name, each value {describe(typing.get_args(base)[1])}"
    elif kind(base) is collections.abc.Callable:
        words = "a function"
    else:
        words = getattr(base, "__name__", str(base))
    return words + "".join(f", {bound.words}" for bound in bounds)


WORDS = {int: "an integer", float: "a finite number", str: "a text", bool: "true or false (bool)",
         type(None): "None", Any: "anything"}


# ------------------------------------------------------------------------------------------ types

def unwrap(hint) -> tuple[Any, tuple]:
    """(the type, its bounds) of an annotation."""
    if typing.get_origin(hint) is Annotated:
        base, *more = typing.get_args(hint)
        return base, tuple(bound for bound in more if isinstance(bound, Bound))
    return hint, ()


def seam_of(hint) -> Seam | None:
    """The extension point that an annotation says a function is of."""
    if typing.get_origin(hint) is Annotated:
        return next((part for part in hint.__metadata__ if isinstance(part, Seam)), None)
    found = map(seam_of, typing.get_args(hint)) if is_union(hint) else ()
    return next(filter(None, found), None)


def kind(hint) -> Any:
    """What a value is an instance of: tuple of tuple[int, ...]."""
    return typing.get_origin(hint) or hint


def is_union(hint) -> bool:
    """Is this type one of several?"""
    return kind(hint) in (typing.Union, types.UnionType)


def options(hint) -> list:
    """The types, without their bounds, that an annotation allows."""
    base, _ = unwrap(hint)
    if not is_union(base):
        return [base]
    return [option for part in typing.get_args(base) for option in options(part)]


def fits(value, hint) -> bool:
    """Is a value of the kind that a type names? What it holds inside is not looked at."""
    return any(fits_one(value, option) for option in options(hint))


def fits_one(value, hint) -> bool:
    """The same for a type that is not a union."""
    of = kind(hint)
    if of is Any:
        return True
    if of is Literal:
        return value in typing.get_args(hint)
    if of is collections.abc.Callable:
        return callable(value)
    if isinstance(value, bool):
        return of is bool
    if of is float:
        return isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return isinstance(value, of)


@functools.cache
def field_types(made: type) -> dict[str, Any]:
    """{field: its annotation} of a dataclass."""
    return typing.get_type_hints(made, include_extras=True)


# ------------------------------------------------------------------------------------- functions

def plain(function: Callable) -> Callable:
    """The function of a partial, or itself."""
    return getattr(function, "func", function)


def defaults(function: Callable) -> dict[str, Any]:
    """{name: default} of the parameters of a function whose default JSON can hold."""
    return {p.name: p.default for p in signature(function).values()
            if p.kind is not p.POSITIONAL_ONLY and p.default is not p.empty and is_json(p.default)}


def settings(function: Callable) -> dict[str, Any]:
    """{name: value} of a function's settings: its defaults, or what a partial gives."""
    return defaults(function) | getattr(function, "keywords", {})


def changed_settings(function: Callable) -> dict[str, Any]:
    """The settings that are not the defaults."""
    usual = {name: json.dumps(value) for name, value in defaults(function).items()}
    return {name: value for name, value in getattr(function, "keywords", {}).items()
            if not is_json(value) or json.dumps(value) != usual.get(name)}


def missing(function: Callable, hint) -> list[str]:
    """The parameters without a default that nothing gives a value.

    The field's extension point says what the function is told. Where it is none, none are known.
    """
    seam = seam_of(hint)
    if not seam:
        return []
    told = settings(function).keys() | set(seam.asked)
    left = list(signature(function).values())[len(seam.given):]
    return [p.name for p in left if p.default is p.empty and p.name not in told
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def setting_types(function: Callable) -> dict[str, Any]:
    """{parameter: its annotation}, those that say which JSON values are allowed."""
    hints = {name: type_of(p, plain(function)) for name, p in signature(function).items()}
    return {name: hint for name, hint in hints.items() if is_plain(hint)}


def type_of(parameter: inspect.Parameter, function: Callable) -> Any:
    """The annotation of a parameter, also where it is a text; Any without one."""
    hint = parameter.annotation
    if hint is parameter.empty:
        return Any
    if not isinstance(hint, str):
        return hint
    written = types.SimpleNamespace(__annotations__={"it": hint})
    try:
        found = typing.get_type_hints(written, function.__globals__, include_extras=True)
    except (NameError, TypeError, AttributeError, SyntaxError):  # for a type checker alone
        return Any
    return found["it"]


def signature(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of a partial's; of some that are written in C none."""
    try:
        return dict(inspect.signature(plain(function)).parameters)
    except ValueError:
        return {}


def is_plain(hint) -> bool:
    """Does a type speak of JSON values alone?"""
    plain_kinds = int, float, str, bool, type(None), tuple, list, dict, Literal, Any
    return all(kind(option) in plain_kinds for option in options(hint))


def is_json(value) -> bool:
    """Can JSON hold this?"""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def tuples(value):
    """A JSON value with tuples in the place of lists."""
    if isinstance(value, list | tuple):
        return tuple(tuples(item) for item in value)
    return value


# ------------------------------------------------------------------------------------- judgement

def join(path: str, name: str) -> str:
    """The path of a part."""
    return f"{path}.{name}".strip(".")


def check_value(value, hint, path: str):
    """Raise InputError unless a value, and all that is inside it, is what its annotation allows."""
    base, bounds = unwrap(hint)
    if not fits(value, base):
        typed = "" if type(value) in options(base) else f" ({type(value).__name__})"
        said = f"{path or 'config'} is {brief(value)}{typed}"
        raise InputError(f"{said}; allowed is {describe(hint)}")
    if unwritten(value):
        raise InputError(f"{path} is {brief(value)}; allowed are integers of 64 bits, and texts of "
                         "whole characters")
    if is_union(base):
        fitting = [option for option in typing.get_args(base) if fits(value, option)]
        return check_value(value, fitting[0], path)
    if not all(bound.holds(value) for bound in bounds):
        raise InputError(f"{path} is {brief(value)}; allowed is {describe(hint)}")
    if callable(value):
        return check_function(value, hint, path)
    for name, part, part_hint in inside(value, base):
        check_value(part, part_hint, join(path, name))


def unwritten(value) -> bool:
    """Whether arrays cannot hold an integer, or files a text."""
    if isinstance(value, str):
        return bool(SURROGATE.search(value))
    return type(value) is int and not -(2**63) <= value < 2**63


def brief(value) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of thousands of digits"
    return text if len(text) <= 500 else text[:500] + " ..."


def inside(value, hint) -> list[tuple[str, Any, Any]]:
    """[(name, part, its annotation)] of a dataclass, a dictionary or a tuple."""
    arguments = [of for of in typing.get_args(hint) if of is not Ellipsis] or [Any]
    if dataclasses.is_dataclass(value):
        return [(name, getattr(value, name), of) for name, of in field_types(type(value)).items()]
    if isinstance(value, dict):
        return [(str(name), part, arguments[-1]) for name, part in value.items()]
    if isinstance(value, tuple | list):
        arguments += arguments[-1:] * len(value)
        return [(str(i), part, arguments[i]) for i, part in enumerate(value)]
    return []


def check_function(function: Callable, hint, path: str):
    """Raise InputError unless a function can be written down and allows its settings."""
    inner, given = plain(function), getattr(function, "keywords", {})
    name = getattr(inner, "__qualname__", str(inner))
    if not inspect.isfunction(inner) or "<" in name or getattr(function, "args", ()):
        raise InputError(f"{path} is {name!r}; allowed is a top-level function of a file, or a "
                         "functools.partial of one with keyword arguments")
    parameters = inspect.signature(inner).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    hints = setting_types(function)
    for setting, value in given.items():
        where = join(path, setting)
        if setting not in parameters and not open_ended:
            raise InputError(f"{path} is {name}, which has no setting {setting!r}; "
                             f"{allowed_names(setting, parameters)}")
        if not is_json(value):
            raise InputError(f"{where} is {value!r}; allowed is what JSON can hold")
        if not fits(value, hints.get(setting, Any)):
            value = tuples(value)
        check_value(value, hints.get(setting, Any), where)
    check_told(function, hint, f"{path} is {name}, which", path)


def check_told(function: Callable, hint, subject: str, path: str):
    """Raise InputError unless a function can be called as its extension point is."""
    lacking = missing(function, hint)
    if lacking:
        raise InputError(f"{subject} is not told its {', '.join(lacking)}; "
                         f"allowed is a value for it: --{join(path, lacking[0])} VALUE")
    seam = seam_of(hint)
    broken = broken_call(function, seam) if seam else ""
    if broken:
        raise InputError(f"{subject} cannot be called as it is: {broken}")


def check_rules(value, path: str = ""):
    """Raise InputError for a broken rule of a dataclass inside a config, by its method `rules`."""
    if hasattr(value, "rules"):
        require(value.rules(path))
    for name, part, _ in inside(value, Any):
        check_rules(part, join(path, name))


def require(rules: Rules):
    """Raise InputError for the first rule that is broken."""
    for broken, sentence in rules:
        if broken:
            raise InputError(sentence)
