"""What the backward pass keeps, and that leaner gradients are those of the plain formulas."""
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

import model
import train
from lib import products
from lib.kernels import keeping_arguments, nll, weighted_nats
from model import ModelConfig

close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
CAUSAL = train_cases.CAUSAL

# ------------------------------------------------------------------------------- what is kept


@jax.custom_vjp
def flash(q, k, v):
    """A stand-in for a kernel that makes its scores anew: it keeps q, k, v, its output and sums."""
    return flash_forward(q, k, v)[0]


def flash_forward(q, k, v):
    out = q + k[:, :, :, None] + v[:, :, :, None]
    return out, (q, k, v, out, jnp.sum(out, -1, dtype=jnp.float32))


def flash_backward(kept, d_out):
    q, k, v, out, sums = kept
    one = jnp.sum(d_out, 3)
    return d_out * sums[..., None].astype(q.dtype), one * k, one * v + out[:, :, :, 0]


flash.defvjp(flash_forward, flash_backward)

SHAPE = ModelConfig(layers=3, embed=48, heads=6, kv_heads=6, head_dim=8, mlp=128, vocab=64,
                    dtype="bfloat16", unroll=1)


def widths_kept(config: ModelConfig) -> float:
    """Bytes that the blocks keep of a token and layer, in widths of the model in its dtype."""
    b, t = 2, 7
    batch = model.whole(np.zeros((b, t), np.int32))
    params = jax.eval_shape(partial(model.init, config), jax.random.key(0))
    x = jax.ShapeDtypeStruct((b, t, config.embed), config.dtype)

    def run(params, x):
        found, _ = model.stream(
            params, x, batch, CAUSAL, config, attend=lambda *qkv: (flash(*qkv), None))
        return found

    kept = jax.eval_shape(lambda *given: jax.vjp(run, *given)[1], params, x)
    tokens = [each for each in jax.tree.leaves(kept) if each.shape[:3] == (config.layers, b, t)]
    size = sum(each.size * each.dtype.itemsize for each in tokens)
    return size / (config.layers * b * t * config.embed * jnp.dtype(config.dtype).itemsize)


def test_the_backward_pass_keeps_what_products_and_kernels_read():
    """x and its norm twice, q, k, v and what is attended, gate, up and their product."""
    sums = 2 * SHAPE.heads / SHAPE.embed  # float32
    plain = 4 + 4 + 3 * SHAPE.mlp / SHAPE.embed + sums
    assert widths_kept(SHAPE) == pytest.approx(plain)


def test_autodiff_of_the_plain_formulas_would_keep_nearly_twice_that(monkeypatch):
    lean = widths_kept(SHAPE)
    monkeypatch.setattr(model, "rms_norm", model.rms_norm.__wrapped__)
    monkeypatch.setattr(model, "gated", model.gated.__wrapped__)
    assert widths_kept(SHAPE) > 1.5 * lean


# ------------------------------------------------------------------------------------ gradients


def test_a_function_that_keeps_its_arguments_has_the_gradient_of_the_plain_one():
    def plain(x, y, power):
        return jnp.sin(x) * y**power

    lean = keeping_arguments(plain, static=(2,))
    x, y = jax.random.normal(jax.random.key(0), (2, 5)) + 3
    for function in plain, lean:
        assert function(x, y, 2).shape == (5,)
    of_lean, of_plain = (jax.grad(lambda *xy, f=f: jnp.sum(f(*xy, 2)), (0, 1))(x, y)
                         for f in (lean, plain))
    jax.tree.map(close, of_lean, of_plain)


def example(dtype: str):
    """States [2 6 4], a head [4 9], targets and weights [2 6]; half of the weights are 0."""
    keys = jax.random.split(jax.random.key(1), 4)
    states = jax.random.normal(keys[0], (2, 6, 4)).astype(dtype)
    head = jax.random.normal(keys[1], (4, 9))
    targets = jax.random.randint(keys[2], (2, 6), 0, 9)
    weights = jax.random.randint(keys[3], (2, 6), 0, 2) * 0.75
    return states, head, targets, weights


def plain_nats(states, head, targets, weights):
    """`weighted_nats`, plainly."""
    logits = states.astype(jnp.float32) @ head
    log_probs = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    return -jnp.sum(own * weights)


@pytest.mark.parametrize("chunk", [6, 2])
def test_the_loss_with_its_gradients_is_that_of_a_plain_formula(chunk):
    given = example("float32")

    def both(function):
        total = jax.jit(jax.value_and_grad(lambda *x: 3 * function(*x), (0, 1, 3)))
        return total(*given)

    lean = both(lambda *x: weighted_nats(*x, chunk))
    jax.tree.map(partial(close, rtol=1e-5), lean, both(plain_nats))


def test_logits_of_sixteen_bits_are_summed_in_float32(monkeypatch):
    given = example("bfloat16")
    gradient = jax.value_and_grad(lambda *x: weighted_nats(*x, 6), (0, 1))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(products, "on_one_cpu", lambda: False)
        program = str(jax.make_jaxpr(gradient)(*given))
    gradient = jax.value_and_grad(lambda *x: weighted_nats(*x, 6), (0, 1))  # traced anew
    assert "bf16[12,9] = dot_general" in program
    assert "f32[12,9] = dot_general" not in program
    total, (d_states, d_head) = jax.jit(gradient)(*given)
    assert (total.dtype, d_states.dtype, d_head.dtype) == ("float32", "bfloat16", "float32")
    exact = plain_nats(*given)
    assert float(total) == pytest.approx(float(exact), rel=1e-2)


def test_nats_of_logits_of_sixteen_bits_are_float32():
    logits = jnp.zeros((1, 2, 4), jnp.bfloat16)
    nats, back = jax.vjp(lambda x: nll(x, jnp.zeros((1, 2), int)), logits)
    close(nats, math.log(4) * np.ones((1, 2)))
    assert (nats.dtype, back(nats)[0].dtype) == ("float32", "bfloat16")


WIDE = replace(train_cases.TINY, dtype="float64", param_dtype="float64", vocab=40, unroll=1)


def test_gradients_are_finite_differences_in_float64():
    """Of the loss of a step, along a random direction, with chunks, segments and padding."""
    with jax.enable_x64(True):
        batch = train_cases.random_batch()
        batch = {name: jnp.array(x)[:2] for name, x in batch.items()}
        batch["tokens"], batch["targets"] = batch["tokens"] % 40, batch["targets"] % 40
        params = jax.jit(partial(model.init, WIDE))(jax.random.key(0))
        loss = train.loss_of(train.Config(), WIDE, train.Phase())
        assert loss.is_plain
        total = jax.jit(lambda p: loss.sums(p, {}, batch, 0, CAUSAL)[0])
        gradient = jax.jit(jax.grad(total))(params)
        rng, step = np.random.default_rng(1), 1e-6
        params = jax.device_get(params)
        ahead = {name: rng.normal(size=x.shape) for name, x in params.items()}
        slope = sum(float(np.sum(gradient[name] * ahead[name])) for name in params)
        right, left = (
            float(total({name: x + sign * step * ahead[name] for name, x in params.items()}))
            for sign in (1, -1))
        assert slope == pytest.approx((right - left) / (2 * step), rel=1e-6)


def by_chunks(logits, batch, extras):
    """The plain loss, which is not known to be: its logits are kept or made again."""
    return model.cross_entropy(logits, batch, extras)


def losses_of(config: train.Config, steps: int = 20) -> list[float]:
    """The losses of a run's first steps."""
    state, step = train_cases.first_state(config), train_cases.stepper(config)
    found = []
    for number in range(steps):
        state, metrics = step(state, train_cases.random_batch(number % 4), 3e-3)
        found.append(float(metrics["train/loss"]))
    return found


def test_float32_losses_are_those_of_plain_gradients_over_twenty_steps(monkeypatch):
    """Within 1e-6: the program before, by autodiff and with logits kept, is the other."""
    config = train_cases.tiny_config()
    lean = losses_of(config)
    for name in "rms_norm", "gated":
        monkeypatch.setattr(model, name, getattr(model, name).__wrapped__)
    plain = losses_of(replace(config, token_loss=by_chunks))
    assert lean[0] - lean[-1] > 0.1
    np.testing.assert_allclose(lean, plain, rtol=1e-6)


# ------------------------------------------------------------------------------------ by device


@pytest.mark.parametrize("platform, unroll, chunk", [("cpu", 3, 4), ("gpu", 3, 16), ("tpu", 1, 16)])
def test_layers_and_logits_are_taken_as_suits_the_device(monkeypatch, platform, unroll, chunk):
    monkeypatch.setattr(model, "here", lambda: (platform, (0, 0)))
    config = replace(SHAPE, unroll=0, vocab=2**24)
    assert model.chunk_length(1, 16, config, 4) == chunk
    batch = model.whole(np.zeros((1, 4), np.int32))
    params = jax.eval_shape(partial(model.init, replace(config, vocab=64)), jax.random.key(0))
    program = str(jax.make_jaxpr(lambda p: model.llama(p, batch, CAUSAL, config))(params))
    assert f"unroll={unroll}" in program
