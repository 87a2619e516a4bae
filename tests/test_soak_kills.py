"""Kills at drawn moments of runs of six kinds: every one ends as the run that nobody killed.

A process that has imported everything, and begun nothing, forks a child for each attempt, so that an attempt
takes seconds. Of a run in two processes both are killed at once, as when a machine is lost.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import soak
from conftest import environment

from lib.checkpoint import Checkpoints
from lib.config import ROOT

CONFIG = """
from dataclasses import replace
from functools import partial
import data
from lib.edits import reset_embeddings, stack
from train import *
source = partial(data.text, path={text!r}, separator="\\n")
tiny = ModelConfig(layers=1, embed=16, heads=2, kv_heads=1, head_dim=8, mlp=16)
held = data.DataConfig(sources={{"x": data.Source(source)}}, tokenizer="bytes", dev=0.1, test=0.1,
                       shard_tokens=2_000)
plain = Config(model=tiny, data=held, phases=(Phase(steps=24, batch=8, seq=32),), overlap=8, save_every=4,
               eval_every=8, eval_tokens=2_000, prompts=("a",), sample_tokens=4)
kinds = dict(
    plain=plain,
    streamed=replace(plain, data=replace(held, stream=True, window=2)),
    growing=replace(plain, phases=tuple(Phase(steps=8, batch=8, seq=32, edits=edits) for edits in (
        (), (stack,), (partial(stack, moments="map"),)))),
    forgetting=replace(plain, phases=(replace(plain.phases[0], repeat=(
        Edit(reset_embeddings, every=5),)),)),
    concluding=replace(plain, phases=(Phase(steps=4, batch=8, seq=32),), eval_tokens=65_536,
                       sample_tokens=64),
)
kinds["two processes"] = plain
config = kinds[{kind!r}]
"""
# Forks a child for each line "RUNS PORT" of its input, says its process, then how it ended.
NURSERY = """
import os, sys
sys.path.insert(0, {root!r})
import jax, train
from lib import config
launch = config.load_file({root!r} + "/tools/launch.py")
for line in sys.stdin:
    runs, number, port = line.split()
    child = os.fork()
    if not child:
        words = [{file!r}, "--runs", runs, "--name", "run"]
        log = os.open(runs + ".log" + number, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if port != "0":
            words = ["localhost:" + port, "--processes", "2", "--process", number, *words]
            code = launch.main(words)
            jax.distributed.shutdown()  # waits for the other process, as an exit would
        else:
            code = train.main(words)
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
KINDS = ["plain", "streamed", "growing", "forgetting", "concluding", "two processes"]


class Kind:
    """Runs of one kind."""

    def __init__(self, kind: str, root: Path, corpus: Path):
        self.kind, self.root = kind, root / kind.replace(" ", "-")
        self.root.mkdir()
        self.processes = 2 if kind == "two processes" else 1
        file = self.root / "mine.py"
        file.write_text(CONFIG.format(text=str(corpus), kind=kind))
        script = NURSERY.format(root=str(ROOT), file=str(file))
        own = environment(XDG_CACHE_HOME=str(self.root / "cache"))
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own, cwd=self.root)
        self.nurseries = [
            subprocess.Popen([sys.executable, "-c", script], **pipes) for _ in range(self.processes)
        ]
        self.whole = self.root / "whole"
        self.seconds = 0.0  # that a whole run takes
        for runs in self.whole, self.root / "again":  # the second one, whose programs are compiled
            begun = time.monotonic()
            assert self.attempt(runs, None) == [0] * self.processes, self.log(runs)
            self.seconds = time.monotonic() - begun
        self.check(self.root / "again")

    def attempt(self, runs: Path, until: float | None) -> list[int]:
        """The exit codes of an attempt at a run, which is killed after so many seconds."""
        port = 20_000 + random.randrange(20_000) if self.processes > 1 else 0
        children = []
        for number, nursery in enumerate(self.nurseries):
            nursery.stdin.write(f"{runs} {number} {port}\n")
            nursery.stdin.flush()
            children.append(int(nursery.stdout.readline()))
        if until is not None:
            time.sleep(until)
            for child in children:
                try:
                    os.kill(child, 9)
                except ProcessLookupError:  # it has ended
                    pass
        return [int(nursery.stdout.readline()) for nursery in self.nurseries]

    def log(self, runs: Path) -> str:
        """What the processes of a run have said."""
        return "\n".join(path.read_text()[-2_000:] for path in runs.parent.glob(f"{runs.name}.log*"))

    def end(self):
        """End the nurseries."""
        for nursery in self.nurseries:
            nursery.stdin.close()
            nursery.wait(30)

    def check(self, runs: Path):
        """A run that was killed is the one that was not: rows, parameters, optimiser, figures, samples."""
        assert facts(runs / "run") == facts(self.whole / "run"), runs


def facts(run: Path) -> list:
    """What identifies a run that has ended, but for what depends on the clock."""
    rows = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.append({name: row[name] for name in row if not name.startswith("perf/")})
    checkpoints = Checkpoints(run / "checkpoints")
    last = checkpoints.steps()[-1]
    files = [(run / name).read_text() for name in ("samples.txt", "eval.json")]
    return [rows, last, checkpoints.meta(last)["checksums"], files]


@pytest.mark.soak
def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path, corpus):
    number = soak.size("KILLS", 300)
    kinds = os.environ.get("SOAK_KINDS", ",".join(KINDS)).split(",")
    each = -(-number // len(kinds))
    for kind in kinds:
        begun, counts = time.monotonic(), Counter()
        dice = random.Random(f"{soak.seed()} {kind}")
        runs = Kind(kind, tmp_path, corpus)
        while counts["kills"] < each:
            place = runs.root / f"run{counts['runs']}"
            codes = [-9]
            while any(codes) and counts["kills"] < each:
                codes = runs.attempt(place, dice.uniform(0.1, 1.1) * runs.seconds)
                assert set(codes) <= {0, -9}, runs.log(place)
                counts["kills"] += codes == [-9] * runs.processes
            if any(codes):  # the last kill that is asked for: it goes on to its end
                assert runs.attempt(place, None) == [0] * runs.processes, runs.log(place)
            runs.check(place)
            counts["runs"] += 1
        runs.end()
        counts = {"kills": counts["kills"],
                  "runs, all identical to the one that nobody killed": counts["runs"]}
        said = (
            "SIGKILL at a moment drawn from a tenth to the whole of a run's time, again and again until "
            "the run is complete. Rows, checksums of parameters and optimiser, figures of the test split "
            "and samples are compared."
        )
        soak.record(f"Kills, {kind}", each, counts, said, begun)
