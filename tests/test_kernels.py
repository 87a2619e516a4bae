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
attention = jax.jit(kernels.attention, static_argnames=("mask", "implementation"))


# --------------------------------------------------------------------------------------- references


def softmax_mix_reference(q, k, v, mask):
    """`softmax_mix`, plainly."""
    group = q.shape[2] // mask.shape[2]
    mask = jnp.tile(mask, (1, 1, group, 1))
    scores = jnp.einsum("bkth,bksh->bkts", q, k)
    masked = jnp.where(mask, scores, -jnp.inf)
    probs = jax.nn.softmax(masked)
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


def seen_by(t: int, mask: Mask, segments, prefix) -> list[int]:
    """The positions that position t of a row sees, from the words of the design.

    They are in its segment and within the window. In a causal row none comes later, but for those
    that a prefix mask marks.
    """
    seen = []
    for s in range(len(segments)):
        together = segments[s] == segments[t]
        earlier = s <= t
        marked = mask.kind == "prefix" and prefix[s]
        allowed = earlier or marked or mask.kind == "bidirectional"
        near = not mask.window or abs(s - t) < mask.window
        if together and allowed and near:
            seen.append(s)
    return seen


def attention_by_loops(q, k, v, mask: Mask, segments, prefix) -> np.ndarray:
    """`attention`, query by query."""
    out = np.zeros(q.shape)
    batch, length, heads, group, width = q.shape
    for b, t in np.ndindex(batch, length):
        seen = seen_by(t, mask, segments[b], prefix[b])
        for n, g in np.ndindex(heads, group):
            keys = k[b, seen, n]
            scores = keys @ q[b, t, n, g] / np.sqrt(width)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[b, t, n, g] = weights @ v[b, seen, n]
    return out


def random_heads(length, kv=2, group=2, width=8, batch=2, seed=0) -> dict:
    """Random q, k, v, segments (with padding) and prefix marks: arguments of `attention`."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q = normal(batch, length, kv, group, width)
    k, v = normal(2, batch, length, kv, width)
    segments = rng.integers(1, 4, (batch, length))
    segments = np.sort(segments, axis=1).astype(np.int32)
    segments[0, -2:] = 0
    prefix = rng.integers(0, 2, (batch, length), dtype=np.int32)
    return dict(q=q, k=k, v=v, segments=segments, prefix=prefix)


# ---------------------------------------------------------------------------------------- attention



@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("mask", [
    Mask("causal", 0),
    Mask("causal", 3),
    Mask("prefix", 0),
    Mask("prefix", 3),
    Mask("bidirectional", 0),
    Mask("bidirectional", 3),
], ids=str)
def test_attention_is_what_loops_compute(mask, implementation):
    heads = random_heads(13)
    got = attention(**heads, mask=mask, implementation=implementation)
    close(got, attention_by_loops(**heads, mask=mask))


@pytest.mark.parametrize("kv,group", [(1, 4), (4, 1), (2, 3)])
def test_query_heads_share_keys_in_groups(kv, group):
    heads = random_heads(9, kv, group)
    expected = attention_by_loops(**heads, mask=CAUSAL)
    del heads["prefix"]
    close(attention(**heads, mask=CAUSAL), expected)


@pytest.mark.parametrize("mask", [
    CAUSAL,
    Mask("causal", 5),
    Mask("causal", 100),
    Mask("prefix", 0),
], ids=str)
@pytest.mark.parametrize("length", [64, 100, 128, 192, 256])
def test_xla_attention_equals_reference(length, mask):
    heads = random_heads(length, batch=1, seed=length)
    reference = attention(**heads, mask=mask, implementation="reference")
    close(reference, attention(**heads, mask=mask, implementation="xla"))


def test_xla_attention_has_the_gradient_of_reference():
    heads = random_heads(128, batch=1)
    segments = heads["segments"]
    qkv = {name: heads[name] for name in ("q", "k", "v")}
    mask = Mask("causal", 70)

    @partial(jax.jit, static_argnames="implementation")
    def gradients(implementation):
        def total(qkv):
            out = kernels.attention(
                **qkv, mask=mask, segments=segments, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.grad(total)(qkv)

    expected = gradients("reference")
    got = gradients("xla")
    for name in qkv:
        assert np.max(np.abs(expected[name])) > 0.1
        close(expected[name], got[name])


@pytest.mark.parametrize("arguments", [(), ("causal",)])
def test_a_mask_has_no_defaults(arguments):
    with pytest.raises(TypeError):
        Mask(*arguments)


@pytest.mark.parametrize("arguments", [("casual", 0), ("", 0), ("causal", -1)])
def test_a_mask_refuses_a_kind_and_a_window_that_are_none(arguments):
    with pytest.raises(ValueError, match="causal, prefix or bidirectional"):
        Mask(*arguments)


def test_attention_has_no_default_mask():
    heads = random_heads(4)
    with pytest.raises(TypeError, match="'mask'"):
        kernels.attention(**heads)


def test_softmax_mix_has_the_gradient_of_its_reference():
    rng = np.random.default_rng(0)
    q, out = rng.normal(size=(2, 2, 3, 12, 4)).astype(np.float32)  # two query heads a key head
    k, v = rng.normal(size=(2, 2, 3, 6, 4)).astype(np.float32)
    mask = rng.random((2, 1, 6, 6)) < 0.5
    mask |= np.eye(6, dtype=bool)

    got, back = jax.vjp(lambda *qkv: softmax_mix(*qkv, mask), q, k, v)
    expected, back_reference = jax.vjp(lambda *qkv: softmax_mix_reference(*qkv, mask), q, k, v)

    close(got, expected)
    for one, other in zip(back(out), back_reference(out), strict=True):
        close(one, other)


def test_rows_that_see_nothing_stay_finite_and_leave_the_others_alone():
    rng = np.random.default_rng(0)
    q, k, v, out = (100 * rng.normal(size=(4, 1, 1, 4, 4))).astype(np.float32)
    mask = np.tri(4, dtype=bool)[None, None]
    third = np.arange(4) == 2
    blind = mask & ~third[:, None]  # the third row sees nothing

    @jax.jit
    def gradients(mask, out):
        _, back = jax.vjp(lambda *qkv: softmax_mix(*qkv, mask), q, k, v)
        return back(out)

    for x in (softmax_mix(q, k, v, blind), *gradients(blind, out)):
        assert np.all(np.isfinite(x))
    out[:, :, 2] = 0  # as the losses of rows that see nothing are not counted
    for one, other in zip(gradients(mask, out), gradients(blind, out), strict=True):
        close(one, other)


# ------------------------------------------------------------------------------ products and losses


@pytest.mark.parametrize("columns", [2047, 2048, 4096])
def test_a_product_has_the_gradients_of_a_plain_one_and_is_padded_on_one_cpu_alone(columns):
    """Rows of a power of two are slow in a CPU's cache; a mesh would have to move padded ones."""
    x = jax.random.normal(jax.random.key(0), (16, 8))
    w = jax.random.normal(jax.random.key(1), (8, columns))
    scale = jax.random.normal(jax.random.key(2), (16, columns))

    def gradients_of(product):
        def total(x, w):
            out = product(x, w, ("embed", "mlp"), jnp.float32)
            return jnp.sum(scale * out)

        return jax.jit(jax.grad(total, (0, 1)))

    ours = gradients_of(matmul)
    plain = gradients_of(matmul_reference)
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = make_mesh(MeshConfig(), devices)
        with jax.set_mesh(mesh):
            for got, expected in zip(ours(x, w), plain(x, w), strict=True):
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
            program = str(jax.make_jaxpr(ours)(x, w))
        padded = f"[16,{columns + 16}]" in program
        slow = columns % 2048 == 0
        assert padded == (slow and len(devices) == 1)


def test_nll_and_its_gradient_are_those_of_its_reference():
    rng = np.random.default_rng(0)
    logits = (30 * rng.normal(size=(2, 3, 7))).astype(np.float32)
    targets = rng.integers(0, 7, (2, 3))
    out = rng.normal(size=(2, 3)).astype(np.float32)

    got, back = jax.vjp(lambda x: nll(x, targets), logits)
    expected, back_reference = jax.vjp(lambda x: nll_reference(x, targets), logits)

    close(got, expected)
    close(back(out)[0], back_reference(out)[0])


def test_nll_of_huge_logits_is_finite():
    logits = jnp.array([[[1e30, -1e30, 0.0]]])
    target = jnp.array([[0]])

    loss, back = jax.vjp(lambda x: nll(x, target), logits)

    equal(loss, [[0.0]])
    (gradient,) = back(jnp.ones((1, 1)))
    equal(gradient, np.zeros((1, 1, 3)))
