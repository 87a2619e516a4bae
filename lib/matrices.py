"""The matrices of the blocks, that of one layer as [inputs, outputs]."""
import math

from lib.edits import writes_stream
from lib.errors import InputError
from model import ModelConfig, Param, plain_table


def matrices(config: ModelConfig) -> dict[str, Param]:
    """The rows of the plain Llama that are matrices of its blocks."""
    found = {}
    for name, row in plain_table(config).items():
        if row.layered and row.group == "matrix":
            found[name] = row
    return found


def sides(param: Param) -> tuple[int, int]:
    """(inputs, outputs) of one layer's matrix; raises InputError for what has one axis alone."""
    inner = param.shape[1:]  # without `layers`
    if not inner:
        raise InputError(
            f"model.rows: a parameter of the optimiser group {param.group} has the axes "
            f"{', '.join(param.axes)}; allowed are others besides layers"
        )
    size = math.prod(inner)
    if writes_stream(param):
        outputs = inner[-1]
        return size // outputs, outputs
    inputs = inner[0]
    return inputs, size // inputs


def flat(x, param: Param):
    """A stacked parameter, or what is shaped like it, as [layers, inputs, outputs]."""
    return x.reshape(len(x), *sides(param))


def smaller_first(x, param: Param):
    """A matrix [layers inputs outputs] with its smaller side first, or one turned so as it was."""
    inputs, outputs = sides(param)
    if inputs <= outputs:
        return x
    return x.swapaxes(1, 2)
