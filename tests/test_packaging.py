"""Installing: requirement files, the exact versions, the container, the notebook, what CI runs."""
import fnmatch
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lib.config import ROOT, load_file
from lib.summary import commit
from tests.conftest import USERS, environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
README = (ROOT / "README.md").read_text("utf-8")
SHORTER = (
    "--phases.0.steps 4 --phases.1.steps 4 --eval_tokens 2000 --data.dev 0.01 --data.test 0.01 "
    "--sample_tokens 20"
)


def requirements(text: str) -> dict[str, Requirement]:
    """{name as the index has it: requirement} of the lines of a requirement file."""
    found = {}
    for line in text.splitlines():
        if line and not line.startswith(("-", "#", " ")):
            one = Requirement(line.removesuffix("\\").strip())
            found[f"{one.name.lower().replace('_', '-')} {one.marker or ''}".strip()] = one
    return found


RUNTIME = requirements((ROOT / "requirements.txt").read_text())
TESTS = requirements((ROOT / "tests/requirements.txt").read_text())
LOCK = (ROOT / "requirements.lock").read_text()


# ------------------------------------------------------------------------------------ requirements


def test_every_requirement_has_a_ceiling():
    extras = PROJECT["project"]["optional-dependencies"]
    more = {name: one for texts in extras.values() for name, one in lines(texts).items()}
    for name, one in [*RUNTIME.items(), *TESTS.items(), *more.items()]:
        operators = {each.operator for each in one.specifier}
        assert operators & {"<", "=="} or one.extras, name


def lines(texts: list[str]) -> dict[str, Requirement]:
    """The same of a list of requirements."""
    return requirements("\n".join(texts))


def test_an_extra_asks_for_what_the_tests_ask_for():
    checked = 0
    for texts in PROJECT["project"]["optional-dependencies"].values():
        for name, one in lines(texts).items():
            if name in TESTS:
                assert str(one) == str(TESTS[name])
                checked += 1
    assert checked >= 4


def test_the_exact_versions_are_those_that_are_allowed():
    """Each has hashes, and no line says where it comes from."""
    exact = requirements(LOCK)
    for name, one in RUNTIME.items():
        pins = [pin for key, pin in exact.items() if key.split(" ")[0] == name]
        assert pins, f"{name} is not in requirements.lock; .ci/lock makes it anew"
        for pin in pins:
            [version] = pin.specifier
            assert version.operator == "=="
            assert one.specifier.contains(version.version), pin
    for entry in re.split(r"\n(?=\S)", LOCK.strip()):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in LOCK and "--index" not in LOCK


def test_what_is_installed_in_editable_mode_is_all_of_the_house():
    tool = PROJECT["tool"]["setuptools"]
    assert tool["dynamic"]["dependencies"]["file"] == ["requirements.txt"]
    top = {path.stem for path in ROOT.glob("*.py")}
    assert set(tool["py-modules"]) == top == {"train", "model", "data"}
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/**/*.py")}
    for folder in folders - {"tests", "runs"}:
        if not folder.startswith("."):
            included = tool["packages"]["find"]["include"]
            assert any(fnmatch.fnmatch(folder, each) for each in included), folder


# --------------------------------------------------------------------------------------- container


def test_the_dockerfile_copies_what_is_there_and_runs_the_commands_of_the_pages():
    text = (ROOT / "Dockerfile").read_text()
    copied = set()
    for line in re.findall(r"(?m)^COPY (.*)$", text):
        *sources, _ = line.split()
        copied |= set(sources)
    assert all((ROOT / source).exists() for source in copied)
    assert {"train.py", "model.py", "data.py", "lib", "tools", "configs"} <= copied
    [install] = re.findall(r"(?m)^RUN (pip install .*)$", text)
    machines = (ROOT / "docs/machines.md").read_text("utf-8")
    assert f"\n{install.replace('--no-cache-dir ', '')}\n" in machines
    [entry] = re.findall(r"(?m)^ENTRYPOINT (.*)$", text)
    assert f"&& {' '.join(json.loads(entry))}\n" in README
    assert "://" not in text and "--index" not in text


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == ""


# ---------------------------------------------------------------------------------------- notebook


def test_the_notebook_is_made_of_the_readme_s_commands():
    """Six cells; `python .ci/notebook.py` brings them up to date."""
    maker = load_file(ROOT / ".ci/notebook.py")
    assert maker.PLACE.read_text("utf-8") == maker.notebook(README)
    cells = [cell["source"] for cell in json.loads(maker.PLACE.read_text("utf-8"))["cells"]]
    commands = [line[1:].strip() for cell in cells for line in cell if line.startswith(("!", "%pip"))]
    assert len(cells) == len(commands) == 6
    assert all(command in README for command in commands)


@pytest.mark.notebook
def test_the_notebook_runs_from_a_fresh_clone(tmp_path):
    """Each cell as IPython runs it; what trains takes four steps a phase, pip finds all installed.

    A command that fails ends no cell, so what each cell leaves is looked at. What is not committed
    is not in the clone.
    """
    assert importlib.util.find_spec("IPython"), "pip install -r tests/requirements.txt"
    clone, tools = tmp_path / "coppice", tmp_path / "bin"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    tools.mkdir()
    python = shlex.quote(sys.executable)
    (tools / "pip").write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$2" in\n  sample|eval|report) exec {python} "$@" ;;\nesac\n'
        f'exec {python} "$@" {SHORTER}\n'
    )
    for file in tools.iterdir():
        file.chmod(0o755)
    own = environment(
        **USERS,
        PATH=f"{tools}:{environment()['PATH']}",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        IPYTHONDIR=str(tmp_path / "ipython"),
        PIP_NO_INDEX="1",
    )
    cells = json.loads((clone / "docs/quickstart.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    (clone / "docs/quickstart.ipy").write_text("\n".join(sources))
    line = [sys.executable, "-m", "IPython", "quickstart.ipy"]
    done = subprocess.run(line, cwd=clone / "docs", env=own, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "error:" not in said.lower(), said[-3000:]
    for file in ("quickstart/curves.png", "quickstart/eval.json", "gentler/summary.json"):
        assert (clone / "runs" / file).is_file(), said[-3000:]
    assert (clone / "report.html").stat().st_size > 10_000
    assert "def main(" in said and "Requirement already satisfied" in said


# ---------------------------------------------------------------------------------------------- CI


def read_yaml(name: str) -> dict:
    """A file of YAML."""
    return yaml.safe_load((ROOT / name).read_text())


def test_ci_elsewhere_runs_what_ci_runs_here():
    steps = read_yaml(".github/workflows/ci.yml")["jobs"]["run"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    assert Path(ROOT / ".ci/run").stat().st_mode & 0o111
    done = subprocess.run(["bash", "-n", ROOT / ".ci/run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named = re.findall(r"tests/\w+\.(?:py|txt)", (ROOT / ".ci/run").read_text())
    assert named and all((ROOT / name).is_file() for name in named)


def test_a_commit_is_checked_by_the_ruff_of_the_tests():
    [repository] = read_yaml(".pre-commit-config.yaml")["repos"]
    [hook] = repository["hooks"]
    assert hook["entry"].startswith("ruff check")
    [ruff] = map(Requirement, hook["additional_dependencies"])
    assert ruff.specifier == TESTS["ruff"].specifier
