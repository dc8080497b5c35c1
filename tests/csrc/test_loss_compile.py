"""What nvcc makes of the expert losses' kernels: registers, spills, and the width of their memory accesses."""

import re

import pytest


@pytest.fixture(scope="module", params=[pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def compiled(request, compile_cuda):
    return compile_cuda("losses/cuda_launch.cu", request.param)


def test_nothing_is_spilled(compiled, record_property):
    assert len(compiled.resources) == 2 * 8 + 3
    for name, kernel in compiled.resources.items():
        table = ", ".join(f"{kernel[key]} {key}" for key in ("registers", "stack", "stores", "loads"))
        record_property(f"{kernel['architecture']} {name}", table)
        experts = int(name[-2]) if name.endswith(">") else 1
        if experts <= 4:
            assert kernel["stores"] == kernel["loads"] == "0", (name, table)


def test_accesses_are_wide(compiled):
    code = compiled.code
    assert re.search(r"\bLDG\.E\.128\b", code["dkt_forward_kernel<3>"])
    assert re.search(r"\bLDG\.E\.128\b", code["dkt_backward_kernel<3>"])
    assert re.search(r"\bSTG\.E\.128\b", code["dkt_backward_kernel<3>"])
    assert re.search(r"\bLDG\.E\.128\b", code["cross_entropy_forward_kernel"])
    assert re.search(r"\bSTG\.E\.128\b", code["cross_entropy_backward_kernel"])
    for name, text in code.items():  # arrays in local memory would be slow
        if name != "sum_kernel" and not re.search(r"<[5-8]>", name):
            assert not re.search(r"\b(LDL|STL)\b", text), name
