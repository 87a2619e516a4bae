"""lib/sharding.py: meshes, and where parameters live on them."""
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import model
from lib.sharding import MeshConfig, make_mesh, shardings

equal = np.testing.assert_array_equal


def test_mesh_takes_what_is_left_and_refuses_what_does_not_fit():
    for sizes, shape in (((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))):
        mesh = make_mesh(MeshConfig(*sizes))
        assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    for sizes in ((-1, -1, 1), (3, -1, 1), (2, 2, 1), (0, -1, 1), (-2, 1, 1), (4, 4, 1)):
        with pytest.raises(ValueError, match="8 devices"):
            make_mesh(MeshConfig(*sizes))


def test_shardings_follow_the_named_axes(tiny):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = {name: tuple(s.spec) for name, s in shardings(model.table(tiny), mesh).items()}
    assert where["embed"] == ("tensor", "fsdp") and where["q"] == (None, "fsdp", "tensor", None, None)
    assert where["down"] == (None, "tensor", "fsdp") and where["attn_norm"] == (None, "fsdp")


def test_sharding_that_does_not_divide_names_axis_and_mesh(tiny):
    with pytest.raises(ValueError, match=r"axis kv_heads of parameter . is 2, which mesh.tensor \(4\)"):
        shardings(model.table(replace(tiny, vocab=256)), make_mesh(MeshConfig(data=2, tensor=4)))


def test_unknown_axis_has_no_sharding(tiny, monkeypatch):
    odd = model.table(tiny) | {"extra": model.Param(("experts",), (4,), 1.0)}
    monkeypatch.setattr(model, "table", lambda config: odd)
    with pytest.raises(ValueError, match="parameter extra has the axis 'experts'; allowed are layers"):
        shardings(model.table(tiny), make_mesh(MeshConfig()))


def test_draws_are_the_same_on_any_number_of_devices(tiny):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    where = shardings(model.table(tiny), mesh)["gate"]
    draw = partial(model.draw, "gate", model.table(tiny)["gate"], dtype="float32")
    spread = jax.jit(draw, out_shardings=where)(jax.random.key(3))
    assert len(spread.sharding.device_set) == 8
    equal(spread, jax.jit(draw)(jax.random.key(3)))
