"""configs/forgetting/cw2v.py: rows in the convex hull of the old ones, learnt from pairs."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from edit_cases import context, random_params

from lib.config import ROOT, load_file
from lib.tokenizers import load_tokenizer, train_bpe
from lib.vocabulary import shared
from model import Model, table

pytestmark = pytest.mark.library
cw2v = load_file(ROOT / "configs/forgetting/cw2v.py")


def from_hull(rows: np.ndarray, old: np.ndarray) -> np.ndarray:
    """How far each row [n d] is from the convex hull of the old ones, by non-negative least squares."""
    system = np.concatenate([old.T, 100 * np.ones((1, len(old)))])
    return np.array([scipy.optimize.nnls(system, np.r_[row, 100.0], maxiter=10_000)[1] for row in rows])


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_lie_in_the_convex_hull_and_shared_ones_stay(tiny, corpus, pieces, tmp_path, tied):
    texts = [file.read_text("utf-8") for file in sorted(corpus.rglob("*.txt"))][::2]
    file = tmp_path / "old.model"
    file.write_bytes(train_bpe(texts, 310))
    old = load_tokenizer(file)
    config = replace(tiny, vocab=old.vocab, tied=tied, embed=8)
    before = Model(config, random_params(config))
    ids = np.array(pieces.encode("".join(texts))[:1_600], np.int32).reshape(2, 8, -1)
    batches = [{"tokens": rows, "segments": np.ones_like(rows)} for rows in ids]
    given = context(tokenizer=pieces, batches=lambda n: batches[:n])
    edited = cw2v.constrained(before, given, old=str(file), batches=2, steps=20)
    assert edited.policy == dict.fromkeys(["embed"] if tied else ["embed", "head"], "reset")
    known = shared(pieces, old)
    assert np.sum(known < 0) > 5
    for name in ["embed"] if tied else ["embed", "head"]:
        x, y = (np.asarray(params[name]) for params in (edited.model.params, before.params))
        x, y = (x, y) if name == "embed" else (x.T, y.T)
        np.testing.assert_array_equal(x[known >= 0], y[known[known >= 0]])
        assert from_hull(x[known < 0], y).max() < 1e-4 * np.abs(y).max()
        assert from_hull(3 * y[:1], y)[0] > 0.1  # what lies outside is seen
        assert np.abs(x[known < 0] - y.mean(0)).max() > 1e-3
    rows = {name: tuple(x.shape) for name, x in edited.model.params.items()}
    assert rows == {name: param.shape for name, param in table(edited.model.config).items()}


def test_a_new_piece_is_made_of_the_old_one_whose_company_it_keeps():
    """Twenty pieces are known, each seen with itself; the last one is new, and seen where 3 is."""
    rows, known = {"embed": jnp.eye(20)}, jnp.array([*range(20), -1])
    pairs = jnp.array([[i, i] for i in range(20)] + [[20, 3], [3, 20]] * 5)
    counts = jnp.ones(21)
    a = cw2v.learnt(rows, known, pairs, counts, jax.random.key(0), steps=200, size=256)
    share = jax.nn.softmax(a["embed"][20])
    assert share[3] > 0.5 > 5 * jnp.delete(share, 3).max()
    np.testing.assert_array_equal(a["embed"][:20], 0)  # nothing moves what is known


def test_pairs_are_of_a_window_in_a_segment():
    batch = {"tokens": np.array([[5, 6, 7, 8, 9]]), "segments": np.array([[1, 1, 1, 2, 0]])}
    pairs, counts = cw2v.pairs_of([batch], 2, rate=1.0)
    expected = {(a, b) for a in (5, 6, 7) for b in (5, 6, 7) if a != b}
    assert {tuple(pair) for pair in pairs.tolist()} == expected and len(pairs) == 6
    assert counts.tolist() == [0] * 5 + [1] * 4 + [0]
    often = {"tokens": np.zeros((1, 1_000), int), "segments": np.ones((1, 1_000), int)}
    left, _ = cw2v.pairs_of([often], 1, rate=0.01)
    assert 100 < len(left) < 300  # a tenth of the centers, with two others each


def test_word2vec_is_charged_for_each_table_that_the_model_has():
    """300 steps of products [2048 old] by [old embed], forward and backward."""
    shape, new = cw2v.base.model, 2_048
    tables = [row for row in table(shape).values() if "vocab" in row.axes]
    each = 6.0 * new * shape.vocab * shape.embed
    assert cw2v.study.teacher_flops == {"cw2v": 300 * len(tables) * each} and len(tables) == 2
