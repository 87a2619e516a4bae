"""configs/understanding/s4d.py and mixers.py: kernels and recurrences."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from conftest import rows, strong

import model
from lib.config import ROOT, load_file
from lib.errors import InputError
from lib.kernels import Mask

pytestmark = pytest.mark.library
s4d = load_file(ROOT / "configs/understanding/s4d.py")
mixers = load_file(ROOT / "configs/understanding/mixers.py")
CAUSAL = Mask("causal", 0)


@pytest.fixture
def layer(tiny):
    """The first layer of drawn S4D rows, of 4 pairs."""
    config = replace(tiny, rows=partial(s4d.s4d_rows, pairs=4), forward=s4d.mixed)
    drawn = model.init(config, jax.random.key(0))
    return {name: x[0] for name, x in drawn.items() if model.table(config)[name].layered}


def test_the_convolution_is_the_recurrence(tiny, layer):
    """x' = A x + B u, y = 2 Re C x by zero-order hold, step by step in complex128."""
    t, d = 40, tiny.embed
    u = np.random.default_rng(0).normal(size=(2, t, d))
    w = {name: np.asarray(x, np.float64) for name, x in layer.items()}
    a = -np.exp(w["log_real"]) + 1j * w["imag"]
    factor = np.exp(a * np.exp(w["log_step"])[:, None])
    into = (factor - 1) / a
    state, found = np.zeros((2, d, 4), complex), []
    for i in range(t):
        state = factor * state + into * u[:, i, :, None]
        found.append(2 * np.sum((w["c_real"] + 1j * w["c_imag"]) * state, -1).real + w["skip"] * u[:, i])
    expected = jax.nn.gelu(jnp.stack(found, 1))
    seen = []

    def times(x, name):
        seen.append(x)
        return jnp.concatenate([x, x], -1)

    s4d.s4d(jnp.asarray(u, jnp.float32), layer, times)
    np.testing.assert_allclose(seen[0], expected, atol=1e-5)


def test_rows_that_a_state_space_begins_with():
    shape = 2, 3, 8
    drawn = {how: np.asarray(s4d.imaginary(jax.random.key(0), shape, jnp.float32, how))
             for how in ("lin", "inv", "legs", "random")}
    np.testing.assert_allclose(drawn["lin"][0, 0], np.pi * np.arange(8), rtol=1e-6)
    np.testing.assert_allclose(drawn["inv"][0, 0, 0], 16 / np.pi * 15, rtol=1e-6)
    assert np.all(drawn["legs"] > 0) and np.all(drawn["random"] > 0)
    assert len(np.unique(drawn["random"])) == 48
    # lin and inv are asymptotics of legs: the highest frequency, and those in the middle
    np.testing.assert_allclose(drawn["legs"][0, 0, -1], drawn["inv"][0, 0, 0], rtol=0.1)
    steps = s4d.log_uniform(jax.random.key(0), (4_000,), jnp.float32, 1e-3, 0.1)
    assert np.log(1e-3) <= steps.min() < steps.max() <= np.log(0.1)
    np.testing.assert_allclose(steps.mean(), np.log(1e-2), atol=0.1)


def hippo(n: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS: A [n n] and B [n]."""
    b = np.sqrt(2 * np.arange(n) + 1)
    return -np.tril(np.outer(b, b), -1) - np.diag(np.arange(n) + 1.0), b


def test_the_normal_part_is_hippo_s():
    a, b = hippo(12)
    values, vectors = s4d.normal_part(12)
    np.testing.assert_allclose((vectors * values) @ vectors.conj().T, a + np.outer(b, b) / 2, atol=1e-12)


def test_s4d_legs_approaches_hippo_legs_as_the_state_grows():
    """Theorem 3 of the paper: the normal part with B/2 tends to HiPPO-LegS; here, how both answer a step.

    A kernel rings at frequencies that grow with n, so it is its integral that comes close: as 1/n.
    """
    times, first, errors = np.linspace(0.05, 3, 100), 4, []
    a, b = hippo(first)  # A is lower triangular: the first states do not depend on later ones
    exact = np.linalg.solve(a, np.stack([scipy.linalg.expm(a * t) @ b - b for t in times], 1))
    for n in (16, 64, 256):
        b = hippo(n)[1]
        values, vectors = s4d.normal_part(n)
        modes = (np.exp(np.outer(values, times)) - 1) / values[:, None]
        found = vectors[:first] * (vectors.conj().T @ (b / 2)) @ modes
        errors.append(np.sqrt(np.mean((found.real - exact)**2)))
        assert np.abs(found.imag).max() < 1e-9
    assert errors[0] > 4 * errors[1] > 16 * errors[2] and errors[2] < 5e-4, errors


def numpy_gru(x, w, positions):
    """States [t width] of one row, one position after another."""
    def gate(y):
        return 1 / (1 + np.exp(-y))

    h, out = np.zeros(w["of_h"].shape[0]), []
    for inputs, position in zip(x @ w["of_x"], positions, strict=True):
        h = 0 * h if position == 0 else h
        (z, r, n), (hz, hr, hn) = np.split(inputs, 3), np.split(h @ w["of_h"], 3)
        keep = gate(z + hz)
        h = keep * h + (1 - keep) * np.tanh(n + gate(r + hr) * hn)
        out.append(h)
    return np.stack(out) @ w["of_state"]


def test_a_gru_is_its_loop_and_segments_reset_it(tiny):
    config = replace(tiny, rows=mixers.gru_rows, forward=mixers.with_gru)
    drawn = model.init(config, jax.random.key(0))
    w = {name: drawn[name][0] for name in ("of_x", "of_h", "of_state")}
    x = np.random.default_rng(0).normal(size=(2, 10, tiny.embed)).astype(np.float32)
    positions = np.array([[*range(4), *range(6)], [*range(9), 0]])
    found, _ = mixers.gru(jnp.asarray(x), w, lambda x, name: x @ w[name], jnp.asarray(positions))
    exact = {name: np.asarray(value, np.float64) for name, value in w.items()}
    for row in range(2):
        np.testing.assert_allclose(found[row], numpy_gru(x[row], exact, positions[row]), atol=1e-5)


@pytest.mark.parametrize("name", ["s4d", "gru"])
def test_nothing_looks_ahead_and_other_masks_are_refused(name, tiny):
    own = mixers.study.arms[name].model
    config = replace(tiny, rows=own.rows, forward=own.forward)
    params, batch = strong(config) if name == "gru" else model.init(config, jax.random.key(1)), rows()
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    whole, _ = model.forward(params, batch, CAUSAL, config)
    later = batch | {"tokens": batch["tokens"].at[:, 7:].add(1) % 258}
    changed, _ = model.forward(params, later, CAUSAL, config)
    np.testing.assert_allclose(whole[:, :7], changed[:, :7], atol=1e-5)
    assert np.abs(whole[:, 7:] - changed[:, 7:]).max() > 1e-3
    with pytest.raises(InputError, match="allowed is a causal one"):
        model.forward(params, batch, Mask("bidirectional", 0), config)


def test_a_gru_has_the_parameters_of_attention():
    models = {name: replace(arm.model, vocab=258) for name, arm in mixers.study.arms.items()}
    counts = {name: model.count(own) for name, own in models.items()}
    assert counts["gru"] == counts["attention"] > counts["s4d"]
    costs = {name: own.flops(own, 128) for name, own in models.items()}
    attended = 6 * 3 * 96 * 128
    assert costs["gru"] == costs["attention"] - attended
