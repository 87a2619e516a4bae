"""configs/forgetting/lexinvariant.py: vectors of a row's own, and symbols that do not matter."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, strong

import model
from lib.config import ROOT, load_file
from lib.kernels import Mask

pytestmark = pytest.mark.library
own = load_file(ROOT / "configs/forgetting/lexinvariant.py")
CAUSAL = Mask("causal", 0)


@pytest.fixture
def config(tiny):
    return replace(tiny, rows=own.bodies, forward=own.looked_up, outputs=own.compared)


def seeds(*values):
    """Those of rows of 24 positions."""
    return jnp.asarray(np.repeat(np.array(values, np.int32)[:, None], 24, 1))


def test_there_are_no_embeddings_and_vectors_are_a_row_s_own(config):
    assert not {"embed", "head"} & model.table(config).keys() and "embed" not in model.groups(config)
    batch = {"tokens": jnp.zeros((3, 24), jnp.int32), "seeds": seeds(5, 6, 5)}
    drawn = np.asarray(own.vectors(batch, config))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 4 / drawn[0].size**0.5
    np.testing.assert_allclose(drawn.std() * config.embed**0.5, 1, atol=0.03)


def test_permuted_symbols_with_their_vectors_permuted_cost_the_same(config, monkeypatch):
    """What a model computes depends on which tokens are equal, and on nothing else (1e-6)."""
    params, batch = strong(config), {k: jnp.asarray(v) for k, v in rows().items()}
    plain = model.losses(params, batch, CAUSAL, config)
    order = np.random.default_rng(0).permutation(config.vocab)
    drawn = own.vectors(batch, config)
    monkeypatch.setattr(own, "vectors", lambda batch, config: drawn[:, np.argsort(order)])
    ciphered = batch | {name: jnp.asarray(order)[batch[name]] for name in ("tokens", "targets")}
    np.testing.assert_allclose(model.losses(params, ciphered, CAUSAL, config), plain, atol=1e-6)


def test_a_loss_in_chunks_has_the_vectors_of_its_rows(config):
    params = strong(config)
    batch = {k: jnp.asarray(v) for k, v in rows().items()} | {"seeds": seeds(3, 4)}
    whole = model.losses(params, batch, CAUSAL, config)
    small = replace(config, vocab=258, logits_mib=1)
    wide = {k: jnp.tile(v, (64, 1)) for k, v in batch.items()}
    assert model.chunk_length(128, 24, small) < 24
    np.testing.assert_allclose(model.losses(params, wide, CAUSAL, small)[:2], whole, atol=1e-5)


def test_rows_of_a_batch_get_seeds_of_their_own():
    row = {"tokens": np.zeros(4, np.int32)}
    one, two, again = (own.seeded(row, np.random.default_rng(s))[0]["seeds"] for s in (0, 1, 0))
    assert len(set(one)) == 1 and one[0] != two[0]
    np.testing.assert_array_equal(one, again)


def test_places_are_means_of_their_positions():
    losses = jnp.arange(16.0).reshape(2, 8)
    batch = {"positions": jnp.tile(jnp.arange(8), (2, 1)), "weights": jnp.ones((2, 8)).at[1, 0].set(0)}
    (total, weight), found = own.by_place(losses, batch)
    assert (total, weight) == (112, 15)
    np.testing.assert_allclose([found[f"place/{i}"] for i in range(4)], [(0 + 1 + 9) / 3, 6.5, 8.5, 10.5])


def test_lookup_counts_right_values():
    def knows(params, ids):
        keys, values, asked = ids[:, :-1:2], ids[:, 1:-1:2], ids[:, -1:]
        return jax.nn.one_hot(np.sum(values * (keys == asked), 1), 258)[:, None]

    assert own.lookup(None, knows) == {"lookup": 1.0}
    assert own.lookup(None, lambda params, ids: np.zeros((len(ids), 1, 258))) == {"lookup": 0.0}
