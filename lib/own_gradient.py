"""Gradients that each device makes of its own rows, and that are added up once a step.

Inside, an array is what one device holds of it. The matrices of the blocks stay split over the mesh
axis fsdp: each product gathers what it needs, and scatters the sum of its gradient over fsdp. All
other parameters are gathered first. So the gradients of a head, of a table that is tied to it, and
of all of a model that is on each device, are added up once, however many parts a batch is taken in.
"""
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import PartitionSpec, get_abstract_mesh

from lib.sharding import ROWS, parts, rule, split_of


def applies(rows: int, taken_in: int) -> bool:
    """Whether several devices share rows that are taken in so many parts, and nothing else."""
    mesh = get_abstract_mesh()
    if mesh.empty or mesh.shape["tensor"] > 1:
        return False
    devices = parts(mesh, ROWS)
    return devices > 1 and rows % (devices * taken_in) == 0


def summed_over_devices(
    sums_and_gradient: Callable,
    moving: dict,
    still: dict,
    batch: dict,
    rows: dict,
):
    """sums_and_gradient(moving, still, batch) -> (sums, gradient of moving), of all devices' rows.

    It gets the rows of one device, and what it gives is added up. moving, still: parameters by
    name. rows: their rows of the table.
    """

    def places(tree: dict) -> dict:
        return {name: spec_of(name, rows[name]) for name in tree}

    def gathered(tree: dict) -> dict:
        return {name: whole(name, x, rows[name]) for name, x in tree.items()}

    def own(moving, still, batch):
        moving = gathered(moving)
        still = gathered(still)
        sums, gradient = sums_and_gradient(moving, still, batch)
        found = {}
        for name, x in gradient.items():
            found[name] = total(name, x, rows[name])
        return lax.psum(sums, ROWS), found

    spread = jax.shard_map(
        own,
        in_specs=(places(moving), places(still), PartitionSpec(ROWS)),
        out_specs=(PartitionSpec(), places(moving)),
        check_vma=False,
    )
    return spread(moving, still, batch)


def spec_of(name: str, row) -> PartitionSpec:
    """Where a parameter of the table lives."""
    places = [rule(axis, name) for axis in row.axes]
    return PartitionSpec(*places)


def by_products(row) -> bool:
    """Whether products gather a parameter: it is a matrix of a block."""
    return row.layered and len(row.axes) > 2


def whole(name: str, x, row) -> jax.Array:
    """All of a parameter, unless products gather it."""
    split = split_of(spec_of(name, row))
    if split is None or by_products(row):
        return x
    return lax.all_gather(x, "fsdp", axis=split, tiled=True)


def total(name: str, x, row) -> jax.Array:
    """What a device holds of a parameter's gradient, added up over all devices."""
    split = split_of(spec_of(name, row))
    if split is None:
        return lax.psum(x, ROWS)
    if not by_products(row):  # of these, products have added it up over fsdp already
        x = lax.psum_scatter(x, "fsdp", scatter_dimension=split, tiled=True)
    return lax.psum(x, "data")
