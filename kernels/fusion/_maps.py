"""What the Triton kernels of depth-wise knowledge fusion share: where the maps' values are, how many a program takes.

A program takes one expert, a sample (or a few, one after the other) and a block of channels, and goes through the
positions in tiles [positions, channels]. Triton orders a tile's lanes by the addresses of its first load, so channels-
last maps are read along the channels and NCHW maps along the positions. The experts of a launch are a tuple of pointers
with one tuple of strides; experts with other strides get a launch of their own.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from shike_fast.kernels._common import multiple

Strides = tuple[int, int | None, int | None, int | None]

# Specialising on the values of these would compile a kernel for every combination of them; see _rows.UNSPECIALIZED.
UNSPECIALIZED = ["slots", "flags", "batch", "chunks", "channels", "positions", "width"]


@triton.jit
def pick(values, i):  # values[i], i at run time
    value = values[0]
    for k in tl.static_range(1, len(values)):
        value = tl.where(i == k, values[k], value)
    return value


@triton.jit
def slot_of(slots, i):  # the i-th of the numbers that `packed` put in one
    return (slots >> (4 * i)) & 15


@triton.jit
def sample(maps, strides, i, b, ALIGN: tl.constexpr):  # pointer to maps[i][b, 0, 0, 0]; b is int64
    return pick(maps, i) + multiple(b * strides[0], ALIGN)


@triton.jit
def position_offsets(strides, p, width, ALIGN: tl.constexpr):
    if strides[2] is not None:  # rows do not follow each other in memory
        row = (p // width).to(tl.int64) * multiple(strides[2], ALIGN)
        return row + (p % width).to(tl.int64) * multiple(strides[3], ALIGN)
    return p if strides[3] is None else p.to(tl.int64) * multiple(strides[3], ALIGN)


@triton.jit
def channel_offsets(strides, c, ALIGN: tl.constexpr):
    return c if strides[1] is None else c.to(tl.int64) * multiple(strides[1], ALIGN)


@triton.jit
def tile_offsets(strides, p, c, width, ALIGN: tl.constexpr):  # [P, C]: of positions p [P] and channels c [C]
    offsets = position_offsets(strides, p, width, ALIGN)[:, None] + channel_offsets(strides, c, ALIGN)[None, :]
    if ALIGN == 4 and strides[1] is None and c.shape[0] >= 4:  # Group.constants says why a thread is to take no more
        offsets = tl.max_contiguous(offsets, [1, 4])
    return offsets


@triton.jit
def load_tile(maps, strides, i, b, p, c, width, inside, ALIGN: tl.constexpr):  # maps[i][b]: float32 [P, C], 0 outside
    at = sample(maps, strides, i, b, ALIGN) + tile_offsets(strides, p, c, width, ALIGN)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(maps, strides, i, b, p, c, width, inside, values, ALIGN: tl.constexpr):
    at = sample(maps, strides, i, b, ALIGN) + tile_offsets(strides, p, c, width, ALIGN)
    tl.store(at, values.to(at.dtype.element_ty), mask=inside)


@triton.jit
def vector(vectors, i, c, mask, DEFAULT: tl.constexpr):  # vectors[i][c]; DEFAULT where there are none
    if vectors is None:
        values = tl.full(c.shape, DEFAULT, tl.float32)
    else:
        values = tl.load(pick(vectors, i) + c, mask=mask, other=0.0)
    return values


class Extent(NamedTuple):
    """The shape of the maps, as every kernel takes it."""

    batch: int
    channels: int
    positions: int  # H · W
    width: int


def extent_of(map_: Tensor) -> Extent:
    batch, channels, height, width = map_.shape
    return Extent(batch, channels, height * width, width)


class Tile(NamedTuple):
    positions: int  # a power of two, like channels
    channels: int
    warps: int


# A multiprocessor has to keep some 30 KB of loads under way to use the bandwidth of an H200 (4.8 TB/s, under 1 µs, 132
# of them). A thread takes 16 values of every map, two to four of the widest loads: more than 8, though it needs more
# registers, because what a thread holds of its channels does not double. In bfloat16 and channels-last, the kernels
# need 72 to 128 registers, the folded ones 167 to 197, which leaves loads of 24 to 40 KB under way.
VALUES = 2048
PER_THREAD = 16
# Programs that a launch should have: four for each multiprocessor.
PROGRAMS = 4 * 132


def choose_tile(map_: Tensor, maps: int) -> Tile:
    """Choose a tile for a launch over that many maps like ``map_``.

    The channels take a cache line of 128 bytes, or half of one (what the memory delivers at once) where that gives too
    few programs. A tile covers a sample of 7 × 7 or 8 × 8 positions once or twice.
    """
    batch, channels, positions, _ = extent_of(map_)
    line = 128 // map_.element_size()
    enough = batch * maps * triton.cdiv(channels, line) >= PROGRAMS
    block = min(triton.next_power_of_2(channels), line if enough else line // 2)
    rows = min(triton.next_power_of_2(positions), VALUES // block)
    return Tile(rows, block, max(rows * block // (32 * PER_THREAD), 1))


class RowTile(NamedTuple):
    """A tile of float32 matrices [rows, C], from which a program makes vectors [C]."""

    rows: int
    channels: int

    def blocks(self, rows: int) -> int:
        """How often the tile has to be moved on; a power of two, to compile for few numbers of rows."""
        return triton.next_power_of_2(triton.cdiv(rows, self.rows))

    def constants(self, channels: int) -> dict[str, int]:
        warps = min(max(self.rows * self.channels // 256, 1), 4)
        return {"ALIGN_C": math.gcd(16, channels), "BLOCK": self.channels, "ROWS": self.rows, "num_warps": warps}


def row_tile(rows: int) -> RowTile:
    """Choose a tile: 64 bytes of channels, for many programs even so, 128 for 2,048 channels."""
    return RowTile(min(triton.next_power_of_2(rows), 64), 16)


def strides_of(map_: Tensor) -> Strides:
    """The strides of b, c, h and w as the kernels take them, to tell apart what needs different code.

    None stands for 1 in c and w; and in h where one stride, that of w, leads through all positions.
    """
    sizes = map_.shape
    b, c, h, w = (stride if size > 1 else 0 for stride, size in zip(map_.stride(), sizes, strict=True))
    flat = sizes[2] == 1 or sizes[3] == 1 or h == sizes[3] * w
    if flat and sizes[3] == 1:
        w = h
    return b, None if c == 1 else c, None if flat else h, None if w == 1 and flat else w


def packed(slots: Sequence[int]) -> int:
    """Up to 16 numbers below 16 in one, as an int64; a tuple would be compiled anew for many of its values."""
    number = sum(slot << (4 * i) for i, slot in enumerate(slots))
    return number - (1 << 64) if number >> 63 else number


def bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


class Group(NamedTuple):
    """Experts, or maps, that one launch handles: their numbers, and for each role the strides they share."""

    slots: list[int]
    strides: tuple[Strides, ...]

    def pick(self, values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[slot] for slot in self.slots)

    def constants(self, extent: Extent, tile: Tile, normalised: bool = False) -> dict[str, int]:
        """Constants of every kernel: the tile, and powers of two up to 16 that divide all strides, and the extents.

        A thread takes as many neighbouring values as are known to be aligned. Of the channels of ``normalised`` maps it
        takes four: so many of the float32 vectors [C] come in one access, and each of their sectors in one request.
        """
        known = [stride for strides in self.strides for stride in strides if stride is not None]
        few = normalised and any(strides[1] is None for strides in self.strides)
        return {
            "ALIGN": math.gcd(4 if few else 16, *known),
            "ALIGN_C": math.gcd(16, extent.channels),
            "ALIGN_P": math.gcd(16, extent.positions),
            "BLOCK_P": tile.positions,
            "BLOCK_C": tile.channels,
            "num_warps": tile.warps,
        }


def groups(slots: Sequence[int], *roles: Sequence[Tensor]) -> list[Group]:
    """Group the slots by the strides of their maps; ``roles`` hold a map for each slot, or none at all."""
    found: dict[tuple[Strides, ...], list[int]] = {}
    for slot in slots:
        found.setdefault(tuple(strides_of(maps[slot]) for maps in roles if maps), []).append(slot)
    return [Group(members, strides) for strides, members in found.items()]


def vectors_or_none(vectors: Sequence[Tensor | None], default: float) -> tuple[Tensor, ...] | None:
    """Vectors as a kernel takes them: None if there is none at all, else every missing one filled in."""
    given = next((vector for vector in vectors if vector is not None), None)
    if given is None:
        return None
    return tuple(given.new_full(given.shape, default) if vector is None else vector for vector in vectors)
