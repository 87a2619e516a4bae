"""Any text of yours by one flag: forms, sizes, how long, and the commands of the pages."""
import gzip
import json
import re
import shlex
import sys
import types
from dataclasses import replace
from functools import partial

import fsspec
import pytest
from conftest import prose
from fsspec.implementations.memory import MemoryFileSystem
from test_docs import shell_lines

import train
from configs.base import TOKENS_PER_PARAM, budget, ladder, rung
from data import DataConfig, Document, InputError, Source
from lib.any_text import any_text, survey
from lib.config import ROOT, load_file
from lib.edits import stack
from lib.length import WAYS
from lib.study import Study
from model import count
from train import load_config

MINE = str(ROOT / "configs/mine.py")
TEXTS = [prose(i, 200 + 30 * i) for i in range(60)]
RECORDS = [{"text": text, "title": f"T{i}", "body": {"text": text}} for i, text in enumerate(TEXTS)]
SMALL = ("--model.layers 1 --model.embed 32 --model.mlp 32 --model.unroll 1 --phases.0.steps 2 "
         "--phases.0.seq 32 --phases.0.batch 8 --overlap 8 --eval_every 2 --eval_tokens 500 "
         "--sample_tokens 4 --data.dev 0.2 --data.test 0.2")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "FILE.jsonl").write_text(lines)
    (tmp_path / "corpus.jsonl").write_text(lines)
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:9]))
    (tmp_path / "records.json").write_text(json.dumps(RECORDS))
    (tmp_path / "book.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "notes").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / f"notes/{i:02}.md").write_text(text)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table
    for name, records in (("corpus", RECORDS), ("val", RECORDS[:9])):
        write_table(pyarrow.Table.from_pylist(records), tmp_path / f"{name}.parquet")
    return tmp_path


def texts(path, **how) -> list[str]:
    return [item.text for item in any_text(str(path), **how) if isinstance(item, Document)]


# -------------------------------------------------------------------------------------------------- any text


@pytest.mark.parametrize("path", [
    "corpus.jsonl", "corpus.jsonl.gz", "corpus.parquet", "records.json", "notes", "notes/*.md", "*.parquet"])
def test_every_form_gives_the_same_texts(here, path):
    expected = TEXTS + TEXTS[:9] if path == "*.parquet" else TEXTS
    assert texts(here / path) == expected


def test_a_text_that_is_alone_is_cut_at_blank_lines(here):
    assert [text.strip() for text in texts(here / "book.txt")] == [text.strip() for text in TEXTS]
    assert texts(here / "book.txt", separator="") == ["\n\n".join(TEXTS)]
    assert texts(here / "notes", separator="\n") == [
        line for text in TEXTS for line in text.splitlines(keepends=True)]


@pytest.mark.parametrize("content, number", [
    ('[{"text": "a"}, {"text": "b"}]', 2), ('{"text": "a"}', 1), ('{"text": "a"}\n{"text": "b"}\n', 2),
    ('{\n "text": "a"\n}\n', 1)])
def test_json_is_a_list_or_a_record_or_lines(tmp_path, content, number):
    (tmp_path / "x.json").write_text(content)
    found = list(any_text(str(tmp_path / "x.json")))
    assert [item.text for item in found] == ["a", "b"][:number]
    assert [item.path for item in found] == [f"x.json#{i + 1}" for i in range(number)]


def test_json_knows_damage(tmp_path):
    (tmp_path / "x.json").write_text('[{"text": 1}, {"other": "b"}, "c", {"text": "d"}]')
    kinds = [getattr(item, "kind", item) for item in any_text(str(tmp_path / "x.json"))]
    assert kinds[:3] == ["not text", "missing key", "missing key"] and kinds[3].text == "d"


def test_of_several_kinds_the_largest_is_read(here):
    """The others are named; one may ask for another; pictures among texts are no damage."""
    (here / "notes/x.jsonl").write_text('{"text": "one"}\n')
    (here / "notes/picture.png").write_bytes(b"\x89PNG\xff\xfe" * 9)
    seen = survey(str(here / "notes"))
    assert (seen.kind, len(seen.files), seen.left_out) == ("text", 61, {".jsonl": 1})
    assert texts(here / "notes") == TEXTS
    skipped = [item for item in any_text(str(here / "notes")) if not isinstance(item, Document)]
    assert [(item.path, item.kind) for item in skipped] == [("picture.png", "no text")]
    assert texts(here / "notes", kind="jsonl") == ["one"]
    (here / "lines.txt").write_text('{"text": "two"}\n')
    assert texts(here / "lines.txt", kind="jsonl") == ["two"]


def test_held_out_files_among_the_others_are_left_out(here):
    without = str(here / "notes/0*.md")
    assert texts(here / "notes", without=without) == TEXTS[10:]
    size = sum(len(text.encode()) for text in TEXTS[10:])
    assert survey(str(here / "notes"), without=without).bytes == size


def test_what_datasets_saved_is_read_by_it(tmp_path, monkeypatch):
    """One data set, or several of which one is read."""
    one = [{"text": "a"}, {"text": "b"}]
    several = {"train": one, "test": one[:1]}
    fake = types.SimpleNamespace(load_from_disk=lambda place: several if place.endswith("several") else one)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    for name, files in (("one", ["state.json"]), ("several", ["dataset_dict.json", "train/state.json"])):
        for file in (*files, "data-00000-of-00001.arrow"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
    assert texts(tmp_path / "one") == texts(tmp_path / "several") == ["a", "b"]
    assert texts(tmp_path / "several", split="test") == ["a"]


# ------------------------------------------------------------------------------------------------- elsewhere


class Hub(MemoryFileSystem):
    """In place of the Hub's file system: what it holds lies in memory."""

    protocol = "hf"
    store, pseudo_dirs = {}, [""]


class Unreachable(Exception):
    """What an HTTP client raises that is no OSError."""


class NoNetwork(Hub):
    """Without a network."""

    def find(self, *_, **__):
        raise Unreachable("[Errno -2] Name or service not known")


KNOWN = sys.modules["fsspec.registry"]._registry  # file systems by protocol, once they are imported


def on_the_hub(monkeypatch, kind):
    monkeypatch.setitem(KNOWN, "hf", kind)


def test_a_path_on_the_hub_is_read_by_its_pattern(monkeypatch):
    """By the same code as a bucket; the pattern is that of docs/data.md."""
    on_the_hub(monkeypatch, Hub)
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS[:5]).encode()
    for i in range(2):
        with fsspec.open(f"hf://datasets/ORG/NAME/{i}.jsonl", "wb") as file:
            file.write(lines)
    assert texts("hf://datasets/ORG/NAME/*.jsonl") == TEXTS[:5] * 2
    assert texts("hf://datasets/ORG/NAME") == TEXTS[:5] * 2
    seen = survey("hf://datasets/ORG/NAME/*.jsonl")
    assert [name for name, _ in seen.files] == ["0.jsonl", "1.jsonl"] and seen.bytes == 2 * len(lines)


def test_without_a_network_or_the_package_there_is_one_sentence(monkeypatch, tmp_path, capsys):
    path = "hf://datasets/ORG/NAME/*.parquet"
    line = [MINE, "--path", path, "--runs", str(tmp_path)]
    on_the_hub(monkeypatch, NoNetwork)
    assert train.main(line) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "mine:" not in said.out
    assert path in said.err and "Name or service not known" in said.err and "is there a network" in said.err
    monkeypatch.delitem(KNOWN, "hf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert train.main(line) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "huggingface_hub" in said


# ---------------------------------------------------------------------------------------------- mine chooses


def test_it_says_what_it_chose(here, capsys):
    config = load_config(MINE, path="notes", held_out="notes/0*.md")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(line.startswith("mine: ") for line in said)
    assert said[0].startswith("mine: notes: 50 files read as text, about 0.0")
    assert said[1] == "mine: held out: notes/0*.md"
    phase = config.phases[0]
    assert f"{phase.steps} steps of {phase.batch} x {phase.seq} tokens" in said[2]
    assert config.data.tokenizer == "bytes"  # so little
    assert config.data.held_out["mine"].documents.keywords["path"] == "notes/0*.md"
    train.check(config)
    load_config(MINE, path="corpus.parquet")
    assert "5 % of the documents for dev and 5 % for test" in capsys.readouterr().out


def test_depth_and_length_follow_from_how_much_there_is(here, capsys):
    """A token a parameter in four passes, which it takes; 3 million tokens at most; of little text bytes."""
    mine = load_file(MINE)
    assert [mine.depth_for(tokens) for tokens in (0, 1e5, 2e5, 4e5, 7e5, 1e6, 1e12)] == [2, 2, 3, 4, 5, 6, 6]
    size = (here / "corpus.jsonl").stat().st_size
    for repeats in (1, 12, 40, 400):
        (here / "much.jsonl").write_text((here / "corpus.jsonl").read_text() * repeats)
        config = load_config(MINE, path="much.jsonl")
        little = repeats * size < mine.LITTLE
        passes = 4 * repeats * size / (1 if little else 3)
        assert config.model.layers == mine.depth_for(passes)
        assert config.model.vocab == (258 if little else 16 * config.model.embed)
        phase = config.phases[0]
        assert budget(config) == pytest.approx(min(passes, 3e6), abs=phase.batch * phase.seq / 2)
        assert config.schedule.warmup == phase.steps // 8
    assert "mine: depth 6: 6 layers of width 96 over 1,536 pieces, " in capsys.readouterr().out


def test_a_depth_that_is_asked_for_is_that_of_the_ladder(here, capsys):
    """At most 20 tokens a parameter are read, and four passes."""
    (here / "much.jsonl").write_text((here / "corpus.jsonl").read_text() * 40)
    for path, depth in (("much.jsonl", 2), ("book.txt", 9)):
        config = load_config(MINE, path=path, depth=depth)
        assert config.model == rung(depth)
        assert budget(config) <= 1.01 * TOKENS_PER_PARAM * count(rung(depth))
    assert config.data.tokenizer == "bpe" and config.data.stream and config.data.sources.keys() == {"mine"}
    assert config.phases == ladder(9, 4 * (here / "book.txt").stat().st_size / 3).phases


def test_a_model_to_start_from_has_its_own_shape_and_tokenizer(here, capsys):
    """Which little text would otherwise set to bytes."""
    config, _ = train.parse([MINE, "--path", "notes", "--init_from", "hf:DIR"])
    assert (config.init_from, config.data.tokenizer) == ("hf:DIR", "bpe")
    assert "the model of hf:DIR, " in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (["--path", "gone.jsonl"], "'gone.jsonl' cannot be read: does not exist"),
    (["--path", "notes", "--held_out", "gone"], "'gone' cannot be read"),
    (["--path", "notes", "--kind", "csv"], "--kind of"),
    (["--path", "notes", "--depth", "-1"], "--depth of"),
    (["--path", "notes", "--depth", "deep"], "'deep' (str); allowed is an integer, 0 or more, at most 100"),
    (["--path", "corpus.jsonl", "--content", "body.txt"], "no key 'body.txt'"),
    (["--path", "notes", "--tokens", "1e6", "--epochs", "2"], "tokens 1e+06 and epochs 2"),
    (["--path", "notes", "--epochs", "2", "--data.stream", "true"], "data.stream is true"),
    (["--path", "notes", "--tokens", "10"], "more than half a batch"),
    (["--path", "notes", "--tokens", "-1"], "tokens is -1"),
    ([], "needs --path VALUE"),
])
def test_mistakes_are_one_sentence(here, capsys, flags, said):
    assert train.main([MINE, "--runs", str(here / "runs"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


# -------------------------------------------------------------------------------------------------- how long


def two_phases(tiny, path, **fields) -> train.Config:
    """One phase of 30 steps of 256 tokens, one of 10 of 512 with twice the layers."""
    source = Source(partial(any_text, path=str(path)))
    phases = (train.Phase(steps=30, batch=8, seq=32),
              train.Phase(steps=10, batch=16, seq=32, edits=(partial(stack, times=2),)))
    return train.Config(
        model=tiny, data=DataConfig(sources={"a": source}, tokenizer="bytes", dev=0.1, test=0.1),
        phases=phases, overlap=8, **fields)


def lengths(config) -> list[int]:
    return [phase.steps for phase in train.prepare(config).config.phases]


def test_a_length_in_tokens_keeps_the_proportions_of_the_phases(here, tiny):
    config = two_phases(tiny, here / "notes")
    assert lengths(config) == [30, 10]  # 12,800 tokens
    assert lengths(replace(config, tokens=25_600.0)) == [60, 20]
    assert lengths(replace(config, tokens=1_280.0)) == [3, 1]
    assert lengths(replace(config, tokens=12_800.0)) == [30, 10]
    assert lengths(replace(config, tokens=25_600.0, eval_at=(80,))) == [60, 20]
    with pytest.raises(InputError, match="eval_at"):
        lengths(replace(config, tokens=1_280.0, eval_at=(5,)))


def test_a_length_in_tokens_a_parameter_is_of_the_last_model(here, tiny):
    config = two_phases(tiny, here / "notes", tokens_per_param=0.5)
    run = train.prepare(config)
    assert run.plan.models[-1].layers == 2 * tiny.layers
    assert run.plan.tokens[-1] == pytest.approx(0.5 * count(run.plan.models[-1]), abs=512)
    assert not any(getattr(run.config, way) for way in WAYS)


def test_a_length_in_epochs_is_in_passes_over_the_training_documents(here, tiny):
    run = train.prepare(two_phases(tiny, here / "notes", epochs=3.0))
    assert run.loader.epochs(run.plan.total)["a"] == pytest.approx(3, abs=0.03)


def test_config_json_has_the_steps_and_the_same_command_resumes(here, capsys):
    """A longer one goes on where the rates of the steps taken stay what they were."""
    line = [MINE, "--path", "notes", "--runs", "runs", *SMALL.split(), "--schedule.shape", "constant",
            "--schedule.warmup", "2"]
    assert train.main([*line, "--tokens", "1280"]) == 0
    written = json.loads((here / "runs/mine/config.json").read_text())
    assert written["phases"][0]["steps"] == 5 and written["tokens"] == 0
    capsys.readouterr()
    assert train.main([*line, "--tokens", "1280"]) == 0
    assert "resuming from step 5: this run is complete" in capsys.readouterr().out
    assert train.main([*line, "--tokens", "1792"]) == 0
    assert "step 7/7" in capsys.readouterr().out


def test_a_study_is_told_steps(tiny, here):
    config = two_phases(tiny, here / "notes", tokens=1e6)
    with pytest.raises(InputError, match="arms.a says how long it is by tokens; allowed in a study"):
        Study(question="?", arms={"a": config})


# ------------------------------------------------------------------------------------------------- the pages


def page_lines(page: str, head: str) -> list[str]:
    """The commands below a heading of a page."""
    text = (ROOT / page).read_text("utf-8")
    part = text.split(f"## {head}\n")[1].split("\n## ")[0]
    return [line for line in shell_lines(ROOT / page) if line.split("#")[0].strip() in part]


PAGES = [("docs/data.md", "Any text of yours"), ("docs/data.md", "Splits"), ("README.md", "Your own text")]


def commands():
    """Every command of the pages, as a case."""
    for page, head in PAGES:
        yield from page_lines(page, head)


def words_of(line: str) -> list[str]:
    """A command's words after `python train.py`; with fewer steps and a small model where it trains."""
    words = shlex.split(line.removeprefix("python train.py"))
    if words[0] == "eval":
        return words
    return [str(ROOT / words[0]), *words[1:], *SMALL.split()]


@pytest.mark.parametrize("line", [line for line in commands() if "eval" not in line])
def test_a_command_of_the_pages_comes_to_its_first_batch(here, line):
    """Read, tokenized and packed; the next test trains them too."""
    run = train.prepare(*train.parse(words_of(line)))
    text = run.tokenizer.decode(run.loader.batch(1).arrays["tokens"][0])
    assert text[:20] in "\n\n".join(TEXTS) or "T" in text
    assert bool(run.held_out) == ("--held_out" in line)


@pytest.mark.readme
@pytest.mark.parametrize("line", list(commands()))
def test_a_command_of_the_pages_runs_as_it_stands(here, line, capsys):
    """Each to its end, `eval` after the run that it is of. By hand: pytest -n 0 -m readme."""
    words = words_of(line)
    if words[0] == "eval":
        own = ["--held_out", "val.jsonl"]
        assert train.main([MINE, "--path", "corpus.jsonl", *own, *SMALL.split()]) == 0
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"held-out (mine|val) +\d+ +[\d,]+ +\d\.\d+ ± ", out)
    assert (here / "runs/mine/summary.json").is_file()


def test_the_pages_have_commands():
    found = list(commands())
    assert len(found) >= 9 and len(set(found)) == len(found)
    assert sum("held_out" in line for line in found) >= 2 and any("eval" in line for line in found)


def test_inspect_shows_documents_and_says_what_it_counts(here, capsys):
    """Below each row the paths of its pieces, in their order; at the end counts in words."""
    line = ["corpus", "inspect", MINE, "--path", "notes", "--rows", "2", *SMALL.split()]
    assert train.main([*line, "--phases.0.seq", "256"]) == 0
    out = capsys.readouterr().out
    found = re.findall(r"pieces of: (.*)", out)
    assert len(found) == 2
    for number, paths in enumerate(found):
        row = out.split(f"row {number} of step 1")[1]
        segments = int(re.search(r"mine: (\d+) segments", row)[1])
        texts = row.split("with loss\n")[1].split("|")
        assert len(paths.split(", ")) == segments
        for path, text in zip(paths.split(", "), texts, strict=False):
            whole = (here / "notes" / path).read_text()
            assert " ".join(text.split()) in " ".join(whole.split())  # a terminal has no tabs
    share = r"\d+\.\d%"
    assert re.search(f"all 8 rows of the step: {share} of the positions are padding, ", out)
    assert re.search(rf", \S+ pieces of documents a row, {share} of the pieces end before ", out)
