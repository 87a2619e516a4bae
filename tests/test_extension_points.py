"""Functions of a config's own, in one run that has them all at once: each has its effect."""
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import conftest
import jax.numpy as jnp
import numpy as np
import pytest
from train_cases import (
    TINY,
    answer,
    counted,
    first_state,
    first_then_second,
    in_front,
    odd_only,
    one_each,
    plain_descent,
    random_batch,
    rows_of,
    same_weights,
    second_half,
    silence,
    single_mesh,
    step_rows,
    stepper,
    tiny_config,
    verses,
)

import model
import train
from data import DataConfig, Source
from lib.cache import Cache
from lib.evaluate import evaluators
from lib.schedule import Schedule
from train import Config, Phase

UNIFORM = math.log(258)  # the loss of a model whose logits are all zero


def doubled(logits, batch, extras):
    """A `token_loss`: twice the plain one."""
    return 2 * model.cross_entropy(logits, batch, extras)


def no_embedding(params, step, batch):
    """A `reparam` under which every logit is zero."""
    return params | {"embed": params["embed"] * 0}


def everything(runs: Path) -> Config:
    """A config with a function wherever it may have one."""
    sources = {
        "a": Source(partial(verses, name="a"), in_front, odd_only),
        "b": Source(partial(verses, count=50, name="b")),
    }
    phase = Phase(
        steps=4,
        batch=8,
        seq=64,
        mixture=first_then_second,
        packing=one_each,
        objective=second_half,
    )
    return tiny_config(
        runs,
        data=DataConfig(sources=sources, tokenizer="bytes", dev=0.2, test=0.2),
        phases=(phase, replace(phase, edits=(silence,))),
        schedule=Schedule(shape="constant", peak=1e-3, warmup=0),
        reparam=same_weights,
        token_loss=doubled,
        reduce=counted,
        evals=(answer,),
        optimizer=plain_descent,
    )


class Extended(NamedTuple):
    """A run that has ended."""

    run: train.Run
    directory: Path


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Extended:
    """The run of `everything`, on one device."""
    runs = tmp_path_factory.mktemp("extended")
    config = everything(runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_mesh", conftest.mesh_of_one)
        run = train.prepare(config, __file__)
        train.train(config, __file__)
    return Extended(run, runs / "tiny")


# -------------------------------------------------------------------------------------------- data


class Kept(NamedTuple):
    """A document as it lies in a cache."""

    path: str
    number: int
    text: str
    split: int
    score: float

    @property
    def trained(self) -> bool:
        """Is it for training, and not held out?"""
        return self.split == 0


def documents_of(cache: Cache) -> list[Kept]:
    """Every document of a cache in bytes."""
    found = []
    for i in range(cache.total["shards"]):
        shard = cache.shard(i)
        for n, facts in enumerate(shard.documents()):
            tokens = shard.tokens[shard.offsets[n] : shard.offsets[n + 1]]
            text = bytes(tokens.astype(np.uint8)).decode()
            number = facts["meta"]["number"]
            split = int(shard.split[n])
            score = float(shard.score[n])
            found.append(Kept(facts["path"], number, text, split, score))
    return found


@pytest.fixture
def documents(extended) -> list[Kept]:
    """Those of the source `a`, which has a `prepare` and a `score`."""
    return documents_of(extended.run.caches["a"])


def test_prepare_changes_training_documents_alone(documents):
    assert {document.split for document in documents} == {0, 1, 2}
    for document in documents:
        changed = document.text.startswith(f"<{document.path}>")
        assert changed == document.trained, document.path


def test_a_score_of_minus_infinity_leaves_out_a_training_document_and_no_other(extended, documents):
    trained = {document.number for document in documents if document.trained}
    held_out = {document.number for document in documents if not document.trained}
    assert trained
    assert all(number % 2 == 1 for number in trained)
    assert any(number % 2 == 0 for number in held_out)
    odd = set(range(1, 60, 2))
    assert trained | held_out >= odd
    counts = extended.run.caches["a"].total["counts"]
    assert counts["skipped: deselected"] == 60 - len(documents)


def test_scores_are_kept_with_the_documents(documents):
    for document in documents:
        number = document.number
        expected = number if number % 2 else -math.inf
        assert document.score == expected, document.path


def test_documents_of_a_source_without_a_score_have_none(extended):
    scores = [document.score for document in documents_of(extended.run.caches["b"])]
    assert scores
    assert all(math.isnan(score) for score in scores)


SOURCES = [  # step, source
    (1, 0),
    (2, 0),
    (3, 1),
    (4, 1),
    (5, 0),
    (8, 1),
]


@pytest.mark.parametrize("step, source", SOURCES)
def test_a_mixture_decides_which_source_rows_are_of(extended, step, source):
    """Source a in the first half of each phase, b in its second."""
    arrays = extended.run.loader.batch(step).arrays
    assert (arrays["source"] == source).all()


@pytest.mark.parametrize("step, source", SOURCES)
def test_a_packing_makes_the_rows(extended, step, source):
    """One segment a row, from a document's start."""
    arrays = extended.run.loader.batch(step).arrays
    assert (arrays["tokens"][:, 0] == 256).all()
    assert set(np.unique(arrays["segments"])) <= {0, 1}


# --------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("step", [1, 5])
def test_an_objective_changes_the_rows(extended, step):
    """Their first half has no weight, and a key is added."""
    arrays = extended.run.loader.batch(step).arrays
    assert (arrays["mine"] == 7).all()
    assert not arrays["weights"][:, :32].any()


@pytest.mark.parametrize("step", [1, 5])
def test_metrics_of_reduce_are_in_the_rows_of_steps(extended, step):
    weights = extended.run.loader.batch(step).arrays["weights"]
    row = step_rows(extended.directory)[step - 1]
    assert row["own/targets"] == weights.sum()
    assert row["own/targets"] > 0


def test_the_largest_loss_is_above_the_mean(extended):
    rows = step_rows(extended.directory)
    assert len(rows) == 8
    for row in rows:
        assert row["train/loss"] > 0
        assert row["own/largest"] > 0.99 * row["train/loss"]


def test_an_edit_is_applied_as_its_phase_begins_and_a_token_loss_counts(extended):
    """Gains of zero make the phase's first loss the uniform one, which `doubled` doubles."""
    losses = [row["train/loss"] for row in step_rows(extended.directory)]
    assert losses[4] == pytest.approx(2 * UNIFORM, rel=1e-5)
    assert abs(losses[0] - 2 * UNIFORM) > 1e-3


def test_evals_are_in_the_rows_of_evaluations(extended):
    """With a function that applies the model."""
    rows = [row for row in rows_of(extended.directory) if "own/answer" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        assert row["own/answer"] == 42
        assert row["own/logits"] == 258
        assert "train/loss" not in row


# ------------------------------------------------------------------------------------ without a run


def test_the_optimizer_of_a_config_is_the_one_used():
    """Plain descent moves parameters by the rate times the gradient, whose norm is a metric."""
    config = tiny_config(optimizer=plain_descent, clip=0.0)
    before = first_state(config).params
    state, metrics = stepper(config)(first_state(config), random_batch(), 0.5)
    squares = [float(jnp.sum((state.params[name] - before[name]) ** 2)) for name in before]
    moved = math.sqrt(sum(squares))
    assert moved == pytest.approx(0.5 * float(metrics["train/grad_norm"]), rel=1e-4)


def loss_with(reparam) -> float:
    """The loss of a first step."""
    config = tiny_config(reparam=reparam)
    _, metrics = stepper(config)(first_state(config), random_batch(), 1e-2)
    return float(metrics["train/loss"])


def test_training_uses_the_weights_that_reparam_gives():
    """Scaled by one they change nothing; without embeddings the loss is the uniform one."""
    plain = loss_with(None)
    gone = loss_with(no_embedding)
    assert loss_with(same_weights) == plain
    assert gone == pytest.approx(UNIFORM, rel=1e-5)
    assert abs(plain - gone) > 1e-3


def test_evaluation_uses_the_weights_that_reparam_gives():
    params = first_state(tiny_config()).params
    batch = random_batch()
    losses, logits = evaluators(no_embedding, TINY, single_mesh())
    np.testing.assert_allclose(losses(params, 0, batch), UNIFORM, rtol=1e-5)
    assert not np.any(logits(params, 0, batch["tokens"]))
