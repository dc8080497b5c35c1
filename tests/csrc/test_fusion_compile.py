"""What nvcc makes of the kernels of depth-wise knowledge fusion: registers, spills, the width of memory accesses."""

import itertools
import re

import pytest

TYPES = {0: 4, 2: 8, 3: 8}  # DType: channels in 16 bytes
NAMES = {
    "dkf_merge_kernel",
    *(f"dkf_vector_kernel<{dtype}>" for dtype in TYPES),
    *(f"dkf_statistics_kernel<{dtype}, {vector}>" for dtype, wide in TYPES.items() for vector in (1, wide)),
    *(
        f"dkf_{kind}_kernel<{dtype}, {vector}, {folded}>"
        for kind in ("pooling", "gradient")
        for dtype, wide in TYPES.items()
        for vector in (1, wide)
        for folded in (0, 1)
    ),
}


pytestmark = pytest.mark.slow  # the quick tests execute these kernels


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, compile_cuda):
    return compile_cuda("fusion/cuda_launch.cu", request.param)


def test_nothing_is_spilled(compiled, record_property):
    assert set(compiled.resources) == NAMES
    for name, kernel in compiled.resources.items():
        table = ", ".join(f"{kernel[key]} {key}" for key in ("registers", "stack", "stores", "loads"))
        record_property(f"{kernel['architecture']} {name}", table)
        assert kernel["stack"] == kernel["stores"] == kernel["loads"] == "0", (name, table)
        assert not re.search(r"\b(LDL|STL)\b", compiled.code[name]), name


def loads(code: str, access: str) -> int:
    return len(re.findall(rf"\b{access}\.E\.128\b", code))


def test_accesses_are_wide(compiled):
    for dtype, vector in TYPES.items():
        for folded in (0, 1):
            maps, suffix = 2 + folded, f"<{dtype}, {vector}, {folded}>"
            positions = 2 if folded else 4  # under way at a time: those of the first sample, and the next ones
            assert loads(compiled.code[f"dkf_pooling_kernel{suffix}"], "LDG") == 2 * maps * positions
            # The gradient of f, and two positions of each map.
            gradient = compiled.code[f"dkf_gradient_kernel{suffix}"]
            assert loads(gradient, "LDG") == 1 + 2 * maps
            assert loads(gradient, "STG") == 2 * maps
        # Seven positions of a map; four of two maps.
        assert loads(compiled.code[f"dkf_statistics_kernel<{dtype}, {vector}>"], "LDG") >= 7 + 2 * 4


def test_sums_stay_in_registers(compiled):
    """The maps' kernels read each number of a norm in shared memory once, and pass one barrier, before the samples."""
    for dtype, vector in TYPES.items():
        for kind, folded in itertools.product(("pooling", "gradient"), (0, 1)):
            code = compiled.code[f"dkf_{kind}_kernel<{dtype}, {vector}, {folded}>"]
            assert len(re.findall(r"\bBAR\.SYNC", code)) == 1
            assert len(re.findall(r"\bLDS\.128\b", code)) == len(re.findall(r"\bLDS\b", code))
            assert len(re.findall(r"\bLDS\b", code)) == 5 * (1 + folded) * vector // 4
