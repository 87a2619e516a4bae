"""Minitron: is a wide model that is cut, then trained on, better than a small one from scratch?

Paper: Compact Language Models via Pruning and Knowledge Distillation, Muralidharan et al. 2024
    (002:26)
Method: score layers, heads, MLP units and the stream's units on a few batches, cut the least, train
    on. The paper finds width a better thing to cut than depth, and activations a better score than
    weights.
Here: half of the heads, MLP units and stream of a wide model go, by one of three scores, at equal
    steps. magnitude: the smallest weights. activations: what does least on eight batches of
    training data. first: the units that stand last go, whatever they do: the control. scratch: the
    small shape from the start, at as many FLOPs as the wide and the cut model take together.
    Left out: distillation from the wide model's logits, and a search over shapes.
Cost: four arms, some 24 runs of half a minute, a quarter of an hour on two CPU cores.
Run:
    python train.py study configs/growth/minitron.py --jobs 2
    python train.py configs/growth/minitron.py:activations          one arm by hand, a minute
"""
from dataclasses import replace
from functools import partial

from configs import base
from lib.prune import prune
from lib.study import Claim, Paper, Study

SCORES = "magnitude", "activations", "first"
wide, small = base.shape(4, 192), base.shape(4, 96)
(plain,) = base.small.phases
first, second = replace(plain, steps=200), replace(plain, steps=150)


def arm(by: str):
    """A run that trains the wide model, then cuts half of its heads, MLP units and stream."""
    edit = partial(prune, kv_heads=small.kv_heads, mlp=small.mlp, embed=small.embed, by=by)
    return replace(base.small, model=wide, phases=(first, replace(second, edits=(edit,))))


spent = base.flops(wide, first) + base.flops(small, second)
scratch = base.scaled(replace(base.small, model=small), base.steps_for(spent, small, plain))
study = Study(
    question="Is a wide model that is cut, then trained on, better than a small one from scratch?",
    paper=Paper(title="Compact Language Models via Pruning and Knowledge Distillation",
                authors="Muralidharan et al.", year=2024, seeds=("002:26",)),
    arms={by: arm(by) for by in SCORES} | {"scratch": scratch},
    control="first",
    peak_lrs=base.RATES,
    quick=base.quick(keep=("model.embed", "model.mlp")),
    claims=(
        Claim(says="activations choose better than chance", arm="activations", below=0.0),
        Claim(says="so do weights", arm="magnitude", below=0.0),
        Claim(says="activations choose better than weights", arm="activations",
              control="magnitude", below=0.0),
        Claim(says="what is cut beats the small shape from scratch at equal FLOPs",
              arm="activations", control="scratch", below=0.0),
    ),
    seeds=3,
)
