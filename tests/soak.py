"""What the soak harness shares: sizes and seed from the environment, and the page of counts that it writes.

    SOAK_SEED=7 SOAK_WORDS=3000 SOAK_DAMAGES=500 SOAK_KILLS=300 pytest -m soak tests/test_soak_*.py

SOAK_KINDS=plain,growing tries these kinds of runs alone. The same seed draws the same cases.
Each part writes its counts into docs/soak.md, which is nobody's to edit.
"""

import os
import re
import time
from collections import Counter
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs/soak.md"
HEAD = """# What the soak harness has drawn

Written by `pytest -m soak tests/test_soak_*.py`, which draws cases from a seed. The sizes are those of
`SOAK_WORDS`, `SOAK_DAMAGES` and `SOAK_KILLS`; without them 3,000, 500 and 300.
"""


def seed() -> int:
    """What all cases are drawn from."""
    return int(os.environ.get("SOAK_SEED", "0"))


def size(name: str, usual: int) -> int:
    """How many cases are drawn."""
    return int(os.environ.get(f"SOAK_{name}", usual))


def record(part: str, cases: int, counts: Counter, said: str, begun: float):
    """Write the counts of a part into the page, in the place of those it had. begun: by time.monotonic()."""
    seconds = time.monotonic() - begun
    drawn = f"{cases:,} cases of seed {seed()}, {time.strftime('%d %B %Y')}, {seconds:,.0f} s:"
    lines = [f"## {part}", "", said, "", drawn, "", "| what came of it | cases |", "|---|---|"]
    lines += [f"| {name} | {number:,} |" for name, number in sorted(counts.items())]
    text = PAGE.read_text("utf-8") if PAGE.is_file() else HEAD
    parts = re.split(r"(?m)^(?=## )", text)
    kept = [one.strip() for one in parts[1:] if not one.startswith(f"## {part}\n")]
    every = sorted([*kept, "\n".join(lines)])
    PAGE.write_text("\n\n".join([HEAD.strip(), *every]) + "\n", "utf-8")
