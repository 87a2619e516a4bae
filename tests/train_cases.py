"""What the tests of training share: a tiny config, what it is made of, steps taken by hand."""
import json
import math
from dataclasses import replace
from pathlib import Path

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import optax

import model
import train
from data import DataConfig, Document, Source
from lib import optim
from lib.edits import stack
from lib.kernels import Mask
from lib.optim import State
from lib.schedule import Plan, Schedule
from lib.sharding import MeshConfig, make_mesh
from model import Context, Edited, Model, ModelConfig
from train import Config, Phase

TINY = ModelConfig(
    layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=258, tied=True)
CAUSAL = Mask("causal", 0)
WORDS = "def return self tree loss stack layer import class of".split()


# --------------------------------------------------------------------- functions that configs name


def verses(count: int = 60, name: str = "verse"):
    """A source: short lines of words, each in an order drawn from its number."""
    for number in range(count):
        rng = np.random.default_rng(number)
        words = rng.choice(WORDS, 40)
        yield Document(f"{name}/{number}", " ".join(words), {"number": number})


def in_front(document, rng):
    """A `prepare`: the path before the text."""
    return replace(document, text=f"<{document.path}>{document.text}")


def odd_only(document, tokens):
    """A `score`: the document's number; the even ones are left out."""
    number = document.meta["number"]
    if number % 2 == 0:
        return -math.inf
    return float(number)


def one_each(lengths, seq):
    """A `packing`: a row for the start of each document, and nothing else in it."""
    documents = np.arange(len(lengths), dtype=np.int64)
    rows = documents
    segments = np.ones_like(documents)
    starts = np.zeros_like(documents)
    taken = np.minimum(lengths, seq)
    quiet = np.zeros_like(documents)
    return np.stack([rows, segments, documents, starts, taken, quiet], axis=1)


def first_then_second(progress, dev_losses):
    """A `mixture`: source `a` in the first half of the phase, `b` in the second."""
    return {"a": float(progress < 0.5), "b": float(progress >= 0.5)}


def second_half(row, rng):
    """An `objective`: no loss on the first half of a row, and a key of its own."""
    length = len(row["tokens"])
    late = np.arange(length) >= length // 2
    own = {
        "weights": row["weights"] * late,
        "mine": np.full(length, 7, np.int32),
    }
    return row | own, {"kind": "causal", "window": 0}


def same_weights(params, step, batch):
    """A `reparam` that scales by one."""
    one = jnp.where(step >= 0, 1.0, 2.0)
    return {name: x * one.astype(x.dtype) for name, x in params.items()}


def undefined(logits, batch, extras, first=1, last=1):
    """A `token_loss` that is not finite from step `first` to `last` (counted from 1)."""
    losses = model.cross_entropy(logits, batch, extras)
    step = extras["step"] + 1
    wrong = (step >= first) & (step <= last)
    return jnp.where(wrong, jnp.nan, losses)


def counted(losses, batch):
    """A `reduce` with metrics of its own."""
    weights = batch["weights"]
    targets = jnp.sum(weights)
    metrics = {"own/targets": targets, "own/largest": jnp.max(losses)}
    return (jnp.sum(losses * weights), targets), metrics


def silence(model, context):
    """An `edit`: final gains of zero, so that every logit is zero."""
    params = model.params | {"norm": model.params["norm"] * 0}
    return Edited(Model(model.config, params), {"vector": "reset"}, False)


def bad_policy(model, context):
    """An `edit` that keeps an optimiser state that no longer fits."""
    grown = stack(model, context).model
    return Edited(grown, {"matrix": "keep"}, False)


def plain_descent(table):
    """An `optimizer`: the gradient itself."""
    return {param.group: optax.identity() for param in table.values()}


def answer(params, apply):
    """An `evals`: a constant, and a figure that needs the model."""
    logits = apply(params, np.zeros((1, 4), np.int32))
    return {"own/answer": 42.0, "own/logits": float(logits.shape[-1])}


# ------------------------------------------------------------------------------- configs and runs


def short_phase(steps: int, **fields) -> Phase:
    """A phase of 8 rows of 32 tokens, where `fields` say nothing else."""
    phase = Phase(steps=steps, batch=8, seq=32)
    return replace(phase, **fields)


def tiny_config(tmp_path="", **changes) -> Config:
    """A run of 4 + 4 steps with a stack, on documents made here."""
    config = Config(
        name="tiny",
        runs=str(tmp_path),
        model=TINY,
        data=DataConfig(sources={"verse": Source(verses)}, tokenizer="bytes", dev=0.15, test=0.15),
        phases=(short_phase(4), short_phase(4, edits=(stack,))),
        schedule=Schedule(shape="wsd", peak=1e-2, warmup=2, decay=0.5, final=0.1),
        overlap=8,
        eval_every=100,
        eval_tokens=200,
        save_every=100,
        keep=20,
        prompts=(),
    )
    return replace(config, **changes)


def bare_context(seed: int = 0) -> Context:
    """What an edit is given, without a run around it."""
    return Context(jax.random.key(seed), 0, None, lambda n: [], train.load)


def plan_of(config: Config) -> Plan:
    """The plan of a config whose vocabulary is known."""
    return conftest.course_of(config, bare_context())


def rows_of(run: Path) -> list[dict]:
    """metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def step_rows(run: Path) -> list[dict]:
    """The rows of metrics.jsonl that steps have written."""
    return [row for row in rows_of(run) if "train/loss" in row]


def evaluation_rows(run: Path) -> list[dict]:
    """The other rows of metrics.jsonl, which evaluations have written."""
    return [row for row in rows_of(run) if "train/loss" not in row]


# ------------------------------------------------------------------------------ steps without a run


def random_batch(seed: int = 0, batch: int = 8, seq: int = 16) -> dict[str, np.ndarray]:
    """Rows of one segment of random ids."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (batch, seq + 1), dtype=np.int32)
    ones = np.ones((batch, seq), np.int32)
    return dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=ones,
        positions=np.cumsum(ones, 1, dtype=np.int32) - 1,
        weights=ones.astype(np.float32),
        source=ones * 0,
    )


def single_mesh():
    """A mesh of one device."""
    return conftest.mesh_of_one(MeshConfig())


def first_state(config: Config, mesh=None) -> State:
    """The state before any step."""
    mesh = mesh or single_mesh()
    key = jax.random.key(config.seed)
    return optim.first_state(config.model, config.optimizer, mesh, key)


def after_edits(edits, state: State, config: Config, mesh=None, seed: int = 0):
    """(state, shape of the model) after edits."""
    mesh = mesh or single_mesh()
    context = bare_context(seed)
    optimizer = config.optimizer
    state, shape, _ = train.apply_edits(edits, state, config.model, optimizer, mesh, context)
    return state, shape


def stepper(config: Config, shape: ModelConfig = TINY, frozen: frozenset[str] = frozenset()):
    """`(state, batch, rate or {group: rate}) -> (state, metrics)`, jitted."""
    step = jax.jit(train.make_step(config, shape, frozen=frozen), static_argnames="mask")

    def take(state, batch, rates):
        if not isinstance(rates, dict):
            rates = dict.fromkeys(model.groups(shape), rates)
        lr = {group: np.float32(rate) for group, rate in rates.items()}
        return step(state, batch, lr, mask=CAUSAL)

    return take


def bits(tree) -> list[tuple]:
    """The type, shape and bytes of every array of a tree."""
    arrays = [np.asarray(x) for x in jax.tree.leaves(jax.device_get(tree))]
    return [(x.dtype, x.shape, x.tobytes()) for x in arrays]


def same_bits(one, other) -> bool:
    """Are two trees of arrays equal bit for bit?"""
    return bits(one) == bits(other)


def unchanged(before: dict, after: dict) -> set[str]:
    """The names under which two dictionaries have the same bits."""
    return {name for name in before if same_bits(before[name], after[name])}


def counts(opt) -> set[int]:
    """Every count of steps in an optimiser state."""
    found = set()
    for path, x in jax.tree_util.tree_leaves_with_path(opt):
        if "count" in jax.tree_util.keystr(path):
            found.add(int(x))
    return found


# ------------------------------------------------------------------------------- one device and eight


def losses_on(mesh, run: Config) -> list[float]:
    """Losses of three steps on a mesh, from parameters in which everything matters."""
    shape, optimizer = run.model, run.optimizer
    state, found = optim.first_state(shape, optimizer, mesh, jax.random.key(0)), []
    home = optim.places(optim.state_like(shape, optimizer, mesh)).params
    state = state.replace(params=jax.device_put(conftest.strong(shape), home))
    lr = dict.fromkeys(model.groups(shape), jnp.float32(1e-3))
    batch = train.put(conftest.rows(batch=8), mesh, 8)
    with jax.set_mesh(mesh):
        step = jax.jit(train.make_step(run, shape), static_argnames="mask")
        for _ in range(3):
            state, metrics = step(state, batch, lr, mask=CAUSAL)
            found.append(float(metrics["train/loss"]))
    return found


def same_on_eight_devices(run: Config):
    """Assert that eight devices, split along all axes, compute what one does."""
    one = losses_on(make_mesh(MeshConfig(), jax.devices()[:1]), run)
    eight = losses_on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), run)
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    assert len(set(one)) == 3
