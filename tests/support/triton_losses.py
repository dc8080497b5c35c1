"""Inputs of the Triton kernels of the losses: layouts of logits, and rows that need several blocks."""

from contextlib import contextmanager

import pytest

from shike_fast.kernels.losses import _rows

LAYOUTS = ("contiguous", "transposed", "strided", "sequence", "sequence of columns", "sequence of all sorts")


def lay_out(logits, layout):
    """The same values in another layout, as the kernels take them."""
    if layout == "sequence":
        return [expert.clone() for expert in logits]
    if layout == "sequence of columns":
        return [expert.t().contiguous().t() for expert in logits]
    if layout == "sequence of all sorts":
        return [expert.repeat_interleave(1 + k % 3, 1)[:, :: 1 + k % 3] for k, expert in enumerate(logits)]
    if layout == "transposed":  # [B, C, K] in memory
        return [logits.permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    if layout == "strided":
        return [logits.repeat_interleave(2, 2)[:, :, ::2]]
    return [logits]


@contextmanager
def blocks_of(size):
    """Within this context a program takes ``size`` classes at once, so that rows need several; None changes nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if size is not None:
            usual = _rows.choose_tile

            def smaller(*arguments):
                vector = min(usual(*arguments).vector, 2)
                return _rows.Tile(size // vector, vector)

            patch.setattr(_rows, "choose_tile", smaller)
        yield
