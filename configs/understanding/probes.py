"""AST-Probe: do the states of a model of code hold the syntax tree?

Paper: AST-Probe: Recovering abstract syntax trees from hidden representations of pre-trained
    language models, Hernandez Lopez et al. 2022 (003:19)
Method: for each block, states of a program's leaves are projected to few dimensions so that squared
    distances of neighbouring leaves there rank as what separates these in the syntax tree.
Here: definitions of Python's library, 255 bytes of each. Leaves hold no other node; states are
    means over their bytes, distances of neighbours the edges between. Rank 8 and a bias fit on half
    of 400 held-out texts, by absolute errors. tree/i: rank correlation on the others; middle: of
    the best inner block of 3, less that of the better end; seeds differ by .14. control: distances
    by the leaves' texts (Hewitt & Liang 2019). Left out: the loss of ranks, labels, both's trees.
Cost: 6 runs, 3 minutes on two CPU cores.
Run:
    python train.py study configs/understanding/probes.py --jobs 2
"""
import ast
import itertools
import os
import zlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from scipy.stats import spearmanr

from configs import base
from data import Source, stdlib
from lib.probe import over_spans, states
from lib.study import Claim, Paper, Study
from train import Config, Schedule


def leaves(text: bytes) -> list[tuple[int, int, tuple[int, ...]]]:
    """(begin, end, path from the root) of the leaves of a program's tree, in order, in bytes."""
    starts, found = np.cumsum([0, *map(len, text.splitlines(keepends=True))]).tolist(), []

    def visit(node, path) -> bool:
        inner = [] if isinstance(node, ast.JoinedStr) else ast.iter_child_nodes(node)
        below = [visit(child, (*path, i)) for i, child in enumerate(inner)]
        if hasattr(node, "lineno") and not any(below):
            begin = starts[node.lineno - 1] + node.col_offset
            found.append((begin, starts[node.end_lineno - 1] + node.end_col_offset, path))
        return hasattr(node, "lineno") or any(below)

    visit(ast.parse(text), ())
    return sorted(found)


def distance(one: tuple, other: tuple) -> int:
    """Edges between two nodes of a tree, by their paths from the root."""
    return len(one) + len(other) - 2 * len(os.path.commonprefix([one, other]))


def neighbours(texts, n: int, seq: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [n seq]; row, bytes of two leaves, their distance, hash of their texts [pairs 7])."""
    ids, found = [], []
    for row, text in enumerate(itertools.islice(texts, n)):
        own = [leaf for leaf in leaves(text) if leaf[1] < seq]
        for one, two in itertools.pairwise(own):
            both = zlib.crc32(text[slice(*one[:2])] + b" " + text[slice(*two[:2])])
            found.append((row, *one[:2], *two[:2], distance(one[2], two[2]), both))
        ids.append([256, *text[:seq - 1], *[0] * (seq - 1 - len(text))])
    return np.array(ids, np.int32), np.array(found)


@partial(jax.jit, static_argnames=("rank", "steps"))
def projected(x, y, seen, rank: int = 8, steps: int = 300, decay: float = 0.1):
    """What squared norms of x [n d], projected to a rank, say of y [n] fitted where `seen` [n]."""
    x, adam = x / jnp.sqrt(jnp.mean(x**2)), optax.adam(1e-2)

    def said(probe):
        return probe["bias"] + jnp.sum((x @ probe["w"])**2, 1)

    def loss(probe):
        return jnp.mean(jnp.abs(said(probe) - y), where=seen) + decay * jnp.sum(probe["w"]**2)

    def step(_, carry):
        update, state = adam.update(jax.grad(loss)(carry[0]), carry[1])
        return optax.apply_updates(carry[0], update), state

    w = jax.random.normal(jax.random.key(0), (x.shape[1], rank))
    probe = {"w": w / x.shape[1], "bias": jnp.mean(y)}
    return said(lax.fori_loop(0, steps, step, (probe, adam.init(probe)))[0])


def syntax(params, apply, config: Config, held_out, n: int = 400) -> dict[str, float]:
    """Rank correlation of distances, in the tree and of control, on half of n functions."""
    ids, pairs = neighbours(held_out("stdlib", "test").texts(), n, config.phases[0].seq)
    x, seen = np.asarray(states(params, ids, config.model)), pairs[:, 0] < len(ids) // 2
    labels, found = {"tree": pairs[:, 5], "control": pairs[pairs[:, 6] % len(pairs), 5]}, {}
    one, two = (over_spans(x, pairs[:, [0, i, i + 1]] + [0, 1, 1]) for i in (1, 3))
    for block, moved in enumerate(two - one):
        for name, y in labels.items():
            said = np.asarray(projected(moved, y.astype(np.float32), seen))
            found[f"{name}/{block}"] = float(spearmanr(y[~seen], said[~seen])[0])
    tree, control = ([found[f"{name}/{block}"] for block in range(len(x))] for name in labels)
    return found | {"tree/best": max(tree), "tree/middle": max(tree[1:-1]) - max(tree[0], tree[-1]),
                    "tree/selective": max(tree) - control[int(np.argmax(tree))]}


phase = replace(base.small.phases[0], steps=400, seq=256)
data = replace(base.small.data, sources={"stdlib": Source(partial(stdlib, unit="definition"))},
               tokenizer="bytes", test=0.15)
trained = replace(base.small, model=base.shape(4, 96, 0), data=data, phases=(phase,),
                  evals=(syntax,), eval_every=400, prompts=())
untrained = replace(trained, phases=(replace(phase, steps=1),), schedule=Schedule(peak=1e-9),
                    model=replace(trained.model, rows=base.loud))
study = Study(
    question="Do the states of a model of code hold the syntax tree?", quick=base.quick(),
    paper=Paper("AST-Probe: Recovering abstract syntax trees from hidden representations of "
                "pre-trained language models", "Hernandez Lopez et al.", 2022, ("003:19",)),
    arms={"untrained": untrained, "trained": trained}, claims=(
        Claim("more than without training", "trained", measure="tree/best", above=0.15),
        Claim("by more than texts explain", "trained", measure="tree/selective", above=0.05),
        Claim("most in a middle block", "trained", control=None, measure="tree/middle", above=0.0),
    ), seeds=3)
