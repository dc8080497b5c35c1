"""The kernels of the expert losses against the float64 reference: a sweep over shapes, values, layouts and options."""

import functools

import pytest
import torch
from expert_logits import LAYOUTS, TOLERANCE, lay_out, logits_and_target, sweep
from hypothesis import strategies as st

from shike_fast import ops
from shike_fast.ops import dkt_loss, expert_cross_entropy


def run(loss_function, logits, target, layout):
    leaf, gradient_of = lay_out(logits, layout)
    result = loss_function(leaf, target)
    loss, terms = result if isinstance(result, tuple) else (result, None)
    loss.backward()
    return loss.detach(), terms, gradient_of()


def check(loss_function, kernels, logits, target, layout, weight):
    """Compare a loss, called with (logits, target, backend=...), with the reference in float64 on the CPU.

    ``weight`` bounds how strongly the loss takes up an error in one log-probability.
    """
    backend, device = kernels
    if device.type == "cuda" and logits.dtype == torch.float64:
        logits = logits.float()
    wide_loss, wide_terms, wide = run(
        functools.partial(loss_function, backend="reference"), logits.double(), target, "contiguous"
    )
    mine = functools.partial(loss_function, backend=backend)
    loss, terms, gradient = run(mine, logits.to(device), target.to(device), layout)
    again_loss, _, again = run(mine, logits.to(device), target.to(device), layout)
    assert torch.equal(loss, again_loss) and torch.equal(gradient, again)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape

    assert torch.isfinite(wide_loss) and torch.isfinite(loss) and torch.isfinite(gradient).all()
    # A log-probability carries the rounding of its logits, eps · max |z|; the divergences multiply it by their weights.
    eps, batch = torch.finfo(loss.dtype).eps, target.numel()
    largest_logit = logits.double().abs().max().item() if batch > 0 else 0.0
    rounding = 8 * eps * (largest_logit + 30) * weight
    assert abs(loss.item() - wide_loss.item()) <= 2e-6 * abs(wide_loss.item()) + rounding * max(batch, 1)
    if terms is not None:
        error = (terms.cpu().double() - wide_terms.double()).abs().max().item()
        assert error <= 4e-6 * wide_terms.abs().max().item() + 4 * rounding * max(batch, 1)
    if batch > 0:
        info = torch.finfo(gradient.dtype)
        error = (gradient.cpu().double() - wide).abs().max().item()
        assert error <= TOLERANCE[logits.dtype] * wide.abs().max().item() + rounding + info.smallest_normal * info.eps


def compare_dkt(kernels, case, layout, kl_reduction, detach_teacher, weights, target_logits):
    logits, target = case
    options = {
        "kl_reduction": kl_reduction,
        "detach_teacher": detach_teacher,
        "hardest_weight": weights[0],
        "mutual_weight": weights[1],
        "teacher_target_logit": target_logits[0],
        "student_target_logit": target_logits[1],
        "return_terms": True,
    }
    batch = max(target.numel(), 1)
    divisor = batch * (logits.shape[2] if kl_reduction == "mean" else 1)
    weight = sum(weights) * 2 * logits.shape[0] / divisor + 1 / batch
    check(functools.partial(dkt_loss, **options), kernels, logits, target, layout, weight)


def test_dkt_loss(kernels):
    sweep(
        compare_dkt,
        kernels,
        count=250,
        case=logits_and_target(),
        layout=LAYOUTS,
        kl_reduction=st.sampled_from(["mean", "batchmean"]),
        detach_teacher=st.booleans(),
        weights=st.sampled_from([(10.0, 1.0), (0.0, 1.0), (10.0, 0.0), (0.0, 0.0), (0.5, 3.0)]),
        target_logits=st.sampled_from([(0.0, -30.0), (-4.5, 2.0), (40.0, 0.0)]),
    )


def compare_cross_entropy(kernels, case, layout, label_smoothing, bias_kind):
    logits, target = case
    experts, _, classes = logits.shape
    bias = None
    if bias_kind != "none":
        generator = torch.Generator().manual_seed(classes)
        shape = (experts, classes) if bias_kind == "per expert" else (classes,)
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
        if bias_kind == "masking":
            label_smoothing = 0.0  # with a masked class the smoothed loss is infinite
            masked = torch.rand(classes, generator=generator) < 0.5
            bias[masked & (torch.bincount(target, minlength=classes) == 0)] = -torch.inf

    def loss(z, y, backend):
        first = z if isinstance(z, torch.Tensor) else z[0]
        mine = None if bias is None else bias.to(first.device, first.dtype).double()  # the same values for everyone
        if mine is not None and first.dtype != torch.float64:
            mine = mine.float()
        return expert_cross_entropy(z, y, bias=mine, label_smoothing=label_smoothing, backend=backend)

    if bias is not None:
        bias = bias.to(logits.dtype).double()
    check(loss, kernels, logits, target, layout, weight=2 * experts / max(target.numel(), 1))


def test_expert_cross_entropy(kernels):
    sweep(
        compare_cross_entropy,
        kernels,
        count=100,
        case=logits_and_target(),
        layout=LAYOUTS,
        label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
        bias_kind=st.sampled_from(["none", "shared", "per expert", "masking"]),
    )


def compare_balanced_softmax(kernels, case, layout):
    logits, target = case
    counts = torch.logspace(3, 0, logits.shape[2]).long() + torch.bincount(target, minlength=logits.shape[2])

    def loss(z, y, backend):
        return ops.balanced_softmax_loss(z, y, counts.to(y.device), backend=backend)

    check(loss, kernels, logits, target, layout, weight=2 * logits.shape[0] / max(target.numel(), 1))


def test_balanced_softmax_loss(kernels):
    sweep(compare_balanced_softmax, kernels, count=40, case=logits_and_target(), layout=LAYOUTS)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["target", "hardest", "another", "everywhere"])
def test_a_logit_that_is_not_finite_makes_the_loss_nan(kernels, place, poison):
    backend, device = kernels
    logits = torch.randn(3, 5, 37)
    logits[:, :, 7] += 9.0
    classes = {"target": [3], "hardest": [7], "another": [30], "everywhere": list(range(37))}[place]
    logits[1, 2, classes] = poison
    target = torch.full((5,), 3)
    for loss in (dkt_loss, expert_cross_entropy):
        assert not torch.isfinite(loss(logits.to(device), target.to(device), backend=backend)), loss.__name__


def test_minus_infinity_masks_a_class_of_the_cross_entropy(kernels):
    backend, device = kernels
    logits, target = torch.randn(2, 4, 21), torch.tensor([0, 1, 20, 1])
    logits[:, :, 5:9] = -torch.inf
    leaf = logits.to(device).requires_grad_()
    loss = expert_cross_entropy(leaf, target.to(device), backend=backend)
    loss.backward()
    expected = expert_cross_entropy(logits, target, backend="reference")
    torch.testing.assert_close(loss.detach().cpu(), expected)
    assert (leaf.grad[:, :, 5:9] == 0).all() and torch.isfinite(leaf.grad).all()
    masked_target = torch.tensor([0, 6, 20, 1], device=device)
    assert expert_cross_entropy(logits.to(device), masked_target, backend=backend).item() == torch.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e8])  # gradients that are subnormal in float16, and that overflow there
def test_low_precision_is_widened_and_rounded_exactly(kernels, dtype, scale):
    """The same kernel on the same values in float32 gives the gradient whose rounding is expected, bit for bit."""
    backend, device = kernels
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.abs() <= 100][::3].reshape(1, 1, -1)  # subnormals of both signs too
    target = torch.zeros(1, dtype=torch.int64, device=device)
    gradients = []
    for logits in (every, every.float()):
        leaf = logits.to(device).requires_grad_()
        loss = scale * expert_cross_entropy(leaf, target, backend=backend)
        torch.autograd.grad(loss, leaf, retain_graph=True)  # perhaps of a kernel that only float32 has
        gradients.append(torch.autograd.grad(loss, leaf)[0].cpu())
    assert torch.equal(gradients[0], gradients[1].to(dtype))


@pytest.mark.parametrize(("dtype", "digits"), [(torch.float16, 11), (torch.bfloat16, 8)])
def test_the_gradient_is_rounded_to_even(kernels, dtype, digits):
    backend, device = kernels
    target = torch.zeros(1, dtype=torch.int64, device=device)
    for odd in (1, 3, 5, 7):
        halfway = 1 + odd * 2.0**-digits  # between two numbers of the dtype; both probabilities are exactly 1/2
        logits = torch.zeros(1, 1, 2, dtype=dtype, device=device, requires_grad=True)
        loss = 2 * halfway * expert_cross_entropy(logits, target, backend=backend)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.equal(gradient.cpu().flatten(), torch.tensor([-halfway, halfway]).to(dtype))


def test_a_rounded_mean_at_the_hardest_negative_cancels(kernels):
    """Where it dominates, teacher and students agree on it; the mean's rounding is 2e-4 here, and must not show."""
    backend, device = kernels
    logits = torch.zeros(3, 1, 40, device=device)
    logits[:, 0, 7] = torch.tensor([9999.3, 9999.7, 10000.1])
    target = torch.zeros(1, dtype=torch.int64, device=device)
    _, terms = dkt_loss(
        logits, target, hardest_weight=1.0, kl_reduction="batchmean", return_terms=True, backend=backend
    )
    assert abs(terms[1].item()) < 1e-6


# What the teacher weighs follows from the students' exponentials, unless they lose it. It is lost where the largest
# logit is so far above all that the teacher has that its weights are no normal numbers: 55 and more, by the code.
FAR = (30.0, 54.0, 60.0, 100.0, 1000.0)


def logits_apart(kind, distance, classes):
    logits = torch.randn(3, 5, classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64)
    if kind == "experts":  # each expert on its own level
        logits += distance * torch.arange(3, dtype=torch.float64).reshape(3, 1, 1)
    elif kind == "a torn class":  # the hardest negative by a little, where the teacher is the mean of the experts
        logits[:, :, classes // 2] += torch.tensor([distance, -distance / 2, -distance / 2 + 6]).reshape(3, 1)
    else:  # a class above all others, for all experts
        logits[:, :, classes // 2] += distance
    return logits


@pytest.mark.parametrize("distance", FAR)
@pytest.mark.parametrize("kind", ["experts", "a torn class", "a class above"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_apart(kernels, kind, distance, dtype):
    backend, device = kernels
    if device.type == "cuda" and dtype == torch.float64:
        pytest.skip("no float64 kernels")
    for classes in (2, 37, 700):
        logits, target = logits_apart(kind, distance, classes).to(dtype), torch.zeros(5, dtype=torch.int64)
        for teacher_target_logit in (0.0, -200.0, 200.0):
            options = {"teacher_target_logit": teacher_target_logit, "kl_reduction": "batchmean", "return_terms": True}
            loss = functools.partial(dkt_loss, **options)
            wide_loss, wide_terms, wide = run(
                functools.partial(loss, backend="reference"), logits.double(), target, "contiguous"
            )
            mine = functools.partial(loss, backend=backend)
            value, terms, gradient = run(mine, logits.to(device), target.to(device), "contiguous")
            tolerance = 1e-12 if dtype == torch.float64 else 3e-5
            # Of the differences of logits that the divergence adds, in thousands.
            rounding = 12 * torch.finfo(dtype).eps * distance if distance > 60 else 0.0
            assert abs(value.item() - wide_loss.item()) <= tolerance * abs(wide_loss.item()) + rounding
            if dtype == torch.float32:
                assert (terms.cpu() - wide_terms).abs().max() <= tolerance * wide_terms.abs().max() + rounding
            assert (gradient.cpu().double() - wide).abs().max() <= tolerance * wide.abs().max() + rounding


@pytest.mark.parametrize("loss", ["dkt", "cross-entropy"])
@pytest.mark.parametrize("shape", [(3, 20, 37), (3, 18, 3000), (8, 3, 9000)])  # of the last no exponential is kept
def test_forward_and_backward_at_once_give_what_each_gives(kernels, loss, shape):
    backend, device = kernels
    _, batch, classes = shape
    logits = 4 * torch.randn(shape, device=device)
    target = torch.randint(classes, (batch,), device=device)

    def function(z):
        if loss == "dkt":
            return dkt_loss(z, target, kl_reduction="batchmean", backend=backend)
        return expert_cross_entropy(z, target, label_smoothing=0.1, backend=backend)

    leaf = logits.clone().requires_grad_()
    at_once = function(leaf)
    (gradient,) = torch.autograd.grad(at_once, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(at_once, leaf)  # by the backward's own kernel
    assert torch.equal(at_once.detach(), function(logits))  # by the forward's own kernel
    torch.testing.assert_close(gradient, again, rtol=2e-6, atol=1e-6 * gradient.abs().max().item())
