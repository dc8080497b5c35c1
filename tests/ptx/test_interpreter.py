"""The interpreter itself, on a few lines of PTX each: what they compute."""

from collections.abc import Callable

import numpy as np
import pytest
from machine import Order
from small_kernel import Kernel, words


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


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


def test_addresses_of_32_bits_wrap_around(kernel):
    """A register below 0 and an offset that makes up for it, as a compiler's induction variables have them."""
    kernel("""
        .shared .align 4 .b8 shared[128];
        shl.b32 %r4, %r0, 2;
        st.shared.u32 [%r4], %r0;
        sub.s32 %r5, %r4, 208;
        ld.shared.u32 %r6, [%r5+208];
        st.global.u32 [%rd2], %r6;""")
    assert words(kernel, 32) == [*range(32)]
    assert kernel.reports == []


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
