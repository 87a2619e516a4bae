"""Best-fit packing: does it pay to keep documents whole, with their neighbours out of sight?

Paper: Fewer Truncations Improve Language Modeling, Ding et al. 2024 (001:39)
Method: documents longer than a row are cut; all pieces are put into rows by best-fit decreasing; a
    document sees itself alone. The paper (7B, rows of 2k): perplexity 9.64 without a mask and 9.53
    with it, packed or not. Whole documents show in what is asked of the model, a third to a half of
    the gain being the mask's.
Here: functions and classes of Python's library, with one budget of positions. concat_no_mask:
    documents end to end, cut every `seq`; attention crosses from one to the next. concat: the same
    rows, but a document sees itself alone and its positions start at 0. best_fit: besides, no
    document that fits a row is cut. Held-out bits per byte are measured on documents alone in all
    arms, so concat_no_mask, the control, is judged on what it was not trained on. `data/waste` is
    the share of padding; the mask costs nothing, as attention computes all pairs in any case.
    truncation.py has the paper's process with a closed form.
Cost: some 20 runs of 200 steps, each under half a minute: some six minutes on two CPU cores.
Run:
    python train.py study configs/context/best_fit.py --jobs 2
    python train.py configs/context/best_fit.py:best_fit            one arm by hand, half a minute
"""
from dataclasses import replace
from functools import partial

from configs import base
from data import DataConfig, Source, stdlib
from lib.objectives import one_segment
from lib.packing import best_fit
from lib.study import Claim, Paper, Study

phase = replace(base.small.phases[0], steps=200, batch=4, seq=256)
concat = replace(
    base.small,
    data=DataConfig(sources={"stdlib": Source(partial(stdlib, unit="definition"))},
                    dev=0.03, test=0.03),
    phases=(phase,),
    overlap=32,
    eval_every=50,
)
study = Study(
    question="Does it pay to keep documents whole, and to keep their neighbours out of sight?",
    paper=Paper(title="Fewer Truncations Improve Language Modeling", authors="Ding et al.",
                year=2024, seeds=("001:39",)),
    arms={
        "concat_no_mask": replace(concat, phases=(replace(phase, objective=one_segment),)),
        "concat": concat,
        "best_fit": replace(concat, phases=(replace(phase, packing=best_fit),)),
    },
    peak_lrs=base.RATES,
    quick=base.quick(keep=("phases.*.seq",)),  # so that some rows have two documents
    claims=(
        Claim(says="the mask helps", arm="concat", below=0.0),
        Claim(says="whole documents under a mask beat what is cut and seen across",
              arm="best_fit", below=0.0),
        Claim(says="whole documents cost no bits: at most 0.01 a byte behind what is cut, both "
              "masked", arm="best_fit", control="concat", below=0.01),
    ),
    seeds=3,
)
