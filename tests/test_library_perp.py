"""configs/growth/perp.py: what is pruned stays pruned, whatever trains; adapters can be merged."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows as random_rows
from edit_cases import context
from edit_cases import logits as scores
from edit_cases import random_params as some

import model
import train
from lib.config import ROOT, load_file
from lib.kernels import Mask
from lib.optim import State, init_opt_state
from model import Model

pytestmark = pytest.mark.library
perp = load_file(ROOT / "configs/growth/perp.py")


def pruned(tiny, **added):
    config = replace(tiny, tied=False, unroll=1)
    return perp.sparsify(Model(config, some(config)), context(), **added).model


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
def test_the_smallest_weights_of_each_layer_s_matrix_go(tiny, share):
    config = replace(tiny, tied=False)
    before, after = some(config), pruned(tiny, share=share).params
    for name, row in model.table(config).items():
        if row.group != "matrix":
            np.testing.assert_array_equal(before[name], after[name])
            continue
        for old, new in zip(np.asarray(before[name]), np.asarray(after[name]), strict=True):
            gone = new == 0
            assert gone.sum() == round(share * old.size)
            assert share == 0 or np.abs(old[gone]).max() <= np.abs(old[~gone]).min()
            np.testing.assert_array_equal(old[~gone], new[~gone])


@pytest.mark.parametrize("arm", ["all", "gains", "biases", "embeddings", "head", "lora"])
def test_only_an_arm_s_own_part_moves_and_zeros_stay(tiny, arm):
    """Through two steps of AdamW with decay; what the model uses is sparse too, and moves."""
    config = perp.study.arms[arm]
    added = {k: v for k, v in config.phases[0].edits[0].keywords.items()}
    start = pruned(tiny, **added)
    state = State(start.params, init_opt_state(start.params, start.config, config.optimizer),
                  jnp.int32(0), jnp.int32(0))
    step = jax.jit(train.make_step(config, start.config), static_argnames="mask")
    rates = dict.fromkeys(model.groups(start.config), np.float32(1e-2))
    for _ in range(2):
        state, metrics = step(state, random_rows(), rates, mask=Mask("causal", 0))
        assert metrics["skipped"] == 0
    moved = {n for n, x in state.params.items() if np.any(x != start.params[n])}
    rows = model.table(start.config)
    own = {n for n, row in rows.items() if row.group not in config.optimizer.keywords["frozen"]}
    assert moved == own and own
    used = perp.masked(state.params, 0, {}, start.config)
    for name in perp.matrices(start.config):
        gone = start.params[name] == 0
        assert np.any(gone) and not np.any(np.asarray(used[name])[gone])
        changed = np.asarray(used[name] != start.params[name])[~gone]
        assert changed.mean() > 0.9 if arm in ("all", "lora") else not changed.any()


def test_adapters_begin_as_nothing_and_can_be_merged(tiny):
    """The plain Llama of the merged weights computes what the model with adapters does."""
    plain, start = pruned(tiny), pruned(tiny, rank=3)
    used = perp.masked(start.params, 0, {}, start.config)
    np.testing.assert_array_equal(scores(used, plain.config), scores(plain.params, plain.config))
    params = start.params | {n: x + 0.1 for n, x in start.params.items() if n.endswith("_out")}
    merged = perp.masked(params, 0, {}, start.config)
    assert float(jnp.abs(scores(merged, plain.config) - scores(plain.params, plain.config)).max()) > 0.1
    alone = {name: merged[name] for name in model.table(plain.config)}
    again = perp.masked(alone, 0, {}, plain.config)
    np.testing.assert_array_equal(scores(again, plain.config), scores(merged, start.config))


def test_the_share_recovered_is_of_what_all_recover():
    bits = dict(none=5.0, all=3.0, gains=4.0, lora=2.9)
    found = perp.recovered({name: {"bpb": np.array([x, x])} for name, x in bits.items()})
    assert found == pytest.approx(dict(none=0.0, all=1.0, gains=0.5, lora=1.05))
