"""configs/forgetting/dual_process.py: the process, its evaluation, and runs of all arms."""
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of

import data
import model
import train
from configs import parts_of_speech as process
from lib.config import ROOT, load_file
from lib.schedule import Plan
from lib.sharding import make_mesh
from lib.statistics import run_figures
from lib.tokenizers import make_tokenizer
from train import load_config

pytestmark = pytest.mark.library

FILE = ROOT / "configs/forgetting/dual_process.py"
forgetting = load_file(FILE)
COPULA, FIRST, LENGTH = process.COPULA, process.FIRST, process.LENGTH
WORDS = 50  # 22 nouns, 22 adjectives, 6 new words
NOUNS = 22
FIRST_ADJECTIVE = FIRST + NOUNS
FIRST_NEW = FIRST + 2 * NOUNS


def row(n: int = 4_000, seed: int = 0, zipf: float = 1.0, ambiguous: int = 0) -> dict:
    """A row of n sentences."""
    empty = np.zeros(n * LENGTH, np.int32)
    keys = ("tokens", "targets", "segments", "positions", "weights", "source")
    blank = dict.fromkeys(keys, empty)
    rng = np.random.default_rng(seed)
    made, mask = process.part_of_speech(blank, rng, WORDS, zipf, ambiguous)
    assert mask == data.causal({}, None)[1]
    return made


class Sentences(NamedTuple):
    """The words of sentences, as ids [n]."""

    noun: np.ndarray
    adjective: np.ndarray
    query: np.ndarray


def sentences(tokens) -> Sentences:
    """The words of rows of tokens, by where the copula stands."""
    x = np.asarray(tokens).reshape(-1, LENGTH)
    noun_is_first = x[:, 1] == COPULA
    noun = np.where(noun_is_first, x[:, 0], x[:, 2])
    adjective = np.where(noun_is_first, x[:, 2], x[:, 1])
    return Sentences(noun, adjective, x[:, 3])


def values(*arrays) -> set[int]:
    """The different numbers in arrays."""
    return set(np.concatenate(arrays).tolist())


# -------------------------------------------------------------------------------------- the process


def test_each_answer_follows_from_the_place_of_the_query_in_its_context():
    made = row(ambiguous=2)
    tokens = made["tokens"].reshape(-1, LENGTH)
    targets = made["targets"].reshape(-1, LENGTH)
    cases = np.concatenate([tokens[:, :4], targets[:, 3:]], axis=1)

    for one, two, three, query, *answer in np.unique(cases, axis=0).tolist():
        assert [one, two, three].count(COPULA) == 1
        assert three != COPULA
        noun, adjective = (one, three) if two == COPULA else (three, two)
        assert query in (noun, adjective)
        assert answer == [adjective, query, query]
    assert np.all(tokens[:, 1:] == targets[:, :-1])


def test_the_two_orders_and_the_two_queries_are_equally_frequent():
    made = row(ambiguous=2)
    noun, adjective, query = sentences(made["tokens"])
    copula_is_first = made["tokens"].reshape(-1, LENGTH)[:, 0] == COPULA
    asks_noun = query == noun

    assert np.mean(asks_noun) == pytest.approx(0.5, abs=0.03)
    assert np.mean(copula_is_first) == pytest.approx(0.5, abs=0.03)
    assert np.mean(copula_is_first & asks_noun) == pytest.approx(0.25, abs=0.03)
    assert np.mean(noun == adjective) < 0.2


def test_the_sentences_of_a_row_are_segments_with_loss_on_answers_alone():
    made = row(3)

    assert made["segments"].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert made["positions"].tolist() == [*range(6)] * 3
    assert made["weights"].tolist() == [0, 0, 0, 1, 1, 1] * 3
    assert made["weights"].dtype == np.float32
    assert "source" in made
    for key in ("tokens", "targets", "segments", "positions"):
        assert made[key].dtype == np.int32


@pytest.mark.parametrize("vocabulary", [10, 50, 99, 250])
def test_at_least_a_tenth_of_the_words_is_new_and_never_shown(vocabulary):
    nouns, new = process.split(vocabulary)
    tenth = vocabulary // 10
    assert 2 * nouns + new == vocabulary
    assert new in (tenth, tenth + 1)

    rng = np.random.default_rng(0)
    drawn = process.draw_words(50_000, rng, vocabulary, 0.0, 3)
    assert values(*drawn) == set(range(2 * nouns))


def test_words_come_as_zipf_says_and_in_their_part_of_speech():
    noun, adjective, _ = sentences(row(40_000, zipf=1.5)["tokens"])
    chance = np.arange(1, NOUNS + 1) ** -1.5
    chance /= chance.sum()

    for ids, first in ((noun, FIRST), (adjective, FIRST_ADJECTIVE)):
        counts = np.bincount(ids - first, minlength=NOUNS)
        assert len(counts) == NOUNS
        assert counts / len(ids) == pytest.approx(chance, abs=0.01)


def ranks_and_swaps(ambiguous: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For nouns and for adjectives: (rank, whether the word is of the other part of speech)."""
    noun, adjective, _ = sentences(row(20_000, zipf=0.0, ambiguous=ambiguous)["tokens"])
    return [
        ((noun - FIRST) % NOUNS, noun >= FIRST_ADJECTIVE),
        ((adjective - FIRST) % NOUNS, adjective < FIRST_ADJECTIVE),
    ]


def test_without_ambiguous_words_none_stands_in_the_other_place():
    for _, swapped in ranks_and_swaps(0):
        assert not swapped.any()


def test_every_fourth_word_stands_in_the_other_place_half_of_the_time():
    for rank, swapped in ranks_and_swaps(4):
        may = rank % 4 == 3
        assert not swapped[~may].any()
        assert swapped[may].mean() == pytest.approx(0.5, abs=0.03)
        assert values(rank[may]) == {3, 7, 11, 15, 19}


def test_a_row_is_a_function_of_its_draw():
    one, same, other = row(50, 3), row(50, 3), row(50, 4)
    for key in one:
        assert np.array_equal(one[key], same[key])
    assert not np.array_equal(one["tokens"], other["tokens"])


def test_the_lexicon_gives_each_word_a_piece_of_its_own_from_first_on():
    config = forgetting.vanilla
    tokenizer = make_tokenizer(config.data, config.model.vocab)
    (document,) = config.data.sources["lexicon"].documents()

    ids = tokenizer.encode(document.text)

    assert sorted(ids) == [*range(FIRST, config.model.vocab)]
    assert len(ids) == len(document.text)
    assert tokenizer.bos == COPULA


# ----------------------------------------------------------------------------------- the evaluation


def from_context(asked: Sentences) -> np.ndarray:
    """The answers of a model that reads the sentence."""
    return asked.adjective


def from_weights(asked: Sentences) -> np.ndarray:
    """The answers of one that knows each word's part of speech, and does not read."""
    swapped = (asked.noun >= FIRST_ADJECTIVE) & (asked.noun < FIRST_NEW)
    return np.where(swapped, asked.noun, asked.adjective)


def from_query(asked: Sentences) -> np.ndarray:
    """The answers of one that repeats the query."""
    return asked.query


def from_nothing(asked: Sentences) -> np.ndarray:
    """The answers of one that always says the copula."""
    return np.full_like(asked.noun, COPULA)


def answering(how, seen: list):
    """An `apply` of a model that answers so; `seen` gets what it was asked.

    One that says the copula takes the right word to be the second likeliest.
    """
    def apply(params, ids):
        seen.append((params, ids))
        x = np.asarray(ids)
        asked = sentences(x)
        every = np.arange(len(x))
        scores = np.zeros((*x.shape, FIRST + WORDS))
        if how is from_nothing:
            scores[every, :, asked.adjective] = 1
        scores[every, 3, how(asked)] = 2
        return jnp.asarray(scores)

    return apply


def probe(how, seen: list | None = None) -> dict[str, float]:
    """What the evaluation says of a model that answers so; names without their prefix."""
    params = {"embed": jnp.zeros((FIRST + WORDS, 8))}
    seen = [] if seen is None else seen
    found = process.probe(params, answering(how, seen), WORDS, 4)
    assert all(name.startswith("pos/") for name in found)
    return {name.removeprefix("pos/"): value for name, value in found.items()}


def test_the_evaluation_tells_context_from_weights():
    reader = probe(from_context)
    knower = probe(from_weights)
    parrot = probe(from_query)
    other = probe(from_nothing)

    all_right = dict.fromkeys(reader, 1.0)
    not_by_weights = {"head/weights": 0.0, "tail/weights": 0.0}
    not_by_context = {"head/context": 0.0, "tail/context": 0.0}
    assert reader == all_right | not_by_weights
    assert knower == all_right | not_by_context
    assert parrot == pytest.approx(dict.fromkeys(reader, 0.5), abs=0.07)
    assert other == dict.fromkeys(reader, 0.0) | {"new_choice": 1.0}


def test_the_evaluation_asks_about_the_words_it_says():
    seen = []
    probe(from_context, seen)
    _, ids = seen[0]
    new, known, head, tail = np.split(ids, 4)
    assert len(new) == 512

    noun, adjective, _ = sentences(new)
    assert values(noun) == set(range(FIRST_NEW, FIRST + WORDS))
    assert values(adjective) == values(noun)
    assert not np.any(noun == adjective)

    noun, adjective, _ = sentences(known)
    unambiguous = {rank for rank in range(NOUNS) if rank % 4 != 3}
    assert values(noun - FIRST) == unambiguous
    assert values(adjective - FIRST_ADJECTIVE) == unambiguous

    for part, ranks in ((head, {0, 1, 2}), (tail, {20, 21})):
        noun, adjective, _ = sentences(part)
        assert values(noun - FIRST_ADJECTIVE) == ranks
        assert values(adjective - FIRST) == ranks


def test_new_words_are_drawn_as_the_table_is_and_are_outputs_too():
    """A head of its own knows no new word, whatever its embedding is."""
    for arm, config in forgetting.study.arms.items():
        assert config.model.tied, arm
        assert model.table(config.model)["embed"].init == config.model.embed**-0.5
    table = jnp.zeros((FIRST + WORDS, 8))
    with pytest.raises(data.InputError, match="the model has a head of its own"):
        process.probe({"embed": table, "head": table.T}, answering(from_context, []), WORDS, 4)


def test_the_evaluation_draws_embeddings_for_new_words_alone():
    seen = []
    probe(from_context, seen)
    params, _ = seen[0]
    embeddings = np.asarray(params["embed"])
    new = np.arange(FIRST_NEW, FIRST + WORDS)

    drawn = embeddings[new]
    others = np.delete(embeddings, new, 0)
    assert 0.6 < drawn.std() * 8**0.5 < 1.4
    assert len(np.unique(drawn)) == drawn.size
    assert not np.any(others)


def test_the_evaluation_is_the_same_each_time():
    seen = []
    probe(from_context, seen)
    probe(from_context, seen)
    (params, ids), (params_again, ids_again) = seen
    assert np.array_equal(ids, ids_again)
    assert np.array_equal(params["embed"], params_again["embed"])


# ----------------------------------------------------------------------------------------- the arms

NEW = [{"pos/new": value} for value in (0.5, 1.0, 0.25, 0.5, 0.0)]
ROWS = [{"train/loss": 1.0}, *NEW, {"train/loss": 0.0}]


def test_late_is_the_mean_of_the_last_three_values_and_lost_is_the_best_less_it():
    assert forgetting.late(ROWS, "pos/new") == 0.25
    assert forgetting.lost(ROWS, "pos/new") == 0.75


def test_measures_are_means_of_the_last_three_values_and_what_was_lost_on_the_way():
    names = list(probe(from_context))
    numbers = {f"pos/{name}": i for i, name in enumerate(names)}
    negative = {name: -i for name, i in numbers.items()}
    rows = [numbers, negative, negative, *ROWS]

    found = {name: measure(rows) for name, measure in forgetting.study.measures.items()}

    means = {name: -i / 3 for i, name in enumerate(names)}
    assert found == pytest.approx(means | {"new": 0.25, "new_lost": 0.75})
    claimed = {claim.measure for claim in forgetting.study.claims}
    assert claimed <= set(forgetting.study.measures)


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    """What each step of each arm is to be."""
    found = {}
    for arm in forgetting.study.arms:
        config = load_config(f"{FILE}:{arm}")
        train.check(config)
        context = model.Context(jax.random.key(0), 0, None, None, None)
        found[arm] = course_of(config, context)
    return found


def test_arms_differ_in_when_embeddings_are_reset(plans):
    every = forgetting.EVERY
    control = plans[forgetting.study.first]
    steps = int(control.ends[-1])
    end = int(plans["temporary"].ends[0])

    resets = {}
    for arm, plan in plans.items():
        resets[arm] = [step for step in range(steps + 1) if step in plan.edits]
    assert resets == dict(
        vanilla=[],
        active=[*range(every, steps, every)],
        temporary=[*range(every, end, every)],
    )
    for whole_episodes in (end, steps, forgetting.vanilla.eval_every):
        assert whole_episodes % every == 0


def test_arms_have_the_same_cost_and_the_same_rates_but_for_embeddings(plans):
    control = plans[forgetting.study.first]
    for arm, plan in plans.items():
        assert np.array_equal(plan.flops, control.flops)
        for group in ("matrix", "vector"):
            assert np.allclose(plan.lr[group], control.lr[group]), arm


def test_the_rate_of_embeddings_comes_in_cycles_until_resets_end(plans):
    vanilla, active, temporary = (
        plans[arm].lr["embed"] for arm in ("vanilla", "active", "temporary"))
    after = int(plans["temporary"].ends[0]) + 1

    assert np.allclose(temporary[1:after], active[1:after])
    assert np.allclose(temporary[after:], vanilla[after:])
    episodes = active[1:].reshape(-1, forgetting.EVERY)
    assert np.allclose(episodes, episodes[0])
    control = plans[forgetting.study.first]
    assert episodes[0].max() > control.lr["embed"].max()


@pytest.fixture
def one_device(monkeypatch):
    """One device."""
    def mesh_of_one(config, devices=None):
        return make_mesh(config, jax.devices()[:1])

    monkeypatch.setattr(train, "make_mesh", mesh_of_one)


def short_run() -> list[str]:
    """Words of a command line that make an arm two phases of four steps, a reset every two."""
    fields = forgetting.study.quick | {
        "eval_every": 2,
        "phases.0.repeat.0.every": 2,
        "model.layers": 1,
        "phases.0.lr.embed.cycle": 2,
        "sample_tokens": 1,
    }
    words = []
    for field, value in fields.items():
        phases = range(2 if "*" in field else 1)
        for phase in phases:
            words += ["--" + field.replace("*", str(phase)), str(value)]
    return words


def test_a_run_forgets_for_a_while_and_a_study_reads_its_measures(tmp_path, capsys, one_device):
    run = tmp_path / "run"
    line = [f"{FILE}:temporary", "--runs", str(tmp_path), "--name", "run"]

    assert train.main([*line, *short_run()]) == 0

    said = capsys.readouterr().out
    resets = [step for step in range(9) if f"step {step}: reset_embeddings" in said]
    assert resets == [2]  # of 4 and 4 steps

    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len([loss for loss in losses if 0 < loss < 10]) == 8
    evals = [row for row in rows if "pos/new" in row]
    assert [row["step"] for row in evals] == [2, 4, 6, 8]

    last = run_figures(run, measures=forgetting.study.measures)["last"]
    last_three = [row["pos/head/context"] for row in evals[1:]]
    assert last["head/context"] == pytest.approx(np.mean(last_three))
    best = max(row["pos/new"] for row in evals)
    assert last["new_lost"] == pytest.approx(best - last["new"])
