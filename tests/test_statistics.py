"""lib/statistics.py: intervals, verdicts, speed-ups, and which rate is tried next."""
import math

import pytest

from lib import statistics
from lib.study import Claim


def test_an_interval_is_student_s():
    # By hand: sd sqrt(2.5), t(4; 0.975) = 2.7764, half = 2.7764 sqrt(2.5 / 5).
    mean, half = statistics.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half == pytest.approx(1.96324, abs=1e-5)
    _, half = statistics.interval([0.0, 1.0])
    assert half == pytest.approx(12.7062 / 2, abs=1e-4)  # t(1; 0.975) is 12.7062


def test_one_value_has_no_interval():
    assert statistics.interval([2.0]) == (2.0, None)


REACHED = [  # loss, budget
    (5.0, 10),
    (3.0, 20),
    (2.5, 25),
    (2.0, 30),
    (1.9, math.inf),
]


@pytest.mark.parametrize("target, expected", REACHED)
def test_the_budget_to_reach_a_loss_is_linear_between_evaluations(target, expected):
    assert statistics.reach([10, 20, 30], [4.0, 3.0, 2.0], target) == expected


def test_the_budget_to_reach_a_loss_is_that_of_the_first_time():
    assert statistics.reach([10, 20, 30], [4.0, 2.0, 3.0], 3.0) == 15


def evaluated(*dev: float, scale: float = 1) -> dict:
    """The figures of a run by its losses on dev at 1 to 4 tokens, and as many FLOPs times scale."""
    tokens = [1, 2, 3, 4]
    flops = [scale * n for n in tokens]
    return dict(dev=dev[-1], curve=dict(tokens=tokens, flops=flops, dev=[*dev]))


FAST = 4.0, 3.0, 2.0, 1.5
SLOW = 5.0, 4.0, 3.0, 2.0


def test_a_speed_up_is_at_the_worse_end_whichever_run_has_it():
    fast = evaluated(*FAST)
    slow = evaluated(*SLOW)
    assert statistics.speed_up(fast, slow, "tokens") == pytest.approx(4 / 3 - 1)
    assert statistics.speed_up(slow, fast, "tokens") == pytest.approx(3 / 4 - 1)


def test_a_speed_up_may_be_in_flops():
    cheap = evaluated(*FAST, scale=0.5)
    slow = evaluated(*SLOW)
    assert statistics.speed_up(cheap, slow, "flops") == pytest.approx(8 / 3 - 1)
    assert statistics.speed_up(slow, slow, "flops") == 0


VERDICTS = [  # mean, half of the interval, the claim, what becomes of it
    (-0.03, 0.02, {"below": 0.0}, "confirmed"),
    (-0.03, 0.04, {"below": 0.0}, "undecided"),
    (0.03, 0.02, {"below": 0.0}, "reversed"),
    (-0.03, 0.02, {"below": -0.02}, "undecided"),
    (0.5, 0.1, {"above": 0.3}, "confirmed"),
    (0.5, 0.1, {"above": 0.7}, "reversed"),
    (0.5, 0.3, {"above": 0.3}, "undecided"),
    (-9.0, None, {"below": 0.0}, "undecided"),
    (None, None, {"below": 0.0}, "undecided"),
]


@pytest.mark.parametrize("mean, half, bound, expected", VERDICTS)
def test_a_verdict_asks_for_the_whole_interval_on_one_side(mean, half, bound, expected):
    claim = Claim(says="x", arm="x", **bound)
    assert statistics.verdict(mean, half, claim) == expected



GRID = [1.0, 2.0, 4.0]


def test_a_grid_that_brackets_the_best_rate_is_left_alone():
    losses = {1.0: 3.0, 2.0: 1.0, 4.0: 2.0}
    assert statistics.best_rate(losses) == (2.0, True)
    assert statistics.next_rate(losses, GRID) is None


def test_a_grid_is_extended_by_its_own_ratio_at_the_end_that_is_best():
    assert statistics.next_rate({1.0: 3.0, 2.0: 2.0, 4.0: 1.0}, GRID) == 8.0
    assert statistics.next_rate({1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, GRID) == 0.5


def test_a_rate_that_diverged_brackets_the_best():
    diverged = {1.0: 3.0, 2.0: 2.0, 4.0: 1.0, 8.0: math.inf}
    assert statistics.next_rate(diverged, GRID) is None


def test_a_grid_is_extended_twice_at_most():
    losses = {1.0: 5.0, 2.0: 4.0, 4.0: 3.0, 8.0: 2.0, 16.0: 1.0}
    assert statistics.next_rate(losses, GRID) is None
    assert statistics.best_rate(losses) == (16.0, False)
