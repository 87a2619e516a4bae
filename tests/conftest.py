"""What the tests share: eight simulated devices, a cache directory of their own, a corpus, a tiny model."""
import atexit
import os
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import hypothesis
import jaxlib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"  # all of these before jax is imported
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Programs here run a few times, so they are compiled in a hurry: both of these make it six times faster. Runs
# in tests/test_runs.py go without, as users' do.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if tuple(map(int, jaxlib.__version__.split(".")[:2])) <= (0, 10):  # a newer XLA ends at this flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="coppice-tests-")
# A program of some size is compiled once for all tests of this process, and any for all that they start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["MPLCONFIGDIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "matplotlib")  # its list of fonts

import jax
import jax.numpy as jnp

import data
import model
from lib import trust
from lib.cache import Cache, build
from lib.errors import user_errors
from lib.hardware import tune_for_cpu
from lib.schedule import Plan, make_plan
from lib.tokenizers import Bytes, SentencePiece, train_bpe

tune_for_cpu()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
hypothesis.settings.register_profile(
    "coppice", deadline=None, max_examples=100, derandomize=True, database=None)
hypothesis.settings.load_profile("coppice")


USERS = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # for programs compiled as users' are


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """This process's for one that it starts, with so many devices."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    every = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # small programs too are kept for the next
    return os.environ | {"XLA_FLAGS": flags} | every | more


def course_of(config, context) -> Plan:
    """Shapes, budgets and rates of every step of a config, as a run works them out."""
    with user_errors():
        return make_plan(config, context)


def strong(config: model.ModelConfig) -> dict[str, jax.Array]:
    """Parameters of a shape like `tiny`; blocks and gains matter more than in the table's draw, so that
    nothing hides behind the residual stream.
    """
    rng, out = np.random.default_rng(1), {}
    for name, row in model.table(config).items():
        inputs = dict(embed=1, o=32, down=48).get(name, 32)
        x = rng.uniform(0.5, 1.5, row.shape) if row.init is None else rng.normal(size=row.shape) / inputs**0.5
        out[name] = jnp.asarray(x, jnp.float32)
    return out


def used(config, params):
    """The parameters that a shape has."""
    return {n: params[n] for n in model.table(config)}


def rows(seed=0, batch=2, seq=24, vocab=258):
    """A batch of random tokens with three segments and some padding in each row."""
    rng = np.random.default_rng(seed)
    segments = np.repeat([[1, 2, 3, 0]], batch, 0).repeat([seq // 2 - 3, seq // 4, seq // 4, 3], axis=1)
    starts = np.array([[np.argmax(row == s) for s in row] for row in segments])
    tokens, targets = rng.integers(0, vocab, (2, batch, seq), dtype=np.int32)
    return dict(tokens=tokens, targets=targets, segments=segments.astype(np.int32),
                positions=(np.arange(seq) - starts).astype(np.int32),
                weights=(segments > 0).astype(np.float32), source=np.zeros((batch, seq), np.int32))


def pytest_collection_modifyitems(config, items):
    """Tests that are marked long run only where `-m` names their mark; files that take minutes come first,
    or of the two processes one would end by waiting for the other.
    """
    long = [f"test_{name}.py" for name in ("runs", "scale", "train", "configs_growth", "widen", "study")]
    items.sort(key=lambda item: item.path.name not in long)
    for item in items:
        for mark in ("soak", "study", "library", "readme"):
            if item.get_closest_marker(mark) and mark not in config.getoption("-m"):
                item.add_marker(pytest.mark.skip(reason=f"long: run by hand, pytest -m {mark}"))


WORDS = ("the tree is cut back so that it grows again stronger; roots stay and shoots rise in spring "
         'def return import self for in if else None print(x) été 樹木 = + - # "quoted" 1984 42').split(" ")


def prose(seed: int, size: int) -> str:
    """`size` characters of words, lines and indentation, the same for the same seed."""
    rng = np.random.default_rng(seed)
    words = rng.choice(WORDS, size // 2 + 1).tolist()
    gaps = rng.choice([" ", " ", " ", " ", "\n", "\n    ", "\t"], len(words)).tolist()
    return "".join(w + g for w, g in zip(words, gaps, strict=True))[:size]


@pytest.fixture(autouse=True)
def trusted(monkeypatch):
    """This process reads runs that other processes made, whose caches are others': see lib/trust.py."""
    monkeypatch.setattr(trust, "asked", ["--trust"])


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A directory of 40 text files of 12 to 4,000 characters, some below a subdirectory.

    At the default shares of `DataConfig` each split has documents.
    """
    root = tmp_path_factory.mktemp("corpus")
    (root / "below").mkdir()
    sizes = np.random.default_rng(0).permutation(np.geomspace(12, 4_000, 40).astype(int))
    for i, size in enumerate(sizes.tolist()):
        place = root / "below" if i % 5 == 0 else root
        (place / f"coppice-{i:02d}.txt").write_text(prose(i, size), "utf-8", newline="")
    return root


@pytest.fixture(scope="session")
def data_config(corpus) -> data.DataConfig:
    """One source, the corpus, in bytes."""
    source = data.Source(partial(data.text, path=str(corpus)))
    return data.DataConfig(sources={"corpus": source}, tokenizer="bytes", dev=0.1, test=0.1)


@pytest.fixture(scope="session")
def pieces(corpus) -> SentencePiece:
    """A SentencePiece tokenizer of 320 pieces, trained on the corpus."""
    texts = [file.read_text("utf-8") for file in sorted(corpus.rglob("*.txt"))]
    return SentencePiece(train_bpe(texts, 320))


@pytest.fixture(scope="session")
def cache(data_config) -> Cache:
    """The corpus in bytes, built."""
    return build("corpus", data_config, Bytes(), 0)


@pytest.fixture(scope="session")
def tiny() -> model.ModelConfig:
    """A model of two blocks over bytes, computed in float32."""
    return model.ModelConfig(layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=258)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache home that nothing has been put in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"


@pytest.fixture(scope="session")
def params(tiny):
    """Parameters of the tiny model and an untied head, which a tied one leaves alone."""
    return strong(replace(tiny, tied=False))
