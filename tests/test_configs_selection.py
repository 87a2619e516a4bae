"""configs/selection/: curricula, selection by a rating, mixtures."""
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prose
from data_cases import PLAIN, everything_of, load, load_all, some

import data
from lib.cache import Shard
from lib.config import ROOT, load_file
from lib.packing import DOCUMENT, LENGTH, ROW
from lib.tokenizers import Bytes

CHAPTER = ROOT / "configs/selection"
climb, qurating, skill_it = (load_file(CHAPTER / f"{name}.py")
                             for name in ("climb", "qurating", "skill_it"))

# -------------------------------------------------------------------------------------------- climb


@pytest.mark.parametrize("pacing, middle", [("linear", 0.5), ("root", math.sqrt(0.5)),
                                            ("exponential", 1 / (math.exp(5) + 1)), ("step", 0.0)])
def test_pacing_begins_with_the_first_share_and_ends_with_all(pacing, middle):
    share = partial(climb.share, pacing=pacing)
    assert share(0.0) == share(1 / 16) == 0.1 and share(7 / 8) == share(1.0) == 1
    assert share((1 / 16 + 7 / 8) / 2) == pytest.approx(0.1 + 0.9 * middle, abs=1e-12)
    along = [share(t) for t in np.linspace(0, 1, 101)]
    assert all(a <= b for a, b in itertools.pairwise(along))


@pytest.mark.parametrize("hard", [False, True])
def test_rows_are_drawn_from_a_pool_of_the_paced_size_and_all_at_the_end(hard):
    def drawn(t):
        found = {climb.paced(i, 50, t, (1, 0), "linear", 0.1, hard) for i in range(1_500)}
        return sorted(49 - place for place in found) if hard else sorted(found)

    middle = (1 / 16 + 7 / 8) / 2
    assert drawn(0.0) == list(range(5)) and drawn(middle) == list(range(28)) and drawn(1.0) == list(range(50))
    assert [climb.paced(i, 50, 1.0, (1, 0)) for i in range(9)] != [
        climb.paced(i, 50, 1.0, (2, 0)) for i in range(9)]


def test_sorted_once_takes_each_row_once_an_epoch_in_order():
    assert [climb.sorted_once(i, 4, 0.0, (0,)) for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [climb.sorted_once(i, 4, 0.0, (0,), hard=True) for i in range(6)] == [3, 2, 1, 0, 3, 2]


@pytest.mark.parametrize("inner", climb.PACKINGS)
def test_rows_are_sorted_by_the_mean_score_of_their_positions_and_hold_what_the_packing_gave(inner):
    documents = everything_of(partial(some, number=40))
    score = np.random.default_rng(0).random(40)
    lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
    plan = climb.PACKINGS[inner](lengths, 32)
    made = climb.sort_rows(plan, score)
    mean = [np.average(score[rows[:, DOCUMENT]], weights=rows[:, LENGTH]) for rows in
            (made[made[:, ROW] == r] for r in range(made[-1, ROW] + 1))]
    assert np.all(np.diff(mean) >= 0) and np.all(np.diff(made[:, ROW]) >= 0)
    before, after = (sorted(p[p[:, ROW] == r][:, 1:].tolist() for r in range(p[-1, ROW] + 1))
                     for p in (plan, made))
    assert before == after


@pytest.mark.parametrize("hard", [False, True])
def test_a_curriculum_s_batches_begin_with_the_shortest_documents(hard):
    phase = replace(PLAIN, packing=climb.easy_first, order=partial(climb.sorted_once, hard=hard))
    loader = load(partial(some, number=40), phase, score=climb.length)
    documents, _, plan = loader.rows[0][0][0].window(0)
    score = documents.of(lambda shard: shard.score)
    of_row = score[plan[np.unique(plan[:, ROW], return_index=True)[1], DOCUMENT]]
    assert np.all(np.diff(of_row) >= 0) and of_row[0] == score.min() < of_row[-1] == score.max()
    first = bytes(loader.batch(1).arrays["targets"][0][:10].astype(np.uint8)).decode()
    assert (first == prose(0, 10)) == (not hard)


def test_scores_of_a_document():
    easy, hard = data.Document("a", "aaaa " * 99, dict(level=3)), data.Document("b", prose(0, 495))
    assert climb.length(easy, [1, 2]) == 2
    assert climb.compressibility(easy, []) < 0.1 < 0.3 < climb.compressibility(hard, [])
    assert climb.field(easy, [], "level") == 3 and climb.field(hard, [], "level") == math.inf


def planted():
    """Three documents of common and one of rare bytes."""
    yield from (data.Document(str(i), "a" * 30) for i in range(3))
    yield data.Document("rare", "ab")


def test_rarity_is_the_mean_negative_log_frequency_of_tokens():
    documents = everything_of(planted)
    paths = [d["path"] for d in documents.of(Shard.documents)]
    found = dict(zip(paths, climb.rarity(documents), strict=True))
    a, b = -math.log(91 / 92), -math.log(1 / 92)
    assert found["0"] == pytest.approx(a) and found["rare"] == pytest.approx((a + b) / 2)
    plan = climb.easy_first(np.full(4, 31), 31, documents, by="rarity")
    assert paths[plan[-1, DOCUMENT]] == "rare"


def test_loss_under_a_checkpoint_is_that_of_its_model_over_its_own_tokens(monkeypatch):
    def apply(params, ids):
        logits = np.zeros((*ids.shape, 258))
        logits[..., ord("a")] = 3
        return logits

    monkeypatch.setattr(climb, "model_of", lambda run: (None, None, Bytes(), apply))
    total = math.log(257 + math.exp(3))
    found = climb.loss(data.Document("x", "aab"), [], run="somewhere")
    assert found == pytest.approx((2 * (total - 3) + 2 * total) / 4)  # a a b, and the end
    assert climb.loss(data.Document("x", "a" * 9), [], run="", context=4) == pytest.approx(total - 3)


@pytest.mark.parametrize("packing", [climb.easy_first, qurating.top, qurating.sampled,
                                     partial(qurating.threshold, least=0.5)])
def test_what_needs_scores_is_refused_without_them(packing):
    with pytest.raises(data.InputError, match="has none"):
        load(partial(some, number=4), replace(PLAIN, packing=packing))


def test_names_that_are_not_known_are_refused_by_a_sentence():
    with pytest.raises(data.InputError, match="'cubic'; allowed are linear, root, exponential, step"):
        climb.share(0.5, "cubic")
    for packing in (climb.easy_first, qurating.top):
        with pytest.raises(data.InputError, match="'worst_fit'.*allowed are concat, best_fit"):
            packing(np.full(3, 4), 4, scored([1, 2, 3]), packing="worst_fit")


# ----------------------------------------------------------------------------------------- qurating


class Scored(SimpleNamespace):
    """Documents of one shard, as a packing sees them."""

    def of(self, fact):
        return fact(self.shard)


def scored(score, name: str = "000003") -> Scored:
    shard = SimpleNamespace(score=np.asarray(score, np.float32), split=np.zeros(len(score), np.uint8),
                            directory=SimpleNamespace(name=name))
    return Scored(shard=shard)


def kept(plan: np.ndarray) -> list[int]:
    return np.unique(plan[:, DOCUMENT]).tolist()


@pytest.mark.parametrize("inner", qurating.PACKINGS)
def test_top_and_threshold_keep_exactly_the_documents_that_score_highest(inner):
    score, lengths = np.array([0.3, 0.9, -1.0, 0.5, 0.9, 0.0]), np.array([10, 20, 30, 40, 50, 50])
    documents = scored(score)
    for share, expected in ((0.1, [1]), (0.35, [1, 4]), (0.36, [1, 3, 4]), (0.6, [0, 1, 3, 4]),
                            (1.0, [0, 1, 2, 3, 4, 5])):
        assert kept(qurating.top(lengths, 16, documents, share, inner)) == expected
    plan = qurating.threshold(lengths, 16, documents, 0.5, inner)
    assert kept(plan) == [1, 3, 4]
    whole = np.bincount(plan[:, DOCUMENT], plan[:, LENGTH], 6)
    assert whole.tolist() == [0, 20, 0, 40, 50, 0]
    assert np.all(np.bincount(plan[:, ROW], plan[:, LENGTH]) <= 16)
    assert len(qurating.threshold(lengths, 16, documents, 2.0, inner)) == 0


def test_sampling_includes_documents_as_often_as_drawing_one_by_one_without_replacement():
    score = np.array([0.0, 1.0, 2.0, 3.0, 0.5])
    documents, lengths, temperature = scored(score), np.full(5, 4), 0.7
    chance = np.exp((score - score.mean()) / score.std() / temperature)
    expected = np.zeros(5)
    for order in itertools.permutations(range(5), 2):  # two of five
        left, p = chance.sum(), 1.0
        for i in order:
            p, left = p * chance[i] / left, left - chance[i]
        expected[list(order)] += p
    draws, found = 4_000, np.zeros(5)
    for seed in range(draws):
        found[kept(qurating.sampled(lengths, 16, documents, 0.4, temperature, seed))] += 1
    assert expected.sum() == pytest.approx(2) and found.sum() == 2 * draws
    assert np.all(np.abs(found / draws - expected) < 4 * np.sqrt(expected * (1 - expected) / draws))


def test_sampling_is_the_seed_s_own_and_of_the_document_not_of_the_order():
    documents, lengths = scored(np.zeros(50)), np.full(50, 4)
    first = kept(qurating.sampled(lengths, 16, documents, 0.5, 2.0, 1))
    assert first == kept(qurating.sampled(lengths, 16, documents, 0.5, 2.0, 1)) and len(first) == 25
    assert first != kept(qurating.sampled(lengths, 16, documents, 0.5, 2.0, 2))
    assert first != kept(qurating.sampled(lengths, 16, scored(np.zeros(50), "000004"), 0.5, 2.0, 1))
    cold = scored(np.arange(50.0))
    assert kept(qurating.sampled(lengths, 16, cold, 0.5, 1e-6)) == list(range(25, 50))
    by_seed = []
    for seed in (0, 1):  # of the run: it permutes the documents
        source = {"one": data.Source(partial(some, number=40), score=climb.length)}
        loader = load_all(source, replace(PLAIN, packing=partial(qurating.sampled, share=0.5)), seed=seed)
        documents, _, plan = loader.rows[0][0][0].window(0)
        by_seed.append({documents.of(Shard.documents)[i]["path"] for i in kept(plan)})
    assert by_seed[0] == by_seed[1]


# ----------------------------------------------------------------------------------------- skill_it


def shares_of(weights: dict) -> list[float]:
    return [w / sum(weights.values()) for w in weights.values()]


def test_the_steered_rule_is_skill_it_s():
    graph = [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    names = list("abcde")
    rule = partial(skill_it.steered, 0.5, names=names, graph=graph, eta=0.5)
    first, second = dict.fromkeys(names, 2.0), dict(zip(names, (0.1, 1, 2, 2, 2), strict=True))
    assert shares_of(rule([])) == pytest.approx([.163, .346, .163, .163, .163], abs=6e-4)
    assert shares_of(rule([first])) == pytest.approx([.118, .528, .118, .118, .118], abs=6e-4)
    assert shares_of(rule([first, second])) == pytest.approx([.035, .691, .091, .091, .091], abs=6e-4)
    assert rule([second, first, first, first]) == rule([first] * 3)  # a window of three
    alone = skill_it.steered(0.5, [dict(a=1.0, b=3.0)], ["a", "b"], eta=0.5)
    assert alone["b"] / alone["a"] == pytest.approx(math.e)


def test_a_steered_loader_draws_by_its_log():
    names = ["a", "b"]
    sources = {n: data.Source(partial(some, number=20 + i)) for i, n in enumerate(names)}
    phase = replace(PLAIN, steps=20, batch=8, steer=10,
                    mixture=partial(skill_it.steered, names=names, eta=math.log(3) / 2))
    rows = [[load_all(sources, phase, log=[log]).batch(step).metrics["data/b/rows"] for step in (1, 15)]
            for log in ([dict(a=1.0, b=3.0)], [dict(a=3.0, b=1.0)])]
    assert rows == [[4, 6], [4, 2]]
