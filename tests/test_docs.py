"""README.md, docs/ and the configs' headers: examples that run, commands that are accepted."""
import argparse
import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest

import data
import train
from lib.config import ROOT, from_json, load_file, to_json
from tests.conftest import USERS, environment
from train import load_config, parse

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = (ROOT / "docs/extending.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"(?ms)^### (.*?)$.*?^```python\n(.*?)^```", GUIDE))
# What studies share, no configs.
ROWS = {ROOT / f"configs/{name}.py" for name in ("bursty", "parts_of_speech", "points")}
CONFIGS = sorted({*(ROOT / "configs").rglob("*.py")} - ROWS)
BASE = load_file(ROOT / "configs/quickstart.py").plain


def points(text: str) -> list[str]:
    """Extension points by name, as `Phase.order`."""
    return re.findall(r"`((?:Source|Phase|Config|DataConfig|Schedule)\.\w+)`", text)


# --------------------------------------------------------------------------------------- examples

@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict[str, train.Config]:
    """The config of each example, from a file of its own."""
    here = tmp_path_factory.mktemp("examples")
    out = {}
    for name, code in EXAMPLES.items():
        file = here / f"{''.join(filter(str.isalpha, name))}.py"
        file.write_text(code)
        out[name] = load_config(str(file))
    return out


def test_there_is_an_example_for_every_extension_point():
    rows = re.findall(r"(?m)^\| (`.*?`) \| ", GUIDE)
    listed = [point for row in rows for point in points(row)]
    shown = [point for name in EXAMPLES for point in points(name)]
    assert len(listed) >= 20
    assert sorted(listed) == sorted(shown)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_config_that_is_accepted(examples, name):
    """It changes what its heading names; what it takes as arguments survives config.json."""
    config = examples[name]
    train.check(config)
    sources = config.data.sources.values()
    pairs = {
        "Config": [(config, BASE)],
        "Phase": [(phase, BASE.phases[0]) for phase in config.phases],
        "Source": [(source, BASE.data.sources["stdlib"]) for source in sources],
        "DataConfig": [(config.data, BASE.data)],
        "Schedule": [(config.schedule, BASE.schedule)],
    }
    for point in points(name):
        kind, field = point.split(".")
        changed = [getattr(ours, field) != getattr(plain, field) for ours, plain in pairs[kind]]
        assert any(changed), field
    written = json.loads(json.dumps(to_json(config)))
    again = to_json(from_json(train.Config, written))
    assert json.loads(json.dumps(again)) == written


def changed_fields(value, plain, names=()) -> dict:
    """{field: value} of a dataclass where it is not that of another; `names` are left out."""
    out = {}
    for field in fields(value):
        own = getattr(value, field.name)
        if field.name not in names and own != getattr(plain, field.name):
            out[field.name] = own
    return out


def all_together(examples: dict[str, train.Config], path: Path):
    """(source, phase, fields of Config) that have every function of the examples."""
    empty = data.Source(None)
    source = empty
    phase = train.Phase(steps=4, batch=8, seq=32)
    config = {}
    hooks = "reparam", "token_loss", "reduce", "gradient", "optimizer", "evals", "tracker"
    for example in examples.values():
        for own in example.data.sources.values():
            found = changed_fields(own, empty, ("split",))  # all have documents in every split
            if getattr(own.documents, "func", own.documents) in (data.stdlib, data.nothing):
                del found["documents"]
            source = replace(source, **found)
        own = changed_fields(example.phases[0], BASE.phases[0], ("steps", "batch", "seq"))
        phase = replace(phase, **own)
        own = changed_fields(example, train.Config())
        config |= {name: value for name, value in own.items() if name in hooks}
    source = replace(
        source,
        documents=partial(source.documents.func, path=str(path)),
        score=partial(source.score.func, least=0.01),
    )
    phase = replace(
        phase,
        steer=2,
        lengths=partial(phase.lengths.func, short=16, long=32),
        repeat=(replace(phase.repeat[0], every=1),),
    )
    return source, phase, config


def test_all_examples_together_train(examples, tmp_path, tiny):
    """Every function of theirs in one run of a few steps, on notebooks."""
    for i in range(24):
        cells = []
        for j in range(i + 9):
            lines = [f"def f{i}(x):\n", f"    return {j}\n"]
            cells.append(dict(cell_type="code", source=lines))
        (tmp_path / f"{i}.ipynb").write_text(json.dumps(dict(cells=cells)))
    (tmp_path / "broken.ipynb").write_text("{")
    source, phase, changed = all_together(examples, tmp_path)
    second = replace(phase, edits=(phase.repeat[0].apply,), steer=0)
    sources = dict(modules=source, functions=source)
    config = train.Config(
        name="all",
        runs=str(tmp_path),
        model=tiny,
        phases=(phase, second),
        data=data.DataConfig(
            sources=sources, tokenizer="bytes", dev=0.2, test=0.1, max_skipped=0.5),
        overlap=8,
        eval_every=2,
        eval_tokens=200,
        prompts=(),
        save_every=4,
        **changed,
    )
    train.train(config, __file__)
    lines = (tmp_path / "all/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in steps] == [*range(1, 9)]
    assert all(row["train/skipped"] == 0 for row in steps)
    assert all(row["own/hardest"] >= row["train/loss"] for row in steps)
    assert any(0 <= row.get("own/closes", -1) <= 1 for row in rows)
    tracked = (tmp_path / "all/train-grad_norm.csv").read_text().split()
    assert [line.split(",")[0] for line in tracked] == [str(step) for step in range(1, 9)]


def test_every_config_on_a_page_is_accepted(tmp_path):
    """And the page on data shows each reader."""
    readers = set()
    for page in PAGES:
        blocks = re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text("utf-8"))
        for i, block in enumerate(blocks):
            if not re.search(r"(?m)^config = ", block):
                continue
            file = tmp_path / f"{page.stem}{i}.py"
            file.write_text(block)
            config = load_config(str(file))
            train.check(config)
            if page.stem == "data":
                readers |= {source.documents.func for source in config.data.sources.values()}
    assert {reader.__name__ for reader in readers} == {
        "any_text", "text", "parquet", "hugging_face", "tfds"}


# --------------------------------------------------------------------------------------- commands

PLACES = dict.fromkeys(("CONFIG", "configs/idea.py"), "configs/quickstart.py")  # in a file's place


def shell_lines(page: Path) -> list[str]:
    """The lines of a page's shell blocks, without comments; those that go on are joined."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", page.read_text("utf-8"))
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
    return [line for line in lines if line]


def commands(page: Path) -> list[list[str]]:
    """The words after `python train.py` of every command on a page, in blocks and in sentences."""
    found = []
    for line in shell_lines(page):
        before, command, rest = line.partition("python train.py")
        if command and before.count("'") % 2:  # within quotes
            rest = rest.partition("'")[0]
        if command:
            found.append(rest)
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text("utf-8"))
    inline = re.findall(r"`python train\.py([^`]*)`", text)
    found += [rest for rest in inline if "..." not in rest]
    return [[PLACES.get(word, word) for word in shlex.split(rest)] for rest in found]


class Parsed(Exception):
    """What a verb's arguments came to, raised before it does anything."""


@pytest.fixture
def stops(monkeypatch):
    """Verbs stop where their arguments are parsed."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_known_args(parser, words=None, namespace=None):
        raise Parsed(*known(parser, words, namespace))

    def parse_args(parser, words=None, namespace=None):
        found, rest = known(parser, words, namespace)
        if rest:
            parser.error(f"{rest} is not understood")
        raise Parsed(found, [])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.chdir(ROOT)


def accept(words: list[str]):
    """Raise unless `python train.py` takes these words; needs `stops`."""
    for word in words:
        if word.startswith("configs/"):
            assert Path(word.split(":")[0]).is_file(), word
    verb = words[0] if words else ""
    if verb == "launch":
        words = words[2:]
        while words[0] in ("--processes", "--process"):
            words = words[2:]
        accept(words)
    elif (ROOT / f"tools/{verb}.py").is_file():
        accept_verb(verb, words[1:])
    elif "--help" not in words:
        config, _ = parse([word for word in words if word != "--debug"])
        train.check(config)


def accept_verb(verb: str, words: list[str]):
    """Raise unless a verb takes these words, and a config the fields among them."""
    with pytest.raises(Parsed) as stopped:
        train.verb(verb, words)
    found, rest = stopped.value.args
    if verb == "bench":
        short = load_file(ROOT / "tools/bench.py").SHORT
        rest = [f"--{short.get(word[2:], word[2:])}" if word[:2] == "--" else word for word in rest]
        rest = ["configs/bench.py", *rest]
    if verb in ("bench", "fit", "corpus"):
        config, _ = parse([*getattr(found, "rest", []), *rest])
        train.check(config)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "soak.md"],  # whose command is pytest's
    ids=lambda page: page.name)
def test_every_command_on_a_page_is_accepted(page, stops):
    found = commands(page)
    for words in found:
        accept(words)
    assert found


def test_a_command_that_is_mistyped_is_not_accepted(stops):
    """The test above can fail."""
    for line in ("sample runs/a --promt b", "--schedule.peek 1", "fit --devices two",
                 "bench --layer 2", "launch auto configs/quickstart.py --phases.0.steps 0"):
        with pytest.raises((train.InputError, AssertionError)):
            accept(line.split())


def test_every_link_on_a_page_leads_to_a_file():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#]+)", page.read_text("utf-8"))
        for link in links:
            assert link.startswith("https://") or (page.parent / link).is_file(), (page, link)


def test_the_readme_is_a_door():
    assert len(README.read_text("utf-8").splitlines()) <= 160


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_config_s_docstring_says_what_it_costs_and_how_to_run_it(path):
    """And the commands in it, those that train, are accepted as they stand."""
    said = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert re.match(r".{20,}?[.?:!)]$", said.splitlines()[0])
    assert re.search(r"\b(second|minute|hour)s?\b", said)
    lines = re.findall(r"python train\.py(?: (.*?))?(?: {2,}.*)?$", said, re.M)
    assert lines
    for line in lines:
        words = shlex.split((line or "").replace("...", ""))
        if words and (ROOT / f"tools/{words[0]}.py").is_file():
            continue
        config, _ = parse([str(ROOT / w) if w.startswith("configs/") else w for w in words])
        train.check(config)


# ------------------------------------------------------------------------------- the README is run

SHORTER = "--eval_tokens 2000 --data.dev 0.01 --data.test 0.01 --sample_tokens 20"  # for each run


def shorter(line: str) -> str:
    """A command of the README as the test runs it.

    A training run takes four steps a phase and evaluates on less text. pip has to find everything
    installed. The tests are collected, not run. All else runs as it stands.
    """
    if line.startswith("python -m pytest"):
        return f"{line} -n 0 --collect-only"
    command = line.rpartition("&& ")[2].removeprefix("python train.py")
    words = shlex.split(command)
    verb = words[0] if words else ""
    trains = not (ROOT / f"tools/{verb}.py").is_file() and "--help" not in words
    if not line.endswith(f"python train.py{command}") or not trains:
        return line
    config, _ = parse(words)
    steps = [f"--phases.{i}.steps 4" for i in range(len(config.phases))]
    return " ".join([line, *steps, SHORTER])


@pytest.mark.readme
def test_every_command_of_the_readme_runs_from_a_fresh_clone(tmp_path, monkeypatch):
    """In the order in which they stand, with a cache of their own; see `shorter`.

    By hand: python -m pytest -n 0 -m readme. It takes some minutes. What is not committed is not
    in the clone.
    """
    clone = tmp_path / "coppice"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    some = itertools.islice(data.stdlib("definition"), 2_000)
    lines = [json.dumps({"text": document.text}) for document in some]
    (clone / "FILE.jsonl").write_text("\n".join(lines))
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, start in (("python", ""), ("pip", "-m pip")):
        file = commands / name
        file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {start} "$@"\n')
        file.chmod(0o755)
    own = environment(
        **USERS,
        PATH=f"{commands}:{environment()['PATH']}",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
        PIP_NO_INDEX="1",
    )
    own.pop("PYTHONPATH", None)
    monkeypatch.chdir(clone)  # where `parse` finds configs
    failed = []
    for line in shell_lines(clone / "README.md"):
        command = shorter(line)
        done = subprocess.run(["bash", "-c", command], env=own, capture_output=True, text=True)
        print(f"{done.returncode}  {command}")
        if done.returncode:
            failed.append(f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    assert not failed, "\n\n".join(failed)
    assert (clone / "runs/quickstart/curves.png").stat().st_size > 10_000
    assert (clone / "runs/mine/summary.json").is_file()
