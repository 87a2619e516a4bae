"""configs/parameters/mora.py: a square matrix that merges, and pairs to memorise."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import strong
from edit_cases import context, scores

import model
from configs.parameters import mora
from lib.lora import lora_rows
from lib.matrices import flat, matrices, sides
from lib.tokenizers import Bytes
from model import Model

pytestmark = pytest.mark.library


@pytest.mark.parametrize("n, m, side", [(32, 32, 8), (32, 48, 10), (48, 32, 10), (10, 45, 6)])
def test_compress_multiply_decompress_is_a_plain_matrix(n, m, side):
    rng = np.random.default_rng(0)
    x, square = rng.normal(size=(5, n)), rng.normal(size=(2, side, side))
    with jax.enable_x64(True):
        plain = mora.merged(jnp.asarray(square), n, m)
        for layer in range(2):
            product = mora.compress(jnp.asarray(x), side) @ square[layer]
            np.testing.assert_allclose(mora.decompress(product, m), x @ plain[layer], atol=1e-6)


def test_groups_are_turned_by_their_number_as_rope_turns_positions():
    """The first group stays; another keeps each pair's length, at an angle of its number."""
    x = np.random.default_rng(0).normal(size=(1, 10)).astype(np.float32)
    groups = np.asarray(mora.compress(jnp.asarray(x), 4))[0]
    filled = np.concatenate([x[0], x[0, :2]]).reshape(3, 4)
    np.testing.assert_allclose(groups[0], filled[0], atol=1e-6)
    for number in (1, 2):
        for pair, frequency in enumerate((1.0, 0.01)):
            old = complex(filled[number, pair], filled[number, pair + 2])
            new = complex(groups[number, pair], groups[number, pair + 2])
            assert new == pytest.approx(old * np.exp(1j * number * frequency), abs=1e-5)


def test_it_has_a_higher_rank_and_no_more_parameters_than_factors(tiny):
    square = model.table(replace(tiny, rows=partial(mora.mora_rows, rank=3)))
    factors = model.table(replace(tiny, rows=partial(lora_rows, rank=3)))
    for name, row in matrices(tiny).items():
        size = square[f"{name}/m"].size
        two = factors[f"{name}/a"].size + factors[f"{name}/b"].size
        assert 0.7 * two < size <= two
        m = np.random.default_rng(0).normal(size=square[f"{name}/m"].shape)
        ranks = np.linalg.matrix_rank(np.asarray(mora.merged(jnp.asarray(m), *sides(row))))
        assert (ranks >= m.shape[1]).all() and m.shape[1] > 3


def test_it_changes_nothing_yet_and_merges(tiny):
    edited = mora.add_mora(Model(tiny, strong(tiny)), context(), rank=3)
    config, params = edited.model
    np.testing.assert_array_equal(scores(mora.squared(params, 0, {}, config), tiny),
                                  scores(strong(tiny), tiny))
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=x.shape), x.dtype) if n.endswith("/m") else x
              for n, x in params.items()}
    used = mora.squared(params, 0, {}, config)
    plain = {name: row.shape for name, row in model.table(tiny).items()}
    assert {name: x.shape for name, x in used.items()} == plain
    for name, row in matrices(tiny).items():
        moved = flat(used[name] - params[name], row)
        np.testing.assert_allclose(moved, mora.merged(params[f"{name}/m"], *sides(row)), atol=1e-6)
    assert {p.group for n, p in model.table(config).items() if "/m" not in n} == {"frozen"}


def test_memory_is_the_share_of_digits_that_follow_a_key():
    """Of what is known by heart all of it, of what is always 0 a sixteenth."""
    texts = [document.text for document in mora.pairs(1, mora.PAIRS)]
    assert len(set(texts)) == mora.PAIRS and {len(text) for text in texts} == {17}

    def by_heart(params, ids):
        following = np.concatenate([ids[:, 1:], ids[:, :1]], 1)
        return jax.nn.one_hot(following, 258)

    def zeros(params, ids):
        return jax.nn.one_hot(np.full_like(ids, ord("0")), 258)

    found = mora.memory({}, by_heart, Bytes())
    assert found == {"memory/digits": 1.0, "memory/missed": 0.0}
    found = mora.memory({}, zeros, Bytes())
    assert abs(found["memory/digits"] - 1 / 16) < 0.03
