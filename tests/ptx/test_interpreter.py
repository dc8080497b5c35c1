"""The interpreter itself, on a few lines of PTX each: what they compute, and what is reported."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from machine import FAILED, REFUSED, Machine, Order
from ptx import Module

BASE, DATA, SIZE = 1 << 20, 1024, 8192  # the arena, the memory of a kernel in it
WORDS = (SIZE - 2 * DATA) // 4

PROLOGUE = """
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<30>;
    .reg .b64 %rd<30>;
    .reg .f32 %f<30>;
    ld.param.u64 %rd0, [memory];
    mov.u32 %r0, %tid.x;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mad.lo.s32 %r3, %r1, %r2, %r0;
    mul.wide.s32 %rd1, %r3, 4;
    add.s64 %rd2, %rd0, %rd1;
"""  # %rd2: a word for each thread of the launch


class Kernel:
    """Runs the body of a kernel with ``memory`` [words] as its parameter."""

    def __init__(self) -> None:
        self.arena, self.state = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
        self.state[DATA:-DATA] = 1
        self.machine = Machine(BASE, self.arena, self.state)

    @property
    def memory(self) -> Any:
        return self.arena[DATA:-DATA].view(np.uint32)

    def write(self, values: Any) -> None:
        data = np.asarray(values).tobytes()
        self.arena[DATA : DATA + len(data)] = np.frombuffer(data, np.uint8)
        self.state[DATA : DATA + len(data)] = 3

    def __call__(
        self,
        body: str,
        threads: int = 32,
        blocks: int = 1,
        shared: str = "",
        limit: str = "",
        order: Order | None = None,
    ) -> int:
        text = f".visible .entry kernel(.param .u64 memory) {limit}\n{{{shared}{PROLOGUE}{body}\n ret;\n}}\n"
        self.machine.add_module(Module(text), lambda _: 0)
        self.machine.order = order or Order()
        return self.machine.launch("kernel", (blocks, 1, 1), (threads, 1, 1), struct.pack("<Q", BASE + DATA))

    @property
    def reports(self) -> list[str]:
        return [*self.machine.reported()]


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


def words(kernel: Kernel, count: int, dtype: Any = np.uint32) -> list[Any]:
    return kernel.memory[:count].view(dtype).tolist()


# ---- what it computes


def test_threads_diverge_and_meet(kernel):
    """Odd and even threads take different ways, and a loop runs once a lane."""
    kernel("""
        and.b32 %r4, %r0, 1;
        setp.eq.u32 %p1, %r4, 0;
        mov.u32 %r5, 0;
        @%p1 bra EVEN;
        mov.u32 %r6, 0;
    LOOP:
        add.u32 %r5, %r5, 2;
        add.u32 %r6, %r6, 1;
        setp.lt.u32 %p2, %r6, %r0;
        @%p2 bra LOOP;
        bra END;
    EVEN:
        mov.u32 %r5, 1000;
    END:
        add.u32 %r5, %r5, 1;
        st.global.u32 [%rd2], %r5;""")
    assert words(kernel, 32) == [2 * i + 1 if i % 2 else 1001 for i in range(32)]
    assert kernel.reports == []


@pytest.mark.parametrize(
    ("mode", "other", "limits", "expected"),
    [
        ("bfly", 1, 31, lambda i: i ^ 1),
        ("idx", 5, 31, lambda i: 5),
        ("idx", 3, (24 << 8) | 31, lambda i: (i & 24) | 3),  # segments of 8 lanes
        ("up", 2, 0, lambda i: i - 2 if i >= 2 else i),
        ("down", 3, 31, lambda i: i + 3 if i + 3 < 32 else i),
    ],
)
def test_shuffle(kernel, mode: str, other: int, limits: int, expected: Callable[[int], int]):
    kernel(f"""
        shfl.sync.{mode}.b32 %r5|%p1, %r0, {other}, {limits}, -1;
        st.global.u32 [%rd2], %r5;""")
    assert words(kernel, 32) == [expected(i) for i in range(32)]
    assert kernel.reports == []


def test_votes_and_reductions(kernel):
    kernel("""
        setp.lt.u32 %p1, %r0, 3;
        vote.sync.ballot.b32 %r5, %p1, -1;
        redux.sync.add.u32 %r6, %r0, -1;
        add.u32 %r5, %r5, %r6;
        st.global.u32 [%rd2], %r5;""")
    assert words(kernel, 32) == [7 + 31 * 16] * 32


def test_a_product_of_matrices(kernel):
    """Lane 4 i + j holds row i and columns j and j + 4 of a, rows j and j + 4 and column i of b."""
    a, b = np.random.default_rng(0).integers(-9, 10, (2, 16, 8)).astype(np.float32) / 4
    i, j = np.arange(32) // 4, np.arange(32) % 4
    kernel.write(np.stack([a[i, j], a[i + 8, j], a[i, j + 4], a[i + 8, j + 4], b[j, i], b[j + 4, i]]))
    kernel(
        "".join(f"ld.global.b32 %r{10 + n}, [%rd2+{128 * n}];" for n in range(6))
        + "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f2, %f3, %f4}, {%r10, %r11, %r12, %r13}, "
        "{%r14, %r15}, {0f3F800000, 0f3F800000, 0f3F800000, 0f3F800000};"
        + "".join(f"st.global.f32 [%rd2+{128 * n}], %f{1 + n};" for n in range(4))
    )
    expected = a @ b[:8] + 1
    found = np.array(words(kernel, 128, np.float32)).reshape(4, 32)
    assert np.array_equal(found, [expected[i + 8 * (n // 2), 2 * j + n % 2] for n in range(4)])
    assert kernel.reports == []


def test_rounding_to_tf32(kernel):
    """To the nearest, ties away from 0."""
    kernel.write(np.array([1 + 2.0**-11, 1 + 2.0**-11 - 2.0**-23, -1 - 2.0**-11, np.inf], np.float32))
    kernel("ld.global.f32 %f1, [%rd2]; cvt.rna.tf32.f32 %r5, %f1; st.global.b32 [%rd2], %r5;", threads=4)
    assert words(kernel, 4, np.float32) == [1 + 2.0**-10, 1.0, -1 - 2.0**-10, np.inf]


@pytest.mark.parametrize(("left", "reports"), [(0, []), (1, ["ld.shared: never written"])])
def test_a_copy_arrives_when_it_is_waited_for(kernel, left: int, reports: list[str]):
    """The first group of two, of which some threads write 0."""
    kernel.write(np.arange(1, 65, dtype=np.uint32))
    kernel(
        "mul.lo.u32 %r5, %r0, 4; setp.lt.u32 %p1, %r0, 3; selp.b32 %r6, 4, 0, %p1;"
        "cp.async.ca.shared.global [%r5], [%rd2], 0x4, %r6; cp.async.commit_group;"
        "cp.async.ca.shared.global [%r5+128], [%rd2+128], 0x4; cp.async.commit_group;"
        f"cp.async.wait_group {left}; ld.shared.u32 %r7, [%r5]; ld.shared.u32 %r8, [%r5+128]; add.u32 %r7, %r7, %r8;"
        "st.global.u32 [%rd2], %r7;",
        shared=".shared .align 16 .b8 values[256];",
    )
    assert kernel.reports == reports
    assert reports or words(kernel, 5) == [34, 36, 38, 36, 37]


def test_a_barrier_hands_shared_memory_over(kernel):
    for order in (Order(), Order("descending"), Order("random", seed=3), Order("descending", alone=True)):
        kernel(
            """
            mov.u32 %r5, values;
            shl.b32 %r6, %r0, 2;
            add.u32 %r7, %r5, %r6;
            st.shared.u32 [%r7], %r3;
            bar.sync 0;
            sub.u32 %r8, 252, %r6;
            add.u32 %r8, %r8, %r5;
            ld.shared.u32 %r9, [%r8];
            st.global.u32 [%rd2], %r9;""",
            threads=64,
            blocks=3,
            shared=".shared .align 4 .b8 values[256];",
            order=order,
        )
        assert words(kernel, 192) == [64 * block + 63 - i for block in range(3) for i in range(64)]
    assert kernel.reports == []


@pytest.mark.parametrize("order", [Order(), Order("descending"), Order("random", seed=5)])
def test_atomics(kernel, order: Order):
    kernel.write(np.zeros(2, np.uint32))
    kernel("atom.global.add.u32 %r5, [%rd0], 1; red.global.max.u32 [%rd0+4], %r3;", threads=64, blocks=4, order=order)
    assert words(kernel, 2) == [256, 255]
    assert kernel.reports == []


def test_the_order_shows_in_a_sum_of_floats(kernel):
    """What a kernel must not do, for its results would have other bits every time."""
    sums = set()
    for order in (Order(), Order("descending"), Order("random", seed=1), Order("random", seed=2)):
        kernel.write(np.zeros(1, np.float32))
        kernel(
            "cvt.rn.f32.u32 %f1, %r3; mul.f32 %f1, %f1, 0f3DCCCCCD; ex2.approx.f32 %f1, %f1;"
            "red.global.add.f32 [%rd0], %f1;",
            threads=64,
            blocks=4,
            order=order,
        )
        sums.add(words(kernel, 1)[0])
    assert len(sums) > 1 and kernel.reports == []


FLOATS = np.array(
    [1.0, 1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-11), 65519.0, 65520.0, 1e-7, np.nan, np.inf, -0.0], np.float32
)


def test_conversions_round_to_the_nearest_even(kernel):
    """From float32 to bfloat16 and float16: ties, overflow, subnormal numbers, NaN."""
    kernel.write(FLOATS)
    kernel(
        """
        ld.global.f32 %f1, [%rd2];
        cvt.rn.bf16.f32 %rs1, %f1;
        cvt.rn.f16.f32 %rs2, %f1;
        mov.b32 %r5, {%rs1, %rs2};
        st.global.u32 [%rd2], %r5;""",
        threads=len(FLOATS),
    )
    brains, halves = kernel.memory[: len(FLOATS)] & 0xFFFF, kernel.memory[: len(FLOATS)] >> 16
    assert [hex(bits) for bits in brains[:4]] == ["0x3f80", "0x3f80", "0x3f82", "0xbf80"]
    assert brains[7] == 0x7FFF and brains[8] == 0x7F80 and brains[9] == 0x8000
    with np.errstate(over="ignore"):
        expected = FLOATS.astype(np.float16).view(np.uint16)
    assert halves[:7].tolist() == expected[:7].tolist() and halves[7] == 0x7FFF


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_comparisons_of_low_precision(kernel, kind: str):
    """As of numbers, not of their bits: −2 < −1 < 1, 0 is −0, and nothing is known of NaN."""
    kernel.write(np.array([-2.0, -1.0, 1.0, 0.0, -0.0, np.nan], np.float32))
    comparisons = {
        "lt": "0f00000000",
        "eq": "0f00000000",
        "ltu": "0fBFC00000",
        "num": "0f00000000",
        "nan": "0f3F800000",
    }
    code = "".join(
        f"mov.f32 %f2, {bits}; cvt.rn.{kind}.f32 %rs2, %f2; setp.{name}.{kind} %p1, %rs1, %rs2;"
        f"selp.u32 %r6, {2**n}, 0, %p1; or.b32 %r5, %r5, %r6;"
        for n, (name, bits) in enumerate(comparisons.items())
    )
    kernel(
        f"ld.global.f32 %f1, [%rd2]; cvt.rn.{kind}.f32 %rs1, %f1; mov.u32 %r5, 0; {code} st.global.u32 [%rd2], %r5;",
        threads=6,
    )
    assert words(kernel, 6) == [0b01101, 0b01001, 0b01000, 0b01010, 0b01010, 0b10100]


def test_float_to_integer(kernel):
    kernel.write(np.array([2.5, 3.5, -2.5, 3e9, np.nan], np.float32))
    kernel("ld.global.f32 %f1, [%rd2]; cvt.rni.s32.f32 %r5, %f1; st.global.u32 [%rd2], %r5;", threads=5)
    assert words(kernel, 5, np.int32) == [2, 4, -2, 2**31 - 1, 0]


def test_fma_rounds_once(kernel):
    """Where a product in float64 and a sum in float64 would be rounded to a tie first."""
    a, b, c = np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2.0**-60)
    bits = [int(x.view(np.uint32)) for x in (a, b, c)]
    kernel(
        "mov.f32 %f1, 0f{:08X}; mov.f32 %f2, 0f{:08X}; mov.f32 %f3, 0f{:08X};"
        "fma.rn.f32 %f4, %f1, %f2, %f3; mul.f32 %f5, %f1, %f2;"
        "st.global.f32 [%rd0], %f4; st.global.f32 [%rd0+4], %f5;".format(*bits),
        threads=1,
    )
    product = 1 + 2**-11  # plus 2^-24, half a unit: the sum is beyond the tie
    assert words(kernel, 2, np.float32) == [product + 2**-23, product]


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("prmt.b32 %r5, 0x33221100, 0x77665544, 0x6420", 0x66442200),
        ("lop3.b32 %r5, 12, 10, 6, 0x96", 12 ^ 10 ^ 6),
        ("bfe.s32 %r5, 0xF0, 4, 4", 0xFFFFFFFF),
        ("bfe.u32 %r5, 0xF0, 4, 4", 15),
        ("bfi.b32 %r5, 5, 0xFF, 4, 4", 0x5F),
        ("shf.l.wrap.b32 %r5, 0x80000000, 1, 1", 3),
        ("mul.hi.u32 %r5, 0xFFFFFFFF, 0xFFFFFFFF", 0xFFFFFFFE),
        ("div.s32 %r5, -7, 2", 2**32 - 3),
        ("rem.s32 %r5, -7, 2", 2**32 - 1),
        ("clz.b32 %r5, 0x00010000", 15),
        ("popc.b32 %r5, 0xF0F0", 8),
        ("shr.s32 %r5, -8, 40", 2**32 - 1),
        ("shl.b32 %r5, 1, 40", 0),
        ("min.s32 %r5, -1, 1", 2**32 - 1),
        ("min.u32 %r5, -1, 1", 1),
    ],
)
def test_integers(kernel, instruction: str, expected: int):
    kernel(f"{instruction}; st.global.u32 [%rd2], %r5;", threads=1)
    assert words(kernel, 1) == [expected]


def test_an_unknown_instruction_is_an_error(kernel):
    with pytest.raises(NotImplementedError, match="tanh"):
        kernel("tanh.approx.f32 %f1, %f2;")
    with pytest.raises(NotImplementedError, match=r"bar\.sync 1"):
        kernel("bar.sync 1, 32;")


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
