"""configs/unlearning/membership.py: Min-K% and areas in closed form, and the nats they are of."""
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import strong

import model
from configs.unlearning import membership as own
from lib.kernels import nll

pytestmark = pytest.mark.library


def test_min_k_is_the_mean_of_the_least_likely_tokens():
    nats = np.array([1.0, 5.0, 2.0, 4.0, 3.0])
    assert own.min_k(nats, 0.4) == -4.5 and own.min_k(nats, 1.0) == -3.0
    assert own.min_k(nats, 0.01) == -5.0  # one token at least


def test_the_area_under_the_curve_counts_pairs():
    assert own.auroc([3, 4], [1, 2]) == 1 and own.auroc([1], [1]) == 0.5
    assert own.auroc([1, 3, 3], [2, 3]) == (0 + 0 + 1 + 0.5 + 1 + 0.5) / 6


def test_the_area_of_two_normals_is_known():
    """Scores N(d, 1) and N(0, 1): the area is Phi(d / sqrt 2)."""
    rng, n = np.random.default_rng(0), 2000
    for d in (0.0, 0.5, 1.0):
        known = statistics.NormalDist().cdf(d / math.sqrt(2))
        found = own.auroc(rng.normal(d, 1, n), rng.normal(0, 1, n))
        assert abs(found - known) < 3 * math.sqrt(1 / (4 * n))


def test_likelihoods_put_the_windows_of_a_document_together(tiny):
    params = strong(tiny)
    rng = np.random.default_rng(0)
    batches = []
    for whose in ([[0, 0, 1, -1], [1, 1, 1, 2]], [[2, 2, -1, -1], [-1] * 4]):
        tokens, targets = rng.integers(0, 258, (2, 2, 4))
        batches.append((dict(tokens=tokens, targets=targets), np.array(whose)))
    documents = SimpleNamespace(paths=["a", "b", "c"], batches=lambda: iter(batches))

    def apply(params, batch):
        return model.apply(params, batch["tokens"], tiny)

    found = own.likelihoods(params, apply, documents)
    each = [np.asarray(nll(apply(params, batch), batch["targets"])) for batch, _ in batches]
    np.testing.assert_allclose(found[0], each[0][0, :2])
    np.testing.assert_allclose(found[1], [each[0][0, 2], *each[0][1, :3]])
    np.testing.assert_allclose(found[2], [each[0][1, 3], *each[1][0, :2]])


def test_groups_are_of_different_modules_and_whole():
    groups = {name: list(own.functions(name)) for name in own.SIZES}
    modules = [{document.group for document in group} for group in groups.values()]
    assert not modules[0] & modules[1] and not modules[0] & modules[2] and not modules[1] & modules[2]
    assert {name: len(group) for name, group in groups.items()} == own.SIZES
    assert {name: source.split for name, source in own.sources.items()} == {
        "member": "train", "other": "dev", "rest": "train"}


def test_arms_read_the_members_as_often_as_they_say():
    for name, times in {"once": 1, "4_times": 4, "16_times": 16}.items():
        [phase] = own.study.arms[name].phases
        drawn = phase.steps * phase.batch * phase.seq * phase.mixture["member"]
        size = sum(len(document.text.encode()) + 2 for document in own.functions("member"))
        assert drawn / size == pytest.approx(times, rel=0.15)
