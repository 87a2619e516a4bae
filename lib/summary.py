"""What a run ends with: summary.json."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from lib.config import ROOT
from lib.disk import metric_rows, write

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")


def commit() -> str:
    """The commit of this repository; empty where it is none, or where git is missing."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def made_by() -> dict:
    """Where a run was made, and by which versions."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "versions": versions | {"python": sys.version.split()[0]},
        "commit": commit(),
        "host": os.uname().nodename,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def write_summary(directory: Path) -> dict:
    """Write summary.json, from metrics.jsonl's last step and eval.json; gives what it holds."""
    figures = json.loads((directory / "eval.json").read_text())
    rows, _ = metric_rows(directory / "metrics.jsonl")
    steps = [row for row in rows if "train/loss" in row]
    summary = steps[-1] | figures | made_by()
    write(directory / "summary.json", json.dumps(summary, indent=1))
    return summary


def hint(directory: Path, prompts: tuple[str, ...]) -> str:
    """What one may do with a run that has ended; a prompt of its own config suits its data."""
    prompt = next((text.strip() for text in prompts if text.strip()), "")
    say = f" --prompt {json.dumps(prompt, ensure_ascii=False)}" if prompt else ""
    return (
        f"{directory} has curves.png, samples.txt, metrics.jsonl and summary.json; next:\n"
        f"  python train.py sample {directory}{say}\n"
        f"  python train.py report {directory}\n"
        f"  python train.py {directory}/config.json --schedule.peak 2e-3 --name gentler\n"
        "a run that was stopped resumes by the command that began it"
    )
