"""lib/sharding.py: meshes, and where parameters live on them."""
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import model
from lib.sharding import MeshConfig, make_mesh, shardings

equal = np.testing.assert_array_equal


@pytest.mark.parametrize("sizes, shape", [
    ((-1, 1, 1), (8, 1, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((1, 4, 2), (1, 4, 2)),
])
def test_an_axis_of_minus_one_takes_the_devices_that_are_left(sizes, shape):
    mesh = make_mesh(MeshConfig(*sizes))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize("sizes", [
    (-1, -1, 1),
    (3, -1, 1),
    (2, 2, 1),
    (0, -1, 1),
    (-2, 1, 1),
    (4, 4, 1),
])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(ValueError, match="8 devices"):
        make_mesh(MeshConfig(*sizes))


def test_shardings_follow_the_named_axes(tiny):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = shardings(model.table(tiny), mesh)
    specs = {name: tuple(sharding.spec) for name, sharding in where.items()}

    assert specs["embed"] == ("tensor", "fsdp")
    assert specs["q"] == (None, "fsdp", "tensor", None, None)
    assert specs["down"] == (None, "tensor", "fsdp")
    assert specs["attn_norm"] == (None, "fsdp")


def test_sharding_that_does_not_divide_names_axis_and_mesh(tiny):
    rows = model.table(replace(tiny, vocab=256))
    mesh = make_mesh(MeshConfig(data=2, tensor=4))
    message = r"axis kv_heads of parameter . is 2, which mesh.tensor \(4\)"
    with pytest.raises(ValueError, match=message):
        shardings(rows, mesh)


def test_an_unknown_axis_has_no_sharding(tiny):
    extra = model.Param(("experts",), (4,), 1.0)
    rows = model.table(tiny) | {"extra": extra}
    with pytest.raises(ValueError, match="parameter extra has the axis 'experts'; allowed are layers"):
        shardings(rows, make_mesh(MeshConfig()))


def test_draws_are_the_same_on_any_number_of_devices(tiny):
    rows = model.table(tiny)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = shardings(rows, mesh)["gate"]
    draw = partial(model.draw, "gate", rows["gate"], dtype="float32")
    key = jax.random.key(3)

    spread = jax.jit(draw, out_shardings=where)(key)

    assert len(spread.sharding.device_set) == 8
    equal(spread, jax.jit(draw)(key))
