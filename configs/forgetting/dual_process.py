"""Dual process: can a model read a new word off its context, and still know old ones by heart?

Paper: Dual Process Learning: Controlling Use of In-Context vs. In-Weights Strategies with Weight
    Forgetting, Anand et al. 2025 (003:16)
Method: draw the embeddings anew every so many steps, for ever (active forgetting) or for a while
    (temporary forgetting). In the paper vanilla learns to read the context, then loses it on new
    words; active keeps it and gives up the weights; temporary has both: weights for frequent
    words, context for rare ones.
Here: a sentence is `noun is adjective` or `is adjective noun`, then one of the two as a query and
    the answer: `adjective noun noun` to a noun, `adjective adjective adjective` to an adjective.
    What a query is shows in the context, from where the copula stands, and in the weights, for
    words that have been seen. Arms have the same sentences and the same rate for the body. active:
    a reset every 25 steps. temporary: so for 1,200 of 2,400 steps. `probe` of
    configs/parts_of_speech.py, which has the sentences too, says what is measured.
    The paper's is a BERT that fills three masks and takes 8 million sentences of 10,000 words. This
    is a causal model with loss on the answer alone, and takes 150,000 of 250 words. Embeddings
    begin each episode with a fresh optimiser, and are the head too: else no new word is an answer.
Cost: nine runs of a minute, ten minutes on one CPU core.
Run:
    python train.py study configs/forgetting/dual_process.py
    python train.py configs/forgetting/dual_process.py:temporary          by hand, a minute
"""
from dataclasses import replace
from functools import partial

import numpy as np

from configs.parts_of_speech import FIRST, LENGTH, lexicon, part_of_speech, probe
from data import DataConfig, Source
from lib.edits import reset_embeddings
from lib.study import Claim, Paper, Study
from model import ModelConfig
from train import Config, Edit, Phase, Schedule


def late(rows: list[dict], figure: str) -> float:
    """Mean of a figure's last three values: one swings by 0.1 from evaluation to evaluation."""
    return float(np.mean([row[figure] for row in rows if figure in row][-3:]))


def lost(rows: list[dict], figure: str) -> float:
    """How far a figure is below its best on the way, in the end."""
    return max(row[figure] for row in rows if figure in row) - late(rows, figure)


def measures() -> dict:
    """The end of each figure of `probe`, and how much of the new words was lost."""
    names = "new new_choice known head/context head/weights tail/context tail/weights".split()
    ends = {name: partial(late, figure=f"pos/{name}") for name in names}
    return ends | {"new_lost": partial(lost, figure="pos/new")}


WORDS, AMBIGUOUS, EVERY = 250, 10, 25
plain = Phase(steps=2_400, batch=8, seq=8 * LENGTH, objective=partial(
    part_of_speech, words=WORDS, zipf=1.25, ambiguous=AMBIGUOUS))
vanilla = Config(
    model=ModelConfig(layers=2, embed=64, heads=4, kv_heads=4, head_dim=16, mlp=128,
                      vocab=FIRST + WORDS, tied=True),
    data=DataConfig(sources={"lexicon": Source(partial(lexicon, words=WORDS))}, dev=0.0, test=0.0),
    phases=(plain,), schedule=Schedule(shape="wsd", peak=3e-3, warmup=50, decay=0.2, final=0.05),
    evals=(partial(probe, words=WORDS, ambiguous=AMBIGUOUS),), eval_every=200, overlap=0,
    save_every=2_400, keep=1, sample_tokens=LENGTH,
)
# New embeddings have few steps to learn in: their rate is twice as high, and anew each time.
forgetting = replace(plain, repeat=(Edit(reset_embeddings, every=EVERY),), lr={
    "embed": Schedule(shape="linear", peak=6e-3, warmup=5, final=0.1, cycle=EVERY)})
halves = replace(forgetting, steps=1_200), replace(plain, steps=1_200)
active, temporary = partial(Claim, arm="active"), partial(Claim, arm="temporary")
study = Study(
    question="Can a model read a new word off its context, and still know old ones by heart?",
    paper=Paper(title="Dual Process Learning: Controlling Use of In-Context vs. In-Weights "
                "Strategies with Weight Forgetting", authors="Anand et al.", year=2025,
                seeds=("003:16",)),
    arms={"vanilla": vanilla, "active": replace(vanilla, phases=(forgetting,)),
          "temporary": replace(vanilla, phases=halves)},
    measures=measures(),
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "model.head_dim": 4,
           "eval_every": 4},
    claims=(
        active(says="active forgetting keeps what vanilla loses: reading new words off their "
               "context", measure="new", above=0.2),
        active(says="vanilla had it: it loses more of its best than active does",
               measure="new_lost", below=0.0),
        active(says="active forgetting gives up the weights, for frequent words too",
               measure="head/weights", below=-0.2),
        temporary(says="temporary forgetting keeps new words as well", measure="new", above=0.2),
        temporary(says="beside the weights for frequent words, which active has not",
                  control="active", measure="head/weights", above=0.0),
        temporary(says="and it goes by the context for rare ones, more than vanilla",
                  measure="tail/context", above=0.0),
    ),
    seeds=3,
)
