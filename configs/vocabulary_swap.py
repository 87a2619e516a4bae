"""A new tokenizer for an old model: what should the embeddings of the new pieces be?

The edit `swap_vocabulary`, for a phase of a run whose tokenizer is the new one and whose model comes from a
run with the old. Pieces that both tokenizers have keep their rows, bit for bit; the others begin as

    random    the table's draw
    mean      the mean of the old rows
    normal    draws of N(mean, scale x covariance) of the old rows
    hull      random convex combinations of old rows
    pieces    the mean of the old pieces that spell the new one

The last four lie in, or near, the convex hull of the old rows, which "An Empirical Comparison of Vocabulary
Expansion and Initialization Approaches for Language Models" (Mundra et al. 2024) finds enough to begin with;
its `scale` is 1e-5. An untied head is treated like the embedding. Compare by bits per byte only: the loss of
a token means another thing under another tokenizer.

The arms take the quickstart's model over to plain bytes by each of these, body and all trained on; `scratch`,
behind --arms, is a model of bytes that starts from nothing and takes no FLOPs of the quickstart's. All begin
from one and the same base, so what the seeds vary is the order of the data and the draws. No rows are copied:
every byte is a piece of the quickstart's tokenizer too, but one that its text never needed, untrained.

    python train.py                                                      first, once: makes runs/quickstart
    python train.py study configs/vocabulary_swap.py --seeds 3 --jobs 2  COST on two CPU cores
    python train.py configs/vocabulary_swap.py                           a longer run by hand, two minutes
"""
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data import Bytes, DataConfig, Source, Tokenizer, load_tokenizer, stdlib
from model import Context, Edited, Model, draw, flops_per_token, groups, table
from train import Config, Phase, Schedule, load_file


def piece_names(tokenizer: Tokenizer) -> list[str]:
    """The name of each piece; a byte is <0x..>, bos and eos are <s> and </s>, as SentencePiece has them."""
    if isinstance(tokenizer, Bytes):
        return [f"<0x{i:02X}>" for i in range(256)] + ["<s>", "</s>"]
    names = [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.vocab)]
    names[tokenizer.bos], names[tokenizer.eos] = "<s>", "</s>"
    return names


def spelling(tokenizer: Tokenizer, old: Tokenizer) -> np.ndarray:
    """[new, old] What share each old piece has in the spelling of each new one; a row sums to 1, or is 0."""
    share = np.zeros((tokenizer.vocab, old.vocab), np.float32)
    for i in range(tokenizer.vocab):
        for piece in (ids := old.encode(tokenizer.decode([i]))):
            share[i, piece] += 1 / len(ids)
    return share


def swap_vocabulary(model: Model, context: Context, old: str,
                    new: Literal["random", "mean", "normal", "hull", "pieces"] = "mean", scale: float = 1e-5,
                    among: int = 10, copy: bool = True) -> Edited:
    """Give the model the vocabulary of the run's tokenizer in place of that of the tokenizer file `old`.

    new: how a piece begins that the old tokenizer has not, as listed above; under "pieces" one without text
    begins as the mean. "hull" draws uniform weights (Dirichlet) on `among` old rows. copy: shared pieces keep
    their rows. Embeddings, and a head of their own, start their optimiser afresh; the body's goes on.
    Raises ValueError for a tokenizer that is not the model's.
    """
    before, tokenizer = load_tokenizer(old), context.tokenizer
    if before.vocab != model.config.vocab:
        raise ValueError(f"swap_vocabulary: old is {old!r}, of {before.vocab} pieces, but the model has "
                         f"{model.config.vocab}; allowed is the tokenizer that it was trained with")
    if new not in ("random", "mean", "normal", "hull", "pieces"):
        raise ValueError(f'swap_vocabulary: new is {new!r}, allowed are "random", "mean", "normal", "hull" '
                         'and "pieces"')
    config = replace(model.config, vocab=tokenizer.vocab)
    place = {name: i for i, name in enumerate(piece_names(before))}
    shared = np.array([place.get(name, -1) for name in piece_names(tokenizer)])
    share = spelling(tokenizer, before) if new == "pieces" else None

    def rows_for(name, param):
        """[new, embed] from the old rows [old, embed] of a parameter."""
        x = jnp.moveaxis(model.params[name], param.axes.index("vocab"), 0)
        key = jax.random.fold_in(context.key, "embed head".split().index(param.group))
        mean, n = jnp.mean(x, 0), config.vocab
        if new == "random":
            fresh = jnp.moveaxis(draw(name, param, context.key, x.dtype), param.axes.index("vocab"), 0)
        elif new == "mean":
            fresh = jnp.broadcast_to(mean, (n, x.shape[1]))
        elif new == "normal":
            cov = jnp.cov(x, rowvar=False)
            # What makes a singular covariance (fewer rows than columns) factor, at the size of its rounding.
            ridge = 1e-6 * jnp.trace(cov) / len(cov) * jnp.eye(len(cov), dtype=x.dtype)
            z = jax.random.normal(key, (n, len(cov)), x.dtype)
            fresh = mean + scale**0.5 * z @ jnp.linalg.cholesky(cov + ridge).T
        elif new == "hull":
            of, weights = jax.random.split(key)
            of = jax.random.randint(of, (n, among), 0, len(x))
            fresh = jnp.einsum("na,nad->nd", jax.random.dirichlet(
                weights, jnp.ones(among, x.dtype), (n,), x.dtype), x[of])
        else:
            silent = jnp.asarray(share.sum(1, keepdims=True) == 0)
            fresh = jnp.where(silent, mean, jnp.asarray(share, x.dtype) @ x)
        if copy:
            fresh = jnp.where(jnp.asarray(shared >= 0)[:, None], x[np.maximum(shared, 0)], fresh)
        return jnp.moveaxis(fresh.astype(x.dtype), 0, param.axes.index("vocab"))

    changed = {name: rows_for(name, p) for name, p in table(config).items() if "vocab" in p.axes}
    policy = dict.fromkeys({"embed", "head"} & set(groups(config)), "reset")
    return Edited(Model(config, model.params | changed), policy, preserves=False)


config = Config(
    init_from="runs/quickstart",
    data=DataConfig(sources={"stdlib": Source(stdlib)}, tokenizer="bytes"),
    phases=(Phase(steps=300, batch=8, seq=256, edits=(
        partial(swap_vocabulary, old="runs/quickstart/tokenizer.model", new="pieces"),)),),
    schedule=Schedule(peak=2e-3, warmup=20, decay=0.4),
    prompts=("def ",),
)

# ------------------------------------------------------------------------------------------------------ study

base = load_file(Path(__file__).with_name("quickstart.py")).config
last = replace(base.model, layers=4)  # what the quickstart ends as
plain = Phase(steps=120, batch=8, seq=128)


def swap(new: str) -> Config:
    """A run that takes the quickstart's model to bytes."""
    edit = partial(swap_vocabulary, old="runs/quickstart/tokenizer.model", new=new, copy=False)
    return replace(scratch, init_from=config.init_from, phases=(replace(plain, edits=(edit,)),))


def early(rows: list[dict]) -> float:
    """Bits per byte on dev at the first evaluation."""
    return next(row["eval/stdlib/bpb"] for row in rows if "eval/stdlib/bpb" in row)


scratch = Config(
    model=replace(last, vocab=0),
    data=replace(config.data, dev=0.02, test=0.02),  # parts of what the quickstart held out
    phases=(plain,),
    schedule=config.schedule,
    overlap=16,
    eval_every=24,
    eval_tokens=8_192,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
arms = {new: swap(new) for new in ("random", "mean", "normal", "hull", "pieces")} | {"scratch": scratch}
default_arms = "random", "mean", "hull", "pieces"
control = "random"
rates = 1e-3, 2e-3, 4e-3
teacher_flops = dict.fromkeys(("random", "mean", "normal", "hull", "pieces"), float(sum(
    p.steps * p.batch * p.seq * flops_per_token(shape, p.seq)
    for p, shape in zip(base.phases, (base.model, last), strict=True))))
measures = {"dev/first": early}
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "data.dev": 0.01, "data.test": 0.01,
         "eval_every": 2, "eval_tokens": 2_000, "sample_tokens": 4}
claims = (
    dict(says="the mean of old rows beats random rows", arm="mean", below=0.0),
    dict(says="combinations of old rows beat random rows", arm="hull", below=0.0),
    dict(says="the pieces that spell the new one beat random rows", arm="pieces", below=0.0),
    dict(says="... and the mean", arm="pieces", control="mean", below=0.0),
    dict(says="... and random rows at the first evaluation", arm="pieces", measure="dev/first", below=0.0),
    dict(says="draws about the mean do not beat the mean by 0.01", arm="normal", control="mean", above=-0.01),
    dict(says="the old body is worth something, whatever it cost", arm="random", control="scratch",
         below=0.0),
)
