"""What a command says at its end, and output that is no way to die: a run goes on without it."""
import contextlib
import os
import sys
from collections.abc import Callable

import jax

from lib.errors import InputError, first_cause, user_errors
from lib.memory import LESS, is_out
from lib.tables import printable


def answered(work: Callable[[], int]) -> int:
    """The exit code of a command; what the user can mend is one sentence on stderr, and 2."""
    try:
        with user_errors(OSError):  # a full disk, a directory that may not be written
            return work()
    except InputError as error:
        complain(" ".join(str(error).split()))
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not is_out(error):
            raise
        complain(f"out of memory ({first_cause(error)}); {LESS}")
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


complaints: list[str] = []  # what went wrong in this process, for others of the same run
partings: list[Callable[[str], None]] = []  # told why, where this process ends at once


def complain(sentence: str):
    """Say on stderr what went wrong, if that can be written."""
    complaints.append(sentence)
    with forgiving():
        sys.stderr.write(f"error: {printable(sentence)}\n")  # at once: threads may write too
        sys.stderr.flush()


def end_at_once(sentence: str, code: int):
    """End the process, whatever it is at; `partings` hear why."""
    for tell in partings:
        tell(sentence)
    os._exit(code)


class Forgiving:
    """A text stream whose failures are said once on another stream, and end nothing.

    stream: None where there is none. name: what is said of it.
    """

    def __init__(self, stream, name: str, other):
        self.stream, self.name, self.other = stream, name, other

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write as much as can be shown; what the encoding lacks is written as an escape."""
        if self.stream is None:
            return len(text)
        try:
            encoding = getattr(self.stream, "encoding", None) or "utf-8"
            shown = text.encode(encoding, "backslashreplace").decode(encoding)
            self.stream.write(shown)
        except (OSError, ValueError) as error:  # a full disk, a pipe that nobody reads, closed
            self.fail(error)
        return len(text)

    def flush(self):
        """Bring what was written where it belongs."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except (OSError, ValueError) as error:
            self.fail(error)

    def isatty(self) -> bool:
        """Whether this is a terminal."""
        with contextlib.suppress(ValueError):  # it was closed
            return self.stream is not None and self.stream.isatty()
        return False

    def fail(self, error: Exception):
        """Say what happened, and write no more."""
        lost, self.stream = self.stream, None
        with contextlib.suppress(OSError, ValueError):  # what it still holds must not fail at exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, lost.fileno())
            os.close(nowhere)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            said = f"{self.name} cannot be written ({error}); the run goes on without it"
            print(said, file=self.other, flush=True)


@contextlib.contextmanager
def forgiving():
    """Let output fail inside without ending what goes on there."""
    before = sys.stdout, sys.stderr
    sys.stdout = Forgiving(before[0], "standard output", before[1])
    sys.stderr = Forgiving(before[1], "standard error", before[0])
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
