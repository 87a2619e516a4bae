"""A Llama-like transformer: its parameters, what it computes, and what an edit of it is.

`table(config)` lists every parameter with named axes. Initialisation, counts, FLOPs, sharding,
optimiser groups, growth and forgetting are derived from it. Parameters are a flat dictionary
`{name: array}`. Those with a leading `layers` axis belong to the blocks.

A model is this table and two functions, `llama` and `head_logits`. A config may put others in their
place: rows of the table by `ModelConfig.rows`, states by `forward`, logits by `outputs`.

Read `table`, `block`, `stream`, `llama`, `head_logits` and `losses`, in this order. Products,
attention and nats are computed by fast paths in lib/kernels.py.

Letters of axes in shapes and in einsum strings:

    b batch    t, s position          d embed       f mlp    v vocab
    k key-value head    g query head of a key-value head     h head_dim
"""
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import get_abstract_mesh

from lib.bind import bind
from lib.fields import (
    FROM_0,
    Layers,
    NotNegative,
    Positive,
    Rules,
    Size,
    Whole,
    at_most,
    join,
    strict,
)
from lib.kernels import (
    Mask,
    attention,
    dense,
    here,
    keeping_arguments,
    kept,
    lookup,
    nll,
    over_chunks,
    residual,
    weighted_nats,
)
from lib.products import float32_or_wider
from lib.seams import (
    FLOPS,
    FORWARD,
    INIT,
    OUTPUTS,
    REPARAM,
    ROWS,
    TOKEN_LOSS,
    is_array,
    require_gave,
)
from lib.sharding import is_local

Params = dict[str, jax.Array]


@strict
@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer (pre-norm, RoPE, grouped queries, SwiGLU) and how it is run."""

    layers: Layers = 4  # blocks
    embed: Size = 128  # width of the residual stream
    heads: Size = 4  # query heads
    kv_heads: Size = 4  # key and value heads; each serves heads / kv_heads query heads
    head_dim: Size = 32  # width of one head; even, since RoPE rotates pairs
    mlp: Size = 344  # hidden width of the SwiGLU
    # pieces of the tokenizer that is trained; 0: as many as a given one has
    vocab: Annotated[int, FROM_0, at_most(2**24)] = 0
    tied: bool = False  # the head is the transposed embedding table
    rope_theta: Positive = 10_000.0  # base of the rotary frequencies
    # (factor,), Llama 3's (factor, low, high, context), or YaRN's, see `yarn`
    rope_scaling: tuple[Positive, ...] = ()
    norm_eps: NotNegative = 1e-6  # epsilon of RMSNorm
    dtype: Literal["bfloat16", "float32", "float64"] = "float32"  # of the computation
    param_dtype: Literal["float32", "float64"] = "float32"  # of parameters and optimiser state
    # how attention is computed, see lib/kernels.py
    attention: Literal[
        "auto", "reference", "xla", "cudnn", "cudnn_packed", "cudnn_causal", "splash"
    ] = "auto"
    # layers compiled one by one: more are slower to compile and faster to run; 0 is by device,
    # all of them on CPUs and GPUs and one on TPUs
    unroll: Whole = 0
    qk_norm: bool = False  # RMSNorm of queries and keys in each head (Dehghani et al. 2023)
    remat: Literal["none", "elementwise", "all"] = "none"  # what the backward pass computes again
    # the loss is computed in chunks whose logits fit in this; 0 is by device: 256 on CPUs or 1024
    logits_mib: Whole = 0
    # config, rows of the plain Llama -> the rows that are stored
    rows: Annotated[Callable, ROWS] | None = None
    # params, batch, mask, config -> states [b t d], or (states, {name: [b t ...]} for the loss)
    forward: Annotated[Callable, FORWARD] = field(default_factory=lambda: llama)
    # params, states [b t d], batch, config -> logits [b t v], or whatever the loss takes
    outputs: Annotated[Callable, OUTPUTS] = field(default_factory=lambda: head_logits)
    # config, row length -> FLOPs of training on a token
    flops: Annotated[Callable, FLOPS] = field(default_factory=lambda: flops_per_token)

    def rules(self, path: str) -> Rules:
        """What fields must be to one another."""
        at = partial(join, path)
        yield (self.heads % self.kv_heads,
               f"{at('heads')} is {self.heads}, which {at('kv_heads')} ({self.kv_heads}) does not "
               "divide; allowed is a multiple of it: each key-value head serves as many "
               "query heads")
        yield (self.head_dim % 2,
               f"{at('head_dim')} is {self.head_dim}; "
               "allowed is an even number: RoPE rotates pairs")
        scaling = self.rope_scaling
        fits = len(scaling) in (0, 1) or (len(scaling) in (4, 5) and scaling[1] < scaling[2])
        yield (not fits,
               f"{at('rope_scaling')} is {scaling}; allowed are (), (factor,), "
               "(factor, low, high, old context) and YaRN's (factor, slow, fast, old context, "
               "attention factor), with low below high and slow below fast")
        yield (self.unroll and self.layers % self.unroll,
               f"{at('unroll')} is {self.unroll}, which does not divide {at('layers')} "
               f"({self.layers}); allowed is a divisor, or 0 for what suits the device")


@dataclass(frozen=True)
class Param:
    """One row of the table.

    Axes of the plain Llama are `layers vocab embed kv_heads q_per_kv head_dim mlp`. The free axes
    `rank in out expert state` are whole on each device. An axis of another model in the same table
    has its prefix, such as `teacher/embed`. It is split over devices as `embed` is, and growth of
    the model leaves it alone.
    """

    axes: tuple[str, ...]  # their names
    shape: tuple[int, ...]
    init: float | Callable | None  # deviation of a normal draw; None: ones; or key, shape, dtype ->
    group: str = ""  # of the optimiser; empty: by the axes, see `group_of`
    dtype: str = ""  # empty: `ModelConfig.param_dtype`

    def __post_init__(self):
        object.__setattr__(self, "group", self.group or group_of(self.axes))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def whole(self) -> bool:
        """Has it a size for each axis?"""
        sizes = all(isinstance(size, int) and size > 0 for size in self.shape)
        return sizes and len(self.shape) == len(self.axes)

    @property
    def layered(self) -> bool:
        """Is it stacked over the blocks of the model?"""
        return self.axes[:1] == ("layers",)


def group_of(axes: tuple[str, ...]) -> str:
    """The optimiser group of a parameter with these axes.

    embed (lookup table), head (untied output), matrix (decays) or vector (does not decay).
    """
    if axes[:1] == ("vocab",):
        return "embed"
    if "vocab" in axes:
        return "head"
    own = [axis for axis in axes if axis != "layers"]
    return "matrix" if len(own) > 1 else "vector"


def axis_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of every named axis."""
    return dict(
        layers=config.layers,
        vocab=config.vocab,
        embed=config.embed,
        kv_heads=config.kv_heads,
        q_per_kv=config.heads // config.kv_heads,
        head_dim=config.head_dim,
        mlp=config.mlp,
    )


def table(config: ModelConfig) -> dict[str, Param]:
    """Every parameter that is stored, by name: what `rows` makes of those of the plain Llama."""
    rows = plain_table(config)
    if config.rows is None:
        return rows
    made = config.rows(config, rows)
    require_gave(isinstance(made, dict), ROWS, config.rows, made)
    for name, row in made.items():
        fine = isinstance(name, str) and isinstance(row, Param)
        if config.vocab:  # else some sizes are 0 until the tokenizer is known
            fine = fine and row.whole
        require_gave(fine, ROWS, config.rows, {name: row}, ", with a size above 0 for each axis")
    return made


def plain_table(config: ModelConfig) -> dict[str, Param]:
    """Every parameter of the plain Llama, by name.

    What reads the residual stream is drawn with standard deviation 1/sqrt(embed). What writes to it
    begins as 0, so that the stream begins as the embedding. A head of its own is drawn small, so
    that the first logits are near 0, and its embeddings large, so that the blocks' first outputs
    are small beside them (nanochat, Karpathy 2025). A tied table cannot be both: it is drawn as
    what reads the stream. configs/baselines/recipe.py compares each of these with what was before.
    """
    size = axis_sizes(config)
    read = config.embed**-0.5
    write = 0.0

    def param(axes: str, init: float | None) -> Param:
        names = tuple(axes.split())
        shape = tuple(size[axis] for axis in names)
        return Param(names, shape, init)

    rows = {
        "embed": param("vocab embed", read if config.tied else 0.8),
        "attn_norm": param("layers embed", None),
        "q": param("layers embed kv_heads q_per_kv head_dim", read),
        "k": param("layers embed kv_heads head_dim", read),
        "v": param("layers embed kv_heads head_dim", read),
        "o": param("layers kv_heads q_per_kv head_dim embed", write),
        "mlp_norm": param("layers embed", None),
        "gate": param("layers embed mlp", read),
        "up": param("layers embed mlp", read),
        "down": param("layers mlp embed", write),
        "norm": param("embed", None),
    }
    if config.qk_norm:
        rows["q_norm"] = param("layers head_dim", None)
        rows["k_norm"] = param("layers head_dim", None)
    if not config.tied:
        rows["head"] = param("embed vocab", 0.001)
    return rows


def draw(name: str, param: Param, key: jax.Array, dtype) -> jax.Array:
    """The initial value of one parameter.

    A function of (key, name): the same on any number of devices, whatever else is drawn.
    """
    if param.init is None:
        return jnp.ones(param.shape, dtype)
    if param.init == 0:
        return jnp.zeros(param.shape, dtype)
    own = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if callable(param.init):
        value = param.init(own, param.shape, dtype)
        fine = is_array(value) and value.shape == param.shape
        require_gave(fine, INIT, param.init, value, f", {param.shape} for {name}")
        return value.astype(dtype)
    normal = jax.random.normal(own, param.shape, dtype)
    return param.init * normal


def init(config: ModelConfig, key: jax.Array) -> Params:
    """All parameters, drawn from the table in their dtypes."""
    rows = table(config)
    return {
        name: draw(name, param, key, dtype_of(param, config))
        for name, param in rows.items()
    }


def dtype_of(param: Param, config: ModelConfig) -> jnp.dtype:
    """The dtype that a parameter is stored in."""
    return jnp.dtype(param.dtype or config.param_dtype)


def groups(config: ModelConfig) -> dict[str, list[str]]:
    """Optimiser groups in the table's order: `{group: [parameter names]}`."""
    members: dict[str, list[str]] = {}
    for name, param in table(config).items():
        members.setdefault(param.group, []).append(name)
    return members


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(param.size for param in table(config).values())


def flops_per_token(config: ModelConfig, seq: int) -> int:
    """FLOPs of training the plain Llama on a token.

    6 matmul parameters + 6 layers heads head_dim seq. The head counts as a matmul parameter, tied
    or not. Causal attention is counted once (PaLM, appendix B, halved for causality).
    Rematerialisation is not counted.
    """
    rows = plain_table(config).values()
    matmul = sum(param.size for param in rows if param.group in ("matrix", "head"))
    if config.tied:
        matmul += config.vocab * config.embed
    attended = config.layers * config.heads * config.head_dim * seq
    return 6 * matmul + 6 * attended


@partial(keeping_arguments, static=(2,))
def rms_norm(x, gain, eps):
    """x / rms(x) · gain over the last axis (Zhang & Sennrich 2019).

    The mean square is in float32 or wider, the result in the dtype of x. The gradient keeps x.
    """
    wide = x.astype(float32_or_wider(x.dtype))
    mean_square = jnp.mean(wide * wide, -1, keepdims=True)
    normed = wide * lax.rsqrt(mean_square + eps)
    return normed.astype(x.dtype) * gain.astype(x.dtype)


def rope(positions, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [b t h/2] of the rotary angles of positions [b t] (RoFormer, Su et al. 2021).

    The angles are in float32 or wider, the results in `config.dtype`.
    """
    wide = float32_or_wider(config.dtype)
    pair = jnp.arange(0, config.head_dim, 2, dtype=wide)
    frequency = config.rope_theta ** -(pair / config.head_dim)
    longer = 1.0
    if len(config.rope_scaling) == 5:
        *scaling, longer = config.rope_scaling
        frequency = yarn(frequency, config.rope_theta, *scaling)
    elif config.rope_scaling:
        frequency = slowed(frequency, *config.rope_scaling)
    angle = positions[..., None].astype(wide) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if longer != 1:
        cos, sin = cos * longer, sin * longer
    return cos.astype(config.dtype), sin.astype(config.dtype)


def slowed(frequency, factor, low=1.0, high=2.0, context=0.0):
    """Rotary frequencies divided by a factor (Chen et al. 2023).

    Given the length of the old context, as in Llama 3: a frequency of more than `high` turns
    within that context stays, one of less than `low` turns is divided, others are in between.
    """
    turns = context * frequency / (2 * math.pi)
    stays = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (stays + (1 - stays) / factor)


def yarn(frequency, theta, factor, slow, fast, context):
    """Rotary frequencies [h/2] of YaRN (Peng et al. 2023, section 3.2).

    A pair of more than `fast` turns within the old context stays, one of fewer than `slow` turns is
    divided by the factor, those in between by their place among the pairs. YaRN multiplies cosine
    and sine by its attention factor besides, the fifth number of `ModelConfig.rope_scaling`.
    """
    pairs = len(frequency)

    def pair_of(turns):
        return pairs * math.log(context / (2 * math.pi * turns)) / math.log(theta)

    first = max(math.floor(pair_of(fast)), 0)
    last = min(math.ceil(pair_of(slow)), 2 * pairs - 1)
    divided = (jnp.arange(pairs) - first) / max(last - first, 0.001)
    divided = jnp.clip(divided, 0, 1).astype(frequency.dtype)
    return frequency * (divided / factor + 1 - divided)


def rotate(x, cos, sin):
    """Rotate x [b t ... h] by its position; the pairs are (i, i + h/2), as in Llama checkpoints.

    Of angles for fewer than h/2 pairs the rest of a head stays as it is.
    """
    heads = [1] * (x.ndim - 3)
    b, t, half = cos.shape
    if 2 * half < x.shape[-1]:
        turns, stays = jnp.split(x, [2 * half], axis=-1)
        return jnp.concatenate([rotate(turns, cos, sin), stays], axis=-1)
    cos = cos.reshape(b, t, *heads, half)
    sin = sin.reshape(b, t, *heads, half)
    one, two = jnp.split(x, 2, axis=-1)
    turned = [one * cos - two * sin, two * cos + one * sin]
    return jnp.concatenate(turned, axis=-1)


def attention_mixer(x, w, times: Callable, angles, attend: Callable, config: ModelConfig):
    """The plain mixer of a block, attention: normed x [b t d] -> ([b t d], what `attend` keeps)."""
    q = times(x, "q")
    k = times(x, "k")
    v = times(x, "v")
    if config.qk_norm:
        q = rms_norm(q, w["q_norm"], config.norm_eps)
        k = rms_norm(k, w["k_norm"], config.norm_eps)
    q = rotate(q, *angles)
    k = rotate(k, *angles)
    mixed, kept = attend(q, k, v)
    return times(mixed, "o"), kept


def gated_mlp(x, w, times: Callable, activation: Callable = jax.nn.silu):
    """The plain MLP of a block, SwiGLU (Shazeer 2020): normed x [b t d] -> [b t d]."""
    gate = times(x, "gate")
    up = times(x, "up")
    return times(gated(gate, up, activation), "down")


@partial(keeping_arguments, static=(2,))
def gated(gate, up, activation: Callable):
    """activation(gate) · up [b t f]. The gradient keeps gate and up."""
    return activation(gate) * up


def block(
    x,
    w,
    angles,
    attend: Callable,
    config: ModelConfig,
    dense: Callable = dense,
    mixer: Callable | None = None,
    mlp: Callable = gated_mlp,
):
    """One pre-norm block, attention and SwiGLU: x [b t d] -> (x, what was kept).

    w: the block's parameters. angles: see `rope`. dense: (x, w, axes of w) -> their product.
    attend: q [b t k g h], k and v [b t k h] -> (means of v [b t k g h], anything to keep).
    mixer: in place of attention, (normed x [b t d], w, times [, before]) -> ([b t d], anything to
    keep), where times(x, name) is the product of x with one of w, and `before` is x itself.
    mlp: in place of the SwiGLU, (normed x, w, times) -> [b t d].
    """
    times = products(w, config, dense)
    n = rms_norm(x, w["attn_norm"], config.norm_eps)
    if mixer:
        mixed, kept = bind(mixer, before=x)(n, w, times)
    else:
        mixed, kept = attention_mixer(n, w, times, angles, attend, config)
    x = residual(x, mixed)

    n = rms_norm(x, w["mlp_norm"], config.norm_eps)
    x = residual(x, mlp(n, w, times))
    return x, kept


def products(w, config: ModelConfig, dense: Callable = dense) -> Callable:
    """(x, name) -> x times the matrix of that name among w, the parameters of a block."""
    rows = table(config) | plain_table(config)

    def times(x, name):
        axes = rows[name].axes[1:]  # without `layers`
        return dense(x, w[name], axes)

    return times


def blocks(params: Params, config: ModelConfig) -> Params:
    """Those of the parameters that are stacked over the blocks, on a leading `layers` axis."""
    rows = table(config) | plain_table(config)
    return {name: params[name] for name in rows if rows[name].layered and name in params}


def stream(
    params: Params,
    x,
    batch,
    mask: Mask,
    config: ModelConfig,
    first: int = 0,
    last: int | None = None,
    attend: Callable | None = None,
    visit: Callable | None = None,
    mixer: Callable | None = None,
    mlp: Callable = gated_mlp,
    body: Callable | None = None,
):
    """(x [b t d] after the blocks first, first + 1, .. last - 1; what was kept in each).

    x: the residual stream before block `first`. batch: `segments` and `positions` [b t]; for a
    prefix mask `prefix` [b t] too. last: None goes to the end.
    attend(q, k, v [, layer]) -> (means of v, anything to keep), mixer(x, w, times [, layer,
    before]), mlp(x, w, times): see `block`. body(x, w, times [, layer]) -> (x, anything to keep)
    stands in the place of the whole block. visit(x, layer, w) -> (x, anything to keep) sees or
    changes the stream after a block.
    What attend, mixer or body, and visit, keep comes as a pair, each stacked over these blocks.
    """
    attend = attend or plain_attend(batch, mask, config)
    body = body or plain_body(batch, attend, mixer, mlp, config)

    def layer(x, numbered):
        number, w = numbered
        x, kept = bind(body, layer=number)(x, w, products(w, config))
        x, seen = visit(x, number, w) if visit else (x, None)
        return x, (kept, seen)

    stacked = {name: w[first:last] for name, w in blocks(params, config).items()}
    numbers = jnp.arange(config.layers)[first:last]
    of_device = 1 if here()[0] == "tpu" else len(numbers)
    unroll = max(1, min(config.unroll or of_device, len(numbers)))
    return lax.scan(rematerialised(layer, config), x, (numbers, stacked), unroll=unroll)


def plain_body(
    batch,
    attend: Callable,
    mixer: Callable | None,
    mlp: Callable,
    config: ModelConfig,
) -> Callable:
    """The `body` of `stream` unless a config gives one: a block, told its layer."""
    angles = rope(batch["positions"], config)

    def body(x, w, times, layer):
        attending = bind(attend, layer=layer)
        mixing = bind(mixer, layer=layer) if mixer else None
        return block(
            x,
            w,
            angles,
            attending,
            config,
            mixer=mixing,
            mlp=mlp,
        )

    return body


def plain_attend(batch, mask: Mask, config: ModelConfig) -> Callable:
    """What a block attends by unless a config says otherwise: (q, k, v) -> (means of v, None)."""
    segments, prefix = batch["segments"], batch.get("prefix")

    def attend(q, k, v):
        return attention(q, k, v, mask, segments, prefix, config.attention), None

    return attend


def embedded(params: Params, batch, config: ModelConfig) -> jax.Array:
    """The residual stream [b t d] before the first block, in `config.dtype`."""
    return lookup(params["embed"], batch["tokens"], config.dtype)


def llama(params: Params, batch, mask: Mask, config: ModelConfig) -> jax.Array:
    """The plain `forward`: final normalised states [b t d], in `config.dtype`.

    batch: `tokens`, `segments` and `positions` [b t]; for a prefix mask `prefix` [b t] too.
    """
    x, _ = stream(params, embedded(params, batch, config), batch, mask, config)
    return rms_norm(x, params["norm"], config.norm_eps)


def forward(params: Params, batch, mask: Mask, config: ModelConfig) -> tuple[jax.Array, dict]:
    """(final states [b t d], {name: [b t ...]} of what else the loss is to see)."""
    found = config.forward(params, batch, mask, config)
    pair = found if isinstance(found, tuple) else (found, {})
    fine = len(pair) == 2 and isinstance(pair[1], dict)
    place = batch["tokens"].shape[:2]
    fine = fine and all(has_shape(x, place) for x in (pair[0], *pair[1].values()))
    require_gave(fine, FORWARD, config.forward, found, f", where [b t] is {place}")
    return pair


def has_shape(x, begin: tuple[int, ...]) -> bool:
    """Is this an array whose shape begins so?"""
    return is_array(x) and x.shape[:len(begin)] == begin


def rematerialised(layer: Callable, config: ModelConfig) -> Callable:
    """`layer`, of which the backward pass computes again what `config.remat` says."""
    if config.remat == "none":
        return layer
    policy = kept if config.remat == "elementwise" else jax.checkpoint_policies.nothing_saveable
    return jax.checkpoint(layer, policy=policy)


def head_logits(params: Params, states, batch, config: ModelConfig) -> jax.Array:
    """The plain `outputs`: logits [b t v] in float32 or wider, from final states [b t d]."""
    wide = float32_or_wider(config.dtype)
    return dense(states, head_of(params, config), ("embed", "vocab"), wide)


def head_of(params: Params, config: ModelConfig) -> jax.Array:
    """The head [d v]."""
    return params["embed"].T if config.tied else params["head"]


def whole(batch) -> dict[str, jax.Array]:
    """A batch of ids [b t], or of a batch's arrays; a row that does not say is one segment."""
    if not isinstance(batch, dict):
        batch = {"tokens": batch}
    first = next(iter(batch.values()))
    one = jnp.ones(first.shape[:2], jnp.int32)
    zero = jnp.zeros_like(one)
    positions = jnp.cumsum(one, 1) - 1
    return dict(tokens=zero, segments=one, positions=positions, source=zero) | batch


CAUSAL = Mask("causal", 0)


def apply(params: Params, batch, config: ModelConfig, mask: Mask = CAUSAL) -> jax.Array:
    """Logits [b t v] of ids [b t], each row one segment, or of a batch, see `whole`."""
    batch = whole(batch)
    states, _ = forward(params, batch, mask, config)
    return config.outputs(params, states, batch, config)


def cross_entropy(logits, batch, extras, z: float = 0.0) -> jax.Array:
    """The plain `token_loss`: nats [b t] of `batch["targets"]` under logits [b t v].

    z: the weight of the squared log normaliser, which keeps logits small (PaLM, section 5: 1e-4).
    """
    plain = nll(logits, batch["targets"])
    if not z:
        return plain
    normaliser = jax.nn.logsumexp(logits, -1)
    return plain + z * jnp.square(normaliser)


def weighted_mean(losses, batch):
    """The plain `reduce`: ((numerator, denominator), metrics).

    The mean of losses [b t] under `batch["weights"]` [b t] is numerator / denominator.
    """
    weights = batch["weights"]
    numerator = jnp.sum(losses * weights)
    denominator = jnp.sum(weights)
    return (numerator, denominator), {}


def losses(
    params: Params,
    batch,
    mask: Mask,
    config: ModelConfig,
    token_loss: Callable = cross_entropy,
    extras: dict | None = None,
) -> jax.Array:
    """Loss of each position [b t], unweighted, float32 or wider; see `chunked_losses`."""
    states, given = forward(params, batch, mask, config)
    return chunked_losses(params, states, given, batch, config, token_loss, extras or {})


def chunked_losses(
    params: Params,
    states,
    given: dict,
    batch,
    config: ModelConfig,
    token_loss: Callable,
    extras: dict,
) -> jax.Array:
    """Loss of each position [b t], from final states [b t d] and what `forward` gave besides.

    token_loss: (logits [b c v], batch [b c ...], extras) -> losses [b c], for chunks of c
    positions. So the logits of all positions never exist at once. Its extras are `params`,
    `config`, what was `given` [b c ...], and `extras`.
    """
    b, t = states.shape[:2]
    chunk = chunk_length(b, t, config)
    extras = extras | {"params": params, "config": config}

    def loss(states, part, given):
        scores = config.outputs(params, states, part, config)
        require_gave(is_array(scores), OUTPUTS, config.outputs, scores)
        each = token_loss(scores, part, extras | given)
        place = states.shape[:2]
        fine = is_array(each) and each.shape == place and jnp.issubdtype(each.dtype, jnp.floating)
        require_gave(fine, TOKEN_LOSS, token_loss, each, f", where [b c] is {place}")
        return each

    if chunk == t:
        return loss(states, batch, given)
    loss_again = jax.checkpoint(loss)  # the backward pass computes a chunk's logits again
    parts = states, batch, given
    return over_chunks(lambda part: loss_again(*part), parts, chunk)


def weighted_sum(params: Params, states, batch, config: ModelConfig) -> jax.Array:
    """The numerator of `weighted_mean` of `cross_entropy` of `head_logits`, at once.

    Logits are in `config.dtype`, sums of them in float32 or wider.
    """
    head = head_of(params, config)
    width = min(4, jnp.dtype(config.dtype).itemsize)
    chunk = chunk_length(*states.shape[:2], config, width)
    return weighted_nats(states, head, batch["targets"], batch["weights"], chunk)


def chunk_length(b: int, t: int, config: ModelConfig, width: int = 4) -> int:
    """The largest divisor of t such that so many positions' logits fit in `config.logits_mib`.

    Of b rows, which the devices share, in `width` bytes.
    """
    devices = max(1, get_abstract_mesh().size)  # without a mesh the size is 0
    if is_local():
        devices = 1
    logits = b * config.vocab // devices
    of_device = 256 if here()[0] == "cpu" else 1024
    mib = config.logits_mib or of_device
    fit = mib * 2**20 // (width * max(1, logits))
    longest = min(t, max(1, fit))
    divisors = (n for n in range(longest, 0, -1) if t % n == 0)
    return next(divisors)


def reparametrised(
    reparam: Callable | None, params: Params, step, batch, config: ModelConfig
) -> Params:
    """The parameters that the forward pass uses: through a config's `reparam`, if it has one."""
    if reparam is None:
        return params
    used = bind(reparam, config=config)(params, step, batch)
    fine = isinstance(used, dict) and all(map(is_array, used.values()))
    require_gave(fine, REPARAM, reparam, used)
    if config.forward is llama:
        for name, row in plain_table(config).items():
            fine = has_shape(used.get(name), row.shape)
            more = f", {name} with the shape {row.shape} among them"
            require_gave(fine, REPARAM, reparam, {name: used.get(name)}, more)
    return used


class Model(NamedTuple):
    """What an edit changes: a shape, and parameters of that shape."""

    config: ModelConfig
    params: Params


class Context(NamedTuple):
    """What an edit may use besides the model."""

    key: jax.Array  # drawn from (seed, step, index of the edit)
    step: int  # steps taken
    tokenizer: Any  # of the run
    batches: Callable[[int], list[dict]]  # the n batches from here on, for calibration
    load: Callable[[str], tuple]  # another run's (params, config, tokenizer, apply)


class Edited(NamedTuple):
    """What an edit returns: the new model, what becomes of the optimiser, and what it promises.

    policy: {optimiser group: "keep", "reset" or a function}; a group that is not named is kept.
    The function (tree, moment) -> tree changes the optimiser's moments, and the counts are kept.
    Its tree is {name: array}, shaped like the group's parameters, and the moment is the name of
    the field that holds it: for Adam "mu" or "nu".
    preserves: whether the new model computes the same function as the old one.
    borrowed: {parameter: "RUN@STEP:NAME"}, those that are another run's, unchanged. While they are
    frozen, checkpoints name that run in their place.
    """

    model: Model
    policy: dict[str, str | Callable[[dict, str], dict]]
    preserves: bool
    borrowed: dict[str, str] = {}
