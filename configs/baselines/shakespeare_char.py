"""Tiny Shakespeare by characters: nanoGPT's setting for a CPU, as many tokens and parameters.

Paper: none; nanoGPT's README (Karpathy 2022) has 1.88 nats a character on validation after 2,000
    steps of 12 rows of 64 characters, for 4 layers of width 128
Method: its steps, rows and split (the first 90 % are trained on); 800,128 parameters, where it has
    804,096 with its positions.
Here: arms differ in the optimiser and its schedule. plain: nanoGPT's: AdamW, 1e-3 for all, 100
    steps of warm-up, a cosine to a tenth; it decays embeddings too, which this does not. adamw: a
    higher rate, less for matrices by width, that falls in a line to nothing. muon: Muon for the
    matrices, at a higher rate still. What all three have beyond GPT-2: SwiGLU, RoPE, RMSNorm,
    blocks that begin as 0, and rows end to end, so that 1.5 passes leave no character out, where
    random starts miss a fifth. The last tenth is held out as one document, so a run ends with bits
    per byte of all of it too. Characters are bytes: 258 pieces, of which the text has 65. The text
    is that of karpathy/char-rnn, looked for in ../shared/data.
Cost: nine runs of 2,000 steps, a quarter of an hour on two CPU cores, an estimate.
Run:
    python train.py configs/baselines/shakespeare_char.py
    ... --data.sources.shakespeare.documents.path input.txt
    python train.py study configs/baselines/shakespeare_char.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from configs.baselines.muon import muon
from data import DataConfig, Document, InputError, Source, text
from lib.kernels import nll
from lib.optim import adamw
from lib.study import Claim, Study
from model import ModelConfig
from train import Config, Phase, Schedule


def published(path: str, share: float = 0.9) -> Iterator[Document]:
    """nanoGPT's split: the first `share` of a text's characters is trained on, the rest is not."""
    whole = next(text(path))
    if not isinstance(whole, Document) or not whole.text.isascii():
        raise InputError(f"source path {path!r} is no text of ASCII characters, which are one byte "
                         "each")
    end = int(share * len(whole.text))
    yield Document("beginning", whole.text[:end], split="train")
    yield Document("rest", whole.text[end:], split="held_out")


def validation(params, apply, config: Config, held_out, windows: int = 2_000,
               seed: int = 0) -> dict[str, float]:
    """Nats per character of the rest as nanoGPT takes them.

    Rows are as long as in training, from random starts, nothing before them, a prediction after
    each character. `loss_se` is by the draw of these windows; `whole` is the same of all of the
    rest, in rows end to end.
    """
    (rest,) = held_out("shakespeare", "test").texts()
    seq, ids = config.phases[-1].seq, np.frombuffer(rest, np.uint8).astype(np.int32)

    def nats(starts: np.ndarray) -> np.ndarray:
        each = np.split(ids[starts[:, None] + np.arange(seq + 1)], range(250, len(starts), 250))
        return np.concatenate([nll(apply(params, rows[:, :-1]), rows[:, 1:]).mean(1)
                               for rows in each])

    drawn = nats(np.random.default_rng(seed).integers(0, len(ids) - seq, windows))
    found = dict(loss=drawn.mean(), loss_se=drawn.std(ddof=1) / windows**0.5)
    out = {f"eval/validation/{name}": float(value) for name, value in found.items()}
    return out | {"eval/whole/loss": float(nats(np.arange(0, len(ids) - seq, seq)).mean())}


def last(rows: list[dict]) -> float:
    """The validation loss in the end, from the rows of a metrics.jsonl."""
    name = "eval/validation/loss"
    return next(row[name] for row in reversed(rows) if name in row)


config = Config(
    model=ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=328, vocab=258,
                      tied=True),
    data=DataConfig(sources={"shakespeare": Source(partial(
        published, path="../shared/data/tinyshakespeare.txt"))}, tokenizer="bytes", dev=0.0,
        test=0.0),
    phases=(Phase(steps=2_000, batch=12, seq=64),),
    schedule=Schedule(shape="linear", peak=4e-3, warmup=50, final=0.0),
    optimizer=muon,
    overlap=0,
    evals=(partial(validation, windows=2_000),),
    eval_every=500, save_every=500, keep=1,
    prompts=("ROMEO:\n",),
    sample_tokens=300,
)
adam = partial(adamw, b2=0.99)
slow = Schedule(shape="cosine", peak=1e-3, warmup=100, final=0.1)
study = Study(
    question="How far below nanoGPT's loss do its steps and parameters lead?",
    arms={"plain": replace(config, optimizer=partial(adam, base_width=0), schedule=slow),
          "adamw": replace(config, optimizer=adam, schedule=replace(config.schedule, peak=3e-3)),
          "muon": config},
    measures={"validation": last},
    quick={"phases.*.steps": 4, "model.embed": 32, "model.mlp": 32, "evals.0.windows": 20,
           "eval_every": 4, "sample_tokens": 4},
    claims=(
        Claim(says="Muon is ahead of nanoGPT's optimiser", arm="muon", measure="validation",
              below=0.0),
        Claim(says="and of AdamW at a higher rate", arm="muon", control="adamw",
              measure="validation", below=0.0),
    ),
    seeds=3,
)
