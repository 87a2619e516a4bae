"""What a device holds and sends in the ready configs, before and after: the table of docs/speed.md.

    python train.py fits --before CHECKOUT [--keep DIR] [--write]

`fit` of another checkout of this code and of this one, for each config on hardware that is not here.
--keep: what each `fit` said is kept there, and not asked for again. --write: into docs/speed.md;
without it, the table is printed.
"""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lib.arguments import Arguments
from lib.disk import write
from lib.errors import InputError
from train import ROOT

READY = {  # the ready configs, and the flags of `fit` for each
    "124m": "--topology v5e:4x4",
    "350m": "--topology h100:8",
    "1_3b": "--topology v5e:16x16 --phases.0.accumulate 1",
}
PAGE = ROOT / "docs" / "speed.md"
BEGIN, END = "<!-- fits -->", "<!-- /fits -->"
KINDS = "all-reduce", "reduce-scatter", "all-gather"


def asked(checkout: Path, name: str, kept: Path) -> dict:
    """What `fit` of a checkout says of a ready config, from the file `kept` if it is there."""
    if not kept.exists():
        config = f"configs/baselines/llama_{name}.py"
        line = [sys.executable, "train.py", "fit", config, *READY[name].split(), "--json"]
        environment = os.environ | {"PYTHONPATH": ""}
        done = subprocess.run(line, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise InputError(f"fits: {checkout} ends with {done.stderr.strip()[-300:]}")
        write(kept, done.stdout)
    return json.loads(kept.read_text("utf-8").splitlines()[-1])


def cells(found: dict) -> list[str]:
    """GiB that a device holds, GiB that it sends in all, and by each kind of collective."""
    (program,) = found["programs"]
    sent = {kind: size for kind, (_, size) in program["collectives"].items()}
    each = [sum(sent.values()), *(sent.get(kind, 0) for kind in KINDS)]
    return [f"{size / 2**30:.2f}" for size in (program["bytes"]["total"], *each)]


def table(before: Path, keep: Path) -> str:
    """The table, in Markdown."""
    rows = [["`fit configs/baselines/...`", "", "holds", "sends", *KINDS]]
    rows.append(["---"] * len(rows[0]))
    for name, flags in READY.items():
        for when, checkout in (("before", before), ("after", ROOT)):
            found = asked(checkout, name, keep / f"{when}-{name}.log")
            rows.append([f"`llama_{name}.py {flags}`", when, *cells(found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str]) -> int:
    """Command line; returns the exit code."""
    parser = Arguments("fits", __doc__)
    parser.add_argument("--before", type=Path, required=True, help="another checkout")
    parser.add_argument("--keep", type=Path, help="where what `fit` says is kept")
    parser.add_argument("--write", action="store_true", help="into docs/speed.md")
    a = parser.parse_args(arguments)
    if not (a.before / "train.py").exists():
        parser.error(f"--before is {a.before}; allowed is a checkout, with its train.py")
    with tempfile.TemporaryDirectory() as place:
        keep = a.keep or Path(place)
        keep.mkdir(parents=True, exist_ok=True)
        made = table(a.before, keep)
    if not a.write:
        print(made)
        return 0
    text = PAGE.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    write(PAGE, f"{head}{BEGIN}\n{made}\n{END}{tail}")
    return 0
