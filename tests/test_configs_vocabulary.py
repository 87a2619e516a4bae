"""configs/forgetting/vocabulary.py: rows of new pieces, and those that are kept."""
from dataclasses import replace

import jax
import numpy as np
import pytest
from edit_cases import context, some

import model
from lib.config import ROOT, load_file
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tokenizers import load_tokenizer, train_bpe
from lib.vocabulary import piece_names
from model import Model

vocabulary = load_file(ROOT / "configs/forgetting/vocabulary.py")
equal = np.testing.assert_array_equal


@pytest.fixture(scope="module")
def tokenizers(corpus, pieces, tmp_path_factory):
    """(the old tokenizer, its file, the new one), of 310 and 320 pieces."""
    texts = [file.read_text("utf-8") for file in sorted(corpus.rglob("*.txt"))][::2]
    file = tmp_path_factory.mktemp("tokenizer") / "old.model"
    file.write_bytes(train_bpe(texts, 310))
    return load_tokenizer(file), str(file), pieces


def swapped(config, tokenizers, seed=0, **arguments):
    """(edited, the old parameters, indices of shared pieces in new and old)."""
    old, file, new = tokenizers
    before = Model(replace(config, vocab=old.vocab), some(replace(config, vocab=old.vocab)))
    edited = vocabulary.swap_vocabulary(before, context(seed, tokenizer=new), old=file, **arguments)
    names, place = piece_names(new), piece_names(old)
    pairs = np.array([(i, place.index(n)) for i, n in enumerate(names) if n in place]).T
    return edited, before.params, pairs


@pytest.mark.parametrize("new", ["random", "mean", "normal", "hull", "pieces"])
def test_a_swap_keeps_shared_pieces_and_the_body(tiny, tokenizers, new):
    tied = new == "mean"
    edited, old, (now, then) = swapped(replace(tiny, tied=tied), tokenizers, new=new)
    config, params = edited.model
    assert config == replace(tiny, tied=tied, vocab=tokenizers[2].vocab) and not edited.preserves
    assert {n: x.shape for n, x in params.items()} == {n: p.shape for n, p in model.table(config).items()}
    assert edited.policy == dict.fromkeys(["embed"] if tied else ["embed", "head"], "reset")
    assert 256 < len(now) < config.vocab
    rest = np.setdiff1d(np.arange(config.vocab), now)
    for name, x in params.items():
        if name not in ("embed", "head"):
            equal(x, old[name])
            continue
        x, y = (np.asarray(x), np.asarray(old[name])) if name == "embed" else (x.T, old[name].T)
        equal(x[now], y[then])
        if new == "mean":
            np.testing.assert_allclose(x[rest], np.tile(y.mean(0), (len(rest), 1)), atol=1e-6)
        elif new != "random":
            assert np.all(x[rest] <= y.max(0)) and np.all(x[rest] >= y.min(0))
        if new == "pieces":
            spelt = tokenizers[0].encode(tokenizers[2].decode([rest[0]]))
            np.testing.assert_allclose(x[rest[0]], np.mean([y[i] for i in spelt], 0), atol=1e-6)
    again, other = (swapped(replace(tiny, tied=tied), tokenizers, seed=seed, new=new)[0].model.params
                    for seed in (0, 1))
    equal(again["embed"], params["embed"])
    assert np.any(other["embed"] != params["embed"]) == (new not in ("mean", "pieces"))


def test_normal_rows_have_the_mean_and_covariance_of_the_old(tiny, tokenizers):
    """With full covariance, and no copies, over seeds: 4,480 rows of 8 columns."""
    config = replace(tiny, embed=8)
    drawn = [swapped(config, tokenizers, seed=s, new="normal", scale=1.0, copy=False) for s in range(14)]
    rows, old = np.concatenate([d[0].model.params["embed"] for d in drawn]), np.asarray(drawn[0][1]["embed"])
    size = old.std()
    np.testing.assert_allclose(rows.mean(0), old.mean(0), atol=5 * size / len(rows)**0.5)
    np.testing.assert_allclose(np.cov(rows.T), np.cov(old.T), atol=7 * size**2 / len(rows)**0.5)


def test_a_swap_is_the_same_on_eight_devices(tiny, tokenizers):
    old, file, new = tokenizers
    config = replace(tiny, vocab=old.vocab)
    for how in ("normal", "hull"):
        out = []
        for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]),
                     make_mesh(MeshConfig(fsdp=4, tensor=2))):
            where = shardings(model.table(config), mesh)
            before = Model(config, {n: jax.device_put(x, where[n]) for n, x in some(config).items()})
            given = context(tokenizer=new)
            out.append(vocabulary.swap_vocabulary(before, given, old=file, new=how).model.params["embed"])
        np.testing.assert_allclose(*out, rtol=1e-5, atol=1e-7)


def test_a_swap_refuses_another_model_s_tokenizer(tiny, tokenizers):
    given = context(tokenizer=tokenizers[2])
    with pytest.raises(ValueError, match="of 310 pieces, but the model has 258"):
        vocabulary.swap_vocabulary(Model(tiny, some(tiny)), given, old=tokenizers[1])
