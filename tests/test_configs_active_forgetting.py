"""configs/forgetting/active_forgetting.py: resets, cycles, a frozen body, a new language."""
import itertools
import json
import math
import signal
from dataclasses import replace
from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from conftest import course_of
from hypothesis import example, given
from hypothesis import strategies as st

import data
import model
import train
from data import Document, Source
from lib.cache import build
from lib.checkpoint import Checkpoints
from lib.config import ROOT, load_file
from lib.edits import reset_embeddings
from lib.optim import State, state_like
from lib.packing import DOCUMENT, ROW, START
from lib.schedule import Plan, Schedule, lr_schedule
from lib.sharding import MeshConfig, make_mesh
from lib.sources import split_of
from lib.tokenizers import Bytes
from model import ModelConfig
from train import Edit

forgetting = load_file(ROOT / "configs/forgetting/active_forgetting.py")
equal = np.testing.assert_array_equal
K, STEPS = 10, 24  # resets after 10 and 20 steps; the last episode is cut short
WORDS = "def return self tree loss stack layer import class of".split()
DRAWN = []  # (step, embedding) of each reset


def verses():
    """Documents in the old language."""
    for i in range(80):
        yield Document(f"verse/{i}", " ".join(np.random.default_rng(i).choice(WORDS, 40)))


def foreign():
    """The same in the new one."""
    for document in verses():
        yield replace(document, text=document.text.translate(forgetting.alphabet(0)))


def watched(edited, context):
    """A reset that leaves a note of what it drew."""
    out = reset_embeddings(edited, context)
    DRAWN.append((context.step, np.asarray(out.model.params["embed"])))
    return out


def tiny(tmp_path, arm: str = "forgetting", **changes) -> train.Config:
    """An arm of the file at a size that takes a second."""
    config, cycle = forgetting.study.arms[arm], {}
    first, *cells = config.phases
    small = dict(batch=8, seq=16)
    if first.repeat:
        cycle = dict(repeat=(Edit(watched, every=K),),
                     lr={"embed": replace(first.lr["embed"], peak=3e-2, warmup=1, cycle=K)})
    first = replace(first, steps=STEPS, **small, **cycle)
    fast = replace(cells[0].schedule, peak=3e-2, warmup=1)
    cells = (replace(p, steps=12, **small, schedule=fast) for p in cells[:2])
    sources = {"old": Source(verses), "new": Source(foreign)}
    config = replace(
        config, name=arm, runs=str(tmp_path), phases=(first, *cells), overlap=4, eval_every=100,
        eval_tokens=500, save_every=K, keep=100, sample_tokens=2,
        data=replace(config.data, sources=sources, dev=0.1, test=0.0),
        model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16))
    return replace(config, **changes)


def trained(config: train.Config, devices: int = 1, resets: tuple[int, ...] = ()):
    """(its run, {step: what its reset drew}) of a config trained from where it was, on so many devices.

    resets: take no step, and apply what is due after these to the state that there is.
    """
    whole = make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", lambda mesh, _=None: whole(mesh, jax.devices()[:devices]))
        patch.setattr(train, "finish", lambda run, log: log.sync())  # no samples, no pictures
        DRAWN.clear()
        run = train.prepare(config, __file__)
        if not resets:
            train.train(config, __file__)
        state = train.first(run)
        for step in resets:
            state = train.edit_model(run, state, step)
            if devices > 1:
                assert len(state.params["embed"].sharding.device_set) == devices
    return run, dict(DRAWN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The forgetting arm, and what its resets drew."""
    return trained(tiny(tmp_path_factory.mktemp("whole")))


def rows_of(run) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def state(run, step: int) -> State:
    """Of a checkpoint: before the edits due at its step."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    like = state_like(run.config.model, run.config.optimizer, mesh)
    return Checkpoints(run.directory / "checkpoints").state(step, like)


def bits(tree) -> list[bytes]:
    """Every leaf's bytes."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


BODY = ("matrix", "vector")


def body(run, params) -> dict:
    """The parameters that are not embeddings."""
    return {n: params[n] for group in BODY for n in model.groups(run.config.model)[group]}


# ----------------------------------------------------------------------------------------------------- resets


def test_a_reset_leaves_the_body_and_its_optimiser_bit_for_bit(whole):
    """What the run itself does after K steps, with moments and counts that are not those of a fresh state."""
    run, drawn = whole
    before = state(run, K)
    after = train.edit_model(run, before, K)
    assert bits(body(run, after.params)) == bits(body(run, before.params))
    for group in BODY:
        assert bits(after.opt[group]) == bits(before.opt[group]) and int(after.opt[group][0].count) == K
    embed = after.opt["embed"][0]
    assert int(before.opt["embed"][0].count) == K and int(embed.count) == 0
    assert not np.any(embed.mu["embed"]) and not np.any(embed.nu["embed"])
    equal(after.params["embed"], drawn[K])
    assert "head" not in after.params  # tied: the new table is the head


def test_resets_draw_from_the_table_s_normal_distribution(whole):
    """Mean and standard deviation within four of their standard errors; each reset and seed another draw."""
    run, drawn = whole
    assert [*drawn] == [K, 2 * K]
    for draw in drawn.values():
        z = draw / run.config.model.embed**-0.5
        assert abs(z.mean()) < 4 / z.size**0.5 and abs(z.std() - 1) < 4 / (2 * z.size)**0.5
    one, two = drawn.values()
    assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 4 / one.size**0.5


def stop(params, apply):
    """An `evals` that sends SIGTERM to this process."""
    signal.raise_signal(signal.SIGTERM)
    return {"own/stopped": 1.0}


def test_draws_follow_seed_and_step_through_a_stop_and_on_eight_devices(whole, tmp_path):
    """A run stopped between two resets goes on to the same parameters; eight devices draw what one does."""
    run, drawn = whole
    broken = tiny(tmp_path, eval_every=K + 2, evals=(stop,))
    first, begun = trained(broken)
    assert K < Checkpoints(first.directory / "checkpoints").steps()[-1] < 2 * K
    second, rest = trained(replace(broken, evals=(), eval_every=100))
    assert [*begun] == [K] and [*rest] == [2 * K]
    equal(begun[K], drawn[K])
    equal(rest[2 * K], drawn[2 * K])
    assert bits(state(second, second.plan.total).params) == bits(state(run, run.plan.total).params)
    _, eight = trained(tiny(tmp_path, name="eight"), devices=8, resets=(K, 2 * K))
    _, other = trained(tiny(tmp_path, name="other", seed=1), resets=(K, 2 * K))
    for step in (K, 2 * K):
        equal(eight[step], drawn[step])
        assert np.any(other[step] != drawn[step])


def test_the_loss_after_a_reset_is_that_of_a_head_that_knows_nothing(whole):
    """The tied head went along. A draw that the body does not know has normal logits of variance mean(gain²),
    as rows of the table have norm 1 and normalised states sqrt(embed); the loss is ln V and half of that.
    """
    run, _ = whole
    losses = {r["step"]: r["train/loss"] for r in rows_of(run) if "train/loss" in r}
    for step in (K, 2 * K, *run.plan.ends.tolist()[:-1]):
        gain = np.asarray(state(run, step).params["norm"])
        expected = math.log(Bytes.vocab) + np.mean(gain**2) / 2
        assert abs(losses[step + 1] - expected) < 0.3 and losses[step] < expected - 0.5


# -------------------------------------------------------------------------------------------- learning rates


def course(config: train.Config) -> Plan:
    """The course of a config in bytes."""
    config = replace(config, model=replace(config.model, vocab=Bytes.vocab))
    return course_of(config, model.Context(jax.random.key(0), 0, Bytes(), None, None))


@given(steps=st.integers(1, 60), cycle=st.integers(1, 70), start=st.integers(0, 5),
       shape=st.sampled_from(["linear", "cosine", "wsd", "constant"]), warmup=st.integers(0, 9))
@example(steps=10, cycle=4, start=2, shape="linear", warmup=2)
def test_each_cycle_is_the_whole_schedule_over_its_own_steps(steps, cycle, start, shape, warmup):
    schedule = Schedule(shape=shape, peak=0.5, warmup=warmup, final=0.1, cycle=cycle)
    spent = np.cumsum(np.random.default_rng(steps).integers(1, 5, start + steps + 1))
    rates = lr_schedule(schedule, spent, start, steps)
    assert rates.shape == (steps,)
    for begin in range(0, steps, cycle):
        n = min(cycle, steps - begin)
        once = lr_schedule(replace(schedule, cycle=0), spent, start + begin, n)
        equal(rates[begin:begin + n], once)


def test_only_the_embeddings_rate_starts_again_in_each_episode():
    plain, forget = (course(forgetting.study.arms[arm]).lr for arm in ("standard", "forgetting"))
    phase = forgetting.study.arms["forgetting"].phases[0]
    (reset,), own = phase.repeat, phase.lr["embed"]
    assert own.cycle == reset.every and phase.steps % reset.every == 0
    episodes = forget["embed"][1:phase.steps + 1].reshape(-1, reset.every)
    rise, fall = np.arange(1, own.warmup + 1), np.arange(1, reset.every - own.warmup + 1)
    line = np.r_[rise / own.warmup, 1 - (1 - own.final) * fall / fall[-1]]
    np.testing.assert_allclose(episodes, own.peak * np.broadcast_to(line, episodes.shape), rtol=1e-9)
    for group in BODY:
        equal(forget[group], plain[group])
    equal(plain["embed"][:phase.steps + 1], plain["matrix"][:phase.steps + 1])
    assert plain["matrix"][phase.steps] > 0  # the last episode too teaches the body


# ------------------------------------------------------------------------------------------------ adaptation


def test_the_body_is_frozen_in_adaptation_and_the_loss_falls(whole):
    """Bit for bit, through weight decay and old moments; every cell begins with embeddings of its own."""
    run, _ = whole
    ends = run.plan.ends.tolist()
    states = [state(run, s) for s in ends]
    assert len({tuple(bits(body(run, s.params))) for s in states}) == 1
    assert bits(body(run, states[0].params)) != bits(body(run, state(run, 2 * K).params))
    losses = {r["step"]: r["train/loss"] for r in rows_of(run) if "train/loss" in r}
    held = {r["step"]: r["eval/new/loss"] for r in rows_of(run) if "eval/new/loss" in r}
    for begin, end in itertools.pairwise(ends):
        assert losses[end] < losses[begin + 1] - 0.5 and held[end] < losses[begin + 1] - 0.5
        assert int(state(run, end).opt["embed"][0].count) == end - begin


def test_adaptation_reads_the_new_language_alone(whole):
    run, _ = whole
    first, *cells = run.plan.ends.tolist()
    rows = [r for r in rows_of(run) if "data/new/rows" in r]
    assert [(r["data/old/rows"], r["data/new/rows"]) for r in rows] == [(8, 0)] * first + [(0, 8)] * (
        cells[-1] - first)


@st.composite
def cases(draw):
    """(lengths of documents, seq, tokens)."""
    lengths = draw(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(0, 90)))
    return lengths, draw(st.integers(1, 40)), draw(st.integers(1, 1_500))


@given(case=cases())
@example(case=(np.zeros(3, np.int64), 4, 1))
@example(case=(np.array([40]), 4, 12))
def test_few_keeps_the_rows_asked_for_evenly_spread_and_as_they_were(case):
    lengths, seq, tokens = case
    all_rows = data.concat_and_split(lengths, seq)
    total = int(all_rows[-1, ROW]) + 1 if len(all_rows) else 0
    plan = forgetting.few(lengths, seq, tokens)
    asked = min(total, -(-tokens // seq))
    equal(np.unique(plan[:, ROW]), np.arange(asked))
    places = (np.cumsum(lengths) - lengths)[plan[:, DOCUMENT]] + plan[:, START]  # among all positions
    was = places // seq
    equal(np.delete(all_rows[np.isin(all_rows[:, ROW], was)], ROW, axis=1), np.delete(plan, ROW, axis=1))
    kept = np.unique(was)
    assert len(kept) == asked and np.all(np.diff(plan[:, ROW]) >= 0)
    if asked:
        gaps = np.diff(np.append(kept, kept[0] + total))  # the last one's is to the end of the plan
        assert kept[0] == 0 and gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("tokens", [0, -5])
def test_few_refuses_less_than_a_token(tokens):
    with pytest.raises(data.InputError, match=f"tokens is {tokens}; allowed is 1 or more"):
        forgetting.few(np.array([9]), 4, tokens)


def test_a_cell_draws_its_rows_over_and_over():
    """And no others, whatever was drawn before it: all of them, once in each pass."""
    sources = {"new": Source(foreign)}
    config = data.DataConfig(sources=sources, tokenizer="bytes", dev=0.0, test=0.0)
    cache = build("new", config, Bytes(), 0)
    phases = [train.Phase(steps=4, batch=4, seq=32), train.Phase(
        steps=6, batch=4, seq=32, packing=partial(forgetting.few, tokens=8 * 32))]
    loader = data.Loader({"new": cache}, phases, config, Bytes(), 0)
    rows = np.concatenate([loader.batch(s).arrays["tokens"] for s in range(5, 11)])
    seen, times = np.unique(rows, axis=0, return_counts=True)
    assert len(seen) == 8 and set(times) == {3}


# ------------------------------------------------------------------------------------------- the new language


def test_the_new_language_is_the_old_one_under_another_alphabet():
    """Character by character and, in bytes, id by id; a document keeps its path, group and so its split."""
    table = forgetting.alphabet(0)
    assert sorted(table) == sorted(table.values()) == [*range(128)] and table != forgetting.alphabet(1)
    assert sum(k == v for k, v in table.items()) < 8
    back, ids = {v: k for k, v in table.items()}, np.array([table.get(i, i) for i in range(256)])
    old, new = (itertools.islice(source.documents(), 400)
                for source in (forgetting.standard.data.sources[n] for n in ("old", "new")))
    seen = splits = 0
    for a, b in zip(old, new, strict=True):
        if isinstance(a, data.Skipped):
            assert a == b
            continue
        assert b.text.translate(back) == a.text and replace(b, text=a.text) == a
        encode = Bytes().encode
        equal(ids[encode(a.text)], encode(b.text))
        seen, splits = seen + (a.text != b.text), splits | 1 << split_of(b.group or b.path, 0.2, 0.2)
    assert seen > 300 and splits == 0b111


# -------------------------------------------------------------------------------------------------- the arms


@pytest.mark.parametrize("name", forgetting.study.arms)
def test_every_arm_is_a_config_that_is_accepted_and_adapts_alike(name):
    arm, control = forgetting.study.arms[name], forgetting.study.arms[forgetting.study.first]
    train.check(arm)
    found, cells = course(arm), len(forgetting.CELLS)
    assert arm.phases[1:] == control.phases[1:] and len(arm.phases) == 1 + cells
    assert np.diff(found.ends).tolist() == [steps for _, steps in forgetting.CELLS.values()]
    first = found.ends[0]
    for group in BODY:
        assert not found.lr[group][first + 1:].any()
        assert found.lr[group][1:first + 1].any() == (name != "random_body")
    zero = np.flatnonzero(found.lr["embed"][1:] == 0) + 1
    assert {*found.ends[1:]} <= {*zero} <= {*found.ends[1:], *range(forgetting.K, first + 1, forgetting.K)}
    assert first == (1 if name == "random_body" else course(control).ends[0])
    for phase, (tokens, _) in zip(arm.phases[1:], forgetting.CELLS.values(), strict=True):
        assert tokens % phase.seq == 0 and phase.mixture == {"new": 1.0}


def test_measures_are_the_best_of_each_cell_and_the_last_of_the_old_language():
    rows = [{"phase": 0, "eval/old/loss": 3.0, "eval/new/loss": 1.0}, {"phase": 0, "train/loss": 0.0},
            {"phase": 0, "eval/old/loss": 2.0, "eval/new/loss": 9.0}]
    for i in range(len(forgetting.CELLS)):
        rows += [{"phase": i + 1, "eval/old/loss": 0.0, "eval/new/loss": v + i} for v in (6.0, 4.0, 5.0)]
    rows.append({"phase": len(forgetting.CELLS), "eval/new/loss": None})  # not finite
    found = {name: measure(rows) for name, measure in forgetting.study.measures.items()}
    assert found == {"own language": 2.0} | {n: 4.0 + i for i, n in enumerate(forgetting.CELLS)}
    assert forgetting.study.tuned_by in forgetting.CELLS
    assert forgetting.study.measures[forgetting.study.tuned_by]([{"phase": 0}]) == float("inf")


def test_claims_name_arms_and_measures_and_the_first_one_decides():
    for claim in forgetting.study.claims:
        assert {claim.arm, forgetting.study.control_of(claim)} <= {*forgetting.study.arms}
        assert claim.measure in forgetting.study.measures and len(claim.bound) == 1
    decides = forgetting.study.claims[0]
    assert (decides.arm, decides.measure, decides.below) == ("forgetting", "20k", 0.0)
