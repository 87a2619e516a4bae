"""One step: clipping, AdamW, what is frozen or not finite; its state after edits, and on a mesh."""
import functools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_cases import (
    CAUSAL,
    TINY,
    after_edits,
    counts,
    first_state,
    plain_descent,
    plan_of,
    random_batch,
    same_bits,
    single_mesh,
    stepper,
    tiny_config,
    unchanged,
    undefined,
)

import model
import train
from configs.base import loud
from lib.edits import reset_embeddings, stack
from lib.optim import State, adamw
from lib.schedule import Schedule
from lib.sharding import MeshConfig, make_mesh, put, shardings
from model import ModelConfig
from train import Config, Phase

GROUPS = model.groups(TINY)
equal = np.testing.assert_array_equal
LOUD = replace(TINY, rows=loud)  # blocks are heard from the first step on


def only(tree: dict, names) -> dict:
    """Some of the entries of a dictionary."""
    return {name: tree[name] for name in names}


# ----------------------------------------------------------------------------------- frozen groups


def test_a_group_of_factor_zero_stays_bit_for_bit_and_the_others_move():
    """Neither gradient nor weight decay moves it; another group moves at its own factor."""
    phase = Phase(steps=4, batch=8, seq=16, lr={"matrix": 0.0, "vector": 0.5})
    schedule = Schedule(shape="constant", peak=1e-2, warmup=0)
    config = tiny_config(model=LOUD, phases=(phase,), schedule=schedule)
    lr = plan_of(config).lr
    assert lr["vector"][1] == 0.5 * lr["embed"][1]
    assert lr["vector"][1] > 0

    first = first_state(config)
    take = stepper(config)
    state = first
    for s in range(1, 4):
        rates = {group: lr[group][s] for group in lr}
        state, _ = take(state, random_batch(s), rates)
    assert unchanged(first.params, state.params) == {*GROUPS["matrix"]}


def test_a_group_is_frozen_where_its_rate_is_zero_through_the_phase():
    phase = Phase(steps=4, batch=8, seq=16, lr={"matrix": 0.0})
    frozen = plan_of(tiny_config(phases=(phase,))).frozen(0)
    assert frozen == {"matrix"}
    assert not plan_of(tiny_config()).frozen(0)


def test_a_frozen_group_has_no_part_in_the_step():
    """Its moments and count stay, and the norm is that of the others."""
    config = tiny_config()
    first = first_state(config)
    batch = random_batch()
    state, metrics = stepper(config, frozen=frozenset({"matrix"}))(first, batch, 1e-2)
    _, whole = stepper(config)(first, batch, 1e-2)

    assert same_bits(state.opt["matrix"], first.opt["matrix"])
    assert counts(state.opt["embed"]) == {1}
    others = [float(whole[f"{group}/grad_norm"]) for group in GROUPS if group != "matrix"]
    norm = float(metrics["train/grad_norm"])
    assert norm == pytest.approx(math.hypot(*others), rel=1e-5)
    assert norm < float(whole["train/grad_norm"])
    assert "matrix/grad_norm" not in metrics


# ------------------------------------------------------------------------------------ a plain step


DESCENT = tiny_config(model=LOUD, optimizer=plain_descent, clip=0.0)


@functools.cache
def descended() -> tuple[State, State, dict]:
    """(state before, state after, metrics) of a step whose direction is the gradient itself."""
    before = first_state(DESCENT)
    after, metrics = stepper(DESCENT)(before, random_batch(), 0.1)
    return before, after, metrics


def test_the_norm_is_that_of_all_groups_together():
    _, _, metrics = descended()
    names = {name for name in metrics if name.endswith("/grad_norm")} - {"train/grad_norm"}
    assert names == {f"{group}/grad_norm" for group in GROUPS}
    norms = [float(metrics[name]) for name in names]
    assert float(metrics["train/grad_norm"]) == pytest.approx(math.hypot(*norms), rel=1e-5)


def test_a_clipped_update_is_the_free_one_times_clip_over_norm():
    """A bound above the norm changes nothing."""
    before, free, metrics = descended()
    norm = float(metrics["train/grad_norm"])
    assert norm > 0.5
    for clip in (0.25, 2 * norm):
        clipped, _ = stepper(replace(DESCENT, clip=clip))(before, random_batch(), 0.1)
        scale = min(1.0, clip / norm)
        for name, x in before.params.items():
            moved = clipped.params[name] - x
            expected = (free.params[name] - x) * scale
            np.testing.assert_allclose(moved, expected, atol=3e-7)


RATES = [1e-2, 2e-2, 5e-3, 1e-3]


def optax_adamw(group: str) -> optax.GradientTransformation:
    """optax's own AdamW of a group, which decays the matrices alone."""
    decay = 0.2 if group == "matrix" else 0.0

    def rate(count):
        return jnp.array(RATES)[count]

    return optax.adamw(rate, 0.9, 0.98, 1e-8, weight_decay=decay)


@jax.jit
def gradient(params: dict, batch: dict) -> dict:
    """That of the mean loss of the tiny model."""

    def loss(params):
        return jnp.mean(model.losses(params, batch, CAUSAL, TINY))

    return jax.grad(loss)(params)


def stepped_by_optax(params: dict) -> dict:
    """Parameters after one step at each of the rates."""
    theirs = {group: optax_adamw(group) for group in GROUPS}
    opt = {}
    for group, names in GROUPS.items():
        opt[group] = theirs[group].init(only(params, names))
    for s in range(len(RATES)):
        grads = gradient(params, random_batch(s))
        for group, names in GROUPS.items():
            own = only(params, names)
            own_grads = only(grads, names)
            updates, opt[group] = theirs[group].update(own_grads, opt[group], own)
            params = params | optax.apply_updates(own, updates)
    return params


def test_adamw_is_that_of_optax():
    """At changing rates: the matrices as optax.adamw moves them, the others without decay."""
    plain = partial(adamw, b2=0.98, weight_decay=0.2, base_width=0)  # one rate for all
    config = tiny_config(model=LOUD, clip=0.0, optimizer=plain)
    take = stepper(config)
    state = first_state(config)
    expected = stepped_by_optax(dict(state.params))
    for s, rate in enumerate(RATES):
        state, _ = take(state, random_batch(s), rate)
    assert state.params.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_allclose(state.params[name], x, atol=2e-5, rtol=1e-5, err_msg=name)


# ------------------------------------------------------------------- updates that are not finite


def undefined_loss() -> tuple[Config, dict]:
    """A loss that is undefined at the steps 2 and 3, and a batch."""
    config = tiny_config(token_loss=partial(undefined, first=2, last=3))
    return config, random_batch(1)


def infinite_weight() -> tuple[Config, dict]:
    """The plain loss, and a batch in which a weight is infinite."""
    batch = random_batch(1)
    batch["weights"][3, 5] = np.inf
    return tiny_config(), batch


@pytest.mark.parametrize("case", [undefined_loss, infinite_weight])
def test_an_update_that_is_not_finite_is_left_out(case):
    """All stays bit for bit but the step, and the count rises until a good one."""
    config, bad = case()
    take = stepper(config)
    good, _ = take(first_state(config), random_batch(), 1e-2)
    first, metrics = take(good, bad, 1e-2)
    assert not math.isfinite(metrics["train/loss"])
    assert int(metrics["skipped"]) == 1

    second, _ = take(first, bad, 1e-2)
    assert same_bits((good.params, good.opt), (second.params, second.opt))
    third, metrics = take(second, random_batch(2), 1e-2)
    assert math.isfinite(metrics["train/loss"])
    assert not same_bits(second.params["q"], third.params["q"])
    assert counts(third.opt) == {2}
    states = good, first, second, third
    assert [int(state.step) for state in states] == [1, 2, 3, 4]
    assert [int(state.skipped) for state in states] == [0, 1, 2, 0]


# ---------------------------------------------------------------- the optimiser's state after edits


def taken(config: Config, steps: int) -> State:
    """The state after some steps on random rows."""
    state = first_state(config)
    take = stepper(config, config.model)
    for s in range(steps):
        state, _ = take(state, random_batch(s), 1e-2)
    return state


DRAWN_ANEW = [
    (True, {"embed"}),
    (False, {"embed", "head"}),
]


@pytest.mark.parametrize("tied, drawn", DRAWN_ANEW)
def test_a_reset_of_the_embeddings_leaves_the_body_alone(tied, drawn):
    """Embeddings and a head are drawn anew, their optimiser counts from 0; the rest is bit-equal."""
    config = tiny_config(model=replace(TINY, tied=tied))
    before = taken(config, 3)
    after, shape = after_edits([reset_embeddings], before, config, seed=5)

    assert shape == config.model
    assert unchanged(before.params, after.params) == before.params.keys() - drawn
    assert unchanged(before.opt, after.opt) == before.opt.keys() - drawn
    assert int(after.step) == 3
    steps = {group: counts(opt) for group, opt in after.opt.items()}
    groups = model.groups(config.model)
    assert steps == dict.fromkeys(groups, {3}) | dict.fromkeys(drawn, {0})

    onward, _ = stepper(config, config.model)(after, random_batch(9), 1e-2)
    assert counts(onward.opt["embed"]) == {1}
    assert counts(onward.opt["matrix"]) == {4}
    assert counts(onward.opt["vector"]) == {4}


def blocks_twice(arrays: dict) -> dict[str, np.ndarray]:
    """Parameters or moments of the tiny model, the blocks two times in order."""
    rows = model.table(TINY)
    found = {}
    for name, x in arrays.items():
        times = 2 if rows[name].axes[0] == "layers" else 1
        found[name] = np.concatenate([np.asarray(x)] * times)
    return found


def first_moments(state: State) -> dict[str, jax.Array]:
    """AdamW's first moment of each parameter."""
    found = {}
    for opt in state.opt.values():
        found |= optax.tree.get(opt, "mu")
    return found


@functools.cache
def before_and_after_a_stack(moments: str) -> tuple[State, State]:
    """The state after two steps, and that after a stack as well."""
    config = tiny_config()
    before = taken(config, 2)
    edits = [partial(stack, moments=moments)]
    after, shape = after_edits(edits, before, config)
    assert shape == replace(TINY, layers=4)
    return before, after


def check_equal(found: dict, expected: dict):
    """Arrays are equal, under the same names."""
    assert found.keys() == expected.keys()
    for name in expected:
        equal(found[name], expected[name], err_msg=name)


@pytest.mark.parametrize("moments", ["map", "reset"])
def test_a_stack_has_the_blocks_twice_in_order(moments):
    before, after = before_and_after_a_stack(moments)
    check_equal(after.params, blocks_twice(before.params))


def test_a_stack_may_have_the_moments_twice_too_and_keep_the_counts():
    before, after = before_and_after_a_stack("map")
    moments = first_moments(before)
    assert np.any(moments["q"])
    check_equal(first_moments(after), blocks_twice(moments))
    assert {group: counts(opt) for group, opt in after.opt.items()} == dict.fromkeys(GROUPS, {2})


def test_a_stack_may_start_the_optimiser_afresh():
    before, after = before_and_after_a_stack("reset")
    moments = first_moments(before)
    assert np.any(moments["q"])
    zeros = {name: np.zeros_like(x) for name, x in blocks_twice(moments).items()}
    check_equal(first_moments(after), zeros)
    assert {group: counts(opt) for group, opt in after.opt.items()} == dict.fromkeys(GROUPS, {0})


# ------------------------------------------------------------------------------------------ devices


MESHES = {
    "data 8": MeshConfig(),
    "data 2 fsdp 2 tensor 2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def losses_of(state: State, shape: ModelConfig, mesh, steps: int) -> tuple[State, list[float]]:
    """(state, losses) of steps on the same rows on a mesh, by an executable as a run has."""
    arrays = put(random_batch(), mesh)
    rates = dict.fromkeys(model.groups(shape), np.float32(1e-2))
    step = train.compile_step(tiny_config(), shape, mesh, state, arrays, rates, CAUSAL)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, arrays, rates)
        losses.append(float(metrics["train/loss"]))
    return state, losses


def trajectory(mesh) -> np.ndarray:
    """Losses of five steps on a mesh, with a stack after the third."""
    config = tiny_config(model=replace(TINY, layers=1))
    state = first_state(config, mesh)
    state, shallow = losses_of(state, config.model, mesh, steps=3)
    edits = [partial(stack, moments="map")]
    state, shape = after_edits(edits, state, config, mesh)
    _, deep = losses_of(state, shape, mesh, steps=2)
    return np.array(shallow + deep)


@functools.cache
def losses_on_one() -> np.ndarray:
    """The trajectory on one device."""
    return trajectory(single_mesh())


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_losses_of_one(mesh):
    """To 1e-4 in float32, through a stack, with parameters and batch spread in two ways."""
    assert jax.device_count() == 8
    alone = losses_on_one()
    np.testing.assert_allclose(trajectory(make_mesh(MESHES[mesh])), alone, rtol=1e-4)
    assert alone[-1] < alone[0] - 0.02


@pytest.mark.parametrize("mesh", MESHES)
def test_what_is_drawn_does_not_depend_on_the_devices(mesh):
    """First parameters, and embeddings drawn anew, are bit-equal on one device and on eight."""
    config = tiny_config()
    many = make_mesh(MESHES[mesh])
    one = first_state(config)
    eight = first_state(config, many)
    assert same_bits(one.params, eight.params)
    assert len(eight.params["q"].sharding.device_set) == 8

    edits = [reset_embeddings]
    anew, _ = after_edits(edits, one, config, seed=3)
    anew_on_eight, _ = after_edits(edits, eight, config, many, seed=3)
    assert same_bits(anew.params, anew_on_eight.params)
    assert not same_bits(anew.params["embed"], one.params["embed"])
    expected = shardings(model.table(TINY), many)["embed"]
    assert anew_on_eight.params["embed"].sharding == expected
