"""G_stack beside three baselines: does what stacking is worth hang on what it is compared to?

Paper: Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training,
    Du et al. 2024 (001:65, 003:27)
Method: g_stack.py's, from 2 layers to 8: the shallow model has an eighth of the FLOPs.
Here: the plain Llama; the same with the defaults that recipe.py took the place of, at half the peak
    rate, which was its best; and strong.py, its tables of values stacked with the blocks. Each is
    compared to full depth on the same baseline at equal FLOPs. 8 layers of 64, 0.6 million tokens.
Cost: 18 runs, about ten minutes on two CPU cores, an estimate.
Run:
    python train.py study configs/growth/g_stack_beside.py --jobs 2
"""
from dataclasses import replace
from functools import partial

from configs import base
from configs.baselines.recipe import old
from configs.baselines.strong import on
from lib.edits import stack
from lib.study import Claim, Paper, Study
from train import Config

TIMES, SHARE = 4, 1 / 8  # how much deeper; the shallow model's part of the FLOPs


def grown(scratch: Config) -> Config:
    """The run that begins shallow and costs as much."""
    (plain,), deep = scratch.phases, scratch.model
    shallow = replace(deep, layers=deep.layers // TIMES)
    first = base.steps_for(SHARE * base.flops(deep, plain), shallow, plain)
    return base.grown(scratch, shallow, first, partial(stack, times=TIMES))


phase = replace(base.deep.phases[0], steps=300)
plain = replace(base.deep, model=base.shape(layers=8, embed=64), phases=(phase,), overlap=32,
                schedule=replace(base.deep.schedule, warmup=40))
slower = replace(plain, schedule=replace(plain.schedule, peak=4e-3))
baselines = {"plain": plain, "old": old(slower), "strong": on(plain)}
arms = {}
for name, scratch in baselines.items():
    arms |= {name: scratch, f"{name}_stack": grown(scratch)}
study = Study(
    question="Does what stacking is worth hang on the baseline?",
    paper=Paper(title="Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM "
                "Pre-Training", authors="Du et al.", year=2024, seeds=("001:65", "003:27")),
    arms=arms,
    quick=base.quick(),
    claims=[Claim(says=f"stacking beats full depth on the {name} baseline", arm=f"{name}_stack",
                  control=name, below=0.0) for name in baselines] + [
        Claim(says="the old baseline is behind the plain one", arm="old", above=0.0),
        Claim(says="the strong one is ahead of it", arm="strong", below=0.0)],
    seeds=3,
)
