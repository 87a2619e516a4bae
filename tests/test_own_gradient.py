"""Gradients of each device's own rows: those of one device, added up as often as must be."""
from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest
import train_cases

import model
import train
from lib.optim import init_opt_state, places, state_like
from lib.sharding import MeshConfig, make_mesh, put
from tools import fit

SHAPE = replace(train_cases.TINY, dtype="float64", param_dtype="float64", vocab=64, unroll=1,
                logits_mib=1)
CAUSAL = train_cases.CAUSAL


def by_another_name(logits, batch, extras):
    """The plain loss, which is not known to add up over rows."""
    return model.cross_entropy(logits, batch, extras)


@cache
def step_on(sizes: tuple[int, int, int], accumulate: int, tied: bool, **changes):
    """(the step's program, state and metrics after it) on a mesh of as many devices."""
    shape = replace(SHAPE, tied=tied)
    config = train_cases.tiny_config(model=shape, **changes)
    phase = replace(config.phases[0], accumulate=accumulate)
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[:int(np.prod(sizes))])
    params = jax.jit(partial(model.init, shape))(jax.random.key(0))
    like = state_like(shape, config.optimizer, mesh)
    zero = np.int32(0)
    state = train.State(params, init_opt_state(params, shape, config.optimizer), zero, zero)
    state = jax.device_put(state, places(like))
    arrays = train_cases.random_batch()
    arrays = {name: x % 64 if "t" == name[0] else x for name, x in arrays.items()}
    arrays["weights"][1] = 0  # so devices have unlike sums
    batch = put(arrays, mesh)
    lr = {group: np.float32(1e-2) for group in model.groups(shape)}
    step = train.compile_step(config, shape, mesh, state, batch, lr, CAUSAL, phase)
    return step.as_text(), *jax.device_get(step(state, batch, lr))


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("sizes, accumulate, tied", [
    ((4, 1, 1), 2, True),
    ((1, 4, 1), 2, False),
    ((2, 2, 1), 1, True),
    ((2, 1, 2), 2, True),
])
def test_a_step_on_several_devices_is_that_of_one(sizes, accumulate, tied):
    _, one, metrics = step_on((1, 1, 1), 1, tied)
    _, several, others = step_on(sizes, accumulate, tied)
    close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(others["train/loss"], metrics["train/loss"])
    close(others["train/grad_norm"], metrics["train/grad_norm"])
    jax.tree.map(close, several.params, one.params)


def sent(sizes, tied: bool, **changes) -> dict[str, list[int]]:
    """How often, and how many bytes, a device sends by each collective; a batch is two parts."""
    program, *_ = step_on(sizes, 2, tied, **changes)
    return fit.collectives(program, int(np.prod(sizes)))


def size(tied: bool) -> int:
    """Bytes of the parameters."""
    return 8 * model.count(replace(SHAPE, tied=tied))


def test_with_data_parallelism_gradients_are_added_up_once_however_many_parts_there_are():
    """A ring sends 2 (k - 1) / k of them, a tied table's once; and a few scalars."""
    found = sent((4, 1, 1), True)
    assert set(found) == {"all-reduce"}
    assert found["all-reduce"][1] == pytest.approx(2 * 3 / 4 * size(True), rel=0.01)


def test_with_fsdp_gradients_are_scattered():
    """Those of the blocks once for each part, the table's and the head's once a step."""
    found = sent((1, 4, 1), False)
    outside = 8 * (2 * 64 * 32 + 5 * 32)  # the table, the head, gains
    blocks = size(False) - outside
    scattered = 3 / 4 * (2 * blocks + outside)
    assert found["reduce-scatter"][1] == pytest.approx(scattered, rel=0.01)
    gathered = 3 / 4 * (2 * 2 * blocks + outside)
    assert found["all-gather"][1] == pytest.approx(gathered, rel=0.01)
    assert found["all-reduce"][1] < 0.01 * size(False)


def test_a_loss_of_its_own_is_added_up_as_before():
    """It may not be a sum over rows."""
    found = sent((4, 1, 1), True, token_loss=by_another_name)
    assert found["all-reduce"][1] > 1.5 * 2 * 3 / 4 * size(True)
