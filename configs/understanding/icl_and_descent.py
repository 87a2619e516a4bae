"""In-context learning and gradient descent: does a model answer as if it were trained on examples?

Paper: Revisiting the Hypothesis: Do pretrained Transformers Learn In-Context by Gradient Descent?,
    Shen et al. 2023 (003:21)
Method: give a trained model examples in its context, or take steps of gradient descent on them, and
    compare answers. The paper's models are sensitive to the order of examples in another way than
    descent is, and their answers are unlike, by three figures.
Here: the model of bursty.py's bursty arm, on rows of new classes with new labels. Descent is a pass
    of SGD over a row's pairs, one at a time, items alone, at the best of five rates. overlap: the
    share of rows with the same answer by both. reordered: by the context and by it in another
    order. icl_sd, sgd_sd: how far the right label's probability moves over four orders. logits: the
    cosine of the two's logits, their means taken off. untrained: the model as drawn.
Cost: bursty.py's three runs of half a minute, and six of ten seconds.
Run:
    python train.py study configs/understanding/icl_and_descent.py --jobs 2
"""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import model
from configs.bursty import PAIRS, WIDTH, D, new_rows
from configs.understanding.bursty import bursty
from configs.understanding.circuit import untrained
from lib.study import Claim, Paper, Study
from model import ModelConfig

RATES, ORDERS = (0.01, 0.03, 0.1, 0.3, 1.0), 4
FIGURES = "accuracy", "sgd_accuracy", "overlap", "reordered", "icl_sd", "sgd_sd", "logits"


def alone(params, item, config: ModelConfig):
    """Logits [LABELS] of an item [D] without any context."""
    x = jnp.zeros((1, 1, WIDTH)).at[0, 0, :D].set(item)
    return model.apply(params, {"x": x}, config)[0, 0]


def descended(params, items, labels, rate, config: ModelConfig):
    """Parameters after a pass of SGD over pairs: items [k D], labels [k]."""
    def loss(params, item, label):
        return -jax.nn.log_softmax(alone(params, item, config))[label]

    def step(params, pair):
        slope = jax.grad(loss)(params, *pair)
        return jax.tree.map(lambda x, g: x - rate * g, params, slope), None

    return lax.scan(step, params, (items, labels))[0]


@partial(jax.jit, static_argnums=3)
def after_descent(params, x, rate, config: ModelConfig):
    """[n LABELS] Logits of the query of rows x [n LENGTH WIDTH], trained on each row's pairs."""
    def one(row):
        labels = jnp.argmax(row[1::2, D:], -1)
        return alone(descended(params, row[:-1:2, :D], labels, rate, config), row[-1, :D], config)
    return lax.map(one, x, batch_size=64)


def reordered(x, rng) -> np.ndarray:
    """Rows with their pairs in another order."""
    pairs = x[:, :-1].reshape(len(x), PAIRS, 2, WIDTH)
    order = np.argsort(rng.random((len(x), PAIRS)), 1)[..., None, None]
    moved = np.take_along_axis(pairs, order, 1).reshape(x[:, :-1].shape)
    return np.concatenate([moved, x[:, -1:]], 1)


def compare(params, apply, config, n: int = 128) -> dict[str, float]:
    """The figures above."""
    rng = np.random.default_rng(3)
    x, right, _ = new_rows(n, 3, rng)
    orders = [x] + [reordered(x, rng) for _ in range(ORDERS - 1)]
    context = np.stack([np.asarray(apply(params, dict(x=each)))[:, -1] for each in orders])

    def hits(logits):
        return float(np.mean(logits.argmax(-1) == right))

    def descend(x, rate):
        return np.asarray(after_descent(params, x, rate, config.model))

    rate = max(RATES, key=lambda rate: hits(descend(x, rate)))
    descent = np.stack([descend(each, rate) for each in orders])

    def spread(logits):
        chance = np.asarray(jax.nn.softmax(logits, -1))[:, np.arange(n), right]
        return float(np.mean(np.std(chance, 0)))

    said, other = context.argmax(-1), descent[0].argmax(-1)
    found = (hits(context[0]), hits(descent[0]), np.mean(said[0] == other),
             np.mean(said[0] == said[1]), spread(context), spread(descent),
             np.mean(jax.nn.standardize(context[0]) * jax.nn.standardize(descent[0])))
    return {f"icl/{name}": float(value) for name, value in zip(FIGURES, found, strict=True)}


def told_apart(figures: dict) -> dict[str, float]:
    """Of the trained model: reordered less overlap, and icl_sd less three of sgd_sd."""
    mean = {name: float(figures["trained"][name].mean()) for name in FIGURES}
    return {"overlap": mean["reordered"] - mean["overlap"],
            "spread": mean["icl_sd"] - 3 * mean["sgd_sd"]}


drawn = replace(untrained, evals=(compare,))
study = Study(
    question="Does a model answer from its context as if it were trained on it?",
    paper=Paper(title="Revisiting the Hypothesis: Do pretrained Transformers Learn In-Context by "
                "Gradient Descent?", authors="Shen et al.", year=2023, seeds=("003:21",)),
    needs={"bursty": bursty},
    arms={"untrained": drawn, "trained": replace(drawn, init_from="needs:bursty")},
    measures={name: f"icl/{name}" for name in FIGURES}, conclusions={"apart": told_apart},
    quick={"phases.*.steps": 4, "model.embed": 16, "model.mlp": 16, "eval_every": 4},
    claims=(
        Claim(says="another order is more alike than descent", measure="apart: overlap", above=0.0),
        Claim(says="but moves answers thrice as far", measure="apart: spread", above=0.0),
        Claim(says="trained, it reads its context", arm="trained", measure="accuracy", above=0.3),
    ),
    seeds=3,
)
