"""A-GEM: does old code serve better as rows to read, or as a bound on the gradients of new rows?

Paper: On the Usage of Continual Learning for Out-of-Distribution Generalization in Pre-trained
    Language Models of Code, Weyssow et al. 2023 (000:33, 003:60)
Method: a model of code goes on with a stream of APIs that it has not seen. Replay mixes rows of the
    texts before into each batch. A-GEM (Chaudhry et al. 2019) reads such rows for their gradient
    alone, and takes out of the new rows' gradient what would raise their loss: g - (g . r / r . r)
    r where g . r < 0. The paper finds that replay forgets least; for its regularisers see `ewc`.
Here: Python's library but for three packages, then asyncio, email and tkinter in turn. Of each
    batch a quarter is old rows in `replay` and `agem`; `naive` has none. A-GEM pays for a second
    gradient (`Phase.cost`). "old" is bits per byte on test of the first text, "forgotten" how far
    the loss of each text but the last rose on dev from where its own training ended, "learnt" the
    mean of all there, both in nats per byte. In `naive` the first text gains by the later ones;
    only email is forgotten. Left out: accuracy on calls of an API.
Cost: three arms, nine runs of half a minute, four minutes on two CPU cores.
Run:
    python train.py study configs/continual/agem.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from configs import base as shared
from configs.continual.rewarm import base, cosine, first
from data import Document, Source, stdlib
from lib.study import Claim, Paper, Study

STREAM = "asyncio", "email", "tkinter"


def package(name: str = "") -> Iterator[Document]:
    """Functions and classes of a package of the standard library; "": of all not in STREAM.

    Their own paths decide on their splits, or a package of few modules would have none.
    """
    for document in stdlib("definition"):
        if isinstance(document, Document):
            domain = document.meta["domain"]
            if domain == name or not name and domain not in STREAM:
                yield replace(document, group="")


def dot(one: dict, other: dict):
    """The inner product of two gradients."""
    return sum(jnp.sum(one[name] * other[name]) for name in one)


def averaged_gem(gradient, params, batch, step):
    """A `Config.gradient`: that of the newest source's rows, never against that of the others'.

    The newest is the last one in the order of `data.sources`. A-GEM, equation 11.
    """
    newest = batch["source"] == jnp.max(batch["source"])
    weights = batch["weights"] * jnp.stack([newest, ~newest])
    both = lax.map(lambda own: gradient(params, batch | {"weights": own}), weights)
    (sums, g), (_, r) = (jax.tree.map(itemgetter(i), both) for i in (0, 1))
    along = jnp.minimum(dot(g, r), 0.0) / jnp.maximum(dot(r, r), 1e-30)
    return sums, {name: x - along * r[name] for name, x in g.items()}


def course(rows: list[dict], names: list, what: Literal["forgotten", "learnt"]) -> float:
    """How the dev losses of sources go that are read in turn, a phase each.

    learnt: the mean of each one's loss where its phase ends. forgotten: by how much the losses of
    all but the last one are higher at the end of the run.
    """
    found = [row for row in rows if f"eval/{names[0]}/loss" in row]
    each = [f"eval/{name}/loss" for name in names]
    learnt = [[row[key] for row in found if row["phase"] == i][-1] for i, key in enumerate(each)]
    if what == "learnt":
        return sum(learnt) / len(names)
    rises = [found[-1][key] - before for key, before in zip(each[:-1], learnt[:-1], strict=True)]
    return sum(rises) / len(rises)


NAMES, FIRST, STEPS = ("old", *STREAM), 150, 60
ENDS = [FIRST + i * STEPS for i in range(len(NAMES))]
sources = {name: Source(partial(package, name="" if name == "old" else name)) for name in NAMES}
own = replace(first, steps=STEPS, schedule=replace(cosine, peak=cosine.peak / 2, warmup=5))
phases = [replace(own, mixture={name: 1.0}) for name in NAMES]
phases[0] = replace(own, steps=FIRST, mixture={"old": 1.0}, schedule=cosine)
naive = replace(base, phases=tuple(phases), eval_every=10_000,
                data=replace(base.data, sources=sources, dev=0.03, test=0.03))
measures = {"old": "eval/old.test/bpb"} | {
    what: partial(course, names=[*NAMES], what=what) for what in ("forgotten", "learnt")}


def with_old_rows(share: float, cost: float):
    """The stream with a share of old rows in each phase but the first."""
    phases = list(naive.phases)
    for i in range(1, len(phases)):
        before = dict.fromkeys(NAMES[:i], share / i)
        mixture = before | {NAMES[i]: 1 - share}
        phases[i] = replace(phases[i], mixture=mixture, cost=cost)
    return replace(naive, phases=tuple(phases))


study = Study(
    question="Does old code serve better as rows to read, or as a bound on gradients?",
    paper=Paper(title="On the Usage of Continual Learning for Out-of-Distribution Generalization "
                "in Pre-trained Language Models of Code", authors="Weyssow et al.", year=2023,
                seeds=("000:33", "003:60")),
    arms={"naive": naive, "replay": with_old_rows(0.25, 1.0),
          "agem": replace(with_old_rows(0.25, 2.0), gradient=averaged_gem)},
    measures=measures, seeds=3,
    quick=shared.quick(keep=("data.dev", "data.test")) | {"model.layers": 1},
    claims=(
        Claim(says="replay forgets less", arm="replay", measure="forgotten", below=0.0),
        Claim(says="so does A-GEM", arm="agem", measure="forgotten", below=0.0),
        Claim(says="replay forgets less than A-GEM", arm="replay", control="agem",
              measure="forgotten", below=0.0),
        Claim(says="over all texts, replay is ahead", arm="replay", below=0.0),
    ),
)
