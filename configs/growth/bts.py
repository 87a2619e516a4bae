"""BTS: can a few layers between frozen models make of specialists one model that is good at all?

Paper: BTS: Harmonizing Specialized Experts into a Generalist LLM, Zhang et al. 2025 (001:151)
Method: train a hub; branches of it go on, each on one domain. Then all are frozen and run side by
    side, with a stitch after every k blocks. By turns stitches bring the branches' states into the
    hub's, weighed by a softmax gate, and the hub's into theirs, by a sigmoid one. The last goes
    into the hub, which predicts. Stitches alone train, on a small mix of all domains.
Here: the hub reads English ("wiki" of TinyHelen's "leaner" text), branches code (Python's library)
    and math, in bytes. Gates are made to be 0 at first, so that the start is the hub. A step of all
    three and the stitches counts 3.3 of the hub's, as if all trained. on: the hub goes on, on the
    mix, for the FLOPs of `bts`. average: of all parameters. hub, code, math: each alone. These do
    not train. Text lies in ../shared/data; elsewhere, give `--data.sources.math.documents.path`.
Cost: 18 runs and 9 that they need, six minutes on two CPU cores.
Run: in the directory of train.py,
    python train.py study configs/growth/bts.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

import model
from configs import base
from data import DataConfig, Source, stdlib
from lib.optim import adamw
from lib.readers import jsonl
from lib.study import Claim, Paper, Study
from lib.teacher import adopt, alone, part
from model import Context, Edited, Model, ModelConfig, Param


def rows(config: ModelConfig, plain: dict, branches: tuple[str, ...], every: int) -> dict:
    """A model's `rows`: the hub's, the branches' ("code/q"), stitches [stitch, branch, in, out]."""
    found = dict(plain)
    for branch in branches:
        for name, p in plain.items():
            axes = tuple(f"{branch}/{axis}" for axis in p.axes)
            found[f"{branch}/{name}"] = replace(p, axes=axes, group=branch)
    shape = config.layers // every, len(branches), config.embed, config.embed
    stitch = Param(("state", "expert", "in", "out"), shape, 0.0, "stitch")
    return found | dict(stitch=stitch, stitch_gate=stitch)


def stitched(params, batch, mask, config: ModelConfig, branches: tuple[str, ...], every: int):
    """A `forward`: the hub's states [b t d], after every so many blocks of all models a stitch.

    A state x takes up another one y by g: x + g (y + y W - x). Into the hub g is a branch's share
    of softmax(0, hub G_1 .. hub G_n), made to end at 1 and to be 0 where all have even shares.
    Into branch i it is tanh(hub G_i / 2), a sigmoid made so.
    """
    models = [params, *(part(params, branch) for branch in branches)]
    stitches = len(params["stitch"])
    xs = [model.embedded(each, batch, config) for each in models]
    for s in range(stitches):
        xs = [model.stream(each, x, batch, mask, config, s * every, (s + 1) * every)[0]
              for each, x in zip(models, xs, strict=True)]
        hub, others = xs[0], jnp.stack(xs[1:])
        weight, gate = (params[name][s].astype(hub.dtype) for name in ("stitch", "stitch_gate"))
        scores = jnp.einsum("btd,edf->ebtf", hub, gate)
        if (stitches - s) % 2:
            shares = jax.nn.softmax(jnp.pad(scores, ((1, 0), *[(0, 0)] * 3)), axis=0)[1:]
            taken = others + jnp.einsum("ebtd,edf->ebtf", others, weight) - hub
            xs[0] = hub + jnp.sum((len(xs) * shares - 1) * taken, 0) / len(branches)
        else:
            told = hub + jnp.einsum("btd,edf->ebtf", hub, weight) - others
            xs = [hub, *(others + jnp.tanh(scores / 2) * told)]
    return model.rms_norm(xs[0], params["norm"], config.norm_eps)


def stitch(hub: Model, context: Context, branches: tuple[str, ...], every: int = 1) -> Edited:
    """Join a hub with branches beside it, see `lib.teacher.adopt`; the function stays."""
    how = dict(branches=branches, every=every)
    config = replace(alone(hub.config), rows=partial(rows, **how), forward=partial(stitched, **how))
    shape = model.table(config)["stitch"].shape
    new = {name: jnp.zeros(shape, config.param_dtype) for name in ("stitch", "stitch_gate")}
    return Edited(Model(config, hub.params | new), {}, preserves=True)


def average(hub: Model, context: Context, branches: tuple[str, ...]) -> Edited:
    """The mean of the parameters of a model and of other runs'."""
    every = hub.params, *(context.load(run)[0] for run in branches)
    mean = jax.tree.map(lambda *xs: sum(xs) / len(xs), *every)
    return Edited(Model(hub.config, mean), {}, preserves=False)


LEANER, BRANCHES = "../shared/data/leaner/train", dict(code="needs:to_code", math="needs:to_math")
seed = replace(
    base.small, model=base.shape(4, 64, 258), prompts=(), eval_every=100,
    phases=(replace(base.small.phases[0], mixture={"wiki": 1.0}),),
    data=DataConfig(tokenizer="bytes", sources={
        "wiki": Source(partial(jsonl, path=f"{LEANER}/wiki.jsonl")), "code": Source(stdlib),
        "math": Source(partial(jsonl, path=f"{LEANER}/math.jsonl", content="problem"))}))
more = replace(seed.phases[0], steps=200, mixture=dict(wiki=1.0, code=1.0, math=1.0))
join = *(partial(adopt, run=run, prefix=name) for name, run in BRANCHES.items()), partial(
    stitch, branches=tuple(BRANCHES))
joint = replace(more, steps=100, cost=3.3, edits=join, lr={"stitch": 0.25})
still = replace(more, steps=1, lr=dict.fromkeys(("embed", "head", "matrix", "vector"), 0.0))
FROZEN = *still.lr, *BRANCHES
hub = replace(seed, init_from="needs:seed", phases=(still,))
paid = round(2 * more.steps + joint.cost * joint.steps)  # in steps of the hub
mean, claim = partial(average, branches=tuple(BRANCHES.values())), partial(Claim, arm="bts")
study = Study(
    question="Can a few layers between frozen specialists make one model that is good at all?",
    paper=Paper(title="BTS: Harmonizing Specialized Experts into a Generalist LLM",
                authors="Zhang et al.", year=2025, seeds=("001:151",)),
    needs={"seed": seed} | {f"to_{domain}": replace(
        hub, phases=(replace(more, mixture={domain: 1.0}),)) for domain in ("code", "math")},
    arms={"on": replace(hub, phases=(replace(more, steps=paid),)),
          "bts": replace(hub, phases=(joint,), optimizer=partial(adamw, frozen=FROZEN)),
          "average": replace(hub, phases=(replace(still, edits=(mean,)),)), "hub": hub,
          **{domain: replace(hub, init_from=run) for domain, run in BRANCHES.items()}},
    quick=base.quick({"model.layers": 2}, keep=("data.dev", "data.test")), seeds=3,
    claims=(
        claim(says="stitches beat the mean of parameters", control="average", below=0.0),
        claim(says="they beat the hub trained on, at equal FLOPs", below=0.0),
        *(claim(says=f"they keep {name}", control=arm, measure=f"eval/{name}.test/bpb", below=0.05)
          for name, arm in dict(code="code", math="math", wiki="hub").items()),
    ),
)
