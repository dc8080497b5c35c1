"""How the CUDA kernels of depth-wise knowledge fusion share out maps over blocks and threads."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
KERNELS = ("statistics", "pooling", "gradient")
WARP = 32


def plan_of(plans, shape, dtype, layout, count, processors, kernel, folded=False):
    _, channels, height, width = shape
    strides = {
        "channels last": (channels * height * width, 1, channels * width, channels),
        "NCHW": (channels * height * width, height * width, width, 1),
    }[layout]
    names = "vector by_channel lanes group rows groups splits samples resident".split()
    four, numbers = ctypes.c_int64 * 4, (ctypes.c_int64 * len(names))()
    number = KERNELS.index(kernel)
    plans.fusion_plan(four(*shape), four(*strides), DTYPES[dtype], count, processors, number, folded, numbers)
    plan = dict(zip(names, numbers, strict=True))
    plan["threads"] = plan["lanes"] * plan["group"] * plan["rows"]
    plan["blocks"] = plan["groups"] * plan["splits"] * count
    plan["at once"] = processors * plan["resident"] * 128 // plan["threads"]  # blocks that the device holds
    return plan


@settings(max_examples=300)
@given(
    st.tuples(st.integers(1, 2**20), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64)),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["channels last", "NCHW"]),
    st.integers(1, 8),
    st.sampled_from([1, 20, 132, 170]),
    st.sampled_from(KERNELS),
    st.booleans(),
)
def test_plan(plans, shape, dtype, layout, count, processors, kernel, folded):
    plan = plan_of(plans, shape, dtype, layout, count, processors, kernel, folded)
    batch, channels = shape[:2]
    vectors = -(-channels // plan["vector"])
    for digit in ("lanes", "group", "rows"):
        assert plan[digit] & (plan[digit] - 1) == 0
    assert plan["threads"] in (32, 64, 128)
    assert (plan["groups"] - 1) * plan["lanes"] < vectors <= plan["groups"] * plan["lanes"]
    assert (plan["splits"] - 1) * plan["samples"] < batch <= plan["splits"] * plan["samples"]
    assert plan["samples"] % plan["rows"] == 0
    assert plan["splits"] <= (128 if kernel == "statistics" else 2**16)
    assert plan["groups"] * plan["splits"] < 2**31
    # The threads that share a sample's positions are lanes of one warp, whose numbers lie side by side in a thread's.
    assert plan["group"] * (plan["lanes"] if plan["by_channel"] else 1) <= WARP
    if layout == "channels last" and channels % 8 == 0:
        assert plan["vector"] == (4 if dtype == torch.float32 else 8)
    if plan["by_channel"] and plan["group"] > 1:
        contiguous = plan["lanes"] * plan["vector"] * dtype.itemsize
        assert contiguous >= 64 or plan["lanes"] >= vectors
        assert plan["group"] * 4 <= shape[2] * shape[3]


@pytest.mark.parametrize("layout", ["channels last", "NCHW"])
@pytest.mark.parametrize("shape", [(4, 2048, 7, 7), (128, 64, 8, 8), (256, 2048, 7, 7), (256, 2048, 14, 14)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_plan_keeps_all_multiprocessors_busy(plans, layout, shape, count, kernel):
    plan = plan_of(plans, shape, torch.bfloat16, layout, count, 132, kernel)
    assert plan["blocks"] >= 0.9 * 132


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("plane", [(7, 7), (14, 14)])
def test_blocks_of_a_large_launch_live_long(plans, plane, kernel, folded):
    """All of them run at once, and fill the device: each serves as many samples as there are to share."""
    plan = plan_of(plans, (256, 2048, *plane), torch.bfloat16, "channels last", 3, 132, kernel, folded)
    assert plan["threads"] == 128 and plan["group"] == 1
    assert 0.9 * plan["at once"] <= plan["blocks"] <= plan["at once"]
    assert plan["samples"] >= 2 * plan["rows"]


def test_a_small_launch_shares_planes(plans):
    """Half of the multiprocessors had nothing to do with one thread for each plane."""
    plan = plan_of(plans, (4, 2048, 7, 7), torch.bfloat16, "channels last", 1, 132, "pooling")
    assert (plan["lanes"], plan["group"]) == (4, 8) and plan["blocks"] * plan["threads"] == 4 * 2048
