"""Vocabulary: what should the embeddings of new pieces be when an old model gets another tokenizer?

Paper: An Empirical Comparison of Vocabulary Expansion and Initialization Approaches for Language
    Models, Mundra et al. 2024 (003:2)
Method: pieces that both tokenizers have keep their rows, bit for bit. The others begin as `new`
    says: random, the table's draw. mean, of the old rows. normal, draws of N(mean, scale x
    covariance) of these, at the paper's scale. hull, random convex combinations of them. pieces,
    the mean of the old pieces that spell the new one. The last four lie in, or near, the convex
    hull of the old rows, which the paper finds enough to begin with. Here mean and hull are behind
    random.
Here: a base of 512 pieces gets 2,048, three quarters of them new, and trains on for equal steps.
    scratch: 2,048 pieces and those steps from nothing. FLOPs include the base's but in `scratch`.
    Compare by bits per byte: a token's loss means another thing under another tokenizer. The
    paper's own way, constrained word2vec, is in cw2v.py. The rate is that of cw2v.
Cost: 24 runs, bases among them, about five minutes on two CPU cores, an estimate.
Run:
    python train.py study configs/forgetting/vocabulary.py --jobs 2
"""
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from configs import base as shared
from lib.edits import check_options
from lib.study import Claim, Paper, Study
from lib.vocabulary import old_tokenizer, spelling, with_vocabulary
from model import Context, Edited, Model, draw
from train import Config

WAYS = "random", "mean", "normal", "hull", "pieces"


def fresh_rows(new: str, x, n: int, key, scale: float, among: int, share):
    """[n, embed] rows for new pieces from the old ones x [old, embed]; `new` is not "random"."""
    mean = jnp.mean(x, 0)
    if new == "mean":
        return jnp.broadcast_to(mean, (n, x.shape[1]))
    if new == "normal":
        cov = jnp.cov(x, rowvar=False)
        # With this a singular covariance (fewer rows than columns) factors too.
        ridge = 1e-6 * jnp.trace(cov) / len(cov) * jnp.eye(len(cov), dtype=x.dtype)
        z = jax.random.normal(key, (n, len(cov)), x.dtype)
        return mean + scale**0.5 * z @ jnp.linalg.cholesky(cov + ridge).T
    if new == "hull":
        chosen, mixed = jax.random.split(key)
        chosen = jax.random.randint(chosen, (n, among), 0, len(x))
        mixed = jax.random.dirichlet(mixed, jnp.ones(among, x.dtype), (n,), x.dtype)
        return jnp.einsum("na,nad->nd", mixed, x[chosen])
    silent = jnp.asarray(share.sum(1, keepdims=True) == 0)
    return jnp.where(silent, mean, jnp.asarray(share, x.dtype) @ x)


def swap_vocabulary(model: Model, context: Context, old: str, new: Literal[
        "random", "mean", "normal", "hull", "pieces"] = "mean", scale: float = 1e-5,
        among: int = 10, copy: bool = True) -> Edited:
    """Give the model the vocabulary of the run's tokenizer in place of that of the file `old`.

    new: how a piece begins that the old tokenizer has not, as listed above; under "pieces" one
    without text begins as the mean. "hull" draws uniform weights (Dirichlet) on `among` old rows.
    copy: shared pieces keep their rows. Raises ValueError for a tokenizer that is not the model's.
    """
    check_options(swap_vocabulary, new=new)
    before, tokenizer = old_tokenizer(model, old), context.tokenizer
    share = spelling(tokenizer, before) if new == "pieces" else None

    def fresh(name, param, x):
        key = jax.random.fold_in(context.key, "embed head".split().index(param.group))
        if new == "random":
            drawn = draw(name, param, context.key, x.dtype)
            return jnp.moveaxis(drawn, param.axes.index("vocab"), 0)
        return fresh_rows(new, x, tokenizer.vocab, key, scale, among, share)

    return with_vocabulary(model, context, before, fresh, copy)


def early(rows: list[dict]) -> float:
    """Bits per byte on dev at the first evaluation."""
    return next(row["eval/stdlib/bpb"] for row in rows if "eval/stdlib/bpb" in row)


TOKENIZER = "needs:larger/tokenizer.model"
base = replace(shared.small, model=shared.shape(vocab=512), eval_every=60)
larger = shared.scaled(replace(shared.small, model=shared.shape(vocab=2048)), 1)
scratch = replace(
    shared.scaled(base, 150), model=shared.shape(vocab=0), eval_every=30,
    schedule=replace(base.schedule, peak=4e-3), data=replace(base.data, tokenizer=TOKENIZER))


def swap(edit) -> Config:
    """A run that gives the base another vocabulary by an edit."""
    first = replace(scratch.phases[0], edits=(edit,))
    return replace(scratch, init_from="needs:base", phases=(first,))


swaps = {new: swap(partial(swap_vocabulary, old="needs:base/tokenizer.model", new=new))
         for new in WAYS}
study = Study(
    question="What should the embeddings of new pieces be when an old model gets a new tokenizer?",
    paper=Paper(title="An Empirical Comparison of Vocabulary Expansion and Initialization "
                "Approaches for Language Models", authors="Mundra et al.", year=2024,
                seeds=("003:2",)),
    needs={"base": base, "larger": larger},
    arms=swaps | {"scratch": scratch},
    measures={"dev/first": early},
    quick=shared.quick(keep=("model.vocab", "data.tokenizer")),
    claims=(
        Claim(says="the mean of old rows beats random rows", arm="mean", below=0.0),
        Claim(says="combinations of old rows beat random rows", arm="hull", below=0.0),
        Claim(says="the pieces that spell a new one beat random rows", arm="pieces", below=0.0),
        Claim(says="and the mean", arm="pieces", control="mean", below=0.0),
        Claim(says="and random rows after 30 steps", arm="pieces", measure="dev/first", below=0.0),
        Claim(says="draws about the mean beat it by 0.01 at most", arm="normal", control="mean",
              above=-0.01),
        Claim(says="nor are they behind it by more", arm="normal", control="mean", below=0.01),
        Claim(says="the base is worth something", arm="random", control="scratch", below=0.0),
    ), seeds=3)
