"""configs/continual/rewarm.py and infinite.py: rates at their joints, shares of rows, where runs begin."""
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from conftest import course_of

from configs.continual import infinite, rewarm
from lib.schedule import lr_schedule
from model import Context
from train import Schedule

pytestmark = pytest.mark.library
CONTEXT = Context(jax.random.key(0), 0, None, None, None)


def rates(config) -> np.ndarray:
    """The learning rate of each step of a config."""
    return course_of(config, CONTEXT).lr["matrix"][1:]


def test_a_rewarmed_rate_climbs_to_the_peak_and_falls_to_the_least_again():
    arms, peak, low = rewarm.study.arms, rewarm.PEAK, rewarm.PEAK * rewarm.FINAL
    ended = rates(rewarm.base)[-1]
    assert ended == pytest.approx(low)
    assert set(np.round(rates(arms["low"]) / ended, 12)) == {1.0}
    for name, most in dict(half=peak / 2, rewarm=peak, double=2 * peak).items():
        found = rates(arms[name])
        assert found.argmax() == 19 and found.max() == pytest.approx(most)
        assert found[9] == pytest.approx(most / 2) and found[-1] == pytest.approx(most * rewarm.FINAL)
    assert rates(arms["cold"]).argmax() == 0


def test_what_is_replayed_and_where_runs_begin():
    for name, share in dict(rewarm=0.0, replay_5=0.05, replay_25=0.25).items():
        [phase] = rewarm.study.arms[name].phases
        assert phase.mixture == {"old": share, "new": 1 - share}
    stable, before = rates(rewarm.stable), rates(rewarm.base)
    np.testing.assert_allclose(stable, before[: len(stable)], rtol=1e-6)
    assert before[len(stable)] < stable[-1] == pytest.approx(rewarm.PEAK)
    union, alone = (course_of(rewarm.study.arms[name], CONTEXT).tokens[-1] for name in ("union", "rewarm"))
    assert union == alone + course_of(rewarm.base, CONTEXT).tokens[-1]


def test_the_infinite_schedule_has_the_published_values():
    """Peak 3e-4, constant 1.65e-4, least 3e-5; warm-up 100, cooled at 400, annealed from 800."""
    shape = partial(infinite.infinite, warm=0.1, cooled=0.4, annealed=0.8, constant=0.55, least=0.1)
    found = lr_schedule(Schedule(shape=shape, peak=3e-4, warmup=100), np.arange(1001.0), 0, 1000)
    known = {50: 1.5e-4, 100: 3e-4, 250: 2.325e-4, 400: 1.65e-4, 800: 1.65e-4, 900: 7.04e-5, 1000: 3e-5}
    for step, rate in known.items():
        assert found[step - 1] == pytest.approx(rate, rel=1e-3), step
    assert np.abs(np.diff(found[100:])).max() < 2e-6  # no jump at a joint


def test_texts_in_turn_share_one_schedule_or_have_one_each():
    arms = infinite.study.arms
    once, again = rates(arms["infinite"]), rates(arms["cosine"])
    n, peak = infinite.STEPS, infinite.once.peak
    assert once[n // 2] == once[2 * n] == pytest.approx(0.55 * peak)  # constant over both changes
    assert once[-1] == again[-1] == pytest.approx(0.1 * peak)
    for begin in range(0, 3 * n, n):
        assert again[begin : begin + n].argmax() == infinite.WARM - 1
    mixtures = [phase.mixture for phase in arms["infinite_replay"].phases]
    assert mixtures == [{"a": 1.0}, {"a": 0.25, "b": 0.75}, {"a": 0.125, "b": 0.125, "c": 0.75}]
    assert replace(arms["cosine"], phases=()) == replace(arms["infinite"], phases=())
