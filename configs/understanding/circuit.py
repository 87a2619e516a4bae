"""The circuit of in-context answers: which attention is it that they need?

Paper: Revisiting In-context Learning Inference Circuit in Large Language Models, Cho et al. 2025
    (003:52)
Method: three operations. An item is encoded; a label's position merges with its item; the query
    finds the merged positions that are like it, and copies what they hold. Cutting the attention
    that an operation needs, and it alone, takes the answers away.
Here: the model of bursty.py's bursty arm, on rows of new classes with new labels, three items of
    the query's class. whole: accuracy. no_merge: no label attends to its item. no_copy: the query
    does not attend to labels of its class. random: as many other edges are cut as for these. In all
    layers, the rest renormalised. untrained: the model as drawn. Left out: the encoding of items,
    which are vectors here, and what the paper finds in models of 7 billion parameters.
Cost: bursty.py's three runs of half a minute, and six of a moment.
Run:
    python train.py study configs/understanding/circuit.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from configs.bursty import LENGTH, PAIRS, new_rows
from configs.understanding.bursty import bursty
from lib.optim import adamw
from lib.study import Claim, Paper, Study
from model import CAUSAL, ModelConfig, rms_norm, stream, whole

GROUPS = "matrix", "vector"
FIGURES = "whole", "no_merge", "no_copy", "random_merge", "random_copy"


def without(edges):
    """An `attend` with no attention along edges [b t s]; each position keeps itself."""
    allowed = jnp.tri(LENGTH, dtype=bool) & ~edges | jnp.eye(LENGTH, dtype=bool)

    def attend(q, k, v):
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
        shares = jax.nn.softmax(scores, -1, where=allowed[:, None, None])
        return jnp.einsum("bkgts,bskh->btkgh", shares, v), None

    return attend


@partial(jax.jit, static_argnums=3)
def answers(params, x, edges, config: ModelConfig):
    """[b] The likeliest label of the query, with edges cut in all layers."""
    first = x @ params["in"]
    states, _ = stream(params, first, whole({"x": x}), CAUSAL, config, attend=without(edges))
    normed = rms_norm(states[:, -1], params["norm"], config.norm_eps)
    return jnp.argmax(normed @ params["out"], -1)


def edges_of(same, rng) -> dict[str, np.ndarray]:
    """{figure: edges [n LENGTH LENGTH] to cut}; same [n PAIRS]: pairs of the query's class."""
    found = {name: np.zeros((len(same), LENGTH, LENGTH), bool) for name in FIGURES}
    label = 2 * np.arange(PAIRS) + 1
    found["no_merge"][:, label, label - 1] = True
    found["no_copy"][:, -1, 1::2] = same
    for name in ("merge", "copy"):
        cut = found[f"no_{name}"]
        free = np.tri(LENGTH, k=-1, dtype=bool) & ~cut & ~found["no_merge"] & ~found["no_copy"]
        order = np.argsort(np.where(free, rng.random(cut.shape), 2).reshape(len(cut), -1), 1)
        place = np.argsort(order, 1).reshape(cut.shape)
        found[f"random_{name}"] = place < cut.sum((1, 2))[:, None, None]
    return found


def ablations(params, apply, config, n: int = 512) -> dict[str, float]:
    """The accuracies above."""
    rng = np.random.default_rng(3)
    x, right, same = new_rows(n, 3, rng)
    found = {}
    for name, edges in edges_of(same, rng).items():
        said = answers(params, jnp.asarray(x), jnp.asarray(edges), config.model)
        found[f"icl/{name}"] = float(np.mean(np.asarray(said) == right))
    return found


def lost(figures: dict) -> dict[str, float]:
    """{what is cut: the accuracy that the trained model loses}."""
    found = figures["trained"]
    return {name: float((found["whole"] - found[name]).mean()) for name in FIGURES[1:]}


still = replace(bursty.phases[0], steps=1)
untrained = replace(bursty, phases=(still,), evals=(ablations,),
                    optimizer=partial(adamw, frozen=GROUPS))
study = Study(
    question="Which attention is it that answers in context need?",
    paper=Paper(title="Revisiting In-context Learning Inference Circuit in Large Language Models",
                authors="Cho et al.", year=2025, seeds=("003:52",)),
    needs={"bursty": bursty},
    arms={"untrained": untrained, "trained": replace(untrained, init_from="needs:bursty")},
    measures={name: f"icl/{name}" for name in FIGURES},
    conclusions={"lost": lost},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="trained, it answers", arm="trained", measure="whole", above=0.5),
        Claim(says="not without that of query to label", measure="lost: no_copy", above=0.5),
        Claim(says="nor without that of labels to items", measure="lost: no_merge", above=0.5),
        Claim(says="as many other edges do not matter", measure="lost: random_copy", below=0.05),
        Claim(says="nor those", measure="lost: random_merge", below=0.05),
    ),
    seeds=3,
)
