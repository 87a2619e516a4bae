"""What a mixer of `model.stream` may ask for, and an MLP of a config's own."""
import jax.numpy as jnp
import numpy as np
from conftest import strong

import model
from lib.kernels import Mask


def test_a_mixer_is_told_the_stream_before_its_norm_and_its_layer(tiny):
    params = strong(tiny)
    batch = model.whole(jnp.arange(12, dtype=jnp.int32).reshape(2, 6))
    x = model.embedded(params, batch, tiny)
    streams = [x]

    def mixer(n, w, times, before, layer):
        return jnp.zeros_like(n), (n, before, layer)

    def visit(x, layer, w):
        return x, x

    mask = Mask("causal", 0)
    _, ((normed, before, layers), after) = model.stream(
        params, x, batch, mask, tiny, mixer=mixer, visit=visit)
    streams += list(after[:-1])
    np.testing.assert_array_equal(before, jnp.stack(streams))
    assert layers.tolist() == list(range(tiny.layers))
    gains = params["attn_norm"][:, None, None]
    np.testing.assert_array_equal(normed, model.rms_norm(before, gains, tiny.norm_eps))


def test_a_block_s_mlp_may_be_another(tiny):
    """It gets the normed stream, and its output is added; the default is the SwiGLU."""
    batch = model.whole(jnp.arange(12, dtype=jnp.int32).reshape(2, 6))
    params = strong(tiny)
    x = model.embedded(params, batch, tiny)

    def doubled(n, w, times):
        return 2 * model.gated_mlp(n, w, times)

    twice = params | {"down": 2 * params["down"]}
    found, _ = model.stream(params, x, batch, model.CAUSAL, tiny, mlp=doubled)
    expected, _ = model.stream(twice, x, batch, model.CAUSAL, tiny)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
