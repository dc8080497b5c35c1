"""How the rows' terms become those of the batch, in an order that depends on nothing but the number of rows."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from shike_fast.kernels.losses._rows import reduced

MOST_ROWS = 128  # of a program


class Batch(NamedTuple):
    """The rows of a kernel that ends in ``add_rows``, a lane each."""

    rows: int
    of_program: int
    partials: torch.Tensor | None  # float32 [values, programs]; None for one program
    ticket: torch.Tensor  # int32 []; the kernel before sets it to 0

    @property
    def programs(self) -> int:
        return triton.cdiv(self.rows, self.of_program)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.partials, self.ticket, self.rows

    @property
    def constants(self) -> dict[str, Any]:
        return {"ALONE": self.programs == 1, "ROWS": self.of_program, "num_warps": self.of_program // 32}


def batch_of(rows: int, values: int, device: torch.device) -> Batch:
    of_program = min(max(triton.next_power_of_2(rows), 32), MOST_ROWS)
    programs = triton.cdiv(rows, of_program)
    partials = torch.empty((values, programs), dtype=torch.float32, device=device) if programs > 1 else None
    return Batch(rows, of_program, partials, torch.empty((), dtype=torch.int32, device=device))


@triton.jit
def add_rows(values, partials, ticket, ALONE: tl.constexpr, ROWS: tl.constexpr):
    """Add up each of the values [ROWS] of all programs.

    The last program to come adds what all have left in ``partials``. Returns whether this is the one, and the sums.
    """
    sums = reduced(values, False)
    if ALONE:
        last = True
    else:
        programs = tl.num_programs(0)
        for i in tl.static_range(len(values)):
            tl.store(partials + (i * programs + tl.program_id(0)), sums[i])
        last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
        totals = ()
        for _ in tl.static_range(len(values)):
            totals += (tl.full([ROWS], 0.0, tl.float32),)
        if last:
            for start in range(0, programs, ROWS):
                program = start + tl.arange(0, ROWS)
                added = ()
                for i in tl.static_range(len(values)):
                    left = tl.load(partials + (i * programs + program), program < programs, 0.0, cache_modifier=".cg")
                    added += (totals[i] + left,)
                totals = added
        sums = reduced(totals, False)
    return last, sums
