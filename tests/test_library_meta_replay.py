"""configs/continual/meta_replay.py: a Reptile step by its formula, and none at all where beta is 1."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows

import model
from configs.continual.meta_replay import reptile
from lib.kernels import Mask
from lib.optim import State, adamw, init_opt_state
from train import Config, make_step

pytestmark = pytest.mark.library
CAUSAL = Mask("causal", 0)


def trajectory(tiny, optimizer, steps: int = 7, rate: float = 3e-3) -> list[dict]:
    """The parameters after 0, 1, ... steps."""
    params = model.init(tiny, jax.random.key(0))
    opt = init_opt_state(params, tiny, optimizer)
    state = State(params, opt, step=jnp.int32(0), skipped=jnp.int32(0))
    step = jax.jit(make_step(Config(model=tiny, optimizer=optimizer), tiny), static_argnames="mask")
    lr = {group: np.float32(rate * (1 + i)) for i, group in enumerate(model.groups(tiny))}
    found = [params]
    for i in range(steps):
        state, _ = step(state, rows(i), lr, mask=CAUSAL)
        found.append(state.params)
    return found


@pytest.fixture(scope="module")
def plain(tiny):
    return trajectory(tiny, adamw)


@pytest.fixture
def optimised():
    """Programs compiled as a user's are; those of the tests are compiled in a hurry."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def test_with_beta_1_it_is_plain_training_bit_for_bit(tiny, optimised):
    """Where AdamW's factors by inputs are powers of two, so that no order of products rounds."""
    tiny = replace(tiny, mlp=64)
    plain, meta = (trajectory(tiny, one) for one in (adamw, partial(reptile, beta=1.0, every=3)))
    for before, after in zip(plain, meta, strict=True):
        for name, x in before.items():
            assert np.asarray(x).tobytes() == np.asarray(after[name]).tobytes(), name


def test_with_beta_0_every_third_update_goes_all_the_way_back(tiny):
    found = trajectory(tiny, partial(reptile, beta=0.0, every=3))
    for step in (3, 6):
        for name, x in found[0].items():
            np.testing.assert_allclose(found[step][name], x, atol=1e-6, err_msg=name)
    assert not np.allclose(found[5]["q"], found[0]["q"], atol=1e-4)


def test_a_step_back_is_the_interpolation(tiny, plain):
    """theta <- theta' + beta (theta - theta'), theta being where plain training is by then."""
    found = trajectory(tiny, partial(reptile, beta=0.25, every=3))
    for name, begin in plain[0].items():
        np.testing.assert_allclose(found[2][name], plain[2][name], atol=1e-5)
        expected = begin + 0.25 * (plain[3][name] - begin)
        np.testing.assert_allclose(found[3][name], expected, atol=1e-5, err_msg=name)


def test_a_rate_of_0_moves_nothing(tiny):
    found = trajectory(tiny, partial(reptile, beta=0.5, every=2), rate=0.0)
    for name, x in found[0].items():
        np.testing.assert_allclose(found[-1][name], x, atol=1e-7, err_msg=name)


def test_the_arms_are_pairs_that_the_step_back_tells_apart():
    from configs.continual.meta_replay import study
    for name in ("none", "replay_10", "replay_25"):
        one, other = study.arms[name], study.arms[f"{name}_mer"]
        assert replace(other, optimizer=adamw) == one and other != one
