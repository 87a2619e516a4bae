"""What studies share: models, runs of them, the ladder, `--quick`, arithmetic of equal FLOPs.

A study starts from one of these and changes what it is about. So two studies differ by their
method, and a run that two of them need is the same run. `small` takes about a minute on two CPU
cores:

    python train.py configs/base.py
"""
import math
from dataclasses import replace
from functools import partial
from typing import Annotated

from data import DataConfig, Source, stdlib
from lib.fields import FROM_1, at_most
from lib.readers import jsonl
from model import ModelConfig, Param, count
from train import Config, Phase, Schedule

RATES = 4e-3, 8e-3, 1.6e-2  # peak learning rates that most studies tune each arm over

QUICK = {
    "phases.*.steps": 4,
    "phases.*.seq": 64,
    "overlap": 8,
    "model.embed": 32,
    "model.mlp": 32,
    "model.vocab": 258,
    "model.unroll": 1,
    "data.tokenizer": "bytes",
    "data.dev": 0.01,
    "data.test": 0.01,
    "eval_every": 2,
    "eval_tokens": 2_000,
    "sample_tokens": 4,
}


def quick(changes: dict | None = None, keep: tuple[str, ...] = ()) -> dict:
    """The fields that `study --quick` sets, {field: value}.

    changes: fields to set otherwise, or besides. keep: fields that stay as the study has them.
    """
    fields = QUICK | (changes or {})
    return {name: value for name, value in fields.items() if name not in keep}


# --------------------------------------------------------------------------------- models and runs

def shape(
    layers: int = 4, embed: int = 128, vocab: int = 1024, head_dim: int = 32
) -> ModelConfig:
    """A Llama whose MLP is 8/3 as wide as the stream, rounded up to a multiple of 4.

    With heads wider than 32 it is rounded up to a multiple of 128.
    """
    heads = embed // head_dim
    step = 128 if head_dim > 32 else 4
    mlp = step * math.ceil(8 * embed / (3 * step))
    return ModelConfig(layers=layers, embed=embed, heads=heads, kv_heads=heads, head_dim=head_dim,
                       mlp=mlp, vocab=vocab)


def loud(config: ModelConfig, rows: dict[str, Param]) -> dict[str, Param]:
    """`rows`: outputs of blocks drawn as what reads the stream is, for models that stay as drawn.

    By default they begin as 0, so that blocks which never learn say nothing.
    """
    drawn = {name: replace(rows[name], init=config.embed**-0.5) for name in ("o", "down")}
    return rows | drawn


def scaled(config: Config, steps: int) -> Config:
    """A config of one phase, for another number of steps. The warm-up is as long a share of them."""
    phase, schedule = config.phases[0], config.schedule
    warmup = round(schedule.warmup * steps / phase.steps)
    return replace(config, phases=(replace(phase, steps=steps),),
                   schedule=replace(schedule, warmup=warmup))


small = Config(  # 1.1 million parameters, 0.3 million tokens
    model=shape(),
    data=DataConfig(sources={"stdlib": Source(stdlib)}, dev=0.03, test=0.03, shard_tokens=2**20),
    phases=(Phase(steps=300, batch=8, seq=128),),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=40, decay=0.4, final=0.05),
    overlap=16,
    eval_every=75,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
deep = Config(  # 1.8 million parameters, 1.2 million tokens
    model=shape(layers=8),
    data=DataConfig(sources={"stdlib": Source(stdlib)}, shard_tokens=2**20),
    phases=(Phase(steps=600, batch=8, seq=256),),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=80, decay=0.4, final=0.05),
    eval_every=100,
    eval_tokens=32_768,
    save_every=1_000,
    keep=1,
)
llama = Config(  # 134 million parameters, 2.5 billion tokens, on JSON Lines of yours
    model=ModelConfig(layers=12, embed=768, heads=12, kv_heads=12, head_dim=64, mlp=2048,
                      vocab=32_000, dtype="bfloat16"),
    data=DataConfig(sources={"mine": Source(partial(jsonl, path="~/my_jsonl"))}, sample_mib=64.0,
                    stream=True, dev=0.005, test=0.005, shard_tokens=2**25),
    phases=(Phase(steps=4_800, batch=512, seq=1_024, accumulate=16),),
    schedule=Schedule(peak=8e-3, warmup=200),
    eval_every=500,
    eval_tokens=2**20,
    save_every=1_000,
    keep_every=4_000,
)
config = small


def budget(config: Config) -> int:
    """The tokens that a config trains on."""
    return sum(phase.steps * phase.batch * phase.seq for phase in config.phases)


# -------------------------------------------------------------------------------------- the ladder

DEEPEST = 100
Depth = Annotated[int, FROM_1, at_most(DEEPEST)]
OF_CPUS = 8  # the deepest rung that is made for CPUs
TOKENS_PER_PARAM = 20  # about the best for a budget of FLOPs (Hoffmann et al. 2022)


def rung(depth: int, vocab: int = 0) -> ModelConfig:
    """The model of a rung: so many layers, and what follows from that.

    A layer adds 16 to the width up to d8 and 64 from d12 on, as in nanochat (Karpathy 2025), and
    12 more with each layer between them: so a CPU has rungs whose cost is some times that of the
    one before. Heads are 64 wide from d9 and 128 from d24 on; below that the most, up to 32,
    that divides the width. The vocabulary is 16 times the width, near the law by Tao et al. (2024,
    "Scaling Laws with Vocabulary"). vocab: another one.
    """
    width = depth * min(max(12 * depth - 80, 16), 64)
    head_dim = max(size for size in range(2, 33, 2) if width % size == 0)
    if depth > OF_CPUS:
        head_dim = 64 if depth < 24 else 128
    embed = head_dim * math.ceil(width / head_dim)
    model = shape(depth, embed, vocab or max(512, 16 * embed), head_dim)
    if depth <= OF_CPUS:
        return model
    return replace(model, dtype="bfloat16", remat="elementwise" if depth > 12 else "none")


def ladder(depth: int, tokens: float = 0.0, vocab: int = 0) -> Config:
    """The run of a rung. tokens: its length, 0 for 20 a parameter; vocab: see `rung`.

    A batch grows with the length, tokens^0.47, whatever the size, as the critical batch does (Zhang
    et al. 2024, "How Does Critical Batch Size Scale in Pre-training?"). It has 2,048 tokens where
    the run has 2^20, as `deep` has. The peak rate is the same for all, see lib/optim.py. An
    eighth of the steps warm up. Text is Python's standard library, of which large rungs read too
    little.
    """
    model, like = rung(depth, vocab), deep
    if depth > OF_CPUS:
        like = replace(llama, data=replace(llama.data, sources=deep.data.sources))
    seq = like.phases[0].seq
    tokens = tokens or float(TOKENS_PER_PARAM * count(model))
    rows = round_rows(2048 * (tokens / 2**20) ** 0.47 / seq)
    parts = max(1, rows // 32) if depth > OF_CPUS else 1  # 32,768 tokens at once
    steps = max(1, round(tokens / rows / seq))
    every = max(1, steps // 10)
    return replace(like, model=model, eval_every=every, save_every=every,
                   phases=(Phase(steps=steps, batch=rows, seq=seq, accumulate=parts),),
                   schedule=replace(deep.schedule, warmup=steps // 8))


def round_rows(rows: float) -> int:
    """The nearest of 1, 2, 3, 4, 6, 8, 12, 16, 24 ..., so that several devices share a batch."""
    power = 2 ** max(0, math.floor(math.log2(rows)))
    near = power, power + power // 2, 2 * power
    return min(near, key=lambda one: abs(math.log(one / rows)))


def says(config: Config) -> str:
    """The size, length and cost of a run of one phase, in a line."""
    model, phase = config.model, config.phases[0]
    size = count(model)
    each = budget(config) / size
    return (f"{model.layers} layers of width {model.embed} over {model.vocab:,} pieces, {size:,} "
            f"parameters; {phase.steps:,} steps of {phase.batch} x {phase.seq} tokens ({each:.3g} "
            f"a parameter), {flops(model, phase):.2g} FLOPs, peak rate {config.schedule.peak:g}")


# ----------------------------------------------------------------------------------- equal budgets

def flops(model: ModelConfig, phase: Phase) -> float:
    """Training FLOPs of a phase of this model, its `cost` included."""
    tokens = phase.steps * phase.batch * phase.seq
    return tokens * model.flops(model, phase.seq) * phase.cost


def steps_for(budget: float, model: ModelConfig, phase: Phase) -> int:
    """How many steps of this model, in batches as the phase's, cost so many FLOPs."""
    return round(budget / flops(model, replace(phase, steps=1)))


def grown(control: Config, first: ModelConfig, steps: int, edit) -> Config:
    """A run of the control's FLOPs that begins with another model, which an edit then makes its own.

    `first` is trained for so many steps at a constant rate. Growth warms up again, and the rate
    falls over the same last FLOPs as the control's.
    """
    (plain,), rates = control.phases, control.schedule
    spent = flops(first, replace(plain, steps=steps))
    later = steps_for(flops(control.model, plain) - spent, control.model, plain)
    before = replace(plain, steps=steps, schedule=replace(rates, shape="constant"))
    after = replace(plain, steps=later, edits=(edit,),
                    schedule=replace(rates, decay=rates.decay * plain.steps / later))
    return replace(control, model=first, phases=(before, after))
