"""Products of arrays, each in the form that the device at hand is fast at."""
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import get_abstract_mesh


def float32_or_wider(dtype):
    """The dtype in which sums and normalisers of `dtype` are computed."""
    return jnp.promote_types(dtype, jnp.float32)


def product(axes: str, x, y, out) -> jax.Array:
    """`jnp.einsum` of two arrays, in the dtype `out`; axes: as "ni,io->no".

    Axes that both arrays and the result have must come first in each. On one CPU, 16-bit products
    are summed in float32, and the sum is rounded. x is turned so that the sum is over its last
    axis. XLA has kernels for this form alone, several times as fast on a CPU with AMX. All others
    it makes of float32 copies.
    """
    if x.dtype.itemsize > 2 or not on_one_cpu():
        return jnp.einsum(axes, x, y, preferred_element_type=out)
    inputs, made = axes.split("->")
    left, right = inputs.split(",")
    order = sorted(left, key=lambda axis: axis not in made)  # what is summed over comes last
    turned = "".join(order)
    if turned != left:
        x = jnp.einsum(f"{left}->{turned}", x)
        x = in_rows(x)
    axes = f"{turned},{right}->{made}"
    sums = jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)
    return sums.astype(out)


def in_rows(x) -> jax.Array:
    """x, written out with its last axis innermost, where XLA would read it another way round."""
    order = tuple(range(x.ndim))
    return with_layout_constraint(x, Layout(major_to_minor=order))


def on_one_cpu() -> bool:
    """Whether the mesh is one CPU; without a mesh, whether the default device is one."""
    mesh = get_abstract_mesh()
    device = mesh.abstract_device
    if device is None:
        return jax.default_backend() == "cpu"
    return mesh.size == 1 and device.platform == "cpu"


def padded_for_cache(y) -> jax.Array:
    """y [n o], on one CPU with 16 columns more where o is a multiple of 2048.

    Rows of 8 KiB, or a multiple of that, share few sets of a CPU's cache. Then the product is a
    fifth to two fifths slower.
    """
    if on_one_cpu() and y.shape[1] % 2048 == 0:
        return jnp.pad(y, ((0, 0), (0, 16)))
    return y
