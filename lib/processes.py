"""The processes of a run: which one writes, and what they tell each other."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_main_process() -> bool:
    """Is this the one of a run's processes that writes files and prints?"""
    return jax.process_index() == 0


def all_gather(value) -> np.ndarray:
    """What each process gives [processes]; all of them wait for each other."""
    return multihost_utils.process_allgather(np.array(value))
