"""Fast paths: products, attention and losses; tests/test_kernels.py has references.

Letters of axes: b batch, t and s position, k key-value head, g query head of a key-value head,
h head_dim, v vocab; n any number of rows, i inputs and o outputs of a matrix.
"""
import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, get_abstract_mesh

from lib import flash
from lib.blocks import in_blocks
from lib.flash import Case
from lib.hardware import capability
from lib.masks import Mask, allowed
from lib.products import float32_or_wider, padded_for_cache, product
from lib.sharding import FREE, ROWS, RULES, constrain, is_local, rule, scattered, split_of

PARTS = 8  # blocks of queries of a row whose scores are kept
KEPT = 2_048  # the longest such row: beyond it they would take more memory than all else


# ---------------------------------------------------------------------------------- attention


def attention(
    q,
    k,
    v,
    mask: Mask,
    segments,
    prefix=None,
    implementation: str = "auto",
) -> jax.Array:
    """Self-attention of q [b t k g h] to k and v [b t k h]: means of v [b t k g h].

    segments [b t]: see `Mask`. prefix [b t]: the keys that a prefix mask shows to all.
    implementation: a name in ATTENTION, or "auto". Raises ValueError for one that cannot honour
    the mask here.
    """
    if mask.kind == "prefix" and prefix is None:
        raise ValueError("a prefix mask needs the batch key `prefix` [b, t]")
    name = choose(implementation, mask, q.shape[1], q.shape[-1], q.dtype)
    compute = ATTENTION[name].function
    return compute(q, k, v, mask, segments, prefix)


def choose(
    implementation: str,
    mask: Mask,
    length: int,
    head_dim: int,
    dtype,
    device: tuple[str, tuple[int, int]] | None = None,
) -> str:
    """The name in ATTENTION of an implementation; "auto" takes the first that is able.

    One that is not able gives way to what ATTENTION names in its place. device: `Case.platform`
    and `Case.capability`; None is that of the mesh, or without one the default. Raises ValueError
    where nothing is able.
    """
    device = device or here()
    case = Case(mask, length, head_dim, jnp.dtype(dtype), *device)
    able = [name for name, entry in ATTENTION.items() if entry.able(case)]
    if implementation == "auto":
        return able[0]
    name = implementation
    while name and name not in able:
        name = ATTENTION[name].otherwise
    if not name:
        raise ValueError(
            f"model.attention is {implementation}; allowed for {mask.kind} rows of {length} "
            f"in {dtype} on {case.platform} are auto, {', '.join(able)}"
        )
    return name


def here() -> tuple[str, tuple[int, int]]:
    """(cpu, gpu or tpu; an NVIDIA GPU's capability) of the mesh, or without one of the default."""
    device = get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return device.platform, capability(device.device_kind)


def settled(
    implementation: str,
    mask: Mask,
    length: int,
    head_dim: int,
    dtype,
) -> Mask:
    """The mask, with its bound on segments only where what is chosen depends on it.

    A step is compiled once for each mask.
    """
    name = choose(implementation, mask, length, head_dim, dtype)
    return mask if ATTENTION[name].counts else replace(mask, segments=0)


def counts_segments(implementation: str, length: int, head_dim: int, dtype) -> bool:
    """Whether what is chosen for causal rows may depend on how many segments they have."""
    case = Case(Mask("causal", 0, segments=1), length, head_dim, jnp.dtype(dtype), *here())
    names = ATTENTION if implementation == "auto" else [implementation]
    return any(ATTENTION[name].counts and ATTENTION[name].able(case) for name in names)


def reference(q, k, v, mask, segments, prefix):
    """`attention` by the whole [t t] square."""
    index = jnp.arange(q.shape[1])
    visible = allowed(mask, index, index, segments, segments, prefix)
    return attend(q, k, v, visible)


def blockwise(q, k, v, mask, segments, prefix):
    """`attention` in blocks of queries, each with only the keys that it can see.

    A causal row costs about half the square, and few blocks compile as fast for any length. Rows
    of more than KEPT positions go to `in_blocks`, which makes scores again: at 2,048 it holds a
    fifth of the memory, and has two thirds of the speed on two cores, for its loop has no two
    blocks at once.
    """
    length = q.shape[1]
    sizes = [size for size in (128, 64) if length % size == 0]
    if sizes and length > KEPT:
        return in_blocks(q, k, v, mask, segments, prefix, sizes[0])
    wanted = max(128, length // PARTS), 64
    sizes = [size for size in wanted if length % size == 0 and length > size]
    if mask.kind != "causal" or not sizes:
        return reference(q, k, v, mask, segments, prefix)
    index = jnp.arange(length)
    out = []
    for start in range(0, length, sizes[0]):
        end = start + sizes[0]
        first = max(0, start - mask.window + 1) if mask.window else 0
        queries = slice(start, end)
        keys = slice(first, end)
        visible = allowed(
            mask,
            index[queries],
            index[keys],
            segments[:, queries],
            segments[:, keys],
        )
        part = attend(q[:, queries], k[:, keys], v[:, keys], visible)
        out.append(part)
    return jnp.concatenate(out, axis=1)


NAMED = jax.checkpoint_policies.save_only_these_names("product", "attention")


def kept(primitive, *arguments, **parameters) -> bool:
    """The policy of `jax.checkpoint` that keeps products, and what attention's gradient needs.

    Without the sums of a kernel that makes its scores anew, the backward pass would run it twice.
    cuDNN's has no names, but is an operation of its own.
    """
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return NAMED(primitive, *arguments, **parameters)


def anywhere(case: Case) -> bool:
    """Every platform, mask and dtype."""
    return True


def on_each_device(kernel: Callable) -> Callable:
    """An implementation that knows nothing of meshes, for the rows and heads of each device."""
    heads = PartitionSpec(ROWS, None, RULES["kv_heads"])
    rows = PartitionSpec(ROWS)

    def spread(q, k, v, mask, segments, prefix):
        if get_abstract_mesh().empty or is_local():
            return kernel(q, k, v, mask, segments, prefix)
        if prefix is None:
            prefix = jnp.zeros_like(segments)
        compute = jax.shard_map(
            lambda q, k, v, *marks: kernel(q, k, v, mask, *marks),
            in_specs=(heads, heads, heads, rows, rows),
            out_specs=heads,
            check_vma=False,
        )
        return compute(q, k, v, segments, prefix)

    return spread


class Implementation(NamedTuple):
    """A way to compute attention."""

    able: Callable[[Case], bool]
    function: Callable[..., jax.Array]  # (q, k, v, mask, segments, prefix): as `attention`
    otherwise: str = ""  # what is taken in its place where it is not able
    counts: bool = False  # does it depend on `Mask.segments`?


# "auto" takes the first that is able.
ATTENTION = {
    "splash": Implementation(flash.splash_able, on_each_device(flash.splash)),
    "cudnn_causal": Implementation(
        flash.cudnn_causal_able, on_each_device(flash.cudnn_causal), "cudnn_packed", counts=True
    ),
    "cudnn_packed": Implementation(
        flash.cudnn_packed_able, on_each_device(flash.cudnn_packed), "cudnn", counts=True
    ),
    "cudnn": Implementation(flash.cudnn_able, on_each_device(flash.cudnn)),
    "xla": Implementation(anywhere, blockwise),
    "reference": Implementation(anywhere, reference),
}


def attend(q, k, v, mask):
    """Softmax attention of q [b t k g h] to k and v [b s k h] where `mask` [b t s] is true."""
    b, t, kv, g, h = q.shape
    q = jnp.moveaxis(q * h**-0.5, 1, 3)
    q = q.reshape(b, kv, g * t, h)  # the query heads of a group share keys
    k = jnp.moveaxis(k, 1, 2)
    v = jnp.moveaxis(v, 1, 2)
    out = softmax_mix(q, k, v, mask[:, None])
    out = out.reshape(b, kv, g, t, h)
    return jnp.moveaxis(out, 3, 1)


@jax.custom_vjp
def softmax_mix(q, k, v, mask):
    """softmax(q kᵀ where mask) v for q [b k gt h], k and v [b k s h], mask [b 1 t s].

    Scores are in float32 or wider; the gradient is its own.
    Softmax's gradient needs the row sums of probs · d(probs), which is s wide. They equal those of
    out · d(out), which is h wide (FlashAttention, Dao et al. 2022, B.2). A query that sees nothing
    gets the mean of v.
    """
    return softmax_mix_forward(q, k, v, mask)[0]


def softmax_mix_forward(q, k, v, mask):
    """(out, residuals) of `softmax_mix`."""
    wide = float32_or_wider(q.dtype)
    scores = product("bkth,bksh->bkts", q, k, wide)
    group = q.shape[2] // mask.shape[2]
    mask = jnp.tile(mask, (1, 1, group, 1))
    least = jnp.finfo(wide).min  # not -inf: a query may see nothing
    scores = jnp.where(mask, scores, least)
    probs = jax.nn.softmax(scores).astype(v.dtype)
    out = product("bkts,bksh->bkth", probs, v, v.dtype)
    out = checkpoint_name(out, "attention")
    return out, (q, k, v, probs, out)


def softmax_mix_backward(residuals, d_out):
    """Gradients of the arguments of `softmax_mix`."""
    q, k, v, probs, out = residuals
    wide = float32_or_wider(q.dtype)
    d_probs = product("bkth,bksh->bkts", d_out, v, wide)
    products = (d_out * out).astype(wide)
    row_sums = jnp.sum(products, -1, keepdims=True)
    d_scores = probs * (d_probs - row_sums)
    d_scores = d_scores.astype(q.dtype)
    d_q = product("bkts,bksh->bkth", d_scores, k, q.dtype)
    d_k = product("bkts,bkth->bksh", d_scores, q, k.dtype)
    d_v = product("bkts,bkth->bksh", probs, d_out, v.dtype)
    return d_q, d_k, d_v, None


softmax_mix.defvjp(softmax_mix_forward, softmax_mix_backward)


# ----------------------------------------------------------------------------------- products


def keeping_arguments(function: Callable, static: tuple[int, ...] = ()) -> Callable:
    """A function whose gradient keeps its arguments alone, and computes the rest again.

    static: places of arguments that are no arrays, after all others.
    """
    again = jax.custom_vjp(function, nondiff_argnums=static)

    def forward(*arguments):
        return function(*arguments), arguments[:len(arguments) - len(static)]

    def backward(*given):
        *fixed, arrays, d_out = given

        def plain(*arrays):
            return function(*arrays, *fixed)

        _, back = jax.vjp(plain, *arrays)
        return back(d_out)

    again.defvjp(forward, backward)
    return functools.wraps(function)(again)


def lookup(table, tokens, dtype) -> jax.Array:
    """Rows [b t d] of a table [v d] for tokens [b t], in `dtype`."""
    whole = constrain(table, RULES["vocab"], None)  # gathered once, not once for each token
    x = whole[tokens].astype(dtype)
    return constrain(x, ROWS)


def residual(x, update) -> jax.Array:
    """x + update, each device with its own rows."""
    return constrain(x + update, ROWS)


def dense(x, w, axes: tuple[str, ...], out=None) -> jax.Array:
    """x [b t i...] times w [i... o...]: [b t o...], in the dtype `out` or else that of x.

    axes: names of those of w. If the first is `embed` or a free axis such as `rank`, it is the
    input; else all but the last are.
    The result has the checkpoint name "product".
    """
    if out is None:
        out = x.dtype
    y = matmul(x, w, axes, out)
    return checkpoint_name(y, "product")


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x, w, axes: tuple[str, ...], out) -> jax.Array:
    """x [b t i...] or [n i] times w [i... o...] in the dtype of x: [b t o...] or [n o...].

    The result is in the dtype `out`. axes: names of those of w, see `dense`. The gradient is its
    own. It keeps x as it came, so that products which share an input keep it once.
    What the mesh axis fsdp splits of w is gathered for the product alone, in the dtype of x, and
    again for the backward pass. The gradient of w is summed over devices in w's own dtype, and
    split as w is.
    """
    return matmul_forward(x, w, axes, out)[0]


def matmul_forward(x, w, axes, out):
    """(y, residuals) of `matmul`."""
    rows = x.shape[:min(2, x.ndim - 1)]
    whole = gathered(w, axes, x.dtype)
    outputs = whole.shape[inputs_of(axes):]
    y = product("ni,io->no", flat(x), matrix(whole, axes), out)
    return y.reshape(*rows, *outputs), (x, w)


def matmul_backward(axes, out, residuals, dy):
    """Gradients of x and w in `matmul`."""
    x, w = residuals
    whole = gathered(w, axes, x.dtype)
    weights = matrix(whole, axes)
    dy = dy.astype(x.dtype).reshape(-1, weights.shape[1])
    dx = product("no,io->ni", dy, weights, x.dtype)
    dw = gradient_of_weights(flat(x), dy, w.dtype)
    return dx.reshape(x.shape), placed(dw.reshape(whole.shape), axes)


matmul.defvjp(matmul_forward, matmul_backward)


def inputs_of(axes: tuple[str, ...]) -> int:
    """How many of the axes of a weight are its input, see `dense`."""
    first = axes[0] == "embed" or axes[0] in FREE
    return 1 if first else len(axes) - 1


def flat(x) -> jax.Array:
    """x [b t i...] or [n i] as a matrix [n i].

    Products are two-dimensional. From one with two batch axes XLA on CPU would get the gradient of
    the weights by writing a transposed copy of the activations.
    """
    rows = math.prod(x.shape[:min(2, x.ndim - 1)])
    return x.reshape(rows, -1)


def gradient_of_weights(x, dy, dtype) -> jax.Array:
    """The sum [i o] over rows of x [n i] times dy [n o], in a dtype."""
    padded = padded_for_cache(dy)
    dw = product("ni,no->io", x, padded, dtype)
    return dw[:, : dy.shape[1]]


def places_of(axes: tuple[str, ...]) -> list[str | None]:
    """The mesh axis that each axis of a weight is split over."""
    return [rule(axis, "of a product") for axis in axes]


def placed(dw, axes) -> jax.Array:
    """The gradient of a weight, split as the weight is, and summed over the devices.

    On one device alone: summed over the axis fsdp, see lib/own_gradient.py.
    """
    places = places_of(axes)
    split = split_of(places)
    if is_local() and split is not None:
        return scattered(dw, split)
    return constrain(dw, *places)


def matrix(w, axes) -> jax.Array:
    """A weight as a matrix [i o]."""
    inputs = math.prod(w.shape[:inputs_of(axes)])
    return w.reshape(inputs, -1)


def gathered(w, axes, dtype) -> jax.Array:
    """A weight in the dtype of a product: whole, but for what the mesh axis tensor splits."""
    places = places_of(axes)
    split = split_of(places)
    w = w.astype(dtype)
    if is_local() and split is not None:
        return lax.all_gather(w, "fsdp", axis=split, tiled=True)
    places = [None if place == "fsdp" else place for place in places]
    return constrain(w, *places)


# ------------------------------------------------------------------------------------- losses


@jax.custom_vjp
def nll(logits, targets) -> jax.Array:
    """Negative log-likelihood [b t], in nats, of targets [b t] under logits [b t v].

    Float32 or wider, whatever the logits are.
    Its own gradient, (softmax - one hot) · d(out), is one pass over the logits, where automatic
    differentiation makes several.
    """
    return nll_forward(logits, targets)[0]


def nll_forward(logits, targets):
    """(out, residuals) of `nll`."""
    wide = logits.astype(float32_or_wider(logits.dtype))
    normaliser = jax.nn.logsumexp(wide, -1)
    out = normaliser - at_targets(wide, targets)
    return out, (logits, targets, normaliser)


def nll_backward(residuals, d_out):
    """Gradient of the logits in `nll`; the targets have none."""
    logits, targets, normaliser = residuals
    vocab = jnp.arange(logits.shape[-1])
    one_hot = vocab == targets[..., None]
    probs = jnp.exp(logits - normaliser[..., None])
    gradient = (probs - one_hot) * d_out[..., None]
    return gradient.astype(logits.dtype), None


nll.defvjp(nll_forward, nll_backward)


HEAD = "embed", "vocab"  # the axes of a head


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nats(
    states,
    head,
    targets,
    weights,
    chunk: int,
) -> jax.Array:
    """The sum of `nll` times weights [b t], for states [b t d] and a head [d v].

    Logits are in the dtype of the states, in chunks of so many of the t positions. Gradients of
    states and head are made where the logits are, so that no logits are kept or made again: the
    gradient of a sum is known but for a factor.
    """
    given = states, targets, weights
    whole = whole_head(head, states)
    nats = over_chunks(lambda part: chunk_of_nats(whole, part)[0], given, chunk)
    return jnp.sum(nats * weights)


def weighted_nats_forward(
    states,
    head,
    targets,
    weights,
    chunk,
):
    """(out, residuals) of `weighted_nats`: the gradients of states, head and weights."""
    whole = whole_head(head, states)
    d_head = jnp.zeros(head.shape, head.dtype)
    given = states, targets, weights

    def add(d_head, part):
        nats, d_states, own = gradients_of_nats(whole, part, head.dtype)
        return d_head + own, (nats, d_states)

    d_head, found = lax.scan(add, d_head, in_chunks(given, chunk))
    nats, d_states = jax.tree.map(out_of_chunks, found)
    if not is_local():
        d_head = placed(d_head, HEAD)
    return jnp.sum(nats * weights), (d_states, d_head, nats)


def weighted_nats_backward(chunk, residuals, d_out):
    """Gradients of states, head and weights in `weighted_nats`; the targets have none."""
    d_states, d_head, d_weights = (x * d_out.astype(x.dtype) for x in residuals)
    return d_states, d_head, None, d_weights


weighted_nats.defvjp(weighted_nats_forward, weighted_nats_backward)


def whole_head(head, states) -> jax.Array:
    """The head in the dtype of the states; gathered and rounded once, not once a chunk."""
    if is_local():
        return head.astype(states.dtype)
    return gathered(head, HEAD, states.dtype)


def chunk_of_nats(whole, part):
    """`nll_forward` of a chunk of (states [b c d], targets, weights) under a head [d v]."""
    x, targets, _ = part
    logits = product("ni,io->no", flat(x), whole, x.dtype)
    logits = logits.reshape(*targets.shape, -1)
    return nll_forward(logits, targets)


def gradients_of_nats(whole, part, dtype):
    """(`nll` [b c], its weighted sum's gradients of states [b c d] and head [d v]) of a chunk."""
    x, _, weights = part
    nats, kept = chunk_of_nats(whole, part)
    d_logits, _ = nll_backward(kept, weights)
    d_logits = d_logits.reshape(-1, whole.shape[1])
    dx = product("no,io->ni", d_logits, whole, x.dtype)
    d_head = gradient_of_weights(flat(x), d_logits, dtype)
    return nats, dx.reshape(x.shape), d_head


def over_chunks(function: Callable, tree, chunk: int):
    """function(part) of each chunk of positions of arrays [b t ...], put together again."""
    found = lax.map(function, in_chunks(tree, chunk))
    return jax.tree.map(out_of_chunks, found)


def in_chunks(tree, chunk: int):
    """Arrays [b t ...] as [t/chunk b chunk ...]."""

    def split(x):
        b, t, *rest = x.shape
        parts = x.reshape(b, t // chunk, chunk, *rest)
        return jnp.moveaxis(parts, 1, 0)

    return jax.tree.map(split, tree)


def out_of_chunks(x) -> jax.Array:
    """An array [n b chunk ...] as [b n·chunk ...]."""
    n, b, chunk, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(b, n * chunk, *rest)


def at_targets(x, targets) -> jax.Array:
    """The entries [b t] of x [b t v] at targets [b t]."""
    entries = jnp.take_along_axis(x, targets[..., None], -1)
    return entries[..., 0]
