"""On a CPU a step is not dispatched while the one before it runs: each would have its own scratch."""
from concurrent.futures import Future
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import train
from lib.hardware import wait_on_cpu
from lib.timing import time_steps


class State(NamedTuple):
    """What a step here changes."""

    step: jax.Array


@jax.jit
def slow(x):
    """Some hundredths of a second."""
    return jax.lax.fori_loop(0, 200, lambda _, x: jnp.sin(x @ x), x)


@pytest.fixture
def x():
    return jnp.eye(256)


@pytest.fixture
def step(x):
    """A step of a `State`, which must be there when the next is dispatched; `step.ready`."""

    def step(state, batch, lr):
        step.ready.append(state[0].is_ready())
        made = slow(state[0])
        return State(made), {"train/loss": made[0, 0]}

    step.ready = []
    jax.block_until_ready(slow(x))  # compiled
    return step


def test_a_cpu_is_waited_for_and_no_other_device(x, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    wait_on_cpu(x)
    assert [id(one) for one in waited] == [id(x)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    wait_on_cpu(x)
    assert [id(one) for one in waited] == [id(x)]


def test_what_a_program_makes_is_all_there_at_once(x):
    several = jax.jit(lambda x: (slow(x), [x + 1, jnp.sin(x)], x[0, 0] > 0))
    made = several(x)
    made[2].block_until_ready()
    assert all(one.is_ready() for one in jax.tree.leaves(made))


def test_the_benchmark_waits_for_each_step(step, x):
    time_steps(step, State(x), [None], None, 0.0)
    assert len(step.ready) >= 8
    assert all(step.ready)


def test_the_benchmark_takes_batches_in_turn(x):
    taken = []

    def step(state, batch, lr):
        taken.append(batch)
        return state, {"train/loss": jnp.float32(2.0)}

    _, times = time_steps(step, State(x), ["a", "b", "c"], None, 0.0, warm_up=1)
    assert taken == ["a", *"abcabc"]
    assert (len(times.steps), times.loss) == (5, 2.0)


def test_the_loop_waits_for_each_step(step, x, monkeypatch):
    found = Future()
    found.set_result(step)
    monkeypatch.setattr(train, "compiled", lambda *_: found)
    plan = SimpleNamespace(phase_of=lambda step: 0, models=[None], edits={})
    run = SimpleNamespace(plan=plan, begun={0})
    state, batch = State(x), SimpleNamespace(arrays=None, mask=None, lr=None)
    for number in range(1, 5):
        state, _ = train.train_step(run, state, batch, number)
    assert len(step.ready) == 4
    assert all(step.ready)
