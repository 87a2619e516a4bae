"""configs/selection/salt.py and miniplm.py: soft labels, and rows chosen by what models lose on them."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strong
from data_cases import everything_of, some

import model
from lib.config import ROOT, load_file
from lib.packing import DOCUMENT, LENGTH, ROW, START, concat_and_split
from lib.teacher import taught
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library
salt, miniplm = (load_file(ROOT / f"configs/selection/{name}.py") for name in ("salt", "miniplm"))
SEQ = 32


@pytest.fixture
def runs(tiny, monkeypatch):
    """Runs "a" and "b" of a tiny model in bytes, {name: parameters}."""
    params = {"a": strong(tiny), "b": {name: 0.5 * x for name, x in strong(tiny).items()}}

    class Found:
        model = tiny

    monkeypatch.setattr(salt, "load", lambda run: (params[run], Found, Bytes(), None))
    return params


@pytest.fixture
def text():
    """(documents, their lengths, their plain plan)."""
    documents = everything_of(lambda: some(60))
    lengths = documents.of(lambda shard: np.diff(shard.offsets) + 1)
    return documents, lengths, concat_and_split(lengths, SEQ)


def test_the_taught_loss_is_two_thirds_divergence_and_one_third_cross_entropy(tiny):
    teacher, keys = strong(tiny), jax.random.split(jax.random.key(3), 2)
    config = taught(tiny, tiny, "teacher")
    params = {f"teacher/{name}": x for name, x in teacher.items()}
    states = jax.random.normal(keys[0], (2, 5, tiny.embed))
    logits = jax.random.normal(keys[1], (2, 5, tiny.vocab))
    batch = {"targets": jnp.arange(10).reshape(2, 5)}
    extras = {"params": params, "config": config, "teacher": states, "step": 0}
    got = salt.distil(logits, batch, extras, share=2 / 3)
    p = jax.nn.softmax(model.head_logits(teacher, states, batch, tiny))
    log_q = jax.nn.log_softmax(logits)
    hard = -jnp.take_along_axis(log_q, batch["targets"][..., None], -1)[..., 0]
    soft = jnp.sum(p * (jnp.log(p) - log_q), -1)
    np.testing.assert_allclose(got, hard / 3 + 2 * soft / 3, rtol=1e-4)
    np.testing.assert_allclose(salt.distil(logits, batch, extras, share=0.0), hard, rtol=1e-5)


def test_rows_are_judged_as_the_model_says_whatever_the_batch(runs, text, tiny):
    documents, _, plan = text
    rows = np.array([5, 0, 17])
    nats, ranks = salt.judged(plan, rows, SEQ, documents, Bytes(), "a", batch=2)
    assert nats.shape == ranks.shape == (3, SEQ)
    for r, row in enumerate(rows):
        own = plan[plan[:, ROW] == row]
        arrays = salt.fill(plan, np.array([row]), SEQ, documents.ids, Bytes())
        log_p = np.asarray(jax.nn.log_softmax(model.apply(runs["a"], arrays, tiny)))[0]
        targets = arrays["targets"][0]
        at = log_p[np.arange(SEQ), targets]
        assert own[:, LENGTH].sum() == SEQ
        np.testing.assert_allclose(nats[r], -at, atol=1e-4)
        np.testing.assert_array_equal(ranks[r], (log_p > at[:, None]).sum(1))


def test_padding_has_no_nats(runs, text):
    documents, _, plan = text
    last = plan[-1, ROW]
    nats, _ = salt.judged(plan, np.array([last]), SEQ, documents, Bytes(), "a")
    filled = plan[plan[:, ROW] == last, LENGTH].sum()
    assert filled < SEQ and np.isnan(nats[0, filled:]).all() and np.isfinite(nats[0, :filled]).all()


def test_the_highest_rows_stay_whole_and_in_order(text):
    _, _, plan = text
    value = np.array([3.0, 9.0, 1.0, 8.0, 2.0, 7.0])
    made = salt.highest(plan, value, 0.5)
    assert np.unique(made[:, ROW]).tolist() == [0, 1, 2]
    for new, old in enumerate([1, 3, 5]):
        np.testing.assert_array_equal(made[made[:, ROW] == new, 1:], plan[plan[:, ROW] == old, 1:])
    assert made is not plan and plan[0, ROW] == 0


def test_hard_rows_are_those_of_a_high_median_over_targets_that_the_teacher_knows(monkeypatch, text):
    documents, lengths, plan = text
    nats, ranks = np.full((4, SEQ), 1.0), np.full((4, SEQ), 20)
    nats[0], ranks[0, :3] = 9.0, 0  # hard, but what is known of it is easy
    nats[0, :3] = 0.1
    nats[1], ranks[1] = 2.0, 3  # hard and known
    nats[2], ranks[2] = 1.0, 0
    nats[3] = 9.0  # noise: nothing of it is known
    monkeypatch.setattr(salt, "judged", lambda *_: (nats.copy(), ranks))
    made = salt.learnable(lengths, SEQ, documents, Bytes(), "a", share=0.5, k=10, among=4)
    np.testing.assert_array_equal(made[:, 1:], plan[(plan[:, ROW] == 1) | (plan[:, ROW] == 2), 1:])


def test_a_difference_of_losses_keeps_what_the_teacher_knows_and_the_reference_does_not(runs, text):
    documents, lengths, plan = text
    rows = np.arange(20)
    mean = {run: np.nanmean(salt.judged(plan, rows, SEQ, documents, Bytes(), run)[0], 1) for run in runs}
    wanted = {
        ("a", "b"): mean["b"] - mean["a"],
        ("a", ""): -mean["a"],
        ("", "b"): mean["b"],
        ("a", "a"): -rows,  # all alike: the first ones
    }
    for (teacher, reference), score in wanted.items():
        made = miniplm.difference(lengths, SEQ, documents, Bytes(), teacher, reference, 0.25, among=20)
        kept = np.sort(np.argsort(-score, kind="stable")[:5])
        same = plan[np.isin(plan[:, ROW], kept)]
        np.testing.assert_array_equal(made[:, [DOCUMENT, START, LENGTH]], same[:, [DOCUMENT, START, LENGTH]])


def test_the_longer_arm_has_the_flops_of_salt_and_its_teacher():
    own, base = salt.study, salt.base
    first, rest = own.arms["salt"].phases
    assert first.steps + rest.steps == salt.STEPS
    beside = taught(salt.small.model, salt.teacher.model, "teacher")
    spent = base.flops(beside, first) + base.flops(salt.small.model, rest)
    spent += base.flops(salt.teacher.model, salt.teacher.phases[0])
    (longer,) = own.arms["longer"].phases
    one = base.flops(salt.small.model, replace(longer, steps=1))
    assert abs(spent - longer.steps * one) <= one
