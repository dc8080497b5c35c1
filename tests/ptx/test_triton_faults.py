"""Faults put into small Triton kernels are noticed when the interpreter runs them."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")
import triton
import triton.language as tl
from triton_host import driver_of, on_the_interpreter

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)


@triton.jit
def _copy_kernel(to, source, count, STEP: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(source + tl.multiple_of(STEP * i, ALIGN), mask=i < count)
    tl.store(to + i, x, mask=i < count)


@triton.jit
def _pairs_kernel(to, source, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    start = tl.load(source).to(tl.int32)  # 1, which is no multiple of anything
    tl.store(to + i, tl.load(source + (start // ALIGN * ALIGN if ALIGN == 1 else tl.multiple_of(start, ALIGN)) + i))


@triton.jit
def _same_place_kernel(to, source):
    tl.store(to, tl.program_id(0).to(tl.float32))


@triton.jit
def _lanes_kernel(to, source, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The lanes that hold one column differ in the last bit: the product joins the first step of their exchange."""
    row, c = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)
    x = tl.load(source + row * BLOCK + c[None, :])
    weight = tl.load(source + tl.arange(0, ROWS))
    tl.store(to + c, tl.sum(x * weight[:, None], 0))


def launch(kernel, to, source, grid=(1,), **constants):
    """The kinds of faults that are reported."""
    driver = driver_of("sm_90")
    with on_the_interpreter(driver) as happened:
        kernel[grid](to, source, **constants)
    return {report.kind for report in happened.reports}


def memory(count, source=None):
    """Memory to write to, and to read from."""
    arena = driver_of("sm_90").arena
    arena.clear()
    return arena.place(torch.zeros(count)), arena.place(torch.ones(count) if source is None else source)


COPY = {"STEP": 1, "ALIGN": 1, "BLOCK": 64}


@pytest.mark.parametrize(
    ("count", "constants", "expected"),
    [
        (50, COPY, set()),
        (51, COPY, {"ld.global: not allocated", "st.global: not allocated"}),  # an index off by one
        (26, {**COPY, "STEP": 2}, {"ld.global: not allocated"}),
    ],
)
def test_outside_of_an_allocation(count, constants, expected):
    assert launch(_copy_kernel, *memory(50), count=count, **constants) == expected


def test_between_the_rows_of_a_strided_tensor():
    to, _ = memory(50)
    source = driver_of("sm_90").arena.place(torch.ones(5, 7), (10, 1))
    assert launch(_copy_kernel, to, source, count=7, **COPY) == set()
    assert launch(_copy_kernel, to, source, count=8, **COPY) == {"ld.global: not allocated"}


def test_never_written():
    to, _ = memory(50)
    assert launch(_copy_kernel, to, driver_of("sm_90").arena.empty((50,), (1,), torch.float32), count=50, **COPY) == {
        "ld.global: never written"
    }


def test_an_output_that_is_not_all_written():
    _, source = memory(50)
    with on_the_interpreter(driver_of("sm_90")) as happened:
        result = torch.empty(50)
        _copy_kernel[(1,)](result, source, 49, **COPY)
    assert not happened.reports and happened.unwritten == [((50,), 4)]


@pytest.mark.parametrize(("align", "expected"), [(1, set()), (4, {"ld.global: misaligned access of 16 bytes"})])
def test_a_false_promise_of_alignment(align, expected):
    assert launch(_pairs_kernel, *memory(1000), BLOCK=512, ALIGN=align) == expected


@pytest.mark.parametrize("programs", [1, 2])
def test_two_programs_write_one_place(programs):
    kinds = launch(_same_place_kernel, *memory(1), grid=(programs,))
    assert bool(kinds) == (programs == 2) and all("write" in kind for kind in kinds), kinds


def test_lanes_that_disagree():
    kinds = launch(_lanes_kernel, *memory(128, torch.rand(128)), ROWS=16, BLOCK=8)
    assert kinds and all("two threads write different values" in kind for kind in kinds), kinds
