"""lib/seq2seq.py, configs/growth/encoder_decoder.py and t5.py: who sees what, and what adaptation keeps."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strong
from edit_cases import context

import model
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.seq2seq import CROSS, encoded, paired, paired_flops
from model import Model

pytestmark = pytest.mark.library
encoder_decoder = load_file(ROOT / "configs/growth/encoder_decoder.py")
t5 = load_file(ROOT / "configs/growth/t5.py")
equal = np.testing.assert_array_equal
SOURCE, SEQ = 5, 12


def batch_of(segments=None, seed=0):
    """Two rows of SEQ tokens; by default one segment each."""
    ids = np.random.default_rng(seed).integers(0, 258, (2, SEQ), np.int32)
    batch = model.whole(jnp.asarray(ids))
    return batch if segments is None else batch | {"segments": jnp.asarray(segments, jnp.int32)}


@pytest.fixture
def pair(tiny):
    """The shape of a pair, and parameters in which everything matters."""
    config = replace(tiny, **paired(SOURCE))
    return config, strong(config)


@partial(jax.jit, static_argnums=2)
def states(params, batch, config):
    return model.forward(params, batch, Mask("prefix", 0), config)[0]


def changed(params, config, batch, position: int):
    """Where states move [t] when the token at one position becomes another one."""
    tokens = batch["tokens"].at[:, position].set((batch["tokens"][:, position] + 7) % 258)
    moved = states(params, batch, config) != states(params, batch | {"tokens": tokens}, config)
    return np.asarray(moved).any((0, 2))


def test_without_cross_attention_the_source_is_not_there(pair):
    config, params = pair
    assert changed(params, config, batch_of(), 2)[SOURCE:].all()
    silent = params | {"cross_o": jnp.zeros_like(params["cross_o"])}
    assert not changed(silent, config, batch_of(), 2).any()


def test_nothing_in_the_target_looks_ahead_and_the_source_is_wholly_seen(pair):
    config, params = pair
    for position in range(SOURCE, SEQ):
        assert changed(params, config, batch_of(), position).tolist() == [
            position <= t for t in range(SEQ)]
    for position in range(SOURCE):
        assert changed(params, config, batch_of(), position)[SOURCE:].all()


def test_the_encoder_is_bidirectional_within_segments(pair):
    config, params = pair
    given = {name: x[:, :SOURCE] for name, x in batch_of([[1, 1, 1, 2, 2] + [1] * 7] * 2).items()}
    before = np.asarray(encoded(params, given, config))
    for position, seen in (2, [1, 1, 1, 0, 0]), (3, [0, 0, 0, 1, 1]):
        tokens = given["tokens"].at[:, position].add(1)
        after = np.asarray(encoded(params, given | {"tokens": tokens}, config))
        assert (before != after).any((0, 2)).tolist() == [bool(s) for s in seen]


def test_a_target_hears_its_own_segment_alone(pair):
    config, params = pair
    batch = batch_of([[1, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 3]] * 2)
    assert changed(params, config, batch, 0).tolist() == [t in (5, 6) for t in range(SEQ)]
    assert changed(params, config, batch, 4).tolist() == [t in (7, 8) for t in range(SEQ)]
    silent = params | {"cross_o": jnp.zeros_like(params["cross_o"])}
    alone = states(silent, batch, config)
    equal(states(params, batch, config)[:, 9:], alone[:, 9:])  # segment 3 has no source


def test_adaptation_copies_and_keeps_the_decoder(tiny):
    decoder = Model(tiny, strong(tiny))
    config, params = encoder_decoder.adapt(decoder, context(), source=SOURCE).model
    assert {name: x.shape for name, x in params.items()} == {
        name: p.shape for name, p in model.table(config).items()}
    for name, x in decoder.params.items():
        equal(params[name], x)
        equal(params[f"encoder/{name}"], x)
    for name in CROSS:
        equal(params[f"cross_{name}"], decoder.params[name])
    batch = batch_of()
    silent = params | {"cross_o": jnp.zeros_like(params["cross_o"])}
    target = {name: x[:, SOURCE:] for name, x in batch.items()}
    alone = model.llama(decoder.params, target, Mask("causal", 0), tiny)
    np.testing.assert_allclose(states(silent, batch, config)[:, SOURCE:], alone, atol=1e-6)
    last = {name: x[:, :SOURCE] for name, x in batch.items()}
    both = model.llama(decoder.params, last, Mask("bidirectional", 0), tiny)
    equal(np.asarray(encoded(params, last, config)), np.asarray(both))


def test_drawn_cross_attention_is_its_own(tiny):
    decoder = Model(tiny, strong(tiny))
    _, params = encoder_decoder.adapt(decoder, context(), source=SOURCE, cross="draw").model
    assert all(np.any(params[f"cross_{name}"] != decoder.params[name]) for name in CROSS)
    equal(params["encoder/q"], decoder.params["q"])


def test_a_pair_costs_what_its_positions_go_through(tiny):
    config = replace(tiny, **paired(SOURCE))
    rows = model.plain_table(tiny)
    stack = sum(p.size for p in rows.values() if p.group == "matrix")
    width, target = tiny.layers * tiny.heads * tiny.head_dim, SEQ - SOURCE
    encoder = 6 * SOURCE * stack + 12 * width * SOURCE**2
    decoder = 6 * target * (stack + rows["q"].size + rows["o"].size) + 6 * width * target**2
    cross = 6 * SOURCE * (rows["k"].size + rows["v"].size) + 12 * width * SOURCE * target
    head = 6 * SEQ * tiny.vocab * tiny.embed
    assert config.flops(config, SEQ) == pytest.approx((encoder + decoder + cross + head) / SEQ)
    assert paired_flops(tiny, SEQ, 0) - 0 == pytest.approx(
        tiny.flops(tiny, SEQ) + 6 * (rows["q"].size + rows["o"].size))


def test_second_halves_have_the_loss():
    row = dict(tokens=np.arange(8), weights=np.array([1, 1, 1, 1, 1, 0, 1, 1], np.float32))
    made, mask = encoder_decoder.halves(row, None, source=4)
    assert made["weights"].tolist() == [0, 0, 0, 0, 1, 0, 1, 1]
    assert made["prefix"].tolist() == [1] * 4 + [0] * 4 and mask["kind"] == "prefix"


@pytest.mark.parametrize("source", [24, 96])
def test_spans_and_what_is_left_are_the_text(source):
    text, hidden, n = t5.lengths(source)
    assert text - hidden + n == source and hidden == round(0.15 * text)
    rng = np.random.default_rng(0)
    ids = rng.integers(32, 258, 129, np.int32)
    row = dict(tokens=ids[:-1], targets=ids[1:])
    for _ in range(20):
        made, _ = t5.span_corruption(row, rng, source)
        given = made["tokens"][made["prefix"] == 1].tolist()
        told = [*made["tokens"][source:], made["targets"][-1]]
        told = told[:told.index(t5.MARKS[n]) + 1]
        assert len(given) == source and made["weights"].sum() == len(told) - 1 == hidden + n
        equal(np.flatnonzero(made["weights"]), source + np.arange(hidden + n))
        said, spans = [], {}
        for token in told[:-1]:
            said = spans.setdefault(token, []) if token in t5.MARKS else said
            said += [] if token in t5.MARKS else [token]
        filled = sum((spans.pop(token) if token in t5.MARKS else [token] for token in given), [])
        assert not spans and filled == ids[1:text + 1].tolist()


def test_lengths_of_parts_are_drawn_evenly():
    rng = np.random.default_rng(0)
    drawn = np.array([t5.parts(7, 3, rng) for _ in range(3000)])
    assert (drawn >= 1).all() and (drawn.sum(1) == 7).all()
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 15 and counts.min() > 150  # of 6 choose 2 ways, 200 times each


def test_the_rate_falls_with_the_root_of_steps():
    assert [t5.inverse_root(share) for share in (0.05, 0.1, 0.4)] == [1, 1, 0.5]


@pytest.mark.parametrize("file", [encoder_decoder, t5], ids=["encoder_decoder", "t5"])
def test_arms_cost_the_same(file):
    """In FLOPs of each phase's model, the runs that an arm needs included."""
    costs = {}
    for name, config in file.study.arms.items():
        spent = [config] if not config.init_from else [file.study.needs["base"], config]
        costs[name] = 0
        for run in spent:
            shape = run.model
            for phase in run.phases:
                if phase.edits:
                    shape = replace(shape, **paired(file.SOURCE))
                costs[name] += file.base.flops(shape, phase)
    assert max(costs.values()) / min(costs.values()) < 1.01, costs
