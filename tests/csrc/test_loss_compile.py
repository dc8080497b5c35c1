"""What nvcc makes of dkt_loss's kernels: registers, spills, accesses, instructions."""

import re

import pytest
from sass import Work, turn_of_loop

pytestmark = pytest.mark.slow

RESIDENT = range(1, 5)  # experts whose rows are kept in shared memory
NAMES = {
    *(f"dkt_{way}_kernel<{k}, {wide}>" for way in ("forward", "backward") for k in range(1, 9) for wide in (0, 1)),
    *(f"dkt_both_kernel<{k}, {wide}>" for k in RESIDENT for wide in (0, 1)),
    *(f"dkt_end_kernel<{k}>" for k in range(1, 9)),
}


@pytest.fixture(scope="module", params=["sm_80", "sm_90"])
def compiled(request, compile_cuda):
    return compile_cuda("losses/cuda_launch.cu", request.param)


def test_nothing_is_spilled(compiled, record_property):
    assert set(compiled.resources) == NAMES
    for name, kernel in compiled.resources.items():
        table = ", ".join(f"{kernel[key]} {key}" for key in ("registers", "stack", "stores", "loads"))
        record_property(f"{kernel['architecture']} {name}", table)
        if not re.search(r"<[5-8][,>]", name):
            assert kernel["stores"] == kernel["loads"] == "0", (name, table)
            assert not re.search(r"\b(LDL|STL)\b", compiled.code[name]), name  # arrays in local memory would be slow
    assert int(compiled.resources["dkt_forward_kernel<3, 0>"]["registers"]) <= 80


def test_accesses_are_wide(compiled):
    for kernel in NAMES:
        code = compiled.code[kernel]
        bits = 64 if re.search(r"dkt_.*<[5-8], 0>", kernel) else 128
        if "end" not in kernel:
            assert re.search(rf"\bLDG\.E\.{bits}\b", code), kernel
        if re.search("backward|both", kernel):
            assert re.search(rf"\bSTG\.E\.{bits}\b", code), kernel


CHUNK = 8  # classes
OF_CHUNK = {
    # What a chunk of 8 classes of 3 experts takes in bfloat16, by the kernel's loop.
    "dkt_forward_kernel<3, 0>": (Work(24, 3), 38),
    "dkt_backward_kernel<3, 0>": (Work(24, 3, 3), 48),
}


@pytest.mark.parametrize("kernel", OF_CHUNK)
def test_instructions_of_a_class(compiled, kernel):
    """So few that memory limits the kernels, see docs/kernels.md."""
    work, most = OF_CHUNK[kernel]
    assert turn_of_loop(compiled.code[kernel], work) <= most * CHUNK


def test_instructions_of_a_class_in_one_kernel(compiled):
    """Its loops hold a chunk's words in shared memory, and take them from there."""
    code = compiled.code["dkt_both_kernel<3, 0>"]
    first, second = Work(24, 3, 0, 3), Work(24, 0, 3, 3)
    assert turn_of_loop(code, first) + turn_of_loop(code, second) <= (38 + 48) * CHUNK


def test_the_shortest_way_around_a_loop():
    code = """
        /*0000*/ MOV R1, R2 ;
        /*0010*/ @P0 BRA 0x50 ;
        /*0020*/ MUFU.EX2 R3, R4 ;
        /*0030*/ FADD R3, R3, R5 ;
        /*0040*/ BRA 0x60 ;
        /*0050*/ MUFU.EX2 R3, R4 ;
        /*0060*/ @P1 EXIT ;
        /*0070*/ @!P2 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0080*/ @P3 BRA 0x10 ;
        /*0090*/ EXIT ;
    """
    assert turn_of_loop(code, Work(1)) == turn_of_loop(code, Work(1, 1)) == 5
    with pytest.raises(AssertionError, match="no loop does"):
        turn_of_loop(code, Work(2))
