"""When a run saves besides its plan, or ends early: by the clock, by a signal to any process."""

import os
import signal
import threading
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from lib.output import end_at_once
from lib.sharding import largest

# What a process asks for; all of them do the largest that any of them asks for.
NOTHING, SAVE, EXIT = range(3)
PATIENCE = 0.5  # seconds after a signal in which the same one is taken for an echo of it


class Stop:
    """Listens for SIGTERM and SIGINT while it is open; a second one ends the process at once.

    Before `begin` nothing needs to be saved, and the first one ends it too. Several processes hear
    of what one of them asks a step later, the same step everywhere: by then its value is there, so
    that no device waits. code: the exit code of a process that is ended before `begin`.
    """

    def __init__(self, save_minutes: float, code: int = 0):
        self.save_minutes, self.code = save_minutes, code
        self.mesh, self.abandon, self.alone = None, None, True  # see `begin`
        self.signals, self.heard_at = [], 0.0  # their names, and when the last one came
        self.agreed, self.asked = NOTHING, None
        self.saved = time.monotonic()

    def __enter__(self):
        # The thread speaks at once, while the main one may wait for a device or a compilation.
        self.listening, self.speaking = os.pipe()
        os.set_blocking(self.speaking, False)
        self.woken = signal.set_wakeup_fd(self.speaking, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self.answer, daemon=True)
        self.thread.start()
        self.before = {n: signal.signal(n, self.heard) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        if self.signals:  # an echo that is still on its way must not end what comes after
            time.sleep(max(0.0, self.heard_at + PATIENCE - time.monotonic()))
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.woken)
        os.close(self.speaking)
        self.thread.join()
        os.close(self.listening)

    def begin(self, mesh: Mesh, abandon: Callable[[], None]):
        """From here on the run ends between steps, with all saved.

        abandon: called at a signal, to end what waits for rows to come.
        """
        self.alone = jax.process_count() == 1  # not asked in `heard`: JAX may hold its lock there
        self.mesh, self.abandon = mesh, abandon

    def answer(self):
        """Say what a signal does, and end the process where it is not to wait."""
        first = None  # when the first one came
        while heard := os.read(self.listening, 1):
            name, now = signal.Signals(heard[0]).name, time.monotonic()
            if self.abandon is None:
                said = f"stopped by {name} before the first step"
                print(f"{said}; the same command begins again", flush=True)
                end_at_once(said, self.code)
            if first is None:
                first = now
                print(f"{name}: what is at work is finished and saved first; once more ends it at "
                      "once", flush=True)
            elif now - first > PATIENCE or name == "SIGINT":
                print(f"error: interrupted by {name}; the same command resumes from the last "
                      "checkpoint", flush=True)
                end_at_once(f"interrupted by {name}", 128 + heard[0])

    def heard(self, number: int, _):
        """Take note of a signal."""
        self.signals.append(signal.Signals(number).name)
        self.heard_at = time.monotonic()
        if self.abandon and self.alone:
            self.abandon()

    def own(self) -> int:
        """What this process asks for."""
        if self.signals:
            return EXIT
        late = time.monotonic() - self.saved > 60 * self.save_minutes
        return SAVE if late else NOTHING

    def listen(self):
        """Agree on what to do after this step."""
        if self.alone:
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
        return (self.alone and bool(self.signals)) or self.agreed == EXIT

    def restart_clock(self):
        """A checkpoint was saved just now, in all processes; what they asked before is done."""
        self.saved, self.asked = time.monotonic(), None

    def reason(self) -> str:
        """The signal that ended the run; of another process it is SIGTERM as far as is known."""
        return [*self.signals, "SIGTERM"][0]
