"""Laws of losses: planted constants are found again, and the best size is the best."""
from dataclasses import replace

import numpy as np
import pytest

from lib.laws import Law, Runs, fit_law, least

SIZES = np.array([6e4, 6e4, 6e4, 3e5, 3e5, 3e5, 8e5, 8e5])
TOKENS = np.array([8e4, 2e5, 7e5, 8e4, 2e5, 7e5, 8e4, 2e5])
LAWS = [
    Law(0.9, 60.0, 0.35, 150.0, 0.38),
    Law(1.69, 406.4, 0.34, 410.7, 0.28),  # of the paper
    Law(0.5, 3.0, 0.1, 2_000.0, 0.7),
]


@pytest.mark.parametrize("law", LAWS)
def test_planted_constants_are_found_again(law):
    found = fit_law(SIZES, TOKENS, law.loss(SIZES, TOKENS))
    assert found == pytest.approx(law, rel=1e-6)


def test_one_run_that_is_far_off_changes_little():
    """A Huber loss grows with the distance, not with its square."""
    law = LAWS[0]
    losses = np.tile(law.loss(SIZES, TOKENS), 3)
    losses[4] *= 1.2
    found = fit_law(np.tile(SIZES, 3), np.tile(TOKENS, 3), losses)
    assert found.loss(SIZES, TOKENS) == pytest.approx(law.loss(SIZES, TOKENS), rel=2e-3)
    square = fit_law(np.tile(SIZES, 3), np.tile(TOKENS, 3), losses, width=10.0)
    missed = np.abs(square.loss(SIZES, TOKENS) / law.loss(SIZES, TOKENS) - 1)
    assert missed.max() > 0.01


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("flops", [1e11, 1e18])
def test_the_best_size_has_the_least_loss_of_a_budget(law, flops):
    best = law.best_size(flops)
    sizes = best * np.geomspace(0.5, 2, 201)
    losses = law.loss(sizes, flops / 6 / sizes)
    assert np.argmin(losses) == 100
    assert law.best_size(100 * flops) / best == pytest.approx(100**law.exponent)


def test_the_slopes_are_the_derivatives():
    runs = Runs(np.log(SIZES / 1e5), np.log(TOKENS / 1e5), np.log(np.linspace(4, 2, 8)))
    x = np.array([0.1, 0.3, -0.2, 0.4, 0.6])
    for i, column in enumerate(runs.slopes(x).T):
        step = np.zeros(5)
        step[i] = 1e-6
        change = (runs.left(x + step) - runs.left(x - step)) / 2e-6
        assert column == pytest.approx(change, abs=1e-8)
    longer = replace(runs, loss=runs.loss + 1)
    assert longer.left(x) == pytest.approx(runs.left(x) - 1)


def test_the_best_of_several_starts_is_taken():
    """x^4 - 2 x^2 + 0.3 x is level at three places, and least at the first of them."""
    low, top, other = sorted(np.roots([4, 0, -4, 0.3]).real)

    def left(x):
        return np.array([np.sqrt(x[0] ** 4 - 2 * x[0] ** 2 + 0.3 * x[0] + 5)])

    assert least(left, [[other]])[0] == pytest.approx(other, abs=1e-6)
    assert least(left, [[other], [1.1 * low], [top]])[0] == pytest.approx(low, abs=1e-4)
