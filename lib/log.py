"""What a run reports: metrics.jsonl, and a line on the terminal."""
import collections
import json
import math
import os
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np

from lib.disk import write
from lib.hardware import peak
from lib.processes import is_main_process
from lib.schedule import Plan


class Reporter:
    """metrics.jsonl, and a live line on a terminal or plain ones every five seconds elsewhere."""

    def __init__(self, path: Path, start: int, course: Plan, done: bool = False):
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = [(line, json.loads(line)) for line in lines if line.endswith(b"\n")]
        # What the checkpoint has not seen will come again; so will the test figures, which end a run.
        kept = [line for line, row in rows if row["step"] <= start and (done or ".test/" not in "".join(row))]
        if is_main_process():
            write(path, b"".join(kept))
        self.file, self.course, self.start = open(path if is_main_process() else os.devnull, "a"), course, start
        self.live, self.begun, self.last, self.track = sys.stdout.isatty(), time.perf_counter(), None, None
        self.shown = self.waited = self.stall = 0.0
        self.peak, self.recent = peak(), collections.deque(maxlen=100)

    def row(self, row: dict):
        """One JSON object on a line of its own; what is not finite becomes null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.file.write(json.dumps(finite) + "\n")
        if self.track:
            self.track(finite)

    def sync(self):
        """Every row so far onto the disk, and what comes now out of the next step's time."""
        self.file.flush()
        if is_main_process():
            os.fsync(self.file.fileno())
        self.last, self.waited = None, 0.0

    def step(self, row: dict):
        """Write a step's row and show where the run is; `waited`: seconds spent on batches since the last."""
        c, step, now = self.course, row["step"], time.perf_counter()
        if self.last:
            seconds = now - self.last
            tokens, flops = c.tokens[step] - c.tokens[step - 1], c.flops[step] - c.flops[step - 1]
            row |= {"perf/step_ms": 1e3 * seconds, "perf/tokens_per_s": tokens / seconds,
                    "perf/host_stall": self.waited / seconds}
            row |= {"perf/mfu": flops / seconds / self.peak} if self.peak else {}
        loss, spread = row["train/loss"], np.std(self.recent) if len(self.recent) > 50 else math.inf
        if (above := loss - np.mean(self.recent or [loss])) > 6 * spread:
            self.say(f"step {step}: loss {loss:.3f}, {above / spread:.0f} deviations above the last; python "
                     f"train.py corpus inspect {Path(self.file.name).with_name('config.json')} --step {step}")
        self.recent += [loss] if math.isfinite(loss) else []
        row |= {"perf/save_s": round(self.stall, 4)} if self.stall else {}  # that a checkpoint held the loop
        self.last, self.waited, self.stall = now, 0.0, 0.0
        self.row(row)
        if not self.live and now - self.shown < 5 and step != c.ends[-1]:
            return
        self.shown, text = now, status_line(self, row, now)
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{text[:width]}" if self.live else text, end="" if self.live else "\n", flush=True)

    def say(self, text: str):
        """A line of its own, in place of the live one."""
        print(("\r\x1b[2K" if self.live else "") + text, flush=True)


def status_line(out: Reporter, row: dict, now: float) -> str:
    """Where a run is, from a step's row, at a time in seconds."""
    step, flops = row["step"], out.course.flops
    pace = (now - out.begun) / (flops[step] - flops[out.start])
    left = timedelta(seconds=int((flops[-1] - flops[step]) * pace))
    speed = [f"{row['perf/tokens_per_s']:,.0f} tok/s"] if "perf/tokens_per_s" in row else []  # see `sync`
    speed += [f"mfu {row['perf/mfu']:.1%}"] if "perf/mfu" in row else []
    return " | ".join([f"{flops[step] / flops[-1]:6.1%}", f"step {step}/{out.course.ends[-1]}",
                       f"loss {row['train/loss']:.3f}", f"lr {row['train/lr']:.2e}",
                       f"grad {row['train/grad_norm']:.2f}", *speed, f"ETA {left}"])
