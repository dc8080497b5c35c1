"""The passes of the kernels of expert_loss and expert_kl: equal bits, edges of the values, and what they refuse."""

import functools

import pytest
import torch
from expert_logits import moved

from shike_fast.ops import ExpertKL, expert_kl, expert_loss

OP = "expert_loss"
LOGITS = 3 * torch.randn(3, 14, 37, generator=torch.Generator().manual_seed(3))
TARGET = torch.arange(14) * 5 % 37
SECOND = torch.where(torch.arange(14) % 3 == 0, TARGET, (TARGET + 4) % 37)
RAMP = torch.linspace(0, 3, 37)
ONE_PASS = {
    "cross-entropy": {"label_smoothing": 0.1},
    "two labels": {"target_b": SECOND, "lam": 0.3, "margin": RAMP, "bias": RAMP.flip(0) / 2},
    "others": {"kl": ExpertKL()},
    "mean": {"kl": ExpertKL("mean", temperature=2.0, weight=-0.3)},
    "view": {"kl": ExpertKL("view", gate="teacher_correct", reduction="gated_mean"), "reduction": "mean/K"},
    "given": {"kl": ExpertKL(LOGITS.flip(1)), "class_weight": RAMP, "reduction": "weighted_mean"},
    "rows": {"reduction": "none", "sample_weight": RAMP[:14]},
}


def leaf_on(device, dtype=torch.float32, logits=LOGITS):
    return logits.to(device, dtype, copy=True).requires_grad_()


@pytest.fixture(params=ONE_PASS)
def one_pass(request, kernels):
    """A loss of logits by a backend, and its device."""
    backend, device = kernels
    keywords = {name: moved(value, device, torch.float32) for name, value in ONE_PASS[request.param].items()}
    return functools.partial(expert_loss, target=TARGET.to(device), **keywords, backend=backend), device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_forward_and_backward_at_once_give_what_each_gives(one_pass, dtype):
    function, device = one_pass
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("no float64 kernels")
    leaf = leaf_on(device, dtype)
    at_once = function(leaf)
    grad_output = torch.ones_like(at_once)
    (gradient,) = torch.autograd.grad(at_once, leaf, grad_output, retain_graph=True)
    (again,) = torch.autograd.grad(at_once, leaf, grad_output, retain_graph=True)  # by the backward's own kernel
    with torch.no_grad():
        assert torch.equal(at_once, function(leaf))  # by the forward's own kernel
    if device.type == "cpu":
        assert torch.equal(gradient, again)
    torch.testing.assert_close(gradient, again, rtol=2e-6, atol=1e-6 * gradient.abs().max().item())
    (twice,) = torch.autograd.grad(at_once, leaf, 2 * grad_output)
    assert torch.equal(twice, 2 * again)


@pytest.mark.parametrize("case", [name for name in ONE_PASS if name not in ("two labels", "view")])
def test_any_number_of_threads_gives_the_same_bits(case):
    large = LOGITS.repeat(1, 20, 8)[:, :, :257].contiguous()  # enough for several threads
    keywords = {name: value for name, value in ONE_PASS[case].items() if not torch.is_tensor(value)}
    if case == "given":
        keywords["kl"] = ExpertKL(large.flip(1))
    target = torch.arange(large.shape[1]) % 257
    before, results = torch.get_num_threads(), {torch.float32: [], torch.bfloat16: []}
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for dtype, found in results.items():  # forward and backward at once, and one after the other
                leaf = leaf_on("cpu", dtype, large)
                loss = expert_loss(leaf, target, **keywords, backend="cpu")
                found.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
    finally:
        torch.set_num_threads(before)
    for first, *others in results.values():
        assert all(torch.equal(loss, first[0]) and torch.equal(gradient, first[1]) for loss, gradient in others)


def test_an_incoming_gradient_of_rows(kernels):
    backend, device = kernels
    target, grad_output = TARGET.to(device), torch.randn(14, 3, device=device).mT  # [K, B], strided
    gradients = []
    for name in (backend, "reference"):
        leaf = leaf_on(device)
        rows = expert_loss(leaf, target, reduction="none", margin=RAMP.to(device), backend=name)
        assert rows.shape == (3, 14)
        gradients.append(torch.autograd.grad(rows, leaf, grad_output, retain_graph=True)[0])
        (of_one,) = torch.autograd.grad(rows[1, 2], leaf)
        assert (of_one[1, 2] != 0).any()
        of_one[1, 2] = 0
        assert (of_one == 0).all()
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=2e-6)


# ---- values


def test_minus_infinity_takes_a_class_out(kernels):
    backend, device = kernels
    target = (TARGET % 20).to(device)
    logits, bias = LOGITS.to(device), torch.zeros(37, device=device)
    bias[20:] = -torch.inf
    expected = expert_loss(logits[:, :, :20], target, backend="reference")
    for given, options in ((logits, {"bias": bias}), (logits + bias, {})):
        leaf = leaf_on(device, logits=given)
        loss, rows = expert_loss(leaf, target, **options, return_rows=True, backend=backend)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=2e-6, atol=0)
        assert (leaf.grad[:, :, 20:] == 0).all() and torch.isfinite(leaf.grad).all()
        torch.testing.assert_close(rows.log_sum_exp, logits[:, :, :20].logsumexp(2))
    outside = torch.full_like(target, 25)
    assert expert_loss(logits, outside, bias=bias, backend=backend) == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_of_ten_thousand(kernels, dtype):
    backend, device = kernels
    logits = torch.tensor([[[1e4, -1e4, 0.0]], [[-1e4, 1e4, 0.0]]], dtype=dtype)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for kl in (None, ExpertKL(), ExpertKL("mean"), ExpertKL(temperature=0.5)):
        results = []
        for name in (backend, "reference"):
            leaf = leaf_on(device, dtype, logits)
            loss = expert_loss(leaf, target, kl=kl, backend=name)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        assert torch.isfinite(results[0][0]) and torch.isfinite(results[0][1]).all()
        torch.testing.assert_close(*results, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("teacher", [None, "others", "mean"])
def test_rows_whose_classes_are_all_labels(kernels, classes, teacher):
    """With two labels no other class is left: of two classes, or of five of which a mask leaves two."""
    backend, device = kernels
    target = torch.arange(14, device=device) % 2
    options = {"target_b": 1 - target, "lam": 0.3, "margin": torch.linspace(0, 1, classes, device=device)}
    if teacher is not None:
        options["kl"] = ExpertKL(teacher)
    if classes > 2:
        mask = torch.zeros(14, classes, dtype=torch.bool, device=device)
        mask[:, :2] = True
        options |= {"class_mask": mask, "masked": "exclude"}
    else:
        options["label_smoothing"] = 0.2
    results = []
    for name in (backend, "reference"):
        leaf = leaf_on(device, logits=LOGITS[:, :, :classes])
        loss, terms = expert_loss(leaf, target, **options, return_terms=True, backend=name)
        results.append((loss.detach(), terms, *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lowest_class(kernels):
    backend, device = kernels
    logits = torch.tensor([[2.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 2.0, 2.0], [0.0, 0.0, 0.0]], device=device)[None]
    target = torch.tensor([0, 1, 1, 2], device=device)
    for options in ({}, {"target_b": torch.tensor([1, 0, 2, 0], device=device), "lam": 0.5}):
        _, rows = expert_loss(logits, target, **options, return_rows=True, backend=backend)
        assert rows.correct.tolist() == [[True, False, True, False]]


# ---- what the kernels refuse


def test_all_pairs_of_more_than_eight_experts_go_to_the_reference(kernels):
    backend, device = kernels
    logits, target = torch.randn(9, 14, 37, device=device), TARGET.to(device)
    calls = {
        "expert_kl": lambda **options: expert_kl(logits, **options),
        "expert_loss": lambda **options: expert_loss(logits, target, kl=ExpertKL(), **options),
    }
    for name, call in calls.items():
        assert torch.equal(call(), call(backend="reference"))
        with pytest.raises(RuntimeError) as caught:
            call(backend=backend)
        reason = "more than 8 experts with a divergence between them are a matter of the reference"
        assert str(caught.value) == f"{name}: backend {backend!r} cannot run: {reason}"


def wanted(*shape):
    return torch.ones(shape, requires_grad=True)


MASK = torch.ones(14, 37, dtype=torch.bool)
OF_THE_REFERENCE = "are a matter of the reference"
GRADIENT = "requires a gradient, which only the reference computes"
LABELS_OF_EXPERTS = "a divergence with a target an expert is a matter of the reference"
REFUSED = {
    "soft target": ({"soft_target": torch.full((14, 37), 1 / 37)}, f"soft targets {OF_THE_REFERENCE}"),
    "target an expert": ({"target": TARGET.expand(3, 14), "kl": ExpertKL()}, LABELS_OF_EXPERTS),
    "other target an expert": ({"target_b": TARGET.expand(3, 14), "lam": 0.5, "kl": ExpertKL()}, LABELS_OF_EXPERTS),
    "gradient through the mean": (
        {"kl": ExpertKL("mean", detach=False)},
        "a gradient through this teacher is a matter of the reference",
    ),
    "eps of the mean": (
        {"kl": ExpertKL("mean", eps=1e-9)},
        f"eps and masked='partial' with this teacher {OF_THE_REFERENCE}",
    ),
    "part of given logits": (
        {"kl": ExpertKL(LOGITS), "class_mask": MASK, "masked": "partial"},
        f"eps and masked='partial' with this teacher {OF_THE_REFERENCE}",
    ),
    "eps by student": (
        {"kl": ExpertKL(eps=1e-9, weight=torch.ones(3, 14), weight_of="student")},
        f"eps and masked='partial' with this teacher {OF_THE_REFERENCE}",
    ),
    "smoothing and a mask": (
        {"label_smoothing": 0.1, "class_mask": MASK},
        "label smoothing with a class mask is a matter of the reference",
    ),
    "bias": ({"bias": wanted(37)}, f"bias {GRADIENT}"),
    "scale": ({"scale": wanted(3, 37)}, f"scale {GRADIENT}"),
    "margin": ({"margin": wanted(37)}, f"margin {GRADIENT}"),
    "class_weight": ({"class_weight": wanted(37)}, f"class_weight {GRADIENT}"),
    "sample_weight": ({"sample_weight": wanted(14)}, f"sample_weight {GRADIENT}"),
    "expert_weight": ({"expert_weight": wanted(3)}, f"expert_weight {GRADIENT}"),
    "lam": ({"target_b": SECOND, "lam": wanted()}, f"lam {GRADIENT}"),
    "temperature": ({"kl": ExpertKL(temperature=wanted(37))}, f"temperature {GRADIENT}"),
    "weight": ({"kl": ExpertKL(weight=wanted(14))}, f"kl_weight {GRADIENT}"),
    "gate": ({"kl": ExpertKL(gate=wanted(14))}, f"gate {GRADIENT}"),
    "teacher": ({"kl": ExpertKL(wanted(14, 37), detach=False)}, f"teacher {GRADIENT}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_refuse_goes_to_the_reference(case):
    options, reason = {"target": TARGET} | REFUSED[case][0], REFUSED[case][1]
    with pytest.raises(RuntimeError) as caught:
        expert_loss(LOGITS, **options, backend="cpu")
    assert str(caught.value) == f"expert_loss: backend 'cpu' cannot run: {reason}"
    assert torch.equal(expert_loss(LOGITS, **options), expert_loss(LOGITS, **options, backend="reference"))
    if reason.endswith(GRADIENT) and case != "teacher":  # as a constant they are taken
        with torch.no_grad():
            assert torch.isfinite(expert_loss(LOGITS, **options, backend="cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("options", [{"eps": 1e-9}, {"class_mask": MASK, "masked": "partial"}])
def test_what_only_the_cpu_takes(backend, options):
    options = {name: moved(value, "cuda", torch.float32) for name, value in options.items()}
    with pytest.raises(RuntimeError) as caught:
        expert_kl(LOGITS.cuda(), **options, backend=backend)
    reason = "eps and masked='partial' are matters of the CPU backend and the reference"
    assert str(caught.value) == f"expert_kl: backend {backend!r} cannot run: {reason}"


def test_a_given_teacher_that_requires_a_gradient_is_a_constant(kernels):
    backend, device = kernels
    teacher, leaf = leaf_on(device, logits=LOGITS.flip(1)), leaf_on(device)
    expert_kl(leaf, teacher, backend=backend).backward()
    assert teacher.grad is None and leaf.grad is not None


# ---- targets out of range


def test_a_target_out_of_range():
    for name, options in (("target", {"target": TARGET + 30}), ("target_b", {"target_b": TARGET + 30, "lam": 0.5})):
        with pytest.raises(IndexError) as caught:
            expert_loss(LOGITS, **{"target": TARGET} | options)
        assert str(caught.value) == f"expert_loss: {name} must lie in 0..36 (C=37), got {30 + TARGET.max()}"


@pytest.mark.parametrize("options", [{}, {"kl": ExpertKL()}, {"class_weight": RAMP, "margin": RAMP}])
def test_a_target_out_of_range_in_a_compiled_graph_harms_nothing_else(options):
    torch._dynamo.reset()
    target = TARGET.clone()
    target[5:7] = torch.tensor([-100, 2**40])
    compiled = torch.compile(
        lambda z, y: expert_loss(z, y, **options, backend="cpu"), fullgraph=True, backend="aot_eager"
    )
    leaf = leaf_on("cpu")
    (gradient,) = torch.autograd.grad(compiled(leaf, target), leaf)
    others = [*range(5), *range(7, 14)]
    assert torch.isfinite(gradient[:, others]).all() and (gradient[:, others] != 0).any()
