"""What the tests of studies share: a study's file, the tool, and runs that are made up."""
import json
import math
from pathlib import Path

from lib.config import ROOT, load_file, to_json
from lib.disk import write
from train import parse

study = load_file(ROOT / "tools/study.py")
papers = load_file(ROOT / "tools/papers.py")

FILE = '''"""Two arms on lines of text."""
from dataclasses import replace
from functools import partial

from data import DataConfig, Source, text
from lib.edits import stack
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config, Phase, Schedule

deep = Config(
    model=ModelConfig(layers=2, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16),
    data=DataConfig(
        sources={"a": Source(partial(text, path="PATH"))},
        tokenizer="bytes",
        dev=0.1,
        test=0.1,
    ),
    phases=(Phase(steps=400, batch=4, seq=32),),
    schedule=Schedule(peak=1e-2, warmup=2),
    overlap=8,
    eval_every=2,
    eval_tokens=500,
    prompts=(),
)
shallow_phase = replace(
    deep.phases[0],
    schedule=Schedule(shape="constant", peak=2e-2, warmup=2),
)
stacked_phase = replace(deep.phases[0], edits=(partial(stack, times=2),))
grown = replace(
    deep,
    model=replace(deep.model, layers=1),
    phases=(shallow_phase, stacked_phase),
)

study = Study(
    paper=Paper(title="On Tiny Things", authors="Small et al.", year=2024, seeds=("001:39",)),
    question="Is it better to grow?",
    arms={"deep": deep, "grown": grown, "third": deep},
    default_arms=("deep", "grown"),
    peak_lrs=(1e-2, 2e-2, 4e-2),
    quick={"phases.*.steps": 4},
    teacher_flops={"grown": 1e6},
    claims=(
        Claim(says="it helps", arm="grown", below=10.0),
        Claim(says="it learns", arm="grown", measure="train/loss", above=10.0),
        Claim(says="of another arm", arm="third", below=0.0),
    ),
)
'''

# Added to the file: a measure of its own, which also decides on the rates.
OWN = """
def least(rows):
    return -min(row["eval/a/bpb"] for row in rows if "eval/a/bpb" in row)

study = replace(study, measures={"own": least}, tuned_by="own", claims=[
    Claim(says="more of it", arm="grown", measure="own", above=0.1)])
"""


def write_file(path: Path, corpus: Path) -> Path:
    """Write the study's file."""
    write(path, FILE.replace("PATH", str(corpus)))
    return path


def change(file: Path, old: str, new: str):
    """Put another text in the place of one that a file has."""
    text = file.read_text()
    assert old in text, old
    file.write_text(text.replace(old, new))


def runs_of(file: Path) -> Path:
    """Where `call` has the runs of a study's file."""
    return file.parent / "runs"


def call(file: Path, *arguments: str) -> dict:
    """What the study comes to, by the tool's own `main`."""
    return study.main([str(file), "--runs", str(runs_of(file)), *arguments])


def read_json(path: Path) -> dict:
    """The object that a file holds."""
    return json.loads(path.read_text())


def words_of(line: list) -> list[str]:
    """The words after `python train.py` in a command."""
    return [str(word) for word in line[2:]]


class Process:
    """What is asked of a process that has made a run."""

    pid = 1

    def __init__(self, code: int):
        self.code = code

    def wait(self) -> int:
        """The exit code."""
        return self.code


class Trainer:
    """In place of the processes: it makes runs up, and notes which ones.

    A run's loss on dev ends at 1.0 for `deep`, at 0.8 for `grown`, each at the arm's best rate; it
    is worse by the squared distance from that rate, in doublings, and by 0.1 a seed.
    """

    def __init__(self):
        self.made: list[str] = []  # names of runs
        self.fail: dict[str, int] = {}  # {run: its exit code}
        self.best = {"deep": 2e-2, "grown": 8e-2, "third": 2e-2}  # that of grown is above the grid
        self.least = {"deep": 1.0, "grown": 0.8, "third": 1.0}

    def __call__(self, line, stdout, stderr, env) -> Process:
        words = words_of(line)
        config, _ = parse(words)
        self.made.append(config.name)
        if config.name in self.fail:
            stdout.write(b"Traceback\nerror: boom\n")
            return Process(self.fail[config.name])
        _, _, arm = words[0].rpartition(":")
        self.write_run(config, arm)
        return Process(0)

    def end(self, config, arm: str) -> float:
        """The last loss on dev."""
        doublings = math.log2(config.schedule.peak / self.best[arm])
        return self.least[arm] + 0.1 * config.seed + doublings**2

    def write_run(self, config, arm: str):
        """Write the files of a run: four evaluations, each lower by 1, and the test at the end."""
        end = self.end(config, arm)
        rows = []
        for i in range(1, 5):
            spent = {"train/tokens": 100 * i, "train/flops": 1e6 * i}
            rows.append(spent | {"eval/a/bpb": end + 4 - i})
        rows.append(spent | {"eval/a.test/bpb": end + 1, "train/loss": 2 * end})
        run = Path(config.runs) / config.name
        lines = [json.dumps(row) for row in rows]
        write(run / "metrics.jsonl", "\n".join(lines))
        write(run / "config.json", json.dumps(to_json(config)))
        made_by = dict.fromkeys(["versions", "commit", "host", "device", "devices"])
        write(run / "summary.json", json.dumps(made_by))


def make_up_runs(patch) -> Trainer:
    """Have the study command make its runs up, on a machine without GPUs."""
    trainer = Trainer()
    patch.setattr(study.subprocess, "Popen", trainer)
    patch.setattr(study, "gpus", list)
    return trainer
