"""A preferred backend within a block."""

import pytest
import torch

from shike_fast import ops
from shike_fast.ops._dispatch import OPERATORS


def test_it_is_taken_where_it_can_run():
    logits, target = torch.randn(2, 3, 4), torch.tensor([0, 1, 3])
    choose = OPERATORS["dkt_loss"].choose
    arguments = (logits, target, 10.0, 1.0, "mean", 0.0, -30.0, False)
    usual = choose(None, *arguments)
    for backend in ("reference", "cpu"):
        with ops.use_backend(backend):
            assert choose(None, *arguments) == backend
            other = "cpu" if backend == "reference" else "reference"
            assert choose(other, *arguments) == other  # a name before the preference
            with ops.use_backend(None):
                assert choose(None, *arguments) == usual
    with ops.use_backend("cuda"):  # it cannot run on the CPU
        assert choose(None, *arguments) == usual
        assert torch.isfinite(ops.dkt_loss(logits, target))
    assert choose(None, *arguments) == usual


def test_the_preference_ends_with_the_block():
    with pytest.raises(RuntimeError, match="mine"), ops.use_backend("reference"):
        raise RuntimeError("mine")
    assert OPERATORS["dkt_loss"].choose("reference", torch.randn(1, 2, 3)) == "reference"
    with pytest.raises(ValueError, match="use_backend: backend must be None or one of 'reference'"):
        ops.use_backend("fast").__enter__()
