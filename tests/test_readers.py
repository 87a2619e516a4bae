"""lib/readers.py: records of every format; damage, counted exactly in a build."""
import gzip
import itertools
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


# -------------------------------------------------------------------------------------------- JSONL


def write_lines(path, records) -> str:
    """A file of JSON Lines."""
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), "utf-8")
    return str(path)


BODY = "é\r\n\u2028木 \\n"
RECORD = dict(id=7, title="T{x}", body=dict(text=BODY, by=["me"]), n=None)


@pytest.fixture
def read_one(tmp_path):
    """What `jsonl` makes of RECORD, alone in a file, under some names."""
    path = write_lines(tmp_path / "a.jsonl", [RECORD])
    return lambda **names: next(jsonl(path, **names))


def test_jsonl_takes_a_key_or_a_template_as_the_text(read_one):
    assert read_one(content="body.text") == Document("a.jsonl#1", BODY)
    templated = read_one(content="{title}\n\n<{body.text}>")
    assert templated.text == "T{x}\n\n<" + BODY + ">"


def test_jsonl_takes_metadata_and_a_name(read_one):
    found = read_one(content="title", meta=("body.by", "n"), key="id")
    assert found == Document("7", "T{x}", {"body.by": ["me"], "n": None})


@pytest.mark.parametrize("names, key", [
    (dict(), "text"),
    (dict(content="title.a"), "title.a"),
    (dict(content="title", meta=["a"]), "a"),
    (dict(content="title", key="no"), "no"),
])
def test_jsonl_names_a_key_that_a_record_lacks(read_one, names, key):
    detail = f"no key '{key}'; the record has the keys 'id', 'title', 'body', 'n'"
    assert read_one(**names) == Skipped("a.jsonl#1", "missing key", detail)


def test_jsonl_takes_a_null_for_a_missing_name(read_one):
    found = read_one(content="title", key="n")
    assert found == Skipped("a.jsonl#1", "missing key", "null under the key 'n'")


@pytest.mark.parametrize("content", ["n", "{title}{id}", "body"])
def test_jsonl_takes_text_alone_as_text(read_one, content):
    assert read_one(content=content) == Skipped("a.jsonl#1", "not text")


@pytest.mark.parametrize("line,detail", [
    ("3", "the record is of type int and has no keys"),
    ("{}", "the record has the keys none"),
    (json.dumps({f"k{i}": i for i in range(50)}), "the record has the keys 'k0', .*, 'k19'$"),
])
def test_a_missing_key_is_told_with_those_that_are_there(tmp_path, line, detail):
    file = tmp_path / "a"
    file.write_text(line)
    (found,) = jsonl(str(file))
    assert found.kind == "missing key"
    assert re.match(f"no key 'text'; {detail}", found.detail)


GOOD = b'{"text": "tree"}'
LONG = b'{"text": "' + b"x" * 88 + b'"}'
LINES = [  # (a line, the text or the kind of damage)
    (b"\xef\xbb\xbf" + GOOD, "tree"),
    (b"", "empty"),
    (b" \t\r", "empty"),
    (b"{", "malformed JSON"),
    (GOOD + GOOD, "malformed JSON"),
    (b"[" * 100_000, "over-long line"),
    (b"\xff", "undecodable"),
    (b"3", "missing key"),
    (b'["text"]', "missing key"),
    (b'"text"', "missing key"),
    (b"{}", "missing key"),
    (b'{"text": 3}', "not text"),
    (b'{"text": null}', "not text"),
    (LONG[1:-1], "malformed JSON"),
    (LONG, "over-long line"),
    (LONG * 5, "over-long line"),
    (GOOD, "tree"),
    (LONG * 3, "over-long line"),
]


def test_jsonl_knows_each_kind_of_damage(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"\n".join(line for line, _ in LINES))

    found = list(jsonl(str(file), longest=100))

    for each, (line, expected) in zip(found, LINES, strict=True):
        what = each.text if isinstance(each, Document) else each.kind
        assert what == expected, line[:100]
    assert [each.path for each in found] == [f"a#{i}" for i in range(1, len(LINES) + 1)]


def test_json_that_is_nested_too_deeply_is_malformed(tmp_path):
    file = tmp_path / "deep"
    file.write_bytes(b"[" * 100_000)
    assert list(jsonl(str(file))) == [Skipped("deep#1", "malformed JSON")]


def random_lines(number: int) -> list[bytes]:
    """Lines of JSON that hardly compress."""
    numbers = [random.Random(i).getrandbits(90) for i in range(number)]
    return [b'{"text": "%d"}' % each for each in numbers]


@pytest.fixture(scope="module")
def archive() -> tuple[list[bytes], bytes]:
    """(20,000 lines, their gzip archive)."""
    lines = random_lines(20_000)
    content = b"".join(line + b"\n" for line in lines)
    return lines, gzip.compress(content)


@pytest.mark.parametrize("size", [5, 100, 70_000, -1])
def test_of_a_truncated_archive_what_stands_before_the_break_is_kept(tmp_path, archive, size):
    lines, packed = archive
    cut = packed[:size]
    file = tmp_path / "a.gz"
    file.write_bytes(cut)

    *before, last = jsonl(str(file))

    assert last == Skipped("a.gz", "truncated archive")
    expected = [json.loads(line)["text"] for line in lines[:len(before)]]
    assert [document.text for document in before] == expected
    assert len(before) / len(lines) >= len(cut) / len(packed) - 0.05


def test_of_a_broken_archive_what_stands_before_the_break_is_kept(tmp_path, archive):
    _, packed = archive
    file = tmp_path / "a.gz"
    file.write_bytes(packed[:50_000] + b"broken" + packed[50_006:])
    *before, last = data.text(str(file), "\n")
    assert before
    assert isinstance(last, Skipped)


# ------------------------------------------------------------------------------- damage, in a build

DAMAGE = ("undecodable", "empty", "missing key", "malformed JSON", "over-long line", "not text")


def damaged(line: bytes, kind: str, rng: random.Random) -> bytes:
    """A good line with damage of a kind."""
    if kind == "undecodable":
        return line[:20] + b"\xff" + line[20:]
    if kind == "empty":
        return rng.choice([b"", b'{"doc":{"text":""}}'])
    if kind == "missing key":
        return line.replace(b"text", b"test")
    if kind == "malformed JSON":
        return line[:-2]
    if kind == "over-long line":
        return b"x" * 40_000
    return b'{"doc": {"text": [1]}}'  # not text


class Generated:
    """JSON Lines in plain and packed files.

    By line, 1 % have each kind of damage. One archive in 33 is truncated: it has a second member,
    of one line, which is cut. `damage` counts kinds, `good` documents and bytes of what is good.
    """

    def __init__(self, directory: Path, size: int):
        """Write files of about `size` bytes together, and at least three."""
        self.rng = random.Random(0)
        words = [self.rng.randbytes(4).hex() for _ in range(500)]
        self.words = words + ["é", "木", "\u2028", "\\", '"', "\x10"]
        self.damage = Counter()
        self.good = Counter()
        written = 0
        number = 0
        while written < size or number < 3:
            lines = [self.line() for _ in range(2_000)]
            content = b"\n".join(lines) + b"\n"
            written += len(content)
            self.write(directory / f"{number:04d}.jsonl", content, number)
            number += 1

    def line(self) -> bytes:
        """A line, good or damaged."""
        length = self.rng.randrange(20, 180)
        text = " ".join(self.rng.choices(self.words, k=length))
        record = dict(doc=dict(text=text))
        line = json.dumps(record, ensure_ascii=False).encode()
        percent = int(self.rng.random() * 100)
        if percent >= len(DAMAGE):
            self.good.update(documents=1, bytes=len(text.encode()))
            return line
        kind = DAMAGE[percent]
        self.damage[kind] += 1
        return damaged(line, kind, self.rng)

    def write(self, path: Path, content: bytes, number: int):
        """A file; one of three is packed."""
        if number % 3 != 1:
            path.write_bytes(content)
            return
        packed = gzip.compress(content, 1)
        if number % 100 == 1:
            self.damage["truncated archive"] += 1
            packed += gzip.compress(b'{"doc": {"text": "never"}}\n')[:-9]
        path.with_suffix(".jsonl.gz").write_bytes(packed)


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


@pytest.mark.parametrize("size", [
    2_000_000,
    pytest.param(1_000_000_000, marks=pytest.mark.soak),
])
def test_damage_is_counted_exactly_within_2_gib(home, tmp_path, size):
    place = tmp_path / "in"
    place.mkdir()
    generated = Generated(place, size)

    command = [sys.executable, "-c", BUILD, ROOT, place]
    made = subprocess.run(command, capture_output=True, text=True)

    assert made.returncode == 0, made.stderr
    counts, gib, seconds = json.loads(made.stdout.splitlines()[-1])
    print(f"{size:,} bytes: {seconds:.0f} s, {gib:.2f} GiB, {counts}")
    assert kinds(counts) == generated.damage
    assert counts["documents"] == generated.good["documents"]
    assert counts["bytes"] == generated.good["bytes"]
    damaged_lines = sum(generated.damage.values())
    assert counts["read"] == generated.good["documents"] + damaged_lines
    assert gib < 2


def test_tokenizing_keeps_every_byte_around_damage(home, tmp_path):
    file = tmp_path / "a"
    texts = {}
    for i in range(300):
        path = f"a#{2 * i + 1}"  # each second line is damaged
        texts[path] = f"é\r\n\x00\u2581{i}\x10 " * (i % 7 + 1)
    lines = [json.dumps(dict(text=text)) + "\n{\n" for text in texts.values()]
    file.write_text("".join(lines))

    cache = built(partial(jsonl, path=str(file)), max_skipped=0.5, shard_tokens=3_000)

    assert kept(cache) == texts
    assert skipped(cache) == {"malformed JSON": 300}
    size = sum(len(text.encode()) for text in texts.values())
    assert cache.total["counts"]["bytes"] == size


@pytest.mark.parametrize("lacking, good, said", [
    (3, "", "no document with text in it; it skipped 3 missing key"),
    (1_500, "", "1,024 of 1,024 documents are.* skipped 1,024 missing key"),
    (2, '{"text": "tree"}', "2 of 3 documents are.* skipped 2 missing key"),
], ids=["nothing left", "too many", "too many of three"])
def test_a_build_names_the_keys_of_records_that_lack_one(home, tmp_path, lacking, good, said):
    file = tmp_path / "a"
    line = json.dumps(dict(body="tree", id=7)) + "\n"
    file.write_text(line * lacking + good)
    source = partial(jsonl, path=str(file))
    why = r"\(a#1: no key 'text'; the record has the keys 'body', 'id'\)"
    for _ in range(2):  # it stays so
        with pytest.raises(InputError, match=f"'x'.* {said} {why}"):
            built(source)


def write_damaged(file: Path, bad: int, of: int):
    """So many lines, of which some are damaged."""
    file.write_text("{\n" * bad + '{"text": "tree"}\n' * (of - bad))


@pytest.mark.parametrize("bad,of", [(1, 10), (100, 1_000)])
def test_building_goes_on_up_to_the_share_that_may_be_skipped(home, tmp_path, bad, of):
    file = tmp_path / "a"
    write_damaged(file, bad, of)
    cache = built(partial(jsonl, path=str(file)))
    assert skipped(cache) == {"malformed JSON": bad}


@pytest.mark.parametrize("bad,of", [(2, 10), (101, 1_000)])
def test_building_stops_past_the_share_that_may_be_skipped(home, tmp_path, bad, of):
    file = tmp_path / "a"
    write_damaged(file, bad, of)
    source = partial(jsonl, path=str(file))
    said = f"'x': {bad} of {of:,} documents .*max_skipped.* {bad} malf"
    for _ in range(2):  # it stays so
        with pytest.raises(InputError, match=said):
            built(source)
    cache = built(source, max_skipped=0.5)
    assert skipped(cache) == {"malformed JSON": bad}


def half_broken():
    """Half of it is damaged, without end."""
    for i in itertools.count(1):
        if i % 2:
            yield Document(f"{i}", "tree")
        else:
            yield Skipped(f"{i}", "odd")


def test_building_stops_early(home):
    said = "'x': 512 of 1,024 documents are damaged.*skipped 512 odd"
    with pytest.raises(InputError, match=said):
        built(half_broken)


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
    place = tmp_path / "in"
    place.mkdir()
    generated = Generated(place, 2_000_000)
    command = [sys.executable, "-c", KILLED, ROOT, place]
    made = subprocess.run(command, capture_output=True)
    assert made.returncode == -9, made.stderr

    source = partial(jsonl, path=str(place), content="doc.text", longest=30_000)
    cache = built(source, shard_tokens=300_000)

    shards = list((tmp_path / "cache").rglob("x-*/0*"))
    assert len(shards) == cache.total["shards"] > 3
    assert skipped(cache) == generated.damage
    counts = cache.total["counts"]
    assert counts["documents"] == generated.good["documents"]
    assert counts["bytes"] == generated.good["bytes"]


# ------------------------------------------------------------------------------------ other formats

RECORDS = [dict(title=f"T{i}", body=dict(text=f"é {i}\r\n\u2028"), n=i) for i in range(10)]
NAMES = dict(content="{title}: {body.text}", meta=("n",), key="n")
WHOLE = [Document(str(i), f"T{i}: é {i}\r\n\u2028", dict(n=i)) for i in range(10)]


@pytest.fixture
def parquet_file(tmp_path) -> Path:
    """RECORDS as Parquet, in row groups of four."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow.parquet import write_table
    file = tmp_path / "in" / "a.parquet"
    file.parent.mkdir()
    write_table(
        pyarrow.Table.from_pylist(RECORDS),
        file,
        row_group_size=4,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    return file


def test_parquet_gives_rows(parquet_file):
    path = str(parquet_file)
    assert list(parquet(path=path, **NAMES)) == WHOLE
    unnamed = [document.path for document in parquet(path=path, content="title")]
    assert unnamed == [f"a.parquet#{i // 4 + 1}.{i % 4 + 1}" for i in range(10)]


def test_parquet_names_a_key_that_a_row_lacks(parquet_file):
    found = list(parquet(path=str(parquet_file), content="body.words"))
    detail = "no key 'body.words'; the record has the keys 'title', 'body', 'n'"
    assert found[9] == Skipped("a.parquet#3.2", "missing key", detail)


def break_row_group(file: Path, number: int):
    """Write over where the columns of a row group begin."""
    from pyarrow.parquet import ParquetFile
    group = ParquetFile(file).metadata.row_group(number)
    content = bytearray(file.read_bytes())
    for column in range(group.num_columns):
        start = group.column(column).data_page_offset
        content[start:start + 8] = b"\xff" * 8
    file.write_bytes(content)


def test_parquet_counts_what_it_cannot_read(home, parquet_file):
    break_row_group(parquet_file, 1)
    truncated = parquet_file.read_bytes()[:-20]
    (parquet_file.parent / "b.parquet").write_bytes(truncated)
    source = partial(parquet, path=str(parquet_file.parent), **NAMES)

    assert list(source()) == [
        *WHOLE[:4],
        Skipped("a.parquet#2", "unreadable row group"),
        *WHOLE[8:],
        Skipped("b.parquet", "truncated archive"),
    ]
    cache = built(source, max_skipped=0.3)
    readable = WHOLE[:4] + WHOLE[8:]
    assert kept(cache) == {document.path: document.text for document in readable}


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


def run_without_tensorflow(script: str, *words) -> list[str]:
    """What a script prints, in a process where importing TensorFlow is an error."""
    script = NO_TENSORFLOW + script + LEFT_OUT
    command = [sys.executable, "-c", script, *map(str, words)]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.splitlines()


def test_tfds_is_read_by_name_without_tensorflow(tmp_path):
    """From ArrayRecord files that a first process writes."""
    pytest.importorskip("array_record", reason="array_record is not installed")
    run_without_tensorflow(TFDS, ROOT, tmp_path)
    assert list(tmp_path.rglob("*.array_record*"))

    full, paths, *errors = run_without_tensorflow(READ, ROOT, tmp_path, json.dumps(NAMES))

    expected = [[document.path, document.text, document.meta] for document in WHOLE]
    assert sorted(json.loads(full)) == expected
    assert json.loads(paths) == [f"small/train#{i}" for i in range(1, 11)]
    assert len(errors) == 2
    assert "'large'" in errors[0]
    assert "'dev'" in errors[1]


@pytest.mark.parametrize("reader,package,words", [
    (hugging_face, "datasets", "pip install datasets"),
    (parquet, "pyarrow.parquet", "pip install pyarrow"),
    (tfds, "tensorflow_datasets", "pip install tensorflow-datasets array_record"),
])
def test_readers_name_the_package_that_they_need(reader, package, words, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"need the package .*{words}") as caught:
        next(reader("x"))
    assert "configs/" not in str(caught.value)  # where they used to be


@pytest.fixture
def saved(tmp_path) -> Path:
    """RECORDS saved by the package datasets: as `one` data set, and as train of `several`."""
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    table = pytest.importorskip("pyarrow").Table.from_pylist(RECORDS)
    one = datasets.Dataset(table, fingerprint="one")  # 5.2 cannot hash a table of pyarrow 26
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one).save_to_disk(tmp_path / "several")
    return tmp_path


def test_hugging_face_directories_are_read(saved):
    one, several = str(saved / "one"), str(saved / "several")
    assert list(hugging_face(path=one, **NAMES)) == WHOLE
    assert list(hugging_face(path=several, split="train", **NAMES)) == WHOLE
    unnamed = next(hugging_face(path=one, content="title"))
    assert unnamed.path == "#1"


@pytest.mark.parametrize("name, why", [
    ("several", "no split ''; allowed are train"),
    ("gone", "save_to_disk"),
])
def test_a_hugging_face_directory_that_cannot_be_read_is_refused(saved, name, why):
    with pytest.raises(InputError, match=why):
        next(hugging_face(path=str(saved / name)))
