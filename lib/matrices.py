"""The matrices of the blocks, that of one layer as [inputs, outputs]."""
import math

from lib.edits import writes_stream
from model import ModelConfig, Param, plain_table


def matrices(config: ModelConfig) -> dict[str, Param]:
    """The rows of the plain Llama that are matrices of its blocks."""
    rows = plain_table(config)
    return {name: row for name, row in rows.items() if row.layered and row.group == "matrix"}


def sides(param: Param) -> tuple[int, int]:
    """(inputs, outputs) of one layer's matrix."""
    inner = param.shape[1:]  # without `layers`
    size = math.prod(inner)
    if writes_stream(param):
        return size // inner[-1], inner[-1]
    return inner[0], size // inner[0]


def flat(x, param: Param):
    """A stacked parameter, or what is shaped like it, as [layers, inputs, outputs]."""
    return x.reshape(len(x), *sides(param))


def smaller_first(x, param: Param):
    """A matrix [layers inputs outputs] with its smaller side first, or one turned so as it was."""
    inputs, outputs = sides(param)
    return x if inputs <= outputs else x.swapaxes(1, 2)
