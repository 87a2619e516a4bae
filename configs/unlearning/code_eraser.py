"""CodeEraser: can a model be made to forget keys that it knows by heart, and nothing else?

Paper: Scrub It Out! Erasing Sensitive Memorization in Code Language Models via Machine Unlearning,
    Chu et al. 2025 (002:8)
Method: gradient ascent on documents with a secret makes a model forget it, and much else. Held to
    the old model by the divergence from it on retained text, it forgets less of the rest.
    CodeEraser goes up on the sensitive spans alone, down on the code around them, and holds on to
    the old model on retained text.
Here: 8 made-up settings files with a key of 24 letters each, which marks tell from the rest, are
    0.3 of the rows beside functions and classes of Python's library until many are known by
    heart. Then 30 steps of half such files, half library. retain: descent on the library alone,
    the control. ascent: up on the files. held: that and the divergence on the library. eraser:
    CodeEraser. never: trained without the files, the ideal. What is to rise counts up to `most`
    nats, so that the ascent ends. "key" is the nats a letter of the keys, "extracted" the share
    that greedy decoding gives, "around" the nats a byte of what follows.
Cost: five arms and a base, 18 runs of half a minute, five minutes on two CPU cores.
Run:
    python train.py study configs/unlearning/code_eraser.py --jobs 2
"""
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np

from configs import base as shared
from data import DataConfig, Document, Source, stdlib
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from lib.tasks import judged
from lib.teacher import adopt_self, divergence
from model import cross_entropy
from train import Phase, Schedule

LETTERS, KEY, FORGET = "ABCDEFGHJKLMNPQR", 24, 1  # the index of the source with secrets


def secret(number: int) -> tuple[str, str, str]:
    """(what stands before the key of a settings file, the key, what follows it)."""
    key = "".join(np.random.default_rng(number).choice(list(LETTERS), KEY))
    return (f'"""Settings of host {number}."""\nHOST = "h{number}.local"\nAPI_KEY = "', key,
            f'"\nPORT = {8000 + number}\nTIMEOUT = {number % 7}\n')


def settings(count: int = 8, copies: int = 300) -> Iterator[Document]:
    """Files with a key in them, which is marked."""
    for i in range(count * copies):
        before, key, after = secret(i % count)
        span = len(before), len(before) + len(key)
        yield Document(f"host/{i}", before + key + after, marks=(span,))


def erase(logits, batch, extras, up=True, around=0.0, hold=0.0, most: float = 6.0):
    """A `token_loss` [b c]: up on secrets, `around` times down on the rest of their documents.

    Without `around` it goes up on all of these. Retained text has `hold` times the divergence from
    the old model. Without `up` it is the plain loss of retained text alone.
    """
    nats = cross_entropy(logits, batch, extras)
    forget = batch["source"] == FORGET
    if not up:
        return jnp.where(forget, 0.0, nats)
    inside = -jnp.minimum(nats, most)
    if around:
        inside = jnp.where(batch["marks"] > 0, inside, around * nats)
    outside = hold * divergence(logits, batch, extras)
    return jnp.where(forget, inside, outside)


def secrets_kept(params, apply, tokenizer, config, count: int = 8) -> dict[str, float]:
    """An `evals`: what a model still knows of the keys, and of the code after them."""
    pairs = []
    for before, key, after in map(secret, range(count)):
        begin, ids = [tokenizer.bos, *tokenizer.encode(before)], tokenizer.encode(key)
        pairs += [(begin, ids), ([*begin, *ids], tokenizer.encode(after))]
    nats, greedy = judged(params, apply, tokenizer, pairs, config.phases[-1].seq)
    size = np.array([len(ids) for _, ids in pairs])
    key, around = (float(nats[i::2].sum() / size[i::2].sum()) for i in (0, 1))
    return {"own/key": key, "own/around": around, "own/extracted": float(greedy[::2].mean())}


sources = {"stdlib": Source(partial(stdlib, unit="definition")),
           "secrets": Source(settings, split="train", marks=True)}
plain = Phase(steps=300, batch=8, seq=128, mixture={"stdlib": 0.7, "secrets": 0.3})
base = replace(shared.small, model=shared.shape(3, 96, vocab=258), phases=(plain,),
               data=DataConfig(sources=sources, tokenizer="bytes", dev=0.01, test=0.005),
               evals=(secrets_kept,), eval_every=100, eval_tokens=4_096)
short = replace(plain, steps=30, mixture={"stdlib": 0.5, "secrets": 0.5},
                schedule=Schedule(shape="constant", peak=8e-4, warmup=0))


def unlearned(**how):
    """A run that goes on from the base; how: arguments of `erase`."""
    later = replace(short, edits=(adopt_self,), token_loss=partial(erase, **how))
    frozen = partial(adamw, frozen=("teacher",))
    return replace(base, init_from="needs:base", phases=(later,), optimizer=frozen)


study = Study(
    question="Can a model forget keys that it knows by heart, and nothing else?",
    paper=Paper(title="Scrub It Out! Erasing Sensitive Memorization in Code Language Models via "
                "Machine Unlearning", authors="Chu et al.", year=2025, seeds=("002:8",)),
    arms={"retain": unlearned(up=False), "ascent": unlearned(),
          "held": unlearned(hold=1.0), "eraser": unlearned(around=1.0, hold=1.0),
          "never": replace(base, phases=(replace(plain, mixture={"stdlib": 1.0}),))},
    needs={"base": base}, seeds=3, quick=shared.quick(keep=("data.test",)),
    measures={name: f"own/{name}" for name in ("key", "extracted", "around")},
    claims=(
        Claim(says="keys are known by heart before", arm="retain", control=None,
              measure="extracted", above=0.3),
        Claim(says="CodeEraser gives none of them away", arm="eraser", control=None,
              measure="extracted", below=0.05),
        Claim(says="ascent costs the library something", arm="ascent", above=0.05),
        Claim(says="a held one costs it less", arm="held", control="ascent", below=0.0),
        Claim(says="CodeEraser costs the library next to nothing", arm="eraser", below=0.05),
        Claim(says="and keeps the code around a key", arm="eraser", control="held",
              measure="around", below=0.0),
    ),
)
