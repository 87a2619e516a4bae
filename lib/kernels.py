"""Fast products, attention and losses, each beside its reference."""
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec, get_abstract_mesh

from lib.sharding import ROWS, RULES, constrain


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, always within its own segment. It has no defaults: whoever attends must say.

    causal: keys at or before the query. prefix: these, and every key that `prefix` marks. bidirectional: all.
    window: a query sees the `window` nearest keys at or before it (bidirectional: and as many after); 0: all.
    """

    kind: Literal["causal", "prefix", "bidirectional"]
    window: int

    def __post_init__(self):
        if self.kind not in ("causal", "prefix", "bidirectional") or self.window < 0:
            raise ValueError(f"mask {self}: kind is causal, prefix or bidirectional, and window is 0 or more")


def allowed(mask: Mask, q_index, k_index, q_segment, k_segment, k_prefix=None) -> jax.Array:
    """[b, t, s]: may the query at `q_index` [t] see the key at `k_index` [s]? Segments [b, t] and [b, s]."""
    ahead = k_index[None, :] - q_index[:, None]  # [t, s], positive in the future
    see = (jnp.ones_like(ahead, bool) if mask.kind == "bidirectional" else ahead <= 0)[None]
    if mask.kind == "prefix":
        if k_prefix is None:
            raise ValueError("a prefix mask needs the batch key `prefix` [b, t]")
        see = see | (k_prefix[:, None, :] > 0)
    if mask.window:
        see = see & (abs(ahead) < mask.window)[None]
    return see & (q_segment[:, :, None] == k_segment[:, None, :])


def attend(q, k, v, see) -> jax.Array:
    """Softmax attention of q [b t k g h] to k, v [b s k h] where `see` [b t s]; scores: float32 or wider."""
    b, t, kv, g, h = q.shape
    q = (q * h**-0.5).transpose(0, 2, 3, 1, 4).reshape(b, kv, g * t, h)  # the heads of a group share keys
    out = softmax_mix(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), see[:, None])
    return out.reshape(b, kv, g, t, h).transpose(0, 3, 1, 2, 4)


@jax.custom_vjp
def softmax_mix(q, k, v, see):
    """softmax(q kᵀ where see) v for q [b k gt h], k and v [b k s h], see [b 1 t s].

    Its own gradient, because the row sums of share · d(share) equal those of out · d(out) (FlashAttention,
    Dao et al. 2022, B.2), which are h wide where the former are s wide.
    """
    return softmax_mix_forward(q, k, v, see)[0]


def softmax_mix_forward(q, k, v, see):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=wide)
    see = jnp.tile(see, (1, 1, q.shape[2] // see.shape[2], 1))
    share = jax.nn.softmax(jnp.where(see, scores, jnp.finfo(wide).min)).astype(v.dtype)  # a row may be empty
    out = jnp.einsum("bkts,bksh->bkth", share, v)
    return out, (q, k, v, share, out)


def softmax_mix_backward(kept, d_out):
    q, k, v, share, out = kept
    wide = jnp.promote_types(q.dtype, jnp.float32)
    d_share = jnp.einsum("bkth,bksh->bkts", d_out, v, preferred_element_type=wide)
    rows = jnp.sum((d_out * out).astype(wide), -1, keepdims=True)
    d_scores = (share * (d_share - rows)).astype(q.dtype)
    d_q = jnp.einsum("bkts,bksh->bkth", d_scores, k)
    d_k = jnp.einsum("bkts,bkth->bksh", d_scores, q)
    return d_q, d_k, jnp.einsum("bkts,bkth->bksh", share, d_out), None
softmax_mix.defvjp(softmax_mix_forward, softmax_mix_backward)


def splash(q, k, v, mask: Mask, segments, interpret: bool = False) -> jax.Array:
    """`attention` by the Pallas kernel for TPUs of that name, which skips blocks that nobody sees."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    t, g, h = q.shape[1], *q.shape[3:]
    n = next(n for n in (512, 256, 128) if t % n == 0)
    see = masks.LocalMask((t, t), (mask.window - 1, 0), 0) if mask.window else masks.CausalMask((t, t))
    heads = kernel.make_splash_mqa_single_device(
        masks.MultiHeadMask([see] * g), block_sizes=kernel.BlockSizes(*[n] * 8), interpret=interpret)
    each = jax.vmap(jax.vmap(heads, (0, 0, 0, None)))  # rows, key-value heads
    out = each((q * h**-0.5).transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3),
               kernel.SegmentIds(segments, segments))
    return out.transpose(0, 3, 1, 2, 4)


def choose(implementation: str, mask: Mask, length: int, dtype, platform: str | None = None) -> str:
    """What "auto" stands for: not cuDNN, untried yet. Raises ValueError for what cannot do what is asked."""
    platform = platform or getattr(get_abstract_mesh().abstract_device, "platform", jax.default_backend())
    able = ["splash"] * (platform == "tpu" and mask.kind == "causal" and length % 128 == 0)
    able += ["xla", "reference"] + ["cudnn"] * (platform == "gpu" and jnp.dtype(dtype).itemsize == 2)
    if implementation not in ("auto", *able):
        raise ValueError(f"model.attention is {implementation}; allowed for {mask.kind} rows of {length} in "
                         f"{dtype} on {platform} are auto, {', '.join(able)}")
    return able[0] if implementation == "auto" else implementation


def attention(q, k, v, mask: Mask, segments, prefix=None, implementation: str = "auto") -> jax.Array:
    """Self-attention of q [b t k g h] to k, v [b t k h] under a mask specification and segments [b, t].

    reference: the whole [t, t] square. xla: in blocks of queries, each with only the keys that it can see,
    so that a causal row costs about half the square. cudnn: NVIDIA's flash attention. splash: see there.
    """
    implementation = choose(implementation, mask, q.shape[1], q.dtype)
    length = block = q.shape[1]
    index = jnp.arange(length)
    if implementation in ("splash", "cudnn"):
        def kernel(q, k, v, segments, prefix):
            if implementation == "splash":
                return splash(q, k, v, mask, segments)
            see = allowed(mask, index, index, segments, segments, prefix)[:, None]
            flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
            return jax.nn.dot_product_attention(flat, k, v, mask=see, is_causal=mask.kind == "causal",
                                                implementation="cudnn").reshape(q.shape)

        if not get_abstract_mesh().empty:  # of which kernels know nothing
            heads, rows = PartitionSpec(ROWS, None, RULES["kv_heads"]), PartitionSpec(ROWS)
            kernel = jax.shard_map(kernel, in_specs=(heads,) * 3 + (rows,) * 2, out_specs=heads,
                                   check_vma=False)
        return kernel(q, k, v, segments, segments * 0 if prefix is None else prefix)
    if implementation == "xla" and mask.kind == "causal":
        block = next((b for b in (128, 64) if length > b and length % b == 0), length)
    out = []
    for start in range(0, length, block):
        end = start + block
        keys = slice(max(0, start - mask.window + 1) if mask.window else 0, end)
        see = allowed(mask, index[start:end], index[keys], segments[:, start:end], segments[:, keys],
                      None if prefix is None else prefix[:, keys])
        out.append(attend(q[:, start:end], k[:, keys], v[:, keys], see))
    return jnp.concatenate(out, axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x, w, axes: tuple[str, ...], out):
    """x [n i] times w, which becomes [i o], in x's dtype: [n o] in dtype `out`. axes: names of those of w.

    What fsdp splits of w is gathered for the product alone, in x's dtype, and again for the backward pass;
    the gradient of w is summed over devices in w's own dtype, and split as w is.
    """
    return matmul_forward(x, w, axes, out)[0]


def matmul_forward(x, w, axes, out):
    return jnp.matmul(x, gathered(x, w, axes), preferred_element_type=out), (x, w)


def matmul_backward(axes, out, kept, dy):
    x, w = kept
    dy, mesh = dy.astype(x.dtype), get_abstract_mesh()
    # Rows of 8 KiB, or some times that, share few sets of a CPU's cache: a fifth slower, or two fifths.
    plain = mesh.size != 1 or mesh.abstract_device.platform != "cpu" or dy.shape[1] % 2048
    padded = dy if plain else jnp.pad(dy, ((0, 0), (0, 16)))
    dw = jnp.einsum("ni,no->io", x, padded, preferred_element_type=w.dtype)
    dw = constrain(dw[:, :dy.shape[1]].reshape(w.shape), *(RULES[a] for a in axes))
    return jnp.einsum("no,io->ni", dy, gathered(x, w, axes)), dw
matmul.defvjp(matmul_forward, matmul_backward)


def gathered(x, w, axes):
    """w in x's dtype, whole but for the mesh axis tensor, as a matrix that x [n i] can be multiplied with."""
    w = constrain(w.astype(x.dtype), *(on if (on := RULES[a]) != "fsdp" else None for a in axes))
    return w.reshape(x.shape[1], -1)


@jax.custom_vjp
def nll(logits, targets):
    """Negative log-likelihood [b t] of targets [b t] under logits [b t v].

    Its own gradient, (softmax - one hot) · cotangent, is one pass over the logits; autodiff makes several.
    """
    return nll_forward(logits, targets)[0]


def nll_forward(logits, targets):
    norm = jax.nn.logsumexp(logits, -1)
    return norm - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0], (logits, targets, norm)


def nll_backward(kept, d_out):
    logits, targets, norm = kept
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return (jnp.exp(logits - norm[..., None]) - hit) * d_out[..., None], None
nll.defvjp(nll_forward, nll_backward)
