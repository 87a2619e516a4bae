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

The study: a base of 512 pieces gets the quickstart's 2,048, three quarters of them new, in each of these
ways, and all of it trains on for equal steps; `normal`, and `scratch` with 2,048 pieces and those steps from
nothing, are behind --arms. FLOPs include the base's but in `scratch`. All begin from one and the same base,
so what the seeds vary is the order of the data and the draws. `config` is another run: it takes the
quickstart's model to plain bytes.

    python train.py                                                      first, once: runs/quickstart
    python train.py configs/vocabulary_swap.py:base                      then, once: runs/vocabulary_swap-base
    python train.py study configs/vocabulary_swap.py --seeds 3 --jobs 2  about ten minutes on two CPU cores
    python train.py configs/vocabulary_swap.py                           to bytes, two minutes

Run these in one directory. Where no piece is shared and copied, as from pieces to bytes, "mean" begins with
all rows alike, and learns next to nothing while they are.
"""
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data import DataConfig, Source, stdlib
from lib.schedule import Schedule
from lib.tokenizers import Bytes, Tokenizer, load_tokenizer
from model import Context, Edited, Model, ModelConfig, draw, flops_per_token, groups, table
from train import Config, Phase


def piece_names(tokenizer: Tokenizer) -> list[str]:
    """The name of each piece; a byte is <0x..>, bos and eos are <s> and </s>, as SentencePiece has them."""
    if isinstance(tokenizer, Bytes):
        return [f"<0x{i:02X}>" for i in range(256)] + ["<s>", "</s>"]
    name = getattr(tokenizer.processor, "id_to_piece", None) or tokenizer.processor.id_to_token
    names = [name(i) or f"<row {i}>" for i in range(tokenizer.vocab)]  # there may be rows without a token
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
        partial(swap_vocabulary, old="runs/quickstart/tokenizer.model", new="pieces",
                copy=False),)),),  # the bytes among its pieces are hardly trained: it spells with others
    schedule=Schedule(peak=2e-3, warmup=20, decay=0.4),
    prompts=("def ",),
)

# ------------------------------------------------------------------------------------------------------ study

BASE = "runs/vocabulary_swap-base"
plain = Phase(steps=150, batch=8, seq=128)
base = Config(
    model=ModelConfig(layers=4, embed=128, heads=4, kv_heads=4, head_dim=32, mlp=344, vocab=512),
    data=DataConfig(sources={"stdlib": Source(stdlib)}, dev=0.03, test=0.03, shard_tokens=1_048_576),
    phases=(replace(plain, steps=300),),
    schedule=Schedule(shape="wsd", peak=8e-3, warmup=20, decay=0.4, final=0.05),
    overlap=16,
    eval_every=60,
    eval_tokens=16_384,
    keep=1,
    prompts=("def ",),
    sample_tokens=64,
)
scratch = replace(
    base, model=replace(base.model, vocab=0), phases=(plain,), schedule=replace(base.schedule, peak=4e-3),
    data=replace(base.data, tokenizer="runs/quickstart/tokenizer.model"), eval_every=30)


def swap(new: str) -> Config:
    """A run that gives the base the quickstart's vocabulary."""
    edit = partial(swap_vocabulary, old=f"{BASE}/tokenizer.model", new=new)
    return replace(scratch, init_from=BASE, phases=(replace(plain, edits=(edit,)),))


def early(rows: list[dict]) -> float:
    """Bits per byte on dev at the first evaluation."""
    return next(row["eval/stdlib/bpb"] for row in rows if "eval/stdlib/bpb" in row)


swaps = {new: swap(new) for new in ("random", "mean", "normal", "hull", "pieces")}
arms = swaps | {"scratch": scratch, "base": base}
default_arms = "random", "mean", "hull", "pieces"
control = "random"
rates = 2e-3, 4e-3, 8e-3
teacher_flops = dict.fromkeys(swaps, float(
    base.phases[0].steps * plain.batch * plain.seq * flops_per_token(base.model, plain.seq)))
measures = {"dev/first": early}
quick = {"phases.*.steps": 4, "phases.*.seq": 64, "overlap": 8, "data.dev": 0.01, "data.test": 0.01,
         "eval_every": 2, "eval_tokens": 2_000, "sample_tokens": 4}  # the base's shape stays
claims = (
    dict(says="the mean of old rows beats random rows", arm="mean", below=0.0),
    dict(says="combinations of old rows beat random rows", arm="hull", below=0.0),
    dict(says="the pieces that spell the new one beat random rows", arm="pieces", below=0.0),
    dict(says="... and the mean", arm="pieces", control="mean", below=0.0),
    dict(says="... and random rows after 30 steps", arm="pieces", measure="dev/first", below=0.0),
    dict(says="draws about the mean do not beat the mean by 0.01", arm="normal", control="mean", above=-0.01),
    dict(says="the base is worth something, whatever it costs", arm="random", control="scratch", below=0.0),
)
