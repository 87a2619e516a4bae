"""What is written for people: examples that run, docstrings that say how, commands that are accepted."""
import ast
import json
import re
import shlex
from dataclasses import fields, replace
from functools import partial

import pytest

import data
import train
from lib.config import ROOT, from_json, load_file, to_json
from train import load_config, parse

README = (ROOT / "README.md").read_text("utf-8")
PAGES = (ROOT / "docs/extending.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"(?ms)^### (.*?)$.*?^```python\n(.*?)^```", PAGES))
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
BASE = load_file(ROOT / "configs/quickstart.py").config


def points(text: str) -> list[str]:
    """Extension points by name, as `Phase.order`."""
    return re.findall(r"`((?:Source|Phase|Config)\.\w+)`", text)


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> dict[str, train.Config]:
    """The config of each example, from a file of its own."""
    here, out = tmp_path_factory.mktemp("examples"), {}
    for name, code in EXAMPLES.items():
        file = here / f"{''.join(filter(str.isalpha, name))}.py"
        file.write_text(code)
        out[name] = load_config(str(file))
    return out


def test_there_is_an_example_for_every_extension_point():
    rows = re.findall(r"(?m)^\| (`.*?`) \| ", README)
    asked = [point for row in rows for point in points(row)]
    assert len(asked) >= 15 and sorted(asked) == sorted(p for name in EXAMPLES for p in points(name))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_a_config_that_is_accepted(examples, name):
    """It changes what its heading names; what it takes as arguments survives config.json."""
    config = examples[name]
    train.check(config)
    for kind, field in (point.split(".") for point in points(name)):
        pairs = dict(Config=[(config, BASE)], Phase=[(p, BASE.phases[0]) for p in config.phases],
                     Source=[(s, BASE.data.sources["stdlib"]) for s in config.data.sources.values()])[kind]
        assert any(getattr(ours, field) != getattr(plain, field) for ours, plain in pairs), field
    assert to_json(from_json(train.Config, json.loads(json.dumps(to_json(config))))) == \
        json.loads(json.dumps(to_json(config)))


def test_all_examples_together_train(examples, tmp_path, tiny):
    """Every function of theirs in one run of a few steps, on notebooks."""
    for i in range(24):
        cells = [dict(cell_type="code", source=[f"def f{i}(x):\n", f"    return {j}\n"])
                 for j in range(i + 9)]
        (tmp_path / f"{i}.ipynb").write_text(json.dumps(dict(cells=cells)))
    (tmp_path / "broken.ipynb").write_text("{")
    source, phase, changed = data.Source(None), train.Phase(steps=4, batch=8, seq=32), {}
    for config in examples.values():
        for own in config.data.sources.values():
            here = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) != f.default}
            plain = getattr(own.documents, "func", own.documents) is data.stdlib
            source = replace(source, **here | (dict(documents=source.documents) if plain else {}))
        for f in fields(phase):
            if f.name not in ("steps", "batch", "seq") and getattr(config.phases[0], f.name) != getattr(
                    BASE.phases[0], f.name):
                phase = replace(phase, **{f.name: getattr(config.phases[0], f.name)})
        changed |= {f.name: getattr(config, f.name) for f in fields(config) if f.name in (
            "reparam", "token_loss", "reduce", "optimizer", "evals") and getattr(config, f.name) != f.default}
    source = replace(source, documents=partial(source.documents.func, path=str(tmp_path)), score=partial(
        source.score.func, least=0.01))
    phase = replace(phase, steer=2, lengths=partial(phase.lengths.func, short=16, long=32), repeat=(
        replace(phase.repeat[0], every=1),))
    config = train.Config(
        name="all", runs=str(tmp_path), model=tiny,
        phases=(phase, replace(phase, edits=(phase.repeat[0].apply,), steer=0)),
        data=data.DataConfig(sources=dict(modules=source, functions=source), tokenizer="bytes", dev=0.2,
                             test=0.1, max_skipped=0.5),
        overlap=8, eval_every=2, eval_tokens=200, prompts=(), save_every=4, **changed)
    train.train(config, __file__)
    rows = [json.loads(line) for line in (tmp_path / "all/metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "train/loss" in r]
    assert [r["step"] for r in steps] == [*range(1, 9)] and all(r["train/skipped"] == 0 for r in steps)
    assert all(r["own/hardest"] >= r["train/loss"] for r in steps)
    assert any(0 <= r.get("own/closes", -1) <= 1 for r in rows)


def test_the_readme_s_own_config_is_accepted(tmp_path):
    blocks = [b for b in re.findall(r"(?ms)^```python\n(.*?)^```", README) if "config = Config(" in b]
    assert blocks
    for block in blocks:
        (tmp_path / "mine.py").write_text(block)
        train.check(load_config(str(tmp_path / "mine.py")))


def test_the_configs_of_the_page_on_data_are_accepted_and_name_each_reader(tmp_path):
    page = (ROOT / "docs/data.md").read_text("utf-8")
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    read = set()
    for i, block in enumerate(blocks):
        (tmp_path / f"mine{i}.py").write_text(block)
        config = load_config(str(tmp_path / f"mine{i}.py"))
        train.check(config)
        read.add(config.data.sources["mine"].documents.func.__name__)
    assert read == {"parquet", "hugging_face", "tfds", "text"}
    for line in re.findall(r"(?m)^python train\.py (.*)$", page):
        train.check(parse([str(ROOT / w) if w.startswith("configs/") else w for w in shlex.split(line)])[0])


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
