"""Choice among backends, with implementations registered for the test only."""

import pytest
import torch

from shike_fast import ops
from shike_fast.ops import _backend

LOGITS, TARGET = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.fixture
def registry(monkeypatch):
    """The registry, restored after the test."""
    monkeypatch.setattr(
        _backend, "_implementations", {op: dict(known) for op, known in _backend._implementations.items()}
    )
    monkeypatch.setattr(_backend, "_missing", dict(_backend._missing))
    return _backend


def result(value):
    return lambda logits, target, *rest: torch.tensor(value)


def test_backends_and_reasons_cover_every_name():
    present = ops.backends()
    assert list(present) == ["reference", "cpu", "triton", "cuda"] and present["reference"]
    assert set(ops.backend_reasons()) == {name for name, there in present.items() if not there}
    assert all(ops.backend_reasons().values())


def test_the_fastest_backend_that_accepts_runs(registry):
    registry.register("expert_cross_entropy", "cpu", result(1.0))
    registry.register(
        "expert_cross_entropy", "cuda", result(2.0), refuses=lambda *args: f"it needs a GPU, not {args[0].device}"
    )
    assert ops.backends()["cpu"] and ops.backends()["cuda"] and "cpu" not in ops.backend_reasons()
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() == 1.0
    registry.register("expert_cross_entropy", "cuda", result(3.0), refuses=lambda *args: None)
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() == 3.0
    assert ops.expert_cross_entropy(LOGITS, TARGET, backend="cpu").item() == 1.0
    assert ops.expert_cross_entropy(LOGITS, TARGET, backend="reference").item() == pytest.approx(2 * 1.3862944)


def test_the_order_of_registration_does_not_matter(registry):
    registry.register("expert_cross_entropy", "cuda", result(2.0))
    registry.register("expert_cross_entropy", "cpu", result(1.0))
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() == 2.0


def test_an_unverified_backend_runs_only_by_name(registry):
    registry.register("expert_cross_entropy", "triton", result(1.0), verified=False)
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() != 1.0
    assert ops.expert_cross_entropy(LOGITS, TARGET, backend="triton").item() == 1.0


def test_a_refusal_says_why(registry):
    registry.register("expert_cross_entropy", "cuda", result(2.0), refuses=lambda *args: "the logits are on the CPU")
    with pytest.raises(RuntimeError) as caught:
        ops.expert_cross_entropy(LOGITS, TARGET, backend="cuda")
    assert str(caught.value) == "expert_cross_entropy: backend 'cuda' cannot run: the logits are on the CPU"


def test_a_missing_backend_says_why(registry):
    registry.mark_unavailable("triton", "the package triton is not installed")
    with pytest.raises(RuntimeError) as caught:
        ops.dkt_loss(LOGITS, TARGET, backend="triton")
    assert str(caught.value) == "dkt_loss: backend 'triton' cannot run: the package triton is not installed"
    assert ops.backend_reasons()["triton"] == "the package triton is not installed"


def test_a_backend_of_other_ops_says_so(registry):
    registry.register("expert_cross_entropy", "cpu", result(1.0))
    with pytest.raises(RuntimeError, match=r"^dkt_loss: backend 'cpu' cannot run: it does not implement this op$"):
        ops.dkt_loss(LOGITS, TARGET, backend="cpu")


def test_no_backend_at_all(registry):
    registry.register("expert_cross_entropy", "reference", result(1.0), verified=False)
    with pytest.raises(RuntimeError, match=r"^expert_cross_entropy: no backend can run with these arguments$"):
        ops.expert_cross_entropy(LOGITS, TARGET)


@pytest.mark.parametrize("call", ["register", "mark_unavailable"])
def test_names_are_checked(registry, call):
    with pytest.raises(ValueError, match=rf"^{call}: backend must be None or one of .*, got 'gpu'$"):
        if call == "register":
            registry.register("dkt_loss", "gpu", result(1.0))
        else:
            registry.mark_unavailable("gpu", "no reason")
