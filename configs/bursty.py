"""Bursty rows, for studies that share them: pairs of an item and its label, and a query.

The source is Chan et al. 2022, and Reddy 2024 for `courses` too.

Items are noisy and of many classes. A class is a point, its label is fixed. In a bursty row the
query's class comes several times among the pairs, and so does another one. The label can be read
off the context, or known by heart.
"""
from functools import cache, lru_cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lib.objectives import CAUSAL

D, LABELS, PAIRS = 32, 16, 8  # dimensions of an item, labels, pairs of a row
NOISE = 0.5  # of an item; a class's point has length 1
LENGTH = 2 * PAIRS + 1
WIDTH = D + LABELS  # of what is read at a position: an item, or which label
CHOICES = PAIRS, PAIRS, LABELS  # of a label for its item, of the query for a label, of an answer
EACH = 20  # steps of descent between two points of a course


@lru_cache(16)
def world(known: int, zipf: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(points [known, D], labels [known], cumulated probabilities rank^-zipf) of known classes."""
    rng, chance = np.random.default_rng(7), np.arange(1, known + 1.0) ** -zipf
    points = rng.normal(size=(known, D)) * D**-0.5
    return points, rng.integers(LABELS, size=known), np.cumsum(chance / chance.sum())


def classes(n: int, known: int, zipf: float, burst: int, share: float, rng) -> np.ndarray:
    """[n, PAIRS + 1] The classes of rows, the query's last; `share` of the rows are bursty."""
    drawn = rng.random((n, PAIRS + 2))
    what = np.minimum(np.searchsorted(world(known, zipf)[2], drawn), known - 1)
    mine = rng.random(n) < share
    what[mine, :burst] = what[mine, -2:-1]
    what[mine, burst:2 * burst] = what[mine, -1:]
    return np.concatenate([rng.permuted(what[:, :PAIRS], axis=1), what[:, -2:-1]], 1)


def items(points, rng) -> np.ndarray:
    """Noisy items of classes at these points [... D], as long as they are."""
    noise = rng.normal(size=points.shape) * D**-0.5
    return (points + NOISE * noise) / np.sqrt(1 + NOISE**2)


def pairs_and_query(seen, labels) -> np.ndarray:
    """Float32 [n LENGTH D+LABELS]: item, label, item, label, ..., query."""
    out = np.zeros((len(seen), 2 * PAIRS + 2, D + LABELS), np.float32)
    out[:, ::2, :D] = seen
    out[:, 1::2, D:] = np.eye(LABELS)[labels]
    return out[:, :LENGTH]


def burstiness(row: dict, rng, known: int, zipf: float, burst: int, share: float):
    """An objective: fresh ones, a segment each, with loss on the label of each query."""
    points, label_of, _ = world(known, zipf)
    n = len(row["tokens"]) // LENGTH
    what = classes(n, known, zipf, burst, share, rng)
    place = np.tile(np.arange(LENGTH, dtype=np.int32), n)
    made = dict(
        x=pairs_and_query(items(points[what], rng), label_of[what]).reshape(n * LENGTH, WIDTH),
        targets=np.repeat(label_of[what[:, -1]], LENGTH).astype(np.int32),
        positions=place,
        segments=np.repeat(np.arange(1, n + 1, dtype=np.int32), LENGTH),
        weights=(place == LENGTH - 1).astype(np.float32),
    )
    return row | made, CAUSAL


def two_in_turn(points, labels, n: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(rows, label of the query [n]): two classes of these, as often, each with its own label.

    points [m, D] and labels [n m] of the classes; two with one label get another for the second.
    """
    two = np.argsort(rng.random((n, len(points))), 1)[:, :2]
    first, second = np.take_along_axis(labels, two, 1).T
    second = np.where(first == second, (first + rng.integers(1, LABELS, n)) % LABELS, second)
    which = rng.permuted(np.tile(np.arange(PAIRS) % 2, (n, 1)), axis=1)
    which = np.concatenate([which, np.zeros((n, 1), int)], 1)  # the query is of the first
    given = np.where(which == 0, first[:, None], second[:, None])
    seen = items(points[np.take_along_axis(two, which, 1)], rng)
    return pairs_and_query(seen, given), first


def rows_of(kind: str, known: int, zipf: float, n: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """(rows [n LENGTH D+LABELS], label that is right for the query [n]).

    kind: "context" has two new classes in a row, whose labels are drawn for it. "swapped" has two
    known ones, of up to 256, each with the label of the other. "weights" has known classes, as
    frequent as in training, the query's not in the context.
    """
    points, label_of, _ = world(known, zipf)
    if kind == "weights":
        what = classes(8 * n, known, zipf, 0, 0.0, rng)
        absent = np.all(what[:, :-1] != what[:, -1:], 1)
        what = what[absent][:n]
        return pairs_and_query(items(points[what], rng), label_of[what]), label_of[what[:, -1]]
    if kind == "context":
        points = rng.normal(size=(64, D)) * D**-0.5
        labels = rng.integers(LABELS, size=(n, 64))
        return two_in_turn(points, labels, n, rng)
    own = np.tile(label_of[:256], (n, 1))
    rows, heart = two_in_turn(points[:256], own, n, rng)
    labels = rows[:, 1::2, D:].argmax(-1)
    other = np.max(np.where(labels == heart[:, None], -1, labels), 1)
    labels = np.where(labels == heart[:, None], other[:, None], heart[:, None])
    rows[:, 1::2, D:] = np.eye(LABELS)[labels]
    return rows, other


def new_rows(n: int, burst: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, the query's label [n], whether a pair is of its class [n PAIRS]) of new classes."""
    points = rng.normal(size=(64, D)) * D**-0.5
    labels = rng.integers(LABELS, size=(n, 64))
    what = classes(n, 64, 0.0, burst, 1.0, rng)
    given = np.take_along_axis(labels, what, 1)
    same = what[:, :-1] == what[:, -1:]
    return pairs_and_query(items(points[what], rng), given), given[:, -1], same


def right_by_three(numbers) -> jax.Array:
    """How likely three numbers make the right label: each is the logit of a choice.

    A label attends to its item, the query to such labels, and the classifier says what is there. A
    choice weighs only as much as the one before is made.
    """
    share = jnp.float32(1)
    for number, choices in zip(numbers, CHOICES, strict=True):
        share = jax.nn.sigmoid(number * share - jnp.log(choices - 1.0))
    return share


@cache
def courses(points: int) -> np.ndarray:
    """[many, points] Courses of this by gradient descent, at many rates and from many starts."""

    def loss(numbers):
        return -jnp.log(right_by_three(numbers))

    def course(rate, start):
        def step(numbers, _):
            moved = numbers - rate * jax.grad(loss)(numbers)
            return moved, right_by_three(numbers)

        begin = start * jnp.ones(len(CHOICES))
        _, found = lax.scan(step, begin, None, length=EACH * points)
        return found[::EACH]

    rates, starts = jnp.meshgrid(jnp.logspace(-3, 0, 40), jnp.array([0.0, 0.1, 0.3, 1.0]))
    found = jax.jit(jax.vmap(course))(rates.ravel(), starts.ravel())
    return np.asarray(found)


def distance(measured: np.ndarray) -> float:
    """The least root mean square distance of a measured course [points] to one of these.

    Only of those that end above a half: flat ones would be near a model that learns nothing.
    """
    found = courses(len(measured))
    rising = found[found[:, -1] > 0.5]
    return float(np.sqrt(np.mean(np.square(rising - measured), 1).min()))


def crossing(course: list[float], level: float) -> float:
    """The share of a course from chance after which it is above a level; 1 if it never is.

    It is linear between its points.
    """
    for i, (before, after) in enumerate(pairwise([1 / LABELS, *course])):
        if after > level:
            return (i + (level - before) / (after - before)) / len(course)
    return 1.0
