"""Incremental layers: do new layers at random, on frozen ones at first, pay? They should not.

Paper: On the Effectiveness of Incremental Training of Large Language Models, Li et al. 2024
    (001:22, arXiv 2411.18700)
Method: add layers at random on top of a trained model, freeze the old ones at first, then train
    all. In the paper, what looks ahead early needs more FLOPs in the end than the plain run.
Here: two layers, then four, with one budget of model FLOPs, the shallow phase included. New layers
    are heard at once: their outputs are drawn, not 0. frozen: the lower two are frozen for half of
    the second phase; a frozen layer is charged as any other. unfrozen: all train from the growth
    on. Unlike the paper's constant rate, growth warms up again, and all rates fall over the last
    40 %. The paper has more stages than two.
Cost: some 20 runs, ten to twenty minutes on two CPU cores.
Run:
    python train.py study configs/growth/incremental.py --jobs 2
    python train.py configs/growth/incremental.py:frozen            one arm by hand, a minute
"""
from dataclasses import replace
from functools import partial

from configs import base
from lib.edits import stack
from lib.freezing import asleep, freeze
from lib.study import Claim, Paper, Study

SHALLOW = 150  # steps of two layers
scratch, shallow = base.small, base.shape(layers=2)
random_on_top = partial(stack, layers=(0, 1, -1, -1), new="loud")
unfrozen = base.grown(scratch, shallow, SHALLOW, random_on_top)
until = SHALLOW + unfrozen.phases[1].steps // 2
lower = partial(freeze, begin=SHALLOW, until=until, layers=shallow.layers)
study = Study(
    question="Do new layers at random, on old ones that are frozen for a while, pay?",
    paper=Paper(title="On the Effectiveness of Incremental Training of Large Language Models",
                authors="Li et al.", year=2024, seeds=("001:22",)),
    arms={
        "scratch": scratch,
        "frozen": replace(unfrozen, optimizer=asleep, reparam=lower),
        "unfrozen": unfrozen,
    },
    peak_lrs=base.RATES,
    quick=base.quick(),
    claims=(
        Claim(says="new layers at random, the old ones frozen at first, are behind full depth "
              "from the start", arm="frozen", above=0.0),
        Claim(says="so they are with nothing frozen", arm="unfrozen", above=0.0),
        Claim(says="freezing costs more than it keeps (no figure is published)", arm="frozen",
              control="unfrozen", above=0.0),
    ),
    seeds=3,
)
