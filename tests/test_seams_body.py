"""What a body of `model.stream` is told, and that the plain one is a body."""
import jax.numpy as jnp
import numpy as np
from conftest import strong

import model
from lib.kernels import Mask, residual

MASK = Mask("causal", 0)


def streamed(shape, **how):
    """(the stream after all blocks, what was kept) of a small batch."""
    params = strong(shape)
    batch = model.whole(jnp.arange(12, dtype=jnp.int32).reshape(2, 6))
    x = model.embedded(params, batch, shape)
    return model.stream(params, x, batch, MASK, shape, **how)


def test_a_body_stands_in_the_place_of_the_block(tiny):
    """Written out, the plain block gives the same numbers; it is told its layer and its products."""
    batch = model.whole(jnp.arange(12, dtype=jnp.int32).reshape(2, 6))
    angles = model.rope(batch["positions"], tiny)
    attend = model.plain_attend(batch, MASK, tiny)

    def body(x, w, times, layer):
        n = model.rms_norm(x, w["attn_norm"], tiny.norm_eps)
        mixed, _ = model.attention_mixer(n, w, times, angles, attend, tiny)
        x = residual(x, mixed)
        n = model.rms_norm(x, w["mlp_norm"], tiny.norm_eps)
        return residual(x, model.gated_mlp(n, w, times)), layer

    expected, _ = streamed(tiny)
    x, (layers, _) = streamed(tiny, body=body)
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
    assert layers.tolist() == list(range(tiny.layers))


def test_angles_of_few_pairs_leave_the_rest_of_a_head_as_it_is(tiny):
    x = jnp.arange(2 * 3 * 8, dtype=jnp.float32).reshape(1, 2, 3, 8)
    angle = jnp.full((1, 2, 2), 0.3)
    turned = model.rotate(x, jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    alone = model.rotate(x[..., :4], jnp.cos(angle), jnp.sin(angle))
    np.testing.assert_array_equal(turned[..., :4], alone)
