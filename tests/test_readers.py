"""lib/readers.py: records of every format; damage, counted exactly in a build."""
import gzip
import json
import random
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from corpora import built, kept, kinds, skipped

import data
from data import Document, InputError, Skipped
from lib.readers import hugging_face, jsonl, parquet, tfds

ROOT = Path(__file__).resolve().parent.parent


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
    for names, key in ((dict(), "text"), (dict(content="title.a"), "title.a"),
                       (dict(content="title", meta=["a"]), "a"), (dict(content="title", key="no"), "no")):
        detail = f"no key '{key}'; the record has the keys 'id', 'title', 'body', 'n'"
        assert one(**names) == Skipped("a.jsonl#1", "missing key", detail)
    null = Skipped("a.jsonl#1", "missing key", "null under the key 'n'")
    assert one(content="title", key="n") == null
    for content in ("n", "{title}{id}", "body"):
        assert one(content=content) == Skipped("a.jsonl#1", "not text")


@pytest.mark.parametrize("line,detail", [
    ("3", "the record is of type int and has no keys"), ("{}", "the record has the keys none"),
    (json.dumps({f"k{i}": i for i in range(50)}), "the record has the keys 'k0', .*, 'k19'$")])
def test_a_missing_key_is_told_with_those_that_are_there(tmp_path, line, detail):
    (tmp_path / "a").write_text(line)
    (found,) = jsonl(str(tmp_path / "a"))
    assert found.kind == "missing key" and re.match(f"no key 'text'; {detail}", found.detail)


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


def test_a_build_names_the_keys_of_records_that_lack_one(home, tmp_path):
    """Where no document is left, and where too many are missing; and so it stays."""
    lacking = json.dumps(dict(body="tree", id=7)) + "\n"
    why = r"\(a#1: no key 'text'; the record has the keys 'body', 'id'\)"
    source = partial(jsonl, path=str(tmp_path / "a"))
    for n, rest, said in ((3, "", f"no document with text in it; it skipped 3 missing key {why}"),
                          (1_500, "", f"1,024 of 1,024 documents are.* skipped 1,024 missing key {why}"),
                          (2, '{"text": "tree"}', f"2 of 3 documents are.* skipped 2 missing key {why}")):
        (tmp_path / "a").write_text(lacking * n + rest)
        for _ in range(2):
            with pytest.raises(InputError, match=f"'x'.* {said}"):
                built(source)


@pytest.mark.parametrize("bad,of,stops", [
    (1, 10, False), (2, 10, True), (100, 1_000, False), (101, 1_000, True)])
def test_building_stops_past_the_share_that_may_be_skipped(home, tmp_path, bad, of, stops):
    path = tmp_path / "a"
    path.write_text("{\n" * bad + '{"text": "tree"}\n' * (of - bad))
    if not stops:
        assert skipped(built(partial(jsonl, path=str(path)))) == {"malformed JSON": bad}
        return
    for _ in range(2):  # and so it stays
        with pytest.raises(InputError, match=f"'x': {bad} of {of:,} documents .*max_skipped.* {bad} malf"):
            built(partial(jsonl, path=str(path)))
    assert skipped(built(partial(jsonl, path=str(path)), max_skipped=0.5)) == {"malformed JSON": bad}


def broken():
    """Half of it is damaged, without end."""
    i = 0
    while True:
        i += 1
        yield Document(f"{i}", "tree") if i % 2 else Skipped(f"{i}", "odd")


def test_building_stops_early(home):
    with pytest.raises(InputError, match="'x': 512 of 1,024 documents are damaged.*skipped 512 odd"):
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


# ---------------------------------------------------------------------------------------------- other formats

RECORDS = [dict(title=f"T{i}", body=dict(text=f"é {i}\r\n\u2028"), n=i) for i in range(10)]
NAMES = dict(content="{title}: {body.text}", meta=("n",), key="n")
WHOLE = [Document(str(i), f"T{i}: é {i}\r\n\u2028", dict(n=i)) for i in range(10)]


def test_parquet_gives_rows_and_counts_what_it_cannot_read(home, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as pq
    file = tmp_path / "in" / "a.parquet"
    file.parent.mkdir()
    pq.write_table(pyarrow.Table.from_pylist(RECORDS), file, row_group_size=4, compression="none",
                   use_dictionary=False, write_statistics=False)
    assert list(parquet(path=str(file), **NAMES)) == WHOLE
    assert [d.path for d in parquet(path=str(file), content="title")] == [
        f"a.parquet#{i // 4 + 1}.{i % 4 + 1}" for i in range(10)]
    assert list(parquet(path=str(file), content="body.words"))[9] == Skipped(
        "a.parquet#3.2", "missing key", "no key 'body.words'; the record has the keys 'title', 'body', 'n'")
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


@pytest.mark.parametrize("reader,package,words", [
    (partial(hugging_face, "x"), "datasets", "pip install datasets"),
    (partial(parquet, "x"), "pyarrow.parquet", "pip install pyarrow"),
    (partial(tfds, "x"), "tensorflow_datasets", "pip install tensorflow-datasets array_record")])
def test_readers_name_the_package_that_they_need(reader, package, words, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"need the package .*{words}") as caught:
        next(reader())
    assert "configs/" not in str(caught.value)  # where they used to be


def test_hugging_face_directories_are_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
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
