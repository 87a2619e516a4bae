"""Constrained word2vec: should text say which old embeddings a new piece is made of?

Paper: An Empirical Comparison of Vocabulary Expansion and Initialization Approaches for Language
    Models, Mundra et al. 2024 (003:2)
Method: the row of a new piece is a combination of old rows, softmax(A) E, so it stays in their
    convex hull. A is learnt by word2vec on text in the new pieces: skip-gram, where five negatives
    are drawn by frequency to the power 0.75, in which only A moves. An untied head has an A of its
    own. Then the model is trained as usual.
Here: as in vocabulary.py, a base of 512 pieces gets 2,048. A begins as zeros, so rows begin as the
    mean; the paper draws it, and factors it for LLaMA. Pairs are of windows of 5 in the next 64
    batches, of which frequent pieces are left out as in word2vec; 300 steps of 1,024 pairs, the
    FLOPs charged. The paper finds it ahead of random rows, and simpler ways in the hull as good.
Cost: 12 runs, 10 minutes on two CPU cores.
Run:
    python train.py study configs/forgetting/cw2v.py --jobs 2
"""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from configs import base as shared
from configs.forgetting.vocabulary import base, early, larger, swap, swap_vocabulary
from lib.study import Claim, Paper, Study
from lib.vocabulary import old_tokenizer, with_vocabulary
from lib.vocabulary import shared as shared_pieces
from model import Context, Edited, Model


def pairs_of(batches: list[dict], window: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """(center and context of each pair [pairs 2], count of each id) in segments of batches.

    A center of frequency f is kept with the probability sqrt(rate / f) (Mikolov et al. 2013).
    """
    tokens, segments = (np.concatenate([np.asarray(batch[name]) for batch in batches])
                        for name in ("tokens", "segments"))
    counts = np.bincount(tokens[segments > 0], minlength=tokens.max() + 1)
    frequency = np.maximum(counts, 1)[tokens] / counts.sum()
    kept = np.random.default_rng(0).random(tokens.shape) < np.sqrt(rate / frequency)
    found = []
    for apart in range(1, window + 1):
        one, two = np.s_[:, :-apart], np.s_[:, apart:]
        inside = (segments[one] == segments[two]) & (segments[one] > 0)
        for center, other in ((one, two), (two, one)):
            good = inside & kept[center]
            found.append(np.stack([tokens[center][good], tokens[other][good]], 1))
    return np.concatenate(found), counts


def combined(a, rows, known):
    """New rows [new embed]: old ones [old embed] of known pieces, else softmax(a) of them."""
    return jnp.where((known >= 0)[:, None], rows[known], jax.nn.softmax(a, -1) @ rows)


@partial(jax.jit, static_argnames=("steps", "size", "negatives"))
def learnt(rows: dict, known, pairs, counts, key, steps: int = 300, size: int = 1024,
           negatives: int = 5, lr: float = 0.1) -> dict:
    """A [new old] for old rows {"embed": [old embed]}, and "head" where that is another table."""
    adam, noise = optax.adam(lr), jnp.cumsum(counts**0.75)

    def loss(a, key):
        tables = {name: combined(a[name], x, known) for name, x in rows.items()}
        some, wrong = jax.random.split(key)
        center, other = pairs[jax.random.randint(some, (size,), 0, len(pairs))].T
        drawn = jax.random.uniform(wrong, (size, negatives)) * noise[-1]
        outer, inner = tables.get("head", tables["embed"]), tables["embed"][center]
        right = jnp.sum(inner * outer[other], 1)
        others = jnp.einsum("bd,bnd->bn", inner, outer[jnp.searchsorted(noise, drawn)])
        return -jnp.mean(jax.nn.log_sigmoid(right) + jax.nn.log_sigmoid(-others).sum(1))

    def step(i, carry):
        a, state = carry
        update, state = adam.update(jax.grad(loss)(a, jax.random.fold_in(key, i)), state)
        return optax.apply_updates(a, update), state

    a = {name: jnp.zeros((len(known), len(x))) for name, x in rows.items()}
    return lax.fori_loop(0, steps, step, (a, adam.init(a)))[0]


def constrained(model: Model, context: Context, old: str, batches: int = 64, steps: int = 300,
                window: int = 5, rate: float = 1e-3) -> Edited:
    """An edit: the vocabulary of the run's tokenizer, whose new rows constrained word2vec finds."""
    before, vocab = old_tokenizer(model, old), context.tokenizer.vocab
    pairs, counts = pairs_of(context.batches(batches), window, rate)
    known = jnp.asarray(shared_pieces(context.tokenizer, before))
    rows = {"embed": model.params["embed"]}
    if not model.config.tied:
        rows["head"] = model.params["head"].T
    counts = jnp.asarray(np.pad(counts, (0, vocab - len(counts))), jnp.float32)
    a = learnt(rows, known, jnp.asarray(pairs), counts, context.key, steps)
    return with_vocabulary(model, context, before,
                           lambda name, param, x: combined(a[name], x, known))


arms = {new: swap(partial(swap_vocabulary, old="needs:base/tokenizer.model", new=new))
        for new in ("mean", "random", "pieces")}
arms["cw2v"] = swap(partial(constrained, old="needs:base/tokenizer.model"))
study = Study(
    question="Should text say which old embeddings a new piece is made of?",
    paper=Paper(title="An Empirical Comparison of Vocabulary Expansion and Initialization "
                "Approaches for Language Models", authors="Mundra et al.", year=2024,
                seeds=("003:2",)),
    needs={"base": base, "larger": larger},
    arms=arms,
    teacher_flops={"cw2v": 300.0 * 2 * 6 * 2048 * 512 * 128},  # embeddings, and a head of its own
    measures={"dev/first": early},
    quick=shared.quick(keep=("model.vocab", "data.tokenizer")),
    claims=(
        Claim(says="it beats random rows", arm="cw2v", control="random", below=0.0),
        Claim(says="and the mean of old rows", arm="cw2v", below=0.0),
        Claim(says="and the mean after 30 steps", arm="cw2v", measure="dev/first", below=0.0),
        Claim(says="but not the pieces that spell it", arm="cw2v", control="pieces", above=0.0),
    ), seeds=3)
