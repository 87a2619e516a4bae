"""lib/sources.py: splits, files near and far, the standard library, definitions."""
import ast
import gzip
import random
import sys
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path

import fsspec
import hypothesis.strategies as st
import pytest
from corpora import built
from hypothesis import given

import data
from data import Document, InputError, Skipped
from lib.readers import jsonl
from lib.sources import definitions, split_of

# ----------------------------------------------------------------------------------------------------- splits


def test_splits_have_their_shares():
    splits = Counter(split_of(f"some/path/{i}.py", 0.05, 0.1) for i in range(20_000))
    assert splits[1] / 20_000 == pytest.approx(0.05, abs=0.006)
    assert splits[2] / 20_000 == pytest.approx(0.1, abs=0.008)
    assert set(splits) == {0, 1, 2}


def test_split_follows_the_path_alone():
    """The same for any shares that leave it room: a larger dev split takes from train, never from test."""
    paths = [f"é/{i}" for i in range(2_000)]
    few, more = ([split_of(p, dev, 0.1) for p in paths] for dev in (0.05, 0.3))
    assert few == [split_of(p, 0.05, 0.1) for p in paths]
    assert all((a == 2) == (b == 2) and (a != 1 or b == 1) for a, b in zip(few, more, strict=True))
    assert {split_of(p, 0.0, 0.0) for p in paths} == {0}
    assert {split_of(f"{i}\udcff", 0.3, 0.3) for i in range(100)} == {0, 1, 2}  # as odd names decode


# ------------------------------------------------------------------------------------------------------ files


def test_stdlib_gives_modules_with_their_names():
    found = {d.path: d for d in data.stdlib() if isinstance(d, Document)}
    assert list(found) == sorted(found, key=lambda p: Path(p).parts) and len(found) > 300
    assert found["json/decoder.py"].meta == dict(module="json.decoder", domain="json")
    assert found["json/__init__.py"].meta == dict(module="json", domain="json")
    assert found["os.py"].meta == dict(module="os", domain="os")
    library = Path(sysconfig.get_path("stdlib"))
    for path in ("os.py", "json/decoder.py"):
        assert found[path].text.encode() == (library / path).read_bytes()


def test_stdlib_leaves_out_what_it_says():
    parts = {part for d in data.stdlib() for part in Path(d.path).parts}
    out = {"idlelib", "lib2to3", "encodings", "__pycache__", "site-packages", "dist-packages"}
    assert not parts & out and not any(part.startswith("test") for part in parts)
    assert {"unittest", "asyncio", "ast.py"} <= parts


def test_text_gives_a_file_or_a_directory(tmp_path):
    for name, content in {"b.txt": b"two\r\n", "a/c.md": b"\xe6\x9c\xa8", ".hidden": b"no", ".d/e": b"no",
                          "a/.f": b"no", "empty": b"", "bad": b"\xff\xfe\x00"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert list(data.text(str(tmp_path))) == [
        Document("a/c.md", "木"), Document("b.txt", "two\r\n"), Skipped("bad", "undecodable"),
        Document("empty", "")]
    assert list(data.text(str(tmp_path / "b.txt"))) == [Document("b.txt", "two\r\n")]
    assert list(data.text(str(tmp_path / ".d"))) == [Document("e", "no")]  # hidden, but asked for
    assert list(data.text(str(tmp_path / "bad"), separator="x")) == [Skipped("bad#1", "undecodable")]


def test_missing_path_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="gone.*does not exist"):
        list(data.text(str(tmp_path / "gone")))


@given(st.text("ab|\n", max_size=30), st.sampled_from(["|", "a|", "\n\n"]))
def test_pieces_cut_at_a_separator_give_the_text_back(tmp_path_factory, content, separator):
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    file.write_text(content, "utf-8", newline="")
    pieces = list(data.text(str(file), separator=separator))
    assert "".join(p.text for p in pieces) == content
    assert [p.path for p in pieces] == [f"cut.txt#{i}" for i in range(1, len(pieces) + 1)]
    assert all(p.text.count(separator) == 1 and p.text.endswith(separator) for p in pieces[:-1])
    assert all(p.text for p in pieces)


def test_text_takes_a_pattern(tmp_path):
    for name in ("a.txt", "b/c.txt", "b/d.md", "b/.e.txt", "f[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    def paths(path):
        return [d.path for d in data.text(f"{tmp_path}/{path}")]
    assert paths("*.txt") == ["a.txt", "f[1].txt"]
    assert paths("**/*.txt") == ["a.txt", "b/c.txt", "f[1].txt"]
    assert paths("b/?.*") == ["c.txt", "d.md"]
    assert paths("f[1].txt") == ["f[1].txt"]  # a file's own name goes first
    with pytest.raises(InputError, match="does not exist"):
        paths("*.html")


@pytest.mark.parametrize("path,why", [("s3://bucket/x", "s3fs"), ("nowhere://x", "nowhere")])
def test_protocols_that_are_not_there_are_named(path, why, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=why):
        next(data.text(path))


def test_files_may_be_remote_and_packed(home):
    memory = fsspec.filesystem("memory")
    lines = b'{"text": "one"}\n{"text": "two"}'
    packed = gzip.compress(lines[:16]) + gzip.compress(lines[16:])
    memory.pipe({"/far/a.jsonl": lines, "/far/b.jsonl.gz": packed})
    source = partial(jsonl, path="memory://far/*.jsonl*")
    assert list(source()) == [Document(f"{name}#{n}", text) for name in ("a.jsonl", "b.jsonl.gz")
                              for n, text in ((1, "one"), (2, "two"))]
    assert [d.text for d in data.text("memory://far")] == [lines.decode()] * 2
    first = built(source, max_skipped=1)
    memory.pipe("/far/a.jsonl", b'{"text": "other"}')  # a change is seen
    assert built(source, max_skipped=1).total["fingerprint"] != first.total["fingerprint"]
    memory.rm("/far", recursive=True)


def test_zst_is_read_or_its_package_named(tmp_path, monkeypatch):
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"")
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    with pytest.raises(InputError, match="backports.zstd"):
        next(data.text(str(file)))
    zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is not installed")
    monkeypatch.setitem(fsspec.compression.compr, "zstd", zstd.ZstdFile)
    content = "".join(f"{random.Random(i).random()}\n" for i in range(20_000))
    file.write_bytes(zstd.compress(content.encode()))
    assert next(data.text(str(file))) == Document("a.txt.zst", content)
    file.write_bytes(file.read_bytes()[:-1000])
    *before, last = data.text(str(file), "\n")
    assert last == Skipped("a.txt.zst", "truncated archive")
    assert content.startswith("".join(d.text for d in before)) and len(before) > 1_000


# ------------------------------------------------------------------------------------------------ definitions


def test_definitions_are_of_the_split_of_their_module():
    modules = {d.path: d.text for d in data.stdlib() if isinstance(d, Document)}
    found = [d for d in data.stdlib(unit="definition") if isinstance(d, Document)]
    assert len(found) > 4_000
    for d in found:
        path, _, name = d.path.partition(":")
        assert d.group == path and d.text in modules[path] and d.meta["module"].startswith(d.meta["domain"])
    texts = {d.path: d.text for d in found}
    (node,) = ast.parse(texts["json/decoder.py:JSONDecoder"]).body
    assert node.name == "JSONDecoder"
    assert texts["bisect.py:insort_right"].startswith("def insort_right(") and texts["functools.py:lru_cache"]
    assert texts["contextlib.py:contextmanager"].endswith("return helper\n")
    with pytest.raises(InputError, match="'function'.*definition"):
        next(data.stdlib(unit="function"))


def test_definitions_have_decorators_and_odd_line_ends():
    text = ('@one(\n 1)\n@two\ndef f():\r\n    "\x0c \u2028"\r\n\nx = 1\n'
            "async def g(): pass\nclass C:\n  def h(s): 0")
    found = definitions(Document("m.py", text))
    assert [(d.path, d.text) for d in found] == [
        ("m.py:f", '@one(\n 1)\n@two\ndef f():\r\n    "\x0c \u2028"\r\n'),
        ("m.py:g", "async def g(): pass\n"), ("m.py:C", "class C:\n  def h(s): 0")]
    assert definitions(Document("m.py", "print 1")) == [Skipped("m.py", "unparsable")]


def grouped():
    """Forty documents in four groups."""
    return (Document(f"{i}", f"{i} tree", {}, f"g{i % 4}") for i in range(40))


def test_a_group_shares_a_split(home):
    cache = built(grouped, dev=0.3, test=0.3)
    shard = cache.shard(0)
    splits = {int(d["path"]): int(s) for d, s in zip(shard.documents(), shard.split, strict=True)}
    assert splits == {i: split_of(f"g{i % 4}", 0.3, 0.3) for i in range(40)}
    assert len(set(splits.values())) > 1
