"""Keys: what a function of a config computes, as JSON."""
import contextlib
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.disk import digest
from lib.errors import InputError
from lib.fields import changed_settings
from lib.sources import files


def function_key(function: Callable | None) -> Any:
    """What a function of a config computes, as JSON: its source, and its file's up to the config; arguments;
    names, sizes and times of the files that these name, runs aside; the interpreter."""
    if function is None:
        return None
    inner, arguments, stamps = getattr(function, "func", function), changed_settings(function), []
    for name, value in arguments.items():
        if isinstance(value, str) and value and not Path(value, "checkpoints").expanduser().exists() and (
                name == "path" or Path(value).expanduser().exists()):
            with contextlib.suppress(InputError):
                fs, found = files(value)
                stamps += [[path, fs.ukey(path)] for _, path in found]
    file = "" if inner.__module__.startswith("lib.") or inner.__module__ == "data" else inspect.getsource(inspect.getmodule(inner) or inner)
    above = re.split(r"(?m)^(?:config|arms)\b", file)[0]
    return [inspect.getsource(inner), digest(above), arguments, stamps, sys.version]
