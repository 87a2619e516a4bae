"""Vocabularies: a model gets that of another tokenizer, shared pieces keep their rows."""
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from lib.tokenizers import Bytes, Tokenizer, load_tokenizer
from model import Context, Edited, Model, Param, groups, table


def piece_names(tokenizer: Tokenizer) -> list[str]:
    """The name of each piece; a byte is <0x..>, bos is <s>, eos is </s>, as in SentencePiece."""
    if isinstance(tokenizer, Bytes):
        return [f"<0x{i:02X}>" for i in range(256)] + ["<s>", "</s>"]
    processor = tokenizer.processor
    name = getattr(processor, "id_to_piece", None) or processor.id_to_token
    names = [name(i) or f"<row {i}>" for i in range(tokenizer.vocab)]  # some rows have no token
    names[tokenizer.bos], names[tokenizer.eos] = "<s>", "</s>"
    return names


def shared(tokenizer: Tokenizer, old: Tokenizer) -> np.ndarray:
    """The old id of each piece of a tokenizer [vocab]; -1 where the old one does not have it."""
    place = {name: i for i, name in enumerate(piece_names(old))}
    return np.array([place.get(name, -1) for name in piece_names(tokenizer)])


def spelling(tokenizer: Tokenizer, old: Tokenizer) -> np.ndarray:
    """[new, old] The share of each old piece in the spelling of a new one; rows sum to 1 or 0."""
    share = np.zeros((tokenizer.vocab, old.vocab), np.float32)
    for i in range(tokenizer.vocab):
        ids = old.encode(tokenizer.decode([i]))
        for piece in ids:
            share[i, piece] += 1 / len(ids)
    return share


def old_tokenizer(model: Model, old: str) -> Tokenizer:
    """The tokenizer that a model was trained with, of the file `old`; ValueError for another."""
    before = load_tokenizer(old)
    if before.vocab != model.config.vocab:
        raise ValueError(
            f"old is {old!r}, of {before.vocab} pieces, but the model has {model.config.vocab}; "
            "allowed is the tokenizer that it was trained with"
        )
    return before


def with_vocabulary(
    model: Model,
    context: Context,
    before: Tokenizer,
    fresh: Callable[[str, Param, jax.Array], jax.Array],
    copy: bool = True,
) -> Edited:
    """The model with the vocabulary of the run's tokenizer in place of that of `before`.

    fresh: (name, new row of the table, old rows [old, embed]) -> new rows [new, embed]. copy:
    shared pieces keep their rows, bit for bit. Embeddings, and a head of their own, start their
    optimiser afresh; the body's goes on.
    """
    tokenizer = context.tokenizer
    config = replace(model.config, vocab=tokenizer.vocab)
    known = shared(tokenizer, before)
    keeps = jnp.asarray(known >= 0)[:, None]
    params = dict(model.params)
    for name, param in table(config).items():
        if "vocab" not in param.axes:
            continue
        axis = param.axes.index("vocab")
        x = jnp.moveaxis(params[name], axis, 0)
        new = fresh(name, param, x)
        if copy:
            new = jnp.where(keeps, x[np.maximum(known, 0)], new)
        params[name] = jnp.moveaxis(new.astype(x.dtype), 0, axis)
    policy = dict.fromkeys({"embed", "head"} & set(groups(config)), "reset")
    return Edited(Model(config, params), policy, preserves=False)
