"""lib/objectives.py: one segment of a row; rows with unlike masks in one batch."""
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.kernels import Mask, allowed
from lib.objectives import causal, declared_masks, one_segment, stack

equal = np.testing.assert_array_equal


def mask(kind: str, window: int = 0) -> dict:
    return {"kind": kind, "window": window}


def row(length: int = 12, seed: int = 0, **more) -> dict:
    """A row of segments of random sizes, with padding at the end."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, length)).astype(np.int32)
    segments[length - rng.integers(0, 3):] = 0
    return dict(tokens=np.arange(length, dtype=np.int32), segments=segments) | more


def seen(one: dict, arrays: dict) -> np.ndarray:
    """[t, s]: does the position t of a row see the position s, both real?"""
    index, segments = np.arange(len(arrays["segments"])), arrays["segments"][None]
    prefix = arrays["prefix"][None] if "prefix" in arrays else None
    found = np.array(allowed(Mask(**one), index, index, segments, segments, prefix)[0])
    real = arrays["segments"] > 0
    return found & real[:, None] & real[None]


def test_one_segment_is_a_row_whose_positions_run_on():
    before = dict(tokens=np.arange(8), segments=np.array([1, 1, 1, 2, 2, 3, 0, 0], np.int32),
                  positions=np.array([0, 1, 2, 0, 1, 0, 0, 0], np.int32))
    made, given_mask = one_segment(before, np.random.default_rng(0))
    assert made["segments"].tolist() == [1] * 6 + [0] * 2
    assert made["positions"].tolist() == [*range(6), 0, 0]
    assert made["tokens"] is before["tokens"] and given_mask == causal(before, None)[1]
    assert before["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


@given(st.lists(st.sampled_from(["causal", "prefix", "bidirectional"]), min_size=1, max_size=5),
       st.sampled_from([0, 3]), st.sampled_from([np.int32, bool]))
def test_each_row_of_a_batch_sees_what_its_own_mask_lets_it_see(kinds, window, dtype):
    rng, made = np.random.default_rng(len(kinds)), {}
    for r, kind in enumerate(kinds):
        prefix = rng.integers(0, 2, 12).astype(dtype)
        more = {"prefix": prefix} if kind == "prefix" else {}
        made[r] = row(seed=r, **more), mask(kind, window)
    arrays, joined = stack(made, np.arange(len(kinds)), (), "it")
    assert joined == mask(kinds[0] if len(set(kinds)) == 1 else "prefix", window)
    for r, (before, own) in made.items():
        here = {key: value[r] for key, value in arrays.items()}
        equal(seen(joined, here), seen(own, before))
        assert "prefix" in here or joined["kind"] != "prefix"
        equal(here["tokens"], before["tokens"])
        if len(set(kinds)) == 1:
            assert here.keys() == before.keys()
            assert all(here[key].dtype == before[key].dtype for key in here)


@pytest.mark.parametrize("first, second, words", [
    ((row(), mask("causal")), (row(), mask("causal", 3)), [str(mask("causal")), str(mask("causal", 3))]),
    ((row(), mask("causal")), (row(), mask("sideways")), [str(mask("causal")), str(mask("sideways"))]),
    ((row(), mask("causal")), (row(), mask("causal") | {"sink": 1}), ["'sink': 1"]),
    ((row(), mask("causal")), (row(), mask("prefix")), ["prefix [seq]"]),
    ((row(), mask("causal")), (row(noise=np.zeros(12)), mask("causal")), ["tokens, segments, noise"]),
    ((row(noise=np.zeros(12)), mask("causal")), (row(), mask("causal")), ["tokens, segments, noise"]),
])
def test_rows_that_do_not_go_together_are_refused_by_a_sentence(first, second, words):
    with pytest.raises(InputError) as refused:
        stack({0: first, 1: second}, np.arange(2), (), "phases.3.objective")
    assert all(word in str(refused.value) for word in ["phases.3.objective", "allowed", *words])


def test_declared_masks_decide_whatever_the_rows_at_hand_are():
    declared = mask("causal"), mask("bidirectional")
    made = {4: (row(), mask("causal")), 6: (row(seed=1), mask("causal"))}
    arrays, joined = stack(made, np.array([4, 6]), declared, "it")
    assert joined == mask("prefix")
    equal(arrays["prefix"], np.zeros((2, 12), np.int32))
    with pytest.raises(InputError, match=re.escape(str(mask("causal", 5)))):
        stack({0: (row(), mask("causal", 5))}, np.array([0]), declared, "it")


def test_only_objectives_that_say_so_have_declared_masks():
    def silent(row, rng):
        return row, mask("causal")

    assert declared_masks([silent]) == declared_masks([causal, silent]) == ()
    assert declared_masks([causal]) == declared_masks([one_segment, causal]) == (mask("causal"),)
