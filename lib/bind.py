"""Functions of a config are told what they ask for, by the names of their parameters."""
import functools
import inspect
from collections.abc import Callable


@functools.lru_cache(maxsize=512)
def parameters(function: Callable) -> frozenset[str]:
    """The names of a function's parameters that a partial has not set."""
    names = frozenset(inspect.signature(function).parameters)
    return names - getattr(function, "keywords", {}).keys()


def bind(function: Callable, **given) -> Callable:
    """The function with those of `given` that it has parameters for.

    What a config set itself stays. `f(row, rng, tokenizer)` gets a tokenizer and `f(row, rng)` none
    by `bind(f, tokenizer=...)`.
    """
    names = parameters(function)
    asked = {}
    for name, value in given.items():
        if name in names:
            asked[name] = value
    if not asked:
        return function
    return functools.partial(function, **asked)
