"""lib/sources.py and lib/readers.py: splits, files near and far, records, damage counted exactly, definitions."""
import ast
import gzip
import importlib.util
import json
import random
import subprocess
import sys
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path

import fsspec
import hypothesis.strategies as st
import pytest
from hypothesis import given

import data
from data import DataConfig, Document, InputError, Skipped, Source
from lib.cache import build
from lib.readers import jsonl
from lib.sources import definitions, split_of
from lib.tokenizers import Bytes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache home that nothing has been put in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def built(documents, **fields):
    """The cache of one source in bytes."""
    return build("x", DataConfig(sources={"x": Source(documents)}, **fields), Bytes(), 0)


def kept(cache):
    """{path: text} of a cache in bytes."""
    return {d["path"]: Bytes().decode(s.tokens[s.offsets[n]:s.offsets[n + 1]])
            for s in map(cache.shard, range(cache.total["shards"])) for n, d in enumerate(s.documents())}


def kinds(counts):
    """{kind: how many} of what is counted as skipped."""
    return {k.removeprefix("skipped: "): n for k, n in counts.items() if k.startswith("skipped")}


def skipped(cache):
    """{kind: how many} of what a cache left out."""
    return kinds(cache.total["counts"])


def config_file(name):
    """A file of configs/ as a module."""
    spec = importlib.util.spec_from_file_location(f"config_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


# ------------------------------------------------------------------------------------------------------ JSONL


def write_lines(path, records):
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return str(path)


def test_jsonl_takes_keys_templates_metadata_and_names(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [
        dict(id=7, title="T{x}", body=dict(text="é\r\n\u2028木 \\n", by=["me"]), n=None)])
    def one(**names):
        return next(jsonl(path, **names))
    assert one(content="body.text") == Document("a.jsonl#1", "é\r\n\u2028木 \\n")
    assert one(content="{title}\n\n<{body.text}>").text == "T{x}\n\n<é\r\n\u2028木 \\n>"
    assert one(content="title", meta=("body.by", "n"), key="id") == Document(
        "7", "T{x}", {"body.by": ["me"], "n": None})
    for names, kind in ((dict(), "missing key"), (dict(content="title.a"), "missing key"),
                        (dict(content="title", meta=["a"]), "missing key"), (dict(content="n"), "not text"),
                        (dict(content="{title}{id}"), "not text"), (dict(content="body"), "not text")):
        assert one(**names) == Skipped("a.jsonl#1", kind)


def test_jsonl_knows_each_kind_of_damage(tmp_path):
    good, long = b'{"text": "tree"}', b'{"text": "' + b"x" * 88 + b'"}'
    cases = [(b"\xef\xbb\xbf" + good, "tree"), (b"", "empty"), (b" \t\r", "empty"), (b"{", "malformed JSON"),
             (good + good, "malformed JSON"), (b"[" * 100_000, "over-long line"), (b"\xff", "undecodable"),
             (b"3", "missing key"), (b'["text"]', "missing key"), (b'"text"', "missing key"),
             (b"{}", "missing key"), (b'{"text": 3}', "not text"), (b'{"text": null}', "not text"),
             (long[1:-1], "malformed JSON"), (long, "over-long line"), (long * 5, "over-long line"),
             (good, "tree"), (long * 3, "over-long line")]
    (tmp_path / "a").write_bytes(b"\n".join(case for case, _ in cases))
    found = list(jsonl(str(tmp_path / "a"), longest=100))
    assert [d.text if isinstance(d, Document) else d.kind for d in found] == [what for _, what in cases]
    assert [d.path for d in found] == [f"a#{i}" for i in range(1, len(cases) + 1)]
    (tmp_path / "deep").write_bytes(b"[" * 100_000)
    assert list(jsonl(str(tmp_path / "deep"))) == [Skipped("deep#1", "malformed JSON")]


def test_of_a_truncated_archive_what_stands_before_the_break_is_kept(tmp_path):
    content = b"".join(b'{"text": "%d"}\n' % random.Random(i).getrandbits(90) for i in range(20_000))
    packed = gzip.compress(content)
    for n in (5, 100, 70_000, len(packed) - 1):
        (tmp_path / "a.gz").write_bytes(packed[:n])
        *before, last = jsonl(str(tmp_path / "a.gz"))
        assert last == Skipped("a.gz", "truncated archive")
        stood = content.splitlines()[:len(before)]
        assert [d.text for d in before] == [json.loads(line)["text"] for line in stood]
        assert len(before) / 20_000 >= n / len(packed) - 0.05
    (tmp_path / "a.gz").write_bytes(packed[:50_000] + b"broken" + packed[50_006:])
    *before, last = data.text(str(tmp_path / "a.gz"), "\n")
    assert before and isinstance(last, Skipped)


# ----------------------------------------------------------------------------------------- damage, in a build

DAMAGE = ("undecodable", "empty", "missing key", "malformed JSON", "over-long line", "not text")


def generate(directory: Path, size: int) -> tuple[dict, dict]:
    """About `size` bytes of JSON Lines in plain and packed files, 1 % of each kind of damage by line, and one
    in 33 archives truncated. Returns ({kind: how many}, {"documents" and "bytes": of what is good}).

    A truncated archive has a second member, of one line, which is cut.
    """
    rng, counts, good, written, number = random.Random(0), Counter(), Counter(), 0, 0
    words = [rng.randbytes(4).hex() for _ in range(500)] + ["é", "木", "\u2028", "\\", '"', "\x10"]
    while written < size or number < 3:
        lines = []
        for _ in range(2_000):
            text = " ".join(rng.choices(words, k=rng.randrange(20, 180)))
            kind = DAMAGE[i] if (i := int(rng.random() * 100)) < len(DAMAGE) else ""
            line = json.dumps(dict(doc=dict(text=text)), ensure_ascii=False).encode()
            if kind:
                counts[kind] += 1
                line = {"undecodable": line[:20] + b"\xff" + line[20:],
                        "empty": rng.choice([b"", b'{"doc":{"text":""}}']),
                        "missing key": line.replace(b"text", b"test"), "malformed JSON": line[:-2],
                        "over-long line": b"x" * 40_000, "not text": b'{"doc": {"text": [1]}}'}[kind]
            else:
                good.update(documents=1, bytes=len(text.encode()))
            lines.append(line)
        content = b"\n".join(lines) + b"\n"
        packed, written = number % 3 == 1, written + len(content)
        if packed:
            content = gzip.compress(content, 1)
            if number % 100 == 1:
                counts["truncated archive"] += 1
                content += gzip.compress(b'{"doc": {"text": "never"}}\n')[:-9]
        (directory / f"{number:04d}.jsonl{'.gz' * packed}").write_bytes(content)
        number += 1
    return dict(counts), dict(good)


BUILD = """
import json, sys, time
from functools import partial
sys.path.insert(0, sys.argv[1])
import data
from lib.cache import build
from lib.readers import jsonl
from lib.tokenizers import Bytes
source = data.Source(partial(jsonl, path=sys.argv[2], content="doc.text", longest=30_000))
start = time.time()
cache = build("x", data.DataConfig(sources={"x": source}, tokenizer="bytes"), Bytes(), 0)
status = open("/proc/self/status").read()  # ru_maxrss would begin with what the parent had
gib = int(status.split("VmHWM:")[1].split()[0]) / 2**20
print(json.dumps([cache.total["counts"], gib, time.time() - start]))
"""


@pytest.mark.parametrize("size", [2_000_000, pytest.param(1_000_000_000, marks=pytest.mark.soak)])
def test_damage_is_counted_exactly_within_2_gib(home, tmp_path, size):
    (tmp_path / "in").mkdir()
    damage, good = generate(tmp_path / "in", size)
    command = [sys.executable, "-c", BUILD, ROOT, tmp_path / "in"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    counts, gib, seconds = json.loads(made.stdout.splitlines()[-1])
    print(f"{size:,} bytes: {seconds:.0f} s, {gib:.2f} GiB, {counts}")
    assert kinds(counts) == damage
    assert {k: counts[k] for k in good} == good
    assert counts["read"] == good["documents"] + sum(damage.values())
    assert gib < 2


def test_tokenizing_keeps_every_byte_around_damage(home, tmp_path):
    texts = {f"a#{2 * i + 1}": f"é\r\n\x00\u2581{i}\x10 " * (i % 7 + 1) for i in range(300)}
    lines = [json.dumps(dict(text=t)) + "\n{\n" for t in texts.values()]
    (tmp_path / "a").write_text("".join(lines))
    cache = built(partial(jsonl, path=str(tmp_path / "a")), max_skipped=0.5, shard_tokens=3_000)
    assert kept(cache) == texts and skipped(cache) == {"malformed JSON": 300}
    assert cache.total["counts"]["bytes"] == sum(len(t.encode()) for t in texts.values())


@pytest.mark.parametrize("bad,of,stops", [
    (1, 10, False), (2, 10, True), (100, 1_000, False), (101, 1_000, True)])
def test_building_stops_past_the_share_that_may_be_skipped(home, tmp_path, bad, of, stops):
    path = tmp_path / "a"
    path.write_text("{\n" * bad + '{"text": "tree"}\n' * (of - bad))
    if not stops:
        assert skipped(built(partial(jsonl, path=str(path)))) == {"malformed JSON": bad}
        return
    for _ in range(2):  # and so it stays
        with pytest.raises(InputError, match=f"'x'.*'malformed JSON': {bad}.* of {of:,} .*data.max_skipped"):
            built(partial(jsonl, path=str(path)))
    assert skipped(built(partial(jsonl, path=str(path)), max_skipped=0.5)) == {"malformed JSON": bad}


def broken():
    """Half of it is damaged, without end."""
    i = 0
    while True:
        i += 1
        yield Document(f"{i}", "tree") if i % 2 else Skipped(f"{i}", "odd")


def test_building_stops_early(home):
    with pytest.raises(InputError, match="'odd': 512.* of 1,024 documents"):
        built(broken)


KILLED = """
import os, sys
from functools import partial
sys.path.insert(0, sys.argv[1])
import data
from lib import cache
from lib.readers import jsonl
from lib.tokenizers import Bytes
seal, left = cache.seal, 2
def killed(*args):
    global left
    if not left:
        os.kill(os.getpid(), 9)
    left -= 1
    return seal(*args)
cache.seal = killed
source = data.Source(partial(jsonl, path=sys.argv[2], content="doc.text", longest=30_000))
cache.build("x", data.DataConfig(sources={"x": source}, shard_tokens=300_000), Bytes(), 0)
"""


def test_a_build_resumed_after_a_kill_keeps_its_counts(home, tmp_path):
    (tmp_path / "in").mkdir()
    damage, good = generate(tmp_path / "in", 2_000_000)
    made = subprocess.run([sys.executable, "-c", KILLED, ROOT, tmp_path / "in"], capture_output=True)
    assert made.returncode == -9, made.stderr
    cache = built(partial(jsonl, path=str(tmp_path / "in"), content="doc.text", longest=30_000),
                  shard_tokens=300_000)
    assert len(list((tmp_path / "cache").rglob("x-*/0*"))) == cache.total["shards"] > 3
    assert skipped(cache) == damage and {k: cache.total["counts"][k] for k in good} == good


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


# ---------------------------------------------------------------------------------------- formats of configs/

RECORDS = [dict(title=f"T{i}", body=dict(text=f"é {i}\r\n\u2028"), n=i) for i in range(10)]
NAMES = dict(content="{title}: {body.text}", meta=("n",), key="n")
WHOLE = [Document(str(i), f"T{i}: é {i}\r\n\u2028", dict(n=i)) for i in range(10)]


def test_parquet_gives_rows_and_counts_what_it_cannot_read(home, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq
    parquet = config_file("parquet").parquet
    file = tmp_path / "in" / "a.parquet"
    file.parent.mkdir()
    pq.write_table(pyarrow.Table.from_pylist(RECORDS), file, row_group_size=4, compression="none",
                   use_dictionary=False, write_statistics=False)
    assert list(parquet(path=str(file), **NAMES)) == WHOLE
    assert [d.path for d in parquet(path=str(file), content="title")] == [
        f"a.parquet#{i // 4 + 1}.{i % 4 + 1}" for i in range(10)]
    assert list(parquet(path=str(file), content="body.words"))[9] == Skipped("a.parquet#3.2", "missing key")
    group = pq.ParquetFile(file).metadata.row_group(1)
    content = bytearray(file.read_bytes())
    for start in (group.column(c).data_page_offset for c in range(group.num_columns)):
        content[start:start + 8] = b"\xff" * 8
    file.write_bytes(content)
    (file.parent / "b.parquet").write_bytes(content[:-20])
    assert list(parquet(path=str(file.parent), **NAMES)) == [
        *WHOLE[:4], Skipped("a.parquet#2", "unreadable row group"), *WHOLE[8:],
        Skipped("b.parquet", "truncated archive")]
    cache = built(partial(parquet, path=str(file.parent), **NAMES), max_skipped=0.3)
    assert kept(cache) == {d.path: d.text for d in WHOLE[:4] + WHOLE[8:]}


NO_TENSORFLOW = """
import sys
def refuse(event, words):
    assert event != "import" or words[0].split(".")[0] != "tensorflow", "TensorFlow is imported"
sys.addaudithook(refuse)
sys.path.insert(0, sys.argv[1])
"""

LEFT_OUT = 'assert "tensorflow" not in sys.modules and "array_record" in sys.modules'

TFDS = """
import numpy as np
import tensorflow_datasets as tfds

class Small(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        f = tfds.features
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(
            {"title": f.Text(), "body": f.FeaturesDict({"text": f.Text()}), "n": np.int64}))
    def _split_generators(self, manager):
        return {"train": self._generate_examples()}
    def _generate_examples(self):
        for i in range(10):
            yield i, {"title": f"T{i}", "body": {"text": f"\\xe9 {i}\\r\\n\\u2028"}, "n": i}

Small(data_dir=sys.argv[2]).download_and_prepare(file_format="array_record")
"""

READ = """
import json
sys.path.insert(0, sys.argv[1])
from lib.errors import InputError
from lib.readers import tfds
found = list(tfds("small", sys.argv[2], **json.loads(sys.argv[3])))
print(json.dumps([[d.path, d.text, d.meta] for d in found]))
print(json.dumps([d.path for d in tfds("small", sys.argv[2], content="title")]))
for names in (dict(data_set="large"), dict(data_set="small", split="dev")):
    try:
        next(tfds(data_dir=sys.argv[2], **names))
    except InputError as error:
        print(error)
"""


def test_tfds_is_read_by_name_without_tensorflow(tmp_path):
    """In processes where importing TensorFlow is an error, from ArrayRecord files written by the first."""
    pytest.importorskip("array_record", reason="array_record is not installed")
    def run(script, *words):
        command = [sys.executable, "-c", NO_TENSORFLOW + script + LEFT_OUT, *map(str, words)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return made.stdout.splitlines()
    run(TFDS, ROOT, tmp_path)
    assert list(tmp_path.rglob("*.array_record*"))
    full, paths, *errors = run(READ, ROOT, tmp_path, json.dumps(NAMES))
    assert sorted(json.loads(full)) == [[d.path, d.text, d.meta] for d in WHOLE]
    assert json.loads(paths) == [f"small/train#{i}" for i in range(1, 11)]
    assert len(errors) == 2 and "'large'" in errors[0] and "'dev'" in errors[1]


def test_hugging_face_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        next(config_file("hugging_face").hugging_face(path="x"))


def test_hugging_face_directories_are_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    hugging_face = config_file("hugging_face").hugging_face
    table = pytest.importorskip("pyarrow").Table.from_pylist(RECORDS)
    one = datasets.Dataset(table, fingerprint="one")  # datasets 5.2 cannot hash a table of pyarrow 26
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "several")
    assert list(hugging_face(path=str(tmp_path / "one"), **NAMES)) == WHOLE
    assert list(hugging_face(path=str(tmp_path / "several"), split="train", **NAMES)) == WHOLE
    assert next(hugging_face(path=str(tmp_path / "one"), content="title")).path == "#1"
    for path, why in (("several", "no split ''; allowed are train"), ("gone", "save_to_disk")):
        with pytest.raises(InputError, match=why):
            next(hugging_face(path=str(tmp_path / path)))
