"""Lexinvariant models: can a model read without knowing any symbol beforehand?

Paper: Lexinvariant Language Models, Huang et al. 2023 (003:67)
Method: no embeddings are learnt. In each row each token id has a random Gaussian vector of its own,
    the same within the row and new in every other. It is what the model reads and, as the tied
    head, what it compares its states with. So what a token means must be read off the context, and
    text whose symbols are permuted looks the same.
Here: bytes of Python's library, rows of 256; the paper has 512 on the Pile, and larger models. The
    vectors have the deviation of our table, 1/sqrt(width). Held-out rows draw by their place in the
    batch. place/plain/i and place/cipher/i: nats a byte in the i-th quarter of 64 held-out rows,
    and of these with their bytes permuted. lookup: pairs of random bytes, key and value; then a key
    again, and the share of right values (chance 1/16). The paper's tasks are four times better.
Cost: 6 runs, 9 minutes on two CPU cores.
Run:
    python train.py study configs/forgetting/lexinvariant.py --jobs 2
    python train.py configs/forgetting/lexinvariant.py:lexinvariant     one arm by hand
"""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from lib.objectives import CAUSAL
from lib.sources import SPLITS, Document, split_of, stdlib
from lib.study import Claim, Paper, Study
from model import ModelConfig, rms_norm, stream
from train import Config

QUARTERS = range(4)


def vectors(batch, config: ModelConfig):
    """Each row's own vectors [b vocab embed], by its seed or, without one, its place."""
    rows = batch["tokens"].shape[0]
    seeds = batch["seeds"][:, 0] if "seeds" in batch else jnp.arange(rows)

    def draw(seed):
        shape = config.vocab, config.embed
        return jax.random.normal(jax.random.key(seed), shape, config.dtype) * config.embed**-0.5

    return jax.vmap(draw)(seeds)


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


def held_out_rows(config: Config, n: int) -> np.ndarray:
    """Ids [n seq + 1] of held-out text in bytes, each the beginning of a document."""
    seq, found = config.phases[-1].seq, []
    for document in stdlib():
        held = isinstance(document, Document) and split_of(
            document.group or document.path, config.data.dev, config.data.test)
        if held == SPLITS.index("test") and len(document.text) > 4 * seq:
            found.append(list(document.text.encode()[2 * seq:3 * seq + 1]))
    return np.array(found[:n], np.int32)


def nats(apply, params, ids) -> np.ndarray:
    """What each next id of rows [n t] costs [n t-1]."""
    logp = jax.nn.log_softmax(apply(params, ids[:, :-1]))
    return -np.take_along_axis(np.asarray(logp), ids[:, 1:, None], 2)[..., 0]


def by_place(params, apply, config: Config, n: int = 64) -> dict[str, float]:
    """Nats by quarter of the row, of held-out text and of its cipher."""
    ids, cipher = held_out_rows(config, n), np.random.default_rng(0).permutation(256)
    found = {}
    for name, rows in (("plain", ids), ("cipher", cipher[ids].astype(np.int32))):
        parts = np.array_split(nats(apply, params, rows), len(QUARTERS), axis=1)
        found |= {f"place/{name}/{i}": float(part.mean()) for i, part in enumerate(parts)}
    return found
