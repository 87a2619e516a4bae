"""Muon: the momentum of each layer's matrix, with its singular values made about equal."""
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lib.edits import check_options
from lib.matrices import flat
from lib.optim import adamw
from model import Param

# Coefficients (a, b, c) of x -> a x + b x x' x + c x x' x x' x, iteration by iteration.
# The first five times gives singular values between about 0.7 and 1.2 (Jordan et al. 2024). The
# second is the best of five in turn for those from 1e-3 to 1 (Polar Express, Amsel et al. 2025,
# arXiv 2505.16932), as computed for modded-nanogpt: safety factor 2e-2, cushion 2.
COEFFICIENTS = {
    "newton_schulz": ((3.4445, -4.7750, 2.0315),) * 5,
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


def muon(
    table: dict[str, Param],
    beta: float = 0.95,
    rms: float = 0.2,
    weight_decay: float = 0.1,
    iteration: Literal["newton_schulz", "polar_express"] = "newton_schulz",
    units: Literal["plain", "equal", "normal"] = "plain",
    beta2: float = 0.95,
    **adam,
) -> dict[str, optax.GradientTransformation]:
    """Muon (Jordan et al. 2024) for the matrices, AdamW for the rest.

    Each layer's matrix is orthogonalised, with the input and output axes that the table names. The
    update has about the root mean square `rms`, that of AdamW's, so that one rate serves all (Liu
    et al. 2025, eq. 4).
    units: what is done to the outputs of a matrix. "equal" gives their momentum equal norms before
    it is orthogonalised (MuonEq, arXiv 2603.28254). "normal" divides what each output has after
    it by its root mean square over past steps, of decay `beta2` (NorMuon, Li et al. 2025, arXiv
    2510.05491). That state is no mirror of the parameters: an edit may only reset it.
    Raises ValueError for an unknown option.
    """
    check_options(muon, iteration=iteration, units=units)
    rows = {name: row for name, row in table.items() if row.group == "matrix"}
    orthogonalise = partial(orthogonal, coefficients=COEFFICIENTS[iteration])
    matrices = optax.chain(
        optax.trace(beta, nesterov=True),
        each(rows, equal_outputs) if units == "equal" else optax.identity(),
        each(rows, orthogonalise),
        normal_outputs(rows, beta2) if units == "normal" else each(rows, unit_rms),
        optax.scale(rms),
        optax.add_decayed_weights(weight_decay),
    )
    others = adamw(table, weight_decay=weight_decay, **adam)
    return others | {"matrix": matrices}


def each(rows: dict[str, Param], change: Callable) -> optax.GradientTransformation:
    """Change the matrices [layers inputs outputs] of updates."""

    def update(tree, _):
        changed = {}
        for name, x in tree.items():
            matrices = flat(x, rows[name])
            changed[name] = change(matrices).reshape(x.shape)
        return changed

    return optax.stateless(update)


def equal_outputs(x) -> jax.Array:
    """Matrices [l i o] whose outputs have a root mean square of 1 each."""
    return x / jnp.maximum(rms_of(x, 1), 1e-12)


def rms_of(x, axes) -> jax.Array:
    """Root mean square over axes, which stay as 1."""
    squares = jnp.square(x)
    return jnp.sqrt(jnp.mean(squares, axes, keepdims=True))


def orthogonal(x, coefficients) -> jax.Array:
    """Matrices [l i o] with singular values of about 1, by odd polynomials of degree 5 in turn."""
    turned = x.shape[1] > x.shape[2]
    if turned:
        x = x.swapaxes(1, 2)
    norm = rms_of(x, (1, 2)) * math.sqrt(math.prod(x.shape[1:]))
    x = x / (1.02 * norm + 1e-12)  # no singular value is above 1
    for a, b, c in coefficients:
        square = x @ x.swapaxes(1, 2)
        higher = b * square + c * square @ square
        x = a * x + higher @ x
    return x.swapaxes(1, 2) if turned else x


def unit_rms(x) -> jax.Array:
    """Orthogonal matrices [l i o], times what makes their root mean square 1."""
    return x * math.sqrt(max(x.shape[1:]))


class Outputs(NamedTuple):
    """The state of `normal_outputs`."""

    nu: dict[str, jax.Array]  # mean square of each output [layers outputs], decayed


def normal_outputs(rows: dict[str, Param], beta2: float) -> optax.GradientTransformation:
    """Divide each output by its own root mean square over past steps; give all that of 1."""

    def begin(params):
        nu = {}
        for name, x in params.items():
            matrices = flat(x, rows[name])
            nu[name] = jnp.zeros_like(matrices[:, 0])
        return Outputs(nu)

    def update(tree, state, params=None):
        nu, out = {}, {}
        for name, x in tree.items():
            matrices = flat(x, rows[name])
            now = jnp.mean(jnp.square(matrices), 1)
            nu[name] = beta2 * state.nu[name] + (1 - beta2) * now
            deviation = jnp.sqrt(nu[name])[:, None]
            normal = matrices / (deviation + 1e-12)
            normal = normal / jnp.maximum(rms_of(normal, (1, 2)), 1e-12)
            out[name] = normal.reshape(x.shape)
        return out, Outputs(nu)

    return optax.GradientTransformation(begin, update)
