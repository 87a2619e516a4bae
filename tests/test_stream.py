"""Batches that are read while shards are being built are those of a finished cache."""
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import files

from lib.config import ROOT

STEPS = 80
ROWS = 12  # in a batch
SCRIPT = '''
import hashlib
import os
import sys
import time

sys.path[:0] = [os.environ["COPPICE"]]
from types import SimpleNamespace

import numpy as np

import data
from lib.cache import Cache, build, cache_directory
from lib.tokenizers import Bytes


def letters():
    """Nine thousand documents, with a pause before each group."""
    for i in range(9_000):
        if i % 256 == 0:
            time.sleep(float(os.environ["PAUSE"]))
        rng = np.random.default_rng(i)
        text = bytes(rng.integers(97, 123, rng.integers(1, 60)).tolist())
        yield data.Document(f"{i:05d}", text.decode())


def length(document, ids):
    """A score."""
    return float(len(ids))


def rising(progress, log):
    """A mixture that moves."""
    return {"a": 1 - progress, "b": 1 + progress}


def pacing(draw, rows, progress, key):
    """An order that draws from a growing share of the rows."""
    share = max(1, int(rows * min(1, 0.2 + progress)))
    return int(np.random.default_rng([*key, draw]).integers(share))


source = data.Source(letters, score=length)
sources = {"a": source, "b": source}
config = data.DataConfig(sources=sources, tokenizer="bytes", shard_tokens=1, window=3)


def phase(seq, order):
    """A phase of half the steps."""
    return SimpleNamespace(
        steps=40,
        batch=12,
        seq=seq,
        order=order,
        lengths=None,
        steer=0,
        objective=data.causal,
        packing=data.concat_and_split,
        mixture=rising,
    )


def hashes(arrays):
    """A hash of each row."""
    found = []
    for row in range(len(arrays["tokens"])):
        values = [arrays[name][row].tobytes() for name in sorted(arrays)]
        found.append(hashlib.sha256(b"".join(values)).hexdigest())
    return found


def read(begin, end, part, parts):
    """Print the hashes of one part of the rows of each step."""
    def own(rows):
        return np.arange(rows * part // parts, rows * (part + 1) // parts)

    at_work = SimpleNamespace(poll=lambda: None), None
    caches = {}
    for name in sources:
        directory = cache_directory(name, config, Bytes(), 0)
        caches[name] = Cache(directory, name, at_work)
    phases = [phase(64, pacing), phase(16, data.shuffled)]
    loader = data.Loader(caches, phases, config, Bytes(), 0)
    for step in range(begin, end + 1):
        arrays = loader.batch(step, own).arrays
        print(step, *hashes(arrays), flush=True)


verb, *rest = sys.argv[1:]
if verb == "build":
    build(rest[0], config, Bytes(), 0)
else:
    read(*map(int, rest))
'''


def start(script: Path, *arguments, **more: str) -> subprocess.Popen:
    """A process of the script.

    Its output has no buffer here: `communicate` with a time limit loses lines that one holds.
    """
    environment = os.environ | {"COPPICE": str(ROOT), "PAUSE": "0.05"} | more
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, bufsize=0, env=environment, stdout=subprocess.PIPE)


def start_all(script: Path, first: int, last: int, parts: int) -> tuple[list, list]:
    """(builders, readers): a builder of each source, and a reader of each part of the rows."""
    builders = [start(script, "build", name) for name in "ab"]
    readers = [start(script, "read", first, last, part, parts) for part in range(parts)]
    return builders, readers


def output_of(process: subprocess.Popen) -> str:
    """All that a process has still to say."""
    return process.communicate(timeout=120)[0].decode()


def joined(texts: list[str], first: int, complete: bool) -> list[list[str]]:
    """The rows of each step from `first` on, from what the reader of each part printed.

    complete: every reader came to its end. Otherwise a kill may have cut its last line.
    """
    found = []
    lines = [text.splitlines() for text in texts]
    for step_lines in zip(*lines, strict=complete):
        fields = [line.split() for line in step_lines]
        whole = 1 + ROWS // len(texts)
        if all(len(words) >= whole for words in fields):
            assert {int(words[0]) for words in fields} == {first + len(found)}
            rows = []
            for words in fields:
                rows += words[1:]
            found.append(rows)
    return found


def read_until_killed(script: Path, first: int, last: int, parts: int, lines: int) -> list:
    """The rows of each step; all processes are killed once the first reader printed some lines."""
    builders, readers = start_all(script, first, last, parts)
    said = [readers[0].stdout.readline().decode() for _ in range(lines)]
    for process in (*builders, *readers):
        process.kill()
    texts = [output_of(reader) for reader in readers]
    texts[0] = "".join(said) + texts[0]
    return joined(texts, first, complete=False)


def read_to_the_end(script: Path, first: int, parts: int) -> list:
    """The rows of each step; every process ends well."""
    builders, readers = start_all(script, first, STEPS, parts)
    texts = [output_of(reader) for reader in readers]
    for process in (*builders, *readers):
        assert process.wait(120) == 0
    return joined(texts, first, complete=True)


def built_files(home: Path) -> dict[str, bytes]:
    """The files of the cache of source a, but for plans, which readers write beside the shards."""
    (complete,) = (home / "tokens").glob("a-*/complete")
    found = files(complete.parent)
    return {name: content for name, content in found.items() if "plans" not in name}


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.soak)])
def test_streamed_batches_are_those_of_a_finished_cache(kills, home, tmp_path):
    """Readers and builders are killed so often while shards are being built.

    They go on with another number of processes, each of which reads its rows alone. The phases
    have a curriculum by score, a change of length, and a mixture that moves. Every row is as one
    process reads it from the finished cache.
    """
    script = tmp_path / "stream.py"
    script.write_text(SCRIPT)
    rng = random.Random(0)
    chunk = STEPS // (kills + 1)
    rows = []
    for _ in range(kills):
        parts = rng.choice([1, 2, 3, 4])
        lines = rng.randint(1, chunk)
        first = len(rows) + 1
        rows += read_until_killed(script, first, first + chunk - 1, parts, lines)
    rows += read_to_the_end(script, len(rows) + 1, rng.choice([1, 2, 3, 4]))

    alone = output_of(start(script, "read", 1, STEPS, 0, 1))
    assert len(rows) == STEPS
    assert rows == joined([alone], 1, complete=True)

    other = tmp_path / "again"
    other.mkdir()
    rebuilt = start(script, "build", "a", XDG_CACHE_HOME=str(other), PAUSE="0")
    assert rebuilt.wait(120) == 0
    assert built_files(home) == built_files(other / "coppice")
