"""Makes docs/quickstart.ipynb of the README's own commands: python .ci/notebook.py"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "docs/quickstart.ipynb"
# How those commands of "Five minutes" begin that are cells.
FIVE = "sample", "eval", "--schedule.peak", "report"

BEGIN = """\
import os

# In Colab: the address of your copy of Coppice. Where this notebook lies in one: nothing.
REPOSITORY = ""
if REPOSITORY:
    !git clone --quiet $REPOSITORY coppice
    %cd coppice
elif not os.path.exists("train.py"):
    %cd ..
# On a GPU or a TPU, install JAX as docs/machines.md says.
"""
PICTURE = """

from IPython.display import Image

Image("runs/quickstart/curves.png")"""
PAGE = """

from IPython.display import HTML

HTML(filename="report.html")"""


def block(readme: str, title: str) -> list[str]:
    """The lines of the first shell block below a title."""
    below = readme.partition(f"\n## {title}\n")[2]
    return re.search(r"(?ms)^```sh\n(.*?)^```", below)[1].splitlines()


def cells(readme: str) -> list[str]:
    """The sources of the six cells."""
    [line] = block(readme, "Two commands")
    install, train = line.split(" && ")
    found = [f"{BEGIN}%{install}", f"!{train}{PICTURE}"]
    for line in block(readme, "Five minutes"):
        command, _, comment = line.partition("#")
        words = command.removeprefix("python train.py ").split()
        if words[0] in FIVE:
            found.append(f"# {comment.strip()}\n!{command.strip()}")
    found[-1] += PAGE
    return found


def notebook(readme: str) -> str:
    """The file's text."""
    made = []
    for number, source in enumerate(cells(readme), 1):
        cell = {"cell_type": "code", "execution_count": None, "id": f"cell-{number}"}
        cell |= {"metadata": {}, "outputs": [], "source": source.splitlines(keepends=True)}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel}
    whole = {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"


if __name__ == "__main__":
    PLACE.write_text(notebook((ROOT / "README.md").read_text("utf-8")), "utf-8")
