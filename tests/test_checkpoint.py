"""Checkpoints: read inside a trace as outside of one."""
from functools import partial

import jax
import numpy as np
import pytest

import train
from lib.schedule import Schedule
from model import Edited, Model


@pytest.fixture(scope="module")
def trained(tiny, data_config, tmp_path_factory):
    """The directory of a run of two steps, and its config."""
    root = tmp_path_factory.mktemp("checkpoint")
    config = train.Config(
        name="first",
        runs=str(root),
        model=tiny,
        data=train.replace(data_config, dev=0, test=0),
        phases=(train.Phase(steps=2, batch=8, seq=32),),
        overlap=8,
        prompts=(),
    )
    train.train(config)
    return str(root / "first"), config


def borrow(model, context, run: str):
    """An edit that takes the embeddings of another run."""
    loaded, *_ = context.load(run)
    params = model.params | {"embed": loaded["embed"]}
    return Edited(Model(model.config, params), {}, False)


def shapes_of(function):
    """The function, called for the shape of what it returns."""
    return partial(jax.eval_shape, function)


@pytest.mark.parametrize("transform", [jax.jit, shapes_of])
def test_a_run_is_loaded_inside_a_trace(trained, transform):
    """What is loaded is known while the rest is traced: it has the values of the checkpoint."""
    run, _ = trained
    outside, *_ = train.load(run)
    inside = []

    def function(x):
        params, *_ = train.load(run)
        inside.append(params)
        return x + params["norm"].sum()

    transform(function)(np.float32(1))

    assert inside[0].keys() == outside.keys()
    for name, x in inside[0].items():
        assert not isinstance(x, jax.core.Tracer)
        np.testing.assert_array_equal(x, outside[name])


def test_an_edit_may_load_a_run(trained, tmp_path):
    """Edits run on shapes alone first, where the plan is made."""
    run, config = trained
    edit = partial(borrow, run=run)
    phase = train.replace(config.phases[0], edits=(edit,))
    standing_still = Schedule(peak=1e-30)
    second = train.replace(
        config,
        name="second",
        runs=str(tmp_path),
        phases=(phase,),
        schedule=standing_still,
    )

    train.train(second, __file__)

    edited, *_ = train.load(str(tmp_path / "second"))
    original, *_ = train.load(run)
    np.testing.assert_allclose(edited["embed"], original["embed"], rtol=1e-6)
