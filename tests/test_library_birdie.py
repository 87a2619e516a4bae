"""configs/objectives/birdie.py and codegen2.py: rows, masks and counts of objectives; rewards and actions."""
import math

import numpy as np
import pytest

from lib.config import ROOT, load_file
from lib.objectives import CAUSAL
from lib.tokenizers import Bytes

pytestmark = pytest.mark.library
birdie, codegen = (load_file(ROOT / f"configs/objectives/{name}.py") for name in ("birdie", "codegen2"))
N = 128
ROW = dict(tokens=np.arange(N, dtype=np.int32), targets=np.arange(N, dtype=np.int32) + 33,
           segments=np.ones(N, np.int32), positions=np.arange(N, dtype=np.int32),
           weights=np.ones(N, np.float32), source=np.zeros(N, np.int32))


def made(name, seed=0):
    """(ids given after the sign, ids of the answer, the row) of an objective, checked for its form."""
    row, mask = birdie.OBJECTIVES[name](ROW, np.random.default_rng(seed), Bytes())
    assert mask == {"kind": "prefix", "window": 0} and mask in birdie.OBJECTIVES[name].masks
    assert row["tokens"][0] == Bytes().encode(codegen.SIGNS[name])[0]
    np.testing.assert_array_equal(row["tokens"][1:], row["targets"][:-1])
    told, seen = row["weights"] > 0, row["prefix"] > 0
    first, last = np.flatnonzero(told)[[0, -1]]
    assert told[first:last + 1].all() and seen[:first + 1].all() and not seen[first + 1:].any()
    np.testing.assert_array_equal(row["segments"], np.arange(N) <= last)
    np.testing.assert_array_equal(row["positions"], np.arange(N) * row["segments"])
    return row["tokens"][1:first + 1].tolist(), row["targets"][told].tolist(), row


def test_what_is_given_and_what_is_asked():
    ids = ROW["targets"].tolist()
    for seed in range(5):
        given, answer, _ = made("prefix", seed)
        assert given + answer == ids
        given, answer, _ = made("copy", seed)
        assert given == answer == ids[:N // 2]
        given, answer, _ = made("deshuffle", seed)
        assert answer == ids[:N // 2] and sorted(given) == answer
        assert all(given[i:i + 8] == [given[i] + k for k in range(8)] for i in range(0, 64, 8))
        given, answer, _ = made("find", seed)
        mark = Bytes().encode(codegen.SENTINELS[0])[0]
        assert given[4] == mark and given[5:] == ids[:N - 17]
        at = ids.index(given[0])
        assert given[:4] + answer == ids[at:at + 16]
    assert len({tuple(made("deshuffle", seed)[0]) for seed in range(5)}) == 5


def test_spans_that_are_filled_in_make_the_text_again():
    """Four spans of eight, each after its sentinel; put back, the text is whole; the row is full."""
    marks = [Bytes().encode(mark)[0] for mark in codegen.SENTINELS]
    for seed in range(5):
        given, answer, row = made("infill", seed)
        assert len(answer) == 36 and row["segments"].all()
        assert [answer[i] for i in range(0, 36, 9)] == marks
        spans = {answer[i]: answer[i + 1:i + 9] for i in range(0, 36, 9)}
        text = sum((spans.get(piece, [piece]) for piece in given), [])
        assert text == ROW["targets"].tolist()[:N - 8]
        causally, mask = codegen.infill_causally(ROW, np.random.default_rng(seed), Bytes())
        assert mask == CAUSAL and "prefix" not in causally
        for key, x in causally.items():
            np.testing.assert_array_equal(x, row[key])


def test_an_answer_that_does_not_fit_is_cut():
    row, _ = codegen.asked(ROW, Bytes(), "copy", list(range(33, 133)), list(range(33, 133)))
    assert row["weights"].sum() == N - 100 and row["targets"][-1] == 33 + N - 101


def test_rewards():
    """100 e tanh(sqrt(new old) e (1 - new / old)^3), between -1 and 1."""
    assert birdie.reward(2.0, 2.0) == 0.0
    small = 100 * math.e * math.tanh(math.sqrt(2.0 * 1.9) * 0.05**3 * math.e)
    assert birdie.reward(2.0, 1.9) == pytest.approx(small) and 0 < small < 1
    assert birdie.reward(2.0, 1.0) == 1.0 and birdie.reward(1.0, 2.0) == -1.0
    assert birdie.reward(2.0, 2.1) < 0 < birdie.reward(2.0, 1.95) < birdie.reward(2.0, 1.9)


def test_an_action_follows_the_rewards_of_those_taken():
    """Rewards that grow with one share give it more than all others; the first is a random one."""
    taken = np.random.default_rng(0).dirichlet(np.ones(4), 12)
    shares = birdie.action(3, taken, 5 * taken[:, 2] - taken[:, 0])
    assert shares.sum() == pytest.approx(1) and shares[2] > 0.6 and shares[0] < 0.1
    first = birdie.action(0, np.zeros((0, 4)), np.zeros(0))
    want = np.random.default_rng([4, 0]).dirichlet(np.ones(4), 256)[0]
    np.testing.assert_array_equal(first, want)


def test_a_mixture_is_a_function_of_the_log():
    names = ["a", "b", "c"]
    assert birdie.birdie(0.0, [], names) == dict.fromkeys(names, 1 / 3)
    log, shares = [], np.full(3, 1 / 3)
    losses = np.array([3.0, 3.0, 3.0])
    for _ in range(9):  # what is trained more falls more, "b" alone
        log.append({f"eval/{name}/own": float(x) for name, x in zip(names, losses, strict=True)})
        mixture = birdie.birdie(0.5, log, names)
        shares = np.array([mixture[name] for name in names])
        assert shares.sum() == pytest.approx(1) and shares.min() >= 0.1 / 3 - 1e-12
        losses = losses * np.array([1, 1 - 0.1 * shares[1], 1])
    assert birdie.birdie(0.9, list(log), names) == mixture  # progress and what else ran do not matter
    assert birdie.mean([{f"eval/{n}/own": float(i) for i, n in enumerate(birdie.NAMES)}, {}]) == 2.5
    assert shares[1] == max(shares)


def test_prose_is_what_code_says_of_itself():
    document = next(codegen.docstrings())
    assert len(document.text) > 100 and '"""' not in document.text and document.group
