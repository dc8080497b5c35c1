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


class Network(torch.nn.Module):
    """A module that calls an operator."""

    def forward(self, logits):
        return ops.dkt_loss(logits, torch.tensor([0, 1, 3]))


def graph_of(exported):
    return [str(node.target) for node in exported.graph.nodes if "shike_fast" in str(node.target)]


def test_it_reaches_what_modules_call_and_decorates_functions():
    network, logits = Network(), torch.randn(2, 3, 4, dtype=torch.float64)
    expected = ops.dkt_loss(logits, torch.tensor([0, 1, 3]), backend="reference")
    with ops.use_backend("reference"):
        assert torch.equal(network(logits), expected)
    decorated = ops.use_backend("reference")(network)
    assert torch.equal(decorated(logits), expected) and torch.equal(decorated(logits), expected)


def test_it_is_in_an_exported_graph():
    """What was exported within the block keeps the backend, and runs where this package is not."""
    logits = torch.randn(2, 3, 4)
    with ops.use_backend("cpu"):
        assert graph_of(torch.export.export(Network(), (logits,))) == ["shike_fast.dkt_loss_fused.default"]
    with ops.use_backend("reference"):
        exported = torch.export.export(Network(), (logits,))
    assert graph_of(exported) == ["shike_fast.dkt_loss.default"] and graph_of(exported.run_decompositions()) == []


def test_a_compiled_network_follows_it():
    """From outside, where a change compiles anew, and from inside of what is compiled."""
    seen, logits = [], torch.randn(2, 3, 4)

    def backend(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if "shike_fast" in str(node.target)])
        return graph

    compiled = torch.compile(Network(), backend=backend, fullgraph=True)
    fused, plain = ["shike_fast.dkt_loss_fused.default"], ["shike_fast.dkt_loss.default"]
    for name in ("cpu", "reference", "cpu"):  # the third time it is compiled already
        with ops.use_backend(name):
            compiled(logits)
    torch.compile(ops.use_backend("reference")(Network()), backend=backend, fullgraph=True)(logits)
    assert seen == [fused, plain, plain]
