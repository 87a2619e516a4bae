"""G_stack: is a deep model better grown from a shallow one than trained deep from the start?

Paper: Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training,
    Du et al. 2024 (001:65, 003:27)
Method: train a shallow model, repeat its blocks, begin a new optimiser and a new warm-up, go on.
    The base's rate does not decay, and its text is not seen again. In the paper, full depth takes
    49 % more FLOPs at 1.1B parameters, and less in longer runs.
Here: 2 layers for an eighth of the FLOPs, then 8. All arms cost what `scratch` costs, the base
    included, but for short, scratch_tokens and those named 4x. All rates fall over the last 40 %.
    short: the steps that `stack` takes at 8 layers, from scratch: what is the base worth?
    identity: copies whose outputs are zero at first (G_zero). random_on_top: six layers drawn at
    random. annealed: these are faded in (G_random). gradual, middle: 2, 4, 6 and 8 layers; the top
    two are copied, or the middle two (MIDAS), with their moments. stack_g2, stack_g8: from 4 layers
    or from 1. stack_early, stack_late: after 1/16 or 1/4 of the FLOPs. For G_learn see ligo.py.
Cost: nine runs of three arms, some ten minutes on two CPU cores, at the one rate of the recipe.
Run:
    python train.py study configs/growth/g_stack.py --jobs 2
    python train.py study configs/growth/g_stack.py --arms stack,identity,random_on_top
    python train.py configs/growth/g_stack.py:stack          one arm by hand, two minutes
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp

from configs import base
from lib.edits import silence, stack
from lib.study import Claim, Paper, Study
from model import flops_per_token
from train import Config

scratch = base.scaled(base.deep, 400)
(plain,), DECAY = scratch.phases, scratch.schedule.decay


def annealed(params, step, batch, layers: int, start: int, steps: int) -> dict:
    """A `reparam`: what layers from `layers` on add counts from 0 at `start` to all `steps` later.

    G_random mixes a layer's output y and input x: y m + x (1 - m) = x + m (y - x). Here each of the
    layer's two sums has its own m, so that m multiplies the output projections.
    """
    share, used = jnp.clip((step - start) / steps, 0, 1), dict(params)
    for name in ("o", "down"):
        x = params[name]
        new = jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) >= layers
        used[name] = jnp.where(new, share * x, x)
    return used


def grown(times: int = 4, share: float = 1 / 8, budget: int = 1, then: tuple = (),
          **how) -> Config:
    """A `times` shallower base for a share of `budget` times the FLOPs; then 8 layers."""
    shallow = base.shape(layers=8 // times)
    first = base.steps_for(share * budget * base.flops(scratch.model, plain), shallow, plain)
    before = replace(plain, steps=first, schedule=replace(scratch.schedule, shape="constant"))
    after = replace(plain, steps=round((1 - share) * budget * plain.steps),
                    edits=(partial(stack, **how or dict(times=times)), *then),
                    schedule=replace(scratch.schedule, decay=DECAY / (1 - share)))
    return replace(scratch, model=shallow, phases=(before, after))


def top(layers: int, new: int) -> tuple[int, ...]:
    """The layers, and the last `new` of them again on top (gradual stacking)."""
    return (*range(layers), *range(layers - new, layers))


def middle(layers: int, new: int) -> tuple[int, ...]:
    """The layers in blocks of `new`, the middle one (of four the second) twice (MIDAS)."""
    end = (layers // new + 1) // 2 * new
    return (*range(end), *range(end - new, layers))


def gradual(copied) -> Config:
    """2, 4, 6 and 8 layers for steps in proportion 1 to 4 (Prop-1); scratch's FLOPs in all."""
    depths = 2, 4, 6, 8
    costs = [flops_per_token(base.shape(layers=n), plain.seq) for n in depths]
    total = plain.steps * costs[-1]
    unit = total / sum(i * cost for i, cost in enumerate(costs, 1))
    steps = [round(i * unit) for i in (1, 2, 3)]
    spent = sum(n * cost for n, cost in zip(steps, costs, strict=False))
    steps.append(round((total - spent) / costs[-1]))
    edits = [()] + [(partial(stack, layers=copied(n, 2), moments="map"),) for n in depths[:-1]]
    phases = [replace(plain, steps=n, edits=own) for n, own in zip(steps, edits, strict=True)]
    return replace(scratch, model=base.shape(layers=2), phases=tuple(phases))


stacked, on_top = grown(), grown(layers=(0, 1) + 6 * (-1,), new="loud")
fade_in = partial(annealed, layers=2, start=on_top.phases[0].steps, steps=100)
silent = partial(silence, layers=(1, 2, 3, 5, 6, 7))
study = Study(
    question="Is a deep model better grown from a shallow one than trained at full depth?",
    paper=Paper(title="Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM "
                "Pre-Training", authors="Du et al.", year=2024, seeds=("001:65", "003:27")),
    arms={
        "scratch": scratch,
        "stack": stacked,
        "short": base.scaled(scratch, stacked.phases[1].steps),
        "identity": grown(layers=(0, 0, 0, 0, 1, 1, 1, 1), then=(silent,)),
        "random_on_top": on_top,
        "annealed": replace(on_top, reparam=fade_in),
        "gradual": gradual(top), "middle": gradual(middle),
        "stack_g2": grown(times=2), "stack_g8": grown(times=8),
        "stack_early": grown(share=1 / 16), "stack_late": grown(share=1 / 4),
        "scratch_tokens": base.scaled(scratch, sum(phase.steps for phase in stacked.phases)),
        "scratch_4x": base.scaled(scratch, 4 * plain.steps), "stack_4x": grown(budget=4),
    },
    default_arms=("scratch", "stack", "short"),
    quick=base.quick(),
    seeds=3,
    claims=(
        Claim(says="stacking beats full depth at equal FLOPs", arm="stack", below=0.0),
        Claim(says="full depth takes half as many FLOPs again for the same loss, as published",
              arm="stack", measure="speed_up_flops", above=0.49),
        Claim(says="the base is worth something", arm="stack", control="short", below=0.0),
        Claim(says="copies beat silent copies", arm="stack", control="identity", below=0.0),
        Claim(says="copies beat random layers", arm="stack", control="random_on_top", below=0.0),
        Claim(says="random layers are behind full depth", arm="random_on_top", above=0.0),
        Claim(says="it helps at 4 x the FLOPs", arm="stack_4x", control="scratch_4x", below=0.0),
    ),
)
