"""Which attention is chosen where, and the offsets that cuDNN's packed layout is told of."""
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import model
import train
from data import Batch
from lib import flash, kernels
from lib.config import ROOT, load_file
from lib.hardware import capability, hardware
from lib.kernels import ATTENTION, choose, counts_segments, settled
from lib.masks import Mask
from lib.packing import BOUNDS, bound_on_segments
from model import ModelConfig, rematerialised

CAUSAL, PREFIX, BOTH = (Mask(kind, 0) for kind in ("causal", "prefix", "bidirectional"))
CPU, TPU = ("cpu", (0, 0)), ("tpu", (0, 0))
HOPPER, AMPERE, TURING, OTHER = (
    ("gpu", each) for each in ((9, 0), (8, 0), (7, 5), (0, 0)))


def causal(segments: int) -> Mask:
    return Mask("causal", 0, segments)


@pytest.mark.parametrize("mask, device, dtype, head_dim, chosen", [
    (causal(1), HOPPER, "bfloat16", 64, "cudnn_causal"),
    (causal(8), HOPPER, "bfloat16", 64, "cudnn_packed"),
    (causal(128), ("gpu", (10, 0)), "bfloat16", 256, "cudnn_packed"),
    (causal(0), HOPPER, "bfloat16", 64, "cudnn"),
    (Mask("causal", 16, 8), HOPPER, "bfloat16", 64, "cudnn"),
    (Mask("causal", 16, 1), HOPPER, "bfloat16", 64, "cudnn"),
    (Mask("prefix", 0, 8), HOPPER, "bfloat16", 64, "cudnn"),
    (Mask("bidirectional", 0, 1), HOPPER, "bfloat16", 64, "cudnn"),
    (causal(8), AMPERE, "bfloat16", 64, "cudnn"),
    (causal(1), AMPERE, "bfloat16", 64, "cudnn_causal"),
    (causal(8), AMPERE, "bfloat16", 256, "xla"),
    (causal(8), HOPPER, "bfloat16", 20, "xla"),
    (causal(8), HOPPER, "float32", 64, "xla"),
    (causal(8), TURING, "bfloat16", 64, "xla"),
    (causal(8), OTHER, "bfloat16", 64, "xla"),
    (causal(8), TPU, "bfloat16", 64, "splash"),
    (causal(8), CPU, "bfloat16", 64, "xla"),
])
def test_auto_takes_the_fastest_that_honours_the_mask(mask, device, dtype, head_dim, chosen):
    assert choose("auto", mask, 256, head_dim, dtype, device) == chosen


def test_a_config_may_ask_for_each_of_them_by_name():
    asked = get_type_hints(ModelConfig)["attention"]
    assert set(get_args(asked)) == {"auto", *ATTENTION}


def test_bench_attends_as_a_run_of_rows_without_documents_does(tiny):
    """Else it would time the kernel that reads a mask."""
    bench = load_file(ROOT / "tools/bench.py")
    assert bench.mask_of_rows(tiny) == causal(1)
    assert bench.mask_of_rows(replace(tiny, forward=partial(model.llama))) == causal(0)


def test_jax_has_what_fit_puts_another_in_the_place_of():
    """Without one of them, `fit` would compile for no GPU, or ask this machine's devices."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    for name in "check_compute_capability", "is_cuda_compute_capability_equal", "check_cudnn_version":
        assert callable(getattr(cudnn, name))


def test_rows_of_odd_length_are_not_cudnn_s():
    assert choose("auto", causal(1), 255, 64, "bfloat16", HOPPER) == "xla"


@pytest.mark.parametrize("asked, mask, chosen", [
    ("cudnn_causal", causal(1), "cudnn_causal"),
    ("cudnn_causal", causal(8), "cudnn_packed"),
    ("cudnn_causal", causal(0), "cudnn"),
    ("cudnn_packed", causal(1), "cudnn_packed"),
    ("cudnn_packed", causal(0), "cudnn"),
    ("cudnn_packed", PREFIX, "cudnn"),
    ("cudnn_packed", BOTH, "cudnn"),
])
def test_what_was_asked_for_gives_way_where_it_cannot_honour_the_mask(asked, mask, chosen):
    assert choose(asked, mask, 256, 64, "bfloat16", HOPPER) == chosen


@pytest.mark.parametrize("name", [name for name in ATTENTION if name.startswith("cudnn")])
def test_where_nothing_gives_way_the_refusal_names_what_was_asked(name):
    sentence = f"model.attention is {name}; allowed for causal rows of 256 in float32 on cpu are auto"
    with pytest.raises(ValueError, match=sentence):
        choose(name, causal(1), 256, 64, "float32", CPU)


def test_a_bound_on_segments_is_kept_where_a_kernel_depends_on_it(monkeypatch):
    assert settled("auto", causal(8), 256, 64, "float32") == CAUSAL
    monkeypatch.setattr(kernels, "here", lambda: HOPPER)
    assert settled("auto", causal(8), 256, 64, "bfloat16") == causal(8)
    assert settled("cudnn", causal(8), 256, 64, "bfloat16") == CAUSAL


@pytest.mark.parametrize("asked, device, counted", [
    ("auto", HOPPER, True),
    ("cudnn_packed", HOPPER, True),
    ("cudnn", HOPPER, False),
    ("xla", HOPPER, False),
    ("auto", CPU, False),
    ("cudnn_packed", CPU, False),
])
def test_segments_are_counted_where_a_kernel_depends_on_them(monkeypatch, asked, device, counted):
    monkeypatch.setattr(kernels, "here", lambda: device)
    assert counts_segments(asked, 256, 64, "bfloat16") == counted


def test_a_forward_of_its_own_is_told_no_bound(tiny):
    """Its segments may be others than the batch's."""
    batch = Batch({}, {"kind": "causal", "window": 0}, {}, 1, 8)
    assert train.mask_of(batch, tiny) == causal(8)
    own = replace(tiny, forward=lambda params, batch, mask, config: None)
    assert train.mask_of(batch, own) == CAUSAL


def test_the_capability_of_a_gpu_is_its_own_word_or_else_the_table_s(monkeypatch):
    assert capability("NVIDIA H100 80GB HBM3") == (9, 0)
    assert capability("NVIDIA L40S") == capability("cpu") == (0, 0)
    card = SimpleNamespace(device_kind="NVIDIA L40S", compute_capability="8.9")
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert capability("NVIDIA L40S") == (8, 9)


def test_names_of_hardware_end_where_a_word_ends():
    assert hardware("NVIDIA A100-SXM4-40GB").peak == 312e12
    assert hardware("NVIDIA A10G").peak == 70e12
    assert hardware("NVIDIA A1000").peak == 0


# -------------------------------------------------------------------------------- segments of rows


def runs_of(row: list[int]) -> list[tuple[int, int]]:
    """(start, length) of each run of equal numbers."""
    found = []
    for place, segment in enumerate(row):
        if place and segment == row[place - 1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


def rows_of(lengths: list[int], size: int) -> list[int]:
    """A row of segments of these lengths, cut and padded with 0 to a size."""
    row = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return (row + [0] * size)[:size]


segments_at = jax.jit(flash.segments_at, static_argnums=1)
ROWS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=20), min_size=1, max_size=4)


@given(ROWS)
def test_offsets_and_lengths_are_those_of_a_plain_count(lengths):
    rows = [rows_of(each, 24) for each in lengths]
    rows += rows[:1] * (4 - len(rows))  # always of one shape, which is compiled once
    runs = [runs_of(row) for row in rows]
    most = max(map(len, runs))
    bound = bound_on_segments(np.array(rows))
    assert bound == min(size for size in BOUNDS if size >= most)

    offsets, sizes = segments_at(np.array(rows), max(flash.LEAST, bound))

    assert offsets.dtype == sizes.dtype == jnp.int32
    assert offsets.shape[1] == sizes.shape[1] + 1
    for own, starts, counts in zip(runs, offsets.tolist(), sizes.tolist(), strict=True):
        absent = len(counts) - len(own)
        assert starts == [start for start, _ in own] + [-1] * (absent + 1)
        assert counts == [length for _, length in own] + [-1] * absent


def test_offsets_are_laid_out_as_jax_has_them():
    """The example of jax's own words: rows of three and of two segments of one position."""
    offsets, sizes = segments_at(np.array([[1, 2, 3], [1, 2, 2]]), 3)
    assert offsets.tolist() == [[0, 1, 2, -1], [0, 1, -1, -1]]
    assert sizes.tolist() == [[1, 1, 1], [1, 2, -1]]


@pytest.mark.parametrize("row, bound", [
    ([1] * 200, 1),
    ([1] * 199 + [0], 8),
    ([*range(8)] * 1, 8),
    ([*range(9)], 32),
    ([*range(128)], 128),
    ([*range(129)], 0),
    ([1, 2, 1], 0),
    ([0, 1, 0], 0),
])
def test_the_bound_is_the_next_size_or_none(row, bound):
    assert bound_on_segments(np.array([row, [1] * len(row)])) == bound


def test_cudnn_is_told_of_each_query_head_s_keys(monkeypatch):
    """jax 0.10 scales the keys' offsets by the number of query heads, so that it must be theirs."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    told = {}

    def attend(q, k, v, **how):
        told.update(how, heads=(q.shape[2], k.shape[2], v.shape[2]))
        return q

    monkeypatch.setattr(cudnn, "dot_product_attention", attend)
    q, k = jnp.ones((2, 16, 2, 3, 8)), jnp.ones((2, 16, 2, 8))
    flash.cudnn_packed(q, k, k, causal(8), jnp.ones((2, 16), jnp.int32), None)

    assert told["heads"] == (6, 6, 6)
    assert told["mask_type"] == cudnn.MaskType.PADDING_CAUSAL
    assert told["q_offsets"].shape == told["kv_offsets"].shape == (2, 9)
    assert told["q_seqlen"].shape == told["kv_seqlen"].shape == (2, 8)
    assert told["scale"] == pytest.approx(8**-0.5)


def test_elementwise_recomputation_runs_cudnn_s_forward_kernel_once(tiny, monkeypatch):
    """Its output and its sums are kept; where all is computed again, it runs twice."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda wanted: True)
    segments = jnp.ones((2, 16), jnp.int32)
    x = jnp.ones((2, 16, 2, 1, 8), jnp.bfloat16)

    def layer(x):
        return flash.cudnn_packed(x, x[:, :, :, 0], x[:, :, :, 0], causal(8), segments, None)

    runs = {}
    for remat in ("none", "elementwise", "all"):
        again = rematerialised(layer, replace(tiny, remat=remat))
        program = jax.make_jaxpr(jax.grad(lambda x, again=again: jnp.sum(again(x))))(x)
        runs[remat] = str(program).count("dot_product_attention_fwd_wrapper[")
    assert runs == {"none": 1, "elementwise": 1, "all": 2}
