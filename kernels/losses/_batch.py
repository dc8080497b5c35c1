"""How the rows' terms become those of the batch, in an order that depends on nothing but the number of rows."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from shike_fast.kernels.losses._rows import reduced

ROWS = tl.constexpr(32)  # of a program, a lane each


class Batch(NamedTuple):
    """The rows of a kernel that ends in ``add_rows``."""

    rows: int
    partials: torch.Tensor  # float32 [values, programs]
    ticket: torch.Tensor  # int32 []; the kernel before sets it to 0

    @property
    def programs(self) -> int:
        return self.partials.shape[1]


def batch_of(rows: int, values: int, device: torch.device) -> Batch:
    partials = torch.empty((values, triton.cdiv(rows, ROWS.value)), dtype=torch.float32, device=device)
    return Batch(rows, partials, torch.empty((), dtype=torch.int32, device=device))


@triton.jit
def add_rows(values, partials, ticket):
    """Add up each of the values [ROWS] of all programs.

    The last program to come adds what all have left in ``partials``. Returns whether this is the one, and the sums.
    """
    sums = reduced(values, False)
    programs = tl.num_programs(0)
    for i in tl.static_range(len(values)):
        tl.store(partials + (i * programs + tl.program_id(0)), sums[i])
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    totals = ()
    for _ in tl.static_range(len(values)):
        totals += (tl.zeros([ROWS], tl.float32),)
    if last:
        for start in range(0, programs, ROWS):
            program = start + tl.arange(0, ROWS)
            added = ()
            for i in tl.static_range(len(values)):
                left = tl.load(partials + (i * programs + program), program < programs, 0.0, cache_modifier=".cg")
                added += (totals[i] + left,)
            totals = added
    return last, reduced(totals, False)
