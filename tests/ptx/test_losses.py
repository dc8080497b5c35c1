"""The CUDA kernels of the losses, as nvcc compiled them, interpreted."""

import pytest
from checks import check


def kernels_of(result: dict) -> set[str]:
    return {name for name in result["kernels"] if name.startswith(("dkt_", "cross_", "sum_"))}


def test_quick(interpreted):
    result = interpreted("loss_cases", "quick")
    check(result)
    assert kernels_of(result) == {
        *(f"dkt_{way}_kernel<{experts}>" for way in ("forward", "backward") for experts in range(1, 9)),
        *(f"cross_entropy_{way}_kernel" for way in ("forward", "backward")),
        "sum_kernel",
    }
    assert kernels_of(result) <= set(result["ran"])


@pytest.mark.slow
@pytest.mark.parametrize("experts", range(1, 9))
def test_matrix(interpreted, experts):
    check(interpreted("loss_cases", "matrix", experts=experts, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "100"])
def test_other_architectures(interpreted, architecture):
    check(interpreted("loss_cases", "sample", architecture=architecture, count=80, seed=int(architecture)))


@pytest.mark.slow
def test_approximate_instructions_may_be_off(interpreted):
    """By two units in the last place, as a device's may be."""
    check(interpreted("loss_cases", "sample", count=80, seed=2, ulps=2))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["long_rows", "shared_rows"])
def test_rows_of_several_blocks(interpreted, group):
    check(interpreted("loss_cases", group, seed=3))


@pytest.mark.slow
def test_tall_batches(interpreted):
    check(interpreted("loss_cases", "tall"))
