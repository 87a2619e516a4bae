"""What is compiled once: a step for phases that have the same one, a draw for every seed."""
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of_one
from train_cases import TINY, short_phase, step_rows, tiny_config

import train
from lib.checkpoint import hashed
from lib.optim import adamw, drawing
from lib.sharding import MeshConfig
from model import cross_entropy


def halved(logits, batch, extras):
    """A `token_loss` of its own."""
    return cross_entropy(logits, batch, extras) / 2


@pytest.fixture(scope="module")
def compilations(tmp_path_factory) -> tuple[int, list[float]]:
    """(steps compiled, training losses) of a run of four phases."""
    compiled = []

    def counted(*arguments, **more):
        compiled.append(arguments)
        return compile_step(*arguments, **more)

    plain, own = short_phase(2), short_phase(2, token_loss=halved)
    phases = plain, replace(plain, lr={"embed": 0.5}), own, replace(own, lr={"embed": 0.0})
    config = tiny_config(tmp_path_factory.mktemp("programs"), phases=phases, model=replace(TINY, layers=1))
    compile_step = train.compile_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_step", counted)
        train.train(config, __file__)
    losses = [row["train/loss"] for row in step_rows(Path(config.runs) / config.name)]
    return len(compiled), losses


def test_phases_with_the_same_step_have_it_compiled_once(compilations):
    """The second is at another rate, the third has a loss of its own, the fourth freezes a group."""
    number, losses = compilations
    assert number == 3
    before, after = sum(losses[:4]) / 4, sum(losses[4:]) / 4
    assert after < 0.7 * before


def test_runs_of_all_seeds_draw_by_one_program():
    mesh = mesh_of_one(MeshConfig())
    draw = drawing(TINY, adamw, mesh)
    states = [draw(jax.random.key(seed)) for seed in (0, 1)]
    assert draw._cache_size() == 1
    assert not (states[0].params["embed"] == states[1].params["embed"]).any()


def test_a_checksum_holds_no_constant_as_large_as_its_array():
    """Also where what depends on no argument is worked out before, as in a run that is loaded."""
    with jax.ensure_compile_time_eval():
        traced = hashed.trace(jnp.ones((64, 32)), np.uint32(0))
    assert max(np.size(each) for each in traced.jaxpr.consts) <= 64
