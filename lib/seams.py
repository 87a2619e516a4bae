"""The extension points: what functions of a config are called with, may ask for, and give.

A field that holds a function says which point it is, `Annotated[Callable, ORDER]`. When a config is
checked, the function is bound to that call (lib/fields.py). What it gives is looked at where it is
used, by `require_gave`: on the host as it comes, within a step while this is traced.
"""
import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lib.bind import parameters
from lib.errors import InputError

SHOWN = 80  # characters of a value that is not allowed


class Seam(NamedTuple):
    """An extension point."""

    field: str  # that holds the function
    given: tuple[str, ...]  # what it is called with, in turn
    asked: tuple[str, ...]  # what it is told by name if it has such parameters
    gives: str  # in words


def seam(field: str, given: str, asked: str, gives: str) -> Seam:
    """An extension point; names stand in one text each."""
    return Seam(field, tuple(given.split()), tuple(asked.split()), gives)


DOCUMENTS = seam("documents", "", "", "an iterable of data.Document and data.Skipped")
PREPARE = seam("prepare", "document rng", "", "a data.Document, or a list of them")
SCORE = seam("score", "document tokens", "", "a number or a vector, without NaN")
TOKENIZER = seam("data.tokenizer", "", "texts vocab", "a tokenizer, see lib/tokenizers.py")
PACKING = seam("packing", "lengths seq", "documents tokenizer", "a plan, see lib/packing.py")
ORDER = seam("order", "draw rows progress key", "log", "a whole number from 0 to rows - 1")
LENGTHS = seam("lengths", "progress", "", "{row length: weight}, the same lengths at any progress")
MIXTURE = seam("mixture", "progress log", "", "{source: share}, of shares from 0, not all 0")
OBJECTIVE = seam("objective", "row rng", "tokenizer progress log document",
                 "(arrays [seq ...] by name, a mask's kind and window)")
EDIT = seam("edit", "model context", "", "model.Edited(model, policy, preserves)")
TOKEN_LOSS = seam("token_loss", "logits batch extras", "", "losses [b c], floating point")
REDUCE = seam("reduce", "losses batch", "extras",
              "((numerator, denominator), {metric: value}), all of them numbers")
REPARAM = seam("reparam", "params step batch", "config", "{name: array}, the parameters to use")
GRADIENT = seam("gradient", "gradient params batch step", "",
                "what gradient(params, batch) gives, in the same shapes")
OPTIMIZER = seam("optimizer", "table", "", "{optimiser group: optax transformation}")
EVALS = seam("evals", "params apply", "tokenizer config generate held_out", "{metric: number}")
SHAPE = seam("schedule.shape", "share", "", "a share of the peak, 0 or more")
ROWS = seam("rows", "config rows", "", "{name: model.Param}")
INIT = seam("init of a model.Param", "key shape dtype", "", "an array of the shape it is told")
FORWARD = seam("forward", "params batch mask config", "",
               "states [b t ...], or (states, {name: array [b t ...]})")
OUTPUTS = seam("outputs", "params states batch config", "", "an array, such as logits [b t v]")
FLOPS = seam("flops", "config seq", "", "FLOPs a token, a finite number above 0")
MEASURE = seam("measures", "rows", "", "a number")
CONCLUSION = seam("conclusions", "figures", "", "a number, or {name: number}")
CURVES = seam("curves", "figures", "", "{name: (x [n], y [n] or y [n seeds])}, of numbers")


# ----------------------------------------------------------------------------------------- the call

def broken_call(function: Callable, of: Seam) -> str:
    """Why a function cannot be called as its extension point is; "" where it can."""
    told = {name: None for name in of.asked if name in parameters(function)}
    try:
        inspect.signature(function).bind(*of.given, **told)
    except TypeError as error:
        given = f"with ({', '.join(of.given)})" if of.given else "without arguments"
        asks = f", and may ask for {', '.join(of.asked)}" if of.asked else ""
        return f"{error}; it is called {given}{asks}"
    return ""


# ---------------------------------------------------------------------------------- what was given

def require_gave(fine: Any, of: Seam, function: Callable, value: Any, more: str = ""):
    """Raise InputError unless what a function gave is `fine`; more: what is allowed besides."""
    if not fine:
        raise InputError(f"{of.field}: {named(function)} gives {shown(value)}; allowed is "
                         f"{of.gives}{more}")


def named(function: Callable) -> str:
    """A function by name and file."""
    inner = getattr(function, "func", function)
    name = getattr(inner, "__qualname__", repr(inner))
    try:
        file = os.path.relpath(inspect.getsourcefile(inner))
    except TypeError:  # it is of no file
        return name
    return f"{name} of {file}"


def shown(value: Any) -> str:
    """A value in a few words: an array by shape and dtype, else its text, cut, and its type."""
    if isinstance(value, dict) and any(map(is_array, value.values())):
        return "{" + ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) + "}"
    if is_array(value):
        return f"an array of shape {tuple(value.shape)}, {value.dtype}"
    if value is None:
        return "None"
    text = repr(value)
    if len(text) > SHOWN:
        text = text[:SHOWN] + " ..."
    return f"{text} ({type(value).__name__})"


def is_array(value: Any) -> bool:
    """Whether a value has a shape and a dtype: of numpy or of JAX, concrete or traced."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def is_number(value: Any) -> bool:
    """Whether a value is a number, finite or not: Python's, numpy's, or an array of one."""
    if isinstance(value, bool | int | float | np.number):
        return True
    return is_array(value) and value.shape == () and np.dtype(value.dtype).kind in "iufb"
