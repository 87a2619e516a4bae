"""The seams of model and step, each tested at the seam: rows, stream, losses, gradient, optimiser."""
import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import course_of, strong
from conftest import rows as random_rows
from edit_cases import context

import model
import train
from configs.base import loud
from lib.checkpoint import Checkpoints
from lib.config import from_json, to_json
from lib.edits import stack
from lib.errors import InputError
from lib.kernels import Mask
from lib.optim import State, adamw, first_state, map_like_params, state_like
from lib.schedule import Schedule, lr_schedule
from lib.sharding import MeshConfig, make_mesh, put
from lib.widen import widen
from model import Edited, Model, ModelConfig, Param

CAUSAL = Mask("causal", 0)
TINY = ModelConfig(
    layers=2, embed=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=258, tied=True, unroll=1)
BATCH = random_rows(batch=8)
PLAIN = train.Phase()

# --------------------------------------------------------------------- the functions of the configs below


def with_adapter(config, rows, rank: int = 4):
    """Low-rank factors beside q, read and written by free axes, and a scalar."""
    layers, _, *heads = rows["q"].shape
    return rows | {
        "q_in": Param(("layers", "embed", "rank"), (layers, config.embed, rank), 0.2, "adapter"),
        "q_out": Param(("layers", "rank", *rows["q"].axes[2:]), (layers, rank, *heads), 0.2, "adapter"),
        "strength": Param((), (), None),
    }


def merged(params, step, batch, config):
    """A `reparam`: q with its factors multiplied in; it is told the shape."""
    assert model.table(config)["q_in"].shape == params["q_in"].shape
    delta = jnp.einsum("ler,lrkgh->lekgh", params["q_in"], params["q_out"])
    return params | {"q": params["q"] + params["strength"] * delta}


def small_numbers(key, shape, dtype):
    """An initialiser of its own: integers of a byte."""
    return jax.random.randint(key, shape, -128, 128)


def with_codes(config, rows):
    """Eight-bit numbers that nothing trains, and an adapter."""
    codes = Param(("layers", "state"), (config.layers, 6), small_numbers, "codes", "int8")
    return with_adapter(config, rows) | {"codes": codes}


def with_unknown_axis(config, rows):
    return rows | {"odd": Param(("layers", "bogus"), (config.layers, 3), 0.1)}


def undeclared(model, context):
    """An edit that adds a parameter without a row."""
    return Edited(model._replace(params=model.params | {"stray": jnp.ones(3)}), {}, True)


def stop_at(params, apply, layers: int):
    """An `evals` that sends SIGTERM to this process once the model has so many layers."""
    if len(params["q"]) == layers:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    return {}


def halving(share, least: float = 0.25):
    """A `Schedule.shape`: from 1 down to `least`, along an exponential."""
    return least**share


def dearer(config, seq):
    """A `flops`: three times the plain ones."""
    return 3 * model.flops_per_token(config, seq)


def plain_descent(table):
    """An `optimizer`: the gradient itself."""
    return {group: optax.identity() for group in dict.fromkeys(p.group for p in table.values())}


# ----------------------------------------------------------------------------- rows: a run's whole life


@pytest.fixture(scope="module")
def grown(data_config, tmp_path_factory):
    """A run of two steps, a growth and two steps on eight devices; its config, and its directory."""
    root = tmp_path_factory.mktemp("seams")
    phase = train.Phase(steps=2, batch=8, seq=32)
    config = train.Config(
        name="whole", runs=str(root), model=replace(TINY, rows=with_adapter, flops=dearer),
        data=replace(data_config, dev=0, test=0), reparam=merged,
        phases=(phase, replace(phase, edits=(partial(stack, moments="map"),), cost=0.5)),
        schedule=Schedule(shape=partial(halving, least=0.5), peak=1e-2, warmup=0, budget="tokens"),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2), overlap=8, prompts=(), save_every=1, keep=9)
    train.train(config, __file__)
    return config, root


def state_at(config, run, step, mesh):
    """The whole state of a checkpoint, on a mesh."""
    checkpoints = Checkpoints(run / "checkpoints")
    shape = from_json(ModelConfig, checkpoints.meta(step)["model"])
    return checkpoints.state(step, state_like(shape, config.optimizer, mesh))


def same_bits(one, other):
    ours, theirs = (jax.tree.leaves(jax.device_get(tree)) for tree in (one, other))
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def test_added_rows_are_sharded_grown_and_restored_on_another_mesh(grown):
    """Free axes are whole on each device; the optimiser has moments of them, in their own group."""
    config, root = grown
    eight = make_mesh(config.mesh)
    state = state_at(config, root / "whole", 4, eight)
    assert tuple(state.params["q_in"].sharding.spec) == (None, "fsdp", None)
    assert tuple(state.params["q_out"].sharding.spec) == (None, None, "tensor", None, None)
    assert state.params["q_in"].shape == (4, 32, 4) and state.params["strength"].shape == ()
    assert {"adapter", "matrix"} <= state.opt.keys()
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(data=1, fsdp=8))):
        same_bits(state, state_at(config, root / "whole", 4, mesh))


def test_a_stopped_run_with_added_rows_goes_on_byte_for_byte(grown, capsys):
    """Stopped by a signal before its growth, which is done again, and within the phase after it."""
    config, root = grown
    config = replace(config, name="stopped", eval_at=(3,))
    for layers, step in ((2, 2), (4, 3)):
        assert train.train(replace(config, evals=(partial(stop_at, layers=layers),)), __file__) is None
        assert f"step {step} is saved" in capsys.readouterr().out
    train.train(config, __file__)
    assert "resuming from step 3" in capsys.readouterr().out
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    same_bits(*(state_at(config, root / name, 4, mesh) for name in ("whole", "stopped")))


def test_rates_and_flops_of_a_run_in_closed_form(grown):
    """A schedule that is a function; FLOPs of the model's own function, times the phase's cost."""
    config, root = grown
    lines = (root / "whole/metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "train/loss" in row]
    rates = [row["train/lr"] for row in found]
    np.testing.assert_allclose(rates, 1e-2 * 0.5 ** (np.arange(1, 5) / 4), rtol=1e-6)
    shallow, deep = (3 * model.flops_per_token(replace(TINY, layers=n), 32) * 8 * 32 for n in (2, 4))
    expected = np.cumsum([shallow, shallow, deep / 2, deep / 2])
    np.testing.assert_allclose([row["train/flops"] for row in found], expected, rtol=1e-9)


def test_a_schedule_that_is_a_function_survives_json():
    schedule = Schedule(shape=partial(halving, least=0.125), peak=2.0, warmup=0)
    again = from_json(Schedule, json.loads(json.dumps(to_json(schedule))))
    assert again == from_json(Schedule, json.loads(json.dumps(to_json(schedule))))
    spent = np.arange(9.0)
    found = lr_schedule(again, spent, 0, 8)
    np.testing.assert_allclose(found, 2 * 0.125 ** (np.arange(1, 9) / 8), rtol=1e-12)
    warm = lr_schedule(replace(again, warmup=4), spent, 0, 8)
    np.testing.assert_allclose(warm / found, [0.25, 0.5, 0.75, *[1] * 5], rtol=1e-12)


@pytest.fixture(scope="module")
def adapted():
    config = replace(TINY, rows=with_adapter)
    return Model(config, strong(config))


def test_growth_that_preserves_the_function_does_so_with_added_rows(adapted):
    """Silent layers between the old ones; and in width, factors of rank along."""

    def logits(found):
        params = model.reparametrised(merged, found.params, 0, BATCH, found.config)
        return jax.jit(partial(model.apply, config=found.config))(params, BATCH)

    key = model.Context(jax.random.key(3), 0, None, None, None)
    before = logits(adapted)
    deep = stack(adapted, key, layers=(0, -1, 1), new="identity")
    wide = widen(adapted, key, mlp=96)
    for edited in (deep, wide):
        assert edited.preserves
        np.testing.assert_allclose(logits(edited.model), before, atol=2e-5)
    assert deep.model.params["q_in"].shape[0] == 3
    assert not np.array_equal(before, jax.jit(partial(model.apply, config=TINY))(adapted.params, BATCH))


def test_parameters_without_a_row_are_refused_before_a_run_begins(data_config, tmp_path):
    """By name, as is an axis that no rule knows; nothing of the run is on disk."""
    phase = train.Phase(steps=2, batch=8, seq=32)
    config = train.Config(
        name="no", runs=str(tmp_path), model=TINY, data=replace(data_config, dev=0, test=0),
        phases=(phase, replace(phase, edits=(undeclared,))), overlap=8)
    with pytest.raises(InputError, match=r"undeclared gives.*stray \(3,\)"):
        train.train(config)
    odd = replace(config, model=replace(TINY, rows=with_unknown_axis), phases=(phase,))
    with pytest.raises(InputError, match="odd has the axis 'bogus'; allowed are layers"):
        train.train(odd)
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------------------ the stream


@pytest.fixture(scope="module")
def streamed():
    """A model of three blocks, its parameters, and the stream before the first."""
    config = replace(TINY, layers=3)
    params = strong(config)
    return config, params, model.embedded(params, BATCH, config)


def run_stream(streamed, first=0, last=None, x=None, params=None, **how):
    config, own, start = streamed
    x = start if x is None else x

    @jax.jit
    def go(params, x):
        return model.stream(params, x, BATCH, CAUSAL, config, first, last, **how)

    return go(params or own, x)


@pytest.fixture(scope="module")
def end(streamed):
    """What all three blocks give."""
    return run_stream(streamed)[0]


@pytest.mark.parametrize("at", [1, 2])
def test_a_stream_in_two_parts_is_the_whole(streamed, end, at):
    """Exactly; and with the final norm it is what `llama` gives."""
    config, params, _ = streamed
    between, _ = run_stream(streamed, 0, at)
    there, _ = run_stream(streamed, at, None, between)
    np.testing.assert_array_equal(there, end)
    states = jax.jit(partial(model.llama, mask=CAUSAL, config=config))(params, BATCH)
    np.testing.assert_array_equal(states, model.rms_norm(end, params["norm"], config.norm_eps))


def silent_attend(q, k, v, layer):
    """Attention of which the layer after the first gets nothing; keeps who it was."""
    return jnp.where(layer == 1, 0.0, 1.0) * q, layer


def lone_attend(q, k, v):
    return q, None


def test_attend_is_told_its_layer_and_changes_what_is_attended(streamed):
    """Silencing it in a layer is silencing that layer's output projection."""
    _, params, _ = streamed
    x, (layers, _) = run_stream(streamed, attend=silent_attend)
    np.testing.assert_array_equal(layers, [0, 1, 2])
    muted = params | {"o": params["o"].at[1].set(0)}
    y, _ = run_stream(streamed, params=muted, attend=lone_attend)
    np.testing.assert_array_equal(x, y)
    _, (layers, _) = run_stream(streamed, 1, 3, attend=silent_attend)
    np.testing.assert_array_equal(layers, [1, 2])


def watch(x, layer, w):
    """A `visit` that keeps the stream and what block it is."""
    return x, (x, layer, w["mlp_norm"])


def patch(x, layer, w):
    """A `visit` that blanks the stream after the block 1."""
    return jnp.where(layer == 1, 0.0, x), None


def test_visit_sees_the_stream_after_each_block_and_may_change_it(streamed, end):
    _, params, start = streamed
    x, (_, (seen, layers, gains)) = run_stream(streamed, visit=watch)
    np.testing.assert_array_equal(x, end)
    np.testing.assert_array_equal(seen[-1], end)
    np.testing.assert_array_equal(seen[0], run_stream(streamed, 0, 1)[0])
    np.testing.assert_array_equal(layers, [0, 1, 2])
    np.testing.assert_array_equal(gains, params["mlp_norm"])
    patched, _ = run_stream(streamed, visit=patch)
    from_nothing, _ = run_stream(streamed, 2, None, jnp.zeros_like(start))
    np.testing.assert_array_equal(patched, from_nothing)


def averaging(x, w, times, layer):
    """A `mixer`: the mean of what came before, through q and o; keeps its layer."""
    counts = jnp.arange(1, x.shape[1] + 1)[:, None]
    means = jnp.cumsum(x, 1) / counts
    return times(times(means, "q"), "o"), layer


def test_a_mixer_stands_in_the_place_of_attention(streamed, end):
    """It equals its sum by hand in one block; k and v are not used."""
    config, params, start = streamed
    x, (layers, _) = run_stream(streamed, mixer=averaging)
    np.testing.assert_array_equal(layers, [0, 1, 2])
    assert not np.allclose(x, end)
    other = params | {"k": params["k"] * 2, "v": params["v"] * 3}
    np.testing.assert_array_equal(run_stream(streamed, params=other, mixer=averaging)[0], x)
    one, _ = run_stream(streamed, 0, 1, mixer=averaging)
    n = model.rms_norm(start, params["attn_norm"][0], config.norm_eps)
    means = np.cumsum(n, 1) / np.arange(1, n.shape[1] + 1)[:, None]
    mixed = np.einsum("btd,dkgh,kghe->bte", means, params["q"][0], params["o"][0])
    y = start + mixed
    n = model.rms_norm(y, params["mlp_norm"][0], config.norm_eps)
    gate = jax.nn.silu(n @ params["gate"][0]) * (n @ params["up"][0])
    np.testing.assert_allclose(one, y + gate @ params["down"][0], atol=1e-4)


# --------------------------------------------------------------------------------------------------- the step


def step_of(config, phase=PLAIN, shape=None, mask=CAUSAL):
    """(a step of it, its first state)."""
    shape = shape or config.model
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    state = first_state(shape, config.optimizer, one, jax.random.key(0))
    step = jax.jit(train.make_step(config, shape, phase), static_argnames="mask")
    lr = {group: np.float32(1e-2) for group in model.groups(shape)}
    return lambda state, batch=BATCH: step(state, batch, lr, mask=mask), state


def test_a_group_that_the_optimiser_leaves_out_is_frozen():
    """No state, no gradient, no part in the clipped norm; bit for bit as it was, eight-bit rows too."""
    shape = replace(TINY, rows=with_codes)
    config = train.Config(
        model=shape, reparam=merged, optimizer=partial(adamw, frozen=("adapter", "codes", "embed")))
    step, first = step_of(config)
    assert first.params["codes"].dtype == jnp.int8 and len(np.unique(first.params["codes"])) > 3
    assert first.opt.keys() == {"matrix", "vector"}
    state, metrics = step(first)
    state, _ = step(state)
    still = ("q_in", "q_out", "codes", "embed")
    same_bits({n: first.params[n] for n in still}, {n: state.params[n] for n in still})
    assert not np.array_equal(first.params["q"], state.params["q"])
    assert not np.array_equal(first.params["strength"], state.params["strength"])

    @jax.jit
    def gradient(trained):
        def mean(trained):
            used = merged(first.params | trained, 0, BATCH, shape)
            each = model.losses(used, BATCH, CAUSAL, shape)
            return jnp.sum(each * BATCH["weights"]) / jnp.sum(BATCH["weights"])
        return jax.grad(mean)(trained)

    grads = gradient({n: x for n, x in first.params.items() if n not in still})
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in grads.values()))
    assert float(metrics["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert {key for key in metrics if key.endswith("/grad_norm")} == {
        "train/grad_norm", "matrix/grad_norm", "vector/grad_norm"}


def with_value(config, rows):
    """A value head, which reads final states."""
    return rows | {"value": Param(("embed", "out"), (config.embed, 1), 0.1, "value")}


def with_states(params, batch, mask, config):
    """A `forward` that gives the states to the loss as well."""
    states = model.llama(params, batch, mask, config)
    return states, {"states": states, "place": batch["positions"]}


def valued(logits, batch, extras):
    """A `token_loss`: plain nats, and the square of how far the value is from a number of the target."""
    assert {"step", "params", "config", "states", "place"} <= extras.keys()
    assert extras["states"].shape[:2] == logits.shape[:2] == extras["place"].shape
    value = (extras["states"] @ extras["params"]["value"])[..., 0]
    missed = jnp.square(value - batch["targets"] / 258)
    return model.cross_entropy(logits, batch, extras) + missed + 0.0 * extras["step"]


def told(losses, batch, extras):
    """A `reduce` that is told extras, those of the whole batch."""
    assert extras["states"].shape[:2] == losses.shape and "value" in extras["params"]
    (numerator, denominator), _ = model.weighted_mean(losses, batch)
    found = {"own/step": extras["step"] + 0.0, "own/places": jnp.max(extras["place"])}
    return (numerator, denominator), found


def nothing(logits, batch, extras):
    return 0.0 * model.cross_entropy(logits, batch, extras)


def doubled_sum(losses, batch):
    numerator, denominator = jnp.sum(losses), jnp.sum(batch["weights"])
    return (2 * numerator, denominator), {"own/run": numerator}


LONG = random_rows(batch=32, seq=64)


@pytest.fixture(scope="module")
def value():
    """One step with a value head by a phase's own loss: logits in one piece, and in chunks."""
    found = []
    for mib in (256, 1):
        shape = replace(TINY, rows=with_value, forward=with_states, logits_mib=mib)
        config = train.Config(model=shape, token_loss=nothing, reduce=doubled_sum)
        step, state = step_of(config, train.Phase(token_loss=valued, reduce=told))
        assert model.chunk_length(32, 64, shape) == {256: 64, 1: 16}[mib]
        found.append((state, *step(state, LONG)))
    return found


def test_the_losses_of_a_phase_win_over_the_run_s(value):
    for _, _, metrics in value:
        assert metrics["own/step"] == 0 and metrics["own/places"] == LONG["positions"].max()
        assert "own/run" not in metrics and float(metrics["train/loss"]) > 1


def test_a_value_head_trains_through_the_parameters_that_a_loss_is_told(value):
    """In chunks of logits as in one piece; what `forward` gave is in chunks too."""
    (first, whole, metrics), (_, chunked, again) = value
    moved = whole.params["value"] - first.params["value"]
    assert float(jnp.abs(moved).max()) > 1e-3
    assert float(metrics["value/grad_norm"]) > 0
    for key in ("train/loss", "train/grad_norm", "value/grad_norm"):
        assert float(again[key]) == pytest.approx(float(metrics[key]), rel=1e-5)
    np.testing.assert_allclose(chunked.params["value"], whole.params["value"], atol=1e-6)


def test_a_phase_without_its_own_loss_has_the_run_s():
    step, state = step_of(train.Config(model=TINY, token_loss=nothing, reduce=doubled_sum))
    _, metrics = step(state)
    assert metrics["own/run"] == metrics["train/loss"] == 0


def unchanged(gradient, params, batch, step):
    """A `Config.gradient` that changes nothing."""
    return gradient(params, batch)


def without_q(gradient, params, batch, step):
    """A `Config.gradient` that takes away that of q, and is told the step."""
    sums, grads = gradient(params, batch)
    return sums, grads | {"q": grads["q"] * 0 * step}


@pytest.mark.parametrize("parts", [1, 2])
def test_the_gradient_of_a_config(parts):
    """One that changes nothing is the plain step bit for bit; one of q's leaves q where it is."""
    config = train.Config(model=replace(TINY, rows=loud), optimizer=plain_descent)
    phase, found = train.Phase(accumulate=parts), []
    for change in (None, unchanged, without_q):
        step, state = step_of(replace(config, gradient=change), phase)
        found.append(step(state))
    (plain, _), (same, metrics), (held, fewer) = found
    same_bits(plain, same)
    same_bits(held.params["q"], state.params["q"])
    assert not np.array_equal(held.params["k"], state.params["k"])
    assert float(fewer["matrix/grad_norm"]) < float(metrics["matrix/grad_norm"])


# ------------------------------------------------------------------------------------------ the optimiser


def by_rate(table):
    """An `optimizer` that keeps the rate that it is told, and the parameters' sum."""
    def init(params):
        return {"rate": jnp.zeros(()), "sum": jnp.zeros(())}

    def update(grads, state, params, *, rate, **extra):
        return grads, {"rate": rate * 1.0, "sum": sum(jnp.sum(x) for x in params.values())}

    transform = optax.GradientTransformationExtraArgs(init, update)
    return {group: transform for group in {p.group for p in table.values()}}


def test_the_optimiser_is_told_the_rate():
    step, state = step_of(train.Config(model=TINY, optimizer=by_rate))
    after, _ = step(state)
    for group, names in model.groups(TINY).items():
        assert float(after.opt[group]["rate"]) == np.float32(1e-2)
        total = sum(float(jnp.sum(state.params[name])) for name in names)
        assert float(after.opt[group]["sum"]) == pytest.approx(total, rel=1e-3, abs=1e-2)


def projected(table, rank: int = 3):
    """An `optimizer` as GaLore's: moments by the parameters' names, in other shapes."""
    def init(params):
        small = {name: jnp.zeros((*x.shape[:-1], rank)) for name, x in params.items()}
        return {"small": small, "like": jax.tree.map(jnp.zeros_like, params)}

    def update(grads, state, params=None):
        return grads, state

    transform = optax.GradientTransformation(init, update)
    return {group: transform for group in {p.group for p in table.values()}}


def test_state_with_the_parameters_names_but_other_shapes_is_no_mirror_of_them():
    """It is whole on each device and is not mapped; what is shaped like the parameters is both."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    state = first_state(TINY, projected, mesh, jax.random.key(0))
    assert not any(x.sharding.spec for x in jax.tree.leaves(state.opt["matrix"]["small"]))
    assert tuple(state.opt["matrix"]["like"]["gate"].sharding.spec) == (None, "fsdp", "tensor")
    rows = {name: model.table(TINY)[name] for name in model.groups(TINY)["matrix"]}
    ones = partial(jax.tree.map, lambda x: x + 1)
    mapped = map_like_params(state.opt["matrix"], rows, lambda tree, _: ones(tree))
    assert all(float(jnp.max(x)) == 1 for x in jax.tree.leaves(mapped["like"]))
    assert all(float(jnp.max(x)) == 0 for x in jax.tree.leaves(mapped["small"]))
    batch = put(BATCH, mesh)
    lr = {group: np.float32(1e-2) for group in model.groups(TINY)}
    config = train.Config(model=TINY, optimizer=projected)
    compiled = train.compile_step(config, TINY, mesh, state, batch, lr, CAUSAL)
    after, _ = compiled(state, batch, lr)
    assert isinstance(after, State)
    assert after.opt["matrix"]["small"]["q"].sharding.is_fully_replicated


def test_this_file_s_functions_are_known_by_name():
    """A config that has them is the same after config.json, and equal to itself made again."""
    shape = replace(TINY, rows=partial(with_adapter, rank=2), flops=dearer)
    written = json.loads(json.dumps(to_json(shape)))
    assert written["rows"]["function"].endswith(f"{Path(__file__).name}:with_adapter")
    assert from_json(ModelConfig, written) == from_json(ModelConfig, written)


def merged_again(model, context):
    """A repeated edit that changes nothing, as one that merges adapters."""
    return Edited(model, {}, preserves=True)


def drawn_again(model, context):
    """A repeated edit that forgets."""
    return Edited(model, {}, preserves=False)


@pytest.mark.parametrize("edit,forgets,resets", [(merged_again, False, []), (drawn_again, True, [2])])
def test_only_an_edit_that_forgets_counts_as_a_reset(tiny, edit, forgets, resets):
    phase = train.Phase(steps=4, repeat=(train.Edit(edit, every=2, forgets=forgets),))
    plan = course_of(train.Config(model=tiny, phases=(phase,)), context())
    assert plan.edits == {2: [edit]}
    assert plan.resets.tolist() == resets
