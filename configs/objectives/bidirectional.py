"""Substituted tokens: is it as good to tell what was replaced as to predict what was masked?

Paper: Structural Self-Supervised Objectives for Transformers, Di Liello 2023 (000:44)
Method: 15 % of the tokens are replaced, and an encoder reads them. rts: it tells of each token
    whether it is original, by a head of one output. c_rts: replacements come from the token's own
    cluster, so that they are harder to tell. slm: it predicts the originals of those replaced.
    mlm, the control, is BERT's: most of those predicted are hidden behind one symbol.
Here: tokens are bytes of eight packages of Python's library, and replacements are drawn from the
    bytes of the row, as most of the 258 are in no text. Each encoder is then trained for 200 steps
    of prose.py; `nats` and `right` are of that task, on held-out modules. scratch is that alone.
    rts and c_rts are not charged for a vocabulary's logits. Clusters are 32 means of the embeddings
    of an mlm run; the paper also draws by which clusters were mistaken. Its structural objectives
    are in structural.py.
Cost: 18 runs of half a minute, 9 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/bidirectional.py --jobs 2
"""
import functools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from scipy.cluster.vq import kmeans2

from configs import base
from configs.objectives.prose import MEASURES, fine
from configs.objectives.prose import config as scratch
from configs.objectives.prose import pre as plain
from lib.objectives import BIDIRECTIONAL, choose, masked
from lib.study import Claim, Paper, Study
from model import Param, llama
from train import load


def replaced(row: dict, rng, vocab: int, share: float, clusters=None) -> tuple[dict, np.ndarray]:
    """(The row with a share of its tokens replaced, where it was).

    A token becomes another one of the row, of its own cluster if there are clusters [vocab]. Where
    the row has none, it stays.
    """
    clusters = np.zeros(vocab) if clusters is None else clusters
    tokens = row["targets"].astype(np.int32)
    pieces = np.unique(tokens[row["weights"] > 0])
    for i in np.flatnonzero(choose(row["weights"] > 0, share, rng)).tolist():
        others = pieces[clusters[pieces] == clusters[tokens[i]]]
        others = others[others != tokens[i]]
        tokens[i] = rng.choice(others) if len(others) else tokens[i]
    return row | {"tokens": tokens}, tokens != row["targets"]


def slm(row, rng, tokenizer, share: float = 0.15):
    """An objective: predict the originals of replaced tokens."""
    row, changed = replaced(row, rng, tokenizer.vocab, share)
    return row | {"weights": changed.astype(np.float32)}, BIDIRECTIONAL


def rts(row, rng, tokenizer, share: float = 0.15, run: str = "", k: int = 32):
    """An objective: `replaced` [seq], is a token so? run: its embeddings make the clusters."""
    clusters = clusters_of(run, k) if run else None
    row, changed = replaced(row, rng, tokenizer.vocab, share, clusters)
    return row | {"replaced": changed.astype(np.int32)}, BIDIRECTIONAL


slm.masks = rts.masks = (BIDIRECTIONAL,)


@functools.lru_cache(maxsize=4)
def clusters_of(run: str, k: int) -> np.ndarray:
    """The cluster of each piece [vocab], of the embeddings of a run."""
    embeddings = np.asarray(load(run)[0]["embed"], np.float64)
    return kmeans2(embeddings, k, minit="++", seed=0)[1]


def rows(config, rows: dict[str, Param]) -> dict[str, Param]:
    """The plain rows, and a head that tells what is replaced."""
    return rows | {"replaced": Param(("embed",), (config.embed,), config.embed**-0.5)}


def forward(params, batch, mask, config):
    """The plain states, and the logit [b t] that a token was replaced."""
    states = llama(params, batch, mask, config)
    return states, {"replaced": states.astype(jnp.float32) @ params["replaced"]}


def told(logits, batch, extras):
    """A `token_loss`: nats of what is replaced; logits of pieces are not computed."""
    sign = 1 - 2 * batch["replaced"]
    return jax.nn.softplus(sign * extras["replaced"])


shape = replace(scratch.model, rows=rows, forward=forward)
pre = replace(plain, objective=masked)
mlm = replace(scratch, model=shape, phases=(pre, fine))
headless = 1 - 6 * shape.vocab * shape.embed / shape.flops(shape, pre.seq)  # of the FLOPs
telling = replace(pre, objective=rts, token_loss=told, cost=headless)
first = {"mlm": pre, "rts": telling, "slm": replace(pre, objective=slm),
         "c_rts": replace(telling, objective=partial(rts, run="needs:clusters"))}
claim = partial(Claim, measure="nats")
study = Study(
    question="Is it as good to tell what was replaced as to predict what was masked?",
    paper=Paper(title="Structural Self-Supervised Objectives for Transformers",
                authors="Di Liello", year=2023, seeds=("000:44",)),
    needs={"clusters": replace(mlm, phases=(pre,))},
    arms={name: replace(mlm, phases=(phase, fine)) for name, phase in first.items()}
    | {"scratch": replace(mlm, phases=(fine,))},
    measures=MEASURES,
    quick=base.quick(keep=("data.dev", "data.test")),
    claims=(
        claim(says="an encoder that was trained before learns the task better", arm="scratch",
              above=0.0),
        claim(says="telling what is replaced is as good as mlm within 0.02", arm="rts", below=0.02),
        claim(says="so is predicting the originals", arm="slm", below=0.02),
        claim(says="harder replacements are better", arm="c_rts", control="rts", below=0.0),
        claim(says="telling costs less", arm="rts", measure="flops", below=0.0),
    ), seeds=3)
