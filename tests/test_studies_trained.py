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
from study_cases import FILE, read_json, runs_of, study, write_file

from lib.config import ROOT
from lib.disk import read_rows, write
from lib.study import PAIRED, metrics_of
from model import ModelConfig, flops_per_token


def run_command(line: list, place: Path = ROOT, code: int = 0) -> subprocess.CompletedProcess:
    """Run a command, which is to end with this exit code."""
    done = subprocess.run(
        line,
        capture_output=True,
        text=True,
        cwd=place,
        env=conftest.environment(),
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done


# ----------------------------------------------------------------------------------- a quick study


class Quick(NamedTuple):
    """A quick study that has ended."""

    file: Path
    directory: Path
    result: dict  # what study.json holds
    out: str  # what the command printed


def run_quick(file: Path) -> str:
    """What the quick study of a file prints."""
    line = [sys.executable, ROOT / "train.py", "study", file, "--quick", "--runs", runs_of(file)]
    return run_command(line).stdout


@pytest.fixture(scope="module")
def quick(tmp_path_factory, corpus) -> Quick:
    """A study of two arms with two seeds each."""
    file = write_file(tmp_path_factory.mktemp("quick") / "tiny.py", corpus)
    out = run_quick(file)
    directory = runs_of(file) / "tiny-quick"
    return Quick(file, directory, read_json(directory / "study.json"), out)


def test_a_quick_study_makes_each_arm_at_the_middle_rate_with_two_seeds(quick):
    runs = {path.name for path in quick.directory.iterdir() if path.is_dir()}
    assert runs == {"deep-0.02-s1", "deep-0.02-s2", "grown-0.02-s1", "grown-0.02-s2"}


def test_a_run_writes_the_metrics_that_a_claim_may_be_by(quick):
    """And no others; figures of a GPU and of slow checkpoints may be missing."""
    config = study.load_study(str(quick.file)).arms["grown"]
    written = set()
    for row in read_rows(quick.directory / "grown-0.02-s1/metrics.jsonl"):
        written |= row.keys()
    claimable = {*metrics_of(config)}
    assert written <= claimable | {"step", "phase"}
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
    assert run_quick(quick.file).count("| deep |") == 1
    assert times_written(quick.directory) == before


# ---------------------------------------------------------------------------------------- a record


def build_house(root: Path, corpus: Path):
    """Copy the code of this house, and give it one chapter with one small study."""
    root.mkdir()
    for name in ("train.py", "model.py", "data.py"):
        shutil.copy(ROOT / name, root / name)
    for name in ("lib", "tools"):
        shutil.copytree(ROOT / name, root / name)
    small = FILE.replace("PATH", str(corpus))
    small = small.replace("steps=400", "steps=4")
    small = small.replace("peak_lrs=(1e-2, 2e-2, 4e-2),", "seeds=2,")
    write(root / "configs/growth/tiny.py", small)
    write(root / "README.md", "<!-- results -->\n<!-- /results -->\n")


def test_a_study_is_recorded_shown_and_found_by_the_real_commands(corpus, tmp_path):
    root = tmp_path / "house"
    build_house(root, corpus)
    train = [sys.executable, "train.py"]

    line = [*train, "study", "configs/growth/tiny.py", "--record", "--json"]
    *_, last = run_command(line, root).stdout.splitlines()
    record = read_json(root / "results/growth/tiny.json")
    assert json.loads(last) == record
    assert record["command"] == "python train.py study configs/growth/tiny.py --record"
    (made_by,) = record["made_by"]
    for arm in ("deep", "grown"):
        ends = record["arms"][arm]["bpb"]["by_seed"]
        assert [*ends] == ["1", "2"]
        for seed, end in ends.items():
            summary = read_json(root / f"runs/tiny/{arm}-own-s{seed}/summary.json")
            assert end == summary["eval/a.test/bpb"]
            assert made_by["versions"] == summary["versions"]

    assert "is written" in run_command([*train, "papers", "--write"], root).stdout
    index = (root / "configs/README.md").read_text()
    assert "| 1 confirmed, 1 reversed, 1 not run |" in index
    found = run_command([*train, "papers", "TINY", "001:39"], root).stdout
    assert "001:39 configs/growth/tiny.py" in found
    assert "confirmed: it helps" in found
    missing = run_command([*train, "papers", "tinny"], root, code=2).stderr
    assert "error: no file of the library has all of: tinny; the nearest" in missing


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
