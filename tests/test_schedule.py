"""lib/schedule.py: rates over a budget, its FLOPs, the steps after which edits are due."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from train_cases import TINY, plan_of, short_phase, silence, tiny_config

from data import InputError
from lib.edits import reset_embeddings, stack
from lib.schedule import Plan, Schedule, lr_schedule
from train import Edit, Phase

equal = np.testing.assert_array_equal
close = partial(np.testing.assert_allclose, rtol=1e-9)
close_to_rounding = partial(np.testing.assert_allclose, rtol=1e-12)


def plan_with(*phases: Phase, **changes) -> Plan:
    """The plan of a tiny run of these phases."""
    return plan_of(tiny_config(phases=phases, **changes))


# -------------------------------------------------------------------------------------------- rates


def rates_of(group: str, **schedule) -> np.ndarray:
    """The rates of a group in a run of one phase of 40 steps."""
    plan = plan_with(short_phase(40), schedule=Schedule(**schedule))
    return plan.lr[group]


def test_the_warm_up_is_linear_and_ends_at_the_peak():
    """Rate s is s/warmup of the peak, as the steps cost the same."""
    rates = rates_of("matrix", shape="constant", peak=0.5, warmup=10)
    shares = np.arange(1, 11) / 10
    close_to_rounding(rates[1:11], 0.5 * shares)
    close_to_rounding(rates[10:], 0.5)


def test_without_a_warm_up_the_first_rate_is_the_peak():
    rates = rates_of("matrix", shape="constant", peak=0.5, warmup=0)
    equal(rates[1:], 0.5)


def test_a_linear_schedule_falls_from_the_end_of_the_warm_up():
    schedule = Schedule(shape="linear", peak=2.0, warmup=20, final=0.5)
    rates = lr_schedule(schedule, np.arange(101.0), 0, 100)
    assert rates[19] == 2
    assert rates[59] == 1.5
    assert rates[99] == 1
    falls = np.diff(rates[19:])
    assert np.allclose(falls, -1 / 80)


FALLS = [
    ("linear", 0.25),
    ("sqrt", 0.5),
]


@pytest.mark.parametrize("fall, fallen", FALLS)
def test_a_wsd_schedule_falls_over_its_last_share_by_a_line_or_a_square_root(fall, fallen):
    """A quarter through the decay, the rate has fallen by a quarter, or by the root of that."""
    schedule = Schedule(
        shape="wsd",
        peak=2.0,
        warmup=20,
        decay=0.4,
        fall=fall,
        final=0.0,
    )
    rates = lr_schedule(schedule, np.arange(101.0), 0, 100)
    equal(rates[19:60], 2)
    assert rates[69] == pytest.approx(2 * (1 - fallen))
    assert rates[99] == 0


def test_a_wsd_schedule_is_flat_and_then_falls_in_a_line_to_the_final_rate():
    wsd = dict(shape="wsd", peak=0.5, warmup=4, decay=0.25, final=0.2)
    rates = rates_of("embed", **wsd)
    close_to_rounding(rates[4:31], 0.5)
    through = np.arange(11) / 10
    close(rates[30:], 0.5 * (1 - 0.8 * through))
    assert rates[-1] == pytest.approx(0.1, rel=1e-9)


def test_a_cosine_schedule_falls_from_the_peak_to_the_final_rate():
    cosine = dict(shape="cosine", peak=0.5, warmup=4, final=0.2)
    rates = rates_of("vector", **cosine)
    through = np.arange(37) / 36
    wave = 0.5 * (1 + np.cos(np.pi * through))
    close(rates[4:], 0.5 * (0.2 + 0.8 * wave))


def wsd_by_hand(schedule: Schedule, used: np.ndarray) -> np.ndarray:
    """The share of the peak at each consumed budget, written out again."""
    share = used / used[-1]
    into_decay = (share - 1 + schedule.decay) / schedule.decay
    falling = 1 - (1 - schedule.final) * into_decay
    return np.where(share > 1 - schedule.decay, falling, 1)


def cosine_by_hand(schedule: Schedule, used: np.ndarray) -> np.ndarray:
    """The share of the peak at each consumed budget, written out again."""
    warm = used[schedule.warmup - 1]
    through = (used - warm) / (used[-1] - warm)
    through = np.maximum(0, through)
    wave = (1 + np.cos(np.pi * through)) / 2
    return schedule.final + (1 - schedule.final) * wave


BY_HAND = {"wsd": wsd_by_hand, "cosine": cosine_by_hand}


@pytest.mark.parametrize("budget", ["flops", "tokens"])
@pytest.mark.parametrize("shape", ["wsd", "cosine"])
def test_a_rate_belongs_to_the_budget_of_its_own_row(shape, budget):
    """Across a stack and a longer sequence, it follows from what its row says is consumed."""
    schedule = Schedule(
        shape=shape,
        peak=1e-2,
        warmup=6,
        decay=0.4,
        final=0.05,
        budget=budget,
    )
    shallow = Phase(steps=25, batch=8, seq=16)
    deep = Phase(steps=25, batch=4, seq=64, edits=(stack,))
    plan = plan_with(shallow, deep, schedule=schedule)

    used = getattr(plan, budget)[1:].astype(float)
    costs = set(np.diff(used).round())
    assert len(costs) == 2
    warm = used[schedule.warmup - 1]
    rise = np.minimum(1, used / warm)
    shares = BY_HAND[shape](schedule, used)
    rates = plan.lr["matrix"][1:]
    close(rates, schedule.peak * rise * shares)


def test_a_run_that_grows_has_the_rates_of_a_deep_one_at_equal_shares_of_the_budget():
    """A cheaper first phase does not change the rate at which a run ends."""
    schedule = Schedule(
        shape="wsd",
        peak=1e-2,
        warmup=1,
        decay=0.5,
        final=0.1,
    )
    stacked = short_phase(60, edits=(stack,))
    grown = plan_with(short_phase(60), stacked, schedule=schedule)
    four_layers = replace(TINY, layers=4)
    deep = plan_with(short_phase(90), schedule=schedule, model=four_layers)

    grown_rates = grown.lr["matrix"]
    deep_rates = deep.lr["matrix"]
    assert grown_rates[-1] == pytest.approx(deep_rates[-1], rel=1e-9)
    assert grown_rates[-1] == pytest.approx(1e-3, rel=1e-9)
    grown_shares = grown.flops / grown.flops[-1]
    deep_shares = deep.flops / deep.flops[-1]
    expected = np.interp(grown_shares, deep_shares, deep_rates)
    close(expected[10:], grown_rates[10:], rtol=2e-3)


def test_a_phase_s_own_schedule_runs_over_the_budget_of_that_phase():
    """It warms up again and ends within the phase, and leaves the rates of the other alone."""
    own = Schedule(shape="cosine", peak=2e-2, warmup=5, final=0.5)
    phase = short_phase(20)
    with_own = replace(phase, schedule=own)
    rates = plan_with(phase, with_own).lr["matrix"]
    common = plan_with(phase, phase).lr["matrix"]
    shares = np.arange(1, 6) / 5
    close(rates[21:26], 2e-2 * shares)
    assert rates[40] == pytest.approx(1e-2, rel=1e-9)
    equal(rates[:21], common[:21])


def test_a_rate_of_an_unknown_group_is_refused():
    """The sentence names the field and the groups there are."""
    phase = Phase(lr={"matrx": 1.0})
    with pytest.raises(InputError, match=r"phases\.0\.lr.*matrx.*matrix"):
        plan_with(phase)


# ------------------------------------------------------------------------------------------ budgets


def flops_per_token(layers: int, seq: int) -> int:
    """6 (matmul parameters with the head) + 6 layers heads head_dim seq, by hand."""
    q_and_o = 2 * 32 * 4 * 8
    k_and_v = 2 * 32 * 2 * 8
    mlp = 3 * 32 * 48
    head = 258 * 32
    products = layers * (q_and_o + k_and_v + mlp) + head
    attention = layers * 4 * 8 * seq
    return 6 * products + 6 * attention


def test_flops_and_tokens_across_a_stack_are_as_counted_by_hand():
    shallow = Phase(steps=3, batch=8, seq=32)
    deep = Phase(steps=2, batch=4, seq=16, edits=(stack,))
    plan = plan_with(shallow, deep)

    before = flops_per_token(2, seq=32)
    after = flops_per_token(4, seq=16)
    tokens = [8 * 32] * 3 + [4 * 16] * 2
    flops = [8 * 32 * before] * 3 + [4 * 16 * after] * 2
    close_to_rounding(plan.flops, np.cumsum([0, *flops]))
    equal(plan.tokens, np.cumsum([0, *tokens]))
    assert [shape.layers for shape in plan.models] == [2, 4]
    assert plan.ends.tolist() == [3, 5]


# --------------------------------------------------------------------------------- edits, when due


def edits_due(*phases: Phase) -> dict[int, list]:
    """{step: the edits due after it}, in a run of these phases."""
    found = plan_with(*phases).edits
    return {step: due for step, due in found.items() if due}


def test_a_phase_s_edits_are_due_before_it_and_recurring_ones_within_it():
    """These come after every so many steps until their end, never at a phase's last step."""
    twice = partial(stack, times=2)
    reset = Edit(reset_embeddings, every=2, until=4)
    quiet = Edit(silence, every=3)
    first = Phase(steps=4, edits=(silence,))
    second = Phase(
        steps=6,
        edits=(twice, silence),
        repeat=(reset, quiet),
    )
    assert edits_due(first, second) == {
        0: [silence],
        4: [twice, silence],
        6: [reset_embeddings],
        7: [silence],
        8: [reset_embeddings],
    }


def test_a_recurring_edit_without_an_end_goes_on_to_the_last_step_but_one():
    reset = Edit(reset_embeddings, every=5)
    first = Phase(steps=10, repeat=(reset,))
    second = Phase(steps=11, repeat=(reset,))
    due = edits_due(first, second)
    assert [*due] == [5, 15, 20]
    assert all(edits == [reset_embeddings] for edits in due.values())
