"""The transformer: one table of named parameters, the forward pass, attention, generation, edits of a model.

Everything about the parameters is derived from `table(config)`: initialisation, counts, FLOPs, sharding,
optimiser groups, growth and forgetting. A model is a flat dictionary `{name: array}`; those with a leading
`layers` axis are blocks, stacked and run by `lax.scan`. Axis letters in einsum strings and comments:

    b batch  t, s position  l layer  d embed  k kv head  g query head of a kv head  h head_dim  f mlp  v vocab
"""
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import logical_to_mesh_axes
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_abstract_mesh


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-like transformer (pre-norm, RoPE, grouped queries, SwiGLU) and how it is run."""

    layers: int = 4  # blocks
    embed: int = 128  # width of the residual stream
    heads: int = 4  # query heads
    kv_heads: int = 4  # key and value heads; each serves heads / kv_heads query heads
    head_dim: int = 32  # width of one head; even, since RoPE rotates pairs
    mlp: int = 344  # hidden width of the SwiGLU
    vocab: int = 0  # pieces of the tokenizer: trained to this many, or 0 for as many as a given one has
    tied: bool = True  # the head is the transposed embedding table
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: tuple[float, ...] = ()  # (factor,), or Llama 3's (factor, low, high, old context)
    norm_eps: float = 1e-6  # epsilon of RMSNorm
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"  # of the computation
    param_dtype: Literal["float32", "float64"] = "float32"  # of parameters and optimiser state
    attention: Literal["auto", "reference", "xla", "cudnn", "splash"] = "auto"  # implementation, see `choose`
    unroll: int = 0  # blocks unrolled in the scan over layers; 0 is all: slower to compile, faster to run
    qk_norm: bool = False  # RMSNorm of queries and keys in each head (Dehghani et al. 2023)
    remat: Literal["none", "elementwise", "all"] = "none"  # what of a block the backward pass computes again
    logits_mib: int = 256  # the loss is computed in chunks of the sequence whose float32 logits fit in this


@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: int = -1  # rows of the batch
    fsdp: int = 1  # rows of the batch, and parameters along `embed`
    tensor: int = 1  # parameters along `vocab`, `mlp` and `kv_heads`


# ---------------------------------------------------------------------------------------- the parameter table

class Param(NamedTuple):
    """One row of the table: named axes, shape, and the standard deviation of its normal draw (None: ones)."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    std: float | None

    @property
    def group(self) -> str:
        """Optimiser group: embed (lookup table), head (untied output), matrix (decays), vector (does not)."""
        if "vocab" in self.axes:
            return "embed" if self.axes[0] == "vocab" else "head"
        return "matrix" if len(self.axes) - self.axes.count("layers") > 1 else "vector"


def table(config: ModelConfig) -> dict[str, Param]:
    """Every parameter of the model, by name.

    Factors are drawn with 1/sqrt(fan in), output projections with GPT-2's 0.02/sqrt(2 layers), so that the
    residual stream begins as the embedding: with larger outputs small models learn slower (0.8 nats behind
    after 150 steps of the quickstart).
    """
    c = config
    size = dict(layers=c.layers, vocab=c.vocab, embed=c.embed, kv_heads=c.kv_heads,
                q_per_kv=c.heads // c.kv_heads, head_dim=c.head_dim, mlp=c.mlp)
    out = 0.02 / math.sqrt(2 * c.layers)

    def param(axes: str, std: float | None) -> Param:
        names = tuple(axes.split())
        return Param(names, tuple(size[a] for a in names), std)

    rows = {
        "embed": param("vocab embed", c.embed**-0.5),
        "attn_norm": param("layers embed", None),
        "q": param("layers embed kv_heads q_per_kv head_dim", c.embed**-0.5),
        "k": param("layers embed kv_heads head_dim", c.embed**-0.5),
        "v": param("layers embed kv_heads head_dim", c.embed**-0.5),
        "o": param("layers kv_heads q_per_kv head_dim embed", out),
        "mlp_norm": param("layers embed", None),
        "gate": param("layers embed mlp", c.embed**-0.5),
        "up": param("layers embed mlp", c.embed**-0.5),
        "down": param("layers mlp embed", out),
        "norm": param("embed", None),
    }
    rows |= {f"{x}_norm": param("layers head_dim", None) for x in "qk" if c.qk_norm}
    return rows if c.tied else rows | {"head": param("embed vocab", c.embed**-0.5)}


def draw(name: str, param: Param, key: jax.Array, dtype) -> jax.Array:
    """The initial value of one parameter: a function of (key, name), the same on any number of devices."""
    if param.std is None:
        return jnp.ones(param.shape, dtype)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return param.std * jax.random.normal(key, param.shape, dtype)


def init(config: ModelConfig, key: jax.Array) -> dict[str, jax.Array]:
    """All parameters, drawn from the table in `config.param_dtype`."""
    return {name: draw(name, p, key, config.param_dtype) for name, p in table(config).items()}


def groups(config: ModelConfig) -> dict[str, list[str]]:
    """Optimiser groups in the table's order: `{group: [parameter names]}`."""
    out: dict[str, list[str]] = {}
    for name, p in table(config).items():
        out.setdefault(p.group, []).append(name)
    return out


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(p.shape) for p in table(config).values())


def flops_per_token(config: ModelConfig, seq: int) -> int:
    """FLOPs of training on one token: 6 (matmul parameters, head included) + 6 layers heads head_dim seq.

    Causal attention is counted once (PaLM, appendix B, halved for causality); rematerialisation is not.
    """
    matmul = sum(math.prod(p.shape) for p in table(config).values() if p.group in ("matrix", "head"))
    matmul += config.vocab * config.embed if config.tied else 0
    return 6 * matmul + 6 * config.layers * config.heads * config.head_dim * seq


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The devices as a grid with axes data, fsdp and tensor."""
    devices = jax.devices() if devices is None else devices
    sizes = data, fsdp, tensor = config.data, config.fsdp, config.tensor
    known = math.prod(s for s in sizes if s > 0)
    rest, n = sizes.count(-1), len(devices)
    if rest > 1 or any(s == 0 or s < -1 for s in sizes) or n % known or (not rest and known != n):
        raise ValueError(f"mesh is data {data}, fsdp {fsdp}, tensor {tensor}, which does not fit the {n} "
                         "devices here; allowed are sizes whose product is that, one of them -1 for the rest")
    sizes = [s if s > 0 else n // known for s in sizes]
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "fsdp", "tensor"))


# Named axes to mesh axes. `logical_to_mesh_axes` would copy an unknown axis to all devices: here it raises.
RULES = {"layers": None, "vocab": "tensor", "embed": "fsdp", "kv_heads": "tensor", "q_per_kv": None,
         "head_dim": None, "mlp": "tensor"}
ROWS = "data", "fsdp"  # mesh axes that the rows of a batch live on


def shardings(config: ModelConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lives on a mesh. Raises ValueError for an axis that the mesh does not divide."""
    out = {}
    for name, p in table(config).items():
        spec = logical_to_mesh_axes(p.axes, tuple((axis, RULES[axis]) for axis in p.axes))
        for axis, size, on in zip(p.axes, p.shape, spec, strict=True):
            if on is not None and size % mesh.shape[on]:
                raise ValueError(f"axis {axis} of parameter {name} is {size}, which mesh.{on} "
                                 f"({mesh.shape[on]}) does not divide")
        out[name] = NamedSharding(mesh, spec)
    return out


# -------------------------------------------------------------------------------------------------- attention

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


# ---------------------------------------------------------------------------------------------------- forward

def rms_norm(x, gain, eps):
    """x / rms(x) · gain over the last axis, the mean square in float32 or wider (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * gain.astype(x.dtype)


def rope(positions, config: ModelConfig):
    """Cosine and sine [b t h/2] of the rotary angles (RoFormer), in float32 or wider. A scaling slows them by
    its factor (Chen et al. 2023), Llama 3's not those that turn over `high` times within the old context.
    """
    wide = jnp.promote_types(config.dtype, jnp.float32)
    inverse = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=wide) / config.head_dim)
    if config.rope_scaling:
        factor, low, high, context = (*config.rope_scaling, 1.0, 2.0, 0.0)[:4]  # none within no context
        kept = jnp.clip((context * inverse / (2 * math.pi) - low) / (high - low), 0, 1)
        inverse = inverse * (kept + (1 - kept) / factor)
    angle = positions[..., None].astype(wide) * inverse
    return jnp.cos(angle).astype(config.dtype), jnp.sin(angle).astype(config.dtype)


def rotate(x, cos, sin):
    """Rotate x [b t ... h] by its position; the pairs are (i, i + h/2), as in Llama checkpoints."""
    shape = cos.shape[:2] + (1,) * (x.ndim - 3) + cos.shape[2:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def pin(x, *axes) -> jax.Array:
    """Fix the mesh axes that the axes of x live on, where these divide them; without a mesh, do nothing."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return x
    parts = [math.prod(mesh.shape[a] for a in np.ravel(on)) if on else 1 for on in axes]
    fit = [on if n % part == 0 else None for on, n, part in zip(axes, x.shape, parts, strict=False)]
    return lax.with_sharding_constraint(x, PartitionSpec(*fit))


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
    dw = pin(dw[:, :dy.shape[1]].reshape(w.shape), *(RULES[a] for a in axes))
    return jnp.einsum("no,io->ni", dy, gathered(x, w, axes)), dw


matmul.defvjp(matmul_forward, matmul_backward)


def gathered(x, w, axes):
    """w in x's dtype, whole but for the mesh axis tensor, as a matrix that x [n i] can be multiplied with."""
    w = pin(w.astype(x.dtype), *(on if (on := RULES[a]) != "fsdp" else None for a in axes))
    return w.reshape(x.shape[1], -1)


def dense(x, w, axes: tuple[str, ...]):
    """x [b t i...] times w [i... o...] with named `axes`, of which the inputs are `embed` or all others.

    As one two-dimensional product, since XLA on CPU writes a transposed copy of the activations to get the
    gradient of `w` from a product with two batch axes.
    """
    inputs = 1 if axes[0] == "embed" else len(axes) - 1
    y = matmul(x.reshape(math.prod(x.shape[:2]), -1), w, axes, x.dtype)
    return checkpoint_name(y.reshape(*x.shape[:2], *w.shape[inputs:]), "product")


def block(x, w, angles, attend_fn: Callable, config: ModelConfig, dense: Callable = dense):
    """One transformer block: x [b t d], weights `w` for `dense`, `attend_fn(q, k, v) -> (output, aux)`."""
    rows = table(config)

    def times(x, name):
        return dense(x, w[name], rows[name].axes[1:])

    n = rms_norm(x, w["attn_norm"], config.norm_eps)
    q, k, v = times(n, "q"), times(n, "k"), times(n, "v")
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"], config.norm_eps), rms_norm(k, w["k_norm"], config.norm_eps)
    out, aux = attend_fn(rotate(q, *angles), rotate(k, *angles), v)
    x = pin(x + times(out, "o"), ROWS)
    n = rms_norm(x, w["mlp_norm"], config.norm_eps)
    gated = jax.nn.silu(times(n, "gate")) * times(n, "up")
    return pin(x + times(gated, "down"), ROWS), aux


def blocks(params, config: ModelConfig) -> dict[str, jax.Array]:
    """The parameters stacked on a leading `layers` axis."""
    return {name: params[name] for name, p in table(config).items() if p.axes[0] == "layers"}


def hidden(params, tokens, segments, positions, mask: Mask, config: ModelConfig, prefix=None) -> jax.Array:
    """Final normalised states [b t d] of tokens [b t], in `config.dtype`."""
    angles = rope(positions, config)

    def layer(x, w):
        return block(x, w, angles, lambda q, k, v: (
            attention(q, k, v, mask, segments, prefix, config.attention), None), config)

    if config.remat != "none":
        kept = jax.checkpoint_policies.save_only_these_names(*["product"] * (config.remat == "elementwise"))
        layer = jax.checkpoint(layer, policy=kept)
    embed = pin(params["embed"], RULES["vocab"], None)  # one gather of the table, not one for each token
    x = pin(embed[tokens].astype(config.dtype), ROWS)
    x, _ = lax.scan(layer, x, blocks(params, config), unroll=config.unroll or config.layers)
    return rms_norm(x, params["norm"], config.norm_eps)


def logits(params, states, config: ModelConfig) -> jax.Array:
    """[b t v] in float32 or wider, from final states [b t d]."""
    wide = jnp.promote_types(config.dtype, jnp.float32)
    head = params["embed"].T if config.tied else params["head"]
    out = matmul(states.reshape(-1, config.embed), head, ("embed", "vocab"), wide)  # as in `dense`
    return out.reshape(*states.shape[:2], config.vocab)


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


def apply(params, ids, config: ModelConfig) -> jax.Array:
    """Logits [b t v] of ids [b t], each row one causal segment."""
    one = jnp.ones_like(ids)
    return logits(params, hidden(params, ids, one, jnp.cumsum(one, 1) - 1, Mask("causal", 0), config), config)


def cross_entropy(logits, batch, extras, z: float = 0.0) -> jax.Array:
    """The plain `token_loss`: nats [b, t] of `batch["targets"]` under logits [b t v].

    z: the weight of the squared log normaliser, which keeps logits small (PaLM, section 5: 1e-4).
    """
    plain = nll(logits, batch["targets"])
    return plain + z * jnp.square(jax.nn.logsumexp(logits, -1)) if z else plain


def weighted_mean(losses, batch):
    """The plain `reduce`: ((numerator, denominator), metrics) of losses [b t] under `batch["weights"]`."""
    return (jnp.sum(losses * batch["weights"]), jnp.sum(batch["weights"])), {}


def losses(params, batch, mask: Mask, config: ModelConfig, token_loss: Callable = cross_entropy, extras=None):
    """Loss of each position [b, t], unweighted, float32 or wider; logits exist a chunk of `t` at a time."""
    tokens, prefix = batch["tokens"], batch.get("prefix")
    states = hidden(params, tokens, batch["segments"], batch["positions"], mask, config, prefix)
    b, t = tokens.shape
    here = b * config.vocab // max(1, get_abstract_mesh().size)  # a device's share; no mesh has size 0
    fit = max(1, config.logits_mib * 2**20 // (4 * max(1, here)))
    chunk = next(c for c in range(min(t, fit), 0, -1) if t % c == 0)
    if chunk == t:
        return token_loss(logits(params, states, config), batch, extras)

    def split(x):  # [b, t, ...] -> [chunks, b, chunk, ...]
        return jnp.moveaxis(x.reshape(b, t // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint  # the backward pass computes a chunk's logits again
    def one(states, part):
        return token_loss(logits(params, states, config), part, extras)

    out = lax.map(lambda xs: one(*xs), (split(states), {name: split(x) for name, x in batch.items()}))
    return jnp.moveaxis(out, 0, 1).reshape(b, t)


# ------------------------------------------------------------------------------------- optimiser and the step

@dataclass(frozen=True)
class Schedule:
    """The learning rate over the consumed budget: a linear warm-up to the peak, then a shape."""

    shape: Literal["constant", "cosine", "linear", "wsd"] = "wsd"  # wsd: stable, then a decay
    peak: float = 3e-3  # rate after the warm-up
    warmup: int = 20  # steps
    decay: float = 0.2  # wsd: the share of the budget at the end over which the rate falls
    fall: Literal["linear", "sqrt"] = "linear"  # wsd: how, linear or 1 - sqrt (Haegele et al. 2024)
    final: float = 0.1  # the rate at the end, as a share of the peak (not of a constant one)
    budget: Literal["flops", "tokens"] = "flops"  # what is consumed; tokens are batch x seq, padding included
    cycle: int = 0  # steps after which it begins anew; 0 is never


def schedules(config) -> dict[str, Schedule]:
    """Every schedule of a `train.Config` by its path: the run's, phases', optimiser groups'."""
    named = {"schedule": config.schedule}
    for i, phase in enumerate(config.phases):
        own = {f"rates.{group}": s for group, s in phase.rates.items()} | {"schedule": phase.schedule}
        named |= {f"phases.{i}.{path}": s for path, s in own.items() if isinstance(s, Schedule)}
    return named


def curve(schedule: Schedule, spent: np.ndarray, start: int, steps: int) -> np.ndarray:
    """The rate at steps start+1 .. start+steps, where `spent` [s] is the budget consumed after s steps.

    A step's rate belongs to the budget consumed with that step, so a row's own figures give its rate.
    """
    if schedule.cycle:
        once, starts = replace(schedule, cycle=0), range(start, start + steps, schedule.cycle)
        return np.concatenate([curve(once, spent, s, min(schedule.cycle, start + steps - s)) for s in starts])
    used = (spent[start + 1:start + steps + 1] - spent[start]).astype(float)
    total = float(spent[start + steps] - spent[start])
    warm = used[min(schedule.warmup, steps) - 1] if schedule.warmup else 0.0
    rise = np.minimum(1.0, used / warm) if warm else np.ones(steps)
    after = np.clip((used - warm) / max(total - warm, 1e-9), 0, 1)  # of the warm-up
    if schedule.shape == "cosine":
        fall = schedule.final + (1 - schedule.final) * 0.5 * (1 + np.cos(np.pi * after))
    elif schedule.shape == "linear":
        fall = 1 - (1 - schedule.final) * after
    elif schedule.shape == "wsd":
        through = np.clip((used / total - (1 - schedule.decay)) / schedule.decay, 0, 1)
        fall = 1 - (1 - schedule.final) * (np.sqrt(through) if schedule.fall == "sqrt" else through)
    else:
        fall = np.ones(steps)
    return schedule.peak * rise * fall


def adamw(table: dict[str, Param], b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          weight_decay: float = 0.1) -> dict[str, optax.GradientTransformation]:
    """AdamW (Loshchilov & Hutter 2019) for each group of the table; matrices decay, embeddings and gains not.

    Returns unscaled descent directions; the step multiplies each group's by its rate.
    """
    decay = {"matrix": weight_decay, "head": weight_decay}
    return {g: optax.chain(optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(decay.get(g, 0.0)))
            for g in dict.fromkeys(p.group for p in table.values())}


def first_opt(params, config: ModelConfig, optimizer: Callable) -> dict[str, Any]:
    """The state {group: optax state} that an optimiser `table -> {group: transformation}` begins with."""
    transforms = optimizer(table(config))
    return {g: transforms[g].init({n: params[n] for n in names}) for g, names in groups(config).items()}


class State(flax.struct.PyTreeNode):
    """What a step changes."""

    params: dict[str, jax.Array]
    opt: dict[str, Any]  # {optimiser group: optax state}
    step: jax.Array  # int32, batches consumed
    skipped: jax.Array  # int32, updates in a row left out for a non-finite loss or gradient


def state_like(config: ModelConfig, optimizer: Callable, mesh: Mesh) -> State:
    """Shapes, dtypes and places of a state: the optimiser's mirrors of parameters live where these do."""
    def place(x, where):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    where, whole = shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    params = {name: jax.ShapeDtypeStruct(p.shape, config.param_dtype, sharding=where[name])
              for name, p in table(config).items()}
    opt = jax.eval_shape(lambda p: first_opt(p, config, optimizer), params)
    opt = {group: mirrored(opt[group], names, lambda x, _: {n: place(x[n], where[n]) for n in x},
                           lambda x: place(x, whole)) for group, names in groups(config).items()}
    return State(params, opt, *2 * (jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),))


def places(like: State) -> State:
    """The shardings of `state_like`."""
    return jax.tree.map(lambda x: x.sharding, like)


def first_state(config: ModelConfig, optimizer: Callable, mesh: Mesh, key: jax.Array) -> State:
    """The state before any step, born sharded."""
    def make():
        params = init(config, key)
        return State(params, first_opt(params, config, optimizer), jnp.int32(0), jnp.int32(0))

    return jax.jit(make, out_shardings=places(state_like(config, optimizer, mesh)))()


def effective(weights: Callable | None, params, step, batch) -> dict[str, jax.Array]:
    """The parameters that the forward pass uses: through a config's `weights`, where it has one."""
    return weights(params, step, batch) if weights else params


def by_row(mesh: Mesh, rows: int) -> NamedSharding:
    """The rows of a batch over the mesh axes data and fsdp; all of them everywhere if that leaves a rest."""
    even = rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return NamedSharding(mesh, PartitionSpec(ROWS) if even else PartitionSpec())


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` live on devices of this process, ascending."""
    where = by_row(mesh, rows).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in where.values()]))


def put(batch: dict, mesh: Mesh, rows: int | None = None) -> dict[str, jax.Array]:
    """A batch onto the devices of all processes; each gives all of it, or its `own_rows` of so many."""
    rows = rows or len(batch["tokens"])
    if jax.process_count() == 1:
        return jax.device_put(batch, by_row(mesh, rows))
    return {k: jax.make_array_from_process_local_data(by_row(mesh, rows), v, (rows, *v.shape[1:]))
            for k, v in batch.items()}


def largest(value: int, mesh: Mesh) -> jax.Array | int:
    """The largest of what the processes give, still on the devices."""
    if jax.process_count() == 1:
        return value
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    each = np.full(jax.local_device_count(), value, np.int32)
    return jnp.max(jax.make_array_from_process_local_data(where, each, (jax.device_count(),)))


@jax.jit
def checksums(state: State) -> dict[str, jax.Array]:
    """The sum of the bits of each parameter and each array of the optimiser, uint32: the same on any mesh."""
    def bits(x):
        return jnp.sum(lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}"), dtype=jnp.uint32)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): bits(x)
            for path, x in jax.tree.leaves_with_path(state)}


def make_step(run, config: ModelConfig, accumulate: int = 1) -> Callable:
    """`step(state, batch, rates, mask) -> (state, metrics)`: pure, so it can be jitted, sharded and mapped.

    run: has optimizer, weights, token_loss, reduce and clip (a `train.Config`). rates: {group: float32}.
    accumulate: the batch is taken in so many parts in turn, whose numerators and denominators are summed.
    An update whose loss or gradient is not finite leaves parameters and optimiser as they were, and counts.
    """
    transforms, members = run.optimizer(table(config)), groups(config)

    def loss(params, batch, step, mask):
        used = effective(run.weights, params, step, batch)
        each = losses(used, batch, mask, config, run.token_loss, {"step": step})
        (numerator, denominator), metrics = run.reduce(each, batch)
        return numerator, (denominator, metrics)

    def sums(params, batch, step, mask):
        """Sums over the batch: ((numerator, (denominator, metrics)), gradient of the numerator)."""
        def gradient(part):
            return jax.value_and_grad(loss, has_aux=True)(params, part, step, mask)

        if accumulate == 1:
            return gradient(batch)
        parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, accumulate, *x.shape[1:]), 1, 0), batch)
        like = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(part)), None

        (values, grads), _ = lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), parts)
        numerator, (denominator, metrics) = values
        return (numerator, (denominator, jax.tree.map(lambda x: x / accumulate, metrics))), grads

    def step(state: State, batch, rates, mask: Mask):
        (numerator, (denominator, metrics)), grads = sums(state.params, batch, state.step, mask)
        share = 1 / jnp.maximum(denominator, 1e-9)
        value = numerator * share
        square = {g: sum(jnp.sum(jnp.square(grads[n]), dtype=value.dtype) for n in names) * share**2
                  for g, names in members.items()}
        norm = jnp.sqrt(sum(square.values()))
        scale = share * (jnp.minimum(1.0, run.clip / jnp.maximum(norm, 1e-9)) if run.clip else 1.0)
        params, opt = {}, {}
        for group, names in members.items():
            clipped = {n: grads[n] * scale for n in names}
            old = {n: state.params[n] for n in names}
            direction, opt[group] = transforms[group].update(clipped, state.opt[group], old)
            params |= {n: old[n] - (rates[group] * direction[n]).astype(old[n].dtype) for n in names}
            metrics[f"{group}/grad_norm"] = jnp.sqrt(square[group])
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        params, opt = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt),
                                   (state.params, state.opt))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics |= {"train/loss": value, "train/grad_norm": norm, "skipped": skipped}
        return State(params, opt, state.step + 1, skipped), metrics

    return step


def compile_step(run, config: ModelConfig, mesh: Mesh, state: State, batch, rates, mask: Mask,
                 accumulate: int = 1):
    """The step as an executable `(state, batch, rates) -> (state, metrics)` that reuses `state`'s memory."""
    out = places(state_like(config, run.optimizer, mesh)), NamedSharding(mesh, PartitionSpec())
    step = jax.jit(make_step(run, config, accumulate), static_argnames="mask", donate_argnums=0,
                   out_shardings=out)
    with jax.set_mesh(mesh):
        return step.lower(state, batch, rates, mask=mask).compile()


def evaluators(run, config: ModelConfig, mesh: Mesh) -> tuple[Callable, Callable]:
    """Jitted, causal: losses(params, step, arrays) -> [b t]; scores(params, step, ids) -> logits [b t v].

    The rows of `arrays` are spread over the mesh; each process gets all of the results.
    """
    def held(params, step, arrays):
        used = effective(run.weights, params, step, arrays)
        return losses(used, arrays, Mask("causal", 0), config)

    def scores(params, step, ids):
        return apply(effective(run.weights, params, step, dict(tokens=ids)), ids, config)

    def on_mesh(function, place=lambda rows: rows):
        jitted = jax.jit(function, out_shardings=NamedSharding(mesh, PartitionSpec()))

        def called(params, step, rows):
            with jax.set_mesh(mesh):
                return jitted(params, step, place(rows))
        return called

    return on_mesh(held, partial(put, mesh=mesh)), on_mesh(scores)


@partial(jax.jit, static_argnames="config")
def probe(before, after, config: ModelConfig) -> dict[str, jax.Array]:
    """How far an update moved each optimiser group's parameters, as a share of their norm."""
    def norm(trees, names):
        return jnp.sqrt(sum(jnp.sum(jnp.square(trees[n])) for n in names))
    moved = {n: after[n] - before[n] for n in after}
    return {f"{group}/update_ratio": norm(moved, names) / norm(before, names)
            for group, names in groups(config).items()}


# ------------------------------------------------------------------------------------------------------ edits

class Model(NamedTuple):
    """What an edit changes: a shape and parameters of that shape. The optimiser follows the edit's policy."""

    config: ModelConfig
    params: dict[str, jax.Array]


class Context(NamedTuple):
    """What an edit may use besides the model."""

    key: jax.Array  # drawn from (seed, step, index of the edit)
    step: int  # steps taken
    tokenizer: Any  # of the run
    batches: Callable[[int], list[dict]]  # the first n batches of the training data, for calibration
    load: Callable[[str], tuple]  # another run's (params, config, tokenizer, apply)


class Edited(NamedTuple):
    """The edited model, what becomes of the optimiser, and whether the function computed is as before.

    policy: for each optimiser group "keep" (the default), "reset", or a function (tree, moment) -> tree for
    what is shaped like the group's parameters, {name: array}; moment: its name in the optimiser, for Adam
    "mu" or "nu". Counts are then kept.
    """

    model: Model
    policy: dict[str, str | Callable[[dict, str], dict]]
    preserves: bool


def mirrored(tree, names, change: Callable, other: Callable = lambda x: x):
    """In an optimiser state, each dictionary x with keys `names` becomes change(x, its field's name), what is
    not in one other(x).
    """
    def mirror(x):
        return isinstance(x, dict) and set(x) == set(names)

    def one(path, x):
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        return change(x, fields[-1] if fields else "") if mirror(x) else other(x)

    return jax.tree.map_with_path(one, tree, is_leaf=mirror)


def carry(opt: dict, first: dict, edited: Edited, old: ModelConfig) -> dict:
    """The optimiser state {group: state} after an edit; `first` is a fresh one for the edited parameters.

    Raises ValueError where an edit's policy leaves a state that does not fit its parameters.
    """
    out, before = {}, groups(old)
    for group, fresh in first.items():
        policy = edited.policy.get(group, "keep") if group in before else "reset"
        if policy == "reset":
            out[group] = fresh
        else:
            out[group] = opt[group] if policy == "keep" else mirrored(opt[group], before[group], policy)
        if jax.tree.map(jnp.shape, out[group]) != jax.tree.map(jnp.shape, fresh):
            raise ValueError(f"an edit's policy {policy!r} for the optimiser group {group!r} "
                             "does not fit its parameters")
    return out


def apply_edits(edits: list[Callable], state: State, config: ModelConfig, optimizer: Callable, mesh: Mesh,
                context: Context) -> tuple[State, ModelConfig]:
    """State and shape after edits in turn; each optimiser group kept, reset or mapped as its edit says."""
    for i, edit in enumerate(edits):
        edited = edit(Model(config, state.params), context._replace(key=jax.random.fold_in(context.key, i)))
        new, params = edited.model
        opt = carry(state.opt, first_opt(params, new, optimizer), edited, config)
        state, config = state.replace(params=params, opt=opt), new
        state = jax.device_put(state, places(state_like(config, optimizer, mesh)))
    return state, config


# ------------------------------------------------------------------------------ phases, worked out in advance

class Course(NamedTuple):
    """What each step of a run is to be, from the config alone. Index s is after s steps; 0 is the start."""

    ends: np.ndarray  # last step of each phase
    models: list[ModelConfig]  # of each phase
    tokens: np.ndarray  # consumed [steps + 1]
    flops: np.ndarray  # model FLOPs consumed [steps + 1]
    rates: dict[str, np.ndarray]  # learning rate of each optimiser group [steps + 1]


def shapes(config, context: Context) -> list[ModelConfig]:
    """The model's shape in each phase: the edits, run on shapes alone."""
    out, current = [], config.model
    for phase in config.phases:
        for edit in phase.edits:
            box = []

            def abstract(key, edit=edit, current=current, box=box):
                box.append(edit(Model(current, init(current, key)), context).model)
                return box[0].params

            jax.eval_shape(abstract, jax.random.key(0))
            current = box[0].config
        out.append(current)
    return out


def plot_course(config, context: Context, lengths: list[tuple]) -> Course:
    """Budgets and rates of every step of a `train.Config`; lengths: `data.batch_lengths` of each phase."""
    models = shapes(config, context)
    steps, size = [p.steps for p in config.phases], [p.batch * p.seq for p in config.phases]
    tokens = np.concatenate([[0], np.cumsum(np.repeat(np.array(size, np.int64), steps))])
    cost = [n * np.array([flops_per_token(m, seq) for seq in rows], float)[picks]
            for m, n, (rows, picks) in zip(models, size, lengths, strict=True)]
    flops = np.concatenate([[0.0], np.cumsum(np.concatenate(cost))])
    ends, spent = np.cumsum(steps), dict(tokens=tokens, flops=flops)
    names = list(dict.fromkeys(g for m in models for g in groups(m)))
    base = curve(config.schedule, spent[config.schedule.budget], 0, int(ends[-1]))
    rates = {group: np.zeros(ends[-1] + 1) for group in names}
    for i, phase in enumerate(config.phases):
        begin, end = int(ends[i]) - phase.steps, int(ends[i])
        if unknown := set(phase.rates) - set(names):
            raise ValueError(f"phases.{i}.rates names {', '.join(unknown)}; allowed are the optimiser groups "
                             f"{', '.join(names)}")
        own = phase.schedule
        rate = curve(own, spent[own.budget], begin, phase.steps) if own else base[begin:end]
        for group in names:
            how = phase.rates.get(group, 1.0)
            rates[group][begin + 1:end + 1] = rate * how if not isinstance(how, Schedule) else \
                curve(how, spent[how.budget], begin, phase.steps)
    return Course(ends, models, tokens, flops, rates)


def due(config, course: Course, step: int) -> list[Callable]:
    """The edits to apply after `step` steps: a phase's own at its beginning, recurring ones within it."""
    for i, phase in enumerate(config.phases):
        begin, end = int(course.ends[i]) - phase.steps, int(course.ends[i])
        if step == begin:
            return list(phase.edits)
        if begin < step < end:
            return [e.apply for e in phase.repeat
                    if (step - begin) % e.every == 0 and not 0 < e.until < step - begin]
    return []
