"""lib/widen.py: the function, moments and copies after growth in width."""
from functools import partial

import jax
import numpy as np
import pytest
from edit_cases import apart, context, gradient, wider

import model
import train
from lib.edits import stack
from lib.optim import adamw, first_state, init_opt_state
from lib.schedule import models_of
from lib.sharding import MeshConfig, make_mesh
from lib.widen import widen

equal = np.testing.assert_array_equal


@pytest.fixture
def double():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


TWICE = dict(embed=64, kv_heads=4, q_per_kv=4, mlp=96)
THRICE = dict(embed=96, kv_heads=6, q_per_kv=6, mlp=144)
ODD = dict(embed=40, kv_heads=3, q_per_kv=3, mlp=50)
WIDENINGS = {
    "twice": TWICE, "thrice": THRICE, "embed": dict(embed=64), "kv_heads": dict(kv_heads=4),
    "q_per_kv": dict(q_per_kv=4), "mlp": dict(mlp=96), "odd": ODD, "nothing": {},
    "random": ODD | dict(units="random"),
    "uneven": THRICE | dict(split="uneven"), "random uneven": ODD | dict(units="random", split="uneven"),
    "zero": TWICE | dict(new="zero"), "zero odd": ODD | dict(new="zero"),
    "next": TWICE | dict(new="next"),
}


@pytest.mark.parametrize("case,tied", [(c, i % 2 == 0) for i, c in enumerate(WIDENINGS)] + [
    ("twice", False), ("random uneven", False)])
def test_widen_says_truly_whether_it_preserves_the_function(tiny, double, tied, case):
    arguments = WIDENINGS[case]
    before = wider("float64", tiny, tied)
    edited = widen(before, context(), **arguments)
    assert edited.preserves == (arguments.get("new") != "next")
    moved = apart(edited, before)
    assert moved <= 1e-10 if edited.preserves else moved > 1e-2


@pytest.mark.parametrize("case", ["twice", "thrice", "zero"])
def test_widen_preserves_the_function_in_float32(tiny, case):
    before = wider("float32", tiny, case != "twice")
    assert apart(widen(before, context(), **WIDENINGS[case]), before) <= 1e-5


def test_widen_takes_advanced_knowledge_from_the_layer_above(tiny):
    before = wider("float32", tiny, False)
    same, above = (widen(before, context(), new=new, embed=64, mlp=96, kv_heads=4).model.params
                   for new in ("copy", "next"))
    for name, axis in dict(gate=2, down=2, q=2, o=4).items():
        old = before.params[name].shape[axis]
        one, two = (np.moveaxis(np.asarray(x[name]), axis, 1) for x in (same, above))
        equal(two[:, :old], one[:, :old])
        equal(two[0, old:], one[1, old:])
        equal(two[1], one[1])
    for name in ("embed", "attn_norm", "mlp_norm", "norm", "head"):
        equal(same[name], above[name])


@pytest.mark.parametrize("tied,arguments", [
    (True, TWICE), (False, ODD | dict(units="random")), (True, TWICE | dict(new="zero"))], ids=str)
def test_moments_are_mapped_as_gradients_are(tiny, double, tied, arguments):
    before = wider("float64", tiny, tied)
    edited = widen(before, context(), moments="map", **arguments)
    old, new = gradient(before.params, before.config), gradient(edited.model.params, edited.model.config)
    for group, names in model.groups(before.config).items():
        for power in (1, 2):
            mapped = edited.policy[group]({n: old[n]**power for n in names}, ["mu", "nu"][power - 1])
            for n in names:
                there = np.asarray(mapped[n]) != 0  # in the corner, the moments of what is new begin at 0
                there |= arguments.get("new") != "zero"
                np.testing.assert_allclose(mapped[n][there], new[n][there]**power, rtol=1e-7, atol=1e-13)


def trained(edited, steps=3):
    """The edited parameters after some steps of AdamW on one batch."""
    config, params = edited.model
    transforms, opt = adamw(model.table(config)), init_opt_state(params, config, adamw)
    for _ in range(steps):
        grads = gradient(params, config)
        for group, names in model.groups(config).items():
            take = {n: params[n] for n in names}
            way, opt[group] = transforms[group].update({n: grads[n] for n in names}, opt[group], take)
            params = params | {n: params[n] - 1e-2 * way[n] for n in names}
    return params


def copies_apart(params) -> dict[str, float]:
    """By how much the two copies along a widened axis differ, relative to the parameter."""
    pairs = dict(embed=("embed", 1, 32), gate=("gate", 2, 48), o=("o", 4, 32), q=("q", 2, 2), k=("k", 2, 2))
    out = {}
    for key, (name, axis, old) in pairs.items():
        x = np.moveaxis(np.asarray(params[name]), axis, 0)
        out[key] = float(np.abs(x[:old] - x[old:]).max() / np.abs(x).max())
    return out


def test_even_copies_stay_equal_and_uneven_ones_separate(tiny, double):
    before = wider("float64", tiny, True)
    arguments = dict(embed=64, kv_heads=4, mlp=96)
    even, uneven = (widen(before, context(), split=split, **arguments) for split in ("even", "uneven"))
    assert max(copies_apart(even.model.params).values()) == 0
    assert max(copies_apart(trained(even)).values()) < 1e-9
    apart_now = copies_apart(uneven.model.params)
    assert apart_now["embed"] == apart_now["o"] == 0
    assert min(copies_apart(trained(uneven)).values()) > 1e-3


def test_what_a_corner_adds_is_reached_by_gradients(tiny):
    edited = widen(wider("float32", tiny, True), context(), new="zero", **TWICE)
    grads = gradient(edited.model.params, edited.model.config)
    assert all(np.abs(grads["embed"][:, i]).max() > 0 for i in range(32, 64))
    assert np.all(np.abs(grads["down"][:, 48:, :32]).max((0, 2)) > 0)
    assert np.all(np.abs(grads["o"][:, 2:, :, :, :32]).max((0, 2, 3, 4)) > 0)


@pytest.mark.parametrize("arguments,message", [
    (dict(mlp=47), "mlp is 47, but the model has 48"), (dict(new="old"), "new is 'old'"),
    (dict(mlp=96, split="uneven", moments="map"), "moments is"),
    (dict(mlp=96, new="next", moments="map"), "moments is")], ids=str)
def test_widen_refuses(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        widen(wider("float32", tiny, True), context(), **arguments)


def test_widen_is_the_same_on_eight_devices(tiny):
    """And on shapes alone, as a run works them out, and in turn with growth in depth."""
    edits = [partial(widen, embed=64, kv_heads=4, mlp=96, units="random", split="uneven"), stack]
    meshes = [make_mesh(MeshConfig(), jax.devices()[:1]),
              make_mesh(MeshConfig(fsdp=2, tensor=2))]
    states = [train.apply_edits(edits, first_state(tiny, adamw, mesh, jax.random.key(0)), tiny,
                                adamw, mesh, context()) for mesh in meshes]
    (one, config, _), (eight, *_) = states
    assert (config.layers, config.embed, config.heads, config.kv_heads, config.mlp) == (4, 64, 8, 4, 96)
    for name in one.params:
        np.testing.assert_allclose(one.params[name], eight.params[name], rtol=1e-6, atol=0)
    phase = train.Phase(edits=tuple(edits))
    assert models_of(train.Config(model=tiny, phases=(phase,)), context()) == [config]
