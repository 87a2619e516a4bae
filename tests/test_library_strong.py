"""configs/baselines/muon.py and strong.py: singular values, equal outputs, parts that are off, the past."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong
from edit_cases import context
from train_cases import same_on_eight_devices

import model
import train
from configs.baselines import muon
from lib.config import ROOT, load_file
from lib.edits import stack
from lib.kernels import Mask
from lib.optim import State, first_state
from lib.prune import prune
from lib.sharding import MeshConfig, make_mesh
from model import Model

pytestmark = pytest.mark.library
own = load_file(ROOT / "configs/baselines/strong.py")
CAUSAL = Mask("causal", 0)
equal = np.testing.assert_array_equal
OPTIMIZER = partial(muon.muon, iteration="polar_express", outputs="equal")
OFF = dict(gains=True, gated=True, values=False, gates=False,
           smear=False, pairs=0)


@pytest.fixture
def whole(tiny):
    """All parts, on the shape of `tiny`."""
    return replace(tiny, tied=False, qk_norm=True, rows=partial(own.parts, pairs=64),
                   forward=own.strong, outputs=own.capped, flops=own.flops, unroll=1)


@pytest.fixture
def bare(tiny):
    """The same with all parts off."""
    return replace(tiny, rows=partial(own.parts, **OFF), flops=own.flops, unroll=1,
                   forward=partial(own.strong, shift=False),
                   outputs=partial(own.capped, cap=0.0))


def batch_of(seed=0, **changes):
    return {name: jnp.asarray(x) for name, x in rows(seed).items()} | changes


# ------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_polar_express_sends_singular_values_to_about_one(shape):
    """From 1e-3 of the norm to all of it, within 0.15; as many steps of Newton-Schulz within 0.5.
    Singular vectors stay.
    """
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], 24)))
    right, _ = np.linalg.qr(rng.normal(size=(shape[1], 24)))
    values = np.geomspace(1, 2.5e-3, 24)  # the norm is 2
    x = jnp.asarray(left * values @ right.T, jnp.float32)[None]
    furthest = {}
    for name, coefficients in muon.COEFFICIENTS.items():
        found = np.asarray(muon.orthogonal(x, coefficients))[0]
        core = left.T @ found @ right
        np.testing.assert_allclose(found, left @ core @ right.T, atol=1e-4)
        np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-3)
        furthest[name] = np.abs(np.diag(core) - 1).max()
    assert furthest["polar_express"] < 0.15 < 0.3 < furthest["newton_schulz"]


def matrix_updates(config, number=1, **options):
    """(table rows, gradients, updates) of the matrices after so many equal gradients."""
    table = model.table(config)
    transform = muon.muon(table, weight_decay=0.0, **options)["matrix"]
    names = model.groups(config)["matrix"]
    rng = np.random.default_rng(0)
    grads = {n: jnp.asarray(rng.normal(size=table[n].shape), jnp.float32) for n in names}
    grads = {n: x * jnp.geomspace(1e-2, 1, x.shape[-1]) for n, x in grads.items()}
    state = transform.init(grads)
    for _ in range(number):
        updates, state = transform.update(grads, state, grads)
    return table, grads, updates


@pytest.mark.parametrize("number", [1, 3])
def test_outputs_of_normuon_have_equal_norms(tiny, number):
    """And the whole has exactly the root mean square that was asked for."""
    table, _, updates = matrix_updates(tiny, number, outputs="normal", iteration="polar_express", rms=0.3)
    for name, x in updates.items():
        matrices = muon.flat(x, table[name])
        norms = jnp.sqrt(jnp.mean(jnp.square(matrices), 1))
        np.testing.assert_allclose(norms, np.full(norms.shape, 0.3), rtol=1e-4, err_msg=name)


def test_equal_outputs_have_equal_norms_before_they_are_orthogonalised(tiny):
    """So an output of a hundredth of the gradient counts as much as any: the update is that of the scaled
    gradient.
    """
    table, grads, updates = matrix_updates(tiny, outputs="equal", iteration="polar_express")
    for name, x in updates.items():
        scaled = muon.flat(grads[name], table[name])
        scaled = scaled / jnp.linalg.norm(scaled, axis=1, keepdims=True)
        expected = muon.orthogonal(scaled, muon.COEFFICIENTS["polar_express"])
        expected = expected * 0.2 * max(scaled.shape[1:]) ** 0.5
        np.testing.assert_allclose(muon.flat(x, table[name]), expected, atol=2e-4, err_msg=name)


def test_an_unknown_way_of_muon_and_a_matrix_outside_of_blocks_are_refused(tiny):
    table = model.table(tiny)
    for options in (dict(iteration="power"), dict(outputs="rows")):
        with pytest.raises(ValueError, match="allowed are"):
            muon.muon(table, **options)
    with pytest.raises(ValueError, match="own is no matrix of a block"):
        muon.muon(table | {"own": model.Param(("in", "out"), (8, 4), 1.0)})


# ------------------------------------------------------------------------------------------- the model


def test_all_off_is_the_plain_llama(tiny, bare):
    assert model.table(bare) == model.table(tiny)
    params, batch = strong(tiny), batch_of()
    equal(model.apply(params, batch, bare), model.apply(params, batch, replace(tiny, unroll=1)))
    assert own.flops(bare, 24) == model.flops_per_token(tiny, 24)


def test_without_gains_they_are_one(whole):
    without = replace(whole, rows=partial(own.parts, pairs=64, gains=False))
    params, batch = strong(whole), batch_of()
    gains = {name for name, row in model.table(whole).items() if row.init is None}
    assert gains == {"attn_norm", "mlp_norm", "norm", "q_norm", "k_norm"}
    assert gains == params.keys() - model.table(without).keys()
    ones = params | {name: jnp.ones_like(params[name]) for name in gains}
    fewer = {name: x for name, x in params.items() if name not in gains}
    equal(model.apply(fewer, batch, without), model.apply(ones, batch, whole))


def test_without_a_gate_the_mlp_is_squared_relu(whole):
    """One layer whose attention writes nothing: down(relu(up(x))²) of the normed stream is added."""
    config = replace(whole, layers=1, rows=partial(own.parts, pairs=0, smear=False, gated=False))
    params, batch = dict(strong(config)), batch_of()
    assert "gate" not in params
    params["o"] = 0 * params["o"]
    states, _ = model.forward(params, batch, CAUSAL, config)
    given = {name: np.asarray(x, np.float64) for name, x in params.items()}

    def normed(x, gain):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * gain

    x = given["embed"][np.asarray(batch["tokens"])]
    up = normed(x, given["mlp_norm"][0]) @ given["up"][0]
    x = x + np.maximum(up, 0) ** 2 @ given["down"][0]
    np.testing.assert_allclose(states, normed(x, given["norm"]), rtol=1e-4, atol=1e-4)


def test_parts_at_zero_leave_it_as_it_was(whole):
    """Gates and tables that are drawn as zero, or whose table is zero, change nothing."""
    off = dict.fromkeys(("values", "smear", "pairs", "gates"), False)
    without = replace(whole, rows=partial(own.parts, **off))
    params = strong(without)
    new = {n: x for n, x in model.init(whole, jax.random.key(0)).items() if n not in params}
    new["values"] = 0 * new["values"]
    assert set(new) == {"values", "value_gates", "gates", "smear", "smear_gate", "pairs"}
    batch = batch_of()
    found, expected = model.apply(params | new, batch, whole), model.apply(params, batch, without)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_logits_are_capped(whole):
    params, batch = strong(whole), batch_of()
    states, _ = model.forward(params, batch, CAUSAL, whole)
    found = own.capped(params, 1e3 * states, batch, whole, cap=5.0)
    assert 4.9 < jnp.abs(found).max() <= 5.0
    small = own.capped(params, 1e-3 * states, batch, whole, cap=5.0)
    np.testing.assert_allclose(small, model.head_logits(params, 1e-3 * states, batch, whole), atol=1e-4)


def test_nothing_looks_ahead(whole):
    """Another token changes logits from its place on, and none before it."""
    params = strong(whole)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 258, (2, 24)))
    one, other = (model.apply(params, x, whole) for x in (ids, ids.at[:, 9].add(1) % 258))
    equal(one[:, :9], other[:, :9])
    assert np.all(np.abs(one - other).max(-1)[:, 9:] > 0)


def test_segments_are_apart(whole):
    """A row of several gives each what it has alone, and tokens of one do not reach the next."""
    params, batch = strong(whole), batch_of()
    packed = model.apply(params, batch, whole)
    for segment in (1, 2, 3):
        where = np.flatnonzero(np.asarray(batch["segments"])[0] == segment)
        alone = model.apply(params, batch["tokens"][:, where], whole)
        np.testing.assert_allclose(packed[:, where], alone, atol=2e-5)
    second = np.flatnonzero(np.asarray(batch["segments"])[0] == 2)
    changed = batch | {"tokens": batch["tokens"].at[:, second[0] - 1].add(1) % 258}
    equal(model.apply(params, changed, whole)[:, second], packed[:, second])


def test_it_computes_in_the_dtype_that_is_asked_for(whole):
    config = replace(whole, dtype="bfloat16")
    forward = partial(model.forward, mask=CAUSAL, config=config)
    states, _ = jax.eval_shape(forward, strong(config), batch_of())
    assert states.dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------------- a run


def a_run(config):
    return train.Config(model=config, optimizer=OPTIMIZER)


def test_eight_devices_compute_what_one_does(whole):
    same_on_eight_devices(a_run(whole))


def test_channels_in_which_nothing_is_written_can_be_cut(whole):
    """Logits stay: gains take up that the root mean square changes, and gates read what these made."""
    params, half = dict(strong(whole)), whole.embed // 2
    for name in ("embed", "pairs", "o", "down", "smear"):
        params[name] = params[name].at[..., half:].set(0)
    edited = prune(Model(whole, params), context(), embed=half)
    assert edited.model.config.embed == half
    found = model.apply(edited.model.params, batch_of(), edited.model.config)
    np.testing.assert_allclose(found, model.apply(params, batch_of(), whole), atol=2e-5)


@pytest.mark.parametrize("moments", ["reset", "map"])
def test_it_is_stacked_and_goes_on(whole, moments):
    """New rows follow their layers, Muon's moments too, and a step with twice the layers is taken."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = first_state(whole, OPTIMIZER, mesh, jax.random.key(0))
    state = state.replace(params=strong(whole))
    edit = partial(stack, moments=moments)
    state, grown, _ = train.apply_edits([edit], state, whole, OPTIMIZER, mesh, context())
    assert grown.layers == 4
    for name, row in model.table(grown).items():
        assert state.params[name].shape == row.shape
        if row.layered:
            equal(state.params[name][:2], state.params[name][2:])
    lr = dict.fromkeys(model.groups(grown), jnp.float32(1e-3))
    step = jax.jit(train.make_step(a_run(grown), grown), static_argnames="mask")
    after, metrics = step(state, batch_of(), lr, mask=CAUSAL)
    assert isinstance(after, State) and np.isfinite(metrics["train/loss"]) and not after.skipped
