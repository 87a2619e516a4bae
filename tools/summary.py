"""What ends a run: samples.txt, curves.png, and summary.json from its metrics and eval.json."""
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import jax

from lib.arguments import Arguments
from lib.disk import write
from lib.processes import is_main_process
from train import ROOT, verb


def main(arguments: list[str]) -> dict:
    """Command line; gives what summary.json holds."""
    parser = Arguments("summary", __doc__)
    parser.add_argument("run", help="run directory")
    run = Path(parser.parse_args(arguments).run)
    samples = verb("sample", [str(run)])
    if not is_main_process():
        return {}
    write(run / "samples.txt", samples)
    verb("curves", [str(run)])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(r for r in reversed(rows) if "train/loss" in r)
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in
                ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")}
    versions["python"] = sys.version.split()[0]
    summary = {**last, **json.loads((run / "eval.json").read_text()), "versions": versions,
               "commit": commit, "host": os.uname().nodename, "device": jax.devices()[0].device_kind,
               "devices": jax.device_count(),
               "processes": jax.process_count()}
    write(run / "summary.json", json.dumps(summary, indent=1))
    print(f"{run} has curves.png, samples.txt, metrics.jsonl and summary.json; next:\n"
          f"  python train.py sample {run} --prompt 'def main('\n"
          f"  python train.py {run}/config.json --schedule.peak 2e-3 --name gentler\n"
          "a run that was stopped resumes by the command that began it", flush=True)
    return summary
