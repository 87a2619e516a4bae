"""The plan of a run: what every step is to be, from the config alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import jax
import numpy as np

from data import batch_lengths
from lib.fields import NotNegative, Positive, PositiveShare, Whole, strict
from lib.seams import EDIT, FLOPS, SHAPE, is_number, require_gave
from model import Context, Edited, Model, ModelConfig, groups, init, table


@strict
@dataclass(frozen=True)
class Schedule:
    """The learning rate over the consumed budget: a linear warm-up to the peak, then a shape."""

    # wsd: stable, then a decay; or a function, share of the budget -> share of the peak
    shape: Literal["constant", "cosine", "linear", "wsd"] | Annotated[Callable, SHAPE] = "wsd"
    peak: Positive = 8e-3  # rate after the warm-up; AdamW divides it by width, see lib/optim.py
    warmup: Whole = 20  # steps
    decay: PositiveShare = 0.2  # wsd: the share of the budget at the end over which the rate falls
    fall: Literal["linear", "sqrt"] = "linear"  # wsd: how, linear or 1 - sqrt (Haegele et al. 2024)
    final: NotNegative = 0.1  # the rate at the end, as a share of the peak (not of a constant one)
    budget: Literal["flops", "tokens"] = "flops"  # consumed; tokens are batch x seq, with padding
    cycle: Whole = 0  # steps after which it begins anew; 0 is never


def shape_of_decay(schedule: Schedule, used: np.ndarray, warm: float, total: float) -> np.ndarray:
    """The rate as a share of the peak, warm-up aside.

    used [steps]: budget consumed. warm: budget of the warm-up. total: the whole budget.
    """
    if callable(schedule.shape):
        shares = used / total
        values = [schedule.shape(float(share)) for share in shares]
        for value in values:
            fine = is_number(value) and 0 <= value < math.inf
            require_gave(fine, SHAPE, schedule.shape, value)
        return np.array(values, float)
    final, decay = schedule.final, schedule.decay
    rest = max(total - warm, 1e-9)  # the budget after the warm-up
    after = np.clip((used - warm) / rest, 0, 1)
    match schedule.shape:
        case "constant":
            return np.ones(len(used))
        case "cosine":
            return final + (1 - final) * 0.5 * (1 + np.cos(np.pi * after))
        case "linear":
            return 1 - (1 - final) * after
    through = np.clip((used / total - (1 - decay)) / decay, 0, 1)
    if schedule.fall == "sqrt":
        through = np.sqrt(through)
    return 1 - (1 - final) * through


def lr_schedule(schedule: Schedule, spent: np.ndarray, start: int, steps: int) -> np.ndarray:
    """The learning rate at steps start+1 .. start+steps.

    spent [s]: the budget consumed after s steps. A step's rate belongs to the budget consumed with
    that step, so a row's own figures give its rate.
    """
    if schedule.cycle:
        once = replace(schedule, cycle=0)
        end = start + steps
        cycles = []
        for begin in range(start, end, schedule.cycle):
            length = min(schedule.cycle, end - begin)
            cycles.append(lr_schedule(once, spent, begin, length))
        return np.concatenate(cycles)
    here = spent[start : start + steps + 1]
    used = (here[1:] - here[0]).astype(float)
    total = float(here[-1] - here[0])
    warm = 0.0
    if schedule.warmup:
        warm = used[min(schedule.warmup, steps) - 1]
    rise = np.ones(steps)
    if warm:
        rise = np.minimum(1.0, used / warm)
    return schedule.peak * rise * shape_of_decay(schedule, used, warm, total)


@dataclass(frozen=True)
class Plan:
    """What each step of a run is to be. Index s of an array is after s steps; 0 is the start."""

    ends: np.ndarray  # last step of each phase
    start: ModelConfig  # the model before the first edit
    models: list[ModelConfig]  # of each phase, its edits applied
    groups: list[list[str]]  # optimiser groups of each phase's model
    tokens: np.ndarray  # consumed, int64 [steps + 1]
    flops: np.ndarray  # model FLOPs consumed, float64 [steps + 1]
    lr: dict[str, np.ndarray]  # learning rate of each optimiser group [steps + 1]
    edits: dict[int, list[Callable]]  # to apply after so many steps, before the next one
    resets: np.ndarray  # steps after which an edit within a phase forgets, ascending
    steers: dict[int, int]  # step after which a mixture is decided anew: its phase
    eval_steps: frozenset[int]  # evaluations besides those of each `eval_every` steps
    eval_every: int
    save_every: int

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return int(self.ends[-1])

    def phase_of(self, step: int) -> int:
        """The phase that takes `step` (1 and up); the first one for 0."""
        return int(np.searchsorted(self.ends, max(1, step)))

    def model_after(self, step: int) -> ModelConfig:
        """The model's shape after `step` steps, before the edits that are due there."""
        if step == 0:
            return self.start
        return self.models[self.phase_of(step)]

    def stops(self, step: int) -> bool:
        """Does a phase end here, or is a mixture decided anew? Then the run evaluates and saves."""
        return step in self.ends or step in self.steers

    def evaluates(self, step: int) -> bool:
        """Is there an evaluation after `step` steps?"""
        if step in self.eval_steps:
            return True
        return step > 0 and (self.stops(step) or step % self.eval_every == 0)

    def saves(self, step: int) -> bool:
        """Is there a checkpoint after `step` steps?"""
        return self.stops(step) or step % self.save_every == 0

    def frozen(self, phase: int) -> frozenset[str]:
        """Optimiser groups whose rate is 0 through a whole phase."""
        begin = int(self.ends[phase - 1]) if phase else 0
        end = int(self.ends[phase])
        return frozenset(g for g, lr in self.lr.items() if not lr[begin + 1 : end + 1].any())

    def since_reset(self, step: int, start: int = 0, since: int | None = None) -> int | None:
        """Steps since an edit last recurred, None if never; at step `start` it was `since`."""
        before = self.resets[self.resets < step]  # one after `step` steps comes later
        if len(before) and before[-1] >= start:
            return step - int(before[-1])
        if since is None:
            return None
        return since + step - start

    def rates(self, step: int) -> np.ndarray:
        """The learning rate of each optimiser group that the model of a step has, float32."""
        phase = self.phase_of(step)
        names = self.groups[phase]
        rates = [self.lr[name][step] for name in names]
        return np.array(rates, np.float32)

    def shown_lr(self, step: int) -> float:
        """The learning rate that a row shows: of the matrices, or the highest where that is 0."""
        rates = {}
        for group, lr in self.lr.items():
            rates[group] = float(lr[step])
        highest = max(rates.values())
        return rates.get("matrix") or highest

    def spent(self, step: int) -> dict[str, float]:
        """What every row of metrics.jsonl says of the budget."""
        return {
            "train/tokens": int(self.tokens[step]),
            "train/flops": float(self.flops[step]),
            "phase": self.phase_of(step),
        }


def models_of(config, context: Context) -> list[ModelConfig]:
    """The model's shape in each phase of a `train.Config`: its edits, run on shapes alone."""
    found, current = [], config.model
    for phase in config.phases:
        for edit in phase.edits:
            current = shape_after(edit, current, context)
        found.append(current)
    return found


def shape_after(edit: Callable, config: ModelConfig, context: Context) -> ModelConfig:
    """The shape that an edit gives, worked out without computing its parameters."""
    shapes = []

    def abstract(key):
        edited = checked_edit(edit, edit(Model(config, init(config, key)), context)).model
        shapes.append(edited.config)
        return edited.params

    params = jax.eval_shape(abstract, jax.random.key(0))
    check_declared(params, shapes[0], getattr(edit, "func", edit).__name__)
    return shapes[0]


def checked_edit(edit: Callable, found) -> Edited:
    """What an edit gave; raises InputError where it is no `model.Edited`."""
    fine = isinstance(found, Edited) and isinstance(found.policy, dict)
    if fine:
        policies = [how for how in found.policy.values() if not callable(how)]
        fine = set(policies) <= {"keep", "reset"} and isinstance(found.model, Model)
    fine = fine and isinstance(found.model.config, ModelConfig)
    require_gave(fine and isinstance(found.model.params, dict), EDIT, edit, found,
                 ', whose model is (ModelConfig, {name: array}), and whose policy is {group: "keep"'
                 ', "reset" or a function}')
    return found


def check_declared(params: dict, config: ModelConfig, edit: str):
    """Raise ValueError where an edit's parameters are not those of the table of its model."""
    given = {name: x.shape for name, x in params.items()}
    declared = {name: param.shape for name, param in table(config).items()}
    said = []
    for name in given | declared:
        found, allowed = given.get(name), declared.get(name)
        if found != allowed:
            said.append(f"{name} {found} for {allowed}")
    if said:
        raise ValueError(
            f"the edit {edit} gives other parameters than model.table declares: "
            f"{', '.join(said)}; allowed are those that `model.rows` declares, in these shapes"
        )


def flops_of(phase, model: ModelConfig) -> np.ndarray:
    """Model FLOPs of each batch of a phase [steps], by the length of its rows."""
    lengths, picks = batch_lengths(phase)
    size = phase.batch * phase.seq
    costs = [model.flops(model, seq) for seq in lengths]
    for cost in costs:
        require_gave(is_number(cost) and 0 < cost < math.inf, FLOPS, model.flops, cost)
    each = np.array(costs, float)
    return size * each[picks] * phase.cost


def lr_of_groups(config, ends: np.ndarray, spent: dict, names: list[str]) -> dict[str, np.ndarray]:
    """The learning rate of each optimiser group [steps + 1].

    Raises ValueError for a phase's rate of a group that is none.
    """
    run = config.schedule
    base = lr_schedule(run, spent[run.budget], 0, int(ends[-1]))
    lr = {group: np.zeros(ends[-1] + 1) for group in names}
    for i, phase in enumerate(config.phases):
        end = int(ends[i])
        begin = end - phase.steps
        unknown = set(phase.lr) - set(names)
        if unknown:
            raise ValueError(
                f"phases.{i}.lr names {', '.join(unknown)}; allowed are the optimiser groups "
                f"{', '.join(names)}"
            )
        common = base[begin:end]
        own = phase.schedule
        if own:
            common = lr_schedule(own, spent[own.budget], begin, phase.steps)
        for group in names:
            how = phase.lr.get(group, 1.0)
            if isinstance(how, Schedule):
                rate = lr_schedule(how, spent[how.budget], begin, phase.steps)
            else:
                rate = common * how
            lr[group][begin + 1 : end + 1] = rate
    return lr


def edits_of(
    config, ends: np.ndarray
) -> tuple[dict[int, list[Callable]], np.ndarray]:
    """({step: edits due after it}, the steps within a phase after which one forgets)."""
    edits, resets = {}, []
    for phase, end in zip(config.phases, ends.tolist(), strict=True):
        begin = end - phase.steps
        if phase.edits:
            edits[begin] = list(phase.edits)
        if not phase.repeat:
            continue
        for step in range(begin + 1, end):
            due = [edit for edit in phase.repeat if recurs(edit, step - begin)]
            if due:
                edits[step] = [edit.apply for edit in due]
            if any(edit.forgets for edit in due):
                resets.append(step)
    return edits, np.array(resets, np.int64)


def recurs(edit, within: int) -> bool:
    """Is a `train.Edit` due after so many steps of its phase?"""
    over = 0 < edit.until < within
    return within % edit.every == 0 and not over


def steers_of(config, ends: np.ndarray) -> dict[int, int]:
    """{step after which a mixture is decided anew: its phase}."""
    found = {}
    for i, (phase, end) in enumerate(zip(config.phases, ends.tolist(), strict=True)):
        if phase.steer:
            decisions = range(end - phase.steps, end, phase.steer)
            found |= dict.fromkeys(decisions[1:], i)
    return found


def running_sum(costs: np.ndarray) -> np.ndarray:
    """What is consumed after 0, 1, ... steps [steps + 1]."""
    return np.concatenate([np.zeros(1, costs.dtype), np.cumsum(costs)])


def make_plan(config, context: Context) -> Plan:
    """The plan of a `train.Config`. Raises ValueError for what its edits or groups refuse."""
    models = models_of(config, context)
    phases = config.phases
    steps = [phase.steps for phase in phases]
    ends = np.cumsum(steps)
    sizes = np.array([phase.batch * phase.seq for phase in phases], np.int64)
    tokens = running_sum(np.repeat(sizes, steps))
    costs = [flops_of(phase, model) for phase, model in zip(phases, models, strict=True)]
    flops = running_sum(np.concatenate(costs))
    names = list(dict.fromkeys(group for model in models for group in groups(model)))
    edits, resets = edits_of(config, ends)
    return Plan(
        ends=ends,
        start=config.model,
        models=models,
        groups=[list(groups(model)) for model in models],
        tokens=tokens,
        flops=flops,
        lr=lr_of_groups(config, ends, dict(tokens=tokens, flops=flops), names),
        edits=edits,
        resets=resets,
        steers=steers_of(config, ends),
        eval_steps=frozenset(config.eval_at),
        eval_every=config.eval_every,
        save_every=config.save_every,
    )
