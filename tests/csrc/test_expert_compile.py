"""What nvcc makes of the generalised expert loss's kernels: registers, spills, accesses, instructions."""

import re

import pytest
from sass import Work, turn_of_loop

pytestmark = pytest.mark.slow

COUNTS = {0: range(1, 5), 1: (1, 2, 3, 4, 8)}  # by whether there is a divergence: experts of a kernel
NAMES = {
    "expert_end_kernel",
    *(
        f"expert_{way}_kernel<{experts}, {wide}, {divergence}>"
        for way in ("forward", "backward")
        for divergence, counts in COUNTS.items()
        for experts in counts
        for wide in (0, 1)
    ),
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, compile_cuda):
    return compile_cuda("losses/cuda_expert_launch.cu", request.param)


def test_nothing_is_spilled(compiled, record_property):
    assert set(compiled.resources) == NAMES
    for name, kernel in compiled.resources.items():
        table = ", ".join(f"{kernel[key]} {key}" for key in ("registers", "stack", "stores", "loads"))
        record_property(f"{kernel['architecture']} {name}", table)
        if "<8," not in name:
            assert kernel["stores"] == kernel["loads"] == "0", (name, table)
            assert not re.search(r"\b(LDL|STL)\b", compiled.code[name]), name  # arrays in local memory would be slow


def test_accesses_are_wide(compiled):
    for kernel in NAMES - {"expert_end_kernel"}:
        code, bits = compiled.code[kernel], 64 if ", 0, " in kernel else 128
        assert re.search(rf"\bLDG\.E\.{bits}\b", code), kernel
        assert re.search(r"\bLDG\.E\.128\b", code), kernel  # of a bias
        if "backward" in kernel:
            assert re.search(rf"\bSTG\.E\.{bits}\b", code), kernel


CHUNK = 4  # classes
OF_CLASS = {
    # What a class of three experts takes, in bfloat16, without an option and with a divergence between the experts.
    "expert_forward_kernel<3, 0, 0>": (Work(12, 3), 40),
    "expert_backward_kernel<3, 0, 0>": (Work(12, 3, 3), 42),
    "expert_forward_kernel<3, 0, 1>": (Work(12, 3), 75),
    "expert_backward_kernel<3, 0, 1>": (Work(12, 3, 3), 77),
}


@pytest.mark.parametrize("kernel", OF_CLASS)
def test_instructions_of_a_class(compiled, kernel):
    work, most = OF_CLASS[kernel]
    assert turn_of_loop(compiled.code[kernel], work) <= most * CHUNK
