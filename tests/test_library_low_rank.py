"""configs/parameters/: LoRA, ReLoRA, factors alone, SLTrain."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong
from edit_cases import context, logits

import model
import train
from configs.parameters import low_rank, relora, sltrain
from lib.edits import stack
from lib.kernels import Mask
from lib.lora import adapted, add_lora, lora_rows, unfrozen
from lib.matrices import flat, matrices, sides
from lib.optim import first_state
from lib.sharding import MeshConfig, make_mesh
from lib.sizes import sizes
from model import Model

pytestmark = pytest.mark.library
LOW = [(partial(lora_rows, rank=3), adapted),
       (partial(low_rank.factored, rank=3), low_rank.product),
       (partial(sltrain.sparse_rows, rank=3, share=0.1), sltrain.sparse_plus_low)]
low = pytest.mark.parametrize("made, reparam", LOW, ids=["lora", "low_rank", "sltrain"])


def lively(config, seed=2):
    """Parameters of a model with factors, none of them zero."""
    drawn = model.init(config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for name, x in drawn.items():
        if name.endswith(("/b", "/m")):
            drawn[name] = jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype)
    return drawn


def scores_of(params, config, ids):
    """Logits of a plain Llama."""
    return jax.jit(lambda p: model.apply(p, ids, config))(params)


def trained(config, reparam, optimizer, steps=3):
    """(state before, state after) a few updates, on eight devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    run = train.Config(model=config, reparam=reparam, optimizer=optimizer)
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    state = begun = first_state(config, optimizer, mesh, jax.random.key(0))
    rate = {group: np.float32(0.01) for group in model.groups(config)}
    with jax.set_mesh(mesh):
        for i in range(steps):
            state, metrics = step(state, rows(i), rate, mask=Mask("causal", 0))
    assert np.isfinite(metrics["train/loss"]) and int(state.skipped) == 0
    return begun, state


def test_a_matrix_s_sides_are_what_it_reads_and_what_it_gives(tiny):
    found = {name: sides(row) for name, row in matrices(tiny).items()}
    assert found == dict(q=(32, 32), k=(32, 16), v=(32, 16), o=(32, 32), gate=(32, 48), up=(32, 48),
                         down=(48, 32))


@low
def test_merging_into_plain_matrices_changes_no_logit(tiny, made, reparam):
    """The merged parameters are a plain Llama's, and give what the factors give beside them."""
    with jax.enable_x64(True):
        wide = replace(tiny, dtype="float64", param_dtype="float64")
        config = replace(wide, rows=made)
        params = lively(config)
        plain = reparam(params, 0, {}, config)
        shapes = {name: row.shape for name, row in model.table(wide).items()}
        assert {name: x.shape for name, x in plain.items()} == shapes
        ids = rows()["tokens"]
        inside = jax.jit(lambda p: model.apply(reparam(p, 0, {}, config), ids, config))
        np.testing.assert_allclose(inside(params), scores_of(plain, wide, ids), atol=1e-9)


def test_lora_is_the_product_beside_the_matrix_in_the_layers_that_have_it(tiny):
    config = replace(tiny, rows=partial(lora_rows, rank=3, layers=(0, -1)), layers=3)
    params = lively(config)
    used = adapted(params, 0, {}, config, alpha=6.0, layers=(0, -1))
    for name, row in matrices(config).items():
        moved = np.asarray(flat(used[name], row) - flat(params[name], row))
        product = 2.0 * np.asarray(params[f"{name}/a"]) @ np.asarray(params[f"{name}/b"])
        np.testing.assert_allclose(moved[[0, 2]], product, atol=1e-6)
        assert not moved[1].any()


@pytest.mark.parametrize("alone", [False, True])
def test_adapters_change_nothing_yet_and_alone_train_alone(tiny, alone):
    plain = strong(tiny)
    edited = add_lora(Model(tiny, plain), context(), rank=2, alone=alone)
    config = edited.model.config
    assert edited.preserves
    got = logits(adapted(edited.model.params, 0, {}, config), tiny)
    np.testing.assert_array_equal(got, logits(plain, tiny))
    before, after = trained(config, adapted, unfrozen)
    moved = {name for name in before.params if np.any(before.params[name] != after.params[name])}
    factors = {name for name in before.params if "/" in name}
    assert moved == (factors if alone else factors | {"embed", "norm", "attn_norm", "mlp_norm"})
    assert "frozen" not in after.opt


def test_stack_copies_adapters_along(tiny):
    """What the model adds to the table grows with it: each half is the shallow model's block."""
    config = replace(tiny, rows=partial(lora_rows, rank=2))
    params = lively(config)
    deep = stack(Model(config, params), context()).model
    for name in ("q/a", "q/b"):
        assert model.table(deep.config)[name].shape[0] == 4
        np.testing.assert_array_equal(deep.params[name][2:], params[name])


# ----------------------------------------------------------------------------------------- ReLoRA


def test_relora_merges_without_a_change_and_begins_its_factors_anew(tiny):
    config = replace(tiny, rows=partial(lora_rows, rank=3))
    params = lively(config)
    edited = relora.merge(Model(config, params), context())
    new = edited.model.params
    assert edited.preserves and new.keys() == params.keys()
    got = logits(adapted(new, 0, {}, config), tiny)
    np.testing.assert_allclose(got, logits(adapted(params, 0, {}, config), tiny), atol=1e-6)
    for name in matrices(config):
        assert not np.any(new[f"{name}/b"]) and np.all(new[f"{name}/a"] != params[f"{name}/a"])
        assert np.any(new[name] != params[name])


def test_two_merges_give_a_change_of_twice_the_rank(tiny):
    config = replace(tiny, rows=partial(lora_rows, rank=3))
    begun = now = Model(config, lively(config))
    for seed in (1, 2):
        lived = now.params | {n: x for n, x in lively(config, seed).items() if "/" in n}
        now = relora.merge(Model(config, lived), context(seed)).model
    for name, row in matrices(config).items():
        moved = flat(now.params[name] - begun.params[name], row)
        ranks = np.linalg.matrix_rank(np.asarray(moved, np.float64), tol=1e-4)
        assert (ranks == 6).all(), name


def test_relora_forgets_all_but_the_same_thousandth_of_both_moments(tiny):
    config = replace(tiny, rows=partial(lora_rows, rank=3))
    _, state = trained(config, adapted, unfrozen)
    edited = relora.merge(Model(config, state.params), context(), keep=0.1)
    fresh = {group: None for group in state.opt}
    fresh = train.init_opt_state(edited.model.params, config, unfrozen)
    opt = train.transfer_opt_state(state.opt, fresh, edited, config)
    adam, old = opt["matrix"][0], state.opt["matrix"][0]
    assert int(adam.count) == int(old.count) == 3
    kept, total = 0, 0
    for name, mu in adam.mu.items():
        stays = np.asarray(mu) != 0
        np.testing.assert_array_equal(mu, np.where(stays, old.mu[name], 0))
        np.testing.assert_array_equal(adam.nu[name], np.where(stays, old.nu[name], 0))
        kept, total = kept + stays.sum(), total + stays.size
    assert 0.08 < kept / total < 0.12
    for group in set(opt) - {"matrix"}:
        jax.tree.map(np.testing.assert_array_equal, opt[group], state.opt[group])


def test_relora_s_rate_warms_up_again_in_each_cycle_below_a_falling_line():
    shares = np.arange(1, 1001) / 1000
    rate = np.array([relora.restarts(float(s), cycles=5, warm=0.2, final=0.1) for s in shares])
    line = 1 - 0.9 * shares
    np.testing.assert_allclose(rate[(-shares * 5 % 1 < 0.8)], line[(-shares * 5 % 1 < 0.8)])
    assert (rate <= line + 1e-9).all() and sum(np.diff(rate) < -0.1) == 4


# ------------------------------------------------------------------------------------ factors alone


def test_refactorisation_keeps_the_product_and_balances_the_factors(tiny):
    config = replace(tiny, rows=partial(low_rank.factored, rank=4))
    params = lively(config)
    edited = low_rank.refactor(Model(config, params), context())
    new = edited.model.params
    before, after = (low_rank.product(p, 0, {}, config) for p in (params, new))
    for name, row in matrices(config).items():
        np.testing.assert_allclose(after[name], before[name], atol=1e-6)
        a, b = np.asarray(new[f"{name}/a"]), np.asarray(new[f"{name}/b"])
        values = np.linalg.svd(np.asarray(flat(before[name], row)), compute_uv=False)[:, :4]
        for layer in range(config.layers):
            diagonal = np.diag(values[layer])
            np.testing.assert_allclose(a[layer].T @ a[layer], diagonal, atol=1e-5)
            np.testing.assert_allclose(b[layer] @ b[layer].T, diagonal, atol=1e-5)
    assert edited.policy == {"matrix": "reset"} and edited.preserves
    alone = low_rank.refactor(Model(config, params), context(), weights=False)
    assert alone.policy == edited.policy and alone.model.params["q/a"] is params["q/a"]


def test_the_product_is_drawn_as_the_matrix_would_be(tiny):
    config = replace(tiny, embed=128, mlp=256, rows=partial(low_rank.factored, rank=8))
    used = low_rank.product(model.init(config, jax.random.key(0)), 0, {}, config)
    for name, row in matrices(config).items():
        assert float(jnp.std(used[name])) == pytest.approx(row.init, rel=0.15), name


# ---------------------------------------------------------------------------------------- SLTrain


def test_sltrain_s_support_is_fixed_distinct_and_of_its_size(tiny):
    rows_of = partial(sltrain.sparse_rows, rank=3, share=0.05)
    config = replace(tiny, rows=rows_of)
    before, after = trained(config, sltrain.sparse_plus_low, unfrozen)
    used = sltrain.sparse_plus_low(after.params, 0, {}, config)
    low_alone = low_rank.product(after.params, 0, {}, config, alpha=16.0)
    for name, row in matrices(config).items():
        n, m = sides(row)
        where = np.asarray(after.params[f"{name}/where"])
        np.testing.assert_array_equal(where, before.params[f"{name}/where"])
        assert where.dtype == np.int32 and where.shape == (2, round(0.05 * n * m))
        sparse = np.asarray(used[name] - low_alone[name]).reshape(2, -1)
        for layer in range(2):
            assert len(np.unique(where[layer])) == where.shape[1]
            assert set(np.flatnonzero(np.abs(sparse[layer]) > 1e-6)) <= set(where[layer].tolist())
            values = after.params[f"{name}/values"][layer]
            np.testing.assert_allclose(sparse[layer][where[layer]], values, atol=1e-6)
        assert np.any(where[0] != where[1])
        assert np.any(before.params[f"{name}/values"] != after.params[f"{name}/values"])
    assert not np.any(before.params["q/b"]) and np.any(after.params["q/b"])


def test_trained_parameters_and_bytes_of_moments_are_as_counted(tiny):
    """Per layer: factors r (n + m), values a share of n m; AdamW holds two moments of each."""
    plain = {name: sides(row) for name, row in matrices(tiny).items()}
    rest = model.count(tiny) - 2 * sum(n * m for n, m in plain.values())
    factors = 2 * sum(3 * (n + m) for n, m in plain.values())
    values = 2 * sum(round(0.1 * n * m) for n, m in plain.values())
    counts = rest + factors, rest + factors, rest + factors + values
    for (made, _), trains in zip(LOW, counts, strict=True):
        found = sizes(replace(tiny, rows=made), unfrozen, frozenset())
        assert found["model/trained"] == trains
        assert found["model/opt_bytes"] == 2 * 4 * trains + 3 * 4  # and a count a group
