"""Three nested logits: why reading the context comes abruptly (Reddy 2024)."""
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lib.bursty import LABELS, PAIRS

CHOICES = PAIRS, PAIRS, LABELS  # of a label for its item, of the query for a label, of an answer
EACH = 20  # steps of descent between two points of a course


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
    """The least root mean square distance of a measured course [points] to one of these."""
    squares = np.square(courses(len(measured)) - measured)
    return float(np.sqrt(np.mean(squares, 1).min()))
