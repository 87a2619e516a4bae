"""configs/selection/: curricula, selection by a rating, mixtures."""
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prose
from data_cases import PLAIN, everything_of, load, load_all, only_window, some

import data
from lib import scores
from lib.cache import Shard
from lib.config import ROOT, load_file
from lib.packing import DOCUMENT, LENGTH, ROW, sorted_rows
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library

CHAPTER = ROOT / "configs/selection"
climb = load_file(CHAPTER / "climb.py")
qurating = load_file(CHAPTER / "qurating.py")
skill_it = load_file(CHAPTER / "skill_it.py")

# -------------------------------------------------------------------------------------------- climb

START, END = 1 / 16, 7 / 8  # of the phase: where the share of rows begins and ends to grow
MIDDLE = (START + END) / 2


@pytest.mark.parametrize("pacing, middle", [
    ("linear", 0.5),
    ("root", math.sqrt(0.5)),
    ("exponential", 1 / (math.exp(5) + 1)),
    ("step", 0.0),
])
def test_pacing_begins_with_the_first_share_and_ends_with_all(pacing, middle):
    share = partial(climb.share, pacing=pacing)

    assert share(0.0) == 0.1
    assert share(START) == 0.1
    assert share(MIDDLE) == pytest.approx(0.1 + 0.9 * middle, abs=1e-12)
    assert share(END) == 1
    assert share(1.0) == 1
    along = [share(progress) for progress in np.linspace(0, 1, 101)]
    assert np.all(np.diff(along) >= 0)


@pytest.mark.parametrize("hard", [False, True])
def test_rows_are_drawn_from_a_pool_of_the_paced_size_and_all_at_the_end(hard):
    def drawn(progress):
        """Places that were drawn, counted from the easiest row, or from the hardest."""
        paced = partial(climb.paced, pacing="linear", first=0.1, hard=hard)
        rows = {paced(i, 50, progress, (1, 0)) for i in range(1_500)}
        places = {49 - row for row in rows} if hard else rows
        return sorted(places)

    assert drawn(0.0) == list(range(5))
    assert drawn(MIDDLE) == list(range(28))
    assert drawn(1.0) == list(range(50))


def test_rows_are_drawn_by_the_key():
    def drawn(*key):
        return [climb.paced(i, 50, 1.0, key) for i in range(9)]

    assert drawn(1, 0) != drawn(2, 0)


def test_sorted_once_takes_each_row_once_an_epoch_in_order():
    def drawn(**direction):
        return [climb.sorted_once(i, 4, 0.0, (0,), **direction) for i in range(6)]

    assert drawn() == [0, 1, 2, 3, 0, 1]
    assert drawn(hard=True) == [3, 2, 1, 0, 3, 2]


def rows_of(plan: np.ndarray) -> list[np.ndarray]:
    """The pieces of each row of a plan, rows in order."""
    last = plan[-1, ROW]
    return [plan[plan[:, ROW] == row] for row in range(last + 1)]


@pytest.mark.parametrize("inner", climb.PACKINGS)
def test_rows_are_sorted_by_the_mean_score_of_their_positions(inner):
    documents = everything_of(some)
    score = np.random.default_rng(0).random(40)
    lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
    plan = climb.PACKINGS[inner](lengths, 32)

    made = sorted_rows(plan, score)

    means = []
    for row in rows_of(made):
        of_pieces = score[row[:, DOCUMENT]]
        means.append(np.average(of_pieces, weights=row[:, LENGTH]))
    assert np.all(np.diff(means) >= 0)
    assert np.all(np.diff(made[:, ROW]) >= 0)


@pytest.mark.parametrize("inner", climb.PACKINGS)
def test_sorted_rows_hold_what_the_packing_gave(inner):
    documents = everything_of(some)
    score = np.random.default_rng(0).random(40)
    lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
    plan = climb.PACKINGS[inner](lengths, 32)

    made = sorted_rows(plan, score)

    before = sorted(row[:, 1:].tolist() for row in rows_of(plan))
    after = sorted(row[:, 1:].tolist() for row in rows_of(made))
    assert before == after


@pytest.mark.parametrize("hard", [False, True])
def test_a_curriculum_s_batches_begin_with_the_shortest_documents(hard):
    order = partial(climb.sorted_once, hard=hard)
    phase = replace(PLAIN, packing=climb.easy_first, order=order)
    loader = load(some, phase, score=scores.length)
    documents, _, plan, _ = only_window(loader)

    score = documents.of(lambda shard: shard.score)
    first_documents = [row[0, DOCUMENT] for row in rows_of(plan)]
    of_row = score[first_documents]
    assert np.all(np.diff(of_row) >= 0)
    assert of_row[0] == score.min()
    assert of_row[-1] == score.max()
    assert of_row[0] < of_row[-1]

    targets = loader.batch(1).arrays["targets"][0]
    first_text = bytes(targets[:10].astype(np.uint8)).decode()
    shortest_is_first = first_text == prose(0, 10)
    assert shortest_is_first == (not hard)


def test_the_scores_of_a_document():
    easy = data.Document("a", "aaaa " * 99, dict(level=3))
    hard = data.Document("b", prose(0, 495))

    assert scores.length(easy, [1, 2]) == 2
    assert scores.compressibility(easy, []) < 0.1
    assert scores.compressibility(hard, []) > 0.3
    assert scores.field(easy, [], "level") == 3
    assert scores.field(hard, [], "level") == math.inf


def planted():
    """Three documents of common and one of rare bytes."""
    for i in range(3):
        yield data.Document(str(i), "a" * 30)
    yield data.Document("rare", "ab")


def test_rarity_is_the_mean_negative_log_frequency_of_tokens():
    documents = everything_of(planted)
    paths = [document["path"] for document in documents.of(Shard.documents)]

    rarity = scores.rarity(documents)
    found = dict(zip(paths, rarity, strict=True))
    a = -math.log(91 / 92)
    b = -math.log(1 / 92)
    assert found["0"] == pytest.approx(a)
    assert found["rare"] == pytest.approx((a + b) / 2)

    lengths = np.full(4, 31)
    plan = climb.easy_first(lengths, 31, documents, by="rarity")
    hardest = plan[-1, DOCUMENT]
    assert paths[hardest] == "rare"


def test_loss_under_a_checkpoint_is_that_of_its_model_over_its_own_tokens(monkeypatch):
    def prefer_a(params, ids):
        logits = np.zeros((*ids.shape, 258))
        logits[..., ord("a")] = 3
        return logits

    read = (None, None, Bytes(), prefer_a)
    monkeypatch.setattr(climb, "model_of", lambda run: read)
    other = math.log(257 + math.exp(3))  # nats of any token but a
    a = other - 3

    short = data.Document("x", "aab")
    found = climb.loss(short, [], run="somewhere")
    assert found == pytest.approx((2 * a + 2 * other) / 4)  # a, a, b and the end

    long = data.Document("x", "a" * 9)
    found = climb.loss(long, [], run="", context=4)
    assert found == pytest.approx(a)


at_least_half = partial(qurating.threshold, least=0.5)


@pytest.mark.parametrize("packing", [
    climb.easy_first,
    qurating.top,
    qurating.sampled,
    at_least_half,
])
def test_what_needs_scores_is_refused_without_them(packing):
    phase = replace(PLAIN, packing=packing)
    with pytest.raises(data.InputError, match="has none"):
        load(partial(some, number=4), phase)


def test_a_pacing_that_is_not_known_is_refused_by_a_sentence():
    allowed = "'cubic'; allowed are linear, root, exponential, step"
    with pytest.raises(data.InputError, match=allowed):
        climb.share(0.5, "cubic")


@pytest.mark.parametrize("select", [climb.easy_first, qurating.top])
def test_a_packing_that_is_not_known_is_refused_by_a_sentence(select):
    documents = scored([1, 2, 3])
    with pytest.raises(data.InputError, match="'worst_fit'.*allowed are concat, best_fit"):
        select(np.full(3, 4), 4, documents, packing="worst_fit")


# ----------------------------------------------------------------------------------------- qurating


class Scored(SimpleNamespace):
    """Documents of one shard, as a packing sees them."""

    def of(self, fact):
        return fact(self.shard)


def scored(score, name: str = "000003") -> Scored:
    """Documents with these scores, in a shard of this name."""
    shard = SimpleNamespace(
        score=np.asarray(score, np.float32),
        split=np.zeros(len(score), np.uint8),
        directory=SimpleNamespace(name=name),
    )
    return Scored(shard=shard)


def kept(plan: np.ndarray) -> list[int]:
    """The documents of a plan."""
    return np.unique(plan[:, DOCUMENT]).tolist()


SCORES = np.array([0.3, 0.9, -1.0, 0.5, 0.9, 0.0])
LENGTHS = np.array([10, 20, 30, 40, 50, 50])


@pytest.mark.parametrize("inner", qurating.PACKINGS)
@pytest.mark.parametrize("share, expected", [
    (0.1, [1]),
    (0.35, [1, 4]),
    (0.36, [1, 3, 4]),
    (0.6, [0, 1, 3, 4]),
    (1.0, [0, 1, 2, 3, 4, 5]),
])
def test_top_keeps_the_documents_that_score_highest(inner, share, expected):
    plan = qurating.top(LENGTHS, 16, scored(SCORES), share, inner)
    assert kept(plan) == expected


@pytest.mark.parametrize("inner", qurating.PACKINGS)
def test_threshold_keeps_the_documents_that_score_enough_whole(inner):
    plan = qurating.threshold(LENGTHS, 16, scored(SCORES), 0.5, inner)
    none = qurating.threshold(LENGTHS, 16, scored(SCORES), 2.0, inner)

    assert kept(plan) == [1, 3, 4]
    of_document = np.bincount(plan[:, DOCUMENT], plan[:, LENGTH], 6)
    assert of_document.tolist() == [0, 20, 0, 40, 50, 0]
    of_row = np.bincount(plan[:, ROW], plan[:, LENGTH])
    assert np.all(of_row <= 16)
    assert len(none) == 0


def chances_of_being_drawn(weight: np.ndarray, number: int) -> np.ndarray:
    """How likely each is among `number` drawn one by one, in proportion to weight, none twice."""
    chances = np.zeros(len(weight))
    for order in itertools.permutations(range(len(weight)), number):
        left = weight.sum()
        chance = 1.0
        for i in order:
            chance *= weight[i] / left
            left -= weight[i]
        chances[list(order)] += chance
    return chances


def test_sampling_takes_documents_as_often_as_drawing_one_by_one_without_replacement():
    score = np.array([0.0, 1.0, 2.0, 3.0, 0.5])
    temperature = 0.7
    standardised = (score - score.mean()) / score.std()
    weight = np.exp(standardised / temperature)
    expected = chances_of_being_drawn(weight, 2)

    lengths = np.full(5, 4)
    documents = scored(score)
    draws = 4_000
    found = np.zeros(5)
    for seed in range(draws):
        plan = qurating.sampled(lengths, 16, documents, 0.4, temperature, seed)
        found[kept(plan)] += 1

    assert expected.sum() == pytest.approx(2)
    assert found.sum() == 2 * draws
    deviation = np.sqrt(expected * (1 - expected) / draws)
    error = np.abs(found / draws - expected)
    assert np.all(error < 4 * deviation)


def half_of_fifty(documents: Scored, temperature: float = 2.0, seed: int = 0) -> list[int]:
    """Which of 50 documents of one length are sampled."""
    lengths = np.full(50, 4)
    plan = qurating.sampled(lengths, 16, documents, 0.5, temperature, seed)
    return kept(plan)


def test_a_sample_follows_its_seed_and_the_name_of_the_shard():
    equal_scores = scored(np.zeros(50))
    other_shard = scored(np.zeros(50), "000004")

    first = half_of_fifty(equal_scores, seed=1)
    assert len(first) == 25
    assert first == half_of_fifty(equal_scores, seed=1)
    assert first != half_of_fifty(equal_scores, seed=2)
    assert first != half_of_fifty(other_shard, seed=1)


def test_a_sample_at_a_very_low_temperature_is_the_documents_of_highest_score():
    rising = scored(np.arange(50.0))
    assert half_of_fifty(rising, temperature=1e-6) == list(range(25, 50))


def test_a_sample_does_not_follow_the_seed_of_the_run():
    """The seed of the run permutes the documents."""
    phase = replace(PLAIN, packing=partial(qurating.sampled, share=0.5))
    samples = []
    for seed in (0, 1):
        sources = {"one": data.Source(some, score=scores.length)}
        loader = load_all(sources, phase, seed=seed)
        documents, _, plan, _ = only_window(loader)
        known = documents.of(Shard.documents)
        samples.append({known[i]["path"] for i in kept(plan)})
    assert samples[0] == samples[1]


# ----------------------------------------------------------------------------------------- skill_it


def shares_of(weights: dict) -> list[float]:
    """Weights as shares of 1."""
    total = sum(weights.values())
    return [weight / total for weight in weights.values()]


GRAPH = [
    [1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 0, 1, 0],
    [0, 0, 0, 0, 1],
]
NAMES = ["a", "b", "c", "d", "e"]
by_graph = partial(skill_it.steered, 0.5, names=NAMES, graph=GRAPH, eta=0.5)
FIRST = dict.fromkeys(NAMES, 2.0)  # losses of an evaluation
SECOND = dict(a=0.1, b=1, c=2, d=2, e=2)


@pytest.mark.parametrize("log, shares", [
    ([], [.163, .346, .163, .163, .163]),
    ([FIRST], [.118, .528, .118, .118, .118]),
    ([FIRST, SECOND], [.035, .691, .091, .091, .091]),
], ids=["nothing", "first", "second"])
def test_the_steered_rule_gives_the_shares_of_skill_it(log, shares):
    found = shares_of(by_graph(log))
    assert found == pytest.approx(shares, abs=6e-4)


def test_the_steered_rule_looks_at_the_last_three_evaluations():
    four = [SECOND, FIRST, FIRST, FIRST]
    assert by_graph(four) == by_graph(four[1:])


def test_without_a_graph_the_steered_rule_follows_each_source_s_own_loss():
    losses = dict(a=1.0, b=3.0)
    weights = skill_it.steered(0.5, [losses], ["a", "b"], eta=0.5)
    assert weights["b"] / weights["a"] == pytest.approx(math.e)


@pytest.mark.parametrize("losses, rows", [
    (dict(a=1.0, b=3.0), [4, 6]),
    (dict(a=3.0, b=1.0), [4, 2]),
])
def test_a_steered_loader_draws_by_its_log(losses, rows):
    sources = {
        "a": data.Source(partial(some, number=20)),
        "b": data.Source(partial(some, number=21)),
    }
    mixture = partial(skill_it.steered, names=["a", "b"], eta=math.log(3) / 2)
    phase = replace(PLAIN, steps=20, batch=8, steer=10, mixture=mixture)

    found = []
    for step in (1, 15):
        loader = load_all(sources, phase, log=[[losses]])
        batch = loader.batch(step)
        found.append(batch.metrics["data/b/rows"])
    assert found == rows
