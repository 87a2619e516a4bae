"""configs/forgetting/dual_process.py: the process, its evaluation, and runs of all arms."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of

import data
import model
import train
from lib.config import ROOT, load_file
from lib.schedule import Plan
from lib.sharding import make_mesh
from lib.statistics import run_figures
from lib.tokenizers import make_tokenizer
from train import load_config

FILE = ROOT / "configs/forgetting/dual_process.py"
forgetting = load_file(FILE)
COPULA, FIRST, LENGTH = forgetting.COPULA, forgetting.FIRST, forgetting.LENGTH
WORDS = 50  # 22 nouns, 22 adjectives, 6 new words
NOUNS = 22


def row(n: int = 4_000, seed: int = 0, zipf: float = 1.0, ambiguous: int = 0) -> dict:
    """A row of n sentences."""
    empty = np.zeros(n * LENGTH, np.int32)
    blank = dict(tokens=empty, targets=empty, segments=empty, positions=empty, weights=empty, source=empty)
    made, mask = forgetting.part_of_speech(blank, np.random.default_rng(seed), WORDS, zipf, ambiguous)
    assert mask == data.causal({}, None)[1]
    return made


def words(made: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(noun, adjective, query) of each sentence of a row [n], by where its copula stands."""
    x = made["tokens"].reshape(-1, LENGTH)
    first = x[:, 1] == COPULA
    return np.where(first, x[:, 0], x[:, 2]), np.where(first, x[:, 2], x[:, 1]), x[:, 3]


def test_each_answer_follows_from_the_place_of_the_query_in_its_context():
    made = row(ambiguous=2)
    tokens, targets = (made[k].reshape(-1, LENGTH) for k in ("tokens", "targets"))
    noun, adjective, query = words(made)
    cases = {tuple(t[:4]): a for t, a in zip(tokens.tolist(), targets[:, 3:].tolist(), strict=True)}
    for (*context, asked), answer in cases.items():
        assert context.count(COPULA) == 1 and context[2] != COPULA
        subject, predicate = (context[0], context[2]) if context[1] == COPULA else (context[2], context[1])
        assert asked in (subject, predicate)
        assert answer == [predicate, asked, asked]
    assert np.all(tokens[:, 1:] == targets[:, :-1])
    assert np.mean(query == noun) == pytest.approx(0.5, abs=0.03)
    assert np.mean(tokens[:, 0] == COPULA) == pytest.approx(0.5, abs=0.03)
    assert np.mean((tokens[:, 0] == COPULA) & (query == noun)) == pytest.approx(0.25, abs=0.03)
    assert np.mean(noun == adjective) < 0.2


def test_a_row_is_sentences_apart_with_loss_on_answers_alone():
    made = row(3)
    assert made["segments"].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    assert made["positions"].tolist() == [*range(6)] * 3
    assert made["weights"].tolist() == [0, 0, 0, 1, 1, 1] * 3
    assert made["weights"].dtype == np.float32 and "source" in made
    assert {made[k].dtype for k in ("tokens", "targets", "segments", "positions")} == {np.dtype(np.int32)}


@pytest.mark.parametrize("vocabulary", [10, 50, 99, 250])
def test_at_least_a_tenth_of_the_words_is_new_and_never_shown(vocabulary):
    nouns, new = forgetting.split(vocabulary)
    assert 2 * nouns + new == vocabulary and new >= vocabulary // 10 and new <= vocabulary // 10 + 1
    drawn = forgetting.draw_words(50_000, np.random.default_rng(0), vocabulary, 0.0, 3)
    assert sorted({*drawn.ravel().tolist()}) == [*range(2 * nouns)]


def test_words_come_as_zipf_says_and_in_their_part_of_speech():
    noun, adjective, _ = words(row(40_000, zipf=1.5))
    chance = np.arange(1, NOUNS + 1) ** -1.5
    for ids, start in ((noun, FIRST), (adjective, FIRST + NOUNS)):
        found = np.bincount(ids - start, minlength=NOUNS) / len(ids)
        assert len(found) == NOUNS and found == pytest.approx(chance / chance.sum(), abs=0.01)


@pytest.mark.parametrize("ambiguous", [0, 4])
def test_ambiguous_words_and_no_others_stand_in_the_other_place_half_of_the_time(ambiguous):
    for ids, nouns in zip(words(row(20_000, zipf=0.0, ambiguous=ambiguous)), (True, False), strict=False):
        number = ids - FIRST
        rank, swapped = number % NOUNS, (number >= NOUNS) == nouns
        may = rank % 4 == 3 if ambiguous else np.zeros(len(rank), bool)
        assert not swapped[~may].any()
        if ambiguous:
            assert swapped[may].mean() == pytest.approx(0.5, abs=0.03)
            assert {*rank[may].tolist()} == {3, 7, 11, 15, 19}


def test_a_row_is_a_function_of_its_draw():
    one, same, other = row(50, 3), row(50, 3), row(50, 4)
    assert all(np.array_equal(one[k], same[k]) for k in one)
    assert not np.array_equal(one["tokens"], other["tokens"])


def test_the_lexicon_gives_each_word_a_piece_of_its_own_from_first_on():
    config = forgetting.vanilla
    tokenizer = make_tokenizer(config.data, config.model.vocab)
    (document,) = config.data.sources["lexicon"].documents()
    ids = tokenizer.encode(document.text)
    assert sorted(ids) == [*range(FIRST, config.model.vocab)] and len(ids) == len(document.text)
    assert tokenizer.bos == COPULA


def answers(how: str, seen: list | None = None):
    """An `apply` that knows how to answer: from the context, from the weights, with the query, or nothing."""
    def apply(params, ids):
        if seen is not None:
            seen.append((params, ids))
        x = np.asarray(ids)
        first = x[:, 1] == COPULA
        noun, adjective = np.where(first, x[:, 0], x[:, 2]), np.where(first, x[:, 2], x[:, 1])
        swapped = (noun >= FIRST + NOUNS) & (noun < FIRST + 2 * NOUNS)
        begin = dict(context=adjective, weights=np.where(swapped, noun, adjective), query=x[:, 3],
                     copula=np.full(len(x), COPULA))[how]
        scores = np.zeros((*x.shape, FIRST + WORDS))
        scores[np.arange(len(x)), :, adjective] = 1 if how == "copula" else 0
        scores[np.arange(len(x)), 3, begin] = 2
        return jnp.asarray(scores)
    return apply


def probe(how: str, ambiguous: int = 4, seen: list | None = None) -> dict:
    """What the evaluation says of such a model; names without their prefix."""
    params = {"embed": jnp.zeros((FIRST + WORDS, 8))}
    found = forgetting.probe(params, answers(how, seen), WORDS, ambiguous)
    assert all(k.startswith("pos/") for k in found)
    return {k.removeprefix("pos/"): v for k, v in found.items()}


def test_the_evaluation_tells_context_from_weights():
    reader, knower, parrot, other = map(probe, ("context", "weights", "query", "copula"))
    assert reader == dict.fromkeys(reader, 1.0) | {"head/weights": 0.0, "tail/weights": 0.0}
    assert knower == reader | {"head/weights": 1.0, "tail/weights": 1.0, "head/context": 0.0,
                               "tail/context": 0.0}
    assert parrot == pytest.approx(dict.fromkeys(reader, 0.5), abs=0.07)
    assert other == dict.fromkeys(reader, 0.0) | {"new_choice": 1.0}


def test_the_evaluation_asks_about_the_words_it_says_and_draws_new_embeddings():
    seen = []
    probe("context", seen=seen)
    (params, ids), n = seen[0], 512
    new, known, head, tail = np.split(ids, 4)
    is_new = np.arange(FIRST + 2 * NOUNS, FIRST + WORDS)
    noun, adjective, _ = words(dict(tokens=new))
    assert len(new) == n and {*noun.tolist()} == {*adjective.tolist()} == {*is_new.tolist()}
    assert not np.any(noun == adjective)
    unambiguous = [r for r in range(NOUNS) if r % 4 != 3]
    noun, adjective, _ = words(dict(tokens=known))
    assert {*(noun - FIRST).tolist()} == {*(adjective - FIRST - NOUNS).tolist()} == {*unambiguous}
    for part, ranks in ((head, {0, 1, 2}), (tail, {20, 21})):
        noun, adjective, _ = words(dict(tokens=part))
        assert {*(noun - FIRST - NOUNS).tolist()} == {*(adjective - FIRST).tolist()} == ranks
    drawn = np.asarray(params["embed"][is_new])
    assert 0.6 < drawn.std() * 8**0.5 < 1.4 and len(np.unique(drawn)) == drawn.size
    assert not np.any(np.delete(np.asarray(params["embed"]), is_new, 0))
    again = []
    probe("context", seen=again)
    assert np.array_equal(again[0][1], ids) and np.array_equal(again[0][0]["embed"], params["embed"])


def test_measures_are_means_of_the_last_three_values_and_what_was_lost_on_the_way():
    rows = [{"train/loss": 1.0}, *({"pos/new": v} for v in (0.5, 1.0, 0.25, 0.5, 0.0)), {"train/loss": 0.0}]
    assert forgetting.late(rows, "pos/new") == 0.25 and forgetting.lost(rows, "pos/new") == 0.75
    ends = [{f"pos/{k}": sign * i for i, k in enumerate(probe("context"))} for sign in (1, -1, -1)]
    found = {name: measure(ends + rows) for name, measure in forgetting.study.measures.items()}
    expected = {k: -i / 3 for i, k in enumerate(probe("context"))} | {"new": 0.25, "new_lost": 0.75}
    assert found == pytest.approx(expected)
    assert {c.measure for c in forgetting.study.claims} <= {*forgetting.study.measures}


def course(arm: str) -> tuple[train.Config, Plan]:
    """An arm, and what each of its steps is to be."""
    config = load_config(f"{FILE}:{arm}")
    train.check(config)
    context = model.Context(jax.random.key(0), 0, None, None, None)
    return config, course_of(config, context)


def test_arms_differ_in_when_embeddings_are_reset_and_in_their_rate_until_then():
    plans = {arm: course(arm) for arm in forgetting.study.arms}
    control, every = plans[forgetting.study.first][1], forgetting.EVERY
    steps = int(control.ends[-1])
    resets = {arm: [s for s in range(steps + 1) if s in plan[1].edits] for arm, plan in plans.items()}
    end = int(plans["temporary"][1].ends[0])
    assert resets == dict(vanilla=[], active=[*range(every, steps, every)],
                          temporary=[*range(every, end, every)])
    assert end % every == steps % every == forgetting.vanilla.eval_every % every == 0  # whole episodes
    for arm, (_, found) in plans.items():
        assert np.array_equal(found.flops, control.flops)
        assert all(np.allclose(found.lr[g], control.lr[g]) for g in ("matrix", "vector")), arm
    embed = {arm: found.lr["embed"] for arm, (_, found) in plans.items()}
    assert np.allclose(embed["temporary"][1:end + 1], embed["active"][1:end + 1])
    assert np.allclose(embed["temporary"][end + 1:], embed["vanilla"][end + 1:])
    episodes = embed["active"][1:].reshape(-1, every)
    assert np.allclose(episodes, episodes[0]) and episodes[0].max() > control.lr["embed"].max()


@pytest.fixture
def one_device(monkeypatch):
    """One device."""
    whole = make_mesh
    monkeypatch.setattr(train, "make_mesh", lambda config, devices=None: whole(config, jax.devices()[:1]))


def test_a_run_forgets_for_a_while_and_a_study_reads_its_measures(tmp_path, capsys, one_device):
    fields = forgetting.study.quick | {"eval_every": 2, "phases.0.repeat.0.every": 2, "model.layers": 1,
                                 "phases.0.lr.embed.cycle": 2, "sample_tokens": 1}
    words = [w for k, v in fields.items() for i in range(2 if "*" in k else 1)
             for w in ("--" + k.replace("*", str(i)), str(v))]
    assert train.main([f"{FILE}:temporary", "--runs", str(tmp_path), "--name", "run", *words]) == 0
    said = capsys.readouterr().out
    assert [s for s in range(9) if f"step {s}: reset_embeddings" in said] == [2]  # of 4 and 4 steps
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evals = [r for r in rows if "pos/new" in r]
    assert [r["step"] for r in evals] == [2, 4, 6, 8]
    assert len([r for r in rows if 0 < r.get("train/loss", 0) < 10]) == 8
    last = run_figures(tmp_path / "run", measures=forgetting.study.measures)["last"]
    assert last["head/context"] == pytest.approx(np.mean([r["pos/head/context"] for r in evals[1:]]))
    assert last["new_lost"] == pytest.approx(max(r["pos/new"] for r in evals) - last["new"])
