"""Damage to every kind of file of a run and a cache, drawn from a seed: noticed, or of unused bytes."""

import hashlib
import random
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import soak
from corpora import MANY
from test_trust_runs import made, one_device, stopped  # noqa: F401  (fixtures)

import data
import train
from lib import trust
from lib.cache import build
from lib.checkpoint import Checkpoints, find_checkpoint
from lib.config import from_json
from lib.disk import read_object
from lib.errors import InputError
from lib.log import rows_kept
from lib.packing import concat_and_split
from lib.resume import own_tokenizer
from lib.tokenizers import Bytes, make_tokenizer
from model import ModelConfig

# Files that their owner may edit, or that no run reads again: digits changed there are read as they are now.
TEXTS = {"config.json", "metrics.jsonl", "summary.json"}


def harmed(content: bytes, dice: random.Random) -> tuple[str, bytes | None]:
    """(what was done, a file's content after it); None: the file is gone."""
    way = dice.choice(
        ["a bit", "bytes", "cut", "emptied", "gone", "inserted", "swapped", "zeros", "another"]
    )
    if way == "gone":
        return way, None
    if way == "emptied" or not content:
        return way, b""
    at, most = dice.randrange(len(content)), min(64, len(content))
    length = dice.randint(1, most)
    if way == "a bit":
        changed = bytes([content[at] ^ (1 << dice.randrange(8))])
        return way, content[:at] + changed + content[at + 1 :]
    if way == "bytes":
        return way, content[:at] + dice.randbytes(length) + content[at + length :]
    if way == "cut":
        return way, content[:at]
    if way == "inserted":
        return way, content[:at] + dice.randbytes(length) + content[at:]
    if way == "zeros":
        return way, content[:at] + bytes(len(content) - at)
    if way == "another":
        return way, dice.randbytes(len(content))
    half = len(content) // 2
    return way, content[half:] + content[:half]


class Reader:
    """What reads one kind of file; `read` gives all that comes of it, as something that can be compared."""

    def __init__(self, kind: str, files: list[Path], read):
        self.kind, self.files, self.read = kind, sorted(files), read
        self.whole = read()

    def try_one(self, dice: random.Random, capsys) -> str:
        """Damage a drawn file, read, and put it back; what came of it."""
        file = dice.choice(self.files)
        before = file.read_bytes()
        way, after = harmed(before, dice)
        if after is None:
            file.unlink()
        else:
            file.write_bytes(after)
        capsys.readouterr()
        try:
            found = self.read()
        except InputError as error:
            assert "\n" not in str(error)
            return f"{self.kind}: refused"
        finally:
            said = "".join(capsys.readouterr())
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(before)
        if found == self.whole:
            return f"{self.kind}: " + ("made again" if "damaged" in said else "the same comes of it")
        if "damaged" in said or not found:
            return f"{self.kind}: noticed, and left out"
        assert self.kind in TEXTS, f"{file}, {way}: not noticed"
        return f"{self.kind}: read as it is now (a text that its owner may edit)"


def digest(values) -> str:
    """A hash of arrays and texts."""
    found = hashlib.sha256()
    for value in jax.tree.leaves(values):
        found.update(np.asarray(value).tobytes() if hasattr(value, "dtype") else repr(value).encode())
    return found.hexdigest()


def of_run(run: Path) -> list[Reader]:
    """The readers of a run's files."""
    step = run / "checkpoints/4"

    def checkpoint():
        checkpoints, _, meta = find_checkpoint(str(run), 4)
        like = train.state_like(from_json(ModelConfig, meta["model"]), train.adamw, one_device())
        return digest([meta, checkpoints.state(4, like)])

    def code():
        trust.recorded.clear()
        asked, trust.asked[:] = list(trust.asked), []
        try:
            trust.read_record(run)
        finally:
            trust.asked[:] = asked
        found = str(trust.recorded)
        trust.recorded.clear()
        if found != known:
            raise InputError("another record, which is not one's own")
        return found

    known = "{}"
    kept = Checkpoints(run / "checkpoints").meta(4)
    files = [path for path in step.rglob("*") if path.is_file()]
    meta = [path for path in files if "meta" in path.relative_to(step).parts]
    return [
        Reader("checkpoint, metadata", meta, checkpoint),
        Reader("checkpoint, arrays", [path for path in files if path not in meta], checkpoint),
        Reader("tokenizer.model", [run / "tokenizer.model"], lambda: own_tokenizer(run, kept).read_bytes()),
        Reader("source/code.json", [run / "source/code.json"], code),
        Reader("config.json", [run / "config.json"], lambda: repr(train.load(str(run), 2)[1])),
        Reader("metrics.jsonl", [run / "metrics.jsonl"], lambda: rows_kept(run / "metrics.jsonl", 9, True)),
        Reader("summary.json", [run / "summary.json"], lambda: read_object(run / "summary.json")),
    ]


def of_cache(corpus: Path) -> list[Reader]:
    """The readers of a token cache's files, of a plan and of a tokenizer."""
    directory = build("many", MANY, Bytes(), 0).directory
    words = data.DataConfig(
        sources={"x": data.Source(train.functools.partial(data.text, path=str(corpus)))}
    )

    def shards():
        cache = build("many", MANY, Bytes(), 0)
        every = [cache.shard(number) for number in range(cache.wait())]
        arrays = [list(shard._replace(directory=None)) for shard in every]
        return digest([arrays, [shard.documents() for shard in every], cache.total])

    def rows():
        cache = build("many", MANY, Bytes(), 0)
        drawn = data.Rows(cache, 32, concat_and_split, data.shuffled, 1, Bytes(), (0, 0))
        return digest([drawn.get(i).arrays for i in range(0, drawn.epoch, 20)])

    rows()
    own = [
        Reader(name, list(directory.glob(f"*/{name}")), shards)
        for name in ("tokens.bin", "index.npz", "documents.jsonl", "seal.json")
    ]
    make_tokenizer(words, 320)
    tokenizers = list((directory.parent.parent / "tokenizers").glob("*.model"))
    return [
        *own,
        Reader("complete", [directory / "complete"], shards),
        Reader("plan", list(directory.glob("plans/*/*.plan")), rows),
        Reader("tokenizer of the cache", tokenizers, lambda: make_tokenizer(words, 320).model),
    ]


@pytest.mark.soak
def test_damage_is_noticed_or_of_bytes_that_nothing_reads(made, home, corpus, capsys):  # noqa: F811
    begun, number, counts, failed = time.monotonic(), soak.size("DAMAGES", 500), Counter(), []
    readers = of_run(made / "runs/run") + of_cache(corpus)
    for case in range(number):
        dice = random.Random(f"{soak.seed()} {case}")
        reader = readers[case % len(readers)]
        try:
            counts[reader.try_one(dice, capsys)] += 1
        except Exception as error:  # of a reader, which must say what is wrong by an InputError alone
            failed.append(f"{case} {reader.kind}: {type(error).__name__}: {error!s:.300}")
    assert not failed, "\n".join([f"{len(failed)} of {number}:", *failed[:40]])
    said = (
        "A bit, some bytes or all of a file changed, cut off, swapped, put in or taken away. What is not "
        "noticed gives the same arrays, rows and metadata as before, or is a text that its owner may edit."
    )
    soak.record("Damaged files", number, counts, said, begun)
