"""configs/bursty.py and configs/understanding/bursty.py: what rows hold, by count."""
import jax
import numpy as np
import pytest

import model
import train
from configs import bursty
from configs.bursty import LABELS, LENGTH, PAIRS, D
from lib.config import ROOT, load_file

pytestmark = pytest.mark.library
file = load_file(ROOT / "configs/understanding/bursty.py")


def test_a_bursty_row_has_the_query_s_class_and_another_so_often():
    what = bursty.classes(2000, 512, 0.0, 3, 0.5, np.random.default_rng(0))
    assert what.shape == (2000, PAIRS + 1)
    own = np.sum(what[:, :-1] == what[:, -1:], 1)
    assert abs(np.mean(own >= 3) - 0.5) < 0.04 and abs(np.mean(own == 0) - 0.5) < 0.05
    most = [sorted(np.unique(row[:-1], return_counts=True)[1])[-2:] for row in what[own >= 3]]
    assert np.mean([pair == [3, 3] for pair in most]) > 0.9
    zipf = bursty.classes(4000, 512, 1.0, 0, 0.0, np.random.default_rng(1)).ravel()
    total = np.sum(1 / np.arange(1, 513))
    for rank in (1, 2, 10):
        assert np.mean(zipf == rank - 1) == pytest.approx(1 / rank / total, rel=0.15)


def test_items_are_near_the_point_of_their_class():
    """Length 1; an item's cosine to its point is 1 / sqrt(1 + noise²)."""
    points = bursty.world(2048, 0.0)[0]
    seen = bursty.items(points, np.random.default_rng(2))
    np.testing.assert_allclose(np.mean(np.sum(seen**2, 1)), 1, rtol=0.02)
    cosine = np.sum(seen * points, 1) / np.linalg.norm(seen, axis=1) / np.linalg.norm(points, axis=1)
    np.testing.assert_allclose(np.mean(cosine), (1 + bursty.NOISE**2) ** -0.5, atol=0.02)


@pytest.mark.parametrize("kind", ["context", "swapped", "weights"])
def test_what_is_asked_can_be_answered_in_one_way(kind):
    """Who copies the nearest item's label is right on the first two, who knows by heart on the last."""
    known = 512
    x, right = bursty.rows_of(kind, known, 0.0, 600, np.random.default_rng(3))
    assert x.shape == (600, LENGTH, D + LABELS) and x.dtype == np.float32
    seen, labels = x[:, ::2, :D], x[:, 1::2, D:].argmax(-1)
    near = np.einsum("nkd,nd->nk", seen[:, :-1], seen[:, -1]).argmax(1)
    copied = np.mean(np.take_along_axis(labels, near[:, None], 1)[:, 0] == right)
    points, label_of, _ = bursty.world(known, 0.0)
    heart = np.mean(label_of[(seen[:, -1] @ points.T).argmax(1)] == right)
    if kind == "weights":
        assert copied < 0.2 and heart > 0.9
        return
    assert copied > 0.9 and heart < 0.2
    assert all(np.array_equal(np.unique(row, return_counts=True)[1], [4, 4]) for row in labels)
    if kind == "swapped":
        own = label_of[(seen[:, -1] @ points.T).argmax(1)]
        assert np.mean([set(row) == {a, b} for row, a, b in zip(labels, right, own, strict=True)]) > 0.9


def test_what_one_answer_to_all_is_right_on():
    """The shares in the study's header."""
    for known, zipf, share in ((2048, 0.0, 0.08), (2048, 1.0, 0.11), (32, 0.0, 0.16)):
        _, right = bursty.rows_of("weights", known, zipf, 1024, np.random.default_rng(3))
        assert np.bincount(right).max() / len(right) == pytest.approx(share, abs=0.005)


def test_a_row_of_training_is_one_of_these_with_loss_on_the_query():
    row = {"tokens": np.zeros(2 * LENGTH, np.int32)}
    made, mask = bursty.burstiness(row, np.random.default_rng(4), 64, 0.0, 3, 1.0)
    assert mask == {"kind": "causal", "window": 0}
    assert np.flatnonzero(made["weights"]).tolist() == [LENGTH - 1, 2 * LENGTH - 1]
    assert made["segments"].tolist() == [1] * LENGTH + [2] * LENGTH
    labels = made["x"][LENGTH + 1::2, D:].argmax(-1)
    assert np.sum(labels == made["targets"][-1]) >= 3
    for arm in file.study.arms.values():
        train.check(arm)


def test_every_arm_gives_a_number_for_each_label(tiny):
    for arm in ("bursty", "recurrent"):
        config = file.study.arms[arm].model
        params = jax.jit(lambda key, config=config: model.init(config, key))(jax.random.key(0))
        x, _ = bursty.rows_of("context", 64, 0.0, 2, np.random.default_rng(5))
        said = jax.jit(lambda p, x, config=config: model.apply(p, dict(x=x), config))(params, x)
        assert said.shape == (2, LENGTH, LABELS)
        assert not {"embed", "head"} & params.keys()
        again = jax.jit(lambda p, x, config=config: model.apply(p, dict(x=x), config))(
            params, x + (np.arange(LENGTH) > 4)[:, None])
        np.testing.assert_allclose(again[:, :5], said[:, :5], atol=1e-6)
