"""What the tests share: eight simulated devices, a cache directory, a corpus, a tiny model."""
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

# The environment is set before jax is imported, which reads it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

# Programs here run a few times, so they are compiled in a hurry: both of these make it six times
# faster. Runs in tests/test_runs.py go without, as users' do.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if [int(part) for part in jaxlib.__version__.split(".")[:2]] <= [0, 10]:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # a newer XLA ends at it

# A program of some size is compiled once for all tests of this process, and any for all that they
# start. Matplotlib keeps its list of fonts.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="coppice-tests-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] + "/compiled"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["MPLCONFIGDIR"] = os.environ["XDG_CACHE_HOME"] + "/matplotlib"

import jax
import jax.numpy as jnp

import data
import model
import train  # noqa: F401  its make_mesh is replaced below
from lib import trust
from lib.cache import Cache, build
from lib.errors import user_errors
from lib.hardware import tune_for_cpu
from lib.schedule import Plan, make_plan
from lib.sharding import MeshConfig, make_mesh
from lib.tokenizers import Bytes, SentencePiece, train_bpe

tune_for_cpu()
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
hypothesis.settings.register_profile(
    "coppice",
    deadline=None,
    max_examples=100,
    derandomize=True,
    database=None,
)
hypothesis.settings.load_profile("coppice")


# ------------------------------------------------------------------------ which tests run, and when

# Files that take longest, the longest first. They come before all others, or of the two processes
# one would end by waiting for the other.
SLOWEST = [
    "test_runs.py",
    "test_scale.py",
    "test_seams_model.py",
    "test_studies_trained.py",
    "test_export.py",
    "test_seams_study.py",
    "test_lib_teacher.py",
    "test_seams_data.py",
    "test_widen.py",
    "test_seams_evaluate.py",
    "test_generate.py",
    "test_step.py",
    "test_model.py",
    "test_resumption.py",
    "test_config.py",
    "test_trust_runs.py",
    "test_train.py",
    "test_docs.py",
    "test_edits.py",
    "test_trust_code.py",
    "test_core_tasks.py",
    "test_study.py",
    "test_own_held_out.py",
]
LONG_MARKS = ("soak", "study", "library", "readme", "notebook")


def place(item) -> int:
    """Where a test's file stands in the order in which files are run."""
    name = item.path.name
    return SLOWEST.index(name) if name in SLOWEST else len(SLOWEST)


def pytest_collection_modifyitems(config, items):
    """Slow files come first; tests that are marked long run only where `-m` names their mark."""
    items.sort(key=place)
    asked = re.findall(r"\w+", config.getoption("-m"))
    for item in items:
        for mark in LONG_MARKS:
            if item.get_closest_marker(mark) and mark not in asked:
                reason = f"long: run by hand, pytest -m {mark}"
                item.add_marker(pytest.mark.skip(reason=reason))


# ------------------------------------------------------------------------------ processes and plans

USERS = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # programs compiled as users' are


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """This process's for one that it starts, with so many devices."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    own = {
        "XLA_FLAGS": flags,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # small programs too are kept
    }
    return os.environ | own | more


def first_cosine(torch):
    """Let PyTorch take its first cosine, whose result nobody uses.

    MKL's first one in a process is off by 1.5e-4 now and then (one process in fifty, PyTorch 2.13
    beside other work), and so were rotations: logits differed by 3e-3. Later ones are exact.
    """
    torch.ones(4_096).cos()


def course_of(config, context) -> Plan:
    """Shapes, budgets and rates of every step of a config, as a run works them out."""
    with user_errors():
        return make_plan(config, context)


def mesh_of_one(config, devices=None):
    """In place of `train.make_mesh`: the mesh over the first device alone."""
    return make_mesh(config, jax.devices()[:1])


@pytest.fixture
def one_device(monkeypatch):
    """Runs that a test starts in this process see one device."""
    monkeypatch.setattr("train.make_mesh", mesh_of_one)


def mesh_as_asked(config, devices=None):
    """In place of `train.make_mesh`: eight devices for a config that says how they are laid out."""
    if config == MeshConfig() and devices is None:
        devices = jax.devices()[:1]
    return make_mesh(config, devices)


@pytest.fixture(scope="session", autouse=True)
def no_more_devices_than_asked():
    """A run of this process has one device unless its config lays eight out: these take longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.make_mesh", mesh_as_asked)
        yield


# ---------------------------------------------------------------------------------- the tiny model


@pytest.fixture(scope="session")
def tiny() -> model.ModelConfig:
    """A model of two blocks over bytes, computed in float32."""
    return model.ModelConfig(
        layers=2,
        embed=32,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=48,
        vocab=258,
        tied=True,
    )


INPUTS = {"embed": 1, "down": 48}  # inputs of an output; 32 of all others


def strong(config: model.ModelConfig) -> dict[str, jax.Array]:
    """Parameters of a shape like `tiny` in which nothing hides behind the residual stream.

    Blocks and gains matter more than in the table's draw.
    """
    rng = np.random.default_rng(1)
    params = {}
    for name, row in model.table(config).items():
        if row.init is None:
            x = rng.uniform(0.5, 1.5, row.shape)
        else:
            inputs = INPUTS.get(name, 32)
            x = rng.normal(size=row.shape) / inputs**0.5
        params[name] = jnp.asarray(x, jnp.float32)
    return params


@pytest.fixture(scope="session")
def params(tiny):
    """Parameters of the tiny model and an untied head, which a tied one leaves alone."""
    return strong(replace(tiny, tied=False))


def used(config, params):
    """The parameters that a shape has."""
    return {name: params[name] for name in model.table(config)}


def rows(seed=0, batch=2, seq=24, vocab=258):
    """A batch of random tokens with three segments and some padding in each row."""
    rng = np.random.default_rng(seed)
    quarter = seq // 4
    sizes = [seq // 2 - 3, quarter, quarter, 3]
    assert sum(sizes) == seq, "seq is a multiple of 4"
    segments = np.repeat([1, 2, 3, 0], sizes)
    positions = np.concatenate([np.arange(size) for size in sizes])
    tokens, targets = rng.integers(0, vocab, (2, batch, seq), dtype=np.int32)

    def in_each_row(values, dtype):
        return np.tile(values.astype(dtype), (batch, 1))

    return dict(
        tokens=tokens,
        targets=targets,
        segments=in_each_row(segments, np.int32),
        positions=in_each_row(positions, np.int32),
        weights=in_each_row(segments > 0, np.float32),
        source=np.zeros((batch, seq), np.int32),
    )


# --------------------------------------------------------------------------------------- the corpus

WORDS = (
    "the tree is cut back so that it grows again stronger; roots stay and shoots rise in spring "
    'def return import self for in if else None print(x) été 樹木 = + - # "quoted" 1984 42'
).split(" ")
GAPS = [" ", " ", " ", " ", "\n", "\n    ", "\t"]


def prose(seed: int, size: int) -> str:
    """`size` characters of words, lines and indentation, the same for the same seed."""
    rng = np.random.default_rng(seed)
    words = rng.choice(WORDS, size // 2 + 1).tolist()
    gaps = rng.choice(GAPS, len(words)).tolist()
    pairs = zip(words, gaps, strict=True)
    return "".join(word + gap for word, gap in pairs)[:size]


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
    below = root / "below"
    below.mkdir()
    sizes = np.geomspace(12, 4_000, 40).astype(int)
    sizes = np.random.default_rng(0).permutation(sizes)
    for i, size in enumerate(sizes.tolist()):
        place = root if i % 5 else below
        text = prose(i, size)
        (place / f"coppice-{i:02d}.txt").write_text(text, "utf-8", newline="")
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


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A cache home that nothing has been put in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coppice"
