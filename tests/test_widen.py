"""lib/widen.py: the function, moments and copies after growth in width."""
from functools import partial

import jax
import numpy as np
import pytest
from edit_cases import context, gradient, largest_change, random_model

import model
import train
from lib.edits import stack
from lib.optim import adamw, first_state, init_opt_state
from lib.schedule import models_of
from lib.sharding import MeshConfig, make_mesh
from lib.widen import widen

equal = np.testing.assert_array_equal
close = np.testing.assert_allclose


@pytest.fixture
def double():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


TWICE = dict(embed=64, kv_heads=4, q_per_kv=4, mlp=96)
THRICE = dict(embed=96, kv_heads=6, q_per_kv=6, mlp=144)
ODD = dict(embed=40, kv_heads=3, q_per_kv=3, mlp=50)
WIDENINGS = {
    "twice": TWICE,
    "thrice": THRICE,
    "embed": dict(embed=64),
    "kv_heads": dict(kv_heads=4),
    "q_per_kv": dict(q_per_kv=4),
    "mlp": dict(mlp=96),
    "odd": ODD,
    "nothing": {},
    "random": ODD | dict(units="random"),
    "uneven": THRICE | dict(split="uneven"),
    "random uneven": ODD | dict(units="random", split="uneven"),
    "zero": TWICE | dict(new="zero"),
    "zero odd": ODD | dict(new="zero"),
    "next": TWICE | dict(new="next"),
}


@pytest.mark.parametrize("case,tied", [
    ("twice", True),
    ("thrice", False),
    ("embed", True),
    ("kv_heads", False),
    ("q_per_kv", True),
    ("mlp", False),
    ("odd", True),
    ("nothing", False),
    ("random", True),
    ("uneven", False),
    ("random uneven", True),
    ("zero", False),
    ("zero odd", True),
    ("next", False),
    ("twice", False),
    ("random uneven", False),
])
def test_widen_says_truly_whether_it_preserves_the_function(tiny, double, tied, case):
    before = random_model(tiny, tied, "float64")
    edited = widen(before, context(), **WIDENINGS[case])

    assert edited.preserves == (case != "next")
    change = largest_change(edited, before)
    if edited.preserves:
        assert change <= 1e-10
    else:
        assert change > 1e-2


@pytest.mark.parametrize("case,tied", [("twice", False), ("thrice", True), ("zero", True)])
def test_widen_preserves_the_function_in_float32(tiny, case, tied):
    before = random_model(tiny, tied)
    edited = widen(before, context(), **WIDENINGS[case])
    assert largest_change(edited, before) <= 1e-5


def test_widen_takes_advanced_knowledge_from_the_layer_above(tiny):
    before = random_model(tiny, tied=False)
    sizes = dict(embed=64, mlp=96, kv_heads=4)
    copied = widen(before, context(), new="copy", **sizes).model.params
    advanced = widen(before, context(), new="next", **sizes).model.params

    for name, axis in dict(gate=2, down=2, q=2, o=4).items():
        old = before.params[name].shape[axis]
        copies = np.moveaxis(np.asarray(copied[name]), axis, 1)
        from_above = np.moveaxis(np.asarray(advanced[name]), axis, 1)
        equal(from_above[:, :old], copies[:, :old])
        equal(from_above[0, old:], copies[1, old:])
        equal(from_above[1], copies[1])
    for name in ("embed", "attn_norm", "mlp_norm", "norm", "head"):
        equal(copied[name], advanced[name])


@pytest.mark.parametrize("tied,arguments", [
    (True, TWICE),
    (False, ODD | dict(units="random")),
    (True, TWICE | dict(new="zero")),
], ids=str)
def test_moments_are_mapped_as_gradients_are(tiny, double, tied, arguments):
    before = random_model(tiny, tied, "float64")
    edited = widen(before, context(), moments="map", **arguments)
    old = gradient(before.params, before.config)
    new = gradient(edited.model.params, edited.model.config)

    def mapped_moment(group, power, moment):
        tree = {name: old[name]**power for name in model.groups(before.config)[group]}
        return edited.policy[group](tree, moment)

    for group in model.groups(before.config):
        first = mapped_moment(group, 1, "mu")
        second = mapped_moment(group, 2, "nu")
        assert set(first) == set(second) == set(model.groups(before.config)[group])
        for mapped, power in ((first, 1), (second, 2)):
            for name, moment in mapped.items():
                there = np.ones(moment.shape, bool)
                if arguments.get("new") == "zero":
                    there = np.asarray(moment) != 0  # moments of what is new begin at 0
                expected = new[name]**power
                close(moment[there], expected[there], rtol=1e-7, atol=1e-13)


def trained(edited, steps=3) -> dict[str, jax.Array]:
    """The edited parameters after some steps of AdamW on one batch."""
    config, params = edited.model
    transforms = adamw(model.table(config))
    opt = init_opt_state(params, config, adamw)
    for _ in range(steps):
        gradients = gradient(params, config)
        for group, names in model.groups(config).items():
            of_group = {name: params[name] for name in names}
            slope = {name: gradients[name] for name in names}
            updates, opt[group] = transforms[group].update(slope, opt[group], of_group)
            params = params | {name: params[name] - 1e-2 * updates[name] for name in names}
    return params


COPIED = {  # name of a parameter: (axis that is widened, its old size)
    "embed": (1, 32),
    "gate": (2, 48),
    "o": (4, 32),
    "q": (2, 2),
    "k": (2, 2),
}


def differences_of_copies(params) -> dict[str, float]:
    """By how much the two copies along a widened axis differ, relative to the parameter."""
    differences = {}
    for name, (axis, old) in COPIED.items():
        x = np.moveaxis(np.asarray(params[name]), axis, 0)
        difference = np.abs(x[:old] - x[old:]).max()
        differences[name] = float(difference / np.abs(x).max())
    return differences


def test_even_copies_stay_equal(tiny, double):
    before = random_model(tiny, True, "float64")
    edited = widen(before, context(), split="even", embed=64, kv_heads=4, mlp=96)

    at_first = differences_of_copies(edited.model.params)
    later = differences_of_copies(trained(edited))
    assert max(at_first.values()) == 0
    assert max(later.values()) < 1e-9


def test_uneven_copies_separate(tiny, double):
    before = random_model(tiny, True, "float64")
    edited = widen(before, context(), split="uneven", embed=64, kv_heads=4, mlp=96)

    at_first = differences_of_copies(edited.model.params)
    later = differences_of_copies(trained(edited))
    assert at_first["embed"] == 0
    assert at_first["o"] == 0
    assert min(later.values()) > 1e-3


def test_gradients_reach_everything_that_is_new_around_a_corner(tiny):
    before = random_model(tiny, tied=True)
    edited = widen(before, context(), new="zero", **TWICE)
    gradients = gradient(edited.model.params, edited.model.config)

    new_columns = np.abs(gradients["embed"][:, 32:])
    new_units = np.abs(gradients["down"][:, 48:, :32])
    new_heads = np.abs(gradients["o"][:, 2:, :, :, :32])
    assert new_columns.shape[1] == 32
    assert np.all(new_columns.max(0) > 0)
    assert np.all(new_units.max((0, 2)) > 0)
    assert np.all(new_heads.max((0, 2, 3, 4)) > 0)


@pytest.mark.parametrize("arguments,message", [
    (dict(mlp=47), "mlp is 47, but the model has 48"),
    (dict(new="old"), "new is 'old'"),
    (dict(mlp=96, split="uneven", moments="map"), "moments is"),
    (dict(mlp=96, new="next", moments="map"), "moments is"),
], ids=str)
def test_widen_refuses(tiny, arguments, message):
    before = random_model(tiny, tied=True)
    with pytest.raises(ValueError, match=message):
        widen(before, context(), **arguments)


WIDER_AND_DEEPER = (
    partial(widen, embed=64, kv_heads=4, mlp=96, units="random", split="uneven"),
    stack,
)


def test_growth_in_width_and_depth_is_the_same_on_eight_devices_and_on_shapes_alone(tiny):
    def grown(mesh):
        state = first_state(tiny, adamw, mesh, jax.random.key(0))
        return train.apply_edits(WIDER_AND_DEEPER, state, tiny, adamw, mesh, context())

    one, config = grown(make_mesh(MeshConfig(), jax.devices()[:1]))
    eight, _ = grown(make_mesh(MeshConfig(fsdp=2, tensor=2)))

    assert config.layers == 4
    assert (config.embed, config.mlp) == (64, 96)
    assert (config.heads, config.kv_heads) == (8, 4)
    for name in one.params:
        close(one.params[name], eight.params[name], rtol=1e-6, atol=0)
    phase = train.Phase(edits=WIDER_AND_DEEPER)
    run = train.Config(model=tiny, phases=(phase,))
    assert models_of(run, context()) == [config]
