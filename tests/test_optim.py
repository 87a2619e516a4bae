"""lib/optim.py and configs' optimisers: AdamW, Muon, and steps of accumulated gradients."""
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows, used

import model
import train
from configs.baselines.muon import muon
from lib.kernels import Mask
from lib.optim import State, adamw, init_opt_state

equal = np.testing.assert_array_equal


def test_adamw_decays_matrices_and_head_alone(tiny):
    """With no gradient, what is left of a direction is the decay."""
    config = replace(tiny, tied=False)
    for group, transform in adamw(model.table(config), weight_decay=0.25).items():
        ones, none = {"x": jnp.ones(3)}, {"x": jnp.zeros(3)}
        direction, _ = transform.update(none, transform.init(ones), ones)
        equal(direction["x"], np.full(3, 0.25 if group in ("matrix", "head") else 0.0))


def test_muon_orthogonalises_each_layer_with_the_table_s_axes(tiny, params):
    """Each layer's update of a matrix, inputs against outputs, has singular values near one another, and the
    root mean square that was asked for; other groups are AdamW's."""
    old, rows_ = used(tiny, params), model.table(tiny)
    grads = {n: jnp.asarray(np.random.default_rng(i).normal(size=x.shape), x.dtype)
             for i, (n, x) in enumerate(old.items())}
    got = {}
    for make in (partial(muon, weight_decay=0.0), partial(adamw, weight_decay=0.0)):
        transforms = make(rows_)
        for group, names in model.groups(tiny).items():
            g, p = ({n: tree[n] for n in names} for tree in (grads, old))
            got[make.func, group], _ = transforms[group].update(g, transforms[group].init(p), p)
    for name, row in rows_.items():
        for layer in range(2) if row.group == "matrix" else ():
            x = np.asarray(got[muon, "matrix"][name][layer])
            inputs = 32 if row.axes[1] == "embed" else math.prod(row.shape[1:-1])
            values = np.linalg.svd(x.reshape(inputs, -1), compute_uv=False)
            values /= 0.2 * math.sqrt(max(inputs, x.size // inputs))
            assert np.mean((values > 0.6) & (values < 1.3)) > 0.9, name  # but for those near 0 before
            assert np.sqrt(np.mean(x**2)) == pytest.approx(0.2, rel=0.25)
    for group in ("embed", "vector"):
        jax.tree.map(equal, got[muon, group], got[adamw, group])


def a_run(optimizer=adamw, clip=0.0):
    """What `make_step` needs of a config."""
    return SimpleNamespace(optimizer=optimizer, reparam=None, token_loss=model.cross_entropy,
                           reduce=model.weighted_mean, gradient=None, clip=clip)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_whole_batch(tiny, params, parts):
    """With loss weights that differ from part to part: sums over all, not means of means."""
    weights = np.random.default_rng(0).random((4, 24)) * [[0.1], [3], [1], [0]]
    batch = rows(batch=4) | dict(weights=jnp.asarray(weights, jnp.float32))
    state = State(used(tiny, params), init_opt_state(used(tiny, params), tiny, adamw),
                        jnp.int32(0), jnp.int32(0))
    rates = dict.fromkeys(model.groups(tiny), jnp.float32(1e-3))
    out = [jax.jit(train.make_step(a_run(clip=0.5), tiny, train.Phase(accumulate=n)), static_argnames="mask")(
        state, batch, rates, mask=Mask("causal", 0)) for n in (1, parts)]
    for name in ("train/loss", "train/grad_norm"):
        assert float(out[0][1][name]) == pytest.approx(float(out[1][1][name]), rel=1e-5)
    for group in out[0][0].opt:  # moments, since Adam's first step is the gradient's sign
        for one, other in zip(*(jax.tree.leaves(o[0].opt[group]) for o in out), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
