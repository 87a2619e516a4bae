"""Active forgetting beside three baselines: does what it is worth hang on what it is compared to?

Paper: Improving Language Plasticity via Pretraining with Active Forgetting, Chen et al. 2023
    (001:199)
Method: active_forgetting.py's.
Here: its plain Llama; the same with the defaults that recipe.py took the place of, a tied table
    among them, at half the rates; and strong.py's model and optimiser at the plain rates, whose
    tables of values and of pairs are drawn anew with the embeddings. The cells of 2k, 20k and 200k
    tokens, from a body that forgot and from one that did not.
Cost: 18 runs, six of them active_forgetting.py's, about twenty minutes on two CPU cores, an
    estimate.
Run:
    python train.py study configs/forgetting/active_forgetting_beside.py --jobs 2
"""
from dataclasses import replace
from functools import partial

from configs.baselines.recipe import old
from configs.baselines.strong import on
from configs.forgetting.active_forgetting import study as method
from lib.study import Claim, Study
from train import Config


def before(config: Config) -> Config:
    """A config with the defaults of before, a tied table among them, at half the rates."""
    def halved(schedule):
        return replace(schedule, peak=schedule.peak / 2)

    phases = []
    for phase in config.phases:
        own = {group: rate if isinstance(rate, float) else halved(rate)
               for group, rate in phase.lr.items() if group != "head"}
        phases.append(replace(phase, lr=own, schedule=halved(phase.schedule)))
    return old(replace(config, phases=tuple(phases), schedule=halved(config.schedule)))


BASELINES = {"plain": lambda config: config, "old": before, "strong": partial(on, rates={})}
arms = {}
for name, made in BASELINES.items():
    for arm in "standard", "forgetting":
        arms[f"{name}_{arm}"] = made(method.arms[arm])
study = Study(
    question="Does what active forgetting is worth hang on the baseline?",
    paper=method.paper,
    arms=arms,
    measures={name: method.measures[name] for name in ("own language", "2k", "20k", "200k")},
    quick=method.quick,
    claims=[Claim(says=f"{cell} tokens are learnt better after forgetting on the {name} baseline",
                  arm=f"{name}_forgetting", control=f"{name}_standard", measure=cell, below=0.0)
            for name in BASELINES for cell in ("2k", "20k", "200k")],
    seeds=3,
)
