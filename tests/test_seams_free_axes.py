"""Products with rows whose axes are free: `times` of a block takes what a config adds to the table."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib.kernels import dense
from lib.sharding import MeshConfig, make_mesh


@pytest.mark.parametrize("axes, shape", [(("embed", "out"), (8, 12)), (("in", "rank"), (8, 3)),
                                         (("in", "embed"), (8, 16)), (("embed", "expert", "out"), (8, 4, 6))])
def test_a_product_with_free_axes_is_a_product_on_one_device_and_on_eight(axes, shape):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 5, 8), shape))
    value = jax.value_and_grad(lambda w: jnp.sum(jnp.sin(dense(x, w, axes))))
    expected = jax.value_and_grad(
        lambda w: jnp.sum(jnp.sin(jnp.tensordot(x, w, 1))))(w)
    for mesh in (make_mesh(MeshConfig(), jax.devices()[:1]), make_mesh(MeshConfig(fsdp=4, tensor=2))):
        with jax.set_mesh(mesh):
            for got, want in zip(jax.jit(value)(w), expected, strict=True):
                np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)
