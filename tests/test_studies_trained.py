"""Studies by the real commands, their runs trained: a quick one, a record, a signal."""
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
from study_cases import FILE, read_json, study, write_file

from lib.config import ROOT
from lib.disk import read_rows, write
from lib.study import PAIRED, metrics_of
from model import ModelConfig, flops_per_token

# ---------------------------------------------------------------------------------- a small house


class House(NamedTuple):
    """A copy of the code of this house, with one chapter of two files that are one study."""

    root: Path

    def train(self, *words: str) -> str:
        """What `python train.py ...` prints in it."""
        done = subprocess.run(
            [sys.executable, "train.py", *words],
            capture_output=True,
            text=True,
            cwd=self.root,
            env=conftest.environment(),
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout


QUICK = "configs/growth/tiny.py"  # three rates, the middle one of which --quick takes
RECORDED = "configs/growth/small.py"  # this rate alone, and as few steps: its runs are those


@pytest.fixture(scope="module")
def house(tmp_path_factory, corpus) -> House:
    root = tmp_path_factory.mktemp("house")
    for name in ("train.py", "model.py", "data.py"):
        shutil.copy(ROOT / name, root / name)
    for name in ("lib", "tools"):
        shutil.copytree(ROOT / name, root / name)
    text = FILE.replace("PATH", str(corpus))
    write(root / QUICK, text)
    for old, new in (
        ("steps=400", "steps=4"),
        ("peak_lrs=(1e-2, 2e-2, 4e-2),", "seeds=2,"),
        ("peak=2e-2", "peak=4e-2"),
        ("peak=1e-2", "peak=2e-2"),
    ):
        assert old in text
        text = text.replace(old, new)
    write(root / RECORDED, text)
    write(root / "README.md", "<!-- results -->\n<!-- /results -->\n")
    return House(root)


# ----------------------------------------------------------------------------------- a quick study


class Quick(NamedTuple):
    """A quick study that has ended."""

    house: House
    directory: Path
    result: dict  # what study.json holds
    out: str  # what the command printed


@pytest.fixture(scope="module")
def quick(house) -> Quick:
    """A study of two arms with two seeds each."""
    out = house.train("study", QUICK, "--quick")
    directory = house.root / "runs/tiny-quick"
    return Quick(house, directory, read_json(directory / "study.json"), out)


def test_a_quick_study_makes_each_arm_at_the_middle_rate_with_two_seeds(quick):
    runs = {path.name for path in quick.directory.iterdir() if path.is_dir()}
    assert runs == {"deep-0.02-s1", "deep-0.02-s2", "grown-0.02-s1", "grown-0.02-s2"}


def test_a_run_writes_the_metrics_that_a_claim_may_be_by(quick):
    """And no others; figures of a GPU and of slow checkpoints may be missing."""
    config = study.load_study(str(quick.house.root / QUICK)).arms["grown"]
    written = set()
    for row in read_rows(quick.directory / "grown-0.02-s1/metrics.jsonl"):
        written |= row.keys()
    claimable = {*metrics_of(config)}
    assert written <= claimable | {"step", "phase", "final"}
    assert claimable - written <= {*PAIRED, "perf/mfu", "perf/save_s"}


def flops_of_a_token(layers: int) -> float:
    """Those of the study's model, with so many layers."""
    shape = ModelConfig(
        layers=layers,
        embed=16,
        heads=2,
        kv_heads=2,
        head_dim=8,
        mlp=16,
        vocab=258,
    )
    return flops_per_token(shape, 32)


def test_an_arm_s_budget_is_that_of_its_phases_and_of_its_teacher(quick):
    """Four steps of 128 tokens in each phase, the first with one layer, the second with two."""
    grown = quick.result["arms"]["grown"]
    assert grown["tokens"] == 8 * 128
    both = flops_of_a_token(1) + flops_of_a_token(2)
    assert grown["flops"] == 4 * 128 * both + 1e6


def test_an_arm_less_its_control_is_what_the_summaries_say(quick):
    values = quick.result["arms"]["grown"]["less_control"]["bpb"]["values"]
    assert [*values] == ["1", "2"]
    for seed, value in values.items():
        grown = read_json(quick.directory / f"grown-0.02-s{seed}/summary.json")
        deep = read_json(quick.directory / f"deep-0.02-s{seed}/summary.json")
        assert value == grown["eval/a.test/bpb"] - deep["eval/a.test/bpb"]


def test_a_quick_study_that_was_trained_gives_no_verdict(quick):
    assert quick.out.splitlines()[-1].endswith("has study.json and study.png")
    assert {claim["verdict"] for claim in quick.result["claims"]} == {"not judged"}
    assert "not judged: it helps" in quick.out
    assert "confirmed" not in quick.out


def times_written(directory: Path) -> dict[Path, int]:
    """When the metrics of each run of a study were last written."""
    return {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}


def test_a_study_that_is_run_again_shows_its_table_and_trains_nothing(quick):
    before = times_written(quick.directory)
    assert len(before) == 4
    again = quick.house.train("study", QUICK, "--quick")
    assert again.count("| deep |") == 1
    assert times_written(quick.directory) == before


# ---------------------------------------------------------------------------------------- a record


def test_a_study_is_recorded_shown_and_found_by_the_real_commands(quick):
    """Its runs are those of the quick study, which has equal configs, by links."""
    house, root = quick.house, quick.house.root
    before = times_written(quick.directory)
    *_, last = house.train("study", RECORDED, "--record", "--json").splitlines()
    record = read_json(root / "results/growth/small.json")
    assert json.loads(last) == record
    assert record["command"] == f"python train.py study {RECORDED} --record"
    (made_by,) = record["made_by"]
    for arm in ("deep", "grown"):
        ends = record["arms"][arm]["bpb"]["by_seed"]
        assert [*ends] == ["1", "2"]
        for seed, end in ends.items():
            run = root / f"runs/small/{arm}-own-s{seed}"
            assert run.resolve() == quick.directory / f"{arm}-0.02-s{seed}"
            summary = read_json(run / "summary.json")
            assert end == summary["eval/a.test/bpb"]
            assert made_by["versions"] == summary["versions"]
    assert times_written(quick.directory) == before

    (root / QUICK).unlink()
    assert "is written" in house.train("papers", "--write")
    index = (root / "configs/README.md").read_text()
    assert "| 1 confirmed, 1 reversed, 1 not run |" in index
    found = house.train("papers", "TINY", "001:39")
    assert f"001:39 {RECORDED}" in found
    assert "confirmed: it helps" in found


# ---------------------------------------------------------------------------------------- a signal


def wait_for_rows(metrics: Path):
    """Wait until a run has written rows, for a minute at most."""
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        if metrics.exists() and metrics.stat().st_size:
            return
        time.sleep(0.05)


def test_a_signal_saves_the_run_in_flight_and_ends_the_study(tmp_path, corpus):
    file = write_file(tmp_path / "tiny.py", corpus)
    directory = tmp_path / "tiny"
    line = [sys.executable, ROOT / "train.py", "study", file, "--seeds", "1", "--runs", tmp_path]
    env = conftest.environment()
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=env) as process:
        wait_for_rows(directory / "deep-0.01-s0/metrics.jsonl")
        process.terminate()
        assert process.wait() == 0
        said = process.stdout.read()
    assert said == "deep-0.01-s0 was stopped; the same command resumes the study\n"
    log = directory / "deep-0.01-s0.log"
    assert "stopped by SIGTERM" in log.read_text()
    assert [path.name for path in directory.iterdir() if path.is_dir()] == ["deep-0.01-s0"]
