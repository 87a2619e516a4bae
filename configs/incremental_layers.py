"""Incremental layers: new ones at random on the old ones, frozen for a while; does it pay? (It should not.)

Arms, with one final shape and one budget of model FLOPs, the shallow phase included (a frozen layer is
charged as any other, though its gradient is not used):

    frozen       two layers; then four, the upper two new, the lower two frozen; then all train
    unfrozen     the same, but all train from the growth on
    scratch      four layers from the start

"On the Effectiveness of Incremental Training of LLMs" (arXiv 2411.18700): what looks ahead early needs more
FLOPs in the end than the plain run. A negative control for configs that copy layers. An arm by hand, some
minutes on two CPU cores:

    python train.py configs/incremental_layers.py:frozen --seed 1 --name frozen-1

Freezing takes two functions, for any config: `freeze` (a `weights`) stops gradients, so that the clipped norm
is of what trains, and `asleep` (an `optimizer`) keeps weight decay and moments off what has no gradient. To
freeze whole optimiser groups, embeddings say, `Phase.rates` of 0 is enough.
"""
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax

from data import DataConfig, Source, stdlib
from model import ModelConfig, adamw, flops_per_token, stack, table
from train import Config, Phase, Schedule

BLOCK = {name: p.axes[0] == "layers" for name, p in table(ModelConfig(tied=False)).items()}


def freeze(params, step, batch, begin: int = 0, until: int = 0, layers: int = 0, names: str = "*"):
    """A `weights`: no gradient at batches begin+1 .. until for the parameters whose names fit a pattern.

    Of blocks the first `layers` layers, or with 0 all, and then other parameters too.
    """
    now, out = (step >= begin) & (step < until), {}
    for name, x in params.items():
        if not fnmatch(name, names) or (layers and not BLOCK[name]):
            out[name] = x
        else:
            part = jnp.arange(len(x)) < layers if layers else jnp.ones(1, bool)
            frozen = now & part.reshape(-1, *(1,) * (x.ndim - 1))
            out[name] = jnp.where(frozen, lax.stop_gradient(x), x)
    return out


def asleep(rows, weight_decay: float = 0.1) -> dict[str, optax.GradientTransformation]:
    """An `optimizer`: AdamW, under which what has no gradient at all stays as it is, bit for bit.

    By layer of blocks and else by parameter: no decay, no motion of moments. (Decoupled decay and old moments
    move a parameter whose gradient is zero.) The count, which is the group's, goes on.
    """
    inner = adamw(rows, weight_decay=weight_decay)

    def awake(name, gradient):
        axes = tuple(range(rows[name].axes[0] == "layers", gradient.ndim))
        return jnp.any(gradient != 0, axis=axes, keepdims=True)

    def wrap(transform):
        def update(gradients, state, params):
            directions, after = transform.update(gradients, state, params)
            on = {n: awake(n, g) for n, g in gradients.items()}

            def mirror(x):
                return isinstance(x, dict) and x.keys() == gradients.keys()

            def select(new, old):
                return {n: jnp.where(on[n], new[n], old[n]) for n in new} if mirror(new) else new

            return select(directions, {n: jnp.zeros_like(d) for n, d in directions.items()}), jax.tree.map(
                select, after, state, is_leaf=mirror)

        return optax.GradientTransformation(transform.init, update)

    return {group: wrap(transform) for group, transform in inner.items()}


# ------------------------------------------------------------------------------------------------------ study

shallow = ModelConfig(layers=2, embed=192, heads=6, kv_heads=6, head_dim=32, mlp=512, vocab=2048)
deep = replace(shallow, layers=4)
BATCH, SEQ = 8, 256
SHALLOW, SCRATCH = 300, 600  # steps of two layers, and of four from scratch
DEEP = round(SCRATCH - SHALLOW * flops_per_token(shallow, SEQ) / flops_per_token(deep, SEQ))  # equal FLOPs
random_on_top = partial(stack, layers=(0, 1, -1, -1), new="random")

scratch = Config(
    model=deep,
    data=DataConfig(sources={"stdlib": Source(stdlib)}, shard_tokens=1_048_576),
    phases=(Phase(steps=SCRATCH, batch=BATCH, seq=SEQ),),
    schedule=Schedule(shape="wsd", peak=4e-3, warmup=20, decay=0.4, final=0.05),
    eval_every=100,
    prompts=("def ", "class "),
)
unfrozen = replace(scratch, model=shallow, phases=(
    Phase(steps=SHALLOW, batch=BATCH, seq=SEQ),
    Phase(steps=DEEP, batch=BATCH, seq=SEQ, edits=(random_on_top,))))
frozen = replace(unfrozen, optimizer=asleep, weights=partial(
    freeze, begin=SHALLOW, until=SHALLOW + DEEP // 2, layers=shallow.layers))
arms = {"frozen": frozen, "unfrozen": unfrozen, "scratch": scratch}
config = arms["frozen"]
