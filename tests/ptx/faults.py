"""Errors that are put into the PTX, one at a time, and what must notice each."""

from typing import NamedTuple


class Fault(NamedTuple):
    """``pattern`` -> ``replacement`` in a kernel, ``count`` times after ``skip`` others, while ``scenario`` runs.

    ``noticed``: a report that contains this, or "error": the results are wrong.
    """

    name: str
    kernel: str
    pattern: str
    replacement: str
    scenario: str
    noticed: str
    count: int = 999
    skip: int = 0


FORWARD, BACKWARD, BOTH = (f"dkt_{way}_kernel<2, 1>" for way in ("forward", "backward", "both"))
END, STATISTICS = "dkt_end_kernel<2>", "dkf_statistics_kernel<0, 4>"
POOLING, GRADIENT, MERGE = "dkf_pooling_kernel<0, 4, 0>", "dkf_gradient_kernel<0, 4, 0>", "dkf_merge_kernel"
SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+[^,;]*, %r\d+), %r\d+, (%r\d+, %r\d+);"
BARRIER, FENCE, NOTHING = r"bar\.sync\s+0;", r"membar\.gl;", ""

FAULTS = [
    # ---- order
    Fault("no barrier between warps", FORWARD, BARRIER, NOTHING, "row of a block", "read without a barrier"),
    Fault("no barrier before the gradient", BOTH, BARRIER, NOTHING, "kept row", "read without a barrier"),
    Fault("no fence before the ticket", END, FENCE, NOTHING, "many rows", "without release and acquire", 1),
    Fault("no fence after the ticket", END, FENCE, NOTHING, "many rows", "without release", count=1, skip=1),
    Fault(
        "no __syncwarp after the ticket",
        END,
        r"bar\.warp\.sync\s+-1;",
        NOTHING,
        "many rows",
        "without __syncwarp",
    ),
    Fault(
        "sums of blocks read past the caches' coherence",
        END,
        r"ld\.volatile\.global\.f64|ld\.volatile\.f64",
        "ld.global.nc.f64",
        "many rows",
        "ld.global.nc of what the same launch writes",
        1,
    ),
    Fault(
        "a ticket that is not atomic",
        END,
        r"atom\.global\.add\.u32\s+(%r\d+), (\[%rd\d+\]), 1;",
        r"ld.global.u32 \1, \2; st.global.u32 \2, 1;",
        "many rows",
        "never written",
    ),
    Fault(
        "the first block merges, not the last",
        END,
        r"(atom\.global\.add\.u32\s+%r\d+, \[%rd\d+\]), 1;",
        r"\1, 0xFFFFFFFF;",
        "many rows",
        "error",
    ),
    Fault("pooling: no barrier", POOLING, BARRIER, NOTHING, "fusion", "without a barrier"),
    Fault("statistics: no barrier", STATISTICS, BARRIER, NOTHING, "fusion", "without a barrier"),
    Fault("merging: no barrier", MERGE, BARRIER, NOTHING, "fusion", "without a barrier"),
    Fault("gradient: no barrier", GRADIENT, BARRIER, NOTHING, "fusion", "without a barrier"),
    Fault(
        "a barrier that some threads miss",
        GRADIENT,
        BARRIER,
        "setp.lt.u32 %p1, %tid.x, 1; @%p1 ret; bar.sync 0;",
        "fusion",
        "miss a barrier",
        1,
    ),
    # ---- places
    Fault(
        "an index off by one",
        FORWARD,
        r"@p ld\.global\.nc\.u32 (%r\d+), \[(%rd\d+)\]",
        r"@p ld.global.nc.u32 \1, [\2+4]",
        "row",
        "ld.global: not allocated",
    ),
    Fault(
        "a vector load off by one vector",
        FORWARD,
        r"ld\.global\.nc\.v4\.u32 (\{[^}]*\}), \[(%rd\d+)\]",
        r"ld.global.nc.v4.u32 \1, [\2+-16]",
        "aligned row",
        "ld.global: not allocated",
    ),
    Fault(
        "a misaligned vector load",
        FORWARD,
        r"ld\.global\.nc\.v4\.u32 (\{[^}]*\}), \[(%rd\d+)\]",
        r"ld.global.nc.v4.u32 \1, [\2+4]",
        "aligned row",
        "misaligned access of 16 bytes",
    ),
    Fault(
        "a gradient one vector further",
        BACKWARD,
        r"st\.global\.v4\.b32 \[(%rd\d+)\]",
        r"st.global.v4.b32 [\1+16]",
        "aligned row",
        "st.global: not allocated",
    ),
    Fault("a result that is not stored", END, r"st\.global\.f32\s+[^;]*;", NOTHING, "row", "never written"),
    Fault("a state that is not stored", FORWARD, r"st\.global\.v4\.f32\s+[^;]*;", NOTHING, "row", "never written"),
    Fault(
        "a chunk kept in the place of another",
        BOTH,
        r"st\.shared\.v4\.u32\s+\[(%r\d+)\]",
        r"st.shared.v4.u32 [\1+16]",
        "kept row",
        "error",
    ),
    Fault(
        "a gradient that is not stored",
        BACKWARD,
        r"st\.global\.v4\.b32 [^;]*;",
        NOTHING,
        "aligned row",
        "never written",
    ),
    Fault(
        "shared memory beyond its end",
        GRADIENT,
        r"ld\.shared\.v4\.f32\s+(\{[^}]*\}), \[(%r\d+)\]",
        r"ld.shared.v4.f32 \1, [\2+8192]",
        "fusion",
        "outside of the block's memory",
    ),
    Fault(
        "shared memory misaligned",
        GRADIENT,
        r"ld\.shared\.v4\.f32\s+(\{[^}]*\}), \[(%r\d+)\]",
        r"ld.shared.v4.f32 \1, [\2+8]",
        "fusion",
        "misaligned access of 16 bytes",
    ),
    Fault(
        "a parameter beyond the last one",
        BACKWARD,
        r"ld\.param\.u64\s+(%rd\d+), \[(\w+_param_4)\]",
        r"ld.param.u64 \1, [\2+8]",
        "row",
        "ld.param: outside",
    ),
    # ---- lanes
    Fault(
        "half of the lanes in a mask",
        FORWARD,
        r"mov\.u32 \t(%r\d+), -1;",
        r"mov.u32 \1, 65535;",
        "row",
        "the mask leaves out a lane",
    ),
    Fault(
        "lanes that have gone elsewhere",
        FORWARD,
        r"(shfl\.sync\.bfly\.b32\s+[^;]*;)",
        r"setp.lt.u32 %p1, %tid.x, 1; @%p1 ret; \1",
        "row",
        "lanes of the mask are elsewhere",
        1,
    ),
    Fault(
        "pooling: half of the lanes in a mask",
        POOLING,
        r"(shfl\.sync\.bfly\.b32\s+[^;]*), %r\d+;",
        r"\1, 65535;",
        "fusion",
        "the mask leaves out a lane",
    ),
    Fault("pooling: sums of other channels", POOLING, SHUFFLE, r"\1, 1, \2;", "fusion", "error"),
    Fault("statistics: shares of other channels", STATISTICS, SHUFFLE, r"\1, 1, \2;", "fusion", "error"),
    # ---- numbers
    Fault(
        "a sum that forgets an addend",
        FORWARD,
        r"fma\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+), %f\d+;",
        r"mul.f32 \1, \2, \3;",
        "row",
        "error",
        4,
        3,
    ),
    Fault(
        "truncation in place of rounding",
        "dkt_backward_kernel<2, 0>",
        r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+);",
        r"{ .reg .b32 high, low; mov.b32 high, \2; mov.b32 low, \3; prmt.b32 \1, low, high, 0x7632; }",
        "rounding",
        "error",
    ),
    Fault("a target that is no class", FORWARD, r"call\.uni[^;]*;|call [^;]*;", NOTHING, "no class", "error"),
    Fault("a mean of one value less", MERGE, r"div\.rn\.f32", "mul.f32", "fusion", "error"),
]
