"""The transformer: one table of named parameters, the forward pass, attention, generation, edits of a model.

Everything about the parameters is derived from `table(config)`: initialisation, counts, FLOPs, sharding,
optimiser groups, growth and forgetting. A model is a flat dictionary `{name: array}`; those with a leading
`layers` axis are blocks, stacked and run by `lax.scan`. Axis letters in einsum strings and comments:

    b batch  t, s position  l layer  d embed  k kv head  g query head of a kv head  h head_dim  f mlp  v vocab
"""
import functools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import get_abstract_mesh

from lib.fields import Count, NotNegative, Positive, Rules, Whole, join, strict
from lib.kernels import Mask, attention, matmul, nll
from lib.sharding import ROWS, RULES, constrain


@strict
@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama-like transformer (pre-norm, RoPE, grouped queries, SwiGLU) and how it is run."""

    layers: Count = 4  # blocks
    embed: Count = 128  # width of the residual stream
    heads: Count = 4  # query heads
    kv_heads: Count = 4  # key and value heads; each serves heads / kv_heads query heads
    head_dim: Count = 32  # width of one head; even, since RoPE rotates pairs
    mlp: Count = 344  # hidden width of the SwiGLU
    vocab: Whole = 0  # pieces of the tokenizer: trained to this many, or 0 for as many as a given one has
    tied: bool = True  # the head is the transposed embedding table
    rope_theta: Positive = 10_000.0  # base of the rotary frequencies
    rope_scaling: tuple[Positive, ...] = ()  # (factor,), or Llama 3's (factor, low, high, old context)
    norm_eps: NotNegative = 1e-6  # epsilon of RMSNorm
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"  # of the computation
    param_dtype: Literal["float32", "float64"] = "float32"  # of parameters and optimiser state
    attention: Literal["auto", "reference", "xla", "cudnn", "splash"] = "auto"  # implementation, see `choose`
    unroll: Whole = 0  # blocks unrolled in the scan over layers; 0 is all: slower to compile, faster to run
    qk_norm: bool = False  # RMSNorm of queries and keys in each head (Dehghani et al. 2023)
    remat: Literal["none", "elementwise", "all"] = "none"  # what of a block the backward pass computes again
    logits_mib: Count = 256  # the loss is computed in chunks of the sequence whose float32 logits fit in this

    def rules(self, path: str) -> Rules:
        """What fields must be to one another."""
        at = functools.partial(join, path)
        yield (self.heads % self.kv_heads,
               f"{at('heads')} is {self.heads}, which {at('kv_heads')} ({self.kv_heads}) does not "
               "divide; allowed is a multiple of it: each key-value head serves as many query heads")
        yield (self.head_dim % 2,
               f"{at('head_dim')} is {self.head_dim}; allowed is an even number: RoPE rotates pairs")
        scaling = self.rope_scaling
        fits = len(scaling) in (0, 1) or (len(scaling) == 4 and scaling[1] < scaling[2])
        yield (not fits,
               f"{at('rope_scaling')} is {scaling}; allowed are (), (factor,) and "
               "(factor, low, high, old context) with low below high")
        yield (self.unroll and self.layers % self.unroll,
               f"{at('unroll')} is {self.unroll}, which does not divide {at('layers')} "
               f"({self.layers}); allowed is a divisor, or 0 for all")


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
    x = constrain(x + times(out, "o"), ROWS)
    n = rms_norm(x, w["mlp_norm"], config.norm_eps)
    gated = jax.nn.silu(times(n, "gate")) * times(n, "up")
    return constrain(x + times(gated, "down"), ROWS), aux


def blocks(params, config: ModelConfig) -> dict[str, jax.Array]:
    """The parameters stacked on a leading `layers` axis."""
    return {name: params[name] for name, p in table(config).items() if p.axes[0] == "layers"}


def forward(params, tokens, segments, positions, mask: Mask, config: ModelConfig, prefix=None) -> jax.Array:
    """Final normalised states [b t d] of tokens [b t], in `config.dtype`."""
    angles = rope(positions, config)

    def layer(x, w):
        return block(x, w, angles, lambda q, k, v: (
            attention(q, k, v, mask, segments, prefix, config.attention), None), config)

    if config.remat != "none":
        kept = jax.checkpoint_policies.save_only_these_names(*["product"] * (config.remat == "elementwise"))
        layer = jax.checkpoint(layer, policy=kept)
    embed = constrain(params["embed"], RULES["vocab"], None)  # one gather of the table, not one for each token
    x = constrain(embed[tokens].astype(config.dtype), ROWS)
    x, _ = lax.scan(layer, x, blocks(params, config), unroll=config.unroll or config.layers)
    return rms_norm(x, params["norm"], config.norm_eps)


def logits(params, states, config: ModelConfig) -> jax.Array:
    """[b t v] in float32 or wider, from final states [b t d]."""
    wide = jnp.promote_types(config.dtype, jnp.float32)
    head = params["embed"].T if config.tied else params["head"]
    out = matmul(states.reshape(-1, config.embed), head, ("embed", "vocab"), wide)  # as in `dense`
    return out.reshape(*states.shape[:2], config.vocab)


def apply(params, ids, config: ModelConfig) -> jax.Array:
    """Logits [b t v] of ids [b t], each row one causal segment."""
    one = jnp.ones_like(ids)
    return logits(params, forward(params, ids, one, jnp.cumsum(one, 1) - 1, Mask("causal", 0), config), config)


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
    states = forward(params, tokens, batch["segments"], batch["positions"], mask, config, prefix)
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


def reparametrised(reparam: Callable | None, params, step, batch) -> dict[str, jax.Array]:
    """The parameters that the forward pass uses: through a config's `reparam`, where it has one."""
    return reparam(params, step, batch) if reparam else params


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
