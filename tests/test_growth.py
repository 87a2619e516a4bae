"""The edits that live in configs/: width growth, freezing, pruning, vocabularies, learngenes."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import course_of
from edit_cases import IDS, apart, context, loss, scores, some, wider

import model
import train
from lib.config import ROOT, load_file
from lib.edits import stack
from lib.freezing import BLOCK, asleep, freeze
from lib.kernels import Mask
from lib.optim import first_state
from lib.schedule import models_of
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.tokenizers import load_tokenizer, train_bpe
from lib.widen import widen
from model import Model

layers = load_file(ROOT / "configs/incremental_layers.py")
learngene = load_file(ROOT / "configs/learngene.py")
pruning = load_file(ROOT / "configs/pruning.py")
vocabulary = load_file(ROOT / "configs/vocabulary_swap.py")
width = load_file(ROOT / "configs/width_growth.py")
equal = np.testing.assert_array_equal


def test_width_growth_arms_cost_the_same():
    arms = width.arms
    costs = {}
    for name, config in arms.items():
        train.check(config)
        course = course_of(config, context())
        assert replace(course.models[-1], norm_eps=1e-6) == width.wide
        costs[name] = course.flops[-1]
    assert max(costs.values()) / min(costs.values()) < 1.001


@pytest.mark.parametrize("tied,top", [(True, 1), (False, 2)])
def test_a_sub_model_is_the_lowest_layers_and_trains_its_top(tiny, tied, top):
    config = replace(tiny, layers=4, tied=tied)
    params = some(config)

    def used(p, step):
        return width.sub_models(p, step, {}, embed=config.embed, begin=5, until=30, top=top)

    @jax.jit
    def both(p, step):
        return used(p, step), jax.grad(lambda p: loss(used(p, step), config))(p)

    depths = set()
    for step in range(5, 30):
        sub, grads = both(params, step)
        moved = {n: np.asarray(g != 0).reshape(len(g), -1).any(1) for n, g in grads.items()}
        depth = int(np.count_nonzero(np.asarray(sub["o"]).reshape(4, -1).any(1)))
        for name in (n for n in params if BLOCK[n]):
            assert moved[name].tolist() == [depth - top <= l < depth for l in range(4)], (name, step)
        assert moved["norm"].all() and (tied or moved["head"].all())
        assert moved["embed"].any() == tied
        if depth not in depths:
            lowest = {n: x[:depth] if BLOCK[n] else x for n, x in params.items()}
            np.testing.assert_allclose(scores(sub, config), scores(lowest, replace(config, layers=depth)),
                                       atol=1e-5)
        depths.add(depth)
    assert depths == set(range(top, 5, top))
    for step in (4, 30):
        whole, grads = both(params, step)
        for name, x in params.items():
            equal(whole[name], x)
        assert all(np.asarray(grads["q"] != 0).reshape(4, -1).any(1))
    narrow = {n: x[:, :16] if n == "embed" else x for n, x in params.items()}
    assert used(narrow, 5) is narrow


def test_two_stages_begin_with_the_wide_model_and_no_evaluation_is_of_a_sub_model():
    config = width.arms["two_stage"]
    stage, (narrow, _) = config.reparam.keywords, config.phases
    assert stage["begin"] == narrow.steps and stage["embed"] == width.wide.embed
    assert stage["begin"] + 20 < stage["until"]
    assert not any(s % config.eval_every == 0 for s in range(stage["begin"] + 1, stage["until"]))


# -------------------------------------------------------------------------------------------- freezing layers


def test_frozen_layers_stay_bit_for_bit_and_move_again(tiny):
    """Weight decay, old moments and the clipped norm included, through a step that is compiled once."""
    config = replace(tiny, unroll=1)
    run = train.Config(model=config, optimizer=asleep, clip=1e-2, reparam=partial(
        freeze, begin=1, until=3, layers=1))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = first_state(config, run.optimizer, mesh, jax.random.key(0))
    one = np.ones((2, 11), np.int32)
    batch = dict(tokens=IDS[:, :-1], targets=IDS[:, 1:], segments=one, positions=np.cumsum(one, 1) - 1,
                 weights=one.astype(np.float32), source=0 * one)
    step = jax.jit(train.make_step(run, config), static_argnames="mask")
    rates = dict.fromkeys(model.groups(config), np.float32(1e-2))
    blocks = [n for n, p in model.table(config).items() if p.axes[0] == "layers"]
    moved = []
    for _ in range(4):
        after, metrics = step(state, batch, rates, mask=Mask("causal", 0))
        pairs = [(state.params[n], after.params[n]) for n in blocks]
        pairs += [tuple(s.opt["matrix"][0].mu["q"] for s in (state, after))]
        moved.append([[bool(np.any(old[l] != new[l])) for l in (0, 1)] for old, new in pairs])
        state = after
    for i, rows in enumerate(moved):
        assert rows == [[i in (0, 3), True]] * len(rows)


def test_freeze_takes_the_gradient_of_what_it_names(tiny):
    params = model.init(replace(tiny, tied=False), jax.random.key(0))

    def moved(step, **arguments):
        def total(p):
            return sum(jnp.sum(x) for x in freeze(p, step, {}, begin=5, until=8, **arguments).values())
        return {n: np.asarray(x) for n, x in jax.jit(jax.grad(total))(params).items()}

    assert all(x.all() for step in (4, 8) for x in moved(step).values())
    assert not any(x.any() for x in moved(5).values())
    assert {n for n, x in moved(7, names="*norm").items() if not x.any()} == {"attn_norm", "mlp_norm", "norm"}
    for name, x in moved(6, layers=1).items():
        blocks = model.table(tiny)[name].axes[0] == "layers" if name != "head" else False
        assert x[1:].all() and bool(x[0].any()) != blocks


def test_incremental_arms_cost_the_same():
    costs = []
    for config in layers.arms.values():
        train.check(config)
        course = course_of(config, context())
        assert course.models[-1] == layers.deep
        costs.append(course.flops[-1])
    assert max(costs) / min(costs) < 1.002


# ---------------------------------------------------------------------------------------------------- pruning


def calibration(n):
    """Batches of the sort that a run's context gives."""
    one = np.ones((2, 12), np.int32)
    batch = dict(tokens=IDS, segments=one, positions=np.cumsum(one, 1) - 1)
    return [batch | dict(tokens=IDS[:, ::-1] if i else IDS) for i in range(n)]


def with_silent_layers(before):
    """Layers after the first and the last that add nothing."""
    (config, params), _, _ = stack(before, context(), layers=(0, 0, 1, 1))
    silent = {n: params[n].at[jnp.array([1, 3])].set(0) for n in ("o", "down")}
    return Model(config, params | silent)


@pytest.mark.parametrize("by,tied", [("magnitude", True), ("activations", False), ("first", True)])
def test_pruning_what_growth_added_gives_the_old_model_back(tiny, by, tied):
    before = wider("float32", tiny, tied)
    grown = widen(with_silent_layers(before), context(), embed=48, kv_heads=3, mlp=60, new="zero").model
    if by == "first":
        grown = widen(before, context(), embed=48, kv_heads=3, mlp=60, new="zero").model
    given = context(batches=calibration)
    small = pruning.prune(grown, given, layers=2, kv_heads=2, mlp=48, embed=32, by=by, batches=2)
    assert replace(small.model.config, norm_eps=1e-6) == before.config
    assert apart(small, before) <= 1e-5
    for name, p in model.table(before.config).items():
        if p.group != "vector":
            equal(small.model.params[name], before.params[name])


def test_pruning_keeps_what_matters_and_cuts_moments_along(tiny):
    """Units made larger are those that stay, in their order, each layer its own."""
    before, keep = wider("float32", tiny, True), np.array([[1, 5, 40], [0, 2, 47]])
    loud = before.params["down"].at[np.arange(2)[:, None], keep].mul(100.0)
    before = Model(before.config, before.params | {"down": loud})
    for by in ("magnitude", "activations"):
        edited = pruning.prune(before, context(batches=calibration), mlp=3, by=by, batches=1, moments="map")
        equal(edited.model.params["down"], np.take_along_axis(np.asarray(loud), keep[:, :, None], 1))
        names = model.groups(tiny)["matrix"]
        moments = edited.policy["matrix"]({n: before.params[n] for n in names}, "mu")
        equal(moments["gate"], np.take_along_axis(np.asarray(before.params["gate"]), keep[:, None], 2))


def test_pruning_refuses(tiny):
    with pytest.raises(ValueError, match="mlp is 49, but the model has 48"):
        pruning.prune(wider("float32", tiny, True), context(), mlp=49)
    with pytest.raises(ValueError, match="by is 'luck'"):
        pruning.prune(wider("float32", tiny, True), context(), mlp=4, by="luck")


def test_pruning_arms_are_runs():
    """Their shapes come from shapes alone, calibration batches or not."""
    one = np.ones((2, 12), np.int32)
    given = context(batches=lambda n: [dict(tokens=IDS, segments=one, positions=one)])
    for config in pruning.arms.values():
        train.check(config)
        last = models_of(config, given)[-1]
        assert (last.embed, last.kv_heads, last.heads, last.mlp, last.layers) == (96, 3, 3, 256, 4)


# ----------------------------------------------------------------------------------------------- vocabularies


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
    names, place = vocabulary.piece_names(new), vocabulary.piece_names(old)
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


# -------------------------------------------------------------------------------------------------- learngene


def test_expanded_layers_are_a_linear_function_of_depth(tiny):
    before = Model(replace(tiny, layers=4), some(replace(tiny, layers=4)))
    for depth in (2, 6):
        edited = learngene.expand(before, context(), layers=depth)
        assert edited.model.config == replace(tiny, layers=depth)
        for name, p in model.table(tiny).items():
            x, y = np.asarray(before.params[name]), edited.model.params[name]
            t = np.arange(depth).reshape(-1, *(1,) * (x.ndim - 1)) / depth
            linear = (1 - t) * x[0] + t * x[1] if p.axes[0] == "layers" else x
            np.testing.assert_allclose(y, linear, atol=1e-6)


def test_stage_wise_layers_are_their_list(tiny):
    before = Model(replace(tiny, layers=4), some(replace(tiny, layers=4)))
    edited = learngene.expand(before, context(), stages=(0, 0, 1, 1, 2, 2))
    for name, p in model.table(tiny).items():
        x = np.asarray(before.params[name])
        equal(edited.model.params[name], x[[0, 0, 1, 1, 2, 2]] if p.axes[0] == "layers" else x)


@pytest.mark.parametrize("shared,arguments", [
    (partial(learngene.linear, layers=4), dict(layers=4)),
    (partial(learngene.stagewise, stages=(0, 0, 1, 1)), dict(stages=(0, 0, 1, 1)))], ids=["linear", "stages"])
def test_expansion_to_the_depth_trained_computes_what_was_trained(tiny, shared, arguments):
    config = replace(tiny, layers=4)
    before = Model(config, some(config))
    used = shared(before.params, 0, {})
    for name, x in learngene.expand(before, context(), **arguments).model.params.items():
        np.testing.assert_allclose(x, used[name], atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: loss(shared(p, 0, {}), config)))(before.params)
    genes = [bool(np.any(np.asarray(grads["q"][l]) != 0)) for l in range(4)]
    assert genes == [True, True, False, False]
    other = model.init(replace(tiny, layers=6), jax.random.key(0))
    assert shared(other, 0, {}) is other  # after the expansion layers are free


def test_learngene_arms_cost_the_same():
    costs = []
    for config in learngene.arms.values():
        train.check(config)
        costs.append(course_of(config, context()).flops[-1])
    assert max(costs) / min(costs) < 1.002


@pytest.mark.parametrize("arguments", [{}, dict(layers=3, stages=(0,)), dict(stages=(0, 2)), dict(layers=-1)])
def test_expand_refuses(tiny, arguments):
    with pytest.raises(ValueError, match="expand: layers is"):
        learngene.expand(Model(tiny, some(tiny)), context(), **arguments)
