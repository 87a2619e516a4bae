"""data.py: how many rows of which source a step draws."""
import math
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import sky
from corpora import Points, stars
from hypothesis import given
from sky import (
    SKY,
    drawn,
    first_rows,
    halves,
    loader,
    loader_with,
    moons,
    phase,
    rising,
    rows_of,
    same,
)

import data
from data import InputError, Source

equal = np.testing.assert_array_equal


def drawn_rows(made: data.Loader, steps: int, phase: int = 0) -> np.ndarray:
    """Rows [steps + 1, sources] that a phase has drawn after 0 steps, after 1 and so on."""
    counts = [drawn(made, step, phase) for step in range(steps + 1)]
    return np.array(counts)


def moon_rows(batch: data.Batch) -> int:
    """How many rows of a batch are of moons."""
    is_moon = np.any(batch.arrays["source"] == 1, axis=1)
    return int(np.sum(is_moon))


# ----------------------------------------------------------------------------------------- mixtures


def test_without_a_mixture_sources_come_in_proportion_to_their_rows():
    made = loader(phase(steps=500))
    star_epoch = rows_of(made, source=0).epoch
    moon_epoch = rows_of(made, source=1).epoch
    stars_drawn, moons_drawn = drawn(made, 500)
    due = 2_000 * moon_epoch / (star_epoch + moon_epoch)
    assert stars_drawn + moons_drawn == 2_000
    assert moons_drawn == pytest.approx(due, abs=1)


def test_a_rare_source_comes_as_often_as_it_should():
    """A thousandth of batches of 4: at every 250th step, give or take one, never two at once."""
    made = loader(phase(steps=10_000, mixture=dict(stars=0.999, moons=0.001)))
    counts = drawn_rows(made, 10_000)
    moons_drawn = counts[:, 1]
    steps = np.arange(10_001)
    equal(counts.sum(1), 4 * steps)
    assert moons_drawn[-1] == 40
    assert np.max(np.abs(moons_drawn - 0.004 * steps)) < 1

    each_step = np.diff(moons_drawn)
    with_a_moon = np.flatnonzero(each_step) + 1
    apart = np.diff(with_a_moon)
    assert np.max(each_step) == 1
    assert set(apart.tolist()) <= {249, 250, 251}
    first = int(with_a_moon[0])
    assert moon_rows(made.batch(first - 1)) == 0
    assert moon_rows(made.batch(first)) == 1


two_weights = st.lists(st.integers(0, 1_000), min_size=2, max_size=2).filter(any)


@given(two_weights, st.integers(1, 9))
def test_counts_keep_to_the_mixture(weights, batch):
    mixture = {"stars": weights[0], "moons": weights[1]}
    made = loader(phase(batch=batch, mixture=mixture))
    counts = drawn_rows(made, 59)
    rows = batch * np.arange(60)
    share = np.array(weights) / sum(weights)
    due = rows[:, None] * share
    equal(counts.sum(1), rows)
    assert np.all(np.diff(counts, axis=0) >= 0)
    assert np.all(np.abs(counts - due) < 1 + 1e-6)


four_weights = st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any)


@given(st.lists(four_weights, min_size=20, max_size=20), st.integers(1, 9))
def test_counts_keep_to_a_mixture_that_changes(weights, batch):
    """Of four sources, at random from step to step; and nothing is drawn less than no times."""
    def mixture(progress, losses):
        step = round(progress * 20)
        return dict(zip("abcd", weights[step], strict=True))

    config = replace(SKY, sources=dict.fromkeys("abcd", Source(moons)))
    caches = dict.fromkeys("abcd", sky.caches()["moons"])
    phases = [phase(steps=20, batch=batch, mixture=mixture)]
    made = data.Loader(caches, phases, config, Points(), 0)

    counts = drawn_rows(made, 20)
    total = np.sum(weights, axis=1, keepdims=True)
    shares = np.array(weights) / total
    due = batch * np.cumsum(shares, axis=0)
    equal(counts.sum(1), batch * np.arange(21))
    assert np.all(np.diff(counts, axis=0) >= 0)
    assert np.max(np.abs(counts[1:] - due)) < 2


def test_a_mixture_is_a_function_of_the_phase_s_own_progress():
    """Which is 0 at the phase's first step. A source without weight does not come."""
    made = loader(phase(steps=3), phase(steps=100, mixture=rising))
    draws = made.draws[1]
    assert draws.shares(0).tolist() == [1, 0]
    assert draws.shares(25).tolist() == [0.75, 0.25]
    assert drawn(made, 1, phase=1).tolist() == [4, 0]
    _, moons_drawn = drawn(made, 100, phase=1)
    assert moons_drawn == pytest.approx(4 * 49.5, abs=1)
    assert moon_rows(made.batch(4)) == 0
    assert np.all(made.batch(103).arrays["source"])


def to_suns(progress, losses):
    """A mixture of a source that there is not."""
    return {"suns": 1}


BAD = {
    "unknown": dict(stars=1, suns=1),
    "negative": dict(stars=-1, moons=2),
    "nothing": dict(stars=0, moons=0),
    "empty": {},
    "function": to_suns,
    "nan": dict(stars=math.nan, moons=1),
    "infinite": dict(stars=math.inf, moons=1),
}


@pytest.mark.parametrize("mixture", BAD.values(), ids=BAD)
def test_an_impossible_mixture_is_refused_with_the_sources_that_there_are(mixture):
    with pytest.raises(InputError, match=r"phases\.1\.mixture.*stars, moons"):
        loader(phase(steps=2), phase(mixture=mixture)).batch(3)


weights_or_none = st.lists(st.integers(0, 9), min_size=3, max_size=3)


@given(weights_or_none.filter(any), st.integers(1, 12), weights_or_none)
def test_rows_are_apportioned_whole_and_within_what_is_left(weights, rows, left):
    """Where too little is left for that, nothing has a limit here."""
    owed = np.array(weights) / sum(weights) * rows
    limits = np.full(3, math.inf)
    if sum(left) >= rows:
        limits = np.array(left, float)

    whole = data.apportion(owed, rows, limits)

    assert whole.sum() == rows
    assert np.all(whole >= 0)
    assert np.all(whole <= limits)
    if np.all(limits >= np.ceil(owed)):
        assert np.all(np.abs(whole - owed) < 1)


# ------------------------------------------------------------------------------ sources with an end


def limited_moons(epochs: float, after: str = "stop") -> dict[str, Source]:
    """The sources of the sky, where a run may pass so often over the moons."""
    return {"stars": Source(stars), "moons": Source(moons, epochs=epochs, after=after)}


def test_a_source_that_ends_with_a_batch_stops_the_run_too():
    """Exactly as many rows as whole batches want: the next step has none, and nobody takes over."""
    rows = rows_of(loader(phase()), source=1).epoch
    tenth = phase(batch=10, mixture=dict(stars=0.9, moons=0.1))
    made = loader_with(limited_moons(1.0), tenth)
    _, moons_drawn = drawn(made, rows)
    assert moons_drawn == rows
    with pytest.raises(InputError, match=f"moons: no rows left at step {rows} "):
        drawn(made, rows + 1)


FEW_THEN_MANY = (
    phase(steps=20, batch=9, mixture=dict(stars=0.5, moons=0.5)),
    phase(steps=80, batch=9, mixture=dict(stars=0.1, moons=0.9)),
)


def test_a_source_that_may_not_end_stops_the_run():
    made = loader_with(limited_moons(1.5, after="stop"), *FEW_THEN_MANY)
    with pytest.raises(InputError, match="moons: no rows left at step"):
        made.batch(100)


def test_a_source_that_may_end_leaves_its_share_to_the_others():
    """And it comes no more often than its epochs allow."""
    made = loader_with(limited_moons(1.5, after="renormalise"), *FEW_THEN_MANY)
    most = int(rows_of(made, source=1).epoch * 1.5)
    counts = first_rows(made, 1) + drawn_rows(made, 80, phase=1)
    each_step = np.diff(counts, axis=0)
    assert np.max(counts[:, 1]) == most
    assert counts[-1].sum() == 9 * 100
    assert np.all(each_step.sum(1) == 9)


def test_a_source_that_went_beyond_its_epochs_gives_no_rows():
    """An epoch of the second phase has fewer rows, so that the first drew more than all of them."""
    def moons_alone(steps):
        return phase(steps=steps, packing=halves, batch=1, mixture=dict(moons=1))

    most = rows_of(loader(moons_alone(5_000)), source=1).epoch
    both = phase(steps=4, mixture=dict(stars=1, moons=1))
    sources = limited_moons(1.0, after="renormalise")
    made = loader_with(sources, moons_alone(most), both)

    _, first_moon = first_rows(made, 1)
    assert first_moon > rows_of(made, phase=1, source=1).epoch
    assert drawn(made, 4, phase=1).tolist() == [16, 0]
    batch = made.batch(most + 1)
    assert batch.rows == 4
    assert moon_rows(batch) == 0


def test_a_source_without_weight_does_not_stand_in():
    sources = limited_moons(0.5, after="renormalise")
    made = loader_with(sources, phase(mixture=dict(moons=1)))
    with pytest.raises(InputError, match="no rows left"):
        made.batch(5_000)


def test_to_run_out_of_every_source_is_refused():
    sources = {"moons": Source(moons, epochs=0.5, after="renormalise")}
    made = loader_with(sources, phase())
    with pytest.raises(InputError, match="moons: no rows left"):
        made.batch(5_000)


# ----------------------------------------------------------------------------------------- steering


def by_log(progress, log):
    """A mixture by the last losses; without any, the stars alone."""
    if log:
        return log[-1]
    return {"stars": 1}


def test_a_steered_mixture_follows_its_log_and_nothing_else():
    """Decisions come in turn. A loader that is given the log draws the same."""
    phases = phase(steps=4), phase(steps=12, mixture=by_log, steer=4)
    made = loader(*phases)
    assert made.decided() == 8
    batches = [made.batch(step) for step in range(1, 9)]
    with pytest.raises(InputError, match="beyond the decisions"):
        made.batch(9)

    mostly_moons = {"stars": 1.0, "moons": 3.0}
    made.decide(1, mostly_moons)
    assert made.decided() == 12
    batches += [made.batch(step) for step in range(9, 13)]

    moons_alone = {"moons": 1.0}
    made.decide(1, moons_alone)
    assert made.decided() == 16
    assert made.log == [[], [mostly_moons, moons_alone]]
    batches += [made.batch(step) for step in range(13, 17)]

    moon_share = [np.mean(batch.arrays["source"]) for batch in batches]
    assert moon_share[4:8] == [0, 0, 0, 0]
    assert np.mean(moon_share[8:12]) == 0.75
    assert moon_share[12:] == [1, 1, 1, 1]

    again = loader(*phases)
    again.restore(made.start, made.log)
    for step in (16, 9, 3):
        same(again.batch(step), batches[step - 1])
