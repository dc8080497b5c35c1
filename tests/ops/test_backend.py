"""Choice among backends, with implementations registered for the test only."""

import contextlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from shike_fast import ops
from shike_fast.ops import _dispatch, _verification
from shike_fast.ops._verdicts import FAILED, NOT_TRIED, PASSED, Verdict

LOGITS, TARGET = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.fixture
def registry(monkeypatch):
    """The records with the reference implementations only, restored after the test; all else counts as proven."""
    for operator in _dispatch.OPERATORS.values():
        monkeypatch.setattr(operator, "backends", {"reference": operator.backends["reference"]})
        monkeypatch.setattr(operator, "_orders", {})
    proven = {name: dict.fromkeys(_dispatch.OPERATORS, Verdict(PASSED)) for name in ("cuda", "triton", "cpu")}
    monkeypatch.setitem(_verification._known, "cpu", proven)
    return _dispatch.OPERATORS


def result(value):
    return lambda logits, target, *rest: torch.tensor(value)


def test_backends_and_reasons_cover_every_name():
    present = ops.backends()
    assert list(present) == ["reference", "cpu", "triton", "cuda"] and present["reference"]
    assert set(ops.backend_reasons()) == {name for name, there in present.items() if not there}
    assert all(ops.backend_reasons().values())


def test_the_fastest_backend_that_accepts_runs(registry):
    registry["expert_cross_entropy"].add("cpu", result(1.0))
    registry["expert_cross_entropy"].add(
        "cuda", result(2.0), refuses=lambda logits, *_: f"it needs a GPU, not {logits.device}"
    )
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() == 1.0
    registry["expert_cross_entropy"].add("cuda", result(3.0), refuses=lambda *args: None)
    registry["expert_cross_entropy"].forget()
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() == 3.0
    assert ops.expert_cross_entropy(LOGITS, TARGET, backend="cpu").item() == 1.0
    assert ops.expert_cross_entropy(LOGITS, TARGET, backend="reference").item() == pytest.approx(2 * 1.3862944)


def test_the_order_of_registration_does_not_matter(registry):
    registry["expert_cross_entropy"].add("cuda", result(2.0))
    registry["expert_cross_entropy"].add("cpu", result(1.0))
    assert ops.expert_cross_entropy(LOGITS, TARGET).item() == 2.0


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (None, None),
        (Verdict(FAILED, "wrong"), "expert_cross_entropy: triton failed on cpu: wrong; reference runs"),
        (Verdict(NOT_TRIED, "no GPU"), "the reference runs on cpu: triton not tried: no GPU"),
    ],
)
def test_a_backend_that_has_not_passed_runs_only_by_name(registry, monkeypatch, verdict, said):
    monkeypatch.setattr(_verification, "_told", set())
    known = {"triton": {} if verdict is None else {"expert_cross_entropy": verdict}}
    monkeypatch.setitem(_verification._known, "cpu", known)
    monkeypatch.setattr(_dispatch, "_untried", lambda _: {})
    registry["expert_cross_entropy"].add("triton", result(1.0))
    with contextlib.nullcontext() if said is None else pytest.warns(RuntimeWarning, match=re.escape(said)):
        assert ops.expert_cross_entropy(LOGITS, TARGET).item() != 1.0
    assert ops.expert_cross_entropy(LOGITS, TARGET, backend="triton").item() == 1.0


def test_a_refusal_says_why(registry):
    registry["expert_cross_entropy"].add("cuda", result(2.0), refuses=lambda *args: "the logits are on the CPU")
    with pytest.raises(RuntimeError) as caught:
        ops.expert_cross_entropy(LOGITS, TARGET, backend="cuda")
    assert str(caught.value) == "expert_cross_entropy: backend 'cuda' cannot run: the logits are on the CPU"


def test_a_missing_backend_says_why(monkeypatch):
    missing = {"triton": lambda: "the package triton is not installed", "cpu": lambda: None}
    monkeypatch.setattr(_dispatch, "_MISSING", missing)
    assert ops.backends() == {"reference": True, "cpu": True, "triton": False, "cuda": True}
    assert ops.backend_reasons() == {"triton": "the package triton is not installed"}


def test_a_backend_of_other_ops_says_so(registry):
    registry["expert_cross_entropy"].add("cpu", result(1.0))
    with pytest.raises(RuntimeError, match=r"^dkt_loss: backend 'cpu' cannot run: it does not implement this op$"):
        ops.dkt_loss(LOGITS, TARGET, backend="cpu")


def test_no_backend_at_all(registry):
    registry["expert_cross_entropy"].add("reference", result(1.0), refuses=lambda *args: "it is broken")
    with pytest.raises(RuntimeError, match=r"^expert_cross_entropy: no backend can run with these arguments$"):
        ops.expert_cross_entropy(LOGITS, TARGET)


def test_names_are_checked(registry):
    with pytest.raises(ValueError, match=r"^dkt_loss: backend must be None or one of .*, got 'gpu'$"):
        registry["dkt_loss"].add("gpu", result(1.0))


LOSSES = {
    "dkt_loss": ops.dkt_loss,
    "expert_cross_entropy": ops.expert_cross_entropy,
    "expert_loss": ops.expert_loss,
    "expert_kl": lambda logits, target, **options: ops.expert_kl(logits, target=target, **options),
    "balanced_softmax_loss": lambda logits, target, **options: ops.balanced_softmax_loss(
        logits, target, torch.ones(logits.shape[-1], device=logits.device), **options
    ),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("backend", "logits", "reason"),
    [
        ("cpu", torch.zeros(1, 1, 1).expand(1, 3, 2**24), "it takes at most 16777215 classes, got 16777216"),
        ("cpu", torch.zeros(2, 3, 4, device="meta"), "the logits are on meta, not on the CPU"),
        ("cuda", LOGITS, "the logits are on cpu, not on a GPU"),
        ("triton", LOGITS, "the logits are on cpu, not on a GPU"),
    ],
)
def test_what_the_fused_kernels_refuse(name, backend, logits, reason):
    target = torch.zeros(3, dtype=torch.int64, device=logits.device)
    with pytest.raises(RuntimeError) as caught:
        LOSSES[name](logits, target, backend=backend)
    assert str(caught.value) == f"{name}: backend {backend!r} cannot run: {reason}"


def test_what_the_kernels_refuse_goes_to_the_reference():
    logits = torch.randn(9, 3, 4)
    assert torch.equal(ops.dkt_loss(logits, TARGET), ops.dkt_loss(logits, TARGET, backend="reference"))
    with pytest.raises(RuntimeError) as caught:
        ops.dkt_loss(logits, TARGET, backend="cpu")
    assert str(caught.value) == "dkt_loss: backend 'cpu' cannot run: it takes at most 8 experts, got 9"


@pytest.fixture
def gpus(monkeypatch):
    """A library with CUDA that does not run on the second of two GPUs; counts its tests of a GPU."""
    tests = []

    def self_test(index):
        tests.append(index)
        if index == 1:
            raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(_dispatch, "_CUDA_BUILD_MISSING", None)
    monkeypatch.setattr(_dispatch, "_self_tests", {})
    monkeypatch.setattr(_dispatch, "native", lambda: SimpleNamespace(cuda_self_test=self_test))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return tests


REFUSED = "the compiled library does not run on cuda:1: no kernel image is available for execution on the device"


def test_a_gpu_on_which_the_library_does_not_run_is_refused_with_the_reason(gpus, monkeypatch):
    for _ in range(2):  # tried once
        assert _dispatch.cuda_missing(torch.device("cuda", 0)) is None
        assert _dispatch.cuda_missing(torch.device("cuda", 1)) == REFUSED
        assert _dispatch.cuda_missing() == REFUSED
    assert gpus == [0, 1]
    logits = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    assert _dispatch.refuses_tensor("cuda", logits, "the logits are") == REFUSED


def test_a_gpu_is_not_tried_within_a_recording(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _dispatch.cuda_missing(torch.device("cuda", 1)) is None and gpus == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert _dispatch.cuda_missing(torch.device("cuda", 1)) == REFUSED


def test_a_compiled_function_knows_the_reason_as_a_constant(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the compiler asks as well

    def function(x):
        return x + 1 if _dispatch._failed_self_test(1) is None else x - 1

    torch._dynamo.reset()
    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(())).item() == -1
    assert gpus == [1]


def test_a_differentiable_bias_goes_to_the_reference():
    bias = torch.zeros(4, requires_grad=True)
    ops.expert_cross_entropy(LOGITS, TARGET, bias=bias).backward()
    assert bias.grad is not None
    with pytest.raises(RuntimeError) as caught:
        ops.expert_cross_entropy(LOGITS, TARGET, bias=bias, backend="cpu")
    assert str(caught.value) == (
        "expert_cross_entropy: backend 'cpu' cannot run: "
        "the bias requires a gradient, which only the reference computes"
    )
    with torch.no_grad():
        assert torch.isfinite(ops.expert_cross_entropy(LOGITS, TARGET, bias=bias, backend="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", LOSSES)
def test_gpu_kernels_refuse_float64(name, backend):
    with torch.device("cuda"):
        logits, target = torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
        with pytest.raises(RuntimeError) as caught:
            LOSSES[name](logits, target, backend=backend)
    assert str(caught.value) == f"{name}: backend {backend!r} cannot run: it has no float64 kernels"


def test_vmap_goes_to_the_reference():
    logits = torch.randn(5, 2, 3, 4)
    losses = torch.func.vmap(lambda z: ops.expert_cross_entropy(z, TARGET))(logits)
    torch.testing.assert_close(losses, torch.stack([ops.expert_cross_entropy(z, TARGET) for z in logits]))


@pytest.fixture
def run_without_native(programs):
    """Runs code in a process whose compiled library cannot be imported."""
    blocked = "import sys; sys.modules['shike_fast._native'] = None; "
    return lambda code: programs.run([sys.executable, "-c", blocked + code])


def test_without_the_compiled_library_the_reference_runs(run_without_native):
    done = run_without_native(
        "import torch; from shike_fast import ops; z, y = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64);"
        "print(ops.dkt_loss(z, y).item() > 0, ops.backends()['cpu'], ops.backend_reasons()['cpu']);"
        "ops.dkt_loss(z, y + 4)"
    )
    first, *_, last = (done.stdout + done.stderr).strip().splitlines()
    assert first.startswith("True False the compiled library is missing: ")
    assert last == "IndexError: dkt_loss: target must lie in 0..3 (C=4), got 4"
