"""Frozen models inside a model: adopted, drawn or copied; checkpoints that borrow what is another run's."""
import json
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import rows as random_rows

import model
import train
from configs.base import loud
from lib.checkpoint import Checkpoints
from lib.continuations import continuations
from lib.edits import stack
from lib.errors import InputError
from lib.kernels import Mask
from lib.optim import adamw
from lib.schedule import Schedule
from lib.sharding import MeshConfig, make_mesh, shardings
from lib.teacher import (
    adopt,
    adopt_random,
    adopt_self,
    alone,
    divergence,
    inside,
    part,
    release,
    teacher_logits,
    teachers,
)
from model import Context, Model
from tools import export

CAUSAL = Mask("causal", 0)
FROZEN = partial(adamw, frozen=("teacher",))


def context(seed=0):
    return Context(jax.random.key(seed), 3, None, None, train.load)


def same_bits(one, other):
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert np.asarray(x).tobytes() == np.asarray(other[name]).tobytes(), name


@pytest.fixture(scope="module")
def student(tiny):
    """A model, and one with a teacher of another shape beside it."""
    config = replace(tiny, unroll=1, rows=loud)
    plain = Model(config, model.init(config, jax.random.key(1)))
    edited = adopt_random(plain, context(2), shape={"layers": 1, "embed": 16, "tied": False})
    return plain, edited


def test_a_teacher_is_beside_the_model_and_changes_nothing(student):
    """The model's logits are what they were, bit for bit; the teacher's are those of its own config."""
    plain, edited = student
    assert edited.preserves and not edited.borrowed
    taught, params = edited.model
    batch = random_rows()
    both = jax.jit(lambda p: (model.apply(p, batch, taught), model.forward(p, batch, CAUSAL, taught)[1]))
    ours, given = both(params)
    np.testing.assert_array_equal(ours, jax.jit(lambda p: model.apply(p, batch, plain.config))(plain.params))
    teacher = inside(taught)
    assert (teacher.layers, teacher.embed, teachers(taught)) == (1, 16, ["teacher"])
    theirs = model.apply(part(params), batch, teacher)
    extras = dict(params=params, config=taught, **given)
    np.testing.assert_allclose(teacher_logits(extras), theirs, atol=1e-5)
    assert alone(taught) == plain.config


def test_the_rows_of_a_teacher(student, tiny):
    """Its own group and axes; counted; its forward pass is a third of its training in FLOPs."""
    plain, edited = student
    taught = edited.model.config
    rows = model.table(taught)
    assert rows["teacher/q"].axes[:2] == ("teacher/layers", "teacher/embed")
    assert {row.group for name, row in rows.items() if name.startswith("teacher/")} == {"teacher"}
    teacher = inside(taught)
    assert model.count(taught) == model.count(plain.config) + model.count(teacher)
    extra = taught.flops(taught, 32) - model.flops_per_token(plain.config, 32)
    assert extra == pytest.approx(model.flops_per_token(teacher, 32) / 3)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = shardings(rows, mesh)
    for name, own in (("teacher/q", "q"), ("teacher/embed", "embed")):
        assert places[name].spec == places[own].spec


def test_teachers_in_one_another_and_their_release(student):
    """Two of them; either may go first, and the model is what it was before both."""
    plain, edited = student
    two = adopt_self(edited.model, context(), prefix="old").model
    assert teachers(two.config) == ["old", "teacher"]
    assert not any(name.startswith("old/teacher") for name in two.params)
    same_bits(part(two.params, "old"), plain.params)
    for first, second in (("old", "teacher"), ("teacher", "old")):
        one = release(two, context(), first).model
        assert teachers(one.config) == [second]
        none = release(one, context(), second).model
        assert none.config == plain.config
        same_bits(none.params, plain.params)
    with pytest.raises(ValueError, match="no teacher 'nobody'"):
        release(two, context(), "nobody")
    with pytest.raises(ValueError, match="already"):
        adopt_self(two, context(), "old")
    with pytest.raises(ValueError, match="258"):
        adopt_random(plain, context(), shape={"vocab": 300})


def test_a_student_grows_beside_its_teacher(student):
    plain, edited = student
    grown = stack(edited.model, context()).model
    assert grown.config.layers == 4 and inside(grown.config).layers == 1
    same_bits(part(grown.params), part(edited.model.params))


def test_divergence_from_oneself_is_nothing_and_no_gradient_reaches_the_teacher(student):
    """KL is 0 at the model as it was, positive away from it, and equal to its sum by hand."""
    plain, _ = student
    old = adopt_self(plain, context()).model
    batch = random_rows()

    @jax.jit
    def mean(params):
        return jnp.mean(model.losses(params, batch, CAUSAL, old.config, divergence))

    @jax.jit
    def by_hand(params):
        ours = jax.nn.log_softmax(model.apply(params, batch, old.config))
        theirs = jax.nn.log_softmax(model.apply(part(params), batch, plain.config))
        return jnp.mean(jnp.sum(jnp.exp(theirs) * (theirs - ours), -1))

    np.testing.assert_allclose(mean(old.params), 0, atol=1e-6)
    away = old.params | {"embed": old.params["embed"] * 1.5}
    assert float(mean(away)) > 1e-3
    np.testing.assert_allclose(mean(away), by_hand(away), rtol=1e-4)
    grads = jax.jit(jax.grad(mean))(away)
    assert float(jnp.abs(grads["q"]).max()) > 0
    assert all(not np.any(x) for x in part(grads).values())


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def runs(tiny, data_config, tmp_path_factory):
    """A run, and the config of one that adopts it after two steps."""
    root = tmp_path_factory.mktemp("teacher") / "runs"
    phase = train.Phase(steps=2, batch=8, seq=32)
    config = train.Config(
        name="teacher", runs=str(root), model=replace(tiny, unroll=1),
        data=replace(data_config, dev=0, test=0), phases=(phase,), overlap=8, prompts=(),
        schedule=Schedule(shape="constant", warmup=0), save_every=1, keep=9)
    train.train(config)
    then = replace(phase, edits=(partial(adopt, run=str(root / "teacher")), stack), token_loss=divergence)
    taught = replace(config, name="taught", phases=(phase, then), optimizer=FROZEN, seed=1)
    return root, config, taught


@pytest.fixture(scope="module")
def taught(runs):
    root, _, config = runs
    train.train(config)
    return root


def meta_of(run, step):
    return Checkpoints(run / "checkpoints").meta(step)


def copied(root, tmp_path, *names):
    for name in names:
        shutil.copytree(root / name, tmp_path / "runs" / name)
    return tmp_path / "runs"


def test_a_checkpoint_names_the_run_that_it_borrows_from(taught):
    """The teacher's arrays are not on disk; loaded, they are those of the other run."""
    meta = meta_of(taught / "taught", 4)
    theirs = train.load(str(taught / "teacher"))[0]
    assert meta["borrowed"].keys() == {f"teacher/{name}" for name in theirs}
    one = meta["borrowed"]["teacher/q"]
    assert (one["step"], one["name"], one["near"]) == (2, "q", "../teacher")
    assert "borrowed" not in meta_of(taught / "taught", 2)
    params, config, *_ = train.load(str(taught / "taught"))
    same_bits(part(params), theirs)
    assert config.model.layers == 4

    def size(run, step):
        files = (run / "checkpoints" / str(step) / "params").rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    # The student has twice the layers; with the teacher written too it would be half as much again.
    assert size(taught / "taught", 4) < 2.2 * size(taught / "teacher", 2)


def test_a_taught_run_is_resumed_byte_for_byte_wherever_both_are(runs, taught, tmp_path):
    """Moved together, from its checkpoint after the edit, and onto a mesh of another shape."""
    _, _, config = runs
    whole = train.load(str(taught / "taught"))[0]
    place = copied(taught, tmp_path, "taught", "teacher")
    shutil.rmtree(place / "taught/checkpoints/4")
    (place / "taught/summary.json").unlink()
    hidden = taught.parent / "hidden"
    (taught / "teacher").rename(hidden)  # what was borrowed is where it has been moved to
    try:
        params = train.load(str(place / "taught"), 3)[0]
        meshed = train.load(str(place / "taught"), 3, dict(data=2, fsdp=2, tensor=2))[0]
        same_bits(params, meshed)
    finally:
        hidden.rename(taught / "teacher")
    train.train(replace(config, runs=str(place)))
    same_bits(train.load(str(place / "taught"))[0], whole)


def test_what_is_borrowed_and_changed_is_said_in_one_sentence(runs, taught, tmp_path):
    """The checkpoint that needs it is not damaged, and stays."""
    root, config, second = runs
    place = copied(taught, tmp_path, "taught")
    train.train(replace(config, runs=str(place), seed=5))
    for act in (lambda: train.load(str(place / "taught")),
                lambda: train.train(replace(second, runs=str(place)))):
        with pytest.raises(InputError, match="and embed has changed since") as error:
            act()
        assert "takes teacher/embed" in str(error.value) and "\n" not in str(error.value)
    assert (place / "taught/checkpoints/4").is_dir()


@pytest.mark.parametrize("how", ["that run is gone", r"that checkpoint is gone; there are \[1\]"])
def test_what_is_borrowed_and_gone_is_said_in_one_sentence(how, taught, tmp_path):
    place = copied(taught, tmp_path, "taught")
    hidden = tmp_path / "hidden"
    (taught / "teacher").rename(hidden)
    try:
        if "checkpoint" in how:
            shutil.copytree(hidden, taught / "teacher")
            shutil.rmtree(taught / "teacher/checkpoints/2")
        with pytest.raises(InputError, match=how) as error:
            train.load(str(place / "taught"))
        assert "\n" not in str(error.value)
    finally:
        shutil.rmtree(taught / "teacher", ignore_errors=True)
        hidden.rename(taught / "teacher")


def test_what_is_trained_is_written(runs, taught, tmp_path):
    """A teacher whose group the optimiser has is a parameter like others."""
    root, _, config = runs
    train.train(replace(config, runs=str(tmp_path), optimizer=adamw))
    assert "borrowed" not in meta_of(tmp_path / "taught", 4)
    same_bits(part(train.load(str(tmp_path / "taught"))[0]), train.load(str(taught / "teacher"))[0])


def test_a_run_that_starts_from_one_that_borrows(runs, taught, tmp_path):
    """It borrows from the first run; a release at once leaves the student alone."""
    root, config, _ = runs
    start = replace(config, runs=str(tmp_path), init_from=str(taught / "taught"), optimizer=FROZEN,
                    token_loss=divergence)
    train.train(replace(start, name="more"))
    meta = meta_of(tmp_path / "more", 2)
    assert meta["borrowed"]["teacher/q"]["run"] == str((taught / "teacher").resolve())
    params, shape, *_ = train.load(str(tmp_path / "more"))
    assert teachers(shape.model) == ["teacher"]
    same_bits(part(params), train.load(str(taught / "teacher"))[0])
    freed = replace(start, name="freed", token_loss=model.cross_entropy,
                    phases=(replace(config.phases[0], edits=(release,)),))
    train.train(freed)
    params, shape, *_ = train.load(str(tmp_path / "freed"))
    assert not teachers(shape.model) and not part(params)
    assert shape.model.forward is model.llama and shape.model.rows is None


def test_a_student_is_sampled_as_if_it_were_alone(taught):
    params, config, tokenizer, _ = train.load(str(taught / "taught"))
    config = replace(config, sample_tokens=3, sample_temperature=0.0)
    student = replace(config, model=alone(config.model))
    own = {name: params[name] for name in model.table(student.model)}
    texts = [continuations(p, c, tokenizer, 4, ("the tree",)) for p, c in ((params, config), (own, student))]
    assert texts[0] == texts[1]


def test_a_student_is_exported_alone(taught, tmp_path):
    export.main([str(taught / "taught"), str(tmp_path / "out")])
    written = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert len([name for name in written if name.endswith("q_proj.weight")]) == 4
    config = train.load(str(taught / "taught"))[1].model
    assert sum(x.size for x in written.values()) == model.count(alone(config))


def test_a_teacher_is_charged_its_forward_pass(taught):
    """In the rows of the run, at the phase that it is in."""
    lines = (taught / "taught/metrics.jsonl").read_text().splitlines()
    flops = {row["step"]: row["train/flops"] for row in map(json.loads, lines) if "train/loss" in row}
    teacher, student = (train.load(str(taught / run))[1].model for run in ("teacher", "taught"))
    each = model.flops_per_token(alone(student), 32) + model.flops_per_token(teacher, 32) / 3
    assert flops[4] - flops[3] == pytest.approx(8 * 32 * each)
