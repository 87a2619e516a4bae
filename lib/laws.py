"""Laws of losses, fitted to runs."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

# Where a fit of `Law` begins: the share of E in the least loss, and both exponents.
SHARES = 0.2, 0.8
EXPONENTS = 0.2, 0.8
# Bounds of log E, log A, log B, a and b, with A and B those of the mean N and D.
LOWEST = -15, -15, -15, 0.01, 0.01
HIGHEST = 5, 5, 5, 4, 4


def least(left: Callable, starts: Iterable, **how) -> np.ndarray:
    """Where residuals are least by their squares, the best that is found from several starts.

    left: constants [k] -> residuals [n]. how: of `scipy.optimize.least_squares`.
    """
    how |= dict.fromkeys(("xtol", "ftol", "gtol"), 1e-12)
    found = []
    for start in starts:
        one = least_squares(left, start, max_nfev=200, **how)
        found.append(one)
    best = min(found, key=lambda one: one.cost)
    return best.x


class Law(NamedTuple):
    """L = E + A / N^a + B / D^b of N parameters and D tokens (Hoffmann et al. 2022, eq. 2)."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def loss(self, size, tokens):
        """The loss of N parameters and D tokens, numbers or arrays."""
        of_size = self.A / size**self.a
        of_tokens = self.B / tokens**self.b
        return self.E + of_size + of_tokens

    @property
    def exponent(self) -> float:
        """The power of the FLOPs that the best size grows with."""
        both = self.a + self.b
        return self.b / both

    def best_size(self, flops):
        """The size of the least loss where 6 N D is a number of FLOPs (equation 4)."""
        up = self.a * self.A
        down = self.b * self.B
        both = self.a + self.b
        factor = (up / down) ** (1 / both)
        return factor * (flops / 6) ** self.exponent


@dataclass
class Runs:
    """What a law is fitted to, as logs less those of the mean size and length."""

    size: np.ndarray  # [n]
    tokens: np.ndarray  # [n]
    loss: np.ndarray  # [n], not less anything

    def terms(self, x: np.ndarray) -> np.ndarray:
        """The logs of a law's three terms [3 n]; x: as `LOWEST`."""
        e, of_size, of_tokens, a, b = x
        constant = np.full(len(self.loss), e)
        second = of_size - a * self.size
        third = of_tokens - b * self.tokens
        return np.stack([constant, second, third])

    def left(self, x: np.ndarray) -> np.ndarray:
        """What the law's log is above those of the losses [n]."""
        log = np.logaddexp.reduce(self.terms(x))
        return log - self.loss

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """The derivative of `left` [n 5]."""
        parts = np.exp(self.terms(x))
        e, of_size, of_tokens = parts / parts.sum(0)
        by_a = -self.size * of_size
        by_b = -self.tokens * of_tokens
        return np.stack([e, of_size, of_tokens, by_a, by_b], 1)


def fit_law(size: np.ndarray, tokens: np.ndarray, loss: np.ndarray, width: float = 1e-3) -> Law:
    """The law of runs [n], by the Huber loss of log L (Hoffmann et al. 2022, equation 3).

    width: of residuals, beyond which the Huber loss grows linearly.
    """
    runs = Runs(np.log(size / size.mean()), np.log(tokens / tokens.mean()), np.log(loss))
    x = least(
        runs.left,
        starts_of(loss.min()),
        jac=runs.slopes,
        bounds=(LOWEST, HIGHEST),
        loss="huber",
        f_scale=width,
    )
    e, of_size, of_tokens = np.exp(x[:3])
    a, b = x[3:]
    return Law(e, of_size * size.mean() ** a, a, of_tokens * tokens.mean() ** b, b)


def starts_of(low: float) -> list[list[float]]:
    """Constants to begin with: E is a share of the least loss, the two other terms are alike."""
    starts = []
    for share in SHARES:
        rest = (1 - share) / 2
        logs = np.log([low * share, low * rest, low * rest])
        for a in EXPONENTS:
            for b in EXPONENTS:
                starts.append([*logs, a, b])
    return starts
