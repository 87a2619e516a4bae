"""lib/cache.py: documents in order, sealed shards, interrupted builds, damage, prepare, score."""
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import FAIL, MANY, Points, files, many, stars, token_count, with_many

import data
from data import DataConfig, Document, InputError, Source
from lib.cache import Cache, build, tokenize
from lib.sources import SPLITS, split_of
from lib.tokenizers import Bytes


def contents(cache, tokenizer):
    """(path, text, meta, split, score) of every document of a cache, in order."""
    for i in range(cache.total["shards"]):
        shard = cache.shard(i)
        assert shard.offsets[0] == 0 and shard.offsets[-1] == len(shard.tokens)
        for n, document in enumerate(shard.documents()):
            text = tokenizer.decode(shard.tokens[shard.offsets[n]:shard.offsets[n + 1]])
            assert shard.bytes[n] == len(text.encode())
            yield document["path"], text, document["meta"], int(shard.split[n]), float(shard.score[n])


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
    (None, "nothing"), (b"", "1 empty"), (b"\xff", "1 undecodable")])
def test_source_without_text_is_an_input_error(home, tmp_path, content, why):
    (tmp_path / "in").mkdir()
    if content is not None:
        (tmp_path / "in" / "a").write_bytes(content)
    config = DataConfig(sources={"x": Source(partial(data.text, path=str(tmp_path / "in")))})
    for _ in range(2):  # and so it stays
        with pytest.raises(InputError, match=f"'x' gives no document with text in it; it skipped {why}$"):
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
               replace(data_config, sources={"corpus": replace(source, score=token_count)}),
               replace(data_config, sources={"corpus": replace(source, prepare=tagged)}),
               replace(data_config, sources={"corpus": replace(source, documents=many)})]
    caches = [build("corpus", config, Bytes(), 0) for config in (data_config, *changed)]
    caches += [build("corpus", data_config, pieces, 0), build("corpus", changed[4], Bytes(), 1)]
    assert len({c.directory for c in caches}) == len(caches)  # with 9 tokens a shard there is one shard still
    assert len({c.total['fingerprint'] for c in caches}) == len(caches) - 1


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


@pytest.mark.parametrize("harm", ["truncated", "longer", "missing", "no seal", "torn seal"])
def test_damaged_shard_is_built_again(home, harm, capsys):
    directory = build("many", MANY, Bytes(), 0).directory
    whole = files(directory)
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
    assert len(cache.shard(1).tokens) and files(directory) == whole
    assert f"{directory}/000001 is damaged" in capsys.readouterr().out


def test_a_builder_that_fails_is_reported_by_its_last_words(tmp_path):
    (tmp_path / "log").write_text("waiting\nerror: source 'a' gives no document with text in it\n")
    cache = Cache(tmp_path / "a", "a", (SimpleNamespace(poll=lambda: 2), tmp_path / "log"))
    with pytest.raises(InputError, match="^source 'a' gives no document"):
        cache.wait(1)
    with pytest.raises(InputError, match="nobody builds it"):
        Cache(tmp_path / "a", "a").wait()


# ------------------------------------------------------------------------------------------ prepare and score


def tagged(document, rng):
    """A `prepare`: the document with a number in front; twice if its path ends in 3, never if in 4."""
    made = replace(document, text=f"<{rng.integers(10**9)}>{document.text}")
    return [made, made] if document.path[-1] == "3" else [] if document.path[-1] == "4" else made


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


def test_score_is_kept_and_minus_infinity_leaves_out_training_documents(home):
    cache = build("many", with_many(score=token_count), Bytes(), 0)
    got = list(contents(cache, Bytes()))
    originals = [d for d in many() if isinstance(d, Document)]
    kept = [d for d in originals if len(d.text) >= 10 or split_of(d.path, 0.1, 0.1)]
    assert [(p, t) for p, t, *_ in got] == [(d.path, d.text) for d in kept] and len(kept) < len(originals)
    assert [s for *_, s in got] == [len(d.text) if len(d.text) >= 10 else -math.inf for d in kept]
    assert cache.total["counts"]["skipped: deselected"] == len(originals) - len(kept)


def test_a_score_changes_nothing_of_what_is_held_out(home):
    """Runs with and without it are measured on the same documents."""
    plain, scored = (build("many", with_many(score=score), Bytes(), 0) for score in (None, token_count))
    splits = [[c[:4] for c in contents(cache, Bytes())] for cache in (plain, scored)]
    held_out, kept = ([c for c in cache if c[3] > 0] for cache in splits)
    assert kept == held_out and any(len(text) < 10 for _, text, *_ in kept)
    assert len(splits[1]) < len(splits[0])
    counts = [{s: cache.total["counts"][f"{s} documents"] for s in SPLITS} for cache in (plain, scored)]
    assert counts[0]["dev"] == counts[1]["dev"] > 0 and counts[0]["test"] == counts[1]["test"] > 0
    assert sum(counts[1].values()) == scored.total["counts"]["documents"]
    assert counts[0]["train"] - counts[1]["train"] == scored.total["counts"]["skipped: deselected"]
