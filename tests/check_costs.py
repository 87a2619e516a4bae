"""What the checks of a cache and of a checkpoint cost: a run's start and a model's loading.

    python tests/check_costs.py [CHECKOUT ...]

For each checkout, this one by default, three times in turn, in processes of their own: seconds until
a run of a tiny model has taken its first step over a token cache of a gigabyte that is there, the
same over one of a megabyte, and seconds in which a model of 100 million parameters is read from its
checkpoint, which has two moments besides. On a quiet machine; the first round makes caches and runs,
which takes minutes and 7 GB, and is not counted. WORK, if it is set, is where they stay.
"""

import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from first_loss import ROOT, seconds_to_loss

from lib.tables import columns

ROUNDS = 3
CONFIG = """
from functools import partial
import data
from train import *

def config(files: str, large: bool = False) -> Config:
    tiny = ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16)
    big = ModelConfig(layers=8, embed=1024, heads=8, kv_heads=8, head_dim=128, mlp=2736)
    text = data.DataConfig(sources={"x": data.Source(partial(data.text, path=files))},
                           tokenizer="bytes", dev=0.01, test=0.01)
    return Config(model=big if large else tiny, data=text, phases=(Phase(steps=2, batch=1, seq=32),),
                  overlap=8, eval_tokens=500, prompts=())
"""
LOAD = """
import sys, time
sys.path.insert(0, ".")
import jax, train
begun = time.monotonic()
jax.block_until_ready(train.load(sys.argv[1])[0])
print("seconds", time.monotonic() - begun)
"""


def write_files(place: Path, size: int):
    """500 files of so many bytes of words."""
    place.mkdir(parents=True)
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(999)]
    for each in range(500):
        text = " ".join(dice.choices(words, k=size // 6))
        (place / f"{each:03}.txt").write_text(text)


class Costs:
    """A checkout and what is measured of it."""

    def __init__(self, checkout: Path, work: Path, number: int):
        self.checkout, self.work = checkout, work / str(number)
        self.environment = os.environ | {"XDG_CACHE_HOME": str(self.work / "cache"), "PYTHONPATH": ""}
        self.times = 0
        self.work.mkdir(parents=True, exist_ok=True)
        self.file = self.work / "mine.py"
        self.file.write_text(CONFIG)

    def words(self, name: str, *more: str) -> list[str]:
        """A command that trains."""
        runs = ["--runs", str(self.work / "runs"), "--name", name]
        return [sys.executable, "train.py", str(self.file), *runs, *more]

    def start(self, files: Path) -> float:
        """Seconds to the first loss of a new run."""
        self.times += 1
        name = f"{files.name}-{os.getpid()}-{self.times}"
        return seconds_to_loss(self.words(name, "--files", f"{files}/*.txt"), self.checkout,
                               self.environment)

    def load(self, files: Path) -> float:
        """Seconds in which the large model is read."""
        run = self.work / "runs/large"
        if not (run / "summary.json").exists():
            line = self.words("large", "--files", f"{files}/*.txt", "--large", "true")
            subprocess.run(line, cwd=self.checkout, env=self.environment, check=True)
        line = [sys.executable, "-c", LOAD, str(run)]
        done = subprocess.run(line, cwd=self.checkout, env=self.environment, check=True, text=True,
                              stdout=subprocess.PIPE)
        return float(done.stdout.rpartition("seconds ")[2])


def main(checkouts: list[str]):
    """Print the median and all rounds of each checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(os.environ.get("WORK", scratch))
        for name, size in (("gigabyte", 1_000_000), ("megabyte", 1_000)):  # two bytes a token
            if not (work / name).exists():
                write_files(work / name, size)
        each = [Costs(Path(one).resolve(), work, number)
                for number, one in enumerate(checkouts or [ROOT])]
        seconds = {}
        for turn in range(ROUNDS + 1):
            for costs in each:
                found = {
                    "start, a cache of 1 GB": costs.start(work / "gigabyte"),
                    "start, a cache of 1 MB": costs.start(work / "megabyte"),
                    "load 100M parameters": costs.load(work / "megabyte"),
                }
                for name, took in found.items():
                    if turn:
                        seconds.setdefault((name, costs.checkout), []).append(took)
    rows = [["what", "checkout", "median, s", "all rounds"]]
    for (name, checkout), took in sorted(seconds.items()):
        every = " ".join(f"{one:.2f}" for one in took)
        rows.append([name, str(checkout), f"{statistics.median(took):.2f}", every])
    print(columns(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
