"""configs/parameters/: NF4, LoRA beside it, and LoQT, which trains by merging into it."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong
from edit_cases import context

import model
import train
from configs.parameters import loqt, qlora
from lib.kernels import Mask
from lib.lora import unfrozen
from lib.matrices import flat, matrices, sides, smaller_first
from lib.optim import first_state
from lib.sharding import MeshConfig, make_mesh
from model import Model

pytestmark = pytest.mark.library
LEVELS = np.array(qlora.NF4)
batches = context()._replace(step=0, batches=lambda n: [rows(i) for i in range(n)])


def test_nf4_has_the_levels_of_the_paper():
    """Quantiles of a normal distribution, seven below zero, zero, eight above; ends at 1."""
    from statistics import NormalDist
    offset = 0.9677083
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    wanted = np.sort([*above, *below, 0.0]) / max(above)
    np.testing.assert_allclose(LEVELS, wanted, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 64), (3, 10, 7), (2, 4, 8, 16)])
def test_a_round_trip_errs_by_half_the_gap_around_it_at_most(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    codes, scales = qlora.quantised(jnp.asarray(x))
    size = int(np.prod(shape[1:]))
    blocks = -(-size // 64)
    assert codes.dtype == np.uint8 and codes.shape == (shape[0], blocks, 32)
    assert codes.nbytes == shape[0] * blocks * 64 / 2  # four bits a number
    back = np.asarray(qlora.restored(codes, scales, shape)).reshape(shape[0], -1)
    flattened = x.reshape(shape[0], -1)
    for layer in range(shape[0]):
        for block in range(blocks):
            part = slice(64 * block, 64 * block + 64)
            largest = np.abs(flattened[layer, part]).max()
            assert float(scales[layer, block]) == largest
            nearest = np.abs(flattened[layer, part, None] / largest - LEVELS).min(1)
            error = np.abs(back[layer, part] - flattened[layer, part]) / largest
            np.testing.assert_allclose(error, nearest, atol=1e-6)
            assert error.max() <= np.diff(LEVELS).max() / 2
    again = qlora.quantised(jnp.asarray(back.reshape(shape)))
    np.testing.assert_array_equal(again[0], codes)


def test_zeros_come_back_as_zeros():
    codes, scales = qlora.quantised(jnp.zeros((1, 64)))
    assert not np.any(qlora.restored(codes, scales, (1, 64)))


def test_a_quantised_base_is_what_its_codes_stand_for_and_nothing_but_factors_trains(tiny):
    plain = strong(tiny)
    edited = qlora.quantise(Model(tiny, plain), context())
    config, params = edited.model
    declared = {n: (p.shape, model.dtype_of(p, config)) for n, p in model.table(config).items()}
    assert {n: (x.shape, x.dtype) for n, x in params.items()} == declared
    used = qlora.four_bit(params, 0, {}, config)
    for name, row in matrices(tiny).items():
        stood = qlora.restored(*qlora.quantised(plain[name]), row.shape)
        np.testing.assert_array_equal(used[name], stood)
        assert params[f"{name}/q"].dtype == np.uint8 and name not in params
    trained = {n for n, p in model.table(config).items() if p.group != "frozen"}
    assert trained == {f"{name}/{end}" for name in matrices(tiny) for end in "ab"}


# -------------------------------------------------------------------------------------------- LoQT


def test_sharing_gives_b_what_of_the_error_lies_in_p():
    """With one turn: Q = Q(W), and what stays is (1 - P P') (W - Q), less than W - Q."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(2, 32, 48)), jnp.float32)
    p = jnp.linalg.qr(jnp.asarray(rng.normal(size=(2, 32, 8)), jnp.float32))[0]
    codes, scales, b = loqt.share(w, p, 0.5, 1)
    rest = np.asarray(w - qlora.restored(codes, scales, w.shape))
    left = np.asarray(rest - 0.5 * p @ b)
    p = np.asarray(p)
    np.testing.assert_allclose(left, rest - p @ (p.swapaxes(1, 2) @ rest), atol=1e-5)
    assert (np.linalg.norm(left, axis=(1, 2)) < 0.9 * np.linalg.norm(rest, axis=(1, 2))).all()
    *_, zero = loqt.share(w, jnp.asarray(p), 0.5, 0)
    assert not np.any(zero)


def test_more_turns_are_never_worse():
    rng = np.random.default_rng(1)
    w = jnp.asarray(rng.normal(size=(2, 32, 48)), jnp.float32)
    p = jnp.linalg.qr(jnp.asarray(rng.normal(size=(2, 32, 8)), jnp.float32))[0]

    def error(turns):
        codes, scales, b = loqt.share(w, p, 0.5, turns)
        left = w - qlora.restored(codes, scales, w.shape) - 0.5 * p @ b
        return np.linalg.norm(left, axis=(1, 2))

    errors = np.stack([error(turns) for turns in range(1, 6)])
    assert (np.diff(errors, axis=0) <= 0).all() and (errors[-1] < errors[0]).all()


def test_a_merge_moves_the_function_no_further_than_the_quantisation(tiny):
    """And P spans the first singular vectors of the gradient where it is merged."""
    config = replace(tiny, embed=32)
    first = loqt.merge(Model(config, strong(config)), batches, rank=4)
    params = dict(first.model.params)
    rng = np.random.default_rng(0)
    for name in params:
        if name.endswith("/b"):
            params[name] = jnp.asarray(rng.normal(size=params[name].shape) * 0.05, jnp.float32)
    whole = loqt.dequantised(params, 0, {}, config)
    second = loqt.merge(Model(first.model.config, params), batches, rank=4)
    after = loqt.dequantised(second.model.params, 0, {}, config)
    assert first.policy == {"matrix": "reset"} and second.policy == {}

    def loss(some):
        batch = rows(0)
        each = model.losses(whole | some, batch, Mask("causal", 0), config)
        return jnp.sum(each * batch["weights"])

    gradients = jax.jit(jax.grad(loss))({n: whole[n] for n in matrices(config)})
    for name, row in matrices(config).items():
        w, now = (np.asarray(flat(x[name], row)) for x in (whole, after))
        plain = np.asarray(qlora.restored(*qlora.quantised(jnp.asarray(w)), w.shape))
        for layer in range(config.layers):
            assert np.linalg.norm(now[layer] - w[layer]) < np.linalg.norm(plain[layer] - w[layer])
        small = min(sides(row))
        p = qlora.restored(second.model.params[f"{name}/p"], second.model.params[f"{name}/p_scale"],
                           (config.layers, small, 4))
        u = jnp.linalg.svd(smaller_first(flat(gradients[name], row), row), full_matrices=False)[0]
        inside = jnp.linalg.norm(u[..., :4].swapaxes(1, 2) @ p, axis=(1, 2))
        assert (np.asarray(inside / jnp.linalg.norm(p, axis=(1, 2))) > 0.97).all(), name


def test_merges_come_after_growing_gaps(tiny):
    model_now = loqt.merge(Model(tiny, strong(tiny)), batches, rank=4).model
    done = []
    for step in range(5, 101, 5):
        edited = loqt.merge(model_now, batches._replace(step=step), rank=4, every=5)
        if edited.model is not model_now:
            done.append(step)
    assert done == [5, 10, 20, 40, 80]


def test_codes_stay_while_b_trains_and_the_bytes_are_as_counted(tiny):
    edit = partial(loqt.merge, rank=4)
    begun = edit(Model(tiny, model.init(tiny, jax.random.key(0))), batches).model
    config = begun.config
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = train.Config(model=config, reparam=loqt.dequantised, optimizer=unfrozen)
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    state = first_state(config, unfrozen, mesh, jax.random.key(0))
    state = state.replace(params=begun.params)
    rate = {group: np.float32(0.01) for group in model.groups(config)}
    with jax.set_mesh(mesh):
        for i in range(2):
            state, metrics = step(state, rows(i), rate, mask=Mask("causal", 0))
    assert int(state.skipped) == 0
    for name in matrices(tiny):
        for end in ("q", "q_scale", "p", "p_scale"):
            now = state.params[f"{name}/{end}"]
            np.testing.assert_array_equal(now, begun.params[f"{name}/{end}"])
        assert state.params[f"{name}/q"].dtype == np.uint8
        assert np.any(state.params[f"{name}/b"] != begun.params[f"{name}/b"])
    adam, *_ = state.opt["matrix"]
    larger = sum(max(sides(row)) for row in matrices(tiny).values())
    assert sum(x.nbytes for x in adam.mu.values()) == 4 * tiny.layers * 4 * larger
    held = sum(state.params[f"{name}/q"].nbytes for name in matrices(tiny))
    assert held == sum(row.size for row in matrices(tiny).values()) / 2
    size = qlora.weight_bytes(state.params, None)["stored/bytes"]
    assert size < 0.6 * qlora.weight_bytes(model.init(tiny, jax.random.key(0)), None)["stored/bytes"]
