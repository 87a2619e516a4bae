"""Lexinvariant models: can a model read without knowing any symbol beforehand?

Paper: Lexinvariant Language Models, Huang et al. 2023 (003:67)
Method: no embeddings are learnt. In each row each token id has a random Gaussian vector of its own,
    new in every other row. It is what the model reads and, as the tied head, what it compares its
    states with. So what a token means must be read off the context.
Here: bytes of Python's library in rows of 128; the paper has 512 on the Pile, and larger models.
    Vectors have the deviation of a tied table, 1/sqrt(width); held-out rows draw by place in the
    batch. cipher: the same with permuted ASCII characters; nobody trains on it. place/i: loss of
    new batches in the i-th quarter of 128 positions of a text. lookup: 16 pairs of random bytes, a
    key again; the share of right values, by a guess 1/16. So few steps teach which bytes are used.
Cost: 6 runs, 9 minutes on two CPU cores.
Run:
    python train.py study configs/forgetting/lexinvariant.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from configs.forgetting.active_forgetting import permuted
from data import Source, stdlib
from lib.objectives import CAUSAL
from lib.study import Claim, Paper, Study
from model import ModelConfig, rms_norm, stream, weighted_mean
from train import Phase


def vectors(batch, config: ModelConfig):
    """Each row's own vectors [b vocab embed], by its seed or, without one, its place."""
    places = jnp.arange(batch["tokens"].shape[0])[:, None]
    keys = jax.vmap(jax.random.key)(batch.get("seeds", places)[:, 0])
    shape = config.vocab, config.embed
    return jax.vmap(lambda key: jax.random.normal(key, shape, config.dtype))(keys) / shape[1]**0.5


def bodies(config: ModelConfig, rows: dict) -> dict:
    """`rows`: all but those along the vocabulary."""
    return {name: row for name, row in rows.items() if "vocab" not in row.axes}


def looked_up(params, batch, mask, config: ModelConfig):
    """A `forward` from each row's own vectors."""
    x = jnp.take_along_axis(vectors(batch, config), batch["tokens"][..., None], 1)
    x, _ = stream(params, x, batch, mask, config)
    return rms_norm(x, params["norm"], config.norm_eps)


def compared(params, states, batch, config: ModelConfig):
    """`outputs`: products of states with each row's own vectors."""
    own = vectors(batch, config)
    return jnp.einsum("btd,bvd->btv", states, own, preferred_element_type=jnp.float32)


def seeded(row: dict, rng: np.random.Generator) -> tuple[dict, dict]:
    """An objective: a seed of the row's vectors, at each position, as the loss takes chunks."""
    seed = rng.integers(2**31, dtype=np.int32)
    return row | {"seeds": np.full(len(row["tokens"]), seed)}, CAUSAL


seeded.masks = (CAUSAL,)


def by_place(losses, batch):
    """A `reduce`: the weighted mean, and that of each quarter of the positions in a segment."""
    quarter, found = jnp.minimum(batch["positions"] * 4 // losses.shape[1], 3), {}
    for i in range(4):
        weights = batch["weights"] * (quarter == i)
        found[f"place/{i}"] = jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1)
    return weighted_mean(losses, batch)[0], found


def lookup(params, apply, rows: int = 256, pairs: int = 16) -> dict[str, float]:
    """The share of rows of random pairs at whose end a key's value is the likeliest byte."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(np.arange(32, 127))[:2 * pairs] for _ in range(rows)])
    asked = rng.integers(pairs, size=rows)[:, None]
    key, value = (np.take_along_axis(ids[:, i::2], asked, 1) for i in range(2))
    logits = apply(params, np.concatenate([ids, key], 1))[:, -1]
    return {"lookup": float(np.mean(np.argmax(logits, -1) == value[:, 0]))}


def drop(rows: list[dict]) -> float:
    """By how many nats the last quarter of a text is easier than the first, in the last steps."""
    found = [row["place/0"] - row["place/3"] for row in rows if "place/0" in row]
    return float(np.mean(found[-max(1, len(found) // 5):]))


def ciphered(rows: list[dict]) -> float:
    """What permuting its characters adds to held-out text, in bits per byte, at the end."""
    last = [row for row in rows if "eval/cipher/bpb" in row][-1]
    return last["eval/cipher/bpb"] - last["eval/stdlib/bpb"]


phase = Phase(steps=1_200, batch=8, seq=128, mixture={"stdlib": 1.0})
sources = {"stdlib": Source(partial(stdlib, unit="definition")),
           "cipher": Source(partial(permuted, seed=0))}
plain = replace(
    base.small, model=base.shape(3, 96, 0), phases=(phase,), reduce=by_place, evals=(lookup,),
    eval_every=300, schedule=replace(base.small.schedule, peak=4e-3),
    data=replace(base.small.data, sources=sources, tokenizer="bytes", test=0.01), prompts=())
own = replace(plain.model, rows=bodies, forward=looked_up, outputs=compared)
claim = partial(Claim, arm="lexinvariant")
lexinvariant = replace(plain, model=own, phases=(replace(phase, objective=seeded),))
study = Study(
    question="Can a model read without knowing any symbol beforehand?",
    paper=Paper(title="Lexinvariant Language Models", authors="Huang et al.", year=2023,
                seeds=("003:67",)),
    arms={"plain": plain, "lexinvariant": lexinvariant},
    measures={"ciphered": ciphered, "drop": drop}, quick=base.quick(),
    claims=(
        claim(says="it is behind on text", measure="eval/stdlib.test/bpb", above=0.0),
        claim(says="ahead by a bit on a cipher", measure="eval/cipher.test/bpb", below=-1.0),
        claim(says="a cipher costs it less by a bit", measure="ciphered", below=-1.0),
        claim(says="its loss falls further within a row", measure="drop", above=0.0),
        claim(says="it looks up more new pairs, by over 1 in 16", measure="lookup", above=1 / 16),
    ), seeds=3)
