"""The CPU kernels' mean and variance of each channel; tests/ptx has the same of the CUDA kernels."""

import pytest
import torch
from disturbances import DISTURBANCES

from shike_fast.ops._native_dkf import dkf_statistics

SHAPES = [(1, 16, 26, 27), (1, 8, 56, 56), (8, 16, 28, 28), (64, 64, 7, 7), (33, 40, 7, 7), (3, 24, 2, 2)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels last", "NCHW"])
@pytest.mark.parametrize("disturbed", DISTURBANCES)
def test_no_value_spoils_the_statistics(disturbed, layout):
    """PyTorch's float32 variance of these maps is within 1.5 eps on the CPU, where it is added up in double."""
    eps = torch.finfo(torch.float32).eps
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            values = torch.randn(shape) * 1.16
            DISTURBANCES[disturbed](values)
            map_ = values.to(dtype).contiguous(memory_format=layout)
            expected = map_.double().transpose(0, 1).flatten(1)
            deviation, squares = expected.std(1, correction=0), expected.var(1, correction=0) * expected.shape[1]
            high, rest, actual = dkf_statistics([map_])[0].double()
            assert bool(((actual - squares).abs() <= 1.5 * eps * squares).all()), (shape, dtype)
            assert bool(((high + rest - expected.mean(1)).abs() <= eps * deviation).all()), (shape, dtype)
