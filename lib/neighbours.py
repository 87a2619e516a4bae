"""Documents that are alike: the nearest of each, and a path that goes from like to like."""

import numpy as np

COMPARED = 1_024  # documents that are compared with all others at once
BEGINNING = 100  # tokens by which near-copies are known


def tf_idf(ids: list[np.ndarray]) -> np.ndarray:
    """Vectors [documents, vocab] of norm 1, float32, of the ids of documents.

    An entry is (1 + log count) log(documents / documents with it); 0 where the count is 0.
    """
    every = np.concatenate([*ids, [0]])
    vocab = 1 + int(every.max())
    counts = [np.bincount(own, minlength=vocab) for own in ids]
    counts = np.stack(counts).astype(np.float32)
    there = counts > 0
    logs = 1 + np.log(np.maximum(counts, 1))
    with_it = np.maximum(there.sum(0), 1)
    rarity = np.log(len(ids) / with_it)
    weights = np.where(there, logs, 0) * rarity
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    unit = weights / np.maximum(norms, 1e-9)
    return unit.astype(np.float32)


def neighbours(vectors: np.ndarray, k: int) -> np.ndarray:
    """The k most similar others of each vector [n, d], the nearest first: numbers [n, k].

    Similar is a large product. All pairs are compared; there may be fewer than k others.
    """
    k = min(k, len(vectors) - 1)
    found = []
    for first in range(0, len(vectors), COMPARED):
        some = vectors[first:first + COMPARED]
        like = some @ vectors.T
        here = np.arange(len(some))
        like[here, first + here] = -np.inf  # none is its own neighbour
        found.append(highest(like, k))
    return np.concatenate(found)


def highest(values: np.ndarray, k: int) -> np.ndarray:
    """The columns of the k highest values of each row [n, m], the highest first [n, k]."""
    if k == 0:
        return np.zeros((len(values), 0), np.int64)
    columns = np.argpartition(-values, k - 1, axis=1)
    columns = columns[:, :k]
    own = np.take_along_axis(values, columns, 1)
    order = np.argsort(-own, axis=1, kind="stable")
    return np.take_along_axis(columns, order, 1)


def path(near: np.ndarray, cluster: int) -> list[int]:
    """All documents once: each, then its nearest unseen neighbour, at most `cluster` in a row.

    near: see `neighbours`. Where no neighbour is left, or the cluster is full, the path goes on at
    the next unseen document in order.
    """
    order = []
    seen = set()
    for start in range(len(near)):
        at = start
        left = cluster
        while at not in seen and left:
            order.append(at)
            seen.add(at)
            left -= 1
            unseen = (other for other in near[at].tolist() if other not in seen)
            at = next(unseen, at)
    return order


def without_near_copies(
    order: list[int],
    ids: list[np.ndarray],
    alike: float,
) -> list[int]:
    """The path without a document that begins nearly as the last one kept does.

    Nearly: the Jaccard similarity of runs of three tokens is above `alike`.
    """
    kept = []
    last = set()
    for document in order:
        beginning = ids[document][:BEGINNING]
        runs = runs_of_three(beginning.tolist())
        shared = len(runs & last)
        either = len(runs | last)
        if not kept or shared <= alike * either:
            kept.append(document)
            last = runs
    return kept


def runs_of_three(ids: list[int]) -> set[tuple[int, ...]]:
    """Three ids in a row, wherever they stand; of fewer ids the one run that there is."""
    found = set()
    for begin in range(max(1, len(ids) - 2)):
        run = ids[begin:begin + 3]
        found.add(tuple(run))
    return found
