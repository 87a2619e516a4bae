"""configs/understanding/pass_until.py: the estimate against exact p, samples against exact p, and the law."""
import jax
import numpy as np
import pytest

import model
from configs.understanding import pass_until as own
from lib.continuations import continue_prompts
from lib.generate import sampling
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tasks import judged
from lib.tokenizers import Numbers
from train import Config

pytestmark = pytest.mark.library


def test_the_estimate_is_r_over_the_samples_that_it_took():
    passed = np.array([[0, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6], bool)
    np.testing.assert_allclose(own.pass_until(passed, 2), [2 / 4, 1.0, 1 / 6, 0.0])


def test_the_estimate_is_within_two_standard_errors_of_exact_p():
    """n samples are needed for r passes: its standard error is near p / sqrt(r), for small p."""
    rng = np.random.default_rng(0)
    p, r = np.exp(rng.uniform(np.log(0.01), np.log(0.5), 200)), 20
    passed = rng.random((200, 6_000)) < p[:, None]
    near = np.abs(own.pass_until(passed, r) - p) < 2 * p * np.sqrt((1 - p) / r)
    assert near.mean() >= 0.93


def test_samples_pass_with_the_probability_of_their_text():
    """Of a model whose items have one right text, drawn by `generate` as the evals draws them."""
    tokenizer = Numbers(21)
    shape = model.ModelConfig(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16, vocab=23,
                              tied=False)
    params = model.init(shape, jax.random.key(0))
    params["head"] = params["head"] * 2  # so that some texts are likely
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.device_put(params, shardings(model.table(shape), mesh))
    config, n = Config(model=shape), 800

    def generate(prompts, tokens, temperature, seed):
        how = sampling(temperature)
        found = continue_prompts(params, config, tokenizer, 0, prompts, how, tokens, seed, ())
        return [one.text for one in found]

    def apply(params, ids):
        return model.apply(params, np.asarray(ids), shape)

    prompt = [tokenizer.bos, 3, 12, 5, 20, 3]
    texts = generate([prompt] * n, 2, 1.0, 0)
    often = max(sorted(text for text in set(texts) if len(text.split()) == 2), key=texts.count)
    nats, _ = judged(params, apply, tokenizer, [(prompt, tokenizer.encode(often))], 32)
    p = np.exp(-nats[0])
    assert texts.count(often) > 5
    assert abs(texts.count(often) / n - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_the_law_is_found_again():
    sizes = np.array([1e4, 3e4, 1e5, 3e5])
    a, c = own.law(sizes, np.exp(-50 * sizes**-0.4))
    assert (a, c) == pytest.approx((0.4, 50))
    figures = {}
    for size in (*sizes, 1e6):
        value = np.array([np.exp(-50 * size**-0.4)])
        figures[str(size)] = {"model/params": np.array([size]), "exact": value, "greedy": np.round(value, 1)}
    found = own.foretold(figures)
    assert found["missed"] == pytest.approx(0, abs=1e-6) and found["greedy"] > 0.01


def test_the_law_is_of_probabilities_below_half_an_item_too():
    sizes = np.array([1e3, 2e3, 4e3, 8e3, 16e3])
    figures = {}
    for size in sizes:
        value = np.array([np.exp(-1e4 / size)])
        figures[str(size)] = {"model/params": np.array([size]), "exact": value, "greedy": np.round(value, 1)}
    found = own.foretold(figures)
    assert np.exp(-1e4 / sizes[0]) < 1 / 512 and found["missed"] == pytest.approx(0, abs=1e-6)
    assert found["greedy"] > 0.01


def test_the_answer_is_where_a_walk_comes_to():
    rng = np.random.default_rng(0)
    for _ in range(100):
        (*inputs, state), answer = own.item(rng)
        assert len(inputs) == len(answer) == own.STEPS and 0 <= state < own.STATES
        for one, after in zip(inputs, answer, strict=True):
            state = own.TABLE[state, one - own.STATES]
            assert state == after


def test_rows_cut_no_walk_and_those_taught_hold_the_table():
    taught = list(own.walks())
    texts = [(d.prefix.split(), d.text.split()) for d in taught]
    (phase,) = own.one.phases
    assert {len(before) + len(after) + 1 for before, after in texts} == {8} and phase.seq % 8 == 0
    cells = {(s, x) for before, after in texts
             for s, x in zip([before[-1], *after], before, strict=False)}
    assert len(cells) > 0.99 * own.STATES**2


def test_who_goes_by_the_last_state_alone_has_3e_5():
    share = np.stack([np.bincount(row, minlength=own.STATES) for row in own.TABLE]) / own.STATES
    rng, found = np.random.default_rng(0), []
    for _ in range(20_000):
        ask, answer = own.item(rng)
        found.append(np.prod([share[s, after] for s, after in zip([ask[-1], *answer], answer, strict=False)]))
    assert np.mean(found) == pytest.approx(3e-5, rel=0.2)
