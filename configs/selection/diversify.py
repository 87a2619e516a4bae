"""Diversify and conquer: do clusters that are still badly known deserve more of the budget?

Paper: Diversify and Conquer: Diversity-Centric Data Selection with Iterative Refinement, Yu et al.
    2024 (001:55)
Method: cluster the pool by k-means; draw from clusters by their weights, train, score each cluster
    by what the model does on it, multiply the weights by the scores and normalise them; again, in
    each iteration, from the model so far.
Here: text to pre-train on, not instructions: Python's functions and classes and simplified wiki
    text in eight clusters, each a source. Vectors are TF-IDF of words hashed to 512 places (the
    paper: a sentence encoder). A cluster's score is its dev loss (the paper: a reward model's
    judgement of answers, so that clusters of bad text fade; a loss does not see that). Four
    iterations of 50 steps. random: by size. static: equal shares. iterative: from equal shares by
    scores. The figure is the mean over clusters of bits per byte.
Cost: three runs of a quarter to half a minute a seed, four minutes for three seeds.
Run: in the directory of train.py,
    python train.py study configs/selection/diversify.py --jobs 2
"""
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np

from configs import base
from configs.selection.d4 import k_means
from data import DataConfig, Document, Source, stdlib
from lib.readers import jsonl
from lib.study import Claim, Paper, Study

CLUSTERS = 8
NAMES = [f"cluster{i}" for i in range(CLUSTERS)]


def tf_idf(texts: list[str], size: int = 512) -> np.ndarray:
    """Unit vectors [n size]: (1 + log count) log(n / documents with it) of hashed words."""
    counts = np.zeros((len(texts), size))
    for row, said in zip(counts, texts, strict=True):
        for word, number in Counter(re.findall(r"\w+", said.lower())).items():
            row[zlib.crc32(word.encode()) % size] += number
    seen = np.maximum((counts > 0).sum(0), 1)
    vectors = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * np.log(len(texts) / seen)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


@lru_cache(1)
def clustered(path: str, clusters: int, seed: int) -> tuple[list[Document], np.ndarray]:
    """(the pool's documents, the cluster of each)."""
    found = [*stdlib("definition"), *jsonl(path)]
    found = [document for document in found if isinstance(document, Document)]
    vectors = tf_idf([document.text for document in found])
    return found, k_means(vectors, clusters, seed)[0]


def cluster(number: int, path: str, clusters: int = CLUSTERS, seed: int = 0) -> Iterator[Document]:
    """The documents of one cluster of the pool."""
    found, of = clustered(path, clusters, seed)
    for i in np.flatnonzero(of == number):
        yield found[i]


def reweighted(progress: float, log: list, names: list) -> dict[str, float]:
    """Shares: equal at first, times each iteration's scores, the share of a name in all losses."""
    weights = np.full(len(names), 1 / len(names))
    for row in log:
        losses = np.array([row[name] for name in names])
        weights = weights * losses / losses.sum()
        weights = weights / weights.sum()
    return dict(zip(names, weights.tolist(), strict=True))


def source(number: int) -> Source:
    """One cluster of the pool."""
    path = "../shared/data/leaner/train/wiki.jsonl"
    return Source(partial(cluster, number=number, path=path))


phase = replace(base.small.phases[0], steps=200, batch=16)
plain = replace(
    base.small,
    model=base.shape(3, 64, 512),
    data=DataConfig(sources={name: source(i) for i, name in enumerate(NAMES)}, dev=0.05, test=0.05),
    phases=(phase,),
    eval_every=50,
    eval_tokens=4_096,
)
mixtures = {"random": None, "static": dict.fromkeys(NAMES, 1.0)}
steered = replace(phase, mixture=partial(reweighted, names=NAMES), steer=50)
study = Study(
    question="Do clusters that are still badly known deserve more of the budget?",
    paper=Paper(title="Diversify and Conquer: Diversity-Centric Data Selection with Iterative "
                "Refinement", authors="Yu et al.", year=2024, seeds=("001:55",)),
    arms={name: replace(plain, phases=(replace(phase, mixture=mixture),))
          for name, mixture in mixtures.items()} | {"iterative": replace(plain, phases=(steered,))},
    quick=base.quick({"phases.*.steps": 60, "model.layers": 1, "eval_tokens": 500},
                     keep=("data.dev", "data.test", "eval_every")),
    claims=(
        Claim(says="clusters re-weighted by what is still wrong beat random documents",
              arm="iterative", below=0.0),
        Claim(says="they beat equal shares", arm="iterative", control="static", below=0.0),
        Claim(says="equal shares beat random documents", arm="static", below=0.0),
    ),
    seeds=3,
)
