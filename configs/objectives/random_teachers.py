"""Random teachers: does a student learn anything of a teacher that has learned nothing?

Paper: Random Teachers are Good Teachers, Sarnthein et al. 2023 (003:63)
Method: a student matches the outputs of a teacher that was only drawn, on data without labels. A
    linear probe of its features is better than one of the teacher's, the more so if the student
    began near the teacher: at ((1 - a) teacher + a draw) / sqrt(a^2 + (1 - a)^2), a small.
Here: Python's library in bytes in place of images. Outputs are the logits of the next byte, the
    loss their divergence. The probe is linear from final states to the next byte, by ridge
    regression on half of the dev bytes; accuracy is of the other half. far: a is 1. still: near,
    without training. Left out: lottery tickets, and transfer to other data.
Cost: 9 runs of half a minute, 4 minutes on two CPU cores.
Run:
    python train.py study configs/objectives/random_teachers.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from lib.optim import adamw
from lib.probe import ridge
from lib.study import Claim, Paper, Study
from lib.teacher import adopt_random, divergence
from model import CAUSAL, Edited, forward, table
from train import Config, Schedule


def begin_near(model, context, a: float = 0.2) -> Edited:
    """Put the student near its teacher, see above; both are draws. Gains stay as they are."""
    params, size = dict(model.params), (a**2 + (1 - a)**2)**0.5
    for name, param in table(model.config).items():
        if param.init and f"teacher/{name}" in params:
            theirs = params[f"teacher/{name}"]
            params[name] = ((1 - a) * theirs + a * params[name]) / size
    return Edited(model._replace(params=params), {}, preserves=False)


def accuracy(x: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Of a linear probe of x [n d] for labels [n], fitted on the first half."""
    half = len(x) // 2
    weights, bias = ridge(x[:half], np.eye(classes)[labels[:half]])
    return float(np.mean(np.argmax(x[half:] @ weights + bias, 1) == labels[half:]))


def probes(params, apply, config: Config, held_out, most: int = 40_000) -> dict[str, float]:
    """`probe/student` and `probe/teacher`, accuracies for the next byte, and `probe/gain`."""
    @jax.jit
    def both(batch):
        states, given = forward(params, batch, CAUSAL, config.model)
        return states, given["teacher"]

    found, labels = {"student": [], "teacher": []}, []
    for batch, document in held_out("stdlib", "dev", most).batches():
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        for kind, states in zip(found, both(batch), strict=True):
            found[kind].append(np.asarray(states)[document >= 0])
        labels.append(np.asarray(batch["targets"])[document >= 0])
    labels = np.concatenate(labels)
    figures = {f"probe/{kind}": accuracy(np.concatenate(x), labels, config.model.vocab)
               for kind, x in found.items()}
    return figures | {"probe/gain": figures["probe/student"] - figures["probe/teacher"]}


(phase,) = base.small.phases


def student(a: float) -> Config:
    """A run that matches a drawn teacher, so far from it at first."""
    edits = adopt_random, partial(begin_near, a=a)
    return replace(base.small, model=replace(base.shape(3, 96, 0), rows=base.loud),
                   token_loss=divergence, prompts=(),
                   data=replace(base.small.data, tokenizer="bytes", test=0.0), evals=(probes,),
                   optimizer=partial(adamw, weight_decay=0.0, frozen=("teacher",)),
                   phases=(replace(phase, edits=edits),), eval_every=300)


near, far = student(0.2), student(1.0)
still = replace(near, phases=(replace(near.phases[0], steps=1),), schedule=Schedule(peak=1e-9))
gain = partial(Claim, measure="probe/gain")
study = Study(
    question="Does a student learn anything of a teacher that has learned nothing?",
    paper=Paper(title="Random Teachers are Good Teachers", authors="Sarnthein et al.", year=2023,
                seeds=("003:63",)),
    arms={"still": still, "near": near, "far": far},
    quick=base.quick(),
    claims=(
        gain(says="a student near its teacher is better than it", arm="near", control=None,
             above=0.0),
        gain(says="and not by being drawn anew", arm="near", above=0.0),
        gain(says="one from afar gains less", arm="far", control="near", below=0.0),
    ), seeds=3)
