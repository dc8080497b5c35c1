"""The interpreter itself, on a few lines of PTX each: what is reported."""

import struct

import numpy as np
import pytest
from machine import FAILED, REFUSED, Order
from ptx import Module
from small_kernel import BASE, DATA, PROLOGUE, Kernel, words


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


# ---- what it reports

SHARED = ".shared .align 16 .b8 values[256];"
OWN_WORD = "mov.u32 %r5, values; shl.b32 %r6, %r0, 2; add.u32 %r7, %r5, %r6;"  # %r7
OTHER_WARP = "xor.b32 %r8, %r6, 128; add.u32 %r8, %r8, %r5;"  # %r8: the same word of the other warp
FIRST_THREAD = "setp.ne.u32 %p1, %r0, 0; @%p1 bra END;"


@pytest.mark.parametrize(
    ("body", "threads", "report"),
    [
        ("st.global.u32 [%rd0+-4], %r0;", 32, "st.global: not allocated"),
        ("st.global.u32 [%rd0+65536], %r0;", 32, "st.global: outside of all memory"),
        ("ld.global.u32 %r5, [%rd2];", 32, "ld.global: never written"),
        ("st.global.u32 [%rd2+2], %r0;", 32, "st.global: misaligned access of 4 bytes"),
        ("st.global.v4.u32 [%rd0+8], {%r1, %r1, %r1, %r1};", 1, "st.global: misaligned access of 16 bytes"),
        ("ld.param.u32 %r5, [memory+8];", 1, "ld.param: outside or misaligned"),
        (
            "st.global.u32 [%rd0], %r0;",
            32,
            "global memory: two threads write different values to one place in one instruction",
        ),
        (f"{OWN_WORD} ld.shared.u32 %r9, [%r7];", 32, "ld.shared: never written"),
        (f"{OWN_WORD} st.shared.u32 [%r7+256], %r0;", 32, "st.shared: outside of the block's memory"),
        (f"{OWN_WORD} st.shared.u32 [%r7+1], %r0;", 32, "st.shared: misaligned access of 4 bytes"),
        (
            f"{OWN_WORD} {OTHER_WARP} st.shared.u32 [%r7], %r0; ld.shared.u32 %r9, [%r8];",
            64,
            "shared memory: read without a barrier after a write of another warp",
        ),
        (
            f"{OWN_WORD} {OTHER_WARP} st.shared.u32 [%r7], %r0; bar.sync 0; ld.shared.u32 %r9, [%r8];"
            "st.shared.u32 [%r7], 77;",
            64,
            "shared memory: written without a barrier after a read of another warp",
        ),
        (
            f"{OWN_WORD} st.shared.u32 [%r7], 1; add.u32 %r8, %r0, 2; setp.lt.u32 %p1, %r0, 32; @%p1 bra END;"
            "st.shared.u32 [%r5], %r8; END:",
            64,
            "shared memory: written without a barrier after a write of another warp",
        ),
        (f"{FIRST_THREAD} bar.sync 0; END:", 32, "threads that have ended miss a barrier"),
        (f"{FIRST_THREAD} bar.sync 0; bra AFTER; END: bar.sync 0; AFTER:", 32, "threads wait at different barriers"),
        (
            f"{FIRST_THREAD} shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1; END:",
            32,
            "shfl.sync: lanes of the mask are elsewhere",
        ),
        ("shfl.sync.bfly.b32 %r5, %r0, 1, 31, 1;", 32, "shfl.sync: the mask leaves out a lane that executes it"),
        ("shfl.sync.bfly.b32 %r5, %r0, 8, 31, 255;", 8, "shfl.sync: there is no such lane"),
        (f"{FIRST_THREAD} trap; END:", 32, "trap"),
        ("div.u32 %r5, %r0, 0;", 32, "division by zero"),
        (
            "st.global.u32 [%rd2], %r0; ld.global.nc.u32 %r5, [%rd2];",
            32,
            "ld.global.nc of what the same launch writes",
        ),
        (
            "st.global.u32 [%rd2], %r0; xor.b32 %r5, %r0, 32; mul.wide.u32 %rd3, %r5, 4; add.s64 %rd3, %rd3, %rd0;"
            "ld.global.u32 %r6, [%rd3];",
            64,
            "global memory: read without a barrier after a write of another warp",
        ),
        (
            "st.global.u32 [%rd2], %r0; xor.b32 %r5, %r0, 1; mul.wide.u32 %rd3, %r5, 4; add.s64 %rd3, %rd3, %rd0;"
            "ld.global.u32 %r6, [%rd3];",
            32,
            "global memory: read without __syncwarp after a write of another lane",
        ),
    ],
)
def test_reports(kernel, body: str, threads: int, report: str):
    kernel(body, threads=threads, shared=SHARED)
    assert report in kernel.reports


@pytest.mark.parametrize(
    "body",
    [
        "st.global.u32 [%rd2], %r0; bar.sync 0; xor.b32 %r5, %r0, 33;",
        "st.global.u32 [%rd2], %r0; bar.warp.sync -1; xor.b32 %r5, %r0, 1;",
    ],
)
def test_what_is_synchronised_is_not_reported(kernel, body: str):
    kernel(f"{body} mul.wide.u32 %rd3, %r5, 4; add.s64 %rd3, %rd3, %rd0; ld.global.u32 %r6, [%rd3];", threads=64)
    assert kernel.reports == []


TICKET = """
    setp.ne.u32 %p1, %r0, 0;
    @%p1 bra END;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd3, %rd3, %rd0;
    st.global.u32 [%rd3+64], %r1;
    {first}
    atom.global.add.u32 %r5, [%rd0], 1;
    setp.ne.u32 %p2, %r5, 1;
    @%p2 bra END;
    {second}
    ld.volatile.global.u32 %r6, [%rd0+64];
    ld.volatile.global.u32 %r7, [%rd0+68];
    END:
"""  # two blocks: the last one reads what both have written


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("missing", [None, "first", "second"])
def test_another_block_is_seen_after_two_fences_only(kernel, missing: str | None, alone: bool):
    kernel.write(np.zeros(1, np.uint32))
    fences = {name: "" if name == missing else "membar.gl;" for name in ("first", "second")}
    kernel(TICKET.format(**fences), blocks=2, order=Order(alone=alone))
    report = "global memory: read without release and acquire after a write of another block"
    assert kernel.reports == ([] if missing is None else [report])


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("order", ["acq_rel", "release", "acquire", "relaxed"])
def test_an_atomic_may_bring_its_fences(kernel, order: str, alone: bool):
    kernel.write(np.zeros(1, np.uint32))
    ticket = TICKET.format(first="", second="").replace("atom.global.add", f"atom.global.gpu.{order}.add")
    kernel(ticket, blocks=2, order=Order(alone=alone))
    report = "global memory: read without release and acquire after a write of another block"
    assert kernel.reports == ([] if order == "acq_rel" else [report])


def test_launch_limits(kernel):
    assert kernel("", threads=1025) == REFUSED
    assert kernel("", threads=64, limit=".maxntid 32, 1, 1") == REFUSED
    assert kernel("", threads=32, limit=".maxntid 32, 1, 1") == 0
    assert kernel(OWN_WORD, shared=".shared .align 16 .b8 values[49168];") == REFUSED
    assert kernel("trap;") == FAILED
    assert sorted(set(kernel.reports)) == ["launch: shared memory", "launch: threads of a block", "trap"]


def test_an_end_that_never_comes_is_reported(kernel, monkeypatch):
    monkeypatch.setattr("batch.MOST_STEPS", 100)
    kernel("LOOP: bra LOOP;")
    assert kernel.reports == ["no end"]


def test_scopes_vectors_and_global_variables(kernel):
    """As inline assembly and tables come out of the compiler."""
    text = (
        ".global .align 4 .b8 table[8] = {1, 0, 0, 0, 2, 0, 0, 0};\n"
        ".visible .entry other(.param .u64 memory)\n{\n" + PROLOGUE + "{ .reg .b32 x; mov.b32 x, 5; mov.b32 %r5, x; }\n"
        "{ .reg .b32 x; mov.b32 x, 6; mov.b32 %r6, x; }\n mov.u64 %rd5, table; ld.global.u32 %r7, [%rd5+4];\n"
        "mov.b64 %rd6, {%r5, %r6}; mov.b64 {%r8, _}, %rd6; st.global.v2.u32 [%rd0], {%r8, %r7}; ret;\n}\n"
    )

    def allocate(data: bytes) -> int:
        kernel.arena[: len(data)] = np.frombuffer(data, np.uint8)
        kernel.state[: len(data)] = 3
        return BASE

    kernel.machine.add_module(Module(text), allocate)
    assert kernel.machine.launch("other", (1, 1, 1), (1, 1, 1), struct.pack("<Q", BASE + DATA)) == 0
    assert words(kernel, 2) == [5, 2] and kernel.reports == []


def test_counts(kernel):
    from counts import Counts

    kernel.machine.counts = counts = Counts()
    kernel("mul.wide.s32 %rd3, %r0, 32; add.s64 %rd3, %rd3, %rd0; st.global.u32 [%rd3], %r0;")
    (traffic,) = counts.memory.values()
    assert (traffic.requests, traffic.sectors, traffic.least, traffic.bytes) == (1, 32, 4, 128)
    assert sum(counts.threads.values()) == 32 and sum(counts.warps.values()) == 1
