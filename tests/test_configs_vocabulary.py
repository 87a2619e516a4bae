"""configs/forgetting/vocabulary.py: rows of new pieces, and those that are kept."""
from dataclasses import replace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from edit_cases import context, random_params, shapes

import model
from lib.config import ROOT, load_file
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tokenizers import Tokenizer, load_tokenizer, train_bpe
from lib.vocabulary import piece_names
from model import Edited, Model

pytestmark = pytest.mark.library

vocabulary = load_file(ROOT / "configs/forgetting/vocabulary.py")
equal = np.testing.assert_array_equal
close = np.testing.assert_allclose


class Pair(NamedTuple):
    """The tokenizers of a swap, of 310 and 320 pieces."""

    old: Tokenizer
    file: str  # of the old one
    new: Tokenizer


@pytest.fixture(scope="module")
def tokenizers(corpus, pieces, tmp_path_factory) -> Pair:
    files = sorted(corpus.rglob("*.txt"))
    texts = [file.read_text("utf-8") for file in files]
    file = tmp_path_factory.mktemp("tokenizer") / "old.model"
    file.write_bytes(train_bpe(texts[::2], 310))
    return Pair(load_tokenizer(file), str(file), pieces)


def model_before(config, tokenizers: Pair) -> Model:
    """A random model over the old vocabulary."""
    config = replace(config, vocab=tokenizers.old.vocab)
    return Model(config, random_params(config))


def swapped(before: Model, tokenizers: Pair, seed=0, **arguments) -> Edited:
    """The model after a swap of the vocabulary."""
    given = context(seed, tokenizer=tokenizers.new)
    return vocabulary.swap_vocabulary(before, given, old=tokenizers.file, **arguments)


def shared_pieces(tokenizers: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pieces that both vocabularies have, in the new and in the old one."""
    old = piece_names(tokenizers.old)
    new = piece_names(tokenizers.new)
    shared = [name for name in new if name in old]
    now = np.array([new.index(name) for name in shared])
    then = np.array([old.index(name) for name in shared])
    return now, then


HOW = pytest.mark.parametrize("new", ["random", "mean", "normal", "hull", "pieces"])


@HOW
def test_a_swap_keeps_the_body_and_resets_the_optimiser_of_the_vocabulary(tiny, tokenizers, new):
    tied = new == "mean"
    before = model_before(replace(tiny, tied=tied), tokenizers)

    edited = swapped(before, tokenizers, new=new)

    config, params = edited.model
    changed = ["embed"] if tied else ["embed", "head"]
    assert config == replace(tiny, tied=tied, vocab=tokenizers.new.vocab)
    assert not edited.preserves
    assert shapes(params) == shapes(model.table(config))
    assert edited.policy == dict.fromkeys(changed, "reset")
    for name in params:
        if name not in changed:
            equal(params[name], before.params[name])


@HOW
def test_a_swap_keeps_shared_pieces_and_draws_the_others(tiny, tokenizers, new):
    tied = new == "mean"
    before = model_before(replace(tiny, tied=tied), tokenizers)
    edited = swapped(before, tokenizers, new=new)

    now, then = shared_pieces(tokenizers)
    vocab = tokenizers.new.vocab
    rest = np.setdiff1d(np.arange(vocab), now)
    assert 256 < len(now) < vocab

    tables = [(edited.model.params["embed"], before.params["embed"])]
    if not tied:
        tables.append((edited.model.params["head"].T, before.params["head"].T))
    for after, old in tables:
        after, old = np.asarray(after), np.asarray(old)
        equal(after[now], old[then])
        if new == "mean":
            mean = np.tile(old.mean(0), (len(rest), 1))
            close(after[rest], mean, atol=1e-6)
        elif new != "random":
            assert np.all(after[rest] <= old.max(0))
            assert np.all(after[rest] >= old.min(0))
        if new == "pieces":
            text = tokenizers.new.decode([rest[0]])
            spelt = tokenizers.old.encode(text)
            close(after[rest[0]], old[np.array(spelt)].mean(0), atol=1e-6)


@HOW
def test_a_swap_follows_the_key_where_it_draws(tiny, tokenizers, new):
    before = model_before(replace(tiny, tied=new == "mean"), tokenizers)

    def embeddings(seed):
        edited = swapped(before, tokenizers, seed=seed, new=new)
        return edited.model.params["embed"]

    first = embeddings(0)
    equal(embeddings(0), first)
    draws = new not in ("mean", "pieces")
    assert np.any(embeddings(1) != first) == draws


def test_normal_rows_have_the_mean_and_the_full_covariance_of_the_old(tiny, tokenizers):
    """Over 14 seeds, without copies: 4,480 rows of 8 columns."""
    before = model_before(replace(tiny, embed=8), tokenizers)
    drawn = []
    for seed in range(14):
        edited = swapped(before, tokenizers, seed=seed, new="normal", scale=1.0, copy=False)
        drawn.append(edited.model.params["embed"])

    rows = np.concatenate(drawn)
    old = np.asarray(before.params["embed"])
    size = old.std()
    close(rows.mean(0), old.mean(0), atol=5 * size / len(rows)**0.5)
    close(np.cov(rows.T), np.cov(old.T), atol=7 * size**2 / len(rows)**0.5)


@pytest.mark.parametrize("how", ["normal", "hull"])
def test_a_swap_is_the_same_on_eight_devices(tiny, tokenizers, how):
    config, params = model_before(tiny, tokenizers)

    def embeddings(mesh):
        where = shardings(model.table(config), mesh)
        placed = {name: jax.device_put(x, where[name]) for name, x in params.items()}
        edited = swapped(Model(config, placed), tokenizers, new=how)
        return edited.model.params["embed"]

    one = embeddings(make_mesh(MeshConfig(), jax.devices()[:1]))
    eight = embeddings(make_mesh(MeshConfig(fsdp=4, tensor=2)))
    close(one, eight, rtol=1e-5, atol=1e-7)


def test_a_swap_refuses_another_model_s_tokenizer(tiny, tokenizers):
    before = Model(tiny, random_params(tiny))
    with pytest.raises(ValueError, match="of 310 pieces, but the model has 258"):
        swapped(before, tokenizers)
