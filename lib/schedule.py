"""The plan of a run: budgets, shapes, edits and learning rates of every step, from the config alone."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import numpy as np

from model import Context, Model, ModelConfig, flops_per_token, groups, init


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the consumed budget: a linear warm-up to the peak, then a shape."""

    shape: Literal["constant", "cosine", "linear", "wsd"] = "wsd"  # wsd: stable, then a decay
    peak: float = 3e-3  # rate after the warm-up
    warmup: int = 20  # steps
    decay: float = 0.2  # wsd: the share of the budget at the end over which the rate falls
    fall: Literal["linear", "sqrt"] = "linear"  # wsd: how, linear or 1 - sqrt (Haegele et al. 2024)
    final: float = 0.1  # the rate at the end, as a share of the peak (not of a constant one)
    budget: Literal["flops", "tokens"] = "flops"  # what is consumed; tokens are batch x seq, padding included
    cycle: int = 0  # steps after which it begins anew; 0 is never


def schedules(config) -> dict[str, Schedule]:
    """Every schedule of a `train.Config` by its path: the run's, phases', optimiser groups'."""
    named = {"schedule": config.schedule}
    for i, phase in enumerate(config.phases):
        own = {f"lr.{group}": s for group, s in phase.lr.items()} | {"schedule": phase.schedule}
        named |= {f"phases.{i}.{path}": s for path, s in own.items() if isinstance(s, Schedule)}
    return named


def lr_schedule(schedule: Schedule, spent: np.ndarray, start: int, steps: int) -> np.ndarray:
    """The rate at steps start+1 .. start+steps, where `spent` [s] is the budget consumed after s steps.

    A step's rate belongs to the budget consumed with that step, so a row's own figures give its rate.
    """
    if schedule.cycle:
        once, starts = replace(schedule, cycle=0), range(start, start + steps, schedule.cycle)
        return np.concatenate([lr_schedule(once, spent, s, min(schedule.cycle, start + steps - s)) for s in starts])
    used = (spent[start + 1:start + steps + 1] - spent[start]).astype(float)
    total = float(spent[start + steps] - spent[start])
    warm = used[min(schedule.warmup, steps) - 1] if schedule.warmup else 0.0
    rise = np.minimum(1.0, used / warm) if warm else np.ones(steps)
    after = np.clip((used - warm) / max(total - warm, 1e-9), 0, 1)  # of the warm-up
    if schedule.shape == "cosine":
        fall = schedule.final + (1 - schedule.final) * 0.5 * (1 + np.cos(np.pi * after))
    elif schedule.shape == "linear":
        fall = 1 - (1 - schedule.final) * after
    elif schedule.shape == "wsd":
        through = np.clip((used / total - (1 - schedule.decay)) / schedule.decay, 0, 1)
        fall = 1 - (1 - schedule.final) * (np.sqrt(through) if schedule.fall == "sqrt" else through)
    else:
        fall = np.ones(steps)
    return schedule.peak * rise * fall


class Plan(NamedTuple):
    """What each step of a run is to be, from the config alone. Index s is after s steps; 0 is the start."""

    ends: np.ndarray  # last step of each phase
    models: list[ModelConfig]  # of each phase
    tokens: np.ndarray  # consumed [steps + 1]
    flops: np.ndarray  # model FLOPs consumed [steps + 1]
    rates: dict[str, np.ndarray]  # learning rate of each optimiser group [steps + 1]


def shapes(config, context: Context) -> list[ModelConfig]:
    """The model's shape in each phase: the edits, run on shapes alone."""
    out, current = [], config.model
    for phase in config.phases:
        for edit in phase.edits:
            box = []

            def abstract(key, edit=edit, current=current, box=box):
                box.append(edit(Model(current, init(current, key)), context).model)
                return box[0].params

            jax.eval_shape(abstract, jax.random.key(0))
            current = box[0].config
        out.append(current)
    return out


def make_plan(config, context: Context, lengths: list[tuple]) -> Plan:
    """Budgets and rates of every step of a `train.Config`; lengths: `data.batch_lengths` of each phase."""
    models = shapes(config, context)
    steps, size = [p.steps for p in config.phases], [p.batch * p.seq for p in config.phases]
    tokens = np.concatenate([[0], np.cumsum(np.repeat(np.array(size, np.int64), steps))])
    cost = [n * np.array([flops_per_token(m, seq) for seq in rows], float)[picks]
            for m, n, (rows, picks) in zip(models, size, lengths, strict=True)]
    flops = np.concatenate([[0.0], np.cumsum(np.concatenate(cost))])
    ends, spent = np.cumsum(steps), dict(tokens=tokens, flops=flops)
    names = list(dict.fromkeys(g for m in models for g in groups(m)))
    base = lr_schedule(config.schedule, spent[config.schedule.budget], 0, int(ends[-1]))
    rates = {group: np.zeros(ends[-1] + 1) for group in names}
    for i, phase in enumerate(config.phases):
        begin, end = int(ends[i]) - phase.steps, int(ends[i])
        if unknown := set(phase.lr) - set(names):
            raise ValueError(f"phases.{i}.lr names {', '.join(unknown)}; allowed are the optimiser groups "
                             f"{', '.join(names)}")
        own = phase.schedule
        rate = lr_schedule(own, spent[own.budget], begin, phase.steps) if own else base[begin:end]
        for group in names:
            how = phase.lr.get(group, 1.0)
            rates[group][begin + 1:end + 1] = rate * how if not isinstance(how, Schedule) else \
                lr_schedule(how, spent[how.budget], begin, phase.steps)
    return Plan(ends, models, tokens, flops, rates)


def edits_at(config, course: Plan, step: int) -> list[Callable]:
    """The edits to apply after `step` steps: a phase's own at its beginning, recurring ones within it."""
    for i, phase in enumerate(config.phases):
        begin, end = int(course.ends[i]) - phase.steps, int(course.ends[i])
        if step == begin:
            return list(phase.edits)
        if begin < step < end:
            return [e.apply for e in phase.repeat
                    if (step - begin) % e.every == 0 and not 0 < e.until < step - begin]
    return []
