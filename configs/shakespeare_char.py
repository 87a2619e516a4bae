"""Tiny Shakespeare by characters, at nanoGPT's setting for a CPU: as many tokens and parameters, less loss.

TODO
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

import data
from configs.muon import muon
from data import DataConfig, Document, InputError, Source
from model import ModelConfig, adamw, nll
from train import Config, Phase, Schedule


def parts(path: str, share: float = 0.9) -> tuple[str, str]:
    """The first `share` of a text's characters, and the rest."""
    whole = next(data.text(path))
    if not isinstance(whole, Document) or not whole.text.isascii():
        raise InputError(f"source path {path!r} is no text of ASCII characters, which are one byte each")
    return whole.text[:int(share * len(whole.text))], whole.text[int(share * len(whole.text)):]


def beginning(path: str, share: float = 0.9) -> Iterator[Document]:
    """What is trained on, as one document; rows are cut from it end to end."""
    yield Document("beginning", parts(path, share)[0])


def validation(params, apply, config: Config, windows: int = 2_000, seed: int = 0) -> dict[str, float]:
    """Nats per character of the rest as nanoGPT takes them: rows as long as in training, from random starts,
    nothing before them, a prediction after each character. `loss_se` is by the draw of these windows;
    `whole` is the same of all of the rest, in rows end to end.
    """
    rest = parts(**config.data.sources["shakespeare"].documents.keywords)[1]
    seq, ids = config.phases[-1].seq, np.frombuffer(rest.encode(), np.uint8).astype(np.int32)

    def nats(starts: np.ndarray) -> np.ndarray:
        each = [ids[some[:, None] + np.arange(seq + 1)] for some in np.split(starts, range(250, len(starts), 250))]
        return np.concatenate([nll(apply(params, rows[:, :-1]), rows[:, 1:]).mean(1) for rows in each])

    drawn = nats(np.random.default_rng(seed).integers(0, len(ids) - seq, windows))
    found = dict(loss=drawn.mean(), loss_se=drawn.std(ddof=1) / windows**0.5, bpb=drawn.mean() / np.log(2))
    whole = nats(np.arange(0, len(ids) - seq, seq)).mean()
    return {f"eval/validation/{k}": float(v) for k, v in found.items()} | {"eval/whole/loss": float(whole)}


config = Config(
    model=ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=328, vocab=258),
    data=DataConfig(sources={"shakespeare": Source(partial(
        beginning, path="../shared/data/tinyshakespeare.txt"))}, tokenizer="bytes", dev=0.0, test=0.0),
    phases=(Phase(steps=2_000, batch=12, seq=64),),
    schedule=Schedule(shape="linear", peak=4e-3, warmup=50, final=0.0),
    optimizer=muon,
    overlap=0,
    evals=(partial(validation, windows=2_000),),
    eval_every=500,
    save_every=500,
    keep=1,
    prompts=("ROMEO:\n",),
    sample_tokens=300,
)
arms = {
    "muon": config,
    "adamw": replace(config, optimizer=adamw, schedule=replace(config.schedule, peak=3e-3)),
    "plain": replace(config, optimizer=partial(adamw, b2=0.99), schedule=Schedule(
        shape="cosine", peak=1e-3, warmup=100, final=0.1)),
}
