"""Held-out text of one's own in any form: the same documents and figures; runs tested on other text."""
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import prose
from study_cases import FILE, Trainer, call, change, make_up_runs, study, write_file

import train
from data import DataConfig, Document, InputError, Source
from lib import statistics
from lib.any_text import any_text
from lib.cache import build
from lib.config import ROOT, load_file
from lib.corpus import assemble, open_held_out
from lib.disk import write
from lib.evaluate import Setting, open_source
from lib.fields import require
from lib.tokenizers import Bytes, tokenizer_texts

report = load_file(ROOT / "tools/report.py")
TEXTS = [prose(i, 40 + 90 * i) for i in range(36)]
TRAINED, OWN = TEXTS[:28], TEXTS[28:]
FORMS = "jsonl", "parquet", "directory"


def written(place: Path, form: str, texts: list[str]) -> str:
    """The path of texts in one of the forms."""
    place.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (place / "x.jsonl").write_text("".join(lines), "utf-8")
        return str(place / "x.jsonl")
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table
        write_table(pyarrow.table({"text": texts}), place / "x.parquet", row_group_size=5)
        return str(place / "x.parquet")
    for i, text in enumerate(texts):
        (place / f"{i:03}.txt").write_text(text, "utf-8", newline="")
    return str(place)


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """{form: (path of what is trained on, path of what is held out)} of one corpus."""
    root = tmp_path_factory.mktemp("forms")
    found = {}
    for form in FORMS:
        found[form] = (written(root / form / "train", form, TRAINED), written(root / form / "own", form, OWN))
    return found


def config_of(paths: tuple[str, str], tiny, **fields) -> train.Config:
    """A run of eight steps on one form of the corpus."""
    source, own = (Source(partial(any_text, path=path)) for path in paths)
    return train.Config(
        model=tiny, data=DataConfig(sources={"mine": source}, held_out={"mine": own}, tokenizer="bytes"),
        phases=(train.Phase(steps=8, batch=8, seq=64),), overlap=8, eval_every=4, prompts=(), **fields)


@pytest.fixture(scope="module")
def runs(forms, tiny, tmp_path_factory) -> dict[str, Path]:
    """{form: directory of a run on it}, each with held-out text in its own form."""
    root = tmp_path_factory.mktemp("runs")
    for form, paths in forms.items():
        train.train(config_of(paths, tiny, name=form, runs=str(root)))
    return {form: root / form for form in forms}


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


# ------------------------------------------------------------------------------------------- it must show: 1


def test_one_corpus_in_three_forms_has_the_same_held_out_documents_and_figures(runs):
    found = {form: summary(run) for form, run in runs.items()}
    first = found["jsonl"]
    assert len(first["held_out_texts"]["mine"]) == len(OWN) == len(first["held_out_paths"])
    for form, one in found.items():
        assert sorted(one["held_out_texts"]["mine"]) == sorted(first["held_out_texts"]["mine"]), form
        assert one["train/loss"] == first["train/loss"]
        assert one["eval/mine.test/bpb"] == pytest.approx(first["eval/mine.test/bpb"], abs=1e-6)
        assert one["gzip_bpb"] == pytest.approx(first["gzip_bpb"])
    assert len({tuple(one["held_out_paths"]) for one in found.values()}) == 3  # which are other names


def test_any_form_is_measured_after_the_run(runs, forms, capsys):
    """`eval RUN --data` of each form gives the figure that the run reported."""
    run = runs["jsonl"]
    for form, (_, own) in forms.items():
        assert train.main(["eval", str(run), "--data", own]) == 0
        found = json.loads((run / "eval.json").read_text())
        name = "own" if form == "directory" else "x"
        assert found[f"text/{name}/bpb"] == pytest.approx(found["eval/mine.test/bpb"], abs=1e-6)
        assert found[f"text/{name}/gzip_bpb"] == pytest.approx(found["gzip_bpb"])
    out = capsys.readouterr().out
    size = sum(len(text.encode()) for text in OWN)
    assert re.search(rf"held-out own +8 +{size:,} +\d\.\d{{3}} ± \d\.\d{{3}} +\d", out)


def test_names_of_data_differ(runs, forms, capsys):
    both = [forms[form][1] for form in ("jsonl", "parquet")]
    assert train.main(["eval", str(runs["jsonl"]), "--data", *both]) == 2
    assert "--data has x, x" in capsys.readouterr().err
    assert train.main(["eval", "runs/none", "--data", "gone.txt"]) == 2
    assert "'gone.txt' cannot be read: does not exist" in capsys.readouterr().err


def test_dev_during_the_run_is_of_the_same_documents(runs):
    """They fit within eval_tokens, so the last evaluation is that of the end."""
    rows = [json.loads(line) for line in (runs["parquet"] / "metrics.jsonl").read_text().splitlines()]
    dev = [row["eval/mine/bpb"] for row in rows if "eval/mine/bpb" in row]
    assert len(dev) == 2
    assert dev[-1] == pytest.approx(summary(runs["parquet"])["eval/mine.test/bpb"], abs=1e-6)


def test_a_report_puts_the_three_into_one_table_and_other_documents_into_another(runs, tmp_path):
    """As they are known by their texts, and not by their paths, which are the same in both."""
    other = tmp_path / "hash"
    shutil.copytree(runs["jsonl"], other, ignore=shutil.ignore_patterns("checkpoints"))
    texts = [f"{i:016x}" for i in range(3)] + summary(other)["held_out_texts"]["mine"][:1]
    (other / "summary.json").write_text(json.dumps(summary(other) | {"held_out_texts": {"mine": texts}}))
    found, _ = report.collect([*runs.values(), other])
    groups = report.group_by_documents(found, [run.name for run in found])
    assert [group.members for group in groups] == [[0, 1, 2], [3]]
    assert "tested on other documents than jsonl, parquet, directory" in groups[1].note
    assert "(4 documents, 1 of them in common.)" in groups[1].note


# ------------------------------------------------------------------------------------------------ the splits


def documents(split: str = "", number: int = 20):
    """Texts that say what they are."""
    for i in range(number):
        yield Document(f"d{i}", f"text number {i} " * 3, split=split)


def others(number: int = 6):
    """Held-out texts, of which one is also trained on."""
    yield Document("again", "text number 3 " * 3)
    for i in range(number):
        yield Document(f"o{i}", f"other {i} " * 5)


def split():
    """Documents that say themselves what they are."""
    for i, word in enumerate(("train", "dev", "test", "held_out") * 3):
        yield Document(f"s{i}", f"{word} {i} ", split=word)


def opened(**fields) -> Setting:
    """What an evaluation reads of some data."""
    given = dict(sources={"a": Source(documents)}, tokenizer="bytes", dev=0.3, test=0.3) | fields
    config = train.Config(data=DataConfig(**given), phases=(train.Phase(seq=16),), overlap=4)
    train.check(config)
    config, tokenizer, caches = assemble(config)
    held_out = open_held_out(config, tokenizer, caches)
    return Setting(config, config.phases[0], caches, tokenizer, None, held_out)


def paths(setting: Setting, source: str, split: str) -> set[str]:
    return set(open_source(setting, source, split).paths)


def test_a_source_with_held_out_text_of_its_own_is_trained_on_as_a_whole(capsys):
    setting = opened(held_out={"a": Source(others)})
    every = {"again"} | {f"o{i}" for i in range(6)}
    assert paths(setting, "a", "dev") == paths(setting, "a", "test") == every
    assert paths(setting, "a", "train") == {f"d{i}" for i in range(20)}
    assert len(tokenizer_texts(setting.config.data)) == 20
    assert "held-out a: 1 of 7 documents are trained on too" in capsys.readouterr().out
    by_hash = opened()
    assert 0 < len(paths(by_hash, "a", "train")) < 20
    assert len(tokenizer_texts(by_hash.config.data)) == len(paths(by_hash, "a", "train"))


def test_by_another_name_it_is_measured_besides():
    setting = opened(held_out={"b": Source(others, split="test")})
    assert len(paths(setting, "b", "test")) == 7 and not paths(setting, "b", "dev")
    assert paths(setting, "a", "test") == paths(opened(), "a", "test")


@pytest.mark.parametrize("said", ["", "dev", "test", "held_out"])
def test_a_document_says_its_split_wherever_it_comes_from(said):
    """And wins over its source; `held_out` is read as dev and as test."""
    setting = opened(sources={"a": Source(documents, split="train"), "b": Source(split, split=said)})
    words = {"train": {0}, "dev": {1, 3}, "test": {2, 3}, "held_out": {3}}
    for word, places in words.items():
        assert paths(setting, "b", word) == {f"s{i}" for i in range(12) if i % 4 in places}


def test_streamed_sources_have_all_of_their_held_out_text():
    many = {"a": Source(partial(others, number=300))}
    data_config = DataConfig(
        sources={"a": Source(documents)}, held_out=many, tokenizer="bytes", stream=True,
        shard_tokens=40, window=1, dev=0.3, test=0.3)
    held_out = open_held_out(train.Config(data=data_config), Bytes(), {})
    config = train.Config(data=data_config, phases=(train.Phase(seq=16),), overlap=4)
    caches = {"a": build("a", replace(data_config, stream=False), Bytes(), 0)}
    assert held_out["a"].total["shards"] > 1
    setting = Setting(config, config.phases[0], caches, Bytes(), None, held_out)
    assert len(paths(setting, "a", "test")) == 301


def test_held_out_text_can_steer():
    """A config without shares of dev may still tune and steer by it."""
    source = Source(others)
    sources = {name: Source(documents) for name in "ab"}
    phase = train.Phase(steps=4, steer=2, mixture=by_loss)
    config = train.Config(data=DataConfig(sources=sources, dev=0.0, test=0.0), phases=(phase,), overlap=4)
    with pytest.raises(InputError, match="steer is 2"):
        train.check(config)
    train.check(replace(config, data=replace(config.data, held_out={"a": source})))


def by_loss(progress, log):
    """A mixture that reads the log."""
    return {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("source, said", [
    (Source(others, split="train"), 'data.held_out.a.split is "train"'),
    (Source(others, epochs=2.0), "data.held_out.a has prepare or epochs"),
    (Source(others, prepare=lambda document, rng: document), "data.held_out.a has prepare or epochs"),
])
def test_what_is_for_training_alone_is_refused(source, said):
    with pytest.raises(InputError, match=said):
        require(DataConfig(held_out={"a": source}).rules("data"))


# ------------------------------------------------------------------------------------- two runs in one study


def test_figures_of_other_documents_are_no_difference():
    last = {"eval/a.test/bpb": 1.0, "x": 1.0}
    one = dict(bpb=1.0, dev=1.0, last=last, held_out={"a": [2, "p"], "b": [3, "q"]})
    other = one | {"bpb": 2.0, "held_out": {"a": [2, "p"], "b": [3, "other"]}}
    renamed = one | {"held_out": {"c": [2, "p"], "d": [3, "q"]}}
    silent = one | {"held_out": {}}
    assert statistics.difference(other, one, "bpb") is None
    assert statistics.difference(other, one, "speed_up_tokens") is None
    assert statistics.difference(other, one, "eval/a.test/bpb") == 0  # by this source they are alike
    assert not statistics.tested_alike(other, one, "eval/b/bpb")
    assert statistics.difference(other, one, "x") == 0
    assert statistics.difference(renamed, one, "bpb") == statistics.difference(silent, one, "bpb") == 0


class OnOthers(Trainer):
    """Runs that are made up: `grown` is tested on other documents."""

    def __init__(self):
        super().__init__()
        self.best["grown"] = 2e-2  # the rate of the file

    def write_run(self, config, arm: str):
        super().write_run(config, arm)
        texts = ["1", "2", "3"] if arm == "grown" else ["1", "2"]
        place = Path(config.runs) / config.name / "summary.json"
        summary = json.loads(place.read_text()) | {"held_out_texts": {"a": texts}}
        write(place, json.dumps(summary))


def test_a_study_says_so_and_does_not_judge(tmp_path, corpus, monkeypatch, capsys):
    """The other arm's figure is not in the column; a claim by something else is judged."""
    file = write_file(tmp_path / "tiny.py", corpus)
    change(file, "    peak_lrs=(1e-2, 2e-2, 4e-2),\n", "")
    make_up_runs(monkeypatch)
    monkeypatch.setattr(study.subprocess, "Popen", OnOthers())
    result = call(file, "--seeds", "2")
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| grown"))
    assert row.endswith("| - | other documents | - | - |")
    assert "grown: tested on other documents than the control (a 3; the control: a 2)" in out
    assert [claim["verdict"] for claim in result["claims"]] == ["not judged", "reversed"]
    assert result["arms"]["grown"]["less_control"]["bpb"]["mean"] is None
    page = report.study(json.loads((tmp_path / "runs/tiny/study.json").read_text()))
    assert page.count("tested on other documents") == 2


@pytest.mark.parametrize("said, told", [("", True), (', split="held_out"', True), (', split="test"', False)])
def test_a_study_says_where_rates_are_chosen_by_what_is_reported(tmp_path, said, told):
    own = f'tokenizer="bytes", held_out={{"a": Source(partial(text, path="PATH"){said})}}'
    file = tmp_path / "tiny.py"
    file.write_text(FILE.replace('tokenizer="bytes"', own))
    found = study.load_study(str(file))
    request = study.Request(str(file), found, tmp_path, ["deep", "grown"], 1, False, 1)
    assert study.tuned_on_test(request) == told
    nothing = dict(flops=1.0, tokens=1, tuning_flops=1.0, tuning_tokens=1)
    result = dict(tuned_on_test=told, quick=False, seeds=2, cost=nothing, arms={}, failed={}, made_by=[])
    lines = [line for line in study.notes(result) if line.startswith("rates were chosen on the documents")]
    assert len(lines) == told


# ------------------------------------------------------------------------------------------------ the figures


def test_a_run_ends_with_a_table_that_has_units():
    """One line a source, their mean, and what compressors need of the same documents."""
    from lib.evaluate import figures_table

    class Held:
        places = [1, 2, 3]
        bytes = np.array([1_000, 2_000, 3_000])

    figures = {"gzip_bpb": 3.0, "xz_bpb": 3.1, "gzip_together_bpb": 2.0, "xz_together_bpb": 2.1}
    for name, bpb in (("a", 1.0), ("long name", 2.0)):
        figures |= {f"eval/{name}.test/{of}": bpb for of in ("bpb", "loss")}
        figures[f"eval/{name}.test/bpb_se"] = 0.1
    lines = figures_table(figures, {"a": Held, "long name": Held}, "eval/{}.test").splitlines()
    assert lines[0].split("  ")[-2:] == ["bits per byte", "nats per token"]
    assert re.fullmatch(r"held-out long name +3 +6,000 +2\.000 ± 0\.196 +2\.000", lines[2])
    assert re.fullmatch(r"mean of these +1\.500", lines[3])
    assert len({len(line) for line in lines[1:3]}) == 1 and len(lines) == 9
