"""Objectives as a loader calls them: random numbers of a row's own, one mask for a whole batch."""
from collections import Counter
from functools import partial
from itertools import groupby

import numpy as np
import pytest
from sky import check_parts, every_so_many, loader, phase

import data
from data import InputError
from lib.objectives import causal, one_segment
from lib.packing import BOUNDS, ROW, SEGMENT, best_fit, concat_and_split, one_per_row

equal = np.testing.assert_array_equal
CAUSAL = {"kind": "causal", "window": 0}
BIDIRECTIONAL = {"kind": "bidirectional", "window": 0}
PREFIX = {"kind": "prefix", "window": 0}


def noisy(row, rng):
    """An objective with an array and a mask of its own."""
    noise = rng.integers(0, 2**31, len(row["tokens"]))
    return row | {"noise": noise}, {"kind": "bidirectional", "window": 3}


def test_an_objective_has_its_say_and_a_generator_for_each_row():
    first = loader(phase(objective=noisy)).batch(1)
    again = loader(phase(objective=noisy)).batch(1)
    second = loader(phase(objective=noisy)).batch(2)

    assert first.mask == {"kind": "bidirectional", "window": 3}
    equal(first.arrays["noise"], again.arrays["noise"])
    rows = np.concatenate([first.arrays["noise"], second.arrays["noise"]])
    assert rows.shape == (8, 32)
    assert len(np.unique(rows, axis=0)) == 8


def mixed(row, rng):
    """An objective of masks by chance: one row in four is bidirectional."""
    if rng.random() < 0.25:
        return row, BIDIRECTIONAL
    return row, CAUSAL


def mixed_and_declared(row, rng):
    """The same, but it says beforehand which masks it may give."""
    return mixed(row, rng)


mixed_and_declared.masks = CAUSAL, BIDIRECTIONAL


def both_ways(step: int) -> list[bool]:
    """Which rows of a batch `mixed` makes bidirectional, by the random numbers of each."""
    generators = [np.random.default_rng([0, step, row]) for row in range(4)]
    return [rng.random() < 0.25 for rng in generators]


def test_unlike_masks_of_a_batch_become_one_prefix_mask():
    """And not that of the first row. A batch whose rows agree has their mask, and no array more."""
    made = loader(phase(objective=mixed))
    plain = loader(phase())
    kinds = Counter()
    for step in range(1, 40):
        batch = made.batch(step)
        expected = plain.batch(step).arrays
        chosen = both_ways(step)
        kinds[batch.mask["kind"]] += 1
        if all(chosen):
            assert batch.mask == BIDIRECTIONAL
        elif not any(chosen):
            assert batch.mask == CAUSAL
        else:
            assert batch.mask == PREFIX
            prefix = batch.arrays.pop("prefix")
            real = expected["segments"] > 0
            equal(prefix, np.array(chosen)[:, None] & real)
            assert prefix.dtype == np.int32
        assert batch.arrays.keys() == expected.keys()
        for name, values in expected.items():
            equal(batch.arrays[name], values, err_msg=name)
    assert kinds["prefix"] > 10
    assert kinds["causal"] > 5


@pytest.mark.parametrize("objective", [mixed, mixed_and_declared, partial(mixed_and_declared)])
def test_processes_agree_on_the_mask_of_a_batch(objective):
    """Each makes its own rows alone, and all have the mask and the arrays of the whole."""
    made = loader(phase(objective=objective))
    for step in range(1, 20):
        check_parts(made, step, 4)
        if objective is not mixed:  # what is declared decides, whatever the rows are
            assert made.batch(step).mask["kind"] == "prefix"


def by_source(row, rng):
    """An objective whose moons are read both ways, within a window that the stars do not have."""
    is_moon = row["source"][0] == 1
    if is_moon:
        return row, {"kind": "bidirectional", "window": 5}
    return row, CAUSAL


def test_masks_that_cannot_be_one_are_refused():
    both = phase(objective=by_source, mixture=dict(stars=1, moons=1))
    made = loader(phase(steps=2), both)
    sentence = r"phases\.1\.objective .*'causal', 'window': 0.*'window': 5"
    with pytest.raises(InputError, match=sentence):
        made.batch(3)


# ----------------------------------------------------------------- the bound on segments of all rows


def torn(lengths, seq):
    """A packing whose rows go back to their first segment, which therefore does not lie together."""
    plan = concat_and_split(lengths, seq)
    last = np.append(np.diff(plan[:, ROW]) > 0, True)
    third = plan[:, SEGMENT] > 2
    plan[last & third, SEGMENT] = 1
    return plan


def two_lengths(progress):
    """As many batches of short rows as of long ones."""
    return {32: 1, 128: 1}


def plain_bound(segments: np.ndarray) -> int:
    """The least of BOUNDS for rows of segments that lie together; 0 where one does not."""
    most = 0
    for row in segments.tolist():
        runs = [segment for segment, _ in groupby(row)]
        if len(set(runs)) < len(runs):
            return 0
        most = max(most, len(runs))
    return min(size for size in BOUNDS if size >= most)


class Halves:
    """An objective that puts the halves of a row into a segment each, and declares it."""

    masks = (CAUSAL,)

    def segments(self, segments: np.ndarray) -> np.ndarray:
        """What it makes of a row's segments."""
        return 1 + (np.arange(len(segments)) >= len(segments) // 2).astype(np.int32)

    def __call__(self, row, rng):
        return row | {"segments": self.segments(row["segments"])}, CAUSAL


class Wrong(Halves):
    """An objective that leaves a row's segments as they are, and declares halves."""

    def __call__(self, row, rng):
        return row, CAUSAL


def test_what_an_objective_declares_of_segments_is_checked():
    with pytest.raises(InputError, match="objective: .*in segments what its own `segments` makes"):
        loader(phase(objective=Wrong())).batch(1)


def test_no_generator_is_made_for_an_objective_that_draws_nothing():
    given = []

    def noted(row, rng):
        given.append(rng)
        return row, CAUSAL

    loader(phase(objective=noted)).batch(1)
    drawing, given = given, []
    noted.draws = False
    loader(phase(objective=noted)).batch(1)
    assert all(isinstance(rng, np.random.Generator) for rng in drawing) and drawing
    assert given == [None] * len(drawing)


@pytest.mark.parametrize("packing, bounds", [
    (concat_and_split, {1, 8, 32}),
    (best_fit, {8, 32}),
    (one_per_row, {8}),
    (torn, {0, 1, 8}),
])
def test_processes_agree_on_the_bound_on_segments(packing, bounds):
    """It is that of the whole batch, though each of them makes a part of the rows."""
    found = set()
    for objective in (causal, one_segment, mixed, {"stars": one_segment}, Halves()):
        made = loader(phase(
            steps=4, batch=8, seq=128, packing=packing, objective=objective, lengths=two_lengths))
        for step in range(1, 5):
            whole = made.batch(step)
            found.add(whole.segments)
            assert whole.segments == plain_bound(whole.arrays["segments"])
            for parts in (2, 8):
                for first in range(parts):
                    part = made.batch(step, every_so_many(first, parts))
                    assert part.segments == whole.segments
    assert found == bounds


def test_a_process_reads_no_tokens_of_rows_that_others_make(monkeypatch):
    made = loader(phase())
    read = []
    ids = data.Documents.ids

    def counted(documents, document):
        read.append(document)
        return ids(documents, document)

    monkeypatch.setattr(data.Documents, "ids", counted)
    part = made.batch(1, every_so_many(0, 4))
    assert len(read) == part.metrics["data/segments"]  # pieces of its one row
    assert part.segments


def declared(row, rng):
    """An objective that makes other segments and says which masks it gives, and no more."""
    return one_segment(row, rng)


declared.masks = (CAUSAL,)


@pytest.mark.parametrize("objective, sources", [
    (declared, dict(stars=1)),
    ({"moons": declared}, dict(stars=1, moons=1)),
])
def test_where_segments_of_others_are_not_known_no_process_says_a_bound(objective, sources):
    """Not even one whose own rows are all of an objective that is known."""
    made = loader(phase(objective=objective, mixture=sources))
    found = {made.batch(1, every_so_many(first, 4)).segments for first in range(4)}
    assert found == {0}
    assert made.batch(1).segments


def test_segments_are_counted_only_where_it_is_asked_for():
    made = loader(phase())
    assert made.batch(1, counted=False).segments == 0
    assert made.batch(1).segments > 0
