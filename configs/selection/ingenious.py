"""INGENIOUS: does a subset that represents the corpus, chosen anew as the model learns, beat any?

Paper: INGENIOUS: Using Informative Data Subsets for Efficient Pre-Training of Language Models,
    Renduchintala et al. 2023 (001:139)
Method: f(S) = sum_i max_{j in S} s_ij (facility location) of a subset S, where s is the likeness of
    documents by the model's states. Maximise it greedily, in parts of the corpus; draw the subset
    with probabilities by the documents' gains (Taylor softmax). Train on all documents first, then
    on subsets, one every R steps by the model of that moment.
Here: functions and classes of Python's library, subsets of an eighth of all positions. The first
    120 steps are on everything, and so for all arms. everything: goes on like that. chance: on any
    eighth. once: on a subset by the model after 120 steps. ingenious: on that one for 120 steps,
    then on one by the model after 240. Documents are embedded by their last state. The paper has
    masked language models, embeddings of a middle layer, and quarters of its corpus.
Cost: six runs of 120 to 240 steps a seed, four minutes for three seeds on two CPU cores.
Run:
    python train.py study configs/selection/ingenious.py --jobs 2
"""
import math
from dataclasses import replace
from functools import partial

import numpy as np

from configs import base
from configs.selection.d4 import chance, embed
from configs.selection.qurating import best, pack
from data import DataConfig, Documents, Source, stdlib
from lib.study import Claim, Paper, Study
from lib.tokenizers import Tokenizer
from train import Schedule


def gains(like: np.ndarray, k: int) -> np.ndarray:
    """The gain [n] in f of each of the k that the greedy algorithm takes; 0 of the others.

    like: [n n] of 0 and more. What another document already covers counts by the rest alone.
    """
    found, covered = np.zeros(len(like)), np.zeros(len(like))
    for _ in range(k):
        gain = np.maximum(like - covered[:, None], 0).sum(0)
        j = int(gain.argmax())
        found[j], covered = gain[j], np.maximum(covered, like[:, j])
    return found


def facility(lengths, seq: int, documents: Documents, tokenizer: Tokenizer, run: str,
             share: float = 0.125, part: int = 500, seed: int = 0) -> np.ndarray:
    """A packing: documents drawn by their gains, in random parts of about `part`, without return.

    In each part the gains of `share` of it are over their mean, so that parts count alike.
    """
    x, rng = embed(documents, tokenizer, run), np.random.default_rng(seed)
    logits = np.zeros(len(x))
    for here in np.array_split(rng.permutation(len(x)), -(-len(x) // part)):
        gain = gains(np.maximum(x[here] @ x[here].T, 0), math.ceil(share * len(here)))
        gain = gain / gain[gain > 0].mean()
        logits[here] = np.log(1 + gain + gain**2 / 2)
    return pack(best(logits + rng.gumbel(size=len(x)), lengths, share), lengths, seq, "concat")


phase = replace(base.small.phases[0], steps=120, batch=16)
warm = replace(
    base.small, model=base.shape(2, 64, 512), phases=(phase,), eval_every=60, save_every=1_000,
    schedule=Schedule(shape="constant", peak=8e-3, warmup=20),
    data=DataConfig(sources={"pool": Source(partial(stdlib, unit="definition"))}, window=1_000_000))


def after(run: str, packing, steps: int):
    """A run that goes on from another one, on what a packing leaves."""
    own = replace(phase, steps=steps, packing=packing)
    return replace(warm, init_from=run, init_with="all", phases=(own,))


def falling(config):
    """The same, whose rate falls over its last 120 steps."""
    decay = 120 / config.phases[0].steps
    return replace(config, schedule=Schedule("wsd", peak=8e-3, warmup=0, decay=decay, final=0.05))


second = replace(after("needs:warm", partial(facility, run="needs:warm", share=0.125), 120),
                 schedule=replace(warm.schedule, warmup=0))
packings = {
    "chance": partial(chance, share=0.125),
    "everything": warm.phases[0].packing,
    "once": partial(facility, run="needs:warm", share=0.125),
}
again = partial(facility, run="needs:second", share=0.125)
study = Study(
    question="Does a representative subset, chosen anew as the model learns, beat any subset?",
    paper=Paper(title="INGENIOUS: Using Informative Data Subsets for Efficient Pre-Training of "
                "Language Models", authors="Renduchintala et al.", year=2023, seeds=("001:139",)),
    needs={"warm": warm, "second": second},
    arms={name: falling(after("needs:warm", packing, 240)) for name, packing in packings.items()}
    | {"ingenious": falling(after("needs:second", again, 120))},
    quick=base.quick(),
    claims=(
        Claim(says="representative subsets beat any", arm="ingenious", below=0.0),
        Claim(says="they beat one that is chosen once", arm="ingenious", control="once",
              below=0.0),
        Claim(says="they are at most 0.02 bits behind everything", arm="everything",
              control="ingenious", above=-0.02),
    ),
    seeds=3,
)
