"""lib/edits.py: growth in depth and new embeddings, with the optimiser's state."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import used
from edit_cases import block_names, context, shapes

import model
import train
from lib.edits import reset_embeddings, stack
from lib.optim import adamw, init_opt_state
from model import Edited, Model

equal = np.testing.assert_array_equal


@pytest.fixture
def before(tiny, params) -> Model:
    """The tiny model."""
    return Model(tiny, used(tiny, params))


def optimizer_state(before: Model):
    """An AdamW state with moments and a count that are not those of a fresh one."""
    def fresh(params):
        return init_opt_state(params, before.config, adamw)

    rng = np.random.default_rng(0)

    def filled(x):
        if not x.shape:
            return x.dtype.type(7)
        return jnp.asarray(rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(filled, jax.eval_shape(fresh, before.params))


def state_after(edited: Edited, before: Model):
    """What becomes of `optimizer_state(before)` by an edit."""
    after = edited.model
    fresh = init_opt_state(after.params, after.config, adamw)
    return train.transfer_opt_state(optimizer_state(before), fresh, edited, before.config)


def moments_of(opt) -> dict[str, dict[str, jax.Array]]:
    """{moment: {parameter: array}} of an AdamW state."""
    moments = {"mu": {}, "nu": {}}
    for adam, *_ in opt.values():
        for moment in moments:
            moments[moment] |= getattr(adam, moment)
    return moments


def counts_of(opt) -> dict[str, int]:
    """{group: count of steps} of an AdamW state."""
    return {group: int(adam.count) for group, (adam, *_) in opt.items()}


# -------------------------------------------------------------------------------------------- stack


@pytest.mark.parametrize("arguments,order", [
    ({}, [0, 1, 0, 1]),
    (dict(times=3), [0, 1, 0, 1, 0, 1]),
    (dict(times=1), [0, 1]),
    (dict(layers=(0, 0, 1, 1)), [0, 0, 1, 1]),
    (dict(layers=(1,)), [1]),
], ids=str)
def test_stack_is_its_layer_list_bit_for_bit(tiny, before, arguments, order):
    edited = stack(before, context(), **arguments)

    config, params = edited.model
    assert config == replace(tiny, layers=len(order))
    assert set(edited.policy) == set(model.groups(tiny))
    assert shapes(params) == shapes(model.table(config))
    for name in model.table(tiny):
        expected = np.asarray(before.params[name])
        if name in block_names(tiny):
            expected = expected[order]
        equal(params[name], expected)


def test_stack_maps_moments_with_the_blocks(tiny, before):
    edited = stack(before, context(), layers=(1, 0, 1), moments="map")
    opt = state_after(edited, before)

    assert counts_of(opt) == dict(embed=7, vector=7, matrix=7)
    old = moments_of(optimizer_state(before))
    new = moments_of(opt)
    for moment in ("mu", "nu"):
        for name in model.table(tiny):
            expected = np.asarray(old[moment][name])
            if name in block_names(tiny):
                expected = expected[[1, 0, 1]]
            equal(new[moment][name], expected)


def test_stack_resets_moments_and_counts(before):
    edited = stack(before, context(), moments="reset")
    opt = state_after(edited, before)

    assert set(counts_of(opt).values()) == {0}
    moments = moments_of(opt)
    for tree in moments.values():
        assert not any(np.any(x) for x in tree.values())
    assert moments["mu"]["q"].shape == (4, 32, 2, 2, 8)


@pytest.mark.parametrize("arguments", [
    dict(layers=()),
    dict(layers=(0, 2)),
    dict(layers=(-2,)),
    dict(times=0),
    dict(times=-1),
], ids=str)
def test_stack_refuses_layers_that_the_model_does_not_have(before, arguments):
    with pytest.raises(ValueError, match="stack: layers is .* layers 0 to 1"):
        stack(before, context(), **arguments)


def test_stack_refuses_an_unknown_policy(before):
    with pytest.raises(ValueError, match="stack: moments is 'keep'"):
        stack(before, context(), moments="keep")


def test_policy_that_does_not_fit_is_refused(before):
    edited = stack(before, context())
    keep_every_group = edited._replace(policy={})
    with pytest.raises(ValueError, match="'keep'.*'(vector|matrix)'"):
        state_after(keep_every_group, before)


# ------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("tied,head,drawn", [
    (True, True, {"embed"}),
    (False, True, {"embed", "head"}),
    (False, False, {"embed"}),
])
def test_reset_embeddings_draws_the_vocabulary_again(tiny, params, tied, head, drawn):
    config = replace(tiny, tied=tied)
    old = used(config, params)

    edited = reset_embeddings(Model(config, old), context(), head=head)

    new = edited.model.params
    assert edited.model.config == config
    assert set(new) == set(old)
    assert edited.policy == dict.fromkeys(drawn, "reset")
    for name, row in model.table(config).items():
        assert ("vocab" in row.axes) == (name in {"embed", "head"})
        if name in drawn:
            assert not np.any(new[name] == old[name])
            assert np.std(new[name]) == pytest.approx(row.init, rel=0.04)
            assert abs(np.mean(new[name])) < 0.04 * row.init
        else:
            equal(new[name], old[name])


def test_reset_embeddings_follow_the_key(before):
    def embeddings(seed):
        edited = reset_embeddings(before, context(seed))
        return edited.model.params["embed"]

    first = embeddings(5)
    equal(first, embeddings(5))
    assert not np.any(first == embeddings(6))


def test_reset_embeddings_keep_the_body_s_optimiser(tiny, params):
    untied = Model(replace(tiny, tied=False), params)

    edited = reset_embeddings(untied, context(), head=False)

    opt = state_after(edited, untied)
    assert counts_of(opt) == dict(embed=0, vector=7, matrix=7, head=7)
    old = moments_of(optimizer_state(untied))
    new = moments_of(opt)
    for moment in ("mu", "nu"):
        for name in model.table(untied.config):
            expected = old[moment][name]
            if name == "embed":
                expected = np.zeros((258, 32))
            equal(new[moment][name], expected)


# --------------------------------------------------------------------------- what an edit promises


def silent_blocks(before, context):
    """An edit that does preserve the function: new blocks whose output projections are zero."""
    edited = stack(before, context)
    config, params = edited.model
    silent = {}
    for name in ("o", "down"):
        silent[name] = params[name].at[before.config.layers:].set(0)
    return Edited(Model(config, params | silent), edited.policy, True)


EDITS = {
    "stack": stack,
    "stack three": partial(stack, times=3, moments="map"),
    "each layer twice": partial(stack, layers=(0, 0, 1, 1)),
    "first layer alone": partial(stack, layers=(0,)),
    "reset": reset_embeddings,
    "reset without head": partial(reset_embeddings, head=False),
    "silent blocks": silent_blocks,
}


def change_of_logits(edited: Edited, before: Model, ids) -> float:
    """How far the logits moved."""
    new = model.apply(edited.model.params, ids, edited.model.config)
    old = model.apply(before.params, ids, before.config)
    return float(jnp.max(jnp.abs(new - old)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_say_truly_whether_they_preserve_the_function(tiny, params, edit, tied):
    config = replace(tiny, tied=tied)
    before = Model(config, used(config, params))
    ids = np.random.default_rng(0).integers(0, 258, (2, 8))

    edited = edit(before, context())

    change = change_of_logits(edited, before, ids)
    if edited.preserves:
        assert change <= 1e-5
    else:
        assert change > 1e-2


@pytest.mark.parametrize("layers,preserves", [
    ((0, 1, -1, -1), True),
    ((-1, 0, 1), True),
    ((0, -1, 1), True),
    ((1, 0, -1), False),
    ((0, -1), False),
])
def test_identity_layers_change_nothing(before, layers, preserves):
    """Where the old layers are all there, in their order."""
    ids = np.random.default_rng(1).integers(0, 258, (2, 12))

    edited = stack(before, context(), layers=layers, new="identity")

    change = change_of_logits(edited, before, jnp.asarray(ids))
    assert edited.preserves == preserves
    assert (change < 1e-5) == preserves


@pytest.mark.parametrize("layers", [(0, 1, -1, -1), (-1, 0, 1), (0, -1, 1), (1, 0, -1), (0, -1)])
def test_identity_layers_are_drawn_but_for_their_output_projections(before, layers):
    edited = stack(before, context(), layers=layers, new="identity")

    config, params = edited.model
    fresh = model.init(config, context().key)
    layer = layers.index(-1)
    assert not np.any(params["o"][layer])
    assert not np.any(params["down"][layer])
    assert np.all(np.asarray(params["attn_norm"][layer]) == 1)
    equal(params["q"][layer], fresh["q"][layer])


def test_random_layers_are_drawn_as_at_initialisation(tiny, before):
    edited = stack(before, context(), layers=(0, 1, -1), moments="map")

    config, params = edited.model
    fresh = model.init(config, context().key)
    assert not edited.preserves
    for name in block_names(tiny):
        equal(params[name][2], fresh[name][2])
        equal(params[name][:2], before.params[name])


def test_random_layers_begin_without_moments(before):
    edited = stack(before, context(), layers=(0, 1, -1), moments="map")
    opt = state_after(edited, before)

    assert set(counts_of(opt).values()) == {7}
    for tree in moments_of(opt).values():
        assert not np.any(tree["q"][2])
        assert np.any(tree["q"][1])


def test_stack_refuses_an_unknown_kind_of_new_layer(before):
    with pytest.raises(ValueError, match="new is 'zero'"):
        stack(before, context(), layers=(0, -1), new="zero")


def test_loud_layers_are_heard_at_once_whatever_the_table_says(before):
    """As at initialisation, but with outputs drawn as what reads the stream is, where they are 0."""
    quiet = replace(before.config, rows=None)
    edited = stack(before._replace(config=quiet), context(), layers=(0, 1, -1), new="loud")
    config, params = edited.model
    fresh = model.init(config, context().key)
    assert not edited.preserves and not np.any(fresh["o"]) and not np.any(fresh["down"])
    for name in ("o", "down"):
        spread = float(np.std(params[name][2]))
        assert spread == pytest.approx(config.embed**-0.5, rel=0.15), name
    for name in ("q", "gate", "attn_norm"):
        equal(params[name][2], fresh[name][2])
