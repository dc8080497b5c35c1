"""The CUDA kernels of the losses, as nvcc compiled them, interpreted."""

import pytest
from checks import check


def test_quick(interpreted):
    result = interpreted("loss_cases", "quick")
    check(result)
    kernels = {name for name in result["kernels"] if name.startswith("dkt_")}
    assert len(kernels) == 16 + 8 + 16 + 8  # forward, end, backward, both
    assert kernels <= set(result["ran"]), kernels - set(result["ran"])


@pytest.mark.slow
def test_quick_experts(interpreted):
    """The generalised loss: a kernel for each number of experts up to four, with a divergence one for more."""
    result = interpreted("expert_cases", "quick")
    check(result)
    kernels = {name for name in result["kernels"] if name.startswith("expert_")}
    assert len(kernels) == 2 * (8 + 10) + 1  # forward and backward, without and with a divergence; end
    assert kernels <= set(result["ran"]), kernels - set(result["ran"])


@pytest.mark.slow
@pytest.mark.parametrize("experts", range(1, 9))
@pytest.mark.parametrize("cases", ["loss_cases", "expert_cases"])
def test_matrix(interpreted, cases, experts):
    check(interpreted(cases, "matrix", experts=experts, seed=1))


@pytest.mark.slow
def test_experts_in_rows_of_several_blocks(interpreted):
    check(interpreted("expert_cases", "shared_rows", seed=3))


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
