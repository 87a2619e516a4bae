"""What a run reports of its steps: rows of metrics.jsonl, and a line on the terminal."""

import collections
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import numpy as np

from lib.curves import follow
from lib.disk import finite, metric_row, write
from lib.errors import InputError
from lib.hardware import peak
from lib.packed import figures
from lib.processes import is_main_process
from lib.schedule import Plan
from lib.tables import in_words, printable
from model import count

RECENT = 100  # losses that a new one is compared with
SPIKE = 6  # standard deviations above their mean at which it is reported
LEAST = 0.01  # nats that a standard deviation counts at least: near zero loss any is small
PAUSE = 5.0  # seconds between lines where the output is no terminal


def say(text: str):
    """Print a line of its own, in place of the one that shows where the run is."""
    text = printable(text)
    if sys.stdout.isatty():
        text = f"\r\x1b[2K{text}"
    print(text, flush=True)


def rows_kept(path: Path, step: int, complete: bool) -> bytes:
    """The lines of a metrics.jsonl that a run which goes on from `step` keeps.

    Steps that its checkpoint has not seen come again. So does the row that ends a run.
    """
    if step == 0 or not path.exists():
        return b""
    kept, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        row = metric_row(line)
        if not line.endswith(b"\n"):  # torn
            continue
        if row is None or not isinstance(row.get("step"), int):
            damaged.append(str(number))
        elif row["step"] <= step and (complete or "final" not in row):
            kept.append(line)
    if damaged:
        say(f"{path} is damaged in line {', '.join(damaged)}; what stood there is left out")
    return b"".join(kept)


class Log:
    """Writes a row for each step, one step late, so that no device waits for the host.

    A thread makes JSON of rows and tells the tracker, so that the loop waits for neither.
    complete: the run has ended before; its rows stay as they are.
    """

    def __init__(self, path: Path, step: int, plan: Plan, max_skipped: int, complete: bool = False,
                 sizes: dict[int, dict[str, int]] | None = None):
        self.path, self.plan, self.max_skipped = path, plan, max_skipped
        self.sizes = sizes or {}  # {phase: what its rows say of the model besides}
        place = os.devnull
        if is_main_process():
            write(path, rows_kept(path, step, complete))
            place = path
        self.file = open(place, "a")
        self.parameters = [count(model) for model in plan.models]
        self.writer = ThreadPoolExecutor(1)  # writes rows while the loop goes on
        self.written: Future | None = None  # the last row given to it
        self.track: Callable[[dict], None] | None = None
        self.pending = None  # (step, metrics on the device, figures of the batch) not written yet
        self.recent = collections.deque(maxlen=RECENT)  # losses
        self.last = None  # when the last row was written; None: what came since is no step's time
        self.own = 0.0  # seconds that the row before the last kept the loop
        self.waited = 0.0  # seconds that the loop waited for batches, up to the last row
        self.waited_now = 0.0  # the same, up to now
        self.save_s = 0.0  # seconds that a checkpoint held up the loop since the last row
        self.begun = None  # (time, FLOPs) of the first row; the first step is mostly compilation
        self.shown, self.speed, self.peak = 0.0, {}, peak()
        self.live = sys.stdout.isatty()  # asked once: asking lets go of the GIL

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.sync()
        finally:
            self.writer.shutdown()
            self.file.close()

    def tell(self, track: Callable[[dict], None] | None):
        """Give each row to come to a tracker too."""
        self.track = track

    def saved(self, seconds: float):
        """Take for how long a checkpoint held up the loop; the next step's row says it."""
        self.save_s = seconds

    def step(self, step: int, metrics: dict, of_batch: dict, waited: float):
        """Take a step's metrics, still on the device, and write the row of the step before.

        waited: seconds that the loop has waited for batches so far. Raises InputError after
        `max_skipped` updates in a row that were not finite.
        """
        self.waited_now = waited
        self.flush()
        self.pending = step, metrics, of_batch

    def flush(self):
        """Write the row that is pending."""
        if self.pending is None:
            return
        step, metrics, of_batch = self.pending
        self.pending = None
        metrics = figures(metrics)
        now = time.perf_counter()
        phase = self.plan.phase_of(step)
        skipped = int(metrics.pop("skipped"))
        row = {
            "step": step,
            **metrics,
            "train/lr": self.plan.shown_lr(step),
            **self.plan.spent(step),
            **of_batch,
            "model/params": self.parameters[phase],
            **self.sizes.get(phase, {}),
            "train/skipped": skipped,
        }
        self.report_spike(step, row["train/loss"])
        self.row(row | self.timing(step, now))
        self.show(row, now)
        self.own = time.perf_counter() - now
        if skipped >= self.max_skipped:
            raise InputError(
                f"loss or gradient not finite at step {step} and {skipped - 1} before it; use a "
                "lower schedule.peak or clip under another --name, or look at that data"
            )

    def timing(self, step: int, now: float) -> dict[str, float]:
        """What a step took, where nothing else came between it and the one before."""
        found = {}
        if self.last is not None:
            seconds, plan = now - self.last, self.plan
            found = {
                "perf/step_ms": 1e3 * seconds,
                "perf/tokens_per_s": (plan.tokens[step] - plan.tokens[step - 1]) / seconds,
                "perf/host_stall": (self.waited_now - self.waited + self.own) / seconds,
            }
            if self.peak:
                found["perf/mfu"] = (plan.flops[step] - plan.flops[step - 1]) / seconds / self.peak
        if self.save_s:
            found["perf/save_s"] = round(self.save_s, 4)
        self.last, self.waited, self.save_s = now, self.waited_now, 0.0
        self.speed = found
        return found

    def report_spike(self, step: int, loss: float):
        """Say so where a loss is far above the last ones."""
        if len(self.recent) > 50 and loss > fmean(self.recent) + SPIKE * LEAST:
            spread = max(LEAST, np.std(self.recent))
            above = (loss - np.mean(self.recent)) / spread
            if above > SPIKE:
                config = self.path.with_name("config.json")
                say(
                    f"step {step}: loss {loss:.3f}, {above:.0f} deviations above the last; "
                    f"python train.py corpus inspect {config} --step {step}"
                )
        if math.isfinite(loss):
            self.recent.append(loss)

    def row(self, row: dict):
        """Have a row written, after those before it; an error of the one before is raised here."""
        if self.written:
            self.written.result()
        self.written = self.writer.submit(self.write, row)

    def write(self, row: dict):
        """Write one JSON object on a line of its own; what is not finite becomes null."""
        row = finite(row)
        self.file.write(json.dumps(row) + "\n")
        if self.track:
            self.track(row)

    def evaluation(self, step: int, found: dict[str, float]):
        """Write a row of held-out figures, print them, and draw them now and then."""
        if not found:
            return
        self.row({"step": step, **found, **self.plan.spent(step)})
        say(f"step {step}: {in_words(found)}")
        if is_main_process():
            follow(self.path.parent, self.sync)

    def sync(self):
        """Bring every row so far onto the disk; what comes now is not of the next step's time."""
        self.flush()
        if self.written:
            self.written.result()
        self.file.flush()
        if is_main_process():
            os.fsync(self.file.fileno())
        self.last = None

    def show(self, row: dict, now: float):
        """Show where the run is: on a terminal each step, elsewhere every few seconds."""
        if not self.live and now - self.shown < PAUSE and row["step"] != self.plan.total:
            return
        self.shown, text = now, self.status_line(row, now)
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[2K{text[:width]}", end="", flush=True)
        else:
            print(text, flush=True)

    def status_line(self, row: dict, now: float) -> str:
        """Where a run is, from a step's row, at a time in seconds."""
        step, flops = row["step"], self.plan.flops
        parts = [
            f"{flops[step] / flops[-1]:6.1%}",
            f"step {step}/{self.plan.total}",
            f"loss {row['train/loss']:.3f}",
            f"lr {row['train/lr']:.2e}",
            f"grad {row['train/grad_norm']:.2f}",
        ]
        if "perf/tokens_per_s" in self.speed:
            parts.append(f"{self.speed['perf/tokens_per_s']:,.0f} tok/s")
        if "perf/mfu" in self.speed:
            parts.append(f"mfu {self.speed['perf/mfu']:.1%}")
        if self.begun is None:
            self.begun = now, flops[step]
        elif flops[step] > self.begun[1]:
            pace = (now - self.begun[0]) / (flops[step] - self.begun[1])
            parts.append(f"ETA {timedelta(seconds=int((flops[-1] - flops[step]) * pace))}")
        return " | ".join(parts)
