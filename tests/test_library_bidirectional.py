"""Objectives that see both sides, configs/objectives/bidirectional.py: masks, counts, planted corruption."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows as random_rows

import model
import train
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.objectives import BIDIRECTIONAL, choose, masked
from lib.optim import State, init_opt_state
from lib.packing import fill
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library
bidirectional, prose, structural = (load_file(ROOT / f"configs/objectives/{name}.py") for name in (
    "bidirectional", "prose", "structural"))
MASK = Mask("bidirectional", 0)


def row(n=1_000, seed=0):
    """A row of random bytes whose last tenth is padding."""
    rng = np.random.default_rng(seed)
    real = (np.arange(n) < 0.9 * n).astype(np.int32)
    tokens, targets = rng.integers(0, 256, (2, n), dtype=np.int32)
    return dict(tokens=tokens, targets=targets, segments=real, positions=np.arange(n, dtype=np.int32) * real,
                weights=real.astype(np.float32), source=np.full(n, 3, np.int32))


def test_masked_hides_a_share_as_bert_does():
    """15 of 100 exactly; of these 80 % become bos, 10 % another piece, 10 % stay, within 5 deviations."""
    before, counts = row(), np.zeros(3)
    for seed in range(20):
        made, mask = masked(before, np.random.default_rng(seed), Bytes())
        chosen = made["weights"] > 0
        assert mask == BIDIRECTIONAL and chosen.sum() == 135 and not chosen[900:].any()
        np.testing.assert_array_equal(made["targets"], before["targets"])
        np.testing.assert_array_equal(made["tokens"][~chosen], before["targets"][~chosen])
        put = made["tokens"][chosen]
        stays = put == before["targets"][chosen]
        counts += np.array([np.sum(put == Bytes.bos), np.sum(~stays & (put != Bytes.bos)), stays.sum()])
    assert counts.sum() == 2_700
    deviation = np.sqrt(2_700 * np.array([0.16, 0.09, 0.09]))
    assert (np.abs(counts - 2_700 * np.array([0.8, 0.1, 0.1])) < 5 * deviation).all()


def test_some_positions_are_chosen_before_others():
    possible, first = np.arange(100) < 80, np.arange(100) % 10 == 0
    for seed in range(5):
        chosen = choose(possible, 0.2, np.random.default_rng(seed), first)
        assert chosen.sum() == 16 and chosen[first & possible].all() and not chosen[80:].any()
    few = choose(possible, 0.05, np.random.default_rng(0), first)
    assert few.sum() == 4 and not few[~first].any()


def test_replaced_tokens_are_others_of_their_own_cluster():
    before = row()
    made, mask = bidirectional.rts(before, np.random.default_rng(0), Bytes())
    assert mask == BIDIRECTIONAL and made["replaced"].sum() == 135
    np.testing.assert_array_equal(made["replaced"], made["tokens"] != before["targets"])
    assert made["weights"].sum() == 900  # every real token is told of
    predicted, _ = bidirectional.slm(before, np.random.default_rng(0), Bytes())
    np.testing.assert_array_equal(predicted["tokens"], made["tokens"])
    np.testing.assert_array_equal(predicted["weights"], made["replaced"])
    few = before | {"targets": before["targets"] % 16}
    clusters = np.arange(258) // 2  # pairs; 7 is alone
    clusters[6:8] = 1_000, 1_001
    made, changed = bidirectional.replaced(few, np.random.default_rng(1), 258, 0.15, clusters)
    np.testing.assert_array_equal(made["tokens"][changed], few["targets"][changed] ^ 1)
    assert not changed[few["targets"] // 2 == 3].any() and changed.sum() > 100
    made, changed = bidirectional.replaced(few, np.random.default_rng(1), 258, 0.15)
    assert changed.sum() == 135 and set(made["tokens"].tolist()) <= set(range(16))  # of the row


def test_the_head_learns_a_planted_corruption_without_a_vocabulary_s_logits(tiny):
    """What is replaced is a 7 among even tokens: in 60 steps the head tells, and the nats are its own."""
    config = replace(tiny, rows=bidirectional.rows, forward=bidirectional.forward)
    run = replace(bidirectional.study.arms["rts"], model=config)
    params = model.init(config, jax.random.key(0))
    state = State(params, init_opt_state(params, config, run.optimizer), jnp.int32(0), jnp.int32(0))
    step = jax.jit(train.make_step(run, config, run.phases[0]), static_argnames="mask")
    lr = dict.fromkeys(model.groups(config), np.float32(0.01))
    losses = []
    for seed in range(60):
        batch = random_rows(seed, batch=8)
        planted = np.random.default_rng(seed).random(batch["tokens"].shape) < 0.15
        batch |= dict(tokens=np.where(planted, 7, batch["tokens"] // 2 * 2).astype(np.int32),
                      replaced=planted.astype(np.int32))
        state, metrics = step(state, batch, lr, mask=MASK)
        losses.append(float(metrics["train/loss"] if "train/loss" in metrics else metrics["loss"]))
    assert losses[0] > 0.4 and losses[-1] < 0.02
    given = model.forward(state.params, batch, MASK, config)[1]["replaced"]
    real = batch["segments"] > 0
    assert ((given > 0) == planted)[real].all()
    p = np.asarray(jax.nn.sigmoid(given))
    want = -np.log(np.where(planted, p, 1 - p))
    np.testing.assert_allclose(bidirectional.told(None, batch, {"replaced": given}), want, atol=1e-4)


def test_prose_is_what_comments_and_strings_hold():
    """Spans of characters, whatever a character's bytes and a line's end are."""
    code = 'def é(x):\r\n    """Twö\n    lines."""\n    return "ü" + x  # añd\n'
    assert [code[begin:end] for begin, end in prose.prose(code)] == [
        '"""Twö\n    lines."""', '"ü"', "# añd"]
    assert prose.prose("x = 1\n") == ()
    found = prose.prose("x = f'a{y}b'\n")  # one span until Python 3.12, which leaves y out
    assert found[0][0] == 4 and found[-1][1] == 12


def test_the_task_asks_of_each_byte_whether_it_is_prose():
    before = row(20) | {"marks": np.arange(20, dtype=np.int32) % 3 // 2}
    made, mask = prose.tell_prose(before, None)
    assert mask == BIDIRECTIONAL and made["targets"].tolist() == before["marks"].tolist()
    np.testing.assert_array_equal(made["tokens"], before["targets"])
    np.testing.assert_array_equal(made["weights"], before["weights"])
    weights = jnp.array([[1.0, 1.0, 0.0, 1.0]])
    (total, count), metrics = prose.right(jnp.array([[0.1, 0.6, 0.1, 0.8]]), {"weights": weights})
    assert (float(total), float(count)) == (1.5, 3.0) and float(metrics["right"]) == pytest.approx(2 / 3)
    measured = [{"eval/code/own": 6.0}, {"eval/code/own": 0.5, "eval/code/right": 0.75}, {"step": 1}]
    assert (prose.nats(measured), prose.share(measured)) == (0.5, 0.75)


def test_what_telling_costs():
    """The share that is charged is that of all products but the head's."""
    arm = bidirectional.study.arms["rts"]
    plain = model.flops_per_token(arm.model, 128)
    head = 6 * arm.model.vocab * arm.model.embed
    assert arm.phases[0].cost * plain == pytest.approx(plain - head)


def test_pairs_of_spans_and_what_they_tell():
    """Every other row is of two documents; each span is half a row; labels are those of the plan."""
    lengths = np.array([300, 64, 128, 127, 200])
    plan = structural.pairs(lengths, 128)
    assert plan.tolist() == [
        [0, 1, 0, 0, 64, 0], [0, 1, 0, 64, 64, 0], [1, 2, 0, 128, 64, 0], [1, 2, 2, 64, 64, 0],
        [2, 1, 2, 0, 64, 0], [2, 1, 2, 64, 64, 0], [3, 2, 4, 0, 64, 0], [3, 2, 0, 64, 64, 0]]
    assert structural.pairs(np.array([256]), 128)[:, 1].tolist() == [1, 1, 1, 1]  # there is no other one
    assert structural.pairs(np.array([5]), 128).shape == (0, 6)
    texts = [np.full(length - 1, 10 + i, np.int32) for i, length in enumerate(lengths)]
    arrays = fill(plan, np.arange(4), 128, lambda i: texts[i], Bytes())
    for number in range(4):
        one = {name: x[number] for name, x in arrays.items() if name != "document"}
        made, mask = structural.same(one, None)
        assert mask == BIDIRECTIONAL and (made["weights"] == one["weights"]).all()
        assert (made["targets"] == (number + 1) % 2).all() and (made["segments"] == 1).all()
        inside = made["tokens"][made["tokens"] < 256]
        assert (len(np.unique(inside)) == 1) == (number % 2 == 0)
        assert made["positions"].tolist() == list(range(128))
