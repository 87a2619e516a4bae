"""configs/baselines/nanochat.py and nanochat_muon.py: against loops in numpy."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong
from train_cases import same_on_eight_devices

import model
import train
from configs.baselines import nanochat_muon
from configs.baselines.muon import COEFFICIENTS
from lib.config import ROOT, load_file
from lib.matrices import flat

pytestmark = pytest.mark.library
own = load_file(ROOT / "configs/baselines/nanochat.py")
OPTIMIZER = partial(nanochat_muon.nanochat_muon, steps=500)


@pytest.fixture
def whole(tiny):
    """All parts, on the shape of `tiny`, with three layers."""
    config = own.by_nanochat(train.Config(model=replace(tiny, tied=False, layers=3)))
    return replace(config.model, unroll=1)


def batch_of(seed=0):
    return {name: jnp.asarray(x) for name, x in rows(seed).items()}


# ------------------------------------------------------------------------------------------- the model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6)


def turned(x, theta):
    """x [t h d], rotated by position."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    one, two = x[..., :half], x[..., half:]
    return np.concatenate([one * np.cos(angle) - two * np.sin(angle),
                           two * np.cos(angle) + one * np.sin(angle)], -1)


def reference(params, ids, config):
    """Final states [t d] of one row, layer by layer and head by head."""
    p = {name: np.asarray(x, np.float64) for name, x in params.items()}
    x = normed(p["embed"][ids])
    gate = sigmoid(x[1:, :24] @ p["smear_gate"])[:, None]
    x = np.concatenate([x[:1], x[1:] + p["smear"] * gate * x[:-1]])
    first, each = x, config.heads // config.kv_heads
    for layer in range(config.layers):
        x = p["residual"][layer] * x + p["again"][layer] * first
        n = normed(x)
        q = np.einsum("td,dkgh->tkgh", n, p["q"][layer]).reshape(len(ids), config.heads, -1)
        k, v = (np.einsum("td,dkh->tkh", n, p[name][layer]) for name in "kv")
        if layer % 2 == (config.layers - 1) % 2:
            gate = 3 * sigmoid(n[:, :12] @ p["value_gates"][layer])
            v = v + gate[..., None] * p["values"][layer // 2][ids]
        q, k = (1.2 * normed(turned(x, 1e5)) for x in (q, k))
        heads = []
        for head in range(config.heads):
            scores = q[:, head] @ k[:, head // each].T / np.sqrt(config.head_dim)
            scores = np.where(np.tri(len(ids)), np.exp(scores), 0)
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, head // each])
        x = x + np.concatenate(heads, -1) @ p["o"][layer].reshape(-1, config.embed)
        x = x + np.maximum(normed(x) @ p["up"][layer], 0) ** 2 @ p["down"][layer]
        if layer == config.layers // 2:
            middle = x
    return normed(x - p["backout"] * middle)


@pytest.mark.parametrize("layers", [3, 4])
def test_it_is_what_a_loop_over_layers_and_heads_gives(whole, layers):
    whole = replace(whole, layers=layers)
    params, ids = strong(whole), np.random.default_rng(0).integers(0, 258, 24)
    states, _ = model.forward(params, model.whole(jnp.asarray(ids)[None]), model.CAUSAL, whole)
    np.testing.assert_allclose(states[0], reference(params, ids, whole), rtol=1e-3, atol=1e-3)


def test_it_begins_as_it_is_published(whole):
    params = model.init(whole, jax.random.key(0))
    np.testing.assert_allclose(params["residual"], [1.15, 1.10, 1.05], rtol=1e-6)
    np.testing.assert_allclose(params["again"], [0.2, 0.125, 0.05], rtol=1e-6)
    high = (3 / whole.embed) ** 0.5
    for name, most in dict(q=high, v=high, values=high, up=0.4 * high).items():
        assert 0.95 * most < np.abs(params[name]).max() < most
        assert params[name].std() == pytest.approx(most / 3**0.5, rel=0.1)
    for name in ("o", "down", "smear"):
        assert not params[name].any()
    for name in ("value_gates", "smear_gate"):
        assert 0 <= params[name].min() < 0.01 < params[name].max() < 0.02
    assert params["backout"] == pytest.approx(0.2)
    assert params["embed"].std() == pytest.approx(0.8, rel=0.1)
    assert params["head"].std() == pytest.approx(1e-3, rel=0.1)


def test_parts_that_are_off_have_no_rows(whole):
    more = {"residual", "again", "smear", "smear_gate", "backout"}
    full = {*model.table(whole)}
    assert {"gate", "norm", "q_norm"}.isdisjoint(full) and more | {"values"} < full
    bare = replace(whole, rows=partial(own.parts, scalars=False))
    assert {*model.table(bare)} == full - more
    assert model.apply(strong(bare), batch_of(), bare).shape[-1] == bare.vocab


def test_nothing_looks_ahead_and_segments_are_apart(whole):
    params, batch = strong(whole), batch_of()
    packed = model.apply(params, batch, whole)
    for segment in (1, 2, 3):
        where = np.flatnonzero(np.asarray(batch["segments"])[0] == segment)
        alone = model.apply(params, batch["tokens"][:, where], whole)
        np.testing.assert_allclose(packed[:, where], alone, atol=2e-4)
    ids = batch["tokens"]
    one, other = (model.apply(params, x, whole) for x in (ids, ids.at[:, 9].add(1) % 258))
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    assert np.all(np.abs(one - other).max(-1)[:, 9:] > 0)


# ------------------------------------------------------------------------------------------- the optimiser


def stepped(param, grads, first, decay=0.28, steps=500):
    """Descent directions over a rate of a matrix [outputs inputs] from a step on, moments at 0."""
    mean = np.zeros_like(param)
    tall = param.shape[0] >= param.shape[1]
    size = np.zeros((len(param), 1) if tall else (1, param.shape[1]))
    for step, grad in enumerate(grads, first):
        fall = round(0.65 * steps)
        through = max(0, step - (steps - fall)) / fall
        beta = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 * (1 - through) + 0.9 * through
        mean = beta * mean + (1 - beta) * grad
        x = (1 - beta) * grad + beta * mean
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        x = x / np.linalg.norm(x) / 1.02
        for a, b, c in COEFFICIENTS["polar_express"]:
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        x = x * min(x.shape) ** 0.5 / np.linalg.norm(x)
        size = 0.9 * size + 0.1 * np.mean(x * x, 1 if tall else 0, keepdims=True)
        scaled = x / np.sqrt(np.maximum(size, 1e-10))
        x = scaled * np.linalg.norm(x) / np.linalg.norm(scaled)
        left = decay * (1 + np.cos(np.pi * step / steps)) / 2
        yield max(1, x.shape[0] / x.shape[1]) ** 0.5 * (x + left * param * (x * param >= 0))


@pytest.mark.parametrize("first", [0, 398, 450])
def test_matrices_move_as_a_loop_in_numpy_does(whole, first):
    """`q` is square, `up` tall, `down` wide; before, at and after the step at which momentum falls."""
    table = model.table(whole)
    transform = OPTIMIZER(table)["matrix"]
    update = jax.jit(transform.update)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=row.shape), jnp.float32)
              for name, row in table.items() if row.group == "matrix"}
    grads = [{n: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for n, x in params.items()}
             for _ in range(4)]
    expected = {}
    for name in params:
        matrix, *slopes = (np.float64(flat(x[name], table[name])[1]).T for x in (params, *grads))
        expected[name] = list(stepped(matrix, slopes, first))
    _, *moments = transform.init(params)
    state = (jnp.int32(first), *moments)
    for step, grad in enumerate(grads):
        updates, state = update(grad, state, params)
        for name, x in updates.items():
            found = flat(x, table[name])[1].T
            np.testing.assert_allclose(found, expected[name][step], atol=3e-4, err_msg=name)
    assert {"q", "up", "down", "value_gates"} < params.keys()


@pytest.mark.parametrize("steps, step, expected", [
    (500, 0, 0.85), (500, 200, 0.91), (500, 399, 0.9697), (500, 400, 0.92154), (500, 500, 0.9),
    (2000, 400, 0.97), (2000, 700, 0.97), (2000, 1350, 0.935), (2000, 3000, 0.9)])
def test_momentum_rises_over_400_steps_and_ends_at_0_9(steps, step, expected):
    assert float(nanochat_muon.momentum(step, steps)) == pytest.approx(expected, abs=1e-4)


def test_decay_ends_at_0_and_stays_there(whole):
    """A matrix without a gradient moves by its decay alone. Nothing moves after the last step."""
    transform = OPTIMIZER(model.table(whole))["matrix"]
    ones = {name: jnp.ones(row.shape) for name, row in model.table(whole).items()
            if row.group == "matrix"}
    none = {name: 0 * x for name, x in ones.items()}
    for step, expected in {0: 0.28, 250: 0.14, 500: 0.0, 700: 0.0}.items():
        _, *moments = transform.init(ones)
        update, _ = transform.update(none, (jnp.int32(step), *moments), ones)
        np.testing.assert_allclose(update["q"], expected, atol=1e-6)
        np.testing.assert_allclose(update["up"], 2 * expected, atol=1e-6)


def test_another_group_is_refused(whole):
    table = model.table(whole) | {"own": model.Param(("in",), (8,), 1.0, "own")}
    with pytest.raises(ValueError, match="the groups of the model are .*own; allowed are matrix, embed"):
        OPTIMIZER(table)


def test_other_groups_have_rates_and_betas_of_their_own(whole):
    """Adam by hand over two unlike gradients, a decay, and the group's rate at this width."""
    table, wide = model.table(whole), (whole.embed / 768) ** -0.5
    groups = {  # rate, beta1, beta2, decay
        "embed": (15 * wide, 0.8, 0.995, 0.001), "values": (7.5 * wide, 0.8, 0.995, 0.01),
        "head": (0.4 * wide, 0.8, 0.96, 0.01), "residual": (0.25, 0.8, 0.95, 0.05),
        "again": (25.0, 0.96, 0.95, 0.0), "smear": (10.0, 0.8, 0.95, 0.0),
        "smear_gate": (10.0, 0.8, 0.95, 0.0), "backout": (10.0, 0.8, 0.95, 0.0)}
    for name, (rate, b1, b2, decay) in groups.items():
        transform = OPTIMIZER(table)[table[name].group]
        one = {name: jnp.full(table[name].shape, 2.0)}
        update, state = transform.update(one, transform.init(one), one)
        update, _ = transform.update({name: -3 * one[name]}, state, one)
        mean = (b1 * (1 - b1) * 2 - (1 - b1) * 6) / (1 - b1**2)
        square = (b2 * (1 - b2) * 4 + (1 - b2) * 36) / (1 - b2**2)
        expected = rate * (mean / square**0.5 + 2 * decay)
        np.testing.assert_allclose(update[name], expected, rtol=1e-4, err_msg=name)


def test_its_schedule_is_nanochat_s_and_nothing_is_clipped():
    config = own.by_nanochat(own.plain)
    assert (config.clip, config.schedule.peak, config.schedule.warmup) == (0.0, 0.02, 40)
    assert (config.schedule.shape, config.schedule.decay, config.schedule.final) == ("wsd", 0.65, 0.05)
    assert config.optimizer.keywords == dict(steps=500)
    assert own.study.arms["wide_nanochat"].optimizer.keywords == dict(steps=250)
    for pair in (("strong", "nanochat", "fewer"), ("wide_strong", "wide_nanochat")):
        shapes = [replace(own.study.arms[name].model, vocab=1024) for name in pair]
        costs = [shape.flops(shape, 256) for shape in shapes]
        assert max(costs) < 1.01 * min(costs)


def test_eight_devices_compute_what_one_does(whole):
    same_on_eight_devices(train.Config(model=whole, optimizer=OPTIMIZER))
