"""configs/continual/ewc.py and agem.py: penalties by their formulas, projections, and an old model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import rows

import model
from configs.continual import agem, ewc
from lib.optim import adamw
from lib.teacher import adopt_self
from model import Context, Model

pytestmark = pytest.mark.library
RNG = np.random.default_rng(0)
RATE = 0.1


def stream(strength: float, by: str, steps: int = 8, ends=(3, 6), last: int = 2):
    """(gradients, parameters before each step and after the last, state) of descent on given gradients."""
    grads = RNG.normal(size=(steps, 5)).astype(np.float32)
    one = ewc.anchored(optax.identity(), strength, list(ends), by, last)
    x = {"w": jnp.asarray(RNG.normal(size=5), jnp.float32)}
    state, found = one.init({"w": jnp.zeros(5)}), [x]  # made of other parameters
    for g in grads:
        directions, state = one.update({"w": jnp.asarray(g)}, state, x, rate=RATE)
        x = {"w": x["w"] - RATE * directions["w"]}
        found.append(x)
    return grads, [np.asarray(x["w"]) for x in found], state


def test_ewc_pulls_by_the_mean_square_of_the_last_gradients_of_each_task():
    grads, x, state = stream(0.7, "fisher")
    squares = {3: np.square(grads[1:3]).mean(0), 6: np.square(grads[4:6]).mean(0)}
    weight, anchor = np.zeros(5), x[0]
    for i, g in enumerate(grads):
        pulled = g + 0.7 * weight * (x[i] - anchor)
        np.testing.assert_allclose(x[i + 1], x[i] - RATE * pulled, atol=1e-5, err_msg=str(i))
        if i + 1 in squares:
            weight, anchor = weight + squares[i + 1], x[i + 1]
    np.testing.assert_allclose(state.weight["w"], weight, rtol=1e-4)


def test_si_weighs_what_the_path_took_off_the_loss():
    """Without a pull, the path's sum of rate x g x g is what a linear loss loses by it."""
    grads, x, state = stream(0.0, "path", steps=3)
    took = (RATE * np.square(grads)).sum(0)
    np.testing.assert_allclose(state.weight["w"], took / (np.square(x[3] - x[0]) + 1e-3), rtol=1e-4)
    np.testing.assert_array_equal(state.anchor["w"], x[3])
    np.testing.assert_array_equal(state.gathered["w"], 0)


@pytest.mark.parametrize("by", ["fisher", "path"])
def test_no_strength_is_adamw(tiny, by):
    params = model.init(tiny, jax.random.key(0))
    pulled = ewc.regularised(model.table(tiny), strength=0.0, ends=[1], by=by, last=1)
    for group, plain in adamw(model.table(tiny)).items():
        own = {name: params[name] for name in model.groups(tiny)[group]}
        one, other = plain.init(own), pulled[group].init(own)
        for _ in range(3):
            grads = {name: jnp.asarray(RNG.normal(size=x.shape), x.dtype) for name, x in own.items()}
            before, one = plain.update(grads, one, own)
            after, other = pulled[group].update(grads, other, own, rate=RATE)
            for name, x in before.items():
                np.testing.assert_array_equal(x, after[name])


def test_a_gem_never_goes_against_old_rows():
    """Two rows with one gradient each; the sum is that of the newest one's row alone."""
    batch = dict(source=jnp.array([[0], [2]]), weights=jnp.ones((2, 1)))
    for _ in range(20):
        each = jnp.asarray(RNG.normal(size=(2, 7)), jnp.float32)

        def gradient(params, part, each=each):
            return jnp.sum(part["weights"]), {"w": jnp.sum(part["weights"] * each, 0)}

        sums, found = agem.averaged_gem(gradient, None, batch, 0)
        old, new = map(np.asarray, each)
        assert sums == 1 and found["w"] @ old >= -1e-5
        if new @ old >= 0:
            np.testing.assert_allclose(found["w"], new, atol=1e-6)
        else:  # the nearest one that is not against it
            np.testing.assert_allclose(found["w"] @ old, 0, atol=1e-5)
            taken = new - found["w"]  # lies along the old one
            np.testing.assert_allclose(taken, (taken @ old) / (old @ old) * old, atol=1e-5)
    alone = dict(source=jnp.zeros((2, 1)), weights=jnp.ones((2, 1)))
    np.testing.assert_allclose(agem.averaged_gem(gradient, None, alone, 0)[1]["w"], each.sum(0), atol=1e-6)


def test_lwf_begins_as_the_plain_loss(tiny):
    """The divergence from a copy of the model is 0, and so is its gradient."""
    plain = Model(tiny, model.init(tiny, jax.random.key(0)))
    taught = adopt_self(plain, Context(jax.random.key(0), 0, None, None, None)).model
    batch = rows()
    states, given = model.forward(taught.params, batch, model.CAUSAL, taught.config)
    extras = dict(params=taught.params, config=taught.config, step=0) | given
    logits = model.head_logits(taught.params, states, batch, taught.config)
    both = jax.value_and_grad(lambda x: jnp.sum(ewc.without_forgetting(x, batch, extras)))(logits)
    alone = jax.value_and_grad(lambda x: jnp.sum(model.cross_entropy(x, batch, extras)))(logits)
    for one, other in zip(both, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_course_is_read_off_the_ends_of_its_phases():
    rows = [{"phase": 0, "eval/a/loss": 2.0, "eval/b/loss": 9.0}, {"phase": 0, "train/loss": 1.0},
            {"phase": 0, "eval/a/loss": 1.0, "eval/b/loss": 8.0},
            {"phase": 1, "eval/a/loss": 1.5, "eval/b/loss": 4.0}, {"phase": 1, "eval/a.test/loss": 3.0}]
    assert agem.course(rows, ["a", "b"], "learnt") == 2.5
    assert agem.course(rows, ["a", "b"], "forgotten") == 0.5


def test_a_stream_ends_its_tasks_where_its_phases_end():
    steps = np.cumsum([phase.steps for phase in agem.naive.phases]).tolist()
    assert steps == agem.ENDS
    for name in ("ewc", "si"):
        assert ewc.study.arms[name].optimizer.keywords["ends"] == steps
    shares = [phase.mixture for phase in agem.study.arms["replay"].phases]
    assert [sum(mixture.values()) for mixture in shares] == pytest.approx([1.0] * 4)
    assert shares[2] == {"old": 0.125, "asyncio": 0.125, "email": 0.75}
