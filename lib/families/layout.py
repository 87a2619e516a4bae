"""What is in a tensor of a checkpoint: a layer's parameter, turned or beside others."""
import math

import numpy as np

from lib.families.family import Family
from model import Param


def layers_of(p: Param) -> list[int | None]:
    """The layers that a parameter has a tensor for, or [None]."""
    if not p.layered:
        return [None]
    number = p.shape[0]
    return list(range(number))


def sides(p: Param) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of a layer's inputs and outputs, see `model.dense`; a vector has no inputs."""
    first = 1 if p.layered else 0
    shape = p.shape[first:]
    axes = p.axes[first:]
    if p.group in ("vector", "bias"):
        inputs = 0
    elif axes[0] == "embed":
        inputs = 1
    else:
        inputs = len(axes) - 1
    return shape[:inputs], shape[inputs:]


def is_turned(p: Param, family: Family) -> bool:
    """Whether its tensor is [outputs, inputs]; a lookup table, and a vector, is as it is.

    The head always is, and the matrices of blocks where the family says so.
    """
    inputs, _ = sides(p)
    if not inputs:
        return False
    if p.layered:
        return family.transposed
    return p.axes[-1] != "embed"


def flat_size(p: Param) -> list[int]:
    """A layer of a parameter as [inputs, outputs], or as [outputs]."""
    inputs, outputs = sides(p)
    size = [math.prod(outputs)]
    if inputs:
        size.insert(0, math.prod(inputs))
    return size


def size_in_file(group: list[Param], family: Family) -> list[int]:
    """The shape of a layer's tensor of one parameter, or of several beside one another."""
    sizes = [flat_size(p) for p in group]
    *inputs, _ = sizes[0]
    outputs = sum(size[-1] for size in sizes)
    size = [*inputs, outputs]
    if is_turned(group[0], family):
        size.reverse()
    return size


def pack(layer: list[np.ndarray], group: list[Param], family: Family) -> np.ndarray:
    """The tensor of a layer's parameters, given in the table's shapes."""
    parts = []
    for x, p in zip(layer, group, strict=True):
        x = x.reshape(flat_size(p))
        parts.append(x - shift(p, family))
    if by_head(group, family):
        parts = [heads_apart(x, group) for x in parts]
        x = np.concatenate(parts, -1)
        x = x.reshape(*x.shape[:-2], -1)
    else:
        x = np.concatenate(parts, -1)
    if is_turned(group[0], family):
        return x.T
    return x


def unpack(x: np.ndarray, group: list[Param], family: Family) -> list[np.ndarray]:
    """A layer's parameters in the table's shapes, of their tensor."""
    if is_turned(group[0], family):
        x = x.T
    if by_head(group, family):
        x = heads_apart(x, group)
    sizes = [flat_size(p)[-1] for p in group]
    ends = np.cumsum(sizes)
    ends = ends * x.shape[-1] // ends[-1]  # of one head, if these are apart
    parts = np.split(x, ends[:-1], -1)
    out = []
    for part, p in zip(parts, group, strict=True):
        inputs, outputs = sides(p)
        shape = *inputs, *outputs
        out.append(part.reshape(shape))
    return out


def by_head(group: list[Param], family: Family) -> bool:
    """Whether the parts of a head stand together in a tensor."""
    return family.by_head and len(group) > 1


def heads_apart(x: np.ndarray, group: list[Param]) -> np.ndarray:
    """Outputs [... heads n] of a group's heads, of [... outputs]."""
    _, outputs = sides(group[0])
    *before, _ = x.shape
    heads = outputs[0]
    return x.reshape(*before, heads, -1)


def shift(p: Param, family: Family) -> np.ndarray:
    """What our value of a parameter has more than the file's, see `Family.gain`."""
    is_gain = p.group == "vector"
    return np.float32(family.gain if is_gain else 0)
