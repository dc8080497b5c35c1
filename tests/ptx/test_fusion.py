"""The CUDA kernels of depth-wise knowledge fusion, as nvcc compiled them, interpreted."""

import pytest
from checks import check


def test_quick(interpreted):
    result = interpreted("fusion_cases", "quick")
    check(result)
    kernels = {name for name in result["kernels"] if name.startswith("dkf_")}
    assert len(kernels) == 6 + 12 + 12 + 3 + 1 and kernels <= set(result["ran"])


@pytest.mark.slow
@pytest.mark.parametrize("op", ["pool", "bn", "folded"])
def test_samples_end_in_registers(interpreted, op):
    """A block with more samples meets no more barriers, and asks for no more of shared memory."""
    few, many = (interpreted("fusion_cases", "ends", op=op, batch=batch) for batch in (16, 64))
    assert len(few) == 2
    for kernel, (samples, barriers, requests) in few.items():
        assert many[kernel][0] >= 2 * samples and many[kernel][1:] == [barriers, requests], kernel
        if op == "pool":
            assert barriers == requests == 0, kernel
        else:
            assert barriers == 4 and requests > 0, kernel  # one for each warp, for the norms


@pytest.mark.slow
def test_missing_channels(interpreted):
    check(interpreted("fusion_cases", "missing_channels"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_matrix(interpreted, seed):
    check(interpreted("fusion_cases", "matrix", count=100, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_other_architectures(interpreted, architecture):
    check(interpreted("fusion_cases", "matrix", architecture=architecture, count=80, seed=int(architecture)))


@pytest.mark.slow
def test_wide(interpreted):
    check(interpreted("fusion_cases", "wide", seed=3))


@pytest.mark.slow
def test_large_planes(interpreted):
    check(interpreted("fusion_cases", "large_planes"))
