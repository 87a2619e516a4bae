"""Products in 16 bits and in 32: of the numbers that are given, however they are laid out."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.products import product
from lib.sharding import MeshConfig, make_mesh

SIZES = dict(zip("bkntsiohrg", (2, 3, 40, 5, 7, 16, 24, 8, 9, 4), strict=True))
AXES = "ni,io->no", "no,io->ni", "ni,no->io", "bkts,bkth->bksh", "bkts,bksh->bkth", "ngh,nsh->ngs"


def drawn(axes: str, dtype) -> tuple:
    """Two arrays of these axes, and their product in float64."""
    rng = np.random.default_rng(0)
    left, right = axes.split("->")[0].split(",")
    x, y = (jnp.asarray(rng.normal(size=[SIZES[axis] for axis in one]), dtype)
            for one in (left, right))
    exact = np.einsum(axes, np.asarray(x, np.float64), np.asarray(y, np.float64))
    return x, y, exact


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_product_is_rounded_once(axes, dtype):
    """What comes in 16 bits is the sum in 32, rounded; on one device and on several."""
    x, y, exact = drawn(axes, dtype)
    largest = np.abs(exact).max()
    wide = jax.jit(lambda x, y: product(axes, x, y, jnp.float32))(x, y)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=0, atol=2e-6 * largest)
    for devices in jax.devices()[:1], jax.devices():
        with jax.set_mesh(make_mesh(MeshConfig(), devices)):
            narrow = jax.jit(lambda x, y: product(axes, x, y, x.dtype))(x, y)
        assert narrow.dtype == dtype
        half = jnp.finfo(dtype).eps / 2
        np.testing.assert_allclose(
            np.asarray(narrow, np.float64), exact, rtol=half, atol=4e-6 * largest)


@pytest.mark.parametrize("axes", AXES)
def test_products_in_32_bits_are_the_plain_ones(axes):
    x, y, _ = drawn(axes, "float32")

    def text(function):
        return jax.jit(function).lower(x, y).as_text()

    assert text(lambda x, y: product(axes, x, y, jnp.float32)) == text(
        lambda x, y: jnp.einsum(axes, x, y, preferred_element_type=jnp.float32))


@pytest.mark.parametrize("axes", AXES)
def test_a_product_in_16_bits_has_the_form_that_a_cpu_has_kernels_for(axes):
    """On one CPU: sums in float32, over the last axis of what comes first. On several: the plain."""
    x, y, _ = drawn(axes, "bfloat16")
    for devices in jax.devices()[:1], jax.devices():
        with jax.set_mesh(make_mesh(MeshConfig(), devices)):
            program = jax.make_jaxpr(lambda x, y: product(axes, x, y, x.dtype))(x, y)
        (dot,) = [each for each in program.eqns if each.primitive.name == "dot_general"]
        (summed, _), _ = dot.params["dimension_numbers"]
        assert dot.params["preferred_element_type"] == (jnp.float32 if len(devices) == 1 else x.dtype)
        if len(devices) == 1:
            assert summed == (dot.invars[0].aval.ndim - 1,)


def test_a_product_in_16_bits_can_be_mapped():
    """As runs that are one program do."""
    x, y, exact = drawn("ni,no->io", "bfloat16")
    both = jax.vmap(lambda x: product("ni,no->io", x, y, jnp.float32))(jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(both, np.stack([exact, 2 * exact]), rtol=0, atol=1e-4)
