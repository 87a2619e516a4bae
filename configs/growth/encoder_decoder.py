"""Encoder-decoder: is a decoder that was adapted into an encoder and a decoder ahead of one alone?

Paper: Encoder-Decoder Gemma: Improving the Quality-Efficiency Trade-Off via Adaptation,
    Zhang et al. 2025 (003:68)
Method: the encoder and the decoder both begin as a decoder-only model. The encoder's attention is
    bidirectional. Each block of the decoder gets cross-attention between self-attention and MLP,
    without rotary positions, copied from its self-attention. Where shapes forbid the copy, it is
    drawn, and trains alone at first. Then both train as a prefix LM: the encoder reads the first
    half of a row, the decoder predicts the second. On such rows the pair has a decoder's FLOPs.
Here: 3 layers 96 wide on Python's library. base: plain next tokens. All arms cost equal FLOPs, the
    base included. decoder: the base goes on, and sees the first half by a prefix mask. adapted: the
    paper's copy. drawn: cross-attention alone trains for the first fifth of the steps. scratch: the
    pair from its first draw. The figure is the nats of second halves. Left out: distillation, UL2,
    an encoder of another size, instruction tuning, where the paper's gains are largest.
Cost: 15 runs of some 20 seconds, five minutes on two CPU cores.
Run:
    python train.py study configs/growth/encoder_decoder.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from configs import base
from lib.seq2seq import paired
from lib.study import Claim, Paper, Study
from model import Context, Edited, Model, draw, groups, table
from train import Config


def adapt(model: Model, context: Context, source: int, cross: str = "copy") -> Edited:
    """Make an encoder and a decoder of a decoder-only model; the optimiser starts afresh.

    cross: cross-attention is that of each block's self-attention ("copy"), or drawn ("draw").
    """
    config = replace(model.config, **paired(source))
    params = {}
    for name, p in table(config).items():
        own = name.removeprefix("encoder/")
        if name.startswith("cross_"):
            own = name.removeprefix("cross_")
        old = model.params[own]
        fresh = cross == "draw" and name.startswith("cross_")
        params[name] = draw(name, p, context.key, old.dtype) if fresh else jnp.copy(old)
    return Edited(Model(config, params), dict.fromkeys(groups(config), "reset"), preserves=False)


def halves(row: dict, rng, source: int):
    """An objective: loss on what follows the first `source` positions, which all others see."""
    first = np.arange(len(row["tokens"])) < source
    weights = row["weights"] * ~first
    return row | dict(prefix=first.astype(np.int32), weights=weights), dict(kind="prefix", window=0)


SOURCE = 64  # positions of the first half
BEFORE, AFTER = 150, 200  # steps of the base, and of the decoder after it
plain = replace(base.small, model=base.shape(3, 96, 512), prompts=(), eval_every=50,
                schedule=replace(base.small.schedule, peak=6e-3),
                data=replace(base.small.data, test=0.0))
pretrained = base.scaled(plain, BEFORE)
after = replace(plain.phases[0], steps=AFTER, objective=partial(halves, source=SOURCE))
decoder = replace(plain, init_from="needs:base", phases=(after,))
pair = replace(plain.model, **paired(SOURCE))
budget = base.flops(plain.model, after)
steps = base.steps_for(budget, pair, after)


def adapted(cross: str, alone: int = 0) -> Config:
    """The base made a pair, whose cross-attention trains alone for so many steps at first."""
    edit = partial(adapt, source=SOURCE, cross=cross)
    rest = replace(after, steps=steps - alone)
    if not alone:
        return replace(decoder, phases=(replace(rest, edits=(edit,)),))
    still = dict.fromkeys(("embed", "head", "matrix", "vector"), 0.0)
    first = replace(after, steps=alone, edits=(edit,), lr=still)
    return replace(decoder, phases=(first, rest))


whole = base.steps_for(budget + base.flops(plain.model, pretrained.phases[0]), pair, after)
claim = partial(Claim, measure="eval/stdlib/own", below=0.0)
study = Study(
    question="Is a decoder that was adapted into an encoder and a decoder ahead of one alone?",
    paper=Paper(title="Encoder-Decoder Gemma: Improving the Quality-Efficiency Trade-Off via "
                "Adaptation", authors="Zhang et al.", year=2025, seeds=("003:68",)),
    needs={"base": pretrained},
    arms={
        "decoder": decoder,
        "adapted": adapted("copy"),
        "drawn": adapted("draw", steps // 5),
        "scratch": replace(plain, model=pair, phases=(replace(after, steps=whole),)),
    },
    quick=base.quick(keep=("phases.*.seq",)),
    claims=(
        claim(says="the pair beats the decoder at equal FLOPs", arm="adapted"),
        claim(says="to adapt beats to begin anew", arm="adapted", control="scratch"),
        claim(says="to copy cross-attention beats to draw it", arm="adapted", control="drawn"),
    ),
    seeds=3,
)
