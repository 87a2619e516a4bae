"""configs/growth/flap.py: what does not fluctuate can go, once its mean is a bias."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from edit_cases import context
from edit_cases import logits as scores
from edit_cases import random_params as some
from test_configs_growth import calibration

import model
from lib.biases import biased, biases
from lib.config import ROOT, load_file
from model import Model

pytestmark = pytest.mark.library
flap = load_file(ROOT / "configs/growth/flap.py")


def constant(tiny):
    """(model, kept units): the last head and the last five MLP units of layer 0 never change.

    They read the last unit of the stream alone. It is the same for every token there, and so is the
    length of the stream, as nothing else of the layer's attention is written anywhere but there.
    """
    config = replace(tiny, tied=False)
    params = {name: np.array(x) for name, x in some(config).items()}
    table = params["embed"]
    table[:, -1] = 0
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    table[:, -1] = 0.7
    params["v"][0, :-1, -1] = 0
    params["v"][0, -1, -1] *= 3  # a mean that matters
    params["o"][0, ..., :-1] = 0
    params["o"][0, :-1] = 0
    for name in ("gate", "up"):
        params[name][0, :-1, -5:] = 0
        params[name][0, -1, -5:] = 2
    kept = {"kv_heads": np.ones((2, config.kv_heads)), "mlp": np.ones((2, config.mlp))}
    kept["kv_heads"][0, -1] = kept["mlp"][0, -5:] = 0
    return Model(config, {name: jnp.asarray(x) for name, x in params.items()}), kept


def test_a_channel_that_never_changes_goes_without_a_trace_and_not_without_its_bias(tiny):
    """Logits to 1e-5; without the bias they are far away."""
    before, kept = constant(tiny)
    found = flap.powers(before.params, calibration(2)[0], before.config)
    for axis, name in flap.READER.items():
        mean, square = found[name]
        size = np.asarray(square - mean**2).reshape(2, kept[axis].shape[1], -1).mean(-1)
        assert np.all(size[kept[axis] == 0] < 1e-4) and np.all(np.abs(mean) > 0)
    new = replace(before.config, rows=biases, forward=biased)
    logits = {}
    for bias in (True, False):
        params = flap.without(before.params, before.config, kept, found, bias)
        assert not np.any(params["down"][0, -5:]) and not np.any(params["q"][0, :, -1])
        assert np.all(params["gate"][1] == before.params["gate"][1])
        logits[bias] = scores(params, new)
    plain = scores(before.params, before.config)
    np.testing.assert_allclose(logits[True], plain, atol=1e-5 * float(jnp.abs(plain).max()))
    assert float(jnp.abs(logits[False] - plain).max()) > 0.01


def test_what_fluctuates_least_is_what_goes(tiny):
    """The units that never change have the least scores; a share of parameters is what goes."""
    before, kept = constant(tiny)
    found = flap.powers(before.params, calibration(1)[0], before.config)
    each = flap.unit_scores(before.params, found, before.config, "fluctuation")
    for x in each.values():
        np.testing.assert_allclose(np.mean(x, 1), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(x, 1), 1, atol=1e-3)
    assert set(np.argsort(each["mlp"][0])[:5]) == set(np.flatnonzero(kept["mlp"][0] == 0))
    for share in (0.0, 0.2, 0.6):
        stays = flap.kept_units(each, before.config, share)
        axes = {name: axis for axis in flap.READER for name in model.table(tiny)
                if axis in model.table(tiny)[name].axes}
        size = {name: model.table(tiny)[name].size for name in axes}
        gone = sum(size[n] * float(jnp.mean(1 - stays[axis])) for n, axis in axes.items())
        total = sum(size.values())
        assert gone <= share * total + 1 and gone > share * total - 0.12 * total
        flat, masks = (np.concatenate([np.ravel(t[a]) for a in stays]) for t in (each, stays))
        assert share == 0 or flat[masks == 0].max() <= flat[masks == 1].min()


def test_cutting_nothing_changes_nothing_and_biases_are_rows(tiny):
    config = replace(tiny, tied=True)
    before = Model(config, some(config))
    edited = flap.flap(before, context(batches=calibration), share=0.0, batches=1).model
    np.testing.assert_allclose(scores(edited.params, edited.config), scores(before.params, config),
                               atol=1e-5)
    assert model.groups(edited.config)["bias"] == ["o_bias", "down_bias"]
    drawn = model.init(edited.config, jax.random.key(0))
    assert not np.any(drawn["o_bias"]) and drawn["down_bias"].shape == (config.layers, config.embed)
    cut = flap.flap(before, context(batches=calibration), share=0.4, batches=1).model
    assert np.mean(np.asarray(cut.params["down"]).any(-1)) < 1
    with pytest.raises(ValueError, match="by is 'luck'"):
        flap.flap(before, context(batches=calibration), by="luck")
