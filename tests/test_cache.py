"""lib/cache.py: documents become sealed shards, whatever happens on the way."""
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from corpora import FAIL, MANY, Points, documents_of, files, many, stars, token_count, with_many

import data
from data import DataConfig, Document, InputError, Source
from lib.cache import Cache, build, tokenize
from lib.config import ROOT
from lib.sources import SPLITS, split_of
from lib.tokenizers import Bytes


class Held(NamedTuple):
    """A document as a cache holds it."""

    path: str
    text: str
    meta: dict
    split: int
    score: float | None  # None where it is left out of a comparison


def contents(cache: Cache, tokenizer) -> list[Held]:
    """Every document of a cache, in order."""
    found = []
    for number in range(cache.total["shards"]):
        shard = cache.shard(number)
        assert shard.offsets[0] == 0
        assert shard.offsets[-1] == len(shard.tokens)
        spans = list(itertools.pairwise(shard.offsets))
        facts = shard.documents()
        assert len(spans) == len(facts) == len(shard.bytes)
        for n, (start, end) in enumerate(spans):
            text = tokenizer.decode(shard.tokens[start:end])
            assert shard.bytes[n] == len(text.encode())
            split, score = int(shard.split[n]), float(shard.score[n])
            found.append(Held(facts[n]["path"], text, facts[n]["meta"], split, score))
    return found


def expected_of(documents) -> list[Held]:
    """What a cache should hold of documents, but for their scores, at shares of a tenth."""
    found = []
    for document in documents:
        split = split_of(document.path, 0.1, 0.1)
        found.append(Held(document.path, document.text, document.meta, split, None))
    return found


def without_scores(held: list[Held]) -> list[Held]:
    """What a cache holds, but for the scores: NaN is unlike itself."""
    return [document._replace(score=None) for document in held]


def files_source(path: Path) -> dict[str, Source]:
    """One source, x, of a file or of the files of a directory."""
    return {"x": Source(partial(data.text, path=str(path)))}


def fingerprint(cache: Cache) -> str:
    """What a cache says of its text, its tokens and its settings."""
    return cache.total["fingerprint"]


# ------------------------------------------------------------------------------- what a cache holds


@pytest.mark.parametrize("which", ["bytes", "pieces"])
def test_a_cache_holds_the_documents_in_order(data_config, corpus, pieces, which):
    tokenizers = {"bytes": Bytes(), "pieces": pieces}
    tokenizer = tokenizers[which]
    cache = build("corpus", data_config, tokenizer, 0)

    held = contents(cache, tokenizer)
    assert without_scores(held) == expected_of(data.text(str(corpus)))
    assert all(math.isnan(document.score) for document in held)
    assert cache.shard(0).tokens.dtype == np.uint16
    counts = cache.total["counts"]
    sizes = [file.stat().st_size for file in corpus.rglob("*.txt")]
    assert counts["documents"] == 40
    assert counts["bytes"] == sum(sizes)
    assert counts["train documents"] == 31
    assert counts["dev documents"] == 3
    assert counts["test documents"] == 6


def test_shards_are_sealed_by_size_and_counted(home):
    cache = build("many", MANY, Bytes(), 0)
    held = contents(cache, Bytes())
    assert without_scores(held) == expected_of(documents_of(many))
    assert cache.total["shards"] == 3
    assert cache.total["counts"]["skipped: odd"] == 7
    assert [len(cache.shard(i).bytes) for i in range(3)] == [253, 253, 187]

    single = build("many", replace(MANY, shard_tokens=10**9), Bytes(), 0)
    assert single.total["shards"] == 1
    assert without_scores(contents(single, Bytes())) == without_scores(held)


def test_large_vocabularies_have_wide_tokens(home):
    config = DataConfig(sources={"stars": Source(stars)})
    cache = build("stars", config, Points(), 0)
    texts = [document.text for document in contents(cache, Points())]
    assert cache.shard(0).tokens.dtype == np.uint32
    assert texts == [document.text for document in stars()]


def test_undecodable_and_empty_files_are_skipped_and_counted(home, tmp_path):
    directory = tmp_path / "in"
    directory.mkdir()
    (directory / "a").write_bytes(b"tree")
    (directory / "b").write_bytes(b"\xff")
    (directory / "c").write_bytes(b"")
    (directory / "d").write_bytes(b"\xfe")
    config = DataConfig(sources=files_source(directory), max_skipped=0.75)
    counts = build("x", config, Bytes(), 0).total["counts"]
    assert counts["documents"] == 1
    assert counts["skipped: undecodable"] == 2
    assert counts["skipped: empty"] == 1


def lonely():
    """A document that is no Unicode text, and one that is."""
    yield Document("a", "half a pair: \ud83c")
    yield Document("b\udcff", "tree")


def test_lone_surrogates_are_skipped_and_counted(home):
    config = DataConfig(sources={"lonely": Source(lonely)}, max_skipped=0.5)
    cache = build("lonely", config, Bytes(), 0)
    assert cache.total["counts"]["skipped: lone surrogates"] == 1
    (held,) = contents(cache, Bytes())
    assert (held.path, held.text) == ("b\udcff", "tree")


@pytest.mark.parametrize("content, why", [
    (None, "nothing"),
    (b"", "1 empty"),
    (b"\xff", "1 undecodable"),
])
def test_a_source_without_text_is_refused_as_often_as_it_is_tried(home, tmp_path, content, why):
    directory = tmp_path / "in"
    directory.mkdir()
    if content is not None:
        (directory / "a").write_bytes(content)
    config = DataConfig(sources=files_source(directory))
    sentence = f"'x' gives no document with text in it; it skipped {why}$"
    for _ in range(2):
        with pytest.raises(InputError, match=sentence):
            build("x", config, Bytes(), 0)


# ------------------------------------------------------------------------------ key and fingerprint


def times(directory: Path) -> dict[Path, int]:
    """When everything below a directory was last written."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def test_a_cache_is_found_again(home, data_config):
    first = build("corpus", data_config, Bytes(), 0)
    before = times(first.directory)
    assert before
    again = build("corpus", data_config, Bytes(), 5)  # no `prepare`: the seed does not matter
    assert again.directory == first.directory
    assert fingerprint(again) == fingerprint(first)
    assert times(first.directory) == before


def test_a_fingerprint_is_the_same_wherever_it_is_built(home, data_config, cache):
    again = build("corpus", data_config, Bytes(), 0)
    assert again.directory != cache.directory
    assert fingerprint(again) == fingerprint(cache)
    assert built(again.directory) == built(cache.directory)


def built(directory: Path) -> dict[str, bytes]:
    """The files of a cache, but for plans, which runs add."""
    return {name: content for name, content in files(directory).items() if "plans" not in name}


CHANGES = {}  # {number of a document: fields of it}; no part of a cache's key


def changing():
    """Six hundred documents, of which one may be another than before under the same key."""
    for i in range(600):
        document = Document(f"{i}", f"{i} tree", {"n": i})
        yield replace(document, **CHANGES.get(i, {}))


def all_changes() -> list[dict]:
    """No change; two documents swapped; one changed: the first, inner ones and the last."""
    swapped = {
        300: dict(path="301", text="301 tree", meta=dict(n=301)),
        301: dict(path="300", text="300 tree", meta=dict(n=300)),
    }
    found = [{}, swapped]
    for i in (0, 100, 255, 256, 599):
        found.append({i: dict(path="other")})
        found.append({i: dict(text=f"{i} root")})
        found.append({i: dict(meta={})})
        found.append({i: dict(prefix="read first: ")})
    return found


def test_a_fingerprint_covers_every_document_and_their_order_in_every_shard(tmp_path, monkeypatch):
    config = replace(MANY, sources={"changing": Source(changing)})
    changes = all_changes()
    caches = []
    for i, change in enumerate(changes):
        monkeypatch.setattr(sys.modules[__name__], "CHANGES", change)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(i)))
        caches.append(build("changing", config, Bytes(), 0))
    assert len({cache.directory.name for cache in caches}) == 1
    assert len({fingerprint(cache) for cache in caches}) == len(changes)


def tagged(document, rng):
    """A `prepare` that puts a random number in front.

    A path that ends in 3 gives two documents, one that ends in 4 none.
    """
    text = f"<{rng.integers(10**9)}>{document.text}"
    made = replace(document, text=text)
    if document.path[-1] == "3":
        return [made, made]
    if document.path[-1] == "4":
        return []
    return made


def test_a_cache_s_key_follows_tokenizer_and_settings(home, data_config, pieces):
    def with_source(**changes):
        source = replace(data_config.sources["corpus"], **changes)
        return replace(data_config, sources={"corpus": source})

    configs = [
        data_config,
        replace(data_config, dev=0.2),
        replace(data_config, test=0.2),
        replace(data_config, shard_tokens=9),
        with_source(score=token_count),
        with_source(prepare=tagged),
        with_source(documents=many),
    ]
    caches = [build("corpus", config, Bytes(), 0) for config in configs]
    caches.append(build("corpus", data_config, pieces, 0))
    caches.append(build("corpus", with_source(prepare=tagged), Bytes(), 1))
    assert len({cache.directory for cache in caches}) == len(caches)
    # A fingerprint is of text and tokens. With 9 tokens a shard these are the same.
    assert len({fingerprint(cache) for cache in caches}) == len(caches) - 1


def test_a_cache_s_key_follows_an_edited_file(home, tmp_path):
    """By its size and by the time of its last change."""
    file = tmp_path / "one.txt"
    config = DataConfig(sources=files_source(file))
    fingerprints = set()
    for content, when in (("tree", 1), ("root", 2), ("roots", 2)):
        file.write_text(content)
        os.utime(file, ns=(when, when))
        cache = build("x", config, Bytes(), 0)
        fingerprints.add(fingerprint(cache))
        assert [document.text for document in contents(cache, Bytes())] == [content]
    assert len(fingerprints) == 3


# ---------------------------------------------------------------------- builds that are interrupted


def build_until_it_fails(monkeypatch, after: int):
    """Build the cache of `many`, whose disk is gone after so many documents."""
    monkeypatch.setitem(FAIL, "after", after)
    with pytest.raises(OSError, match="the disk is gone"):
        build("many", MANY, Bytes(), 0)
    monkeypatch.setitem(FAIL, "after", None)


def leave_partial_files(directory: Path):
    """What a killed process would leave."""
    shard = directory / "000002.partial"
    shard.mkdir()
    (shard / "tokens.bin").write_bytes(b"half")
    (directory / "complete.partial").write_text("{")


def check_whole(cache: Cache, monkeypatch, elsewhere: Path):
    """A cache of `many` is byte for byte that of a build in one go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    whole = build("many", MANY, Bytes(), 0)
    assert whole.directory != cache.directory
    assert files(whole.directory) == files(cache.directory)


@pytest.mark.parametrize("after, shards", [(300, 1), (600, 2), (699, 2)])
def test_an_interrupted_build_is_taken_up_where_it_stopped(
    home, tmp_path, monkeypatch, after, shards
):
    """Shards that were sealed before are not written again."""
    build_until_it_fails(monkeypatch, after)
    (directory,) = [path for path in (home / "tokens").iterdir() if path.is_dir()]
    sealed = times(directory)
    assert len(sealed) == 5 * shards  # each shard a directory of four files
    leave_partial_files(directory)

    cache = build("many", MANY, Bytes(), 0)

    after_it = times(cache.directory)
    assert all(after_it[path] == time for path, time in sealed.items() if path.is_file())
    assert not list(cache.directory.glob("*.partial"))
    check_whole(cache, monkeypatch, tmp_path / "other")


def test_a_build_that_is_interrupted_before_its_first_shard_begins_anew(
    home, tmp_path, monkeypatch
):
    build_until_it_fails(monkeypatch, after=10)
    assert not list((home / "tokens").glob("*/*"))
    cache = build("many", MANY, Bytes(), 0)
    assert not list(cache.directory.glob("*.partial"))
    check_whole(cache, monkeypatch, tmp_path / "other")


BUILDER = '''
import os
import sys
import time

sys.path[:0] = [os.environ["COPPICE"], os.environ["HERE"]]
from data import DataConfig, Document, Source
from lib.cache import build
from lib.tokenizers import Bytes


def slow():
    """A document, once it may come."""
    with open(os.environ["HERE"] + "/log", "a") as log:
        log.write("reading\\n")
    print("reading", flush=True)
    while not os.path.exists(os.environ["HERE"] + "/go"):
        time.sleep(0.01)
    yield Document("a", "tree")


config = DataConfig(sources={"slow": Source(slow)})
print(build("slow", config, Bytes(), 0).total["fingerprint"])
'''


def test_of_two_builders_the_second_takes_what_the_first_has_built(home, tmp_path):
    script = tmp_path / "builder.py"
    script.write_text(BUILDER)
    environment = os.environ | {"COPPICE": str(ROOT), "HERE": str(tmp_path)}

    def start():
        command = [sys.executable, str(script)]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)

    with start() as one:
        assert one.stdout.readline() == "reading\n"
        with start() as two:
            waiting = two.stdout.readline()
            (tmp_path / "go").touch()
            first, _ = one.communicate(timeout=60)
            second, _ = two.communicate(timeout=60)
    assert one.returncode == 0
    assert two.returncode == 0
    assert waiting.startswith("waiting for another process")
    assert first == second
    assert len(first.strip()) == 20
    assert (tmp_path / "log").read_text() == "reading\n"
    directories = [path for path in (home / "tokens").iterdir() if path.is_dir()]
    assert len(directories) == 1


def damage(shard: Path, harm: str):
    """Harm the files of a shard."""
    tokens = shard / "tokens.bin"
    seal = shard / "seal.json"
    content = tokens.read_bytes()
    if harm == "truncated":
        tokens.write_bytes(content[:-1])
    elif harm == "longer":
        tokens.write_bytes(content + b"x")
    elif harm == "missing":
        (shard / "index.npz").unlink()
    elif harm == "no seal":
        seal.unlink()
    elif harm == "torn seal":
        seal.write_text(seal.read_text()[:20])


@pytest.mark.parametrize("harm", ["truncated", "longer", "missing", "no seal", "torn seal"])
def test_a_damaged_shard_is_built_again_and_its_directory_named(home, harm, capsys):
    directory = build("many", MANY, Bytes(), 0).directory
    whole = files(directory)
    damage(directory / "000001", harm)

    cache = build("many", MANY, Bytes(), 0)

    assert len(cache.shard(0).tokens)
    assert len(cache.shard(1).tokens)
    assert files(directory) == whole
    assert f"{directory}/000001 is damaged" in capsys.readouterr().out


def test_a_builder_that_fails_is_reported_by_its_last_words(tmp_path):
    log = tmp_path / "log"
    log.write_text("waiting\nerror: source 'a' gives no document with text in it\n")
    failed = SimpleNamespace(poll=lambda: 2)
    cache = Cache(tmp_path / "a", "a", (failed, log))
    with pytest.raises(InputError, match="^source 'a' gives no document"):
        cache.wait(1)


def test_a_cache_that_nobody_builds_is_not_waited_for(tmp_path):
    with pytest.raises(InputError, match="nobody builds it"):
        Cache(tmp_path / "a", "a").wait()


# -------------------------------------------------------------------------------- prepare and score


def texts_by_path(cache: Cache) -> dict[str, list[str]]:
    """The texts that a cache holds under each path."""
    found = {}
    for document in contents(cache, Bytes()):
        found.setdefault(document.path, []).append(document.text)
    return found


def test_prepare_changes_training_documents_alone(home):
    """Each has a generator of its own."""
    cache = build("many", with_many(prepare=tagged), Bytes(), 0)
    originals = {document.path: document for document in documents_of(many)}
    for document in contents(cache, Bytes()):
        assert document.split == split_of(document.path, 0.1, 0.1)
        assert document.meta == originals[document.path].meta

    texts = texts_by_path(cache)
    copies = {"3": 2, "4": 0}
    tags = []
    for path, original in originals.items():
        prepared = texts.get(path, [])
        if split_of(path, 0.1, 0.1):
            assert prepared == [original.text]
            continue
        assert len(prepared) == copies.get(path[-1], 1)
        pairs = [text[1:].split(">", 1) for text in prepared]
        assert all(rest == original.text for _, rest in pairs)
        tags += [tag for tag, _ in pairs[-1:]]
    assert len(tags) > 400
    assert len(set(tags)) == len(tags)


def test_prepare_follows_the_seed(home):
    config = with_many(prepare=tagged)
    one = build("many", config, Bytes(), 0)
    other = build("many", config, Bytes(), 1)
    assert one.directory != other.directory

    texts, others = texts_by_path(one), texts_by_path(other)
    trained = [path for path in texts if split_of(path, 0.1, 0.1) == 0]
    assert len(trained) > 400
    assert all(texts[path] != others[path] for path in trained)


def test_prepare_does_not_depend_on_the_documents_before():
    config = with_many(prepare=tagged)
    document = Document("701", "1 tree")

    def prepared(documents):
        rows = list(tokenize(documents, config, "many", Bytes(), 0, Counter()))
        return rows[-1].document.text

    alone = prepared([document])
    assert alone != document.text
    assert prepared([Document("702", "x"), document]) == alone


def test_a_score_is_kept_and_minus_infinity_leaves_out_training_documents(home):
    cache = build("many", with_many(score=token_count), Bytes(), 0)
    originals = documents_of(many)
    wanted = []
    scores = []
    for document in originals:
        long = len(document.text) >= 10
        if long or split_of(document.path, 0.1, 0.1):
            wanted.append(document)
            scores.append(len(document.text) if long else -math.inf)
    assert len(wanted) < len(originals)

    held = contents(cache, Bytes())
    assert [document.score for document in held] == scores
    assert without_scores(held) == expected_of(wanted)
    deselected = cache.total["counts"]["skipped: deselected"]
    assert deselected == len(originals) - len(wanted)


def test_a_score_changes_nothing_of_what_is_held_out(home):
    """Runs with and without it are measured on the same documents, short ones too."""
    plain = build("many", with_many(), Bytes(), 0)
    scored = build("many", with_many(score=token_count), Bytes(), 0)
    before = without_scores(contents(plain, Bytes()))
    after = without_scores(contents(scored, Bytes()))
    held_out = [document for document in before if document.split > 0]
    assert [document for document in after if document.split > 0] == held_out
    assert any(len(document.text) < 10 for document in held_out)
    assert len(after) < len(before)


def test_documents_that_a_score_leaves_out_are_counted(home):
    plain = build("many", with_many(), Bytes(), 0).total["counts"]
    scored = build("many", with_many(score=token_count), Bytes(), 0).total["counts"]
    assert scored["dev documents"] == plain["dev documents"] > 0
    assert scored["test documents"] == plain["test documents"] > 0
    assert scored["documents"] == sum(scored[f"{split} documents"] for split in SPLITS)
    left_out = plain["train documents"] - scored["train documents"]
    assert left_out == scored["skipped: deselected"]
