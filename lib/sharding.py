"""Where arrays live: the mesh of devices, and the mesh axes that named axes are split over."""
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import logical_to_mesh_axes
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from lib.fields import strict


@strict
@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: int = -1  # rows of the batch
    fsdp: int = 1  # rows of the batch, and parameters along `embed`
    tensor: int = 1  # parameters along `vocab`, `mlp` and `kv_heads`


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The devices as a grid with axes data, fsdp and tensor."""
    devices = jax.devices() if devices is None else devices
    sizes = data, fsdp, tensor = config.data, config.fsdp, config.tensor
    known = math.prod(s for s in sizes if s > 0)
    rest, n = sizes.count(-1), len(devices)
    if rest > 1 or any(s == 0 or s < -1 for s in sizes) or n % known or (not rest and known != n):
        raise ValueError(f"mesh is data {data}, fsdp {fsdp}, tensor {tensor}, which does not fit the {n} "
                         "devices here; allowed are sizes whose product is that, one of them -1 for the rest")
    sizes = [s if s > 0 else n // known for s in sizes]
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "fsdp", "tensor"))
# Named axes to mesh axes. `logical_to_mesh_axes` would copy an unknown axis to all devices: here it raises.
RULES = {"layers": None, "vocab": "tensor", "embed": "fsdp", "kv_heads": "tensor", "q_per_kv": None,
         "head_dim": None, "mlp": "tensor"}
ROWS = "data", "fsdp"  # mesh axes that the rows of a batch live on


def shardings(rows: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter lives on a mesh. Raises ValueError for an axis that the mesh does not divide."""
    out = {}
    for name, p in rows.items():
        spec = logical_to_mesh_axes(p.axes, tuple((axis, RULES[axis]) for axis in p.axes))
        for axis, size, on in zip(p.axes, p.shape, spec, strict=True):
            if on is not None and size % mesh.shape[on]:
                raise ValueError(f"axis {axis} of parameter {name} is {size}, which mesh.{on} "
                                 f"({mesh.shape[on]}) does not divide")
        out[name] = NamedSharding(mesh, spec)
    return out


def constrain(x, *axes) -> jax.Array:
    """Fix the mesh axes that the axes of x live on, where these divide them; without a mesh, do nothing."""
    mesh = get_abstract_mesh()
    if mesh.empty:
        return x
    parts = [math.prod(mesh.shape[a] for a in np.ravel(on)) if on else 1 for on in axes]
    fit = [on if n % part == 0 else None for on, n, part in zip(axes, x.shape, parts, strict=False)]
    return lax.with_sharding_constraint(x, PartitionSpec(*fit))


def by_row(mesh: Mesh, rows: int) -> NamedSharding:
    """The rows of a batch over the mesh axes data and fsdp; all of them everywhere if that leaves a rest."""
    even = rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return NamedSharding(mesh, PartitionSpec(ROWS) if even else PartitionSpec())


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` live on devices of this process, ascending."""
    where = by_row(mesh, rows).addressable_devices_indices_map((rows,))
    return np.unique(np.concatenate([np.arange(rows)[index] for index in where.values()]))


def put(batch: dict, mesh: Mesh, rows: int | None = None) -> dict[str, jax.Array]:
    """A batch onto the devices of all processes; each gives all of it, or its `own_rows` of so many."""
    rows = rows or len(batch["tokens"])
    if jax.process_count() == 1:
        return jax.device_put(batch, by_row(mesh, rows))
    return {k: jax.make_array_from_process_local_data(by_row(mesh, rows), v, (rows, *v.shape[1:]))
            for k, v in batch.items()}


def largest(value: int, mesh: Mesh) -> jax.Array | int:
    """The largest of what the processes give, still on the devices."""
    if jax.process_count() == 1:
        return value
    where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    each = np.full(jax.local_device_count(), value, np.int32)
    return jnp.max(jax.make_array_from_process_local_data(where, each, (jax.device_count(),)))
