"""lib/optim.py and configs' optimisers: AdamW, Muon, and steps of accumulated gradients."""
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, used

import model
import train
from configs.baselines.muon import muon
from lib.errors import InputError
from lib.kernels import Mask
from lib.matrices import sides
from lib.optim import State, adamw, init_opt_state, lr_factors

equal = np.testing.assert_array_equal

DECAYS = dict(embed=0.0, vector=0.0, matrix=0.25, head=0.25)


@pytest.mark.parametrize("group", DECAYS)
def test_adamw_decays_matrices_and_head_alone(tiny, group):
    """With no gradient, what is left of a direction is the decay, at the rate of each parameter."""
    table = model.table(replace(tiny, tied=False))
    transforms = adamw(table, weight_decay=0.25, embed_lr=3.0, base_width=16)
    names = model.groups(replace(tiny, tied=False))[group]
    ones = {name: jnp.ones(3) for name in names}
    no_gradient = {name: jnp.zeros(3) for name in names}

    state = transforms[group].init(ones)
    direction, _ = transforms[group].update(no_gradient, state, ones)

    factors = lr_factors(table, 3.0, 16)
    for name in names:
        expected = np.full(3, DECAYS[group] * factors[name])
        np.testing.assert_allclose(direction[name], expected, rtol=1e-6)
    assert set(transforms) == set(DECAYS)


def test_rates_are_by_inputs_whatever_reads_or_writes_the_stream(tiny):
    """Embeddings, unless they are the head, have theirs; gains and rows of free axes have 1."""
    config = replace(tiny, tied=False)
    table = model.table(config) | {"a": model.Param(("layers", "in", "rank"), (2, 32, 4), 0.1)}
    factors = lr_factors(table, 10.0, 64)

    reads = dict.fromkeys(["q", "k", "v", "gate", "up", "head"], 64 / 32)
    writes = {"o": 64 / 32, "down": 64 / 48}
    ones = dict.fromkeys(["attn_norm", "mlp_norm", "norm", "a"], 1.0)
    assert factors == reads | writes | ones | {"embed": 10.0}

    beside = {f"encoder/{name}": replace(row, axes=tuple(f"encoder/{axis}" for axis in row.axes))
              for name, row in table.items()}
    assert lr_factors(table | beside, 10.0, 64) == factors | {
        f"encoder/{name}": factor for name, factor in factors.items()}

    tied = lr_factors(model.table(tiny), 10.0, 64)
    assert tied["embed"] == 1.0
    assert set(lr_factors(table, 1.0, 0).values()) == {1.0}


def test_a_wider_model_moves_its_matrices_less(tiny):
    """The same gradient moves a matrix of four times the inputs by a quarter."""
    moved = []
    for width in (32, 128):
        config = replace(tiny, embed=width)
        transform = adamw(model.table(config), weight_decay=0.0)["matrix"]
        ones = {name: jnp.ones(3) for name in model.groups(config)["matrix"]}
        direction, _ = transform.update(ones, transform.init(ones), ones)
        moved.append(direction["q"])
    np.testing.assert_allclose(moved[1], moved[0] / 4, rtol=1e-6)


@pytest.fixture(scope="module")
def tied_params(tiny, params):
    """The parameters that the tiny model has."""
    return used(tiny, params)


@pytest.fixture(scope="module")
def grads(tied_params):
    """A random gradient."""
    drawn = {}
    for i, (name, x) in enumerate(tied_params.items()):
        normal = np.random.default_rng(i).normal(size=x.shape)
        drawn[name] = jnp.asarray(normal, x.dtype)
    return drawn


def first_directions(optimizer, tiny, params, grads):
    """{group: {name: direction}} of an optimiser's first step, without decay."""
    transforms = optimizer(model.table(tiny), weight_decay=0.0)
    directions = {}
    for group, names in model.groups(tiny).items():
        own = {name: params[name] for name in names}
        gradient = {name: grads[name] for name in names}
        state = transforms[group].init(own)
        directions[group], _ = transforms[group].update(gradient, state, own)
    return directions


@pytest.fixture(scope="module")
def by_muon(tiny, tied_params, grads):
    """Muon's first directions."""
    return first_directions(muon, tiny, tied_params, grads)


def inputs_of(row: model.Param) -> int:
    """How many inputs a matrix of the table has: the embedding's axis, or all axes but that."""
    if row.axes[1] == "embed":
        return 32
    return math.prod(row.shape[1:-1])


def test_muon_orthogonalises_each_layer_with_the_table_s_axes(tiny, by_muon):
    """A layer's update, inputs against outputs, has singular values near one another.

    Its root mean square is the one that was asked for.
    """
    table = model.table(tiny)
    assert set(by_muon["matrix"]) == {"q", "k", "v", "o", "gate", "up", "down"}
    for name, directions in by_muon["matrix"].items():
        inputs = inputs_of(table[name])
        assert len(directions) == 2
        for layer in range(2):
            x = np.asarray(directions[layer])
            outputs = x.size // inputs
            values = np.linalg.svd(x.reshape(inputs, outputs), compute_uv=False)
            values /= 0.2 * math.sqrt(max(inputs, outputs))
            near_one = (values > 0.6) & (values < 1.3)
            assert np.mean(near_one) > 0.9, name  # all but those that were near 0 before
            assert np.sqrt(np.mean(x**2)) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("group", ["embed", "vector"])
def test_other_groups_are_adamw_s(tiny, tied_params, grads, by_muon, group):
    by_adamw = first_directions(adamw, tiny, tied_params, grads)
    jax.tree.map(equal, by_muon[group], by_adamw[group])


def a_run():
    """What `make_step` needs of a config."""
    return SimpleNamespace(
        optimizer=adamw,
        reparam=None,
        token_loss=model.cross_entropy,
        reduce=model.weighted_mean,
        gradient=None,
        clip=0.5,
    )


def one_step(tiny, params, batch, parts: int):
    """(state, metrics) after a step whose batch is taken in so many parts."""
    zero = jnp.int32(0)
    state = State(params, init_opt_state(params, tiny, adamw), zero, zero)
    rates = dict.fromkeys(model.groups(tiny), jnp.float32(1e-3))
    step = train.make_step(a_run(), tiny, train.Phase(accumulate=parts))
    compiled = jax.jit(step, static_argnames="mask")
    return compiled(state, batch, rates, mask=Mask("causal", 0))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(tiny, tied_params, parts):
    """Loss weights differ from part to part: sums are over all, not means of means."""
    weights = np.random.default_rng(0).random((4, 24)) * [[0.1], [3], [1], [0]]
    batch = rows(batch=4) | dict(weights=jnp.asarray(weights, jnp.float32))

    whole, metrics = one_step(tiny, tied_params, batch, 1)
    in_parts, metrics_in_parts = one_step(tiny, tied_params, batch, parts)

    for name in ("train/loss", "train/grad_norm"):
        assert float(metrics[name]) == pytest.approx(float(metrics_in_parts[name]), rel=1e-5)
    # Moments are compared, since the first step of Adam is the gradient's sign.
    moments = jax.tree.leaves(whole.opt)
    assert moments
    for one, other in zip(moments, jax.tree.leaves(in_parts.opt), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_matrix_of_one_axis_is_refused_in_one_sentence():
    scale = model.Param(("layers",), (2,), 0.0, group="matrix")
    with pytest.raises(InputError, match="group matrix has the axes layers; allowed are others"):
        sides(scale)
