"""Schedule, decay, clip: are their default values near the best at two widths and two depths?

Paper: Decoupled Weight Decay Regularization, Loshchilov & Hutter 2019
Method: the plain Llama by default, and with less or more of one thing: a third of the warm-up or
    twice as much; a rate that falls over the last 20 % of the steps or 65 %; no weight decay or
    thrice as much; gradients clipped at a quarter or not at all.
Here: four layers of 64 and of 128, and eight of 64, in base.small's own steps, whose schedule most
    studies have: 40 of 300 steps, and the last 40 %. The defaults of decay and clip are 0.1 and a
    norm of 1. All arms have the default rate.
Cost: 81 runs, ten minutes on two CPU cores that do nothing else, by their CPU time.
Run:
    python train.py study configs/baselines/schedule_and_decay.py --jobs 2
    python train.py study configs/baselines/schedule_and_decay.py --seeds 1
"""
from dataclasses import replace
from functools import partial

from configs import base
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from train import Config

SIZES = {"narrow": (4, 64), "wide": (4, 128), "deep": (8, 64)}  # layers, embed


def changed(config: Config) -> dict[str, Config]:
    """The runs that have less or more of one thing."""
    def scheduled(**how) -> Config:
        return replace(config, schedule=replace(config.schedule, **how))

    warmup = config.schedule.warmup
    return {
        "short_warmup": scheduled(warmup=warmup // 3),
        "long_warmup": scheduled(warmup=2 * warmup),
        "short_fall": scheduled(decay=0.2),
        "long_fall": scheduled(decay=0.65),
        "no_decay": replace(config, optimizer=partial(adamw, weight_decay=0.0)),
        "more_decay": replace(config, optimizer=partial(adamw, weight_decay=0.3)),
        "low_clip": replace(config, clip=0.25),
        "no_clip": replace(config, clip=0.0),
    }


runs = {size: replace(base.small, model=base.shape(*shape)) for size, shape in SIZES.items()}
arms = {f"{size}_{name}": run for size, config in runs.items()
        for name, run in changed(config).items()}
study = Study(
    question="Are the default schedule, decay and clip near the best at two widths and depths?",
    paper=Paper(title="Decoupled Weight Decay Regularization", authors="Loshchilov & Hutter",
                year=2019),
    arms=runs | arms,
    quick=base.quick({"model.layers": 2}),
    claims=[Claim(says=f"{name.replace('_', ' ')} wins less than 0.02 bits per byte", arm=name,
                  control=name.partition("_")[0], above=-0.02) for name in arms],
    seeds=3,
)
