"""When a run saves besides its plan, or ends early: by the clock, by a signal to any process."""

import signal
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from lib.sharding import largest

# What a process asks for; all of them do the largest that any of them asks for.
NOTHING, SAVE, EXIT = range(3)


class Stop:
    """Listens for SIGTERM and SIGINT while it is open; Ctrl-C once more ends the process at once.

    Several processes hear of what one of them asks a step later, the same step everywhere: by then
    its value is there, so that no device waits. abandon: called at a signal, to end what waits for
    rows to come.
    """

    def __init__(self, mesh: Mesh, save_minutes: float, abandon: Callable[[], None]):
        self.mesh, self.save_minutes, self.abandon = mesh, save_minutes, abandon
        self.signals, self.agreed, self.asked = [], NOTHING, None
        self.saved = time.monotonic()

    def __enter__(self):
        self.before = {n: signal.signal(n, self.heard) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def heard(self, number: int, _):
        """Take note of a signal."""
        self.signals.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() == 1:
            self.abandon()

    def own(self) -> int:
        """What this process asks for."""
        if self.signals:
            return EXIT
        late = time.monotonic() - self.saved > 60 * self.save_minutes
        return SAVE if late else NOTHING

    def listen(self):
        """Agree on what to do after this step."""
        if jax.process_count() == 1:
            self.agreed = self.own()
            return
        before, self.asked = self.asked, largest(self.own(), self.mesh)
        self.agreed = NOTHING if before is None else int(jax.device_get(before))

    @property
    def wants_save(self) -> bool:
        """Is there to be a checkpoint after this step?"""
        return self.agreed == SAVE

    @property
    def wants_exit(self) -> bool:
        """Is the run to save and end after this step?"""
        alone = jax.process_count() == 1 and bool(self.signals)
        return alone or self.agreed == EXIT

    def restart_clock(self):
        """A checkpoint was saved just now, in all processes; what they asked before is done."""
        self.saved, self.asked = time.monotonic(), None

    def reason(self) -> str:
        """The signal that ended the run; of another process it is SIGTERM as far as is known."""
        return [*self.signals, "SIGTERM"][0]
