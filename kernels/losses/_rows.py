"""What the Triton kernels of the expert losses share: where the logits are, how many a program takes, sums over rows.

A row is a sample. Forward kernels run one program a row that streams the classes once: every lane keeps the sums of its
own classes, and the lanes are joined when the row ends. A second kernel, in which a lane serves a row, adds up the
batch in a fixed order. Backward kernels run some programs a row, element-wise. What is saved passes from forward to
backward, one column a number and one entry a row, so that neighbouring lanes access neighbouring rows. Everything is
computed in float32 and only the finished gradient is rounded. The kernels use portable Triton only, so they run on
every GPU that Triton targets, and on CPU tensors in its interpreter.

A lane takes VECTOR neighbouring classes by one load. Rows of, say, 8142 classes do not start at multiples of 16 bytes,
so the first whole chunk of VECTOR classes starts behind the row; the few classes before and after the whole chunks, the
edge, are taken one by one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SECTOR = tl.constexpr(32)  # bytes of global memory that are read at once

# Specialising on the values of these would compile a kernel for every combination of them; the kernels are told what
# they need to know by VECTOR, and by a class stride of None for 1.
UNSPECIALIZED = [
    *("offsets", "row_stride", "class_stride", "target_stride", "bias_expert_stride", "bias_class_stride"),
    *("out_expert_stride", "out_row_stride", "out_class_stride", "classes", "rows", "experts", "images"),
    *("target_expert_stride", "second_expert_stride", "second_stride", "scale_expert_stride", "margin_expert_stride"),
    *("teacher_expert_stride", "teacher_row_stride", "teacher_class_stride", "grad_expert_stride", "grad_row_stride"),
]
POINTERS = [
    *("logits", "target", "bias", "saved", "labels", "ticket", "partials", "factors", "loss", "terms"),
    *("gradient", "grad_output", "second", "scales", "mask", "inverse_temperatures", "teacher", "students", "left"),
    *("margin", "lams", "first_weights", "second_weights", "divergence_weights", "outputs"),
]

# How a kernel is given an offset: as an int64 whatever its value, and as no multiple of 16. Triton compiles a kernel
# anew where the type or the alignment of an argument changes, and tensors of one loss lie anyhow, more or less than
# 2³¹ elements apart.
FAR = tl.constexpr(2**62 + 8)


def kernel(function: Callable[..., Any]) -> Any:
    """A Triton kernel that is compiled neither for values nor for alignments."""
    return triton.jit(function, do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=POINTERS)


@triton.jit
def expert_offset(offsets, k: tl.constexpr):
    return (offsets[k] - FAR) // 16


@triton.jit
def expert_rows(logits, offsets, offset):  # K pointers to z_k[0] of one sample
    rows = ()
    for k in tl.static_range(len(offsets)):
        rows += (logits + (expert_offset(offsets, k) + offset),)
    return rows


@triton.jit
def class_offset(c, class_stride):
    """The offset of class c. A stride of None is 1 at compile time: neighbouring classes then make one wide load."""
    return c if class_stride is None else c.to(tl.int64) * class_stride


@triton.jit
def exp(x):
    """exp(x), results below 1.2e-38 flushed to 0; tl.exp takes three more instructions to keep those."""
    return tl.exp2(x * LOG2E)


@triton.jit
def times_factor(weight, factors, i):
    """weight · factors[i], in float32; factors may be None, at compile time."""
    return weight if factors is None else weight * tl.load(factors + i).to(tl.float32)


@triton.jit
def before_chunks(row, VECTOR: tl.constexpr):
    """How many classes of a row, given by a pointer, lie before the first multiple of VECTOR elements."""
    itemsize: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    return ((-(row.to(tl.int64) // itemsize)) & (VECTOR - 1)).to(tl.int32)


@triton.jit
def first_chunk(row, offset, VECTOR: tl.constexpr):
    """The pointer row + offset, which is a multiple of VECTOR elements, in a form that tells the compiler so."""
    itemsize: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(row + offset, VECTOR * itemsize)


@triton.jit
def ahead_of_chunks(chunk, VECTOR: tl.constexpr):
    """How many chunks lie between the beginning of the first one's sector, where the first lane starts, and it."""
    itemsize: tl.constexpr = chunk.dtype.element_ty.primitive_bitwidth // 8
    return ((chunk.to(tl.int64) & (SECTOR - 1)) // (VECTOR * itemsize)).to(tl.int32)


@triton.jit
def loaded(rows, c, valid, class_stride):
    """The entries of one class, or of some classes, from n pointers to class 0, as n numbers or blocks of float32."""
    values = ()
    for k in tl.static_range(len(rows)):
        values += (tl.load(rows[k] + class_offset(c, class_stride), mask=valid).to(tl.float32),)
    return values


@triton.jit
def edge_classes(lane, before, count, VECTOR: tl.constexpr):
    """The classes outside of ``count`` whole chunks, one a lane; what follows them lies beyond the row."""
    return tl.where(lane < before, lane, lane + count * VECTOR)


@triton.jit
def times(x, factor):
    """x · factor, which no addition takes in: lanes that add each other's products would round only their own."""
    return tl.where(x == 0.0, 0.0, x * factor)


@triton.jit
def reduced(blocks, MAX: tl.constexpr):  # n tensors [LANES] -> n scalars
    """The maxima or sums of several blocks in one reduction, which pays for its barriers once instead of n times."""
    count: tl.constexpr = len(blocks)
    levels: tl.constexpr = (count > 1) + (count > 2) + (count > 4) + (count > 8) + (count > 16)
    joined = blocks
    for _ in tl.static_range(2**levels - count):
        joined += (tl.full(blocks[0].shape, 0.0, tl.float32),)
    for _ in tl.static_range(levels):
        pairs = ()
        for i in tl.static_range(len(joined) // 2):
            pairs += (tl.join(joined[2 * i], joined[2 * i + 1]),)
        joined = pairs
    results = (tl.max(joined[0], 0) if MAX else tl.sum(joined[0], 0),)
    for _ in tl.static_range(levels):
        halves = ()
        for i in tl.static_range(len(results)):
            low, high = tl.split(results[i])
            halves += (low, high)
        results = halves
    return results  # the first n; the padding follows


class Tile(NamedTuple):
    """What a program takes at once: LANES chunks of VECTOR neighbouring classes, a lane each."""

    lanes: int
    vector: int

    @property
    def classes(self) -> int:
        return self.lanes * self.vector

    @property
    def warps(self) -> int:
        return max(self.lanes // 32, 1)

    def steps(self, classes: int, of_lane: int) -> tuple[int, int]:
        """How many tiles, a power of two, make ``of_lane`` classes of a lane, and how often a row takes so many."""
        of_row = triton.cdiv(classes, self.classes)
        most = max(of_lane // self.vector, 1)
        steps = min(1 << (most.bit_length() - 1), triton.next_power_of_2(of_row))
        return steps, triton.cdiv(of_row, steps)


MOST_LANES = 128
LOGITS_OF_A_LANE = 32  # at once; more would take too many registers


def choose_tile(classes: int, experts: int, widest: int) -> Tile:
    """Choose how many classes, of ``experts`` logits each, a program takes at once.

    A lane takes ``widest`` of them, if it can hold as many and the row keeps a warp busy. A row has whole chunks
    wherever it starts. Longer rows get more lanes, and then a loop.
    """
    most = min(widest, LOGITS_OF_A_LANE // experts, (classes + 1) // 2, max(triton.cdiv(classes, 32), 1))
    vector = 1 << (most.bit_length() - 1)
    return Tile(min(max(triton.next_power_of_2(triton.cdiv(classes, vector)), 32), MOST_LANES), vector)


class Layout(NamedTuple):
    """Where z_k[b, c] is: ``offsets[k] + b * row_stride + c * class_stride`` elements from the first pointer."""

    first: Tensor
    offsets: tuple[int, ...]
    row_stride: int
    class_stride: int
    batch: int
    classes: int

    @property
    def experts(self) -> int:
        return len(self.offsets)

    def arguments(self, target: Tensor) -> tuple[Any, ...]:
        """What every kernel's parameters begin with: logits and target, and how to address them."""
        strides = (self.row_stride, none_if_unit(self.class_stride), target.stride(0))
        return self.first, target, self.far_offsets, *strides, self.classes

    @property
    def far_offsets(self) -> tuple[int, ...]:
        """The offsets as kernels take them, see FAR."""
        return tuple(16 * offset + FAR.value for offset in self.offsets)

    def tile(self, gradient: Tensor | None = None, agree: int = 16, streams: int | None = None) -> Tile:
        """The tile of a program; chunks start at multiples of their size in all experts' rows, and in the gradient's.

        ``agree``: what else is a multiple of them. ``streams``: how many logits a class has, if not one an expert.
        """
        itemsize = self.first.element_size()
        agree = math.gcd(16 // itemsize, agree, *self.offsets)
        if gradient is not None:
            apart = (gradient.data_ptr() - self.first.data_ptr()) // itemsize
            agree = math.gcd(agree, apart, gradient.stride(0), gradient.stride(1) - self.row_stride)
        neighbours = self.class_stride == 1 and (gradient is None or gradient.stride(2) == 1)
        return choose_tile(self.classes, streams or self.experts, agree if neighbours else 1)

    def has_room(self, tile: Tile, tiles: int) -> bool:
        """Whether so many tiles can begin with the sector in which a row's first chunk lies."""
        ahead = SECTOR.value // (tile.vector * self.first.element_size()) - 1
        return self.classes // tile.vector + ahead <= tiles * tile.lanes

    def new_floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.first.device)

    def new_gradient(self) -> Tensor:
        """Uninitialised memory [K, B, C]: laid out as one tensor of logits, contiguous for a sequence."""
        if self.first.dim() == 3:
            return torch.empty_like(self.first)
        return self.first.new_empty(self.experts, self.batch, self.classes)


def layout_of(logits: Sequence[Tensor]) -> Layout:
    """The layout of one tensor [K, B, C] or of K tensors [B, C]."""
    first = logits[0]
    *_, batch, classes = first.shape
    *expert_strides, row_stride, class_stride = first.stride()
    if expert_strides:
        offsets = tuple(k * expert_strides[0] for k in range(first.shape[0]))
    else:
        distances = [expert.data_ptr() - first.data_ptr() for expert in logits]  # bytes
        itemsize = first.element_size()
        if any(expert.stride() != first.stride() for expert in logits) or any(d % itemsize for d in distances):
            # The kernels address all experts from one pointer with one pair of strides. Experts that were laid out
            # differently, or whose distance in memory is not a whole number of elements, are copied; both are rare.
            return layout_of([torch.stack(tuple(logits))])
        offsets = tuple(distance // itemsize for distance in distances)
    return Layout(first, offsets, row_stride, class_stride, batch, classes)


def gradient_arguments(gradient: Tensor) -> tuple[Any, ...]:
    """A gradient [K, B, C] and its strides, as the backward kernels take them."""
    return gradient, gradient.stride(0), gradient.stride(1), none_if_unit(gradient.stride(2))


def none_if_unit(class_stride: int) -> int | None:
    return None if class_stride == 1 else class_stride
