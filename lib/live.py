"""Benchmarks that stay alive, and are measured in turn: a noisy neighbour hits all of them alike.

A process that is started with LIVE in its environment says one JSON object on a line when it is
ready to be timed. Then for each number of seconds on a line of its input it measures for so long,
and says what it found. It ends with its input. A process that knows nothing of this ends by itself,
and its last line is its only result; it is started anew for each round.
"""
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from lib.errors import InputError

LIVE = "COPPICE_LIVE"
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX is to leave room on a GPU for the other


def serve(ready: dict, measure: Callable[[float], dict]):
    """Be such a process: `ready` is said first, then what `measure` gives for so many seconds."""
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        found = measure(float(line))
        print(json.dumps(found), flush=True)


class Bench:
    """A command that measures, as a process of its own; to be used as a context."""

    def __init__(self, line: list[str]):
        self.line = line
        self.process: subprocess.Popen | None = None
        self.ready: dict = {}  # what it said first
        self.alive = False  # whether it waits for rounds
        self.errors = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill up

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        self.errors.close()

    def end(self):
        """Stop the process, if there is one."""
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def start(self):
        """Start the process, if it is to be alive and is not yet; wait until it is ready."""
        if self.process:
            return
        self.process = subprocess.Popen(
            self.line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=SHARED | os.environ | {LIVE: "1"},
        )
        self.ready = self.answer()
        self.alive = "tokens_per_s" not in self.ready

    def measure(self, seconds: float) -> dict:
        """What one round gives."""
        self.start()
        if self.alive:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
            return self.answer()
        self.end()
        return self.ready

    def answer(self) -> dict:
        """The next JSON object that the process says; other lines are left out."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()
        raise InputError(f"bench: {shlex.join(self.line)} ended with {code}: {said[-300:]}")


def in_turn(
    ours: Callable[[float], dict],
    theirs: Callable[[float], dict],
    rounds: int,
    seconds: float,
) -> list[tuple[dict, dict]]:
    """(ours, theirs) of each round; the order is turned round from one to the next."""
    found = []
    for number in range(rounds):
        pair = [ours, theirs]
        if number % 2:
            pair.reverse()
        each = [measure(seconds) for measure in pair]
        if number % 2:
            each.reverse()
        found.append(tuple(each))
        a, b = (one["tokens_per_s"] for one in each)
        print(f"round {number + 1}: {a:,} against {b:,} tokens/s, ratio {a / b:.3f}", flush=True)
    return found


def compared(rounds: list[tuple[dict, dict]]) -> dict[str, Any]:
    """The medians of rounds, and each round's ratio."""
    ratios = [round(a["tokens_per_s"] / b["tokens_per_s"], 3) for a, b in rounds]
    ours, theirs = zip(*rounds, strict=True)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "tokens_per_s": statistics.median(one["tokens_per_s"] for one in ours),
        "against_tokens_per_s": statistics.median(one["tokens_per_s"] for one in theirs),
        "ratios": ratios,
        "rounds": len(rounds),
        "peak_gib": ours[-1].get("peak_gib"),
        "against_peak_gib": theirs[-1].get("peak_gib"),
    }
