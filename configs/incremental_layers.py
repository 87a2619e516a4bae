"""Incremental layers: new ones at random on the old ones, frozen for a while; does it pay? (It should not.)

Arms, with one final shape and one budget of model FLOPs, the shallow phase included (a frozen layer is
charged as any other, though its gradient is not used):

    scratch      four layers from the start: the control
    frozen       two layers; then four, the upper two new, the lower two frozen; then all train
    unfrozen     the same, but all train from the growth on

"On the Effectiveness of Incremental Training of LLMs" (arXiv 2411.18700): what looks ahead early needs more
FLOPs in the end than the plain run. A negative control for configs that copy layers. As in `stacking.py`,
and unlike the paper's constant rate, growth warms up again and all decay over the last 40 % of their FLOPs.

    python train.py study configs/incremental_layers.py --seeds 3 --jobs 2  about ten minutes on two CPU cores
    python train.py configs/incremental_layers.py:frozen                    one arm by hand, a minute

Freezing takes two functions, for any config: `freeze` (a `reparam`) stops gradients, so that the clipped norm
is of what trains, and `asleep` (an `optimizer`) keeps weight decay and moments off what has no gradient. To
freeze whole optimiser groups, embeddings say, `Phase.lr` of 0 is enough.
"""
from dataclasses import replace
from functools import partial

from data import DataConfig, Source, stdlib
from lib.edits import stack
from lib.freezing import asleep, freeze
from lib.schedule import Schedule
from model import ModelConfig, flops_per_token
from train import Config, Phase

DECAY = 0.4  # share of the FLOPs at the end over which the rate falls
deep = ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=1024)
shallow = replace(deep, layers=2)
plain = Phase(steps=300, batch=8, seq=128)
SHALLOW = 150  # steps of two layers
DEEP = round(plain.steps - SHALLOW * flops_per_token(shallow, plain.seq) / flops_per_token(deep, plain.seq))
random_on_top = partial(stack, layers=(0, 1, -1, -1), new="random")

scratch = Config(
    model=deep,
    data=DataConfig(sources={"stdlib": Source(stdlib)}, dev=0.03, test=0.03, shard_tokens=1_048_576),
    phases=(plain,),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=DECAY, final=0.05),
    overlap=16,
    eval_every=75,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
unfrozen = replace(scratch, model=shallow, phases=(
    replace(plain, steps=SHALLOW, schedule=replace(scratch.schedule, shape="constant")),
    replace(plain, steps=DEEP, edits=(random_on_top,),
            schedule=replace(scratch.schedule, decay=DECAY * plain.steps / DEEP))))
frozen = replace(unfrozen, optimizer=asleep, reparam=partial(
    freeze, begin=SHALLOW, until=SHALLOW + DEEP // 2, layers=shallow.layers))
arms = {"scratch": scratch, "frozen": frozen, "unfrozen": unfrozen}
config = arms["frozen"]
control = "scratch"
rates = 2e-3, 4e-3, 8e-3
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "model.embed": 32, "model.mlp": 32,
         "model.vocab": 258, "model.unroll": 1, "data.tokenizer": "bytes", "data.dev": 0.01,
         "data.test": 0.01, "eval_every": 2, "eval_tokens": 2_000, "sample_tokens": 4}
claims = (
    dict(says="new layers at random, the old ones frozen at first, are behind full depth from the start",
         arm="frozen", above=0.0),
    dict(says="... and so they are with nothing frozen", arm="unfrozen", above=0.0),
    dict(says="freezing costs more than it keeps (no figure is published)", arm="frozen", control="unfrozen",
         above=0.0),
)
