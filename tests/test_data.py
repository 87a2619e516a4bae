"""data.py: sources, lossless tokenizers, the token cache and its safety, packing, mixtures, batch(step)."""
import itertools
import math
import os
import random
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given

import data
from data import DataConfig, Document, InputError, Skipped, Source
from lib.cache import Cache, Shard, build, tokenize
from lib.disk import locked
from lib.evaluate import bits_per_byte, held_out
from lib.packing import ROW, SEGMENT
from lib.prefetch import prefetch
from lib.sources import SPLITS, split_of
from lib.tokenizers import (
    Bytes,
    SentencePiece,
    escape,
    load_tokenizer,
    make_tokenizer,
    tokenizer_texts,
    train_bpe,
)

equal = np.testing.assert_array_equal


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache home that nothing has been put in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"


# ------------------------------------------------------------------------------------ permutations and splits


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


# ---------------------------------------------------------------------------------------------------- sources


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


# ------------------------------------------------------------------------------------------------- tokenizers

AWKWARD = ["\t", " ", "  ", "\n", "\r\n", "\x00", "\x10", "\x10e", "\x10b", "e", "b", "c", "\u2581", "\u2585",
           "\u0301", "\u200d", "é", "木", "🌳", "👩‍🌾", "<s>", "</s>", "<unk>", "<0x0A>", "def", "\ufffd",
           "\ufeff", "\U0010ffff"]
anything = st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join),
                     st.text(st.sampled_from("\x10ebc\u2581\u2585 ")))


@given(anything)
@example("\u2581 \x10b\u2585\x10")
def test_pieces_come_back_as_the_text(pieces, text):
    ids = pieces.encode(text)
    assert pieces.decode(ids) == text
    assert pieces.decode([pieces.bos, *ids, pieces.eos]) == text
    assert all(0 <= i < pieces.vocab and i not in (pieces.bos, pieces.eos) for i in ids)


@given(anything)
def test_bytes_come_back_as_the_text(text):
    ids = Bytes().encode(text)
    assert Bytes().decode([256, *ids, 257]) == text and bytes(ids) == text.encode()


@given(st.lists(anything, max_size=4))
def test_encoding_together_is_as_encoding_apart(pieces, texts):
    for tokenizer in (pieces, Bytes()):
        together = tokenizer.encode_batch(texts)
        assert [list(ids) for ids in together] == [list(tokenizer.encode(text)) for text in texts]


@given(anything, anything)
@example("\u2585", "\x10c")
def test_escapes_are_unambiguous(one, other):
    assert (escape(one) == escape(other)) == (one == other)
    assert not {"\u2581", "\u2585"} & set(escape(one))


def test_cut_characters_are_replaced(pieces):
    assert Bytes().decode("木".encode()[:2]) == "\ufffd"
    assert "\ufffd" in pieces.decode(pieces.encode("🌳")[:-1])


def test_tokenizer_is_smaller_than_bytes(pieces, corpus):
    assert pieces.vocab == 320
    texts = [file.read_text("utf-8") for file in corpus.rglob("*.txt")]
    tokens, size = sum(map(len, pieces.encode_batch(texts))), sum(len(text.encode()) for text in texts)
    assert tokens < 0.8 * size


def test_training_gives_the_same_pieces_for_the_same_texts(corpus, pieces):
    texts = [file.read_text("utf-8") for file in sorted(corpus.rglob("*.txt"))]
    assert train_bpe(texts, 320) == pieces.model
    assert train_bpe(texts, 310) != pieces.model


@pytest.mark.parametrize("asked,word", [
    (5_000, "at most"), (262, "at least"), (200, "at least"), (1, "at least")])
def test_impossible_vocabularies_name_a_possible_one(asked, word):
    texts = ["the tree is cut back so that it grows again stronger"]
    with pytest.raises(InputError, match=f"model.vocab is {asked}, but .* {word} \\d+ pieces") as caught:
        train_bpe(texts, asked)
    allowed = int(str(caught.value).split(f"{word} ")[1].split()[0])
    assert SentencePiece(train_bpe(texts, allowed)).vocab == allowed


def test_texts_with_sentencepiece_s_own_marks_are_learnt_from():
    """It drops training texts with U+2585, unless they are escaped."""
    model = train_bpe(["tree \u2585\u2581 " * 50, "stool"], 290)
    assert len(SentencePiece(model).encode("tree tree ")) < 6


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_tokenizer_without_text_is_an_input_error(texts):
    with pytest.raises(InputError, match="no text to learn from"):
        train_bpe(texts, 300)


def test_load_tokenizer_takes_what_was_saved(tmp_path, pieces):
    (tmp_path / "a.model").write_bytes(pieces.model)
    (tmp_path / "b.model").write_bytes(Bytes.model)
    assert load_tokenizer(tmp_path / "a.model").encode("the tree") == pieces.encode("the tree")
    assert isinstance(load_tokenizer(str(tmp_path / "b.model")), Bytes)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x00" * 100, None, "directory"])
def test_load_tokenizer_refuses_junk(tmp_path, pieces, content):
    path = tmp_path / "t.model"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"t\.model"):
        load_tokenizer(path)


def test_load_tokenizer_refuses_half_a_model(tmp_path, pieces):
    (tmp_path / "t.model").write_bytes(pieces.model[:len(pieces.model) // 2])
    with pytest.raises(InputError, match=r"t\.model.*not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")


def test_bpe_is_trained_once_and_kept(home, data_config):
    config = replace(data_config, tokenizer="bpe")
    one = make_tokenizer(config, 310)
    (file,) = (home / "tokenizers").glob("*.model")
    before = file.stat().st_mtime_ns
    assert one.vocab == 310 and make_tokenizer(config, 310).model == one.model
    assert file.stat().st_mtime_ns == before and not list(home.rglob("*.partial"))
    assert make_tokenizer(config, 315).vocab == 315


def test_bpe_needs_a_size(home, data_config):
    with pytest.raises(InputError, match="model.vocab is 0"):
        make_tokenizer(replace(data_config, tokenizer="bpe"), 0)


def test_tokenizer_is_learnt_from_training_documents_alone(data_config, corpus):
    texts = tokenizer_texts(data_config)
    expected = [d.text for d in data.text(str(corpus)) if split_of(d.path, 0.1, 0.1) == 0]
    assert sorted(texts) == sorted(expected) and len(texts) < 40


def test_sample_is_bounded_and_does_not_follow_the_order(data_config, corpus):
    def backwards(path):
        return reversed(list(data.text(path)))

    config = replace(data_config, sample_mib=0.01)
    texts = tokenizer_texts(config)
    assert 0 < sum(map(len, texts)) <= 0.01 * 2**20 and texts == tokenizer_texts(config)
    turned = replace(config, sources={"corpus": Source(partial(backwards, str(corpus)))})
    assert tokenizer_texts(turned) == texts


def test_sample_of_a_source_without_end_ends():
    def endless():
        for i in range(10**6):
            yield Document(str(i), "a tree " * 100)
        raise AssertionError("read to the end")

    texts = tokenizer_texts(DataConfig(sources={"endless": Source(endless)}, sample_mib=0.01))
    assert 0 < sum(map(len, texts)) <= 0.01 * 2**20


# -------------------------------------------------------------------------------------------------- the cache

FAIL = {"after": None}  # documents of `many` after which it fails; no part of its source nor of a cache's key


def many():
    """Seven hundred short documents: at a shard each 256, three shards."""
    for i in range(700):
        if i == FAIL["after"]:
            raise OSError("the disk is gone")
        text = f"{i} tree" * (1 + i % 5)
        yield Document(f"{i:03d}", text, dict(number=i)) if i % 100 else Skipped(str(i), "odd")


MANY = DataConfig(sources={"many": Source(many)}, tokenizer="bytes", dev=0.1, test=0.1, shard_tokens=1)


def contents(cache, tokenizer):
    """(path, text, meta, split, score) of every document of a cache, in order."""
    for i in range(cache.total["shards"]):
        shard = cache.shard(i)
        assert shard.offsets[0] == 0 and shard.offsets[-1] == len(shard.tokens)
        for n, document in enumerate(shard.documents()):
            text = tokenizer.decode(shard.tokens[shard.offsets[n]:shard.offsets[n + 1]])
            assert shard.bytes[n] == len(text.encode())
            yield document["path"], text, document["meta"], int(shard.split[n]), float(shard.score[n])


def files(directory):
    """{path: bytes} of everything below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("which", ["bytes", "pieces"])
def test_cache_holds_the_documents_in_order(data_config, corpus, pieces, which):
    tokenizer = Bytes() if which == "bytes" else pieces
    cache = build("corpus", data_config, tokenizer, 0)
    got = list(contents(cache, tokenizer))
    expected = [(d.path, d.text, {}, split_of(d.path, 0.1, 0.1)) for d in data.text(str(corpus))]
    assert [g[:4] for g in got] == expected and all(math.isnan(g[4]) for g in got)
    assert cache.total["counts"]["documents"] == 40
    assert cache.total["counts"]["bytes"] == sum(f.stat().st_size for f in corpus.rglob("*.txt"))
    assert {s: cache.total["counts"][f"{s} documents"] for s in SPLITS} == dict(train=31, dev=3, test=6)
    assert cache.shard(0).tokens.dtype == np.uint16


def test_shards_are_sealed_by_size_and_counted(home):
    cache = build("many", MANY, Bytes(), 0)
    expected = [d for d in many() if isinstance(d, Document)]
    got = [c[:4] for c in contents(cache, Bytes())]
    assert [c[:3] for c in got] == [(d.path, d.text, d.meta) for d in expected]
    assert cache.total["shards"] == 3 and cache.total["counts"]["skipped: odd"] == 7
    assert [len(cache.shard(i).bytes) for i in range(3)] == [253, 253, 187]
    one = build("many", replace(MANY, shard_tokens=10**9), Bytes(), 0)
    assert one.total["shards"] == 1 and [c[:4] for c in contents(one, Bytes())] == got


def test_large_vocabularies_have_wide_tokens(home):
    cache = build("stars", DataConfig(sources={"stars": Source(stars)}), Points(), 0)
    assert cache.shard(0).tokens.dtype == np.uint32
    assert [text for _, text, *_ in contents(cache, Points())] == [d.text for d in stars()]


def test_undecodable_and_empty_files_are_skipped_and_counted(home, tmp_path):
    (tmp_path / "in").mkdir()
    for name, content in (("a", b"tree"), ("b", b"\xff"), ("c", b""), ("d", b"\xfe")):
        (tmp_path / "in" / name).write_bytes(content)
    source = Source(partial(data.text, path=str(tmp_path / "in")))
    config = DataConfig(sources={"x": source}, max_skipped=0.75)
    counts = build("x", config, Bytes(), 0).total["counts"]
    assert (counts["documents"], counts["skipped: undecodable"], counts["skipped: empty"]) == (1, 2, 1)


def lonely():
    """A document that is no Unicode text, and one that is."""
    yield Document("a", "half a pair: \ud83c")
    yield Document("b\udcff", "tree")


def test_lone_surrogates_are_skipped_and_counted(home):
    cache = build("lonely", DataConfig(sources={"lonely": Source(lonely)}, max_skipped=0.5), Bytes(), 0)
    assert cache.total["counts"]["skipped: lone surrogates"] == 1
    assert [c[:2] for c in contents(cache, Bytes())] == [("b\udcff", "tree")]


@pytest.mark.parametrize("content,why", [
    (None, "nothing"), (b"", "'skipped: empty': 1"), (b"\xff", "'skipped: undecodable': 1")])
def test_source_without_text_is_an_input_error(home, tmp_path, content, why):
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "a").write_bytes(content)
    config = DataConfig(sources={"x": Source(partial(data.text, path=str(tmp_path / "in")))})
    for _ in range(2):  # and so it stays
        with pytest.raises(InputError, match=f"'x' gives no document with text in it.*{why}"):
            build("x", config, Bytes(), 0)


def test_cache_is_found_again(home, data_config):
    first = build("corpus", data_config, Bytes(), 0)
    before = {p: p.stat().st_mtime_ns for p in first.directory.rglob("*")}
    again = build("corpus", data_config, Bytes(), 5)  # no `prepare`: the seed does not matter
    assert again.directory == first.directory and again.total['fingerprint'] == first.total['fingerprint']
    assert {p: p.stat().st_mtime_ns for p in first.directory.rglob("*")} == before


def test_fingerprint_is_the_same_wherever_it_is_built(home, data_config, cache):
    again = build("corpus", data_config, Bytes(), 0)
    assert again.directory != cache.directory and again.total['fingerprint'] == cache.total['fingerprint']
    assert files(again.directory) == files(cache.directory)


VERSION = {}  # {number of a document: its path, text or metadata}; no part of a cache's key


def changing():
    """Six hundred documents, of which one may be another than before under the same key."""
    for i in range(600):
        yield replace(Document(f"{i}", f"{i} tree", dict(n=i)), **VERSION.get(i, {}))


def test_fingerprint_covers_every_document(tmp_path, monkeypatch):
    """Path, text, metadata and order, of the first, an inner and the last document, in any shard."""
    config, prints = replace(MANY, sources={"changing": Source(changing)}), []
    swapped = {i: dict(path=f"{j}", text=f"{j} tree", meta=dict(n=j)) for i, j in ((300, 301), (301, 300))}
    changes = [{}, swapped, *({i: change} for i in (0, 100, 255, 256, 599) for change in (
        dict(path="other"), dict(text=f"{i} root"), dict(meta={})))]
    for i, change in enumerate(changes):
        monkeypatch.setattr(sys.modules[__name__], "VERSION", change)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(i)))
        prints.append(build("changing", config, Bytes(), 0))
    assert len({cache.directory.name for cache in prints}) == 1
    assert len({cache.total['fingerprint'] for cache in prints}) == len(changes)


def test_cache_key_follows_tokenizer_and_settings(home, data_config, pieces):
    source = data_config.sources["corpus"]
    changed = [replace(data_config, dev=0.2), replace(data_config, test=0.2),
               replace(data_config, shard_tokens=9),
               replace(data_config, sources={"corpus": replace(source, score=length)}),
               replace(data_config, sources={"corpus": replace(source, prepare=tagged)}),
               replace(data_config, sources={"corpus": replace(source, documents=many)})]
    caches = [build("corpus", config, Bytes(), 0) for config in (data_config, *changed)]
    caches += [build("corpus", data_config, pieces, 0), build("corpus", changed[4], Bytes(), 1)]
    assert len({c.directory for c in caches}) == len({c.total['fingerprint'] for c in caches}) == len(caches)


def test_cache_key_follows_an_edited_file(home, tmp_path):
    file = tmp_path / "one.txt"
    config = DataConfig(sources={"x": Source(partial(data.text, path=str(file)))})
    prints = []
    for content, when in (("tree", 1), ("root", 2), ("roots", 2)):
        file.write_text(content)
        os.utime(file, ns=(when, when))
        cache = build("x", config, Bytes(), 0)
        prints.append(cache.total['fingerprint'])
        assert [c[1] for c in contents(cache, Bytes())] == [content]
    assert len(set(prints)) == 3


@pytest.mark.parametrize("after", [10, 300, 600, 699])
def test_interrupted_build_is_taken_up_where_it_stopped(home, tmp_path, monkeypatch, after):
    """Shards sealed before are not written again; the result is byte for byte that of a build in one go."""
    monkeypatch.setitem(FAIL, "after", after)
    with pytest.raises(OSError, match="the disk is gone"):
        build("many", MANY, Bytes(), 0)
    (directory,) = (p for p in (home / "tokens").iterdir() if p.is_dir()) if after > 256 else (None,)
    sealed = {p: p.stat().st_mtime_ns for p in directory.rglob("*")} if directory else {}
    assert len(sealed) == after // 256 * 5  # each shard a directory of four files
    if directory:  # what a killed process would leave
        (directory / "000002.partial").mkdir()
        (directory / "000002.partial" / "tokens.bin").write_bytes(b"half")
        (directory / "complete.partial").write_text("{")
    monkeypatch.setitem(FAIL, "after", None)
    cache = build("many", MANY, Bytes(), 0)
    assert all(p.stat().st_mtime_ns == time for p, time in sealed.items() if p.is_file())
    assert not list(cache.directory.glob("*.partial"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    whole = build("many", MANY, Bytes(), 0)
    assert whole.directory != cache.directory and files(whole.directory) == files(cache.directory)


BUILDER = '''
import os, sys, time
sys.path[:0] = [os.environ["COPPICE"], os.environ["HERE"]]
from data import DataConfig, Document, Source
from lib.cache import build
from lib.tokenizers import Bytes

def slow():
    with open(os.environ["HERE"] + "/log", "a") as log:
        log.write("reading\\n")
    print("reading", flush=True)
    while not os.path.exists(os.environ["HERE"] + "/go"):
        time.sleep(0.01)
    yield Document("a", "tree")

print(build("slow", DataConfig(sources={"slow": Source(slow)}), Bytes(), 0).total["fingerprint"])
'''


def test_two_builders_make_one_cache(home, tmp_path):
    """The second process waits for the first, and takes what that has built."""
    (tmp_path / "builder.py").write_text(BUILDER)
    environment = os.environ | dict(COPPICE=str(Path(data.__file__).parent), HERE=str(tmp_path))
    start = partial(subprocess.Popen, [sys.executable, str(tmp_path / "builder.py")], env=environment,
                    text=True, stdout=subprocess.PIPE)
    with start() as one:
        assert one.stdout.readline() == "reading\n"
        with start() as two:
            waiting = two.stdout.readline()
            (tmp_path / "go").touch()
            prints = [one.communicate(timeout=60)[0], two.communicate(timeout=60)[0]]
    assert one.returncode == two.returncode == 0 and waiting.startswith("waiting for another process")
    assert prints[0] == prints[1] and len(prints[0].strip()) == 20
    assert (tmp_path / "log").read_text() == "reading\n"
    assert len([p for p in (home / "tokens").iterdir() if p.is_dir()]) == 1


def test_lock_that_must_not_wait_refuses(tmp_path):
    with locked(tmp_path / "run.lock"), pytest.raises(InputError, match="my run is being trained"):
        with locked(tmp_path / "run.lock", busy="my run"):
            raise AssertionError("both have the lock")
    with locked(tmp_path / "run.lock", busy="my run"):  # given back
        pass


@pytest.mark.parametrize("harm", ["truncated", "longer", "missing", "no seal", "torn seal"])
def test_damaged_shard_is_an_input_error(home, harm):
    directory = build("many", MANY, Bytes(), 0).directory
    tokens, seal = directory / "000001" / "tokens.bin", directory / "000001" / "seal.json"
    if harm in ("truncated", "longer"):
        content = tokens.read_bytes()
        tokens.write_bytes(content[:-1] if harm == "truncated" else content + b"x")
    elif harm == "missing":
        (directory / "000001" / "index.npz").unlink()
    elif harm == "no seal":
        seal.unlink()
    else:
        seal.write_text(seal.read_text()[:20])
    cache = build("many", MANY, Bytes(), 0)
    assert len(cache.shard(0).tokens)
    with pytest.raises(InputError, match="000001 is damaged") as caught:
        cache.shard(1)
    assert str(directory) in str(caught.value)


# ------------------------------------------------------------------------------------------ prepare and score


def tagged(document, rng):
    """A `prepare`: the document with a number in front; twice if its path ends in 3, never if in 4."""
    made = replace(document, text=f"<{rng.integers(10**9)}>{document.text}")
    return [made, made] if document.path[-1] == "3" else [] if document.path[-1] == "4" else made


def length(document, tokens):
    """A `score`: the number of tokens; short documents are left out."""
    return -math.inf if len(tokens) < 10 else len(tokens)


def with_many(**functions):
    """The config of `many` with functions set."""
    return replace(MANY, sources={"many": Source(many, **functions)})


def test_prepare_changes_training_documents_alone(home):
    cache = build("many", with_many(prepare=tagged), Bytes(), 0)
    got, originals = {}, {d.path: d for d in many() if isinstance(d, Document)}
    for path, text, meta, split, _ in contents(cache, Bytes()):
        got.setdefault(path, []).append(text)
        assert split == split_of(path, 0.1, 0.1) and meta == originals[path].meta
    tags = []
    for path, original in originals.items():
        if split_of(path, 0.1, 0.1):
            assert got[path] == [original.text]
        else:
            assert len(got.get(path, [])) == {"3": 2, "4": 0}.get(path[-1], 1)
            for text in got.get(path, []):
                tag, rest = text[1:].split(">", 1)
                assert rest == original.text
            tags += [tag] if path in got else []
    assert len(set(tags)) == len(tags) > 400  # each document has a generator of its own


def test_prepare_follows_seed_and_document(home, tmp_path, monkeypatch):
    config = with_many(prepare=tagged)
    one, other = (build("many", config, Bytes(), seed) for seed in (0, 1))
    assert one.directory != other.directory
    texts = [{p: t for p, t, *_ in contents(c, Bytes())} for c in (one, other)]
    train = [p for p in texts[0] if split_of(p, 0.1, 0.1) == 0]
    assert all(texts[0][p] != texts[1][p] for p in train)
    alone = Document("701", "1 tree")  # what it is given does not depend on what came before
    ready = [list(tokenize(documents, config, "many", Bytes(), 0, Counter()))[-1][0].text
             for documents in ([alone], [Document("702", "x"), alone])]
    assert ready[0] == ready[1] != alone.text


def test_score_is_kept_and_minus_infinity_leaves_out(home):
    cache = build("many", with_many(score=length), Bytes(), 0)
    got = list(contents(cache, Bytes()))
    originals = [d for d in many() if isinstance(d, Document)]
    kept = [d for d in originals if len(d.text) >= 10]
    assert [(p, t) for p, t, *_ in got] == [(d.path, d.text) for d in kept] and len(kept) < len(originals)
    assert [s for *_, s in got] == [len(d.text) for d in kept]
    assert cache.total["counts"]["skipped: deselected"] == len(originals) - len(kept)


# ------------------------------------------------------------------------------------------------- the loader


class Points:
    """Code points as ids: with no code point used twice in a source, an id tells its document and place."""

    vocab, bos, eos, model = 2**20, 2**20 - 2, 2**20 - 1, b"points"

    def encode_batch(self, texts):
        return [np.array([ord(c) for c in text]) for text in texts]

    def decode(self, ids):
        return "".join(chr(i) for i in ids)


def points(first, documents, longest):
    """Documents of 1 to `longest` code points, from `first` on, each used once."""
    sizes = np.random.default_rng(first).integers(1, longest + 1, documents).tolist()
    for i, (size, end) in enumerate(zip(sizes, itertools.accumulate(sizes), strict=True)):
        yield Document(f"{first}/{i}", "".join(chr(first + p) for p in range(end - size, end)))


def stars():
    """Six hundred documents of 1 to 12 code points: three shards where a group seals one."""
    return points(0x10000, 600, 12)


def moons():
    """Forty documents of 1 to 90 code points."""
    return points(0x20000, 40, 90)


SKY = DataConfig(sources={"stars": Source(stars), "moons": Source(moons)}, dev=0.1, test=0.1, shard_tokens=1,
                 window=2)


def phase(**changes):
    """A phase as the Loader needs it."""
    return SimpleNamespace(**dict(
        steps=5_000, batch=4, seq=32, mixture=None, lengths=None, steer=0, order=data.shuffled,
        packing=data.concat_and_split, objective=data.causal) | changes)


@pytest.fixture(scope="module")
def caches():
    """The caches of SKY, of three shards and of one."""
    out = {name: build(name, SKY, Points(), 0) for name in SKY.sources}
    assert [cache.total["shards"] for cache in out.values()] == [3, 1]
    return out


@pytest.fixture(scope="module")
def loader(caches):
    """Makes a Loader over the caches of SKY, or of the named sources of it."""
    return lambda *phases, names=("stars", "moons"), seed=0: data.Loader(
        {name: caches[name] for name in names}, phases, SKY, Points(), seed)


def training(documents):
    """{target: (path, place, token before it)} of all positions that are trained on, but for ends."""
    out = {}
    for d in documents():
        if split_of(d.path, 0.1, 0.1) == 0:
            for place, char in enumerate(d.text):
                out[ord(char)] = (d.path, place, ord(d.text[place - 1]) if place else Points.bos)
    return out


def pieces_of(arrays):
    """(tokens, targets, positions, sources) of every segment of a batch's rows, in order."""
    for r, row in enumerate(arrays["segments"]):
        for segment in range(1, row.max() + 1):
            where = row == segment
            yield tuple(arrays[k][r, where].tolist() for k in ("tokens", "targets", "positions", "source"))


def test_targets_are_the_documents_next_tokens(loader):
    """Every token of a batch against the documents themselves, and the figures that go with it."""
    before = training(stars) | training(moons)
    ends = {ord(d.text[-1]) for documents in (stars, moons) for d in documents()}
    made, seen = loader(phase()), 0
    for step in range(1, 20):
        batch = made.batch(step)
        assert batch.mask == dict(kind="causal", window=0)
        assert set(batch.arrays) == {"tokens", "targets", "segments", "positions", "weights", "source"}
        assert all(x.shape == (4, 32) for x in batch.arrays.values())
        cut = 0
        for tokens, targets, positions, sources in pieces_of(batch.arrays):
            assert positions == list(range(len(tokens))) and tokens[1:] == targets[:-1]
            for token, target, source in zip(tokens, targets, sources, strict=True):
                if target == Points.eos:
                    assert token in ends and token in before
                else:
                    assert before[target][2] == token
                known = target if target != Points.eos else token
                assert source == (known >= 0x20000)
            cut, seen = cut + (targets[-1] != Points.eos), seen + 1
        equal(batch.arrays["weights"], batch.arrays["segments"] > 0)
        assert batch.metrics["data/waste"] == pytest.approx(np.mean(batch.arrays["segments"] == 0))
        assert batch.metrics["data/truncated"] == pytest.approx(cut / len(list(pieces_of(batch.arrays))))
        assert batch.metrics["data/segments"] == len(list(pieces_of(batch.arrays))) / 4
    assert seen > 200


@pytest.mark.parametrize("seq", [32, 7, 500])
def test_an_epoch_visits_every_position_once(loader, seq):
    """For documents in three shards and two windows, in each of two epochs, which differ in order."""
    made = loader(phase(batch=1, seq=seq), names=("stars",))
    epoch, expected, orders = made.rows[0][0][0].epoch, training(stars), []
    documents = len({path for path, _, _ in expected.values()})
    assert epoch >= (len(expected) + documents) / seq
    for first in (1, 1 + epoch):
        targets = [t for step in range(first, first + epoch) for r in [made.batch(step).arrays]
                   for t in r["targets"][r["weights"] > 0].tolist()]
        counts = Counter(targets)
        assert counts.pop(Points.eos) == documents and counts == Counter(dict.fromkeys(expected, 1))
        orders.append(targets)
    assert orders[0] != orders[1]
    assert made.epochs(0) == dict(stars=0) and made.epochs(epoch) == dict(stars=1)


def test_documents_and_rows_are_shuffled_within_their_window(loader):
    """Of three shards in windows of two, the rows of the first window all come before those of the second."""
    made = loader(phase(batch=1), names=("stars",))
    rows = made.rows[0][0][0]
    epoch, size = rows.epoch, rows.ends[1]
    assert rows.ends == [0, size, epoch] and size < epoch
    first = {path for path, place, _ in training(stars).values() if int(path.split("/")[1]) < 512}
    where = {target: path for target, (path, _, _) in training(stars).items()}
    inside = [[where[t] in first for t in made.batch(step).arrays["targets"].ravel().tolist() if t in where]
              for step in range(1, rows.epoch + 1)]
    assert all(all(x) for x in inside[:size])
    assert not any(any(x) for x in inside[size:])
    between, within = [], []  # whether source order is kept from row to row, and from piece to piece
    for step in range(1, size + 1):
        tokens = [piece[1][0] for piece in pieces_of(made.batch(step).arrays) if piece[1][0] != Points.eos]
        between, within = between + tokens[:1], within + (np.diff(tokens) > 0).tolist()
    assert 0.3 < np.mean(np.diff(between) > 0) < 0.7 and 0.3 < np.mean(within) < 0.7


def test_batches_do_not_depend_on_what_was_asked_before(loader):
    phases = (phase(steps=9, mixture=dict(stars=0.7, moons=0.3)),
              phase(steps=8, seq=16, batch=3, mixture=rising))
    made, steps = loader(*phases), list(range(1, 18))
    first = {step: made.batch(step) for step in steps}
    random.Random(0).shuffle(steps)
    for step in steps + [1]:
        for one, other in ((made.batch(step), first[step]), (loader(*phases).batch(step), first[step])):
            assert one.metrics == other.metrics and one.mask == other.mask
            assert all(np.array_equal(one.arrays[k], other.arrays[k]) for k in other.arrays)
    assert first[9].arrays["tokens"].shape == (4, 32) and first[10].arrays["tokens"].shape == (3, 16)


def test_order_follows_the_seed(loader):
    one, other = (loader(phase(), seed=seed).batch(1).arrays["tokens"] for seed in (0, 1))
    assert np.mean(one == other) < 0.5


def test_loader_reads_pieces_of_words_too(corpus, data_config, pieces):
    """With a trained tokenizer: the text of every segment stands in a training document."""
    cache = build("corpus", data_config, pieces, 0)
    made = data.Loader({"corpus": cache}, [phase(seq=64)], data_config, pieces, 0)
    texts = [pieces.encode(d.text) for d in data.text(str(corpus)) if split_of(d.path, 0.1, 0.1) == 0]
    lines = [" ".join(map(str, [pieces.bos, *ids, pieces.eos])) for ids in texts]
    for step in (1, 2, 3):
        for tokens, targets, _, _ in pieces_of(made.batch(step).arrays):
            wanted = " ".join(map(str, [*tokens, targets[-1]]))
            assert any(f" {wanted} " in f" {line} " for line in lines)


# --------------------------------------------------------------------------------------------------- mixtures


def rising(progress, losses):
    """A mixture that moves from stars to moons."""
    assert losses == []
    return dict(stars=1 - progress, moons=progress)


def test_no_mixture_is_in_proportion_to_the_rows(loader):
    made = loader(phase(steps=500))
    stars, moons = (rows.epoch for rows in made.rows[0][0])
    equal(made.draws[0].after(500)[0].sum(), 2_000)
    assert made.draws[0].after(500)[0][1] == pytest.approx(2_000 * moons / (stars + moons), abs=1)


def test_a_rare_source_comes_as_often_as_it_should(loader):
    """With weight 0.001 in batches of 4: at every 250th step, give or take one, never two at once."""
    made = loader(phase(steps=10_000, mixture=dict(stars=0.999, moons=0.001)))
    counts = np.array([made.draws[0].after(step)[0] for step in range(10_001)])
    equal(counts.sum(1), 4 * np.arange(10_001))
    assert counts[-1, 1] == 40
    assert np.max(np.abs(counts[:, 1] - 0.004 * np.arange(10_001))) < 1
    rare = np.flatnonzero(np.diff(counts[:, 1])) + 1
    assert set(np.diff(rare).tolist()) <= {249, 250, 251} and np.max(np.diff(counts[:, 1])) == 1
    for step in (int(rare[0]) - 1, int(rare[0])):
        assert np.sum(np.any(made.batch(step).arrays["source"] == 1, axis=1)) == (step == rare[0])


@given(st.lists(st.integers(0, 1_000), min_size=2, max_size=2).filter(any), st.integers(1, 9))
def test_counts_keep_to_the_mixture(loader, weights, batch):
    made = loader(phase(batch=batch, mixture=dict(zip(("stars", "moons"), weights, strict=True))))
    counts = np.array([made.draws[0].after(step)[0] for step in range(60)])
    equal(counts.sum(1), batch * np.arange(60))
    assert np.all(np.diff(counts, axis=0) >= 0)
    due = np.arange(60)[:, None] * batch * np.array(weights) / sum(weights)
    assert np.all(np.abs(counts - due) < 1 + 1e-6)


@given(st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), min_size=20, max_size=20),
       st.integers(1, 9))
def test_counts_keep_to_a_mixture_that_changes(caches, weights, batch):
    """Of four sources, as any function of progress gives them; and nothing is drawn less than no times."""
    shares = np.array(weights) / np.sum(weights, axis=1, keepdims=True)

    def mixture(progress, losses):
        return dict(zip("abcd", weights[round(progress * 20)], strict=True))

    phases = [phase(steps=20, batch=batch, mixture=mixture)]
    sources = dict.fromkeys("abcd", Source(moons))
    made = data.Loader(dict.fromkeys(sources, caches["moons"]), phases, replace(SKY, sources=sources),
                       Points(), 0)
    counts = np.array([made.draws[0].after(step)[0] for step in range(21)])
    equal(counts.sum(1), batch * np.arange(21))
    assert np.all(np.diff(counts, axis=0) >= 0)
    assert np.max(np.abs(counts[1:] - batch * np.cumsum(shares, axis=0))) < 2


def test_mixture_is_a_function_of_progress(loader):
    """Progress is 0 at a phase's first step; a source without weight does not come."""
    made = loader(phase(steps=3), phase(steps=100, mixture=rising))
    assert made.draws[1].shares(0).tolist() == [1, 0] and made.draws[1].shares(25).tolist() == [0.75, 0.25]
    assert made.draws[1].after(1)[0].tolist() == [4, 0] and \
        made.draws[1].after(100)[0][1] == pytest.approx(4 * 49.5, abs=1)
    assert not made.batch(4).arrays["source"].any() and made.batch(103).arrays["source"].all()


BAD = dict(unknown=dict(stars=1, suns=1), negative=dict(stars=-1, moons=2), nothing=dict(stars=0, moons=0),
           empty={}, function=lambda progress, losses: dict(suns=1), nan=dict(stars=math.nan, moons=1),
           infinite=dict(stars=math.inf, moons=1))


@pytest.mark.parametrize("mixture", BAD.values(), ids=BAD)
def test_bad_mixture_is_an_input_error(loader, mixture):
    with pytest.raises(InputError, match=r"phases\.1\.mixture .*stars, moons"):
        loader(phase(steps=2), phase(mixture=mixture)).batch(3)


def one_document():
    """A document of the dev split at its shares in `test_source_without_training_documents...`."""
    yield Document("a", "tree")


@pytest.mark.parametrize("mixture", [None, dict(one=1.0)])
def test_source_without_training_documents_is_an_input_error(home, mixture):
    config = DataConfig(sources={"one": Source(one_document)}, dev=0.5, test=0.5)
    caches = {"one": build("one", config, Bytes(), 0)}
    with pytest.raises(InputError, match="one"):
        data.Loader(caches, [phase(mixture=mixture)], config, Bytes(), 0).batch(1)


# ---------------------------------------------------------------------------------- phases, objective, thread


def test_phase_begins_where_the_last_one_ended(loader):
    """Rows drawn times seq, over the new seq: nothing is left out, and less than a row is seen again."""
    made = loader(phase(steps=5, batch=3, seq=32), phase(steps=4, batch=2, seq=20),
                  phase(steps=4, batch=2, seq=96), names=("stars",))
    drawn = [0, 5 * 3 * 32, 5 * 3 * 32 + 4 * 2 * 20]  # positions
    assert [made.draws[p].first()[0].tolist() for p in range(3)] == [[0], [drawn[1] // 20], [drawn[2] // 96]]
    for r, draw in enumerate((24, 25)):
        for key, value in made.rows[1][0][0].get(draw).arrays.items():
            equal(made.batch(6).arrays[key][r], value)
    assert [made.phase_of(step) for step in (1, 5, 6, 9, 10, 13)] == [0, 0, 1, 1, 2, 2]


def test_phases_of_one_length_share_an_epoch(loader):
    """Cut in two phases with other batches, an epoch still visits every position once."""
    epoch = loader(phase(), names=("stars",)).rows[0][0][0].epoch
    half = epoch // 3
    made = loader(phase(steps=half, batch=2), phase(steps=epoch - 2 * half, batch=1), names=("stars",))
    counts = Counter()
    for step in range(1, epoch - half + 1):
        counts.update(made.batch(step).arrays["targets"].ravel().tolist())
    del counts[Points.eos]
    assert counts == Counter(dict.fromkeys(training(stars), 1))


def test_sources_are_followed_each_by_its_own_count(loader):
    """In the second phase each source goes on where it was, whatever the mixture drew."""
    made = loader(phase(steps=5, mixture=dict(stars=3, moons=1)),
                  phase(steps=2, seq=16, mixture=dict(moons=1)))
    assert made.draws[0].after(5)[0].tolist() == [15, 5] and made.draws[1].first()[0].tolist() == [30, 10]
    rows = [made.rows[1][0][1].get(draw).arrays["tokens"] for draw in range(10, 14)]
    equal(made.batch(6).arrays["tokens"], rows)
    assert made.epochs(7) == {"stars": 30 / made.rows[1][0][0].epoch, "moons": 18 / made.rows[1][0][1].epoch}


def noisy(row, rng):
    """An objective with a key and a mask of its own."""
    return row | dict(noise=rng.integers(0, 2**31, len(row["tokens"]))), dict(kind="bidirectional", window=3)


def test_objective_has_its_say_and_a_generator_per_row(loader):
    made = [loader(phase(objective=noisy)).batch(step) for step in (1, 1, 2)]
    assert made[0].mask == dict(kind="bidirectional", window=3)
    equal(made[0].arrays["noise"], made[1].arrays["noise"])
    rows = np.concatenate([made[0].arrays["noise"], made[2].arrays["noise"]])
    assert rows.shape == (8, 32) and len({tuple(row) for row in rows.tolist()}) == 8


def mixed(row, rng):
    """An objective of masks by chance: one row in four is bidirectional."""
    return row, dict(kind="bidirectional" if rng.random() < 0.25 else "causal", window=0)


def mixed_and_declared(row, rng):
    return mixed(row, rng)


mixed_and_declared.masks = dict(kind="causal", window=0), dict(kind="bidirectional", window=0)


def by_source(row, rng):
    """An objective whose moons are read both ways, within a window that the stars do not have."""
    moon = bool(row["source"][0])
    return row, dict(kind="bidirectional" if moon else "causal", window=5 if moon else 0)


def test_unlike_masks_of_a_batch_become_one_prefix_mask(loader):
    """And not that of the first row. A batch whose rows agree has their mask, and no array more."""
    made, plain, kinds = loader(phase(objective=mixed)), loader(phase()), Counter()
    for step in range(1, 40):
        batch, expected = made.batch(step), plain.batch(step).arrays
        both = [np.random.default_rng([0, step, r]).random() < 0.25 for r in range(4)]
        kinds[batch.mask["kind"]] += 1
        if len(set(both)) == 1:
            assert batch.mask == dict(kind="bidirectional" if both[0] else "causal", window=0)
        else:
            assert batch.mask == dict(kind="prefix", window=0)
            equal(batch.arrays["prefix"], np.array(both)[:, None] & (expected["segments"] > 0))
            assert batch.arrays["prefix"].dtype == np.int32
        assert batch.arrays.keys() - {"prefix"} == expected.keys()
        assert all(np.array_equal(batch.arrays[key], expected[key]) for key in expected)
    assert kinds["prefix"] > 10 and kinds["causal"] > 5


@pytest.mark.parametrize("objective", [mixed, mixed_and_declared, partial(mixed_and_declared)])
def test_processes_agree_on_the_mask_of_a_batch(loader, objective):
    """Each makes its own rows alone, and all have the mask and the arrays of the whole."""
    made = loader(phase(objective=objective))
    for step in range(1, 20):
        whole = made.batch(step)
        for i in range(4):
            part = made.batch(step, lambda rows, i=i: np.arange(i, rows, 4))
            same(part, whole._replace(arrays={k: v[i::4] for k, v in whole.arrays.items()}))
        assert whole.mask["kind"] == "prefix" or objective is mixed


def test_masks_that_cannot_be_one_are_refused(loader):
    made = loader(phase(steps=2), phase(objective=by_source, mixture=dict(stars=1, moons=1)))
    with pytest.raises(InputError, match=r"phases\.1\.objective .*'causal', 'window': 0.*'window': 5"):
        made.batch(3)


def halves(sizes, seq):
    """A packing of one piece in a row, cut at half a row."""
    plan = data.concat_and_split(sizes, seq // 2)
    plan[:, ROW], plan[:, SEGMENT] = np.arange(len(plan)), 1
    return plan


def test_packing_is_the_phase_s_own(loader):
    made = loader(phase(steps=2), phase(steps=2, packing=halves))
    assert made.batch(2).arrays["segments"].max() > 1
    assert made.batch(3).arrays["segments"].max() == 1 and not made.batch(3).arrays["segments"][:, 16:].any()


def test_prefetch_keeps_the_order():
    assert list(prefetch(lambda step: step * step, range(1, 50))) == [s * s for s in range(1, 50)]
    assert list(prefetch(str, range(3, 3))) == []


def test_prefetch_raises_errors_in_their_turn():
    def make(step):
        if step == 3:
            raise InputError("step three")
        return step

    stream = prefetch(make, range(1, 10))
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(InputError, match="step three"):
        next(stream)


def test_prefetch_works_no_further_ahead_than_told():
    made = []
    stream = prefetch(lambda step: made.append(step) or step, range(100), depth=2)
    for step in stream:
        assert len(made) <= step + 1 + 2 + 1  # taken, waiting in the queue, in the worker's hand
        if step == 20:
            stream.close()
    assert len(made) < 30


def test_prefetch_ends_its_thread_when_closed():
    before = threading.active_count()
    stream = prefetch(lambda step: step, range(10**9))
    assert next(stream) == 0 and threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


# --------------------------------------------------------------------------------------------------- held out


@pytest.mark.parametrize("split", ["dev", "test", "train"])
def test_held_out_predicts_the_split_s_documents_once(cache, corpus, split):
    held = held_out(cache, split, Bytes(), seq=64, batch=3, overlap=16)
    sizes = {d.path: (corpus / d.path).stat().st_size for d in data.text(str(corpus))
             if SPLITS[split_of(d.path, 0.1, 0.1)] == split}
    assert set(held.paths) == set(sizes) and len(held.paths) == dict(dev=3, test=6, train=31)[split]
    assert held.bytes.tolist() == [sizes[p] for p in held.paths]
    assert list(held.texts()) == [(corpus / p).read_bytes() for p in held.paths]
    said, count = {d: [] for d in range(len(held.paths))}, np.zeros(len(held.paths), int)
    for arrays, whose in held.batches():
        assert set(arrays) == {"tokens", "targets", "segments", "positions", "weights", "source"}
        assert all(x.shape == (3, 64) for x in (*arrays.values(), whose))
        equal(whose >= 0, arrays["weights"] > 0)
        for d, target in zip(whose[whose >= 0].tolist(), arrays["targets"][whose >= 0].tolist(), strict=True):
            said[d].append(target)
    np.add.at(count, list(said), [len(x) for x in said.values()])
    equal(count, held.bytes + 1)
    for d, path in enumerate(held.paths):  # windows come in order, so do their targets
        assert bytes(said[d][:-1]) == (corpus / path).read_bytes() and said[d][-1] == Bytes.eos


def test_held_out_can_be_limited(cache):
    whole = held_out(cache, "test", Bytes(), 64, 3, 16)
    sizes = np.cumsum(whole.bytes + 1)
    for most, kept in ((int(sizes[2]), 3), (int(sizes[2]) - 1, 2), (1, 1), (10**9, len(sizes))):
        held = held_out(cache, "test", Bytes(), 64, 3, 16, most=most)
        assert held.paths == whole.paths[:kept]
        assert sum(int(np.sum(whose >= 0)) for _, whose in held.batches()) == sizes[kept - 1]


def test_held_out_of_nothing_is_nothing(home):
    config = DataConfig(sources={"one": Source(one_document)}, dev=0.0, test=0.0)
    for most in (None, 10):
        held = held_out(build("one", config, Bytes(), 0), "dev", Bytes(), 64, 3, 16, most)
        assert held.paths == [] and list(held.batches()) == [] and list(held.texts()) == []


def test_bits_per_byte_of_known_losses(cache):
    """Losses that depend on the target alone, summed here document by document."""
    held = held_out(cache, "test", Bytes(), 64, 3, 16)
    got = bits_per_byte(lambda arrays: arrays["targets"] / 100, held)
    nats = np.array([(sum(text) + Bytes.eos) / 100 for text in held.texts()])
    bpb = nats.sum() / math.log(2) / held.bytes.sum()
    assert got["loss"] == pytest.approx(nats.sum() / (held.bytes + 1).sum())
    assert got["bpb"] == pytest.approx(bpb)
    residual = nats / math.log(2) - bpb * held.bytes  # of a ratio estimator (Cochran 1977, 6.4)
    n = len(nats)
    assert got["bpb_se"] == pytest.approx(math.sqrt(residual @ residual / (n - 1) / n) / held.bytes.mean())
    one = bits_per_byte(lambda arrays: arrays["targets"] / 100,
                             held_out(cache, "test", Bytes(), 64, 3, 16, most=1))
    assert math.isnan(one["bpb_se"]) and one["bpb"] == pytest.approx(nats[0] / math.log(2) / held.bytes[0])


# --------------------------------------------------------- orders, row lengths, limits, steering, streaming


def backwards(draw, rows, progress, key):
    """An order: the plan's rows from the last to the first, from the middle on in the phase's second half."""
    return (rows - 1 - draw - (rows // 2 if progress >= 0.5 else 0)) % rows


def mostly_short(progress):
    return {16: 3.0 - 2 * progress, 64: 1.0}


def by_log(progress, log):
    """A mixture by the last losses; without any, the stars alone."""
    return log[-1] if log else {"stars": 1}


def same(one: data.Batch, other: data.Batch):
    assert one.arrays.keys() == other.arrays.keys() and one.mask == other.mask
    for key, value in one.arrays.items():
        equal(value, other.arrays[key], err_msg=key)


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_parts_of_a_batch_are_the_batch(loader, parts):
    made = loader(phase(batch=9, mixture=dict(stars=0.7, moons=0.3)))
    for step in (1, 5):
        whole, split = made.batch(step), [made.batch(step, lambda rows, i=i: np.arange(i, rows, parts))
                                          for i in range(parts)]
        assert {whole.rows, *(p.rows for p in split)} == {9}
        for i, part in enumerate(split):
            same(part, whole._replace(arrays={k: v[i::parts] for k, v in whole.arrays.items()}))


def test_order_is_told_the_draw_and_the_progress(loader):
    made, plain = (loader(phase(steps=steps, batch=1, order=order), names=("moons",)) for steps, order in
                   ((40, backwards), (400, lambda draw, rows, progress, key: draw % rows)))
    rows = made.rows[0][0][0].epoch
    for step in (1, 2, 20, 21, 40):
        draw = step - 1
        place = (rows - 1 - draw - (rows // 2 if draw >= 20 else 0)) % rows
        same(made.batch(step), loader(phase(steps=40, batch=1, order=lambda *_, at=place: at),
                                      names=("moons",)).batch(1))
    equal(plain.batch(rows + 1).arrays["tokens"], plain.batch(1).arrays["tokens"])


def test_row_lengths_keep_to_their_weights_and_batches_to_their_size(loader):
    made = loader(phase(steps=400, batch=2, seq=64, lengths=mostly_short), names=("stars",))
    shapes = [made.batch(step).arrays["tokens"].shape for step in range(1, 401)]
    assert {b * t for b, t in shapes} == {128} and {t for _, t in shapes} == {16, 64}
    due = np.cumsum([(3 - 2 * i / 400) / (4 - 2 * i / 400) for i in range(400)])
    assert np.max(np.abs(np.cumsum([t == 16 for _, t in shapes]) - due)) <= 1
    counts = made.draws[0].after(400)
    assert counts[:, 0].tolist() == [sum(b for b, t in shapes if t == length) for length in (16, 64)]
    for length in (16, 64):  # each length has rows of its own, none twice within an epoch
        first = [tuple(row) for step in range(1, 30) if shapes[step - 1][1] == length
                 for row in made.batch(step).arrays["targets"].tolist()]
        assert len(set(first)) == len(first) > 8


@given(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), st.integers(1, 12),
       st.lists(st.integers(0, 9), min_size=3, max_size=3))
def test_apportion(weights, rows, left):
    owed = np.array(weights) / sum(weights) * rows
    left = np.array(left, float) if sum(left) >= rows else np.full(3, math.inf)
    whole = data.apportion(owed, rows, left)
    assert whole.sum() == rows and np.all(whole >= 0) and np.all(whole <= left)
    if np.all(left >= np.ceil(owed)):
        assert np.all(np.abs(whole - owed) < 1)


def test_a_source_that_ends_with_a_batch_stops_the_run_too(caches):
    """Exactly as many rows as whole batches want: the next step has none, and nobody takes over."""
    rows = data.Loader(caches, [phase()], SKY, Points(), 0).rows[0][0][1].epoch
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=1.0)}
    made = data.Loader(caches, [phase(batch=10, mixture=dict(stars=0.9, moons=0.1))],
                       replace(SKY, sources=sources), Points(), 0)
    assert made.draws[0].after(rows)[0, 1] == rows
    with pytest.raises(InputError, match=f"moons: no rows left at step {rows} "):
        made.draws[0].after(rows + 1)


def test_two_threads_plan_and_draw_as_one(home):
    """Batches are made in one thread while another counts epochs: no window twice, no row lost."""
    config = with_many()
    cache = build("many", config, Bytes(), 0)

    def slow(lengths, seq):
        time.sleep(0.01)
        return data.concat_and_split(lengths, seq)

    config = replace(config, window=1)
    loaders = [data.Loader({"many": cache}, [phase(steps=400, seq=8)], config, Bytes(), 0) for _ in range(2)]
    loaders[1].rows[0][0][0].packing = slow
    threads = [threading.Thread(target=loaders[1].epochs, args=(400,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaders[1].epochs(400) == loaders[0].epochs(400)
    assert loaders[1].rows[0][0][0].ends == loaders[0].rows[0][0][0].ends


@pytest.mark.parametrize("after", ["stop", "renormalise"])
def test_a_source_comes_no_more_often_than_its_epochs_allow(caches, after):
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=1.5, after=after)}
    made = data.Loader(caches, [phase(steps=20, batch=9, mixture=dict(stars=0.5, moons=0.5)),
                                phase(steps=80, batch=9, mixture=dict(stars=0.1, moons=0.9))],
                       replace(SKY, sources=sources), Points(), 0)
    most = int(made.rows[0][0][1].epoch * 1.5)
    if after == "stop":
        with pytest.raises(InputError, match="moons: no rows left at step"):
            made.batch(100)
        return
    counts = np.array([made.draws[1].after(step)[0] for step in range(81)]) + made.draws[1].first()[0]
    assert np.max(counts[:, 1]) == most and counts[-1].sum() == 9 * 100
    assert np.all(np.diff(counts, axis=0).sum(1) == 9)


def test_a_source_that_went_beyond_its_epochs_gives_no_rows(caches):
    """An epoch of the second phase has fewer rows, so that more than all of them were drawn in the first."""
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=1.0, after="renormalise")}
    first = dict(packing=halves, batch=1, mixture=dict(moons=1))
    most = data.Loader(caches, [phase(**first)], SKY, Points(), 0).rows[0][0][1].epoch
    phases = [phase(steps=most, **first), phase(steps=4, mixture=dict(stars=1, moons=1))]
    made = data.Loader(caches, phases, replace(SKY, sources=sources), Points(), 0)
    assert made.draws[1].first()[0, 1] > made.rows[1][0][1].epoch
    assert made.draws[1].after(4).tolist() == [[16, 0]]
    assert made.batch(most + 1).rows == 4 and not made.batch(most + 1).arrays["source"].any()


def test_a_source_without_weight_does_not_stand_in(caches):
    sources = {"stars": Source(stars), "moons": Source(moons, epochs=0.5, after="renormalise")}
    made = data.Loader(caches, [phase(mixture=dict(moons=1))], replace(SKY, sources=sources), Points(), 0)
    with pytest.raises(InputError, match="no rows left"):
        made.batch(5_000)


def test_running_out_of_every_source_is_an_input_error(caches):
    sources = {"moons": Source(moons, epochs=0.5, after="renormalise")}
    made = data.Loader({"moons": caches["moons"]}, [phase()], replace(SKY, sources=sources), Points(), 0)
    with pytest.raises(InputError, match="moons: no rows left"):
        made.batch(5_000)


def test_a_steered_mixture_follows_its_log_and_nothing_else(caches):
    """Decisions come in turn; a loader that is given the log draws the same; beyond it there is an error."""
    phases = [phase(steps=4), phase(steps=12, mixture=by_log, steer=4)]
    first = data.Loader(caches, phases, SKY, Points(), 0)
    assert first.decided() == 8
    batches = [first.batch(step) for step in range(1, first.decided() + 1)]
    with pytest.raises(InputError, match="beyond the decisions"):
        first.batch(9)
    first.decide(1, dict(stars=1.0, moons=3.0))
    assert first.decided() == 12
    batches += [first.batch(step) for step in range(9, 13)]
    first.decide(1, dict(moons=1.0))
    assert first.decided() == 16 and first.log == [[], [dict(stars=1.0, moons=3.0), dict(moons=1.0)]]
    batches += [first.batch(step) for step in range(13, 17)]
    shares = [np.mean(b.arrays["source"]) for b in batches]
    assert shares[4:8] == [0] * 4 and np.mean(shares[8:12]) == 0.75 and shares[12:] == [1] * 4
    again = data.Loader(caches, phases, SKY, Points(), 0)
    again.restore(first.start, first.log)
    for step in (16, 9, 3):
        same(again.batch(step), batches[step - 1])


ASKED = []


def reversed_plan(lengths, seq, documents):
    """A packing that asks for the documents: the plain plan of the later half, by score."""
    score = documents.of(lambda shard: shard.score)
    ASKED.append((lengths.tolist(), score.tolist(), [documents.ids(i).tolist() for i in range(len(lengths))],
                  [d["path"] for d in documents.of(Shard.documents)]))
    return data.concat_and_split(np.where(score > np.median(score), lengths, 0), seq)


def test_a_packing_may_ask_about_its_documents_and_its_plan_is_kept(home):
    config = with_many(score=length)
    cache = build("many", config, Bytes(), 0)
    ASKED.clear()
    phases = [phase(steps=5, packing=reversed_plan)]
    batches = [data.Loader({"many": cache}, phases, config, Bytes(), 0).batch(3) for _ in range(2)]
    same(*batches)
    (lengths_, scores, ids, paths), = ASKED  # planned once: the second loader found the plan
    texts = {d.path: d.text for d in many() if isinstance(d, Document)}
    assert [bytes(i).decode() for i in ids] == [texts[p] for p in paths] and len(set(paths)) == len(paths)
    assert lengths_ == [len(i) + 1 for i in ids] and scores == [float(len(texts[p])) for p in paths]


def with_header(document, rng):
    return replace(document, prefix=f"<{document.path}>")


def test_a_prefix_is_read_but_not_predicted(home):
    """From the loader's own batches: the header's bytes are inputs without loss, the text has it all."""
    config = replace(with_many(prepare=with_header), dev=0.0, test=0.0)
    made = data.Loader({"many": build("many", config, Bytes(), 0)}, [phase(seq=48)], config, Bytes(), 0)
    texts, heads, seen = {d.path: d.text for d in many() if isinstance(d, Document)}, {}, Counter()
    assert made.rows[0][0][0].epoch >= 16
    for step in range(1, made.rows[0][0][0].epoch // 4 + 1):
        arrays = made.batch(step).arrays
        for r, row in enumerate(arrays["segments"]):
            for segment in range(1, row.max() + 1):
                where = row == segment
                tokens, weights = arrays["tokens"][r, where].tolist(), arrays["weights"][r, where].tolist()
                whole = bytes(t for t in tokens if t < 256).decode("utf-8", "replace")
                if tokens[0] == Bytes.bos and (head := whole.split(">")[0] + ">") in heads | {
                        f"<{p}>": 0 for p in texts}:
                    loud = len(tokens) - len(head.encode())
                    assert weights == ([0.0] * len(head.encode()) + [1.0] * len(tokens))[:len(tokens)]
                    seen[head] += loud > 0
    assert len(seen) > 20


STREAM = '''
import hashlib, os, sys, time
sys.path[:0] = [os.environ["COPPICE"]]
from types import SimpleNamespace
import numpy as np
import data
from lib.cache import Cache, build, cache_directory
from lib.tokenizers import Bytes

def letters():
    for i in range(9_000):
        if i % 256 == 0:
            time.sleep(float(os.environ["PAUSE"]))
        rng = np.random.default_rng(i)
        yield data.Document(f"{i:05d}", bytes(rng.integers(97, 123, rng.integers(1, 60)).tolist()).decode())

def rising(progress, log):
    return {"a": 1 - progress, "b": 1 + progress}

def pacing(draw, rows, progress, key):
    share = max(1, int(rows * min(1, 0.2 + progress)))
    return int(np.random.default_rng([*key, draw]).integers(share))

source = data.Source(letters, score=lambda document, ids: float(len(ids)))
config = data.DataConfig(sources=dict(a=source, b=source), tokenizer="bytes", shard_tokens=1, window=3)
plain = dict(lengths=None, steer=0, objective=data.causal, packing=data.concat_and_split, mixture=rising)
phases = [SimpleNamespace(steps=40, batch=12, seq=64, order=pacing, **plain),
          SimpleNamespace(steps=40, batch=12, seq=16, order=data.shuffled, **plain)]
what, *rest = sys.argv[1:]
if what == "build":
    build(rest[0], config, Bytes(), 0)
else:
    builder = SimpleNamespace(poll=lambda: None), None
    caches = {n: Cache(cache_directory(n, config, Bytes(), 0), n, builder) for n in config.sources}
    made = data.Loader(caches, phases, config, Bytes(), 0)
    begin, end, part, parts = map(int, rest)
    for step in range(begin, end + 1):
        arrays = made.batch(step, lambda n: np.arange(n * part // parts, n * (part + 1) // parts)).arrays
        rows = [hashlib.sha256(b"".join(v[r].tobytes() for _, v in sorted(arrays.items()))).hexdigest()
                for r in range(len(arrays["tokens"]))]
        print(step, *rows, flush=True)
'''


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.soak)])
def test_streamed_batches_are_those_of_a_finished_cache(kills, home, tmp_path):
    """Readers and builders are killed so often while shards are being built, and resumed with another
    number of processes, each of which reads its rows alone: a curriculum by score, a change of length, and a
    mixture that moves. Every row is as one process reads it from the finished cache."""
    (tmp_path / "stream.py").write_text(STREAM)
    environment = os.environ | dict(COPPICE=str(Path(data.__file__).parent), PAUSE="0.05")

    def start(*arguments, **more):
        command = [sys.executable, str(tmp_path / "stream.py"), *map(str, arguments)]
        return subprocess.Popen(command, text=True, env=environment | more, stdout=subprocess.PIPE)

    rng, rows, chunk = random.Random(0), {}, 80 // (kills + 1)
    for attempt in range(kills + 1):
        parts, step, last = rng.choice([1, 2, 3, 4]), len(rows) + 1, attempt == kills
        builders = [start("build", name) for name in "ab"]
        end = 80 if last else step + chunk - 1
        readers = [start("read", step, end, part, parts) for part in range(parts)]
        said = "" if last else "".join(readers[0].stdout.readline() for _ in range(rng.randint(1, chunk)))
        for process in () if last else (*builders, *readers):
            process.kill()
        texts = [reader.communicate(timeout=120)[0] for reader in readers]
        for lines in zip(*(x.splitlines() for x in [said + texts[0], *texts[1:]]), strict=last):
            fields = [line.split() for line in lines]
            if all(len(f) > 12 // parts for f in fields):  # a kill may cut a line
                assert {int(f[0]) for f in fields} == {len(rows) + 1}
                rows[len(rows) + 1] = sum((f[1:] for f in fields), [])
    assert [p.wait(120) for p in (*builders, *readers)] == [0] * (2 + parts)
    whole = [line.split() for line in start("read", 1, 80, 0, 1).communicate(timeout=120)[0].splitlines()]
    assert [[str(step), *row] for step, row in rows.items()] == whole and len(whole) == 80
    sealed = files(next((home / "tokens").glob("a-*/complete")).parent)
    (tmp_path / "again").mkdir()
    assert start("build", "a", XDG_CACHE_HOME=str(tmp_path / "again"), PAUSE="0").wait(120) == 0
    other = files(next((tmp_path / "again/coppice/tokens").glob("a-*/complete")).parent)
    assert {k: v for k, v in sealed.items() if "plans" not in str(k)} == other


def test_a_builder_that_fails_is_reported_by_its_last_words(tmp_path):
    (tmp_path / "log").write_text("waiting\nerror: source 'a' gives no document with text in it\n")
    cache = Cache(tmp_path / "a", "a", (SimpleNamespace(poll=lambda: 2), tmp_path / "log"))
    with pytest.raises(InputError, match="^source 'a' gives no document"):
        cache.wait(1)
    with pytest.raises(InputError, match="nobody builds it"):
        Cache(tmp_path / "a", "a").wait()
