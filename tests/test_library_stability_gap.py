"""configs/continual/stability_gap.py: which documents a part holds, and what a gap is."""
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from configs.continual import stability_gap as own
from data import concat_and_split
from lib.packing import DOCUMENT, LENGTH

pytestmark = pytest.mark.library


def documents(name: str, score: np.ndarray):
    """A window of a source, whose documents have these scores."""
    shard = SimpleNamespace(score=score, split=score, directory=SimpleNamespace(name="0"))
    return SimpleNamespace(cache=SimpleNamespace(name=name), of=lambda fact: np.asarray(fact(shard)))


def test_a_part_is_of_the_new_source_alone():
    rng = np.random.default_rng(0)
    lengths, score = rng.integers(5, 60, 200), rng.normal(size=200)
    whole = concat_and_split(lengths, 32)
    np.testing.assert_array_equal(own.part(lengths, 32, documents("old", score)), whole)
    best = own.part(lengths, 32, documents("new", score), share=0.1, best=True)
    chance = own.part(lengths, 32, documents("new", score), share=0.1)
    for plan in (best, chance):
        assert plan[:, LENGTH].sum() == pytest.approx(0.1 * lengths.sum(), abs=60 + 32)
    taken = np.unique(best[:, DOCUMENT])
    assert score[taken].min() >= np.sort(score)[-len(taken) - 1]
    assert abs(score[np.unique(chance[:, DOCUMENT])].mean()) < score[taken].mean() / 2


def test_a_gap_is_the_highest_rise_above_the_beginning():
    losses = [2.0, 2.5, 2.3, 2.1]
    rows = [{"eval/old/loss": loss} for loss in losses] + [{"train/loss": 9.0}]
    assert own.rise(rows) == 0.5 and own.rise(rows, at=-1) == pytest.approx(0.1)
    assert partial(own.rise, at=0)(rows) == 0.0
