"""Stacking: is a deep model better grown from a shallow one than trained at full depth from the start?

Arms, all with the same total of training FLOPs (the base's included) and the same rate over them, but for
`short`, `scratch_tokens` and those named 4x:

    scratch        8 layers from the start: the control
    stack          2 layers for an eighth of the FLOPs, then four times over (G_stack, Du et al. 2024)
    short          8 layers from scratch, for the steps alone that `stack` takes at 8, fully decayed: what the
                   base is worth, whatever it costs
    identity       as `stack`, but three copies after each layer, whose outputs are zero at first: the
                   function is kept (G_zero)
    random_on_top  as `stack`, but with six new layers on top, drawn at random
    annealed       so too, and what the new layers add is faded in over 100 steps (G_random)
    gradual, middle                         2, 4, 6 and 8 layers: the top two copied on top (gradual stacking)
                                            or the middle two after themselves (MIDAS); moments are kept
    stack_g2, stack_g8                      growth factors 2 (from 4 layers) and 8 (from 1)
    stack_early, stack_late                 after a sixteenth and after a quarter of the FLOPs
    scratch_tokens                          as many steps as `stack` takes, at 8 layers: more FLOPs
    scratch_4x, stack_4x                    four times the FLOPs

The paper: scratch takes 49 % more FLOPs at 1.1B, less in longer runs; No Train No Gain: the gain may vanish
there. As in the paper, growth resets the optimiser and warms up again, the base's rate does not decay, and
the base's text is not seen again (within an epoch). All decay over the last 40 % of their FLOPs.

    python train.py study configs/stacking.py --jobs 2                   some 80 minutes on two CPU cores
    python train.py study configs/stacking.py --arms stack,identity,random_on_top
    python train.py configs/stacking.py:stack                            one arm by hand, five minutes
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from data import DataConfig, Source, stdlib
from lib.edits import stack
from lib.schedule import Schedule
from model import Edited, ModelConfig, flops_per_token
from train import Config, Phase

DECAY = 0.4  # share of the FLOPs at the end over which the rate falls
plain = Phase(steps=600, batch=8, seq=256)
config = Config(
    model=ModelConfig(layers=8, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=1024),
    data=DataConfig(sources={"stdlib": Source(stdlib)}, shard_tokens=1_048_576),
    phases=(plain,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=50, decay=DECAY, final=0.05),
    eval_every=100,
    eval_tokens=32_768,
    save_every=1_000,
    keep=1,
)


def depth(layers: int) -> ModelConfig:
    """The target, but for its depth."""
    return replace(config.model, layers=layers)


def cost(arm: Config, layers: tuple[int, ...]) -> int:
    """Training FLOPs of an arm whose phases have these depths."""
    return sum(p.steps * p.batch * p.seq * flops_per_token(depth(n), p.seq)
               for p, n in zip(arm.phases, layers, strict=True))


def silence(model, context, layers: tuple[int, ...]) -> Edited:
    """Zero output projections in these layers: they add nothing yet. The optimiser is kept."""
    params = model.params | {n: model.params[n].at[jnp.array(layers)].set(0) for n in ("o", "down")}
    return Edited(model._replace(params=params), {}, preserves=False)


def annealed(params, step, batch, layers: int, start: int, steps: int) -> dict:
    """What layers beyond the first `layers` add counts from 0 at step `start` to all of it `steps` later.

    Prts' G_random mixes a new layer's output y and input x, y m + x (1 - m) = x + m (y - x); here each of the
    layer's two sums has its own m, so that the mask is on the output projections.
    """
    share = jnp.clip((step - start) / steps, 0, 1)
    new = {n: jnp.arange(len(params[n])).reshape(-1, *[1] * (params[n].ndim - 1)) >= layers
           for n in ("o", "down")}
    return params | {n: jnp.where(where, share * params[n], params[n]) for n, where in new.items()}


def grown(times: int = 4, share: float = 1 / 8, budget: int = 1, then: tuple = (), **how) -> Config:
    """A `times` shallower base for a share of `budget` times scratch's FLOPs, then 8 layers by `stack`."""
    target = flops_per_token(depth(8), plain.seq)
    base = round(share * budget * plain.steps * target / flops_per_token(depth(8 // times), plain.seq))
    phases = (
        replace(plain, steps=base, schedule=replace(config.schedule, shape="constant")),
        replace(plain, steps=round((1 - share) * budget * plain.steps),
                edits=(partial(stack, **how or dict(times=times)), *then),
                schedule=replace(config.schedule, decay=DECAY / (1 - share))),
    )
    arm = replace(config, model=depth(8 // times), phases=phases)
    assert abs(cost(arm, (8 // times, 8)) / (budget * cost(config, (8,))) - 1) < 0.01
    return arm


def top(layers: int, new: int) -> tuple[int, ...]:
    """The layers, and the last `new` of them again on top (gradual stacking; prts)."""
    return (*range(layers), *range(layers - new, layers))


def middle(layers: int, new: int) -> tuple[int, ...]:
    """The layers in blocks of `new`, the middle one (of four the second) twice (MIDAS)."""
    end = (layers // new + 1) // 2 * new
    return (*range(end), *range(end - new, layers))


def gradual(copied) -> Config:
    """2, 4, 6 and 8 layers for steps in proportion 1 to 4 (Prop-1), scratch's FLOPs in all."""
    depths, total = (2, 4, 6, 8), plain.steps * flops_per_token(depth(8), plain.seq)
    costs = [flops_per_token(depth(n), plain.seq) for n in depths]
    unit = total / sum(i * c for i, c in enumerate(costs, 1))
    steps = [round(i * unit) for i in (1, 2, 3)]
    steps += [round((total - sum(s * c for s, c in zip(steps, costs, strict=False))) / costs[-1])]
    edits = [()] + [(partial(stack, layers=copied(n, 2), moments="map"),) for n in depths[:-1]]
    phases = tuple(replace(plain, steps=s, edits=e) for s, e in zip(steps, edits, strict=True))
    return replace(config, model=depth(2), phases=phases)


def scratch(steps: int) -> Config:
    """Full depth from the start, for so many steps."""
    return replace(config, phases=(replace(plain, steps=steps),))
default = grown()
on_top = grown(layers=(0, 1, -1, -1, -1, -1, -1, -1))
arms = {
    "scratch": config,
    "stack": default,
    "short": scratch(default.phases[1].steps),
    "identity": grown(layers=(0, 0, 0, 0, 1, 1, 1, 1), then=(partial(silence, layers=(1, 2, 3, 5, 6, 7)),)),
    "random_on_top": on_top,
    "annealed": replace(on_top, reparam=partial(annealed, layers=2, start=on_top.phases[0].steps, steps=100)),
    "gradual": gradual(top),
    "middle": gradual(middle),
    "stack_g2": grown(times=2),
    "stack_g8": grown(times=8),
    "stack_early": grown(share=1 / 16),
    "stack_late": grown(share=1 / 4),
    "scratch_tokens": scratch(sum(p.steps for p in default.phases)),
    "scratch_4x": scratch(4 * plain.steps),
    "stack_4x": grown(budget=4),
}
default_arms = "scratch", "stack", "short"
control = "scratch"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "model.embed": 32, "model.mlp": 32,
         "model.vocab": 258, "model.unroll": 1, "data.tokenizer": "bytes", "data.dev": 0.01,
         "data.test": 0.01, "eval_every": 2, "eval_tokens": 2_000, "sample_tokens": 4}
claims = (
    dict(says="stacking beats full depth from the start at equal FLOPs", arm="stack", below=0.0),
    dict(says="... which takes half as many FLOPs again for the same loss, as published", arm="stack",
         measure="speed_up_flops", above=0.49),
    dict(says="the base is worth something to the deep phase", arm="stack", control="short", below=0.0),
    dict(says="copies beat copies that do nothing at first", arm="stack", control="identity", below=0.0),
    dict(says="copies beat random layers", arm="stack", control="random_on_top", below=0.0),
    dict(says="random layers do not beat full depth from the start", arm="random_on_top", above=0.0),
    dict(says="stacking helps at four times the FLOPs", arm="stack_4x", control="scratch_4x", below=0.0),
)
