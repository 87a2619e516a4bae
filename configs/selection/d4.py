"""D4: does a quarter of the text, diverse and without near-copies, teach more than any quarter?

Paper: D4: Improving LLM Pretraining via Document De-Duplication and Diversification,
    Tirumala et al. 2023 (001:112)
Method: embed each document by a trained model's last-layer state at its last token. Cluster by
    k-means; of pairs in a cluster whose cosine is above 1 - epsilon, one goes (SemDeDup). Cluster
    what is left again, and drop what is nearest to its centroid (SSL prototypes).
Here: functions and classes of Python's library, a quarter of all positions, about once over. The
    embedder is a run of the same shape on the pool, which the study makes first and charges; the
    paper has OPT-125M. Epsilon is what leaves `dedup` of the positions, as in the paper. chance:
    any quarter. semdedup: the first half of the method alone, down to a quarter. prototypes: the
    second alone. d4: 0.75 by the first, then the second.
Cost: five runs a seed of a third of a minute, six minutes for three seeds on two CPU cores.
Run:
    python train.py study configs/selection/d4.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from configs.selection.qurating import best, pack
from data import DataConfig, Documents, InputError, Source, stdlib
from lib.study import Claim, Paper, Study
from lib.tokenizers import Tokenizer
from model import CAUSAL, forward, whole
from train import load


def embed(documents: Documents, tokenizer: Tokenizer, run: str, length: int = 256) -> np.ndarray:
    """Unit vectors [documents, embed]: a run's final state at the last of length - 1 tokens."""
    params, config, own, _ = load(run)
    if own.model != tokenizer.model:
        raise InputError(f"run {run} has another tokenizer; allowed is one with the documents' own")

    @jax.jit
    def at_end(params, tokens, end):
        states, _ = forward(params, whole(tokens), CAUSAL, config.model)
        return states[jnp.arange(len(tokens)), end]

    found = []
    for some in np.array_split(np.arange(len(documents.shard)), -(-len(documents.shard) // 64)):
        tokens, end = np.full((64, length), tokenizer.bos, np.int32), np.zeros(64, np.int32)
        for row, i in enumerate(some):
            ids = documents.ids(i)[:length - 1]
            tokens[row, 1:len(ids) + 1], end[row] = ids, len(ids)
        found.append(np.asarray(at_end(params, tokens, end), np.float64)[:len(some)])
    vectors = np.concatenate(found)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def k_means(x: np.ndarray, k: int, seed: int = 0, steps: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(cluster, cosine to its centroid) of each unit vector [n, d], by spherical k-means."""
    rng = np.random.default_rng(seed)
    centers = x[rng.choice(len(x), min(k, len(x)), replace=False)]
    for _ in range(steps):
        cluster = (x @ centers.T).argmax(1)
        sums = np.zeros_like(centers)
        np.add.at(sums, cluster, x)
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        centers = np.where(norms > 1e-9, sums / np.maximum(norms, 1e-9), centers)
    cosines = x @ centers.T
    return cosines.argmax(1), cosines.max(1)


def copies(x: np.ndarray, cluster: np.ndarray, near: np.ndarray) -> np.ndarray:
    """The largest cosine [n] of each vector to one of its cluster that comes before it; else -1.

    What is farthest from the centroid comes first; above 1 - epsilon it goes. near: to centroids.
    """
    found = np.full(len(x), -1.0)
    for c in np.unique(cluster):
        here = np.flatnonzero(cluster == c)
        here = here[np.argsort(near[here], kind="stable")]
        pairs = np.triu(x[here] @ x[here].T + 2, 1) - 2  # -2 where the row does not come before
        found[here[1:]] = pairs.max(0)[1:]
    return found


def d4(lengths, seq: int, documents: Documents, tokenizer: Tokenizer, run: str, dedup: float = 0.75,
       share: float = 0.25, clusters: int = 30) -> np.ndarray:
    """A packing of the `share` of all positions that D4 leaves; `dedup` are left by SemDeDup."""
    x = embed(documents, tokenizer, run)
    left = np.flatnonzero(best(-copies(x, *k_means(x, clusters)), lengths, dedup))
    far = np.full(len(x), -np.inf)
    far[left] = -k_means(x[left], clusters)[1]
    return pack(best(far, lengths, share), lengths, seq, "concat")


def chance(lengths, seq: int, share: float = 0.25, seed: int = 0) -> np.ndarray:
    """A packing of any `share` of all positions."""
    value = np.random.default_rng(seed).random(len(lengths))
    return pack(best(value, lengths, share), lengths, seq, "concat")


phase = replace(base.small.phases[0], steps=360, batch=16)
everything = replace(
    base.small, model=base.shape(2, 64, 512), phases=(phase,),
    data=DataConfig(sources={"pool": Source(partial(stdlib, unit="definition"))}, window=1_000_000))
chosen = {name: partial(d4, run="needs:embedder", dedup=dedup, share=0.25)
          for name, dedup in dict(semdedup=0.25, prototypes=1.0, d4=0.75).items()}
study = Study(
    question="Does a quarter of the text, diverse and without near-copies, beat any quarter?",
    paper=Paper(title="D4: Improving LLM Pretraining via Document De-Duplication and "
                "Diversification", authors="Tirumala et al.", year=2023, seeds=("001:112",)),
    needs={"embedder": everything},
    arms={name: replace(everything, phases=(replace(phase, packing=packing),))
          for name, packing in {"chance": chance, **chosen}.items()},
    quick=base.quick(),
    claims=(
        Claim(says="D4 beats a quarter by chance", arm="d4", below=0.0),
        Claim(says="it beats SemDeDup alone", arm="d4", control="semdedup", below=0.0),
        Claim(says="it beats prototypes alone", arm="d4", control="prototypes", below=0.0),
    ),
    seeds=3,
)
