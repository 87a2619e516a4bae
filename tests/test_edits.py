"""lib/edits.py: growth in depth and new embeddings, with the optimiser's state."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import used
from edit_cases import context

import model
import train
from lib.edits import reset_embeddings, stack
from lib.optim import adamw, init_opt_state
from model import Edited, Model

equal = np.testing.assert_array_equal


def optimizer_state(config, params):
    """An AdamW state with moments and a count that are not those of a fresh one."""
    first = jax.eval_shape(lambda p: init_opt_state(p, config, adamw), used(config, params))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.shape else x.dtype.type(7), first)


def moved(opt, edited, old):
    """An optimiser state after an edit of a model of shape `old`."""
    fresh = init_opt_state(edited.model.params, edited.model.config, adamw)
    return train.transfer_opt_state(opt, fresh, edited, old)


def adam_moments(opt):
    """{moment: {parameter: array}} and {group: count} of an AdamW state."""
    moments = {m: {n: x for chain in opt.values() for n, x in getattr(chain[0], m).items()}
               for m in ("mu", "nu")}
    return moments, {group: int(chain[0].count) for group, chain in opt.items()}


@pytest.mark.parametrize("arguments,order", [
    ({}, [0, 1, 0, 1]), (dict(times=3), [0, 1, 0, 1, 0, 1]), (dict(times=1), [0, 1]),
    (dict(layers=(0, 0, 1, 1)), [0, 0, 1, 1]), (dict(layers=(1,)), [1])], ids=str)
def test_stack_is_its_layer_list_bit_for_bit(tiny, params, arguments, order):
    old = used(tiny, params)
    (config, new), policy, *_ = stack(Model(tiny, old), context(), **arguments)
    assert config == replace(tiny, layers=len(order)) and set(policy) == set(model.groups(tiny))
    assert {n: x.shape for n, x in new.items()} == {n: p.shape for n, p in model.table(config).items()}
    for name, row in model.table(tiny).items():
        equal(new[name], np.asarray(old[name])[order] if row.axes[0] == "layers" else old[name])


def test_stack_maps_moments_with_the_blocks(tiny, params):
    opt, old = optimizer_state(tiny, params), used(tiny, params)
    edited = stack(Model(tiny, old), context(), layers=(1, 0, 1), moments="map")
    before, _ = adam_moments(opt)
    after, counts = adam_moments(moved(opt, edited, tiny))
    assert counts == dict(embed=7, vector=7, matrix=7)
    for moment in ("mu", "nu"):
        for name, row in model.table(tiny).items():
            x = np.asarray(before[moment][name])
            equal(after[moment][name], x[[1, 0, 1]] if row.axes[0] == "layers" else x)


def test_stack_resets_moments_and_counts(tiny, params):
    edited = stack(Model(tiny, used(tiny, params)), context(), moments="reset")
    moments, counts = adam_moments(moved(optimizer_state(tiny, params), edited, tiny))
    assert set(counts.values()) == {0}
    assert not any(np.any(x) for tree in moments.values() for x in tree.values())
    assert moments["mu"]["q"].shape == (4, 32, 2, 2, 8)


@pytest.mark.parametrize("arguments", [
    dict(layers=()), dict(layers=(0, 2)), dict(layers=(-2,)), dict(times=0), dict(times=-1)], ids=str)
def test_stack_refuses_layers_that_are_not(tiny, params, arguments):
    with pytest.raises(ValueError, match="stack: layers is .* layers 0 to 1"):
        stack(Model(tiny, params), context(), **arguments)


def test_stack_refuses_an_unknown_policy(tiny, params):
    with pytest.raises(ValueError, match="stack: moments is 'keep'"):
        stack(Model(tiny, params), context(), moments="keep")


def test_policy_that_does_not_fit_is_refused(tiny, params):
    edited = stack(Model(tiny, used(tiny, params)), context())._replace(policy={})  # every group kept
    with pytest.raises(ValueError, match="'keep'.*'(vector|matrix)'"):
        moved(optimizer_state(tiny, params), edited, tiny)


@pytest.mark.parametrize("tied,head,gone", [
    (True, True, {"embed"}), (False, True, {"embed", "head"}), (False, False, {"embed"})])
def test_reset_embeddings_draws_the_vocabulary_again(tiny, params, tied, head, gone):
    config = replace(tiny, tied=tied)
    old = used(config, params)
    (shape, new), policy, *_ = reset_embeddings(Model(config, old), context(), head=head)
    assert shape == config and set(new) == set(old) and policy == dict.fromkeys(gone, "reset")
    for name, row in model.table(config).items():
        assert ("vocab" in row.axes) == (name in {"embed", "head"})
        if name in gone:
            assert not np.any(new[name] == old[name])
            assert np.std(new[name]) == pytest.approx(row.init, rel=0.04)
            assert abs(np.mean(new[name])) < 0.04 * row.init
        else:
            equal(new[name], old[name])


def test_reset_embeddings_follow_the_key(tiny, params):
    before = Model(tiny, used(tiny, params))
    one, again, other = (reset_embeddings(before, context(s)).model.params["embed"] for s in (5, 5, 6))
    equal(one, again)
    assert not np.any(one == other)


def test_reset_embeddings_keep_the_body_s_optimiser(tiny, params):
    config = replace(tiny, tied=False)
    opt = optimizer_state(config, params)
    edited = reset_embeddings(Model(config, params), context(), head=False)
    old, _ = adam_moments(opt)
    new, counts = adam_moments(moved(opt, edited, config))
    assert counts == dict(embed=0, vector=7, matrix=7, head=7)
    for moment in ("mu", "nu"):
        for name in model.table(config):
            equal(new[moment][name], np.zeros((258, 32)) if name == "embed" else old[moment][name])


def silent_blocks(before, context):
    """An edit that does preserve the function: new blocks whose output projections are zero."""
    edited = stack(before, context)
    late = {n: edited.model.params[n].at[before.config.layers:].set(0) for n in ("o", "down")}
    return Edited(Model(edited.model.config, edited.model.params | late), edited.policy, True)


EDITS = {
    "stack": stack,
    "stack three": partial(stack, times=3, moments="map"),
    "each layer twice": partial(stack, layers=(0, 0, 1, 1)),
    "first layer alone": partial(stack, layers=(0,)),
    "reset": reset_embeddings,
    "reset without head": partial(reset_embeddings, head=False),
    "silent blocks": silent_blocks,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_say_truly_whether_they_preserve_the_function(tiny, params, edit, tied):
    config = replace(tiny, tied=tied)
    ids = np.random.default_rng(0).integers(0, 258, (2, 8))
    edited = edit(Model(config, used(config, params)), context())
    before = model.apply(used(config, params), ids, config)
    after = model.apply(edited.model.params, ids, edited.model.config)
    worst = float(jnp.max(jnp.abs(after - before)))
    assert worst <= 1e-5 if edited.preserves else worst > 1e-2


@pytest.mark.parametrize("layers,preserves", [
    ((0, 1, -1, -1), True), ((-1, 0, 1), True), ((0, -1, 1), True), ((1, 0, -1), False), ((0, -1), False)])
def test_identity_layers_change_nothing(tiny, params, layers, preserves):
    """New blocks with zero output projections; what an edit says of itself is true."""
    old = used(tiny, params)
    (config, new), _, says, _ = stack(Model(tiny, old), context(), layers=layers, new="identity")
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 258, (2, 12)))
    gap = float(jnp.abs(model.apply(new, ids, config) - model.apply(old, ids, tiny)).max())
    assert says == preserves and (gap < 1e-5) == preserves
    at = layers.index(-1)
    assert not np.any(new["o"][at]) and not np.any(new["down"][at])
    assert np.all(np.asarray(new["attn_norm"][at]) == 1)
    equal(new["q"][at], model.init(config, context().key)["q"][at])


def test_random_layers_are_drawn_as_at_initialisation(tiny, params):
    old = used(tiny, params)
    edited = stack(Model(tiny, old), context(), layers=(0, 1, -1), moments="map")
    fresh = model.init(edited.model.config, context().key)
    for name, row in model.table(tiny).items():
        if row.axes[0] == "layers":
            equal(edited.model.params[name][2], fresh[name][2])
            equal(edited.model.params[name][:2], old[name])
    moments, counts = adam_moments(moved(optimizer_state(tiny, params), edited, tiny))
    assert not edited.preserves and set(counts.values()) == {7}
    assert all(not np.any(tree["q"][2]) and np.any(tree["q"][1]) for tree in moments.values())
    with pytest.raises(ValueError, match="new is 'zero'"):
        stack(Model(tiny, old), context(), layers=(0, -1), new="zero")
