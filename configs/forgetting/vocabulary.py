"""Vocabulary: what should the embeddings of new pieces be when an old model gets another tokenizer?

Paper: An Empirical Comparison of Vocabulary Expansion and Initialization Approaches for Language
    Models, Mundra et al. 2024 (003:2)
Method: pieces that both tokenizers have keep their rows, bit for bit. The others begin as `new`
    says: random, the table's draw. mean, of the old rows. normal, draws of N(mean, scale x
    covariance) of these, at the paper's scale. hull, random convex combinations of them. pieces,
    the mean of the old pieces that spell the new one. The last four lie in, or near, the convex
    hull of the old rows, which the paper finds enough to begin with.
Here: a base of 512 pieces gets the quickstart's 2,048, three quarters of them new, and trains on
    for equal steps. scratch: 2,048 pieces and those steps from nothing. FLOPs include the base's
    but in `scratch`. All begin from one base, so seeds vary the order of the data and the draws.
    Compare by bits per byte: a token's loss means another thing under another tokenizer. Left out:
    constrained word2vec. FILE alone takes the quickstart's model to plain bytes. Where no piece is
    shared, "mean" begins with all rows alike, and learns next to nothing while they are.
Cost: some 30 runs, ten to twenty minutes on two CPU cores.
Run: in one directory,
    python train.py                                                      first: runs/quickstart
    python train.py configs/forgetting/vocabulary.py:base                then: runs/vocabulary-base
    python train.py study configs/forgetting/vocabulary.py --jobs 2
    python train.py configs/forgetting/vocabulary.py                     to bytes, two minutes
"""
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from configs import base as shared
from data import DataConfig, Source, stdlib
from lib.study import Claim, Paper, Study
from lib.tokenizers import Bytes, Tokenizer, load_tokenizer
from model import Context, Edited, Model, draw, groups, table
from train import Config, Phase, Schedule

WAYS = "random", "mean", "normal", "hull", "pieces"


def piece_names(tokenizer: Tokenizer) -> list[str]:
    """The name of each piece; a byte is <0x..>, bos is <s>, eos is </s>, as in SentencePiece."""
    if isinstance(tokenizer, Bytes):
        return [f"<0x{i:02X}>" for i in range(256)] + ["<s>", "</s>"]
    processor = tokenizer.processor
    name = getattr(processor, "id_to_piece", None) or processor.id_to_token
    names = [name(i) or f"<row {i}>" for i in range(tokenizer.vocab)]  # some rows have no token
    names[tokenizer.bos], names[tokenizer.eos] = "<s>", "</s>"
    return names


def spelling(tokenizer: Tokenizer, old: Tokenizer) -> np.ndarray:
    """[new, old] The share of each old piece in the spelling of a new one; rows sum to 1 or 0."""
    share = np.zeros((tokenizer.vocab, old.vocab), np.float32)
    for i in range(tokenizer.vocab):
        ids = old.encode(tokenizer.decode([i]))
        for piece in ids:
            share[i, piece] += 1 / len(ids)
    return share


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


def swap_vocabulary(model: Model, context: Context, old: str,
                    new: Literal["random", "mean", "normal", "hull", "pieces"] = "mean",
                    scale: float = 1e-5, among: int = 10, copy: bool = True) -> Edited:
    """Give the model the vocabulary of the run's tokenizer in place of that of the file `old`.

    new: how a piece begins that the old tokenizer has not, as listed above; under "pieces" one
    without text begins as the mean. "hull" draws uniform weights (Dirichlet) on `among` old rows.
    copy: shared pieces keep their rows. Embeddings, and a head of their own, start their optimiser
    afresh; the body's goes on. Raises ValueError for a tokenizer that is not the model's.
    """
    before, tokenizer = load_tokenizer(old), context.tokenizer
    if before.vocab != model.config.vocab:
        raise ValueError(f"swap_vocabulary: old is {old!r}, of {before.vocab} pieces, but the "
                         f"model has {model.config.vocab}; allowed is the tokenizer that it was "
                         "trained with")
    if new not in WAYS:
        raise ValueError(f"swap_vocabulary: new is {new!r}, allowed are {', '.join(WAYS)}")
    config = replace(model.config, vocab=tokenizer.vocab)
    place = {name: i for i, name in enumerate(piece_names(before))}
    known = np.array([place.get(name, -1) for name in piece_names(tokenizer)])
    share = spelling(tokenizer, before) if new == "pieces" else None

    def rows_for(name, param):
        """A parameter with new rows along its vocabulary."""
        axis = param.axes.index("vocab")
        x = jnp.moveaxis(model.params[name], axis, 0)
        key = jax.random.fold_in(context.key, "embed head".split().index(param.group))
        if new == "random":
            fresh = jnp.moveaxis(draw(name, param, context.key, x.dtype), axis, 0)
        else:
            fresh = fresh_rows(new, x, config.vocab, key, scale, among, share)
        if copy:
            fresh = jnp.where(jnp.asarray(known >= 0)[:, None], x[np.maximum(known, 0)], fresh)
        return jnp.moveaxis(fresh.astype(x.dtype), 0, axis)

    changed = {name: rows_for(name, p) for name, p in table(config).items() if "vocab" in p.axes}
    policy = dict.fromkeys({"embed", "head"} & set(groups(config)), "reset")
    return Edited(Model(config, model.params | changed), policy, preserves=False)


def early(rows: list[dict]) -> float:
    """Bits per byte on dev at the first evaluation."""
    return next(row["eval/stdlib/bpb"] for row in rows if "eval/stdlib/bpb" in row)


QUICKSTART, BASE = "runs/quickstart/tokenizer.model", "runs/vocabulary-base"
base = replace(shared.small, model=shared.shape(vocab=512), eval_every=60)
scratch = replace(
    shared.scaled(base, 150), model=shared.shape(vocab=0), eval_every=30,
    schedule=replace(base.schedule, peak=4e-3), data=replace(base.data, tokenizer=QUICKSTART))


def swap(new: str) -> Config:
    """A run that gives the base the quickstart's vocabulary."""
    edit = partial(swap_vocabulary, old=f"{BASE}/tokenizer.model", new=new)
    return replace(scratch, init_from=BASE, phases=(replace(scratch.phases[0], edits=(edit,)),))


swaps = {new: swap(new) for new in WAYS}
study = Study(
    question="What should the embeddings of new pieces be when an old model gets a new tokenizer?",
    paper=Paper(title="An Empirical Comparison of Vocabulary Expansion and Initialization "
                "Approaches for Language Models", authors="Mundra et al.", year=2024,
                seeds=("003:2",)),
    arms=swaps | {"scratch": scratch, "base": base},
    default_arms=("random", "mean", "hull", "pieces"),
    peak_lrs=shared.RATES,
    teacher_flops=dict.fromkeys(swaps, float(shared.flops(base.model, base.phases[0]))),
    measures={"dev/first": early},
    quick=shared.quick(keep=(  # the base's shape stays
        "model.embed", "model.mlp", "model.vocab", "model.unroll", "data.tokenizer")),
    claims=(
        Claim(says="the mean of old rows beats random rows", arm="mean", below=0.0),
        Claim(says="combinations of old rows beat random rows", arm="hull", below=0.0),
        Claim(says="the pieces that spell a new one beat random rows", arm="pieces", below=0.0),
        Claim(says="and the mean", arm="pieces", control="mean", below=0.0),
        Claim(says="and random rows after 30 steps", arm="pieces", measure="dev/first", below=0.0),
        Claim(says="draws about the mean do not beat the mean by 0.01", arm="normal",
              control="mean", above=-0.01),
        Claim(says="the base is worth something", arm="random", control="scratch", below=0.0),
    ),
    seeds=3,
)
# The bytes among its pieces are hardly trained, as it spells with others: they are not copied.
to_bytes = partial(swap_vocabulary, old=QUICKSTART, new="pieces", copy=False)
config = Config(
    init_from="runs/quickstart",
    data=DataConfig(sources={"stdlib": Source(stdlib)}, tokenizer="bytes"),
    phases=(Phase(steps=300, batch=8, seq=256, edits=(to_bytes,)),),
    schedule=Schedule(peak=2e-3, warmup=20, decay=0.4),
    prompts=("def ",),
)
