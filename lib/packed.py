"""The metrics of a step as one array, so that one transfer brings all of them to the host."""
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp


class Packed(flax.struct.PyTreeNode):
    """Scalars by name; each is read as an entry of `values`, or all of them by `figures`."""

    values: jax.Array  # [metrics]
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    def keys(self) -> tuple[str, ...]:
        """The names."""
        return self.names

    def __getitem__(self, name: str) -> jax.Array:
        return self.values[..., self.names.index(name)]


def pack(metrics: Mapping) -> Packed:
    """Scalars as one array, in float32 or the widest of them."""
    names = tuple(sorted(metrics))
    each = [metrics[name] for name in names]
    widest = jnp.result_type(jnp.float32, *each)
    flat = [jnp.reshape(x, ()) for x in each]
    wide = [x.astype(widest) for x in flat]
    values = jnp.stack(wide)
    return Packed(values, names)


def figures(metrics: Packed | Mapping) -> dict[str, float]:
    """The metrics of a step as Python's numbers; waits for them."""
    if isinstance(metrics, Packed):
        found = jax.device_get(metrics.values)
        return dict(zip(metrics.names, found.tolist(), strict=True))
    found = jax.device_get(dict(metrics))
    return {
        name: float(value)
        for name, value in found.items()
    }
