"""lib/objectives.py: rows with unlike masks become one batch."""
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
    """A mask as an objective gives it."""
    return {"kind": kind, "window": window}


def row(length: int = 12, seed: int = 0, **more) -> dict:
    """A row of segments of random sizes, with padding at the end."""
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(1, 4, length)).astype(np.int32)
    padding = rng.integers(0, 3)
    segments[length - padding:] = 0
    tokens = np.arange(length, dtype=np.int32)
    return {"tokens": tokens, "segments": segments} | more


def seen(one: dict, arrays: dict) -> np.ndarray:
    """[t, s]: does the position t of a row see the position s, both real?"""
    index = np.arange(len(arrays["segments"]))
    segments = arrays["segments"][None]
    prefix = None
    if "prefix" in arrays:
        prefix = arrays["prefix"][None]
    found = allowed(Mask(**one), index, index, segments, segments, prefix)
    real = arrays["segments"] > 0
    return np.array(found[0]) & real[:, None] & real[None]


def test_one_segment_is_a_row_whose_positions_run_on():
    before = {
        "tokens": np.arange(8),
        "segments": np.array([1, 1, 1, 2, 2, 3, 0, 0], np.int32),
        "positions": np.array([0, 1, 2, 0, 1, 0, 0, 0], np.int32),
    }
    _, plain_mask = causal(before, None)

    made, given_mask = one_segment(before, np.random.default_rng(0))

    assert made["segments"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert made["positions"].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert made["tokens"] is before["tokens"]
    assert given_mask == plain_mask
    assert before["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]  # as it was


kinds_of_a_batch = st.lists(
    st.sampled_from(["causal", "prefix", "bidirectional"]), min_size=1, max_size=5
)


@given(kinds_of_a_batch, st.sampled_from([0, 3]), st.sampled_from([np.int32, bool]))
def test_each_row_of_a_batch_sees_what_its_own_mask_lets_it_see(kinds, window, dtype):
    rng = np.random.default_rng(len(kinds))
    made = {}
    for r, kind in enumerate(kinds):
        own = row(seed=r)
        prefix = rng.integers(0, 2, 12).astype(dtype)
        if kind == "prefix":
            own["prefix"] = prefix
        made[r] = own, mask(kind, window)

    arrays, joined = stack(made, np.arange(len(kinds)), (), "it")

    alike = len(set(kinds)) == 1
    kind = kinds[0] if alike else "prefix"
    assert joined == mask(kind, window)
    for r, (before, own_mask) in made.items():
        here = {name: values[r] for name, values in arrays.items()}
        equal(seen(joined, here), seen(own_mask, before))
        equal(here["tokens"], before["tokens"])
        if kind == "prefix":
            assert "prefix" in here
        if alike:
            assert here.keys() == before.keys()
            assert all(here[name].dtype == before[name].dtype for name in here)


PLAIN = row(), mask("causal")
NARROW = row(), mask("causal", 3)
UNKNOWN = row(), mask("sideways")
SINK = row(), mask("causal") | {"sink": 1}
NO_PREFIX = row(), mask("prefix")
NOISE = row(noise=np.zeros(12)), mask("causal")


@pytest.mark.parametrize("first, second, words", [
    pytest.param(PLAIN, NARROW, [str(PLAIN[1]), str(NARROW[1])], id="another window"),
    pytest.param(PLAIN, UNKNOWN, [str(PLAIN[1]), str(UNKNOWN[1])], id="an unknown kind"),
    pytest.param(PLAIN, SINK, ["'sink': 1"], id="another argument"),
    pytest.param(PLAIN, NO_PREFIX, ["prefix [seq]"], id="a prefix mask without its array"),
    pytest.param(PLAIN, NOISE, ["tokens, segments, noise"], id="an array more"),
    pytest.param(NOISE, PLAIN, ["tokens, segments, noise"], id="an array less"),
])
def test_rows_that_do_not_go_together_are_refused_by_a_sentence(first, second, words):
    with pytest.raises(InputError) as refused:
        stack({0: first, 1: second}, np.arange(2), (), "phases.3.objective")
    for word in ["phases.3.objective", "allowed", *words]:
        assert word in str(refused.value)


def test_declared_masks_decide_whatever_the_rows_at_hand_are():
    declared = mask("causal"), mask("bidirectional")
    made = {
        4: (row(), mask("causal")),
        6: (row(seed=1), mask("causal")),
    }
    arrays, joined = stack(made, np.array([4, 6]), declared, "it")
    assert joined == mask("prefix")
    equal(arrays["prefix"], np.zeros((2, 12), np.int32))


def test_a_mask_that_was_not_declared_is_refused():
    declared = mask("causal"), mask("bidirectional")
    other = mask("causal", 5)
    with pytest.raises(InputError, match=re.escape(str(other))):
        stack({0: (row(), other)}, np.array([0]), declared, "it")


def test_only_objectives_that_say_so_have_declared_masks():
    def silent(row, rng):
        return row, mask("causal")

    assert declared_masks([silent]) == ()
    assert declared_masks([causal, silent]) == ()
    assert declared_masks([causal]) == (mask("causal"),)
    assert declared_masks([one_segment, causal]) == (mask("causal"),)
