"""lib/sources.py: where documents come from, and which split they are in."""
import ast
import gzip
import random
import sys
import sysconfig
from collections import Counter
from functools import cache, partial
from pathlib import Path

import fsspec
import hypothesis.strategies as st
import pytest
from corpora import built, documents_of
from hypothesis import given

import data
from data import Document, InputError, Skipped
from lib.readers import jsonl
from lib.sources import definitions, split_of

# ------------------------------------------------------------------------------------------- splits


def test_splits_have_their_shares():
    paths = [f"some/path/{i}.py" for i in range(20_000)]
    splits = Counter(split_of(path, 0.05, 0.1) for path in paths)
    assert splits[1] / 20_000 == pytest.approx(0.05, abs=0.006)
    assert splits[2] / 20_000 == pytest.approx(0.1, abs=0.008)
    assert set(splits) == {0, 1, 2}


def test_the_split_follows_the_path_alone():
    paths = [f"é/{i}" for i in range(2_000)]
    first = [split_of(path, 0.05, 0.1) for path in paths]
    again = [split_of(path, 0.05, 0.1) for path in paths]
    assert first == again
    assert {split_of(path, 0.0, 0.0) for path in paths} == {0}


def test_a_larger_dev_split_takes_from_train_and_never_from_test():
    moves = set()
    for i in range(2_000):
        path = f"é/{i}"
        moves.add((split_of(path, 0.05, 0.1), split_of(path, 0.3, 0.1)))
    assert moves == {(0, 0), (0, 1), (1, 1), (2, 2)}


def test_a_path_that_is_no_unicode_has_a_split():
    """As odd names of files decode."""
    assert {split_of(f"{i}\udcff", 0.3, 0.3) for i in range(100)} == {0, 1, 2}


def grouped():
    """Forty documents in four groups."""
    for i in range(40):
        yield Document(f"{i}", f"{i} tree", {}, f"g{i % 4}")


def test_a_group_shares_a_split(home):
    shard = built(grouped, dev=0.3, test=0.3).shard(0)
    paths = [int(facts["path"]) for facts in shard.documents()]
    expected = [split_of(f"g{path % 4}", 0.3, 0.3) for path in paths]
    assert sorted(paths) == list(range(40))
    assert shard.split.tolist() == expected
    assert len(set(expected)) > 1


# -------------------------------------------------------------------------------------------- files


def write_files(directory: Path, contents: dict[str, bytes]):
    """Write files by their names below a directory."""
    for name, content in contents.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)


def test_text_gives_a_file_or_the_files_of_a_directory(tmp_path):
    """Hidden ones only where they are asked for."""
    write_files(tmp_path, {
        "b.txt": b"two\r\n",
        "a/c.md": b"\xe6\x9c\xa8",
        ".hidden": b"no",
        ".d/e": b"no",
        "a/.f": b"no",
        "empty": b"",
        "bad": b"\xff\xfe\x00",
    })
    assert list(data.text(str(tmp_path))) == [
        Document("a/c.md", "木"),
        Document("b.txt", "two\r\n"),
        Skipped("bad", "undecodable"),
        Document("empty", ""),
    ]
    assert list(data.text(str(tmp_path / "b.txt"))) == [Document("b.txt", "two\r\n")]
    assert list(data.text(str(tmp_path / ".d"))) == [Document("e", "no")]
    cut = list(data.text(str(tmp_path / "bad"), separator="x"))
    assert cut == [Skipped("bad#1", "undecodable")]


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(InputError, match="gone.*does not exist"):
        list(data.text(str(tmp_path / "gone")))


@given(st.text("ab|\n", max_size=30), st.sampled_from(["|", "a|", "\n\n"]))
def test_pieces_cut_at_a_separator_give_the_text_back(tmp_path_factory, content, separator):
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    file.write_text(content, "utf-8", newline="")
    pieces = list(data.text(str(file), separator=separator))

    texts = [piece.text for piece in pieces]
    assert "".join(texts) == content
    assert [piece.path for piece in pieces] == [f"cut.txt#{i + 1}" for i in range(len(pieces))]
    assert all(texts)
    for text in texts[:-1]:
        assert text.count(separator) == 1
        assert text.endswith(separator)


def test_text_takes_a_pattern_but_a_file_s_own_name_goes_first(tmp_path):
    names = ("a.txt", "b/c.txt", "b/d.md", "b/.e.txt", "f[1].txt")
    write_files(tmp_path, {name: name.encode() for name in names})

    def paths(pattern):
        return [document.path for document in data.text(f"{tmp_path}/{pattern}")]

    assert paths("*.txt") == ["a.txt", "f[1].txt"]
    assert paths("**/*.txt") == ["a.txt", "b/c.txt", "f[1].txt"]
    assert paths("b/?.*") == ["c.txt", "d.md"]
    assert paths("f[1].txt") == ["f[1].txt"]
    with pytest.raises(InputError, match="does not exist"):
        paths("*.html")


@pytest.mark.parametrize("path, named", [
    ("s3://bucket/x", "s3fs"),
    ("nowhere://x", "nowhere"),
])
def test_a_protocol_that_is_not_there_is_named(path, named, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=named):
        next(data.text(path))


@pytest.fixture
def far():
    """Two files of the same two lines in a file system that is not the disk's, one packed twice."""
    memory = fsspec.filesystem("memory")
    lines = b'{"text": "one"}\n{"text": "two"}'
    packed = gzip.compress(lines[:16]) + gzip.compress(lines[16:])
    memory.pipe({"/far/a.jsonl": lines, "/far/b.jsonl.gz": packed})
    yield memory
    memory.rm("/far", recursive=True)


def test_files_may_be_remote_and_packed(far):
    found = list(jsonl(path="memory://far/*.jsonl*"))
    assert found == [
        Document("a.jsonl#1", "one"),
        Document("a.jsonl#2", "two"),
        Document("b.jsonl.gz#1", "one"),
        Document("b.jsonl.gz#2", "two"),
    ]
    texts = [document.text for document in data.text("memory://far")]
    assert texts == ['{"text": "one"}\n{"text": "two"}'] * 2


def test_a_change_of_a_remote_file_is_seen(far, home):
    source = partial(jsonl, path="memory://far/*.jsonl*")
    before = built(source, max_skipped=1).total["fingerprint"]
    far.pipe("/far/a.jsonl", b'{"text": "other"}')
    assert built(source, max_skipped=1).total["fingerprint"] != before


def test_the_package_that_zst_needs_is_named(tmp_path, monkeypatch):
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"")
    monkeypatch.delitem(fsspec.compression.compr, "zstd", raising=False)
    with pytest.raises(InputError, match="backports.zstd"):
        next(data.text(str(file)))


def test_zst_is_read_up_to_where_it_breaks_off(tmp_path, monkeypatch):
    zstd = pytest.importorskip("backports.zstd", reason="backports.zstd is not installed")
    monkeypatch.setitem(fsspec.compression.compr, "zstd", zstd.ZstdFile)
    lines = [f"{random.Random(i).random()}\n" for i in range(20_000)]
    content = "".join(lines)
    packed = zstd.compress(content.encode())
    file = tmp_path / "a.txt.zst"

    file.write_bytes(packed)
    assert next(data.text(str(file))) == Document("a.txt.zst", content)

    file.write_bytes(packed[:-1000])
    *before, last = data.text(str(file), "\n")
    assert last == Skipped("a.txt.zst", "truncated archive")
    assert len(before) > 1_000
    assert [document.text for document in before] == lines[:len(before)]


# ----------------------------------------------------------------------------- the standard library


def test_stdlib_gives_modules_with_their_names():
    found = {document.path: document for document in documents_of(data.stdlib)}
    assert list(found) == sorted(found, key=lambda path: Path(path).parts)
    assert len(found) > 300
    assert found["json/decoder.py"].meta == {"module": "json.decoder", "domain": "json"}
    assert found["json/__init__.py"].meta == {"module": "json", "domain": "json"}
    assert found["os.py"].meta == {"module": "os", "domain": "os"}
    library = Path(sysconfig.get_path("stdlib"))
    for path in ("os.py", "json/decoder.py"):
        assert found[path].text.encode() == (library / path).read_bytes()


def test_stdlib_leaves_out_what_it_says():
    parts = set()
    for item in data.stdlib():
        parts |= set(Path(item.path).parts)
    out = {"idlelib", "lib2to3", "encodings", "__pycache__", "site-packages", "dist-packages"}
    assert not parts & out
    assert not [part for part in parts if part.startswith("test")]
    assert {"unittest", "asyncio", "ast.py"} <= parts


@cache
def library_definitions() -> list[Document]:
    """The functions and classes of the standard library, which take seconds to read."""
    return documents_of(partial(data.stdlib, unit="definition"))


def test_definitions_stand_in_their_module_and_share_its_split():
    modules = {document.path: document.text for document in documents_of(data.stdlib)}
    found = library_definitions()
    assert len(found) > 4_000
    for definition in found:
        path, _, _ = definition.path.partition(":")
        assert definition.group == path
        assert definition.text in modules[path]
        assert definition.meta["module"].startswith(definition.meta["domain"])


def test_definitions_are_found_by_their_names():
    texts = {definition.path: definition.text for definition in library_definitions()}
    (node,) = ast.parse(texts["json/decoder.py:JSONDecoder"]).body
    assert node.name == "JSONDecoder"
    assert texts["bisect.py:insort_right"].startswith("def insort_right(")
    assert texts["functools.py:lru_cache"].startswith("def lru_cache(")
    assert texts["contextlib.py:contextmanager"].endswith("return helper\n")


def test_stdlib_refuses_a_unit_that_it_does_not_have():
    with pytest.raises(InputError, match="'function'.*definition"):
        next(data.stdlib(unit="function"))


MODULE = (
    '@one(\n 1)\n@two\ndef f():\r\n    "\x0c \u2028"\r\n\n'
    "x = 1\n"
    "async def g(): pass\n"
    "class C:\n  def h(s): 0"
)


def test_definitions_have_their_decorators_and_odd_line_ends():
    assert definitions(Document("m.py", MODULE)) == [
        Document("m.py:f", '@one(\n 1)\n@two\ndef f():\r\n    "\x0c \u2028"\r\n', group="m.py"),
        Document("m.py:g", "async def g(): pass\n", group="m.py"),
        Document("m.py:C", "class C:\n  def h(s): 0", group="m.py"),
    ]


def test_a_module_that_cannot_be_parsed_is_skipped():
    assert definitions(Document("m.py", "print 1")) == [Skipped("m.py", "unparsable")]
