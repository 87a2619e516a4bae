"""The token cache under fire: keys that outlive a copy, damage to every kind of file, plans, tokenizers."""
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpora import FAIL, MANY, files, many, with_many

import data
from data import DataConfig, Rows, Source
from lib import cache as caches
from lib.cache import Cache, build, open_cache
from lib.disk import locked, write
from lib.errors import InputError
from lib.keys import function_key
from lib.packing import concat_and_split
from lib.tokenizers import Bytes, make_tokenizer


def of_text(path: Path) -> DataConfig:
    """The config of a source in bytes."""
    source = Source(partial(data.text, path=str(path)))
    return DataConfig(sources={"x": source}, tokenizer="bytes", dev=0.1, test=0.1)


@pytest.fixture
def text(corpus, tmp_path) -> Path:
    """A copy of the corpus."""
    shutil.copytree(corpus, tmp_path / "text")
    return tmp_path / "text"


# ----------------------------------------------------------------------------------------------- keys


def test_a_key_outlives_permissions_copies_and_patch_releases(text, home, monkeypatch):
    """It is of names, sizes and times: not of inodes, owners, links or the build of Python."""
    before = function_key(of_text(text).sources["x"].documents)
    copy = text.with_name("copy")
    shutil.copytree(text, copy)
    shutil.rmtree(text)
    copy.rename(text)  # other inodes, and times of change
    for path in text.rglob("*.txt"):
        path.chmod(0o600)
    os.link(next(text.glob("*.txt")), text.with_name("link"))
    monkeypatch.setattr(sys, "version", "3.11.99 (another day)")
    assert function_key(of_text(text).sources["x"].documents) == before
    next(text.glob("*.txt")).touch()
    assert function_key(of_text(text).sources["x"].documents) != before


def test_the_fingerprint_is_of_the_text_wherever_it_is(text, home):
    before = build("x", of_text(text), Bytes(), 0)
    shutil.copytree(text, text.with_name("copy"))
    after = build("x", of_text(text.with_name("copy")), Bytes(), 0)
    assert before.directory != after.directory
    assert before.total["fingerprint"] == after.total["fingerprint"]


def test_the_fingerprint_is_of_tokens_and_scores_too(home):
    """Whatever makes them, under whatever key."""
    plain, scored = (build("many", with_many(score=score), Bytes(), 0) for score in (None, constant))
    other = build("many", MANY, Wide(), 0)
    assert len({cache.total["fingerprint"] for cache in (plain, scored, other)}) == 3


def constant(document, tokens) -> float:
    """A score."""
    return 1.0


class Wide(Bytes):
    """Bytes, each id one more."""

    vocab, bos, eos, model = 259, 257, 258, b"wide"

    def encode_batch(self, texts):
        return [ids.astype(int) + 1 for ids in super().encode_batch(texts)]


# --------------------------------------------------------------------------------------------- shards


def damaged(content: bytes, rng) -> bytes:
    """A content of the same size with a few bytes changed."""
    changed = bytearray(content)
    for at in rng.integers(len(content), size=3):
        changed[at] ^= int(rng.integers(1, 256))
    return bytes(changed)


@pytest.mark.parametrize("file", ["tokens.bin", "index.npz", "documents.jsonl", "seal.json"])
def test_damage_of_the_same_size_is_noticed_and_mended(home, file, capsys):
    directory = build("many", MANY, Bytes(), 0).directory
    whole, rng = files(directory), np.random.default_rng(0)
    for number in (0, 1, 2, 1):
        hurt = directory / f"{number:06d}" / file
        hurt.write_bytes(damaged(hurt.read_bytes(), rng))
        cache = build("many", MANY, Bytes(), 0)
        assert [len(cache.shard(i).documents()) for i in range(3)] == [253, 253, 187]
        assert files(directory) == whole
        assert f"{directory}/{number:06d} is damaged (not as it was sealed); it is built again" in (
            capsys.readouterr().out)


def test_several_shards_are_mended_at_once_from_the_first(home):
    """Seals too, so that nothing says what comes before a shard but the shards themselves."""
    directory = build("many", MANY, Bytes(), 0).directory
    whole = files(directory)
    for number in (0, 1):
        shutil.rmtree(directory / f"{number:06d}")
    (directory / "000002/seal.json").write_text("{}")
    assert build("many", MANY, Bytes(), 0).shard(2).documents()
    assert files(directory) == whole


def test_a_missing_shard_makes_no_shorter_corpus(home):
    """A cache that is complete knows how many shards it has; one that does not is completed again."""
    directory = build("many", MANY, Bytes(), 0).directory
    whole = files(directory)
    shutil.rmtree(directory / "000002")
    assert build("many", MANY, Bytes(), 0).total["shards"] == 3 and files(directory) == whole
    (directory / "complete").write_bytes(b"2")
    assert build("many", MANY, Bytes(), 0).total["shards"] == 3 and files(directory) == whole


def test_a_shard_is_checked_once_in_a_process(home, monkeypatch):
    build("many", MANY, Bytes(), 0)
    hashed, times = caches.file_hash, []
    monkeypatch.setattr(caches, "file_hash", lambda path: times.append(path) or hashed(path))
    cache = build("many", MANY, Bytes(), 0)
    for _ in range(3):
        for number in range(3):
            cache.open(number)
    assert len(times) == len(set(times)) == 9


def changed():
    """`many` with another first document, from when it has been told so."""
    for document in many():
        yield document if document.path != "001" or not FAIL.get("other") else data.Document("001", "other")


def test_what_the_source_gives_no_more_is_not_made_up(home, monkeypatch):
    """The sentence says what to do; other text is never put in the place of what was there."""
    config = DataConfig(sources={"x": Source(changed)}, tokenizer="bytes", dev=0.1, test=0.1, shard_tokens=1)
    for harm in ("tokens.bin", "seal.json"):
        directory = build("x", config, Bytes(), 0).directory
        hurt = directory / "000000" / harm
        hurt.write_bytes(b"x" + hurt.read_bytes()[1:])
        monkeypatch.setitem(FAIL, "other", True)
        said = f"{directory}/000000 is damaged, and .*; delete {directory} and"
        with pytest.raises(InputError, match=said):
            build("x", config, Bytes(), 0).shard(0)
        monkeypatch.setitem(FAIL, "other", False)
        build("x", config, Bytes(), 0).shard(0)


def test_a_cache_that_nobody_can_mend_says_so(home):
    directory = build("many", MANY, Bytes(), 0).directory
    (directory / "000001/seal.json").unlink()
    with pytest.raises(InputError, match=f"000001 is damaged .*; delete {directory} and it will be"):
        Cache(directory, "many").shard(1)
    assert len(open_cache("many", MANY, Bytes(), 0).shard(1).documents()) == 253


# ------------------------------------------------------------------------------- plans and tokenizers


def test_a_damaged_plan_is_made_again(home, capsys):
    cache = build("many", MANY, Bytes(), 0)

    def windows() -> list:
        rows = Rows(cache, 32, concat_and_split, data.shuffled, 1, Bytes(), (0, 0))
        return [rows.get(i).arrays["tokens"].tolist() for i in range(0, rows.epoch, 20)]

    first = windows()
    plans = sorted((cache.directory / "plans").rglob("*.plan"))
    whole, rng = files(cache.directory), np.random.default_rng(0)
    for plan in plans[:1]:
        for content in (damaged(plan.read_bytes(), rng), b"", plan.read_bytes()[:-1], b"x" * 500):
            plan.write_bytes(content)
            assert windows() == first and files(cache.directory) == whole
            assert f"the plan {plan} is damaged; it is made again" in capsys.readouterr().out


def test_a_damaged_tokenizer_is_made_again(home, corpus, capsys):
    config = DataConfig(sources=of_text(corpus).sources)
    model = make_tokenizer(config, 320).model
    (kept,) = (home / "tokenizers").glob("*.model")
    whole = kept.read_bytes()
    for content in (damaged(whole, np.random.default_rng(0)), whole[:100], b""):
        kept.write_bytes(content)
        assert make_tokenizer(config, 320).model == model and kept.read_bytes() == whole
        assert f"the tokenizer {kept} is damaged; it is made again" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- files


def test_a_lock_empties_no_file_that_it_links_to(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.lock").symlink_to(tmp_path / "mine")
    with locked(tmp_path / "a.lock"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_writers_of_one_process_id_do_not_share_a_name(tmp_path, monkeypatch):
    """As in two containers that share a directory: a write that another is at is not disturbed."""
    names = []
    replaced = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: names.append(path.name) or replaced(path, to))
    for _ in range(2):
        write(tmp_path / "a", "x")
    assert len(set(names)) == 2


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())
