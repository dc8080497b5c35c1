"""The Triton kernels of the generalised expert loss compile ahead of time, without spilling registers.

No GPU is needed: the launches of the operators are recorded and compiled, specialised as Triton would do it.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which is not installed")

from shike_fast.kernels.losses.expert import _backward_kernel, _end_kernel, _forward_kernel
from shike_fast.ops import ExpertKL, _dispatch, expert_kl, expert_loss

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets its kernels in this process"
)
KERNELS = [_forward_kernel, _end_kernel, _backward_kernel]
MOST = {1: 64, 3: 96, 4: 128}  # registers of a thread of the kernels that stream classes


@pytest.fixture
def record(monkeypatch, launches):
    """``record(logits, name)``: the launches of a call, forward and backward."""
    monkeypatch.setattr(_dispatch, "_INTERPRETED", True)  # the operators take tensors of the CPU

    def launched(logits, name):
        launches.clear()
        CALLS[name](logits.requires_grad_(), *logits.shape).sum().backward()
        assert [launch[0] for launch in launches] == KERNELS
        return list(launches)

    return launched


def _labels(batch):
    return torch.zeros(batch, dtype=torch.int64)


def _plain(z, experts, batch, classes):
    return expert_loss(z, _labels(batch), backend="triton")


def _full(z, experts, batch, classes):
    vector, of_experts = torch.ones(classes), torch.ones(experts, classes)
    return expert_loss(
        *(z, _labels(batch)),
        **{"bias": of_experts, "scale": of_experts, "margin": vector, "label_smoothing": 0.1, "class_weight": vector},
        **{"target_b": _labels(batch), "lam": torch.ones(batch), "reduction": "none", "backend": "triton"},
    )


def _masked(z, experts, batch, classes):
    mask = torch.ones(batch, classes, dtype=torch.bool)
    return expert_loss(
        z, _labels(batch), class_mask=mask, scale=2.0, kl=ExpertKL(gate="teacher_correct"), backend="triton"
    )


def _others(z, experts, batch, classes):
    kl = ExpertKL(weight=torch.ones(experts, batch), weight_of="student", temperature=2.0, adjusted=False)
    return expert_loss(z, _labels(batch), bias=torch.ones(classes), kl=kl, backend="triton")


def _mean(z, experts, batch, classes):
    return expert_loss(z, _labels(batch), kl=ExpertKL("mean", temperature=torch.ones(classes)), backend="triton")


def _view(z, experts, batch, classes):
    return expert_loss(z, _labels(batch), bias=torch.ones(classes), kl=ExpertKL("view"), backend="triton")


def _given(z, experts, batch, classes):
    return expert_kl(z, torch.zeros(batch, classes), temperature=2.0, backend="triton")


CALLS = {f.__name__.strip("_"): f for f in (_plain, _full, _masked, _others, _mean, _view, _given)}
SHAPES = [
    (3, 8142, torch.bfloat16),
    pytest.param(3, 8142, torch.float32, marks=pytest.mark.slow),
    pytest.param(4, 8142, torch.bfloat16, marks=pytest.mark.slow),
    pytest.param(1, 100, torch.float32, marks=pytest.mark.slow),
]
QUICK = ("masked", "view")


@pytest.mark.parametrize(("experts", "classes", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CALLS])
def test_compiles_without_spilling(name, experts, classes, dtype, target, record, compiled, registers):
    for kernel, args, kwargs in record(torch.zeros(experts, 8, classes, dtype=dtype), name):
        used, spilled = registers(compiled(kernel, args, kwargs, target))
        assert spilled == 0, (kernel.__name__, used, spilled)
        if kernel is not _end_kernel and target != "gfx942":
            assert used <= MOST[experts], (kernel.__name__, used)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_eight_experts_compile(name, record, compiled, registers):
    for kernel, args, kwargs in record(torch.zeros(8, 8, 1000, dtype=torch.bfloat16), name):
        used, spilled = registers(compiled(kernel, args, kwargs, "sm_90"))
        assert spilled == 0 or kernel is _end_kernel, (kernel.__name__, used, spilled)


def test_sizes_and_addresses_do_not_choose_a_kernel(record):
    """Beyond how many classes a lane takes: one kernel serves a training's last batch, and any distances in memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for name in CALLS:
        types = []
        for batch, classes, shift in ((8, 1024, 0), (2, 1008, 4), (64, 100, 0)):
            logits = torch.zeros(3 * batch * classes + shift)[shift:].view(3, batch, classes).detach()
            of_kernels = []
            for kernel, args, kwargs in record(logits, name):
                bind = create_function_from_signature(kernel.signature, kernel.params, backend)
                _, specialization, _ = bind(*args, debug=False, **kwargs)
                of_kernels.append([one for one in specialization if one[0] != "constexpr"])
            types.append(of_kernels)
        assert types[0] == types[1] == types[2], name


def test_unused_options_cost_nothing(record, compiled):
    """A call is compiled for what it asks for: the plain loss has less code than any other."""
    sizes = {}
    for name in ("plain", "full", "mean"):
        kernel, args, kwargs = record(torch.zeros(3, 8, 100), name)[0]
        sizes[name] = compiled(kernel, args, kwargs, "sm_90").asm["ptx"].count("\n")
    assert 1.3 * sizes["plain"] < min(sizes["full"], sizes["mean"]), sizes
