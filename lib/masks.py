"""What a query sees: a specification, and the square of booleans that it stands for."""
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees, always within its own segment.

    causal: keys at or before the query. prefix: these, and every key that `prefix` marks.
    bidirectional: all keys. window: a query sees the `window` nearest keys at or before it
    (bidirectional: and as many after it); 0: all.

    There are no defaults of these two: whoever attends must say. Raises ValueError for anything
    else. segments says nothing of what is seen: no row has more of them than so many, padding is
    one of them, and each lies together; 0: that is not known.
    """

    kind: Literal["causal", "prefix", "bidirectional"]
    window: int
    segments: int = 0

    def __post_init__(self):
        known = self.kind in ("causal", "prefix", "bidirectional")
        if not known or self.window < 0:
            raise ValueError(
                f"mask {self.kind!r}, window {self.window}: kind is causal, prefix or "
                "bidirectional, and window is 0 or more"
            )


def allowed(
    mask: Mask,
    q_index,
    k_index,
    q_segment,
    k_segment,
    k_prefix=None,
) -> jax.Array:
    """bool [b t s]: may the query at `q_index` [t] see the key at `k_index` [s]?

    Segments are [b t] and [b s]. k_prefix [b s] marks what all see under a prefix mask.
    """
    ahead = k_index[None, :] - q_index[:, None]  # [t s], positive in the future
    if mask.kind == "bidirectional":
        visible = jnp.ones_like(ahead, bool)[None]
    else:
        visible = (ahead <= 0)[None]
    if mask.kind == "prefix":
        visible = visible | (k_prefix[:, None, :] > 0)
    if mask.window:
        visible = visible & (abs(ahead) < mask.window)[None]
    q_segment = q_segment[:, :, None]
    k_segment = k_segment[:, None, :]
    return visible & (q_segment == k_segment)
