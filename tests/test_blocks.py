"""lib/blocks.py: attention of long rows, in blocks of queries and keys, against the whole square."""
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lib import kernels
from lib.blocks import Blocks, in_blocks, pairs
from lib.kernels import attention, reference
from lib.masks import Mask, allowed
from model import rematerialised

CAUSAL = Mask("causal", 0)
XLA = partial(attention, implementation="xla")
MASKS = [
    CAUSAL,
    Mask("causal", 1),
    Mask("causal", 6),
    Mask("prefix", 0),
    Mask("prefix", 5),
    Mask("bidirectional", 0),
    Mask("bidirectional", 6),
]


def drawn(length, kv=2, group=3, width=8, batch=2, dtype="float32"):
    """(q, k, v, gradient of the output), and (segments with padding, prefix marks)."""
    rng = np.random.default_rng(length)
    q, d_out = rng.normal(size=(2, batch, length, kv, group, width))
    k, v = rng.normal(size=(2, batch, length, kv, width))
    segments = np.sort(rng.integers(1, 4, (batch, length)), axis=1)
    segments[0, -3:] = 0
    prefix = rng.integers(0, 2, (batch, length))
    given = [jnp.asarray(x, dtype) for x in (q, k, v, d_out)]
    return given, (jnp.asarray(segments), jnp.asarray(prefix))


def both(attend, mask, given, marks):
    """The output, and the gradients of q, k and v."""

    @jax.jit
    def compute(q, k, v, d_out):
        out, back = jax.vjp(lambda *qkv: attend(*qkv, mask, *marks), q, k, v)
        return out, *back(d_out)

    return compute(*given)


def relative(one, other) -> float:
    """The largest difference, of the largest value."""
    return float(jnp.max(abs(one - other)) / jnp.max(abs(other)))


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_blocks_have_the_values_and_the_gradients_of_the_whole_square(mask, size):
    """Grouped queries, segments, padding, prefixes and windows, in float64."""
    with jax.enable_x64(True):
        given, marks = drawn(24, dtype="float64")
        got = both(partial(in_blocks, size=size), mask, given, marks)
        expected = both(reference, mask, given, marks)
        for one, other in zip(got, expected, strict=True):
            assert relative(one, other) < 1e-12


def test_the_gradients_are_finite_differences_in_float64():
    with jax.enable_x64(True):
        (*qkv, d_out), marks = drawn(12, dtype="float64")

        @jax.jit
        def total(*qkv):
            return jnp.sum(in_blocks(*qkv, CAUSAL, *marks, size=4) * d_out)

        directions = [jnp.cos(jnp.arange(x.size, dtype=float)).reshape(x.shape) for x in qkv]
        gradients = jax.grad(total, (0, 1, 2))(*qkv)
        slope = sum(jnp.sum(x * y) for x, y in zip(gradients, directions, strict=True))
        step = 1e-5
        ahead, behind = (
            total(*[x + sign * step * y for x, y in zip(qkv, directions, strict=True)])
            for sign in (1, -1)
        )
        assert float((ahead - behind) / (2 * step)) == pytest.approx(float(slope), rel=1e-8)


@pytest.mark.parametrize("mask", [CAUSAL, Mask("causal", 200), Mask("prefix", 0)], ids=str)
@pytest.mark.parametrize("kept", [0, kernels.KEPT])
def test_long_rows_on_a_cpu_have_the_values_of_the_whole_square(mask, kept, monkeypatch):
    """Float32, in blocks of 128 and of 64, and by quarters where scores are kept."""
    monkeypatch.setattr(kernels, "KEPT", kept)
    for length in (320, 640):
        given, marks = drawn(length, kv=1, group=2, batch=1)
        with jax.enable_x64(True):
            wide = [jnp.asarray(x, "float64") for x in given]
            exact = both(reference, mask, wide, marks)
            for one, other in zip(both(XLA, mask, given, marks), exact, strict=True):
                assert one.dtype == "float32"
                assert relative(one, other) < 1e-6


def test_large_scores_and_blocks_in_which_nothing_is_seen_stay_exact():
    """Each position is a segment: whole blocks are unseen, before and after a score of thousands."""
    (q, k, v, d_out), (segments, prefix) = drawn(16)
    segments = jnp.arange(16)[None] + 0 * segments
    given = 100 * q, 100 * k, v, d_out
    mask = Mask("bidirectional", 0)
    out, d_q, d_k, d_v = both(partial(in_blocks, size=4), mask, given, (segments, prefix))
    alone = jnp.broadcast_to(v[:, :, :, None], q.shape)
    np.testing.assert_array_equal(out, alone)
    assert jnp.max(abs(d_q)) < 1e-3  # of roundings, times keys of some hundred
    assert jnp.max(abs(d_k)) < 1e-3
    np.testing.assert_allclose(d_v, jnp.sum(d_out, 3), rtol=1e-6)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_only_blocks_that_can_be_seen_are_computed(mask):
    blocks, size = 5, 4
    index = np.arange(blocks * size)
    ones = np.ones((1, blocks * size), int)
    square = np.array(allowed(mask, index, index, ones, ones, ones))[0]
    parts = square.reshape(blocks, size, blocks, size).any((1, 3))
    found = pairs(Blocks(mask, size, size), blocks * size)
    assert [*zip(*found, strict=True)] == [*zip(*np.nonzero(parts), strict=True)]


def equations(length: int) -> str:
    """The program of attention and its gradient for such rows, without its numbers."""
    given, marks = drawn(length, batch=1)
    program = str(jax.make_jaxpr(lambda *given: both(XLA, CAUSAL, given, marks))(*given))
    assert f"{length},{length}]" not in program
    return "".join(letter for letter in program if not letter.isdigit())


def test_the_program_of_a_longer_row_is_no_larger_and_never_has_the_square(monkeypatch):
    monkeypatch.setattr(kernels, "KEPT", 512)
    assert len(equations(1_024)) == pytest.approx(len(equations(640)), rel=0.02)


def test_where_scores_are_kept_it_is_no_larger_either(monkeypatch):
    """Eight blocks of queries, of which the last sees all keys."""
    monkeypatch.setattr(kernels, "KEPT", 2_048)
    assert len(equations(2_048)) == pytest.approx(len(equations(1_024)), rel=0.02)


def test_the_backward_pass_keeps_q_k_v_the_output_and_one_sum_a_query():
    (q, k, v, _), (segments, _) = drawn(16, dtype="bfloat16")
    kept = jax.eval_shape(
        lambda *qkv: jax.vjp(lambda *qkv: in_blocks(*qkv, CAUSAL, segments, None, 4), *qkv)[1],
        q, k, v,
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept) if x.ndim)
    sums = q.size // q.shape[-1]  # float32
    wanted = 2 * (2 * q.size + k.size + v.size) + 4 * sums + segments.nbytes
    assert size == wanted


def test_elementwise_recomputation_makes_the_output_once(tiny):
    """Its output and its sums are kept; where all is computed again, it is made twice."""
    given, marks = drawn(16)

    def layer(qkv):
        return in_blocks(*qkv, CAUSAL, *marks, size=4)

    loops = {}
    for remat in ("none", "elementwise", "all"):
        again = rematerialised(layer, replace(tiny, remat=remat))
        program = jax.make_jaxpr(jax.grad(lambda qkv, again=again: jnp.sum(again(qkv))))
        loops[remat] = str(program(given[:3])).count(" scan[")
    assert loops == {"none": 2, "elementwise": 2, "all": 3}


def test_sums_are_float32_where_values_are_bfloat16():
    given, marks = drawn(32, dtype="bfloat16")
    exact = both(reference, CAUSAL, [x.astype("float32") for x in given], marks)
    got = both(partial(in_blocks, size=4), CAUSAL, given, marks)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == "bfloat16"
        assert relative(one.astype("float32"), other) < 2e-2
