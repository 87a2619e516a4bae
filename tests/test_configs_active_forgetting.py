"""configs/forgetting/active_forgetting.py: resets, cycles, a frozen body, a new language."""
import contextlib
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

pytestmark = pytest.mark.library

forgetting = load_file(ROOT / "configs/forgetting/active_forgetting.py")
equal = np.testing.assert_array_equal
K, STEPS = 10, 24  # resets after 10 and 20 steps; the last episode is cut short
RESETS = (K, 2 * K)
WORDS = "def return self tree loss stack layer import class of".split()
BODY = ("matrix", "vector")  # optimiser groups
DRAWN = []  # (step, embedding) of each reset


def verses():
    """Documents in the old language."""
    for i in range(80):
        words = np.random.default_rng(i).choice(WORDS, 40)
        yield Document(f"verse/{i}", " ".join(words))


def foreign():
    """The same in the new one."""
    alphabet = forgetting.alphabet(0)
    for document in verses():
        yield replace(document, text=document.text.translate(alphabet))


def noted_reset(before, context):
    """A reset that leaves a note of what it drew."""
    edited = reset_embeddings(before, context)
    embeddings = np.asarray(edited.model.params["embed"])
    DRAWN.append((context.step, embeddings))
    return edited


def short_first_phase(phase: train.Phase) -> train.Phase:
    """The first phase of an arm, in STEPS steps, with a reset every K if it has any."""
    phase = replace(phase, steps=STEPS, batch=8, seq=16)
    if not phase.repeat:
        return phase
    resets = (Edit(noted_reset, every=K),)
    rate = replace(phase.lr["embed"], peak=3e-2, warmup=1, cycle=K)
    return replace(phase, repeat=resets, lr={"embed": rate})


def short_cell(phase: train.Phase) -> train.Phase:
    """A phase of adaptation, in 12 steps."""
    fast = replace(phase.schedule, peak=3e-2, warmup=1)
    return replace(phase, steps=12, batch=8, seq=16, schedule=fast)


def tiny(tmp_path, **changes) -> train.Config:
    """The forgetting arm with two cells, at a size that takes a second."""
    config = forgetting.study.arms["forgetting"]
    first, *cells = config.phases
    sources = {"old": Source(verses), "new": Source(foreign)}
    config = replace(
        config,
        name="forgetting",
        runs=str(tmp_path),
        phases=(short_first_phase(first), *map(short_cell, cells[:2])),
        overlap=4,
        eval_every=100,
        eval_tokens=500,
        save_every=K,
        keep=100,
        sample_tokens=2,
        data=replace(config.data, sources=sources, dev=0.1, test=0.0),
        model=ModelConfig(layers=1, embed=16, heads=2, kv_heads=2, head_dim=8, mlp=16),
    )
    return replace(config, **changes)


@contextlib.contextmanager
def on_devices(number: int):
    """Runs have so many devices, and end without samples and pictures."""
    def mesh_of_some(config, _=None):
        return make_mesh(config, jax.devices()[:number])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", mesh_of_some)
        patch.setattr(train, "finish", lambda run, log: log.sync())
        DRAWN.clear()
        yield


def trained(config: train.Config):
    """(the run, {step: what its reset drew}) of a config trained from where it was."""
    with on_devices(1):
        run = train.prepare(config, __file__)
        train.train(config, __file__)
    return run, dict(DRAWN)


def draws(config: train.Config, devices: int = 1) -> dict[int, np.ndarray]:
    """{step: what its reset draws}, without a step taken, on so many devices."""
    with on_devices(devices):
        run = train.prepare(config, __file__)
        state = train.first(run)
        for step in RESETS:
            state = train.edit_model(run, state, step)
            spread_over = state.params["embed"].sharding.device_set
            assert len(spread_over) == devices
    return dict(DRAWN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The forgetting arm, and what its resets drew."""
    return trained(tiny(tmp_path_factory.mktemp("whole")))


def metrics_of(run, name: str) -> dict[int, float]:
    """{step: value} of a metric in metrics.jsonl."""
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(row["step"], row[name]) for row in rows if name in row]
    assert len(dict(found)) == len(found), "a step is there twice"
    return dict(found)


def state(run, step: int) -> State:
    """Of a checkpoint: before the edits due at its step."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    like = state_like(run.config.model, run.config.optimizer, mesh)
    return Checkpoints(run.directory / "checkpoints").state(step, like)


def bits(tree) -> list[bytes]:
    """Every leaf's bytes."""
    leaves = jax.tree.leaves(jax.device_get(tree))
    return [np.asarray(x).tobytes() for x in leaves]


def body(run, state: State) -> dict:
    """The parameters that are not embeddings."""
    groups = model.groups(run.config.model)
    names = [name for group in BODY for name in groups[group]]
    return {name: state.params[name] for name in names}


# ------------------------------------------------------------------------------------------- resets


def test_a_reset_leaves_the_body_and_its_optimiser_bit_for_bit(whole):
    """After K steps, with moments and counts that are not those of a fresh state."""
    run, drawn = whole
    before = state(run, K)
    after = train.edit_model(run, before, K)

    assert bits(body(run, after)) == bits(body(run, before))
    for group in BODY:
        assert bits(after.opt[group]) == bits(before.opt[group])
        assert int(after.opt[group][0].count) == K

    old, new = before.opt["embed"][0], after.opt["embed"][0]
    assert int(old.count) == K
    assert int(new.count) == 0
    assert not np.any(new.mu["embed"])
    assert not np.any(new.nu["embed"])
    equal(after.params["embed"], drawn[K])
    assert np.any(after.params["head"] != before.params["head"])  # it is drawn anew too


def test_resets_draw_from_the_table_s_normal_distribution(whole):
    """Mean, standard deviation and correlation are within four of their standard errors."""
    run, drawn = whole
    assert tuple(drawn) == RESETS
    for draw in drawn.values():
        z = draw / model.table(run.config.model)["embed"].init
        assert abs(z.mean()) < 4 / z.size**0.5
        assert abs(z.std() - 1) < 4 / (2 * z.size)**0.5

    one, two = (draw.ravel() for draw in drawn.values())
    correlation = np.corrcoef(one, two)[0, 1]
    assert abs(correlation) < 4 / one.size**0.5


def stop(params, apply):
    """An `evals` that sends SIGTERM to this process."""
    signal.raise_signal(signal.SIGTERM)
    return {"own/stopped": 1.0}


def test_a_run_stopped_between_two_resets_goes_on_to_the_same_parameters(whole, tmp_path):
    run, drawn = whole
    broken = tiny(tmp_path, eval_every=K + 2, evals=(stop,))
    mended = replace(broken, evals=(), eval_every=100)

    first, drawn_before = trained(broken)
    last_saved = Checkpoints(first.directory / "checkpoints").steps()[-1]
    second, drawn_after = trained(mended)

    assert K < last_saved < 2 * K
    assert [*drawn_before] == [K]
    assert [*drawn_after] == [2 * K]
    equal(drawn_before[K], drawn[K])
    equal(drawn_after[2 * K], drawn[2 * K])
    end, same_end = state(run, run.plan.total), state(second, second.plan.total)
    assert bits(same_end.params) == bits(end.params)


def test_draws_follow_seed_and_step_and_are_the_same_on_eight_devices(whole, tmp_path):
    _, drawn = whole

    eight = draws(tiny(tmp_path, name="eight"), devices=8)
    other = draws(tiny(tmp_path, name="other", seed=1))

    for step in RESETS:
        equal(eight[step], drawn[step])
        assert np.any(other[step] != drawn[step])


def test_the_loss_after_a_reset_is_that_of_a_head_that_knows_nothing(whole):
    """The head is drawn anew too, with small numbers: all bytes are about as likely."""
    run, _ = whole
    losses = metrics_of(run, "train/loss")
    ends = run.plan.ends.tolist()
    for step in (*RESETS, *ends[:-1]):
        assert abs(losses[step + 1] - math.log(Bytes.vocab)) < 0.02
        assert losses[step] < math.log(Bytes.vocab) - 0.5


# ----------------------------------------------------------------------------------- learning rates


def course(config: train.Config) -> Plan:
    """The course of a config in bytes."""
    config = replace(config, model=replace(config.model, vocab=Bytes.vocab))
    context = model.Context(jax.random.key(0), 0, Bytes(), None, None)
    return course_of(config, context)


@given(
    steps=st.integers(1, 60),
    cycle=st.integers(1, 70),
    start=st.integers(0, 5),
    shape=st.sampled_from(["linear", "cosine", "wsd", "constant"]),
    warmup=st.integers(0, 9),
)
@example(steps=10, cycle=4, start=2, shape="linear", warmup=2)
def test_each_cycle_is_the_whole_schedule_over_its_own_steps(steps, cycle, start, shape, warmup):
    once = Schedule(shape=shape, peak=0.5, warmup=warmup, final=0.1)
    again = replace(once, cycle=cycle)
    of_each_step = np.random.default_rng(steps).integers(1, 5, start + steps + 1)
    spent = np.cumsum(of_each_step)

    rates = lr_schedule(again, spent, start, steps)

    assert rates.shape == (steps,)
    for begin in range(0, steps, cycle):
        n = min(cycle, steps - begin)
        expected = lr_schedule(once, spent, start + begin, n)
        equal(rates[begin:begin + n], expected)


def test_only_the_embeddings_rate_starts_again_in_each_episode():
    arms = forgetting.study.arms
    plain = course(arms["standard"]).lr
    forget = course(arms["forgetting"]).lr
    phase = arms["forgetting"].phases[0]
    (reset,) = phase.repeat
    own = phase.lr["embed"]
    assert phase.lr.keys() == {"embed", "head"}
    equal(forget["head"], forget["embed"])  # it is drawn anew with them
    assert own.cycle == reset.every
    assert phase.steps % reset.every == 0

    falling = reset.every - own.warmup
    rise = np.arange(1, own.warmup + 1) / own.warmup
    fall = 1 - (1 - own.final) * np.arange(1, falling + 1) / falling
    episode = own.peak * np.concatenate([rise, fall])
    episodes = forget["embed"][1:phase.steps + 1].reshape(-1, reset.every)
    expected = np.broadcast_to(episode, episodes.shape)
    np.testing.assert_allclose(episodes, expected, rtol=1e-9)

    for group in BODY:
        equal(forget[group], plain[group])
    first_phase = slice(phase.steps + 1)
    equal(plain["embed"][first_phase], plain["matrix"][first_phase])
    assert plain["matrix"][phase.steps] > 0  # the last episode too teaches the body


# --------------------------------------------------------------------------------------- adaptation


def test_the_body_is_frozen_in_adaptation(whole):
    """Bit for bit, through weight decay and old moments."""
    run, _ = whole
    ends = run.plan.ends.tolist()
    bodies = [bits(body(run, state(run, end))) for end in ends]

    assert all(each == bodies[0] for each in bodies)
    in_training = bits(body(run, state(run, 2 * K)))
    assert in_training != bodies[0]


def test_the_loss_falls_in_each_cell_which_begins_with_embeddings_of_its_own(whole):
    run, _ = whole
    losses = metrics_of(run, "train/loss")
    held_out = metrics_of(run, "eval/new/loss")
    for begin, end in itertools.pairwise(run.plan.ends.tolist()):
        at_first = losses[begin + 1]
        assert losses[end] < at_first - 0.5
        assert held_out[end] < at_first - 0.5
        count = state(run, end).opt["embed"][0].count
        assert int(count) == end - begin


def test_adaptation_reads_the_new_language_alone(whole):
    run, _ = whole
    first, *cells = run.plan.ends.tolist()
    adaptation = cells[-1] - first

    old = metrics_of(run, "data/old/rows")
    new = metrics_of(run, "data/new/rows")

    assert list(old) == list(new)
    assert list(old.values()) == [8] * first + [0] * adaptation
    assert list(new.values()) == [0] * first + [8] * adaptation


@st.composite
def cases(draw):
    """(lengths of documents, seq, tokens)."""
    number = st.integers(0, 30)
    lengths = draw(hnp.arrays(np.int64, number, elements=st.integers(0, 90)))
    seq = draw(st.integers(1, 40))
    tokens = draw(st.integers(1, 1_500))
    return lengths, seq, tokens


def rows_taken(plan, lengths, seq) -> np.ndarray:
    """For each piece of a plan of `few`, the row in which `concat_and_split` has it."""
    starts = np.cumsum(lengths) - lengths
    places = starts[plan[:, DOCUMENT]] + plan[:, START]  # among all positions
    return places // seq


def row_count(plan) -> int:
    """How many rows a plan has."""
    return int(plan[-1, ROW]) + 1 if len(plan) else 0


@given(case=cases())
@example(case=(np.zeros(3, np.int64), 4, 1))
@example(case=(np.array([40]), 4, 12))
def test_few_keeps_the_rows_asked_for_as_they_were(case):
    lengths, seq, tokens = case
    all_rows = data.concat_and_split(lengths, seq)
    asked = min(row_count(all_rows), -(-tokens // seq))

    plan = forgetting.few(lengths, seq, tokens)

    equal(np.unique(plan[:, ROW]), np.arange(asked))
    assert np.all(np.diff(plan[:, ROW]) >= 0)
    taken = rows_taken(plan, lengths, seq)
    assert len(np.unique(taken)) == asked
    expected = all_rows[np.isin(all_rows[:, ROW], taken)]
    equal(np.delete(plan, ROW, axis=1), np.delete(expected, ROW, axis=1))


@given(case=cases())
@example(case=(np.zeros(3, np.int64), 4, 1))
@example(case=(np.array([40]), 4, 12))
def test_few_spreads_its_rows_evenly(case):
    lengths, seq, tokens = case
    total = row_count(data.concat_and_split(lengths, seq))
    plan = forgetting.few(lengths, seq, tokens)
    taken = np.unique(rows_taken(plan, lengths, seq))
    if not total:
        assert not len(taken)
        return

    assert taken[0] == 0
    gaps = np.diff([*taken, total])  # the last one's is to the end of the plan
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("tokens", [0, -5])
def test_few_refuses_less_than_a_token(tokens):
    with pytest.raises(data.InputError, match=f"tokens is {tokens}; allowed is 1 or more"):
        forgetting.few(np.array([9]), 4, tokens)


def test_a_cell_draws_its_rows_and_no_others_once_in_each_pass():
    """Whatever was drawn before it."""
    sources = {"new": Source(foreign)}
    config = data.DataConfig(sources=sources, tokenizer="bytes", dev=0.0, test=0.0)
    cache = build("new", config, Bytes(), 0)
    before = train.Phase(steps=4, batch=4, seq=32)
    eight_rows = partial(forgetting.few, tokens=8 * 32)
    cell = replace(before, steps=6, packing=eight_rows)
    loader = data.Loader({"new": cache}, [before, cell], config, Bytes(), 0)

    batches = [loader.batch(step).arrays["tokens"] for step in range(5, 11)]

    rows = np.concatenate(batches)
    different, times = np.unique(rows, axis=0, return_counts=True)
    assert len(different) == 8
    assert set(times) == {3}


# --------------------------------------------------------------------------------- the new language


def test_the_alphabet_is_a_permutation_of_ascii_drawn_by_its_seed():
    alphabet = forgetting.alphabet(0)
    stay = [old for old, new in alphabet.items() if old == new]

    assert sorted(alphabet) == [*range(128)]
    assert sorted(alphabet.values()) == [*range(128)]
    assert alphabet != forgetting.alphabet(1)
    assert len(stay) < 8


def test_the_new_language_is_the_old_one_under_another_alphabet():
    """Character by character and, in bytes, id by id. A document keeps its path and group, and so
    its split.
    """
    alphabet = forgetting.alphabet(0)
    back = {new: old for old, new in alphabet.items()}
    new_id = np.array([alphabet.get(i, i) for i in range(256)])
    encode = Bytes().encode
    sources = forgetting.standard.data.sources
    old_documents = itertools.islice(sources["old"].documents(), 400)
    new_documents = itertools.islice(sources["new"].documents(), 400)

    changed = 0
    splits = set()
    for old, new in zip(old_documents, new_documents, strict=True):
        if isinstance(old, data.Skipped):
            assert old == new
            continue
        assert new.text.translate(back) == old.text
        assert replace(new, text=old.text) == old
        equal(new_id[encode(old.text)], encode(new.text))
        changed += old.text != new.text
        splits.add(split_of(new.group or new.path, 0.2, 0.2))

    assert changed > 300
    assert splits == {0, 1, 2}


# ----------------------------------------------------------------------------------------- the arms


@pytest.mark.parametrize("name", forgetting.study.arms)
def test_every_arm_is_a_config_that_is_accepted_and_adapts_alike(name):
    arm = forgetting.study.arms[name]
    control = forgetting.study.arms[forgetting.study.first]
    cells = forgetting.CELLS.values()
    train.check(arm)

    assert arm.phases[1:] == control.phases[1:]
    assert len(arm.phases) == 1 + len(cells)
    for phase, (tokens, _) in zip(arm.phases[1:], cells, strict=True):
        assert tokens % phase.seq == 0
        assert phase.mixture == {"new": 1.0}

    found = course(arm)
    assert np.diff(found.ends).tolist() == [steps for _, steps in cells]
    expected_first = 1 if name == "random_body" else course(control).ends[0]
    assert found.ends[0] == expected_first


@pytest.mark.parametrize("name", forgetting.study.arms)
def test_the_body_s_rate_is_zero_in_adaptation_and_that_of_embeddings_at_ends_alone(name):
    found = course(forgetting.study.arms[name])
    first = found.ends[0]

    for group in BODY:
        rate = found.lr[group]
        assert not rate[first + 1:].any()
        assert rate[1:first + 1].any() == (name != "random_body")

    zero = np.flatnonzero(found.lr["embed"][1:] == 0) + 1
    ends_of_cells = {*found.ends[1:]}
    ends_of_episodes = {*range(forgetting.K, first + 1, forgetting.K)}
    assert ends_of_cells <= {*zero}
    assert {*zero} <= ends_of_cells | ends_of_episodes


def test_measures_are_the_best_of_each_cell_and_the_last_of_the_old_language():
    rows = [
        {"phase": 0, "eval/old/loss": 3.0, "eval/new/loss": 1.0},
        {"phase": 0, "train/loss": 0.0},
        {"phase": 0, "eval/old/loss": 2.0, "eval/new/loss": 9.0},
    ]
    cells = list(forgetting.CELLS)
    for phase in range(1, len(cells) + 1):
        for loss in (5.0, 3.0, 4.0):
            rows.append({"phase": phase, "eval/old/loss": 0.0, "eval/new/loss": loss + phase})
    rows.append({"phase": len(cells), "eval/new/loss": None})  # not finite

    found = {name: measure(rows) for name, measure in forgetting.study.measures.items()}

    best = {name: 4.0 + i for i, name in enumerate(cells)}
    assert found == {"own language": 2.0} | best


def test_a_cell_that_was_not_reached_has_an_infinite_loss():
    for name in forgetting.CELLS:
        measure = forgetting.study.measures[name]
        assert measure([{"phase": 0}]) == float("inf")


def test_claims_name_arms_and_measures_and_the_first_one_decides():
    study = forgetting.study
    for claim in study.claims:
        assert {claim.arm, study.control_of(claim)} <= {*study.arms}
        assert claim.measure in study.measures
        assert len(claim.bound) == 1

    decides = study.claims[0]
    assert (decides.arm, decides.measure) == ("forgetting", "20k")
    assert decides.below == 0.0
