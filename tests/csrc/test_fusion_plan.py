"""How the CUDA kernels of depth-wise knowledge fusion share out maps over blocks and threads."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def plan_of(plans, shape, dtype, layout, count, processors, statistics=False):
    _, channels, height, width = shape
    strides = {
        "channels last": (channels * height * width, 1, channels * width, channels),
        "NCHW": (channels * height * width, height * width, width, 1),
    }[layout]
    names = "vector by_channel lanes group rows groups splits samples".split()
    four, numbers = ctypes.c_int64 * 4, (ctypes.c_int64 * len(names))()
    plans.fusion_plan(four(*shape), four(*strides), DTYPES[dtype], count, processors, statistics, numbers)
    return dict(zip(names, numbers, strict=True))


@settings(max_examples=300)
@given(
    st.tuples(st.integers(1, 2**20), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64)),
    st.sampled_from(list(DTYPES)),
    st.sampled_from(["channels last", "NCHW"]),
    st.integers(1, 16),
    st.sampled_from([1, 20, 132, 170]),
    st.booleans(),
)
def test_plan(plans, shape, dtype, layout, count, processors, statistics):
    plan = plan_of(plans, shape, dtype, layout, count, processors, statistics)
    batch, channels = shape[:2]
    vectors, threads = -(-channels // plan["vector"]), plan["lanes"] * plan["group"] * plan["rows"]
    for digit in ("lanes", "group", "rows"):
        assert plan[digit] & (plan[digit] - 1) == 0
    assert 1 <= threads <= 128
    assert (plan["groups"] - 1) * plan["lanes"] < vectors <= plan["groups"] * plan["lanes"]
    assert (plan["splits"] - 1) * plan["samples"] < batch <= plan["splits"] * plan["samples"]
    assert plan["samples"] % plan["rows"] == 0
    assert plan["splits"] <= (128 if statistics else 2**16)
    assert plan["groups"] * plan["splits"] < 2**31
    if layout == "channels last" and channels % 8 == 0:
        assert plan["vector"] == (4 if dtype == torch.float32 else 8)


@pytest.mark.parametrize("layout", ["channels last", "NCHW"])
@pytest.mark.parametrize("shape", [(128, 64, 8, 8), (256, 2048, 7, 7), (256, 2048, 14, 14)])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("statistics", [False, True])
def test_plan_fills_a_device(plans, layout, shape, count, statistics):
    plan = plan_of(plans, shape, torch.bfloat16, layout, count, 132, statistics)
    blocks = plan["groups"] * plan["splits"] * count
    assert blocks >= 2 * 132 or plan["lanes"] * plan["group"] * plan["rows"] <= 64
