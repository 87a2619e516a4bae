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
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh

from lib.fields import strict


@strict
@dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: int = -1  # rows of the batch
    fsdp: int = 1  # rows of the batch, and parameters along `embed`
    tensor: int = 1  # parameters along `vocab`, `mlp` and `kv_heads`


# The mesh axis that each named axis is split over; None is whole on each device.
RULES = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "kv_heads": "tensor",
    "q_per_kv": None,
    "head_dim": None,
    "mlp": "tensor",
}
FREE = "rank", "in", "out", "expert", "state"  # of rows that a config adds; whole everywhere
ROWS = "data", "fsdp"  # the mesh axes that the rows of a batch are split over


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """The devices, by default all, as a grid with axes data, fsdp and tensor.

    Raises ValueError for sizes that do not fit the devices.
    """
    if devices is None:
        devices = jax.devices()
    sizes = [config.data, config.fsdp, config.tensor]
    shape = filled(sizes, len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "fsdp", "tensor"))


def filled(sizes: list[int], devices: int) -> list[int]:
    """Mesh sizes whose product is the number of devices: one of -1 takes what is left."""
    known = math.prod(size for size in sizes if size > 0)
    odd = any(size == 0 or size < -1 for size in sizes)
    if sizes.count(-1) == 1:
        fits = devices % known == 0
    else:
        fits = devices == known and -1 not in sizes
    if odd or not fits:
        data, fsdp, tensor = sizes
        raise ValueError(
            f"mesh is data {data}, fsdp {fsdp}, tensor {tensor}, which does not fit the {devices} "
            "devices here; allowed are sizes whose product is that, one of them -1 for the rest"
        )
    return [size if size > 0 else devices // known for size in sizes]


def shardings(rows: dict[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Where each parameter of a table lives on a mesh.

    Raises ValueError for an axis that the mesh does not divide, and for one that RULES does not
    have: `logical_to_mesh_axes` alone would copy it to all devices in silence.
    """
    out = {}
    for name, param in rows.items():
        rules = tuple((axis, rule(axis, name)) for axis in param.axes)
        spec = logical_to_mesh_axes(param.axes, rules)
        for axis, size, place in zip(param.axes, param.shape, spec, strict=True):
            if place is None or size % mesh.shape[place] == 0:
                continue
            raise ValueError(
                f"axis {axis} of parameter {name} is {size}, which mesh.{place} "
                f"({mesh.shape[place]}) does not divide"
            )
        out[name] = NamedSharding(mesh, spec)
    return out


def rule(axis: str, name: str) -> str | None:
    """The mesh axis of a parameter's axis; `teacher/embed` is split as `embed` is."""
    own = axis.rpartition("/")[2]
    if own in FREE:
        return None
    if own not in RULES:
        raise ValueError(
            f"parameter {name} has the axis {axis!r}; allowed are {', '.join([*RULES, *FREE])}, "
            "and these with a prefix, such as teacher/embed"
        )
    return RULES[own]


def is_local() -> bool:
    """Whether what is traced is what one device does with its own rows, see `lib.own_gradient`."""
    kinds = get_abstract_mesh().axis_types
    return bool(kinds) and all(kind == AxisType.Manual for kind in kinds)


def split_of(places) -> int | None:
    """Which axis of an array, by the mesh axes of its axes, fsdp splits; None where it does not."""
    mesh = get_abstract_mesh()
    split = "fsdp" in places and not mesh.empty and mesh.shape["fsdp"] > 1
    return list(places).index("fsdp") if split else None


def constrain(x, *places) -> jax.Array:
    """Fix where x lives in a jitted program; without a mesh, or on one device of it, do nothing.

    places: for the axes of x in turn, the mesh axis or axes that it is split over, or None. An
    axis that these do not divide stays whole.
    """
    mesh = get_abstract_mesh()
    if mesh.empty or is_local():
        return x
    spec = []
    for place, size in zip(places, x.shape, strict=False):
        fits = place is not None and size % parts(mesh, place) == 0
        spec.append(place if fits else None)
    return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def parts(mesh, place: str | tuple[str, ...]) -> int:
    """The number of parts that a mesh axis, or several, split an array's axis into."""
    return math.prod(mesh.shape[axis] for axis in np.ravel(place))


def by_row(mesh: Mesh, rows: int) -> NamedSharding:
    """A batch, its rows over the axes data and fsdp; whole everywhere if that leaves a rest."""
    if rows % parts(mesh, ROWS):
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(ROWS))


def own_rows(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's `rows` live on devices of this process, ascending."""
    sharding = by_row(mesh, rows)
    by_device = sharding.addressable_devices_indices_map((rows,))
    every = np.arange(rows)
    return np.unique(np.concatenate([every[index] for index in by_device.values()]))


def put(batch: dict, mesh: Mesh, rows: int | None = None) -> dict[str, jax.Array]:
    """A batch, onto the devices of all processes.

    Each process gives the whole batch, or, of a batch of `rows` rows, its `own_rows`.
    """
    if rows is None:
        rows = len(batch["tokens"])
    sharding = by_row(mesh, rows)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def global_array(own):
        shape = (rows, *own.shape[1:])
        return jax.make_array_from_process_local_data(sharding, own, shape)

    return {name: global_array(own) for name, own in batch.items()}


def largest(value: int, mesh: Mesh) -> jax.Array | int:
    """The largest of the values that the processes give, still on the devices."""
    if jax.process_count() == 1:
        return value
    one_each = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    own = np.full(jax.local_device_count(), value, np.int32)
    values = jax.make_array_from_process_local_data(one_each, own, (jax.device_count(),))
    return jnp.max(values)
