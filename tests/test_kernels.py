"""lib/kernels.py: attention against loops, products and losses against their references."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import kernels
from lib.kernels import Mask, at_targets, matmul, nll, softmax_mix
from lib.sharding import MeshConfig, make_mesh

CAUSAL = Mask("causal", 0)
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
equal = np.testing.assert_array_equal


def softmax_mix_reference(q, k, v, mask):
    """`softmax_mix`, plainly."""
    group = q.shape[2] // mask.shape[2]
    mask = jnp.tile(mask, (1, 1, group, 1))
    scores = jnp.einsum("bkth,bksh->bkts", q, k)
    probs = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
    return jnp.einsum("bkts,bksh->bkth", probs, v)


def matmul_reference(x, w, axes: tuple[str, ...], out) -> jax.Array:
    """`matmul`, plainly."""
    w = w.astype(x.dtype)
    w = w.reshape(x.shape[1], -1)
    return jnp.matmul(x, w, preferred_element_type=out)


def nll_reference(logits, targets) -> jax.Array:
    """`nll`, plainly."""
    log_probs = jax.nn.log_softmax(logits)
    return -at_targets(log_probs, targets)


def naive(q, k, v, mask, segments, prefix):
    """Attention by loops, from the words of the design: what a query sees is in its segment, and ..."""
    out = np.zeros(q.shape)
    length, heads, group = q.shape[1:4]
    for b in range(len(q)):
        for t in range(length):
            seen = [s for s in range(length) if segments[b, s] == segments[b, t]
                    and (s <= t or mask.kind == "bidirectional" or (mask.kind == "prefix" and prefix[b, s]))
                    and (not mask.window or abs(s - t) < mask.window)]
            for n in range(heads):
                for g in range(group):
                    scores = np.array([q[b, t, n, g] @ k[b, s, n] for s in seen]) / np.sqrt(q.shape[-1])
                    w = np.exp(scores - scores.max())
                    out[b, t, n, g] = w @ v[b, seen, n] / w.sum()
    return out


def heads(length, kv=2, group=2, width=8, batch=2, seed=0):
    """Random q, k, v, segments (with padding) and prefix marks."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, length, kv, group, width)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, length, kv, width)).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    segments[0, -2:] = 0
    return q, k, v, segments, rng.integers(0, 2, (batch, length), dtype=np.int32)


MASKS = [Mask(kind, window) for kind in ("causal", "prefix", "bidirectional") for window in (0, 3)]


attention = jax.jit(kernels.attention, static_argnames=("mask", "implementation"))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_equals_a_naive_one(mask, implementation):
    q, k, v, segments, prefix = heads(13)
    got = attention(q, k, v, mask=mask, segments=segments, prefix=prefix, implementation=implementation)
    close(got, naive(q, k, v, mask, segments, prefix))


@pytest.mark.parametrize("kv,group", [(1, 4), (4, 1), (2, 3)])
def test_query_heads_share_keys_in_groups(kv, group):
    q, k, v, segments, prefix = heads(9, kv, group)
    close(attention(q, k, v, mask=CAUSAL, segments=segments), naive(q, k, v, CAUSAL, segments, prefix))


@pytest.mark.parametrize("mask", [CAUSAL, Mask("causal", 5), Mask("causal", 100), Mask("prefix", 0)], ids=str)
@pytest.mark.parametrize("length", [64, 100, 128, 192, 256])
def test_xla_attention_equals_reference(length, mask):
    q, k, v, segments, prefix = heads(length, batch=1, seed=length)
    one, other = (attention(q, k, v, mask=mask, segments=segments, prefix=prefix, implementation=how)
                  for how in ("reference", "xla"))
    close(one, other)


def test_xla_attention_has_the_gradient_of_reference():
    q, k, v, segments, _ = heads(128, batch=1)

    @partial(jax.jit, static_argnames="implementation")
    def grads(implementation):
        def total(*qkv):
            out = kernels.attention(*qkv, Mask("causal", 70), segments, implementation=implementation)
            return jnp.sum(jnp.sin(out))
        return jax.grad(total, (0, 1, 2))(q, k, v)

    for one, other in zip(grads("reference"), grads("xla"), strict=True):
        assert float(jnp.max(jnp.abs(one))) > 0.1
        close(one, other)


def test_mask_has_no_defaults_and_refuses_junk():
    for arguments in ((), ("causal",)):
        with pytest.raises(TypeError):
            Mask(*arguments)
    for arguments in (("casual", 0), ("", 0), ("causal", -1)):
        with pytest.raises(ValueError, match="causal, prefix or bidirectional"):
            Mask(*arguments)


def test_attention_has_no_default_mask():
    q, k, v, segments, _ = heads(4)
    with pytest.raises(TypeError):
        kernels.attention(q, k, v, segments=segments)


def test_softmax_mix_has_the_gradient_of_its_reference():
    rng = np.random.default_rng(0)
    q, out = rng.normal(size=(2, 2, 3, 12, 4)).astype(np.float32)  # two query heads for each key head
    k, v = rng.normal(size=(2, 2, 3, 6, 4)).astype(np.float32)
    mask = rng.random((2, 1, 6, 6)) < 0.5
    mask |= np.eye(6, dtype=bool)
    got, back = jax.vjp(lambda *x: softmax_mix(*x, mask), q, k, v)
    expected, plain_back = jax.vjp(lambda *x: softmax_mix_reference(*x, mask), q, k, v)
    close(got, expected)
    for one, other in zip(back(out), plain_back(out), strict=True):
        close(one, other)


def test_rows_that_see_nothing_stay_finite_and_leave_the_others_alone():
    rng = np.random.default_rng(0)
    q, k, v, out = (100 * rng.normal(size=(4, 1, 1, 4, 4))).astype(np.float32)
    mask = np.tri(4, dtype=bool)[None, None]
    blind = mask & (np.arange(4) != 2)[:, None]
    mix = jax.jit(lambda mask, out: jax.vjp(lambda *x: softmax_mix(*x, mask), q, k, v)[1](out))
    assert all(np.all(np.isfinite(x)) for x in (softmax_mix(q, k, v, blind), *mix(blind, out)))
    out[:, :, 2] = 0  # as the losses of rows that see nothing are not counted
    for one, other in zip(mix(mask, out), mix(blind, out), strict=True):
        close(one, other)


@pytest.mark.parametrize("columns", [2047, 2048, 4096])
def test_a_product_has_the_gradients_of_a_plain_one_and_is_padded_on_one_cpu_alone(columns):
    """Rows of a power of two are slow in a CPU's cache; on a mesh, padding them would move them about."""
    x, w, scale = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
        [(16, 8), (8, columns), (16, columns)]))

    def gradients(product):
        return jax.jit(jax.grad(lambda x, w: jnp.sum(scale * product(x, w)), (0, 1)))

    def with_axes(product):
        return lambda x, w: product(x, w, ("embed", "mlp"), jnp.float32)

    ours, plain = gradients(with_axes(matmul)), gradients(with_axes(matmul_reference))
    for devices in (jax.devices()[:1], jax.devices()):
        with jax.set_mesh(make_mesh(MeshConfig(), devices)):
            for got, want in zip(ours(x, w), plain(x, w), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
            padded = f"[16,{columns + 16}]" in str(jax.make_jaxpr(ours)(x, w))
        assert padded == (len(devices) == 1 and columns % 2048 == 0)


def test_nll_and_its_gradient_are_those_of_its_reference():
    rng = np.random.default_rng(0)
    logits = (30 * rng.normal(size=(2, 3, 7))).astype(np.float32)
    targets, out = rng.integers(0, 7, (2, 3)), rng.normal(size=(2, 3)).astype(np.float32)
    got, back = jax.vjp(lambda x: nll(x, targets), logits)
    expected, plain_back = jax.vjp(lambda x: nll_reference(x, targets), logits)
    close(got, expected)
    close(back(out)[0], plain_back(out)[0])


def test_nll_of_huge_logits_is_finite():
    logits = jnp.array([[[1e30, -1e30, 0.0]]])
    loss, back = jax.vjp(lambda x: nll(x, jnp.array([[0]])), logits)
    equal(loss, [[0.0]])
    equal(back(jnp.ones((1, 1)))[0], np.zeros((1, 1, 3)))
