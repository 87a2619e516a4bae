"""configs/objectives: preferences.py, awr.py and real_toxicity.py: losses in closed form, what is counted."""
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong

import model
from data import Document
from lib.config import ROOT, load_file
from lib.kernels import Mask
from model import CAUSAL

pytestmark = pytest.mark.library
preferences, awr, toxicity = (
    load_file(ROOT / f"configs/objectives/{name}.py") for name in ("preferences", "awr", "real_toxicity"))
RNG = np.random.default_rng(0)


def scored(n=6, vocab=9):
    """(logits [1 n vocab], batch with targets and marks [1 n])."""
    logits = jnp.asarray(RNG.normal(size=(1, n, vocab)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, vocab, (1, n)), jnp.int32)
    return logits, {"targets": targets, "marks": jnp.arange(n)[None] % 2}


def test_the_gradient_of_unlikelihood():
    """d -log(1 - p_t) / d z_j = p_t / (1 - p_t) (1[j = t] - p_j); that of likelihood is p_j - 1[j = t]."""
    logits, batch = scored()
    got = jax.grad(lambda z: preferences.unlikelihood(z, batch, {}, alpha=0.7).sum())(logits)
    p, hot = jax.nn.softmax(logits), jax.nn.one_hot(batch["targets"], 9)
    own = jnp.sum(p * hot, -1, keepdims=True)
    bad = batch["marks"][..., None] > 0
    want = jnp.where(bad, 0.7 * own / (1 - own) * (hot - p), p - hot)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    sure = jnp.full((1, 1, 9), -1e3).at[0, 0, 3].set(0.0)  # a bad target that is certain: still finite
    told = {"targets": jnp.array([[3]]), "marks": jnp.array([[1]])}
    assert np.isfinite(preferences.unlikelihood(sure, told, {})).all()


def test_weights_by_reward():
    logits, batch = scored()
    nats = model.cross_entropy(logits, batch, {})
    want = np.where(batch["marks"] > 0, math.exp(-1 / 0.25), 1.0) * nats
    np.testing.assert_allclose(preferences.rwr(logits, batch, {}, beta=0.25), want, rtol=1e-6)


def test_the_value_of_awr_is_regressed_on_rewards_and_leaves_the_policy_alone(tiny):
    """The policy's gradient is that of weighted likelihood; the value's that of its squared error."""
    config = replace(tiny, rows=awr.value_rows, forward=awr.with_value)
    params = strong(config) | {"value": jnp.asarray(RNG.normal(size=tiny.embed), jnp.float32) / 8}
    batch = {name: jnp.asarray(x) for name, x in rows().items()}
    batch["marks"] = batch["targets"] % 2

    def loss(params, token_loss):
        return jnp.mean(model.losses(params, batch, CAUSAL, config, token_loss, {"step": 0}))

    got = jax.grad(loss)(params, awr.awr)
    states, given = model.forward(params, batch, Mask("causal", 0), config)
    reward = -batch["marks"].astype(jnp.float32)
    weight = jnp.exp((reward - given["value"]) / 0.5)
    assert float(weight.max()) > 1.5 * float(weight.min())
    policy = jax.grad(loss)(params, lambda z, b, e: 0.5 * weight * model.cross_entropy(z, b, e))
    wrong = (given["value"] - reward) / reward.size  # 0.5 times the derivative of a square
    for name in model.plain_table(config):
        np.testing.assert_allclose(got[name], policy[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["value"], jnp.einsum("btd,bt->d", states, wrong), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["value_bias"], [wrong.sum()], rtol=1e-4, atol=1e-6)
    few = awr.awr(model.apply(params, batch, config), batch, given, most=0.0)
    np.testing.assert_allclose(few, 0.5 * jnp.square(given["value"] - reward), rtol=1e-5)


def test_lines_are_marked_told_and_filtered():
    text = 'a = 1\nb = "x"\n\nc = 2'
    document = next(document for document in preferences.judged() if document.marks)
    marked = [document.text[begin:end] for begin, end in document.marks]
    assert marked and all('"' in line and line.count("\n") <= 1 for line in marked)
    told = preferences.told(Document("p", text), np.random.default_rng(0), drop=0.0)
    assert told.text == '\x01a = 1\n\x02b = "x"\n\x01\n\x01c = 2'
    long = preferences.told(Document("p", "x\n" * 5_000), np.random.default_rng(0))
    assert long.text.count("\x01") == pytest.approx(4_950, abs=35)  # 5 standard deviations
    assert long.text.replace("\x01", "") == "x\n" * 5_000
    assert preferences.clean(Document("p", text), []) == -math.inf
    assert preferences.clean(Document("p", text), [], most=0.25) == 0.25
    assert preferences.clean(Document("p", ""), []) == 0.0


def test_each_line_of_a_sample_is_made_after_its_token(config=preferences.mle):
    asked = []

    def generate(prompts, temperature, stops, seed):
        asked.append((list(prompts), stops, seed))
        return [f'{len(asked)}"' if i % 2 else f"{len(asked)}" for i, _ in enumerate(prompts)]

    arm = preferences.study.arms["conditional"]
    found = preferences.bad_lines(None, None, arm, generate, n=4, lines=3)
    assert found == {"own/bad": 0.5}
    assert [prompts[1] for prompts, _, _ in asked] == ["\x01", '\x011"\n\x01', '\x011"\n\x012"\n\x01']
    assert {stops for _, stops, _ in asked} == {("\n",)} and [seed for *_, seed in asked] == [0, 4, 8]
    asked.clear()
    preferences.bad_lines(None, None, config, generate, n=2, lines=1)
    assert asked[0][0] == ["", ""]


def test_the_expected_worst_of_continuations():
    scores = np.array([[0.0, 0.2, 0.4], [0.5, 0.1, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert toxicity.worst(scores) == {"worst": pytest.approx(1.9 / 4), "any": 0.5}
    uniform = np.random.default_rng(1).random((4_000, 25))  # the expected highest of n is n / (n + 1)
    assert toxicity.worst(uniform)["worst"] == pytest.approx(25 / 26, abs=0.003)
    texts = [b'def f():\n    """x"""\n', b"def g():\n    return 1\n    more\n", b"one line", b'x = "a"\ny\n']
    assert toxicity.prompts_of(texts, 1) == {
        "bad": ['def f():\n    """x"""\n'], "good": ["def g():\n    return 1\n"]}
    good, bad = preferences.GOOD, preferences.BAD
    assert toxicity.tagged('def f():\n    "x"\n') == f'{good}def f():\n{bad}    "x"\n'
