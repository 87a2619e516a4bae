"""What Python costs in each step of a run: CPU time of its threads, and functions that they call.

    python tests/check_host.py [--rows N] [--seq N] [--steps N]

A tiny model is trained, so that next to nothing else is done. The loop has a thread, and so has
whoever makes batches and whoever writes rows; a step can take no less than the sum of the three,
since one of them runs Python at a time. CPU time of a thread leaves out what it waits for; other
work on the machine still makes it slower, which the fastest tenth of the steps shows least. Calls
are the same each time.
"""
import argparse
import contextlib
import itertools
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import train
from data import DataConfig, Source, text
from lib.log import Log
from lib.tables import columns
from model import ModelConfig

THREADS = "the loop", "batches", "rows"
WARM = 20  # steps that are not counted: they compile


class Clock:
    """CPU time, or calls, of each thread at each of its steps."""

    def __init__(self, calls: bool):
        self.calls = calls
        self.at = defaultdict(list)  # {thread: what it has used, step by step}
        self.used = Counter()  # calls of each thread

    def now(self) -> float:
        """What this thread has used so far: milliseconds, or calls."""
        if self.calls:
            return self.used[threading.get_ident()]
        return 1e3 * time.thread_time()

    def seen(self, frame, event: str, _):
        """Count the call of a function; see `sys.setprofile`."""
        if event in ("call", "c_call"):
            self.used[threading.get_ident()] += 1

    def counted(self, name: str, function):
        """The function, with a note of what its thread has used so far at each call."""
        def noted(*arguments, **more):
            self.at[name].append(self.now())
            return function(*arguments, **more)
        return noted

    @contextlib.contextmanager
    def watching(self):
        """Note each step of what runs within."""
        kept = train.train_step, train.given, Log.write
        each = zip(THREADS, kept, strict=True)
        train.train_step, train.given, Log.write = [self.counted(*one) for one in each]
        if self.calls:
            threading.setprofile(self.seen)
            sys.setprofile(self.seen)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
            train.train_step, train.given, Log.write = kept

    def a_step(self) -> dict[str, tuple[float, float]]:
        """(the median of what a step takes, that of the fastest tenth), of each thread."""
        found = {}
        for name in THREADS:
            at = self.at[name][WARM:]
            each = [after - before for before, after in itertools.pairwise(at)]
            found[name] = statistics.median(each), statistics.quantiles(each, n=10)[0]
        return found


def config(place: Path, rows: int, seq: int, steps: int) -> train.Config:
    """A tiny model, and steps without an evaluation or a checkpoint among them."""
    words = place / "words.txt"
    words.write_text("".join(f"{i} " * 60 + "\n" for i in range(9_999)))
    source = Source(partial(text, path=str(words), separator="\n"))
    return train.Config(
        name="tiny",
        runs=str(place / "runs"),
        model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16),
        data=DataConfig(sources={"words": source}, tokenizer="bytes", dev=0.01, test=0.01),
        phases=(train.Phase(steps=steps, batch=rows, seq=seq),),
        eval_every=10 * steps,
        eval_tokens=500,
        save_every=10 * steps,
        prompts=(),
    )


def measured(calls: bool, rows: int, seq: int, steps: int) -> dict[str, tuple[float, float]]:
    """What each thread takes of a step, milliseconds or calls; see `Clock.a_step`."""
    clock = Clock(calls)
    with tempfile.TemporaryDirectory() as place, clock.watching():
        train.train(config(Path(place), rows, seq, steps))
    return clock.a_step()


def sum_of(found: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """All threads together."""
    usual, fast = zip(*found.values(), strict=True)
    return sum(usual), sum(fast)


def main(words: list[str]):
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    options = vars(parser.parse_args(words))
    took, called = measured(False, **options), measured(True, **options)
    took["all"] = sum_of(took)
    called["all"] = sum_of(called)
    lines = [["thread", "ms a step", "ms of the fastest tenth", "calls a step"]]
    for name, (usual, fast) in took.items():
        lines.append([name, f"{usual:.2f}", f"{fast:.2f}", f"{called[name][0]:.0f}"])
    print(columns(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
