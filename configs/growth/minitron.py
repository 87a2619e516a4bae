"""Minitron: is a wide model that is cut, then taught by what it was, better than a small one?

Paper: Compact Language Models via Pruning and Knowledge Distillation, Muralidharan et al. 2024
    (002:26)
Method: score layers, heads, MLP units and the stream's units on a few batches, cut the least, and
    retrain by the divergence from the logits of the uncut model in place of cross-entropy. The
    paper finds width a better thing to cut than depth, and activations a better score than weights.
Here: half of the heads, MLP units and stream of a trained model go, by one of three scores.
    magnitude: the smallest weights. activations: what does least on eight batches of training data.
    first: the units that stand last go, whatever they do: the control. They are retrained on
    cross-entropy, kl and first_kl on the divergence, over as many tokens. kl_flops has fewer, for
    the teacher's forward pass: its FLOPs are the plain arms'. scratch: the small shape on as many
    FLOPs as the wide and the cut model take together; the wide model's are in each arm's. Left out:
    losses on inner states, a search over shapes, and several sizes from one wide model, where the
    paper saves most. The wide model has three times the steps that follow the cut: after as many as
    these it would be behind what is then trained on text, and no teacher. The three scores end
    within 0.02 bits of each other, which three seeds do not tell apart. scratch reads eleven times
    the tokens of the retraining, and is ahead of all other arms by 0.28 bits or more.
Cost: seven arms and the wide model, 24 runs of 10 to 90 seconds, ten minutes on two CPU cores.
Run:
    python train.py study configs/growth/minitron.py --jobs 2
    python train.py configs/growth/minitron.py:wide                 one run by hand, a minute
"""
from dataclasses import replace
from functools import partial

from configs import base
from lib.optim import adamw
from lib.prune import prune
from lib.study import Claim, Paper, Study
from lib.teacher import adopt, divergence
from train import Config, Phase, Schedule

SIZES = "kv_heads", "mlp", "embed"  # the axes that are cut
large, small = base.shape(4, 128), base.shape(4, 64)
plain = Phase(steps=160, batch=8, seq=128)
tuning = Schedule(shape="wsd", peak=4e-3, warmup=10, decay=0.4, final=0.05)
longer = replace(plain, steps=3 * plain.steps)
wide = replace(base.small, model=large, phases=(longer,), eval_every=80)


def cut(by: str):
    """The edit that cuts a wide model down to the small shape."""
    return partial(prune, by=by, **{axis: getattr(small, axis) for axis in SIZES})


def tuned(by: str, steps: int = 160) -> Config:
    """A run that cuts the wide model and trains it on."""
    phase = replace(plain, steps=steps, edits=(cut(by),))
    return replace(wide, init_from="needs:wide", phases=(phase,), schedule=tuning)


def taught(by: str, steps: int = 160) -> Config:
    """A run that cuts the wide model, and has that model as its teacher."""
    phase = replace(plain, steps=steps, edits=(cut(by), partial(adopt, run="needs:wide")))
    frozen = partial(adamw, frozen=("teacher",))
    run = tuned(by)
    return replace(run, phases=(phase,), token_loss=divergence, optimizer=frozen)


own, theirs = (model.flops(model, plain.seq) for model in (small, large))
fewer = round(plain.steps * own / (own + theirs / 3))  # a teacher's forward pass is a third
spent = base.flops(large, longer) + base.flops(small, plain)
study = Study(
    question="Is a wide model that is cut, then taught by what it was, better than a small one?",
    paper=Paper(title="Compact Language Models via Pruning and Knowledge Distillation",
                authors="Muralidharan et al.", year=2024, seeds=("002:26",)),
    needs={"wide": wide},
    arms={
        "first": tuned("first"),
        "magnitude": tuned("magnitude"),
        "activations": tuned("activations"),
        "first_kl": taught("first"),
        "kl": taught("activations"),
        "kl_flops": taught("activations", fewer),
        "scratch": base.scaled(replace(wide, model=small), base.steps_for(spent, small, plain)),
    },
    quick=base.quick(keep=("model.embed", "model.mlp")),
    claims=(
        Claim(says="activations choose better than chance", arm="activations", below=0.0),
        Claim(says="so do weights", arm="magnitude", below=0.0),
        Claim(says="activations choose better than weights", arm="activations",
              control="magnitude", below=0.0),
        Claim(says="a teacher is better than text over as many tokens", arm="kl",
              control="activations", below=0.0),
        Claim(says="so it is for units cut blindly", arm="first_kl", below=0.0),
        Claim(says="and at as many FLOPs, the teacher's counted", arm="kl_flops",
              control="activations", below=0.0),
        Claim(says="what is cut and taught beats the small shape from scratch at equal FLOPs",
              arm="kl_flops", control="scratch", below=0.0),
    ),
    seeds=3,
)
