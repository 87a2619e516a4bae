"""configs/selection/d4.py and ingenious.py: embeddings, clusters, near-copies, facility location."""
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strong
from data_cases import everything_of, some

import model
from lib.config import ROOT, load_file
from lib.errors import InputError
from lib.kernels import Mask
from lib.packing import DOCUMENT, LENGTH
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library
d4, ingenious = (load_file(ROOT / f"configs/selection/{name}.py") for name in ("d4", "ingenious"))


def unit(x):
    """Rows of norm 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def run(tiny, monkeypatch):
    """A run "it" of a tiny model in bytes."""
    params = strong(tiny)

    class Found:
        model = tiny

    monkeypatch.setattr(d4, "load", lambda run: (params, Found, Bytes(), None))
    return params


def test_an_embedding_is_the_final_state_at_the_last_token_of_each_document_alone(run, tiny):
    documents = everything_of(lambda: some(70))
    found = d4.embed(documents, Bytes(), "it", length=64)
    assert found.shape == (70, tiny.embed)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    for i in (0, 63, 64, 69):
        ids = np.insert(np.asarray(documents.ids(i)[:63], np.int32), 0, Bytes().bos)[None]
        states, _ = model.forward(run, model.whole(jnp.asarray(ids)), Mask("causal", 0), tiny)
        np.testing.assert_allclose(found[i], unit(np.asarray(states)[0, -1]), atol=1e-5)


def test_a_run_with_another_tokenizer_is_refused(run):
    other = Bytes()
    other.model = b"another"
    with pytest.raises(InputError, match="another tokenizer"):
        d4.embed(everything_of(some), other, "it")


def test_k_means_finds_planted_clusters():
    rng = np.random.default_rng(0)
    centers = np.eye(12)[:5]
    truth = rng.integers(0, 5, 200)
    x = unit(centers[truth] + 0.05 * rng.normal(size=(200, 12)))
    cluster, near = d4.k_means(x, 5, seed=4)
    again = d4.k_means(x, 5, seed=4)
    np.testing.assert_array_equal(cluster, again[0])
    for i, j in itertools.combinations(range(200), 2):  # of a cluster is of one truth
        assert truth[i] == truth[j] or cluster[i] != cluster[j]
    for c in np.unique(cluster):
        center = unit(x[cluster == c].sum(0))
        np.testing.assert_allclose(near[cluster == c], x[cluster == c] @ center)


def test_of_copies_in_a_cluster_one_stays_and_is_the_farthest_from_the_centroid():
    x = unit(np.array([[1, 0, 0], [1, 0.01, 0], [0, 1, 0], [1, 0, 0.02], [1, 0, 0]], float))
    cluster, near = np.array([0, 0, 0, 0, 1]), np.array([0.9, 0.8, 0.2, 0.7, 1.0])
    found = d4.copies(x, cluster, near)  # the order in cluster 0 is 2, 3, 1, 0
    like = x @ x.T
    np.testing.assert_allclose(found, [max(like[0, 1], like[0, 2], like[0, 3]),
                                       max(like[1, 2], like[1, 3]), -1, like[3, 2], -1])
    assert (found <= 1 - 0.1).tolist() == [False, False, True, True, True]


def test_a_packing_by_d4_drops_planted_copies_and_then_the_nearest_to_centroids(run, monkeypatch):
    rng = np.random.default_rng(1)
    x = unit(rng.normal(size=(40, 8)))
    x[20:] = x[:20]  # each document twice
    monkeypatch.setattr(d4, "embed", lambda *_: x)
    lengths = np.full(40, 10)
    plan = d4.d4(lengths, 16, None, Bytes(), "it", dedup=0.5, share=0.5, clusters=1)
    assert sorted({i % 20 for i in plan[:, DOCUMENT]}) == list(range(20))
    assert plan[:, LENGTH].sum() == 200
    plan = d4.d4(lengths, 16, None, Bytes(), "it", dedup=1.0, share=0.25, clusters=1)
    far = np.argsort(d4.k_means(x, 1)[1])[:10]
    assert {*plan[:, DOCUMENT]} == {*far}


def test_greedy_gains_are_those_of_facility_location_and_near_its_best():
    rng = np.random.default_rng(2)
    x = unit(np.abs(rng.normal(size=(12, 4))))
    like = x @ x.T

    def covers(some):
        return like[:, list(some)].max(1).sum()

    found = ingenious.gains(like, 3)
    chosen = np.flatnonzero(found)
    assert len(chosen) == 3
    order = sorted(chosen, key=lambda j: -found[j])  # gains never rise
    sums = [covers(order[:i + 1]) for i in range(3)]
    np.testing.assert_allclose(np.cumsum(found[order]), sums)
    best = max(covers(some) for some in itertools.combinations(range(12), 3))
    assert (1 - 1 / np.e) * best <= sums[-1] <= best


def test_facility_location_takes_one_of_each_group_of_copies():
    group = np.repeat(np.arange(4), 5)
    like = (group[:, None] == group).astype(float)
    assert {*group[ingenious.gains(like, 4) > 0]} == {0, 1, 2, 3}


def test_a_packing_by_facility_location_has_its_share_and_the_seed_decides(run):
    documents = everything_of(lambda: some(60))
    lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
    plans = [ingenious.facility(lengths, 32, documents, Bytes(), "it", share=0.5, part=25, seed=seed)
             for seed in (0, 0, 1)]
    np.testing.assert_array_equal(plans[0], plans[1])
    assert plans[0].shape != plans[2].shape or np.any(plans[0] != plans[2])
    total = plans[0][:, LENGTH].sum()
    assert lengths.sum() / 2 <= total < lengths.sum() / 2 + lengths.max()
