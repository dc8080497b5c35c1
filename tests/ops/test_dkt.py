"""dkt_loss against the golden data and against the closed-form gradients of the method."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shike_fast.ops import dkt_loss

OP = "dkt_loss"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Both sides see the same logits. Everything is computed in float32 (float64); a low-precision gradient is rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def softmax_and_log(x):
    shifted = x - x.max(-1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.exp(log), log


def closed_form(
    z,
    target,
    hardest_weight=10.0,
    mutual_weight=1.0,
    kl_reduction="mean",
    teacher_target_logit=0.0,
    student_target_logit=-30.0,
    detach_teacher=False,
):
    """Terms [3] and gradient [K, B, C], sample by sample in float64, without automatic differentiation."""
    experts, batch, classes = z.shape
    divisor = batch * classes if kl_reduction == "mean" else batch
    terms, gradient = np.zeros(3), np.zeros_like(z)
    for b, y in enumerate(target):
        x, g = z[:, b], gradient[:, b]
        p, log_p = softmax_and_log(x)
        one_hot = np.eye(classes)[y]
        terms[0] -= log_p[:, y].sum() / batch
        g += (p - one_hot) / batch

        w = hardest_weight / divisor
        total = x.sum(0)
        total[y] = -np.inf
        h = int(np.argmax(total))
        winner = x.argmax(0)
        r = x.max(0)
        r[h] = x[:, h].mean()
        r[y] = teacher_target_logit
        q, log_q = softmax_and_log(r)
        s, log_s = softmax_and_log(np.where(one_hot == 1, student_target_logit, x))
        divergence = (q * (log_q - log_s)).sum(1, keepdims=True)
        terms[1] += w * divergence.sum()
        g += w * (s - q) * (1 - one_hot)
        if not detach_teacher:
            dr = w * (q * (log_q - log_s - divergence)).sum(0)
            for c in range(classes):
                if c == h:
                    g[:, c] += dr[c] / experts
                elif c != y:
                    g[winner[c], c] += dr[c]

        v = mutual_weight / divisor
        for i, j in itertools.permutations(range(experts), 2):
            divergence = (p[j] * (log_p[j] - log_p[i])).sum()
            terms[2] += v * divergence
            g[i] += v * (p[i] - p[j])
            if not detach_teacher:
                g[j] += v * p[j] * (log_p[j] - log_p[i] - divergence)
    return terms, gradient


def loss_and_gradient(logits, target, **options):
    leaf = logits.detach().clone().requires_grad_()
    loss = dkt_loss(leaf, target, **options)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(golden_case, dtype, backend, device, assert_golden):
    logits, target = golden_case.logits.to(device, dtype), golden_case.target.to(device)
    loss, gradient = loss_and_gradient(logits, target, backend=backend)
    assert_golden(loss, gradient, golden_case.stage1_loss, golden_case.stage1_grad)


OPTIONS = [
    {},
    {"kl_reduction": "batchmean"},
    {"detach_teacher": True},
    {"detach_teacher": True, "kl_reduction": "batchmean"},
    {"hardest_weight": 0.0},
    {"mutual_weight": 0.0},
    {"hardest_weight": 3, "mutual_weight": 0.25},
    {"teacher_target_logit": -4.5, "student_target_logit": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_closed_form(options, backend, device, widest):
    logits = 3 * torch.randn(4, 6, 11, dtype=widest, device=device)
    target = torch.randint(11, (6,), device=device)
    terms, gradient = closed_form(logits.double().cpu().numpy(), target.tolist(), **options)
    actual_loss, actual_gradient = loss_and_gradient(logits, target, backend=backend, **options)
    assert actual_loss.item() == pytest.approx(terms.sum(), rel=TOLERANCE[widest])
    error = np.abs(actual_gradient.cpu().numpy() - gradient).max()
    assert error <= TOLERANCE[widest] * np.abs(gradient).max()


@st.composite
def cases(draw):
    experts, batch, classes = draw(st.integers(1, 8)), draw(st.integers(0, 6)), draw(st.integers(2, 41))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "equal", "dominated"]))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logits = torch.randn(experts, batch, classes, generator=generator, dtype=torch.float64)
    if kind == "ties":  # few values, exact in every dtype and in every sum
        logits, scale = logits.round(), min(scale, 16.0)
    elif kind == "equal":
        logits = torch.ones_like(logits)
    elif kind == "dominated" and batch > 0:
        logits[:, :, draw(st.integers(0, classes - 1))] += 8.0
    logits = (logits * scale).clamp(-1e4, 1e4).to(draw(st.sampled_from(DTYPES)))
    target = torch.randint(classes, (batch,), generator=generator)
    options = {
        "kl_reduction": draw(st.sampled_from(["mean", "batchmean"])),
        "detach_teacher": draw(st.booleans()),
        "hardest_weight": draw(st.sampled_from([0.0, 10.0])),
        "mutual_weight": draw(st.sampled_from([0.0, 1.0])),
    }
    return logits, target, draw(st.sampled_from(["contiguous", "transposed", "sequence", "strided"])), options


def lay_out(logits, layout):
    """The same values as leaves in another layout; and the gradient of those leaves as one [K, B, C] tensor."""
    if layout == "sequence":
        leaves = [expert.clone().requires_grad_() for expert in logits]
        return leaves, lambda: torch.stack([leaf.grad for leaf in leaves])
    if layout == "transposed":  # [B, C, K] in memory
        leaf = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    elif layout == "strided":
        leaf = logits.repeat_interleave(2, 2)[:, :, ::2].requires_grad_()
    else:
        leaf = logits.clone().requires_grad_()
    return leaf, lambda: leaf.grad


@settings(max_examples=150)
@given(cases())
def test_properties(case):
    logits, target, layout, options = case
    argument, gradient_of = lay_out(logits, layout)
    loss = dkt_loss(argument, target, **options)
    loss.backward()
    gradient = gradient_of()
    wide = logits.double().numpy()
    expected_terms, expected = closed_form(wide, target.tolist(), **options)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    # A log-probability carries the rounding of its logits, eps · max |z|; the divergences multiply it by their weights.
    eps = torch.finfo(loss.dtype).eps
    batch, classes = target.numel(), logits.shape[2]
    divisor = max(batch * (classes if options["kl_reduction"] == "mean" else 1), 1)
    weight = (options["hardest_weight"] + options["mutual_weight"]) * 2 * logits.shape[0] / divisor + 1 / max(batch, 1)
    rounding = 8 * eps * (np.abs(wide).max(initial=0.0) + 30) * weight
    assert abs(loss.item() - expected_terms.sum()) <= 2e-6 * abs(expected_terms.sum()) + rounding * max(batch, 1)
    largest = np.abs(expected).max(initial=0.0)
    smallest_subnormal = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps
    error = np.abs(gradient.double().numpy() - expected).max(initial=0.0)
    assert error <= TOLERANCE[logits.dtype] * largest + rounding + smallest_subnormal


def test_tied_maximum_gives_its_gradient_to_the_lowest_expert():
    logits = torch.tensor([[[0.0, 1.0, 5.0, -1.0]]] * 3, dtype=torch.float64)
    logits[0, 0, 1] = 0.5  # experts 1 and 2 tie at class 1, all tie at class 3; class 2 is the hardest
    options = {"mutual_weight": 0.0, "kl_reduction": "batchmean"}
    _, attached = loss_and_gradient(logits, torch.tensor([0]), **options)
    _, detached = loss_and_gradient(logits, torch.tensor([0]), detach_teacher=True, **options)
    through_teacher = (attached - detached)[:, 0]
    assert through_teacher[1, 1] != 0 and through_teacher[0, 1] == 0 and through_teacher[2, 1] == 0
    assert through_teacher[0, 3] != 0 and through_teacher[1, 3] == 0 and through_teacher[2, 3] == 0
    assert torch.equal(through_teacher[0, 2], through_teacher[1, 2]) and through_teacher[0, 2] != 0  # the mean, to all
    assert (through_teacher[:, 0] == 0).all()  # nothing flows to r[y]


def test_tied_hardest_negative_is_the_lowest_class():
    logits = torch.tensor([[[9.0, 1.0, 2.0]], [[9.0, 2.0, 1.0]]], dtype=torch.float64)  # both negatives sum to 3
    r = np.array([0.0, 1.5, 2.0])  # class 1 is averaged, class 2 keeps its maximum
    _, log_q = softmax_and_log(r)
    students = logits[:, 0].numpy().copy()
    students[:, 0] = -30.0
    _, log_s = softmax_and_log(students)
    expected = 10 * (np.exp(log_q) * (log_q - log_s)).sum()
    _, terms = dkt_loss(logits, torch.tensor([0]), kl_reduction="batchmean", return_terms=True)
    assert terms[1].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hardest_negative_is_chosen_from_unrounded_sums(dtype):
    # 256 + 1 is 256 in bfloat16 and 2048 + 1 is 2048 in float16: rounded sums would tie, and class 1 would be chosen.
    big = 256.0 if dtype == torch.bfloat16 else 2048.0
    logits = torch.tensor([[[0.0, big, big]], [[0.0, 0.5, 1.0]]], dtype=dtype)
    leaf = logits.clone().requires_grad_()
    _, terms = dkt_loss(leaf, torch.tensor([0]), return_terms=True)
    expected, _ = closed_form(logits.double().numpy(), [0])
    assert terms[1].item() == pytest.approx(expected[1], rel=1e-5)


def test_target_logit_only_moves_cross_entropy_and_mutual_term():
    logits, target = torch.randn(3, 5, 8, dtype=torch.float64), torch.randint(8, (5,))
    _, with_hardest = loss_and_gradient(logits, target, mutual_weight=0.0)
    _, cross_entropy = loss_and_gradient(logits, target, mutual_weight=0.0, hardest_weight=0.0)
    at_target = target.expand(3, 5).unsqueeze(2)
    difference = with_hardest - cross_entropy
    assert difference.gather(2, at_target).abs().max() == 0
    assert difference.abs().max() > 1e-3


def test_terms():
    logits, target = torch.randn(3, 5, 8, requires_grad=True), torch.randint(8, (5,))
    loss, terms = dkt_loss(logits, target, return_terms=True)
    assert terms.shape == (3,) and terms.dtype == torch.float32 and not terms.requires_grad
    assert terms.sum().item() == pytest.approx(loss.item(), rel=1e-6)
    assert (terms > 0).all()
    _, doubled = dkt_loss(logits, target, hardest_weight=20.0, mutual_weight=0.0, return_terms=True)
    torch.testing.assert_close(doubled, terms * torch.tensor([1.0, 2.0, 0.0]))
    wide_loss, wide_terms = dkt_loss(logits.double(), target, return_terms=True)
    assert wide_loss.dtype == torch.float64 and wide_terms.dtype == torch.float32


def test_kl_reductions_differ_by_the_number_of_classes():
    logits, target = torch.randn(3, 5, 8, dtype=torch.float64), torch.randint(8, (5,))
    _, mean = dkt_loss(logits, target, return_terms=True)
    _, batchmean = dkt_loss(logits, target, kl_reduction="batchmean", return_terms=True)
    torch.testing.assert_close(batchmean, mean * torch.tensor([1.0, 8.0, 8.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, device, backend):
    logits, target = (4 * torch.randn(3, 7, 9, device=device)).to(dtype), torch.randint(9, (7,), device=device)
    loss, gradient = loss_and_gradient(logits, target, backend=backend)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wide_loss, wide_gradient = loss_and_gradient(logits.to(wide), target, backend=backend)
    assert loss.dtype == wide and gradient.dtype == dtype
    torch.testing.assert_close(loss, wide_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, wide_gradient.to(dtype))


@pytest.mark.parametrize("layout", ["transposed", "strided", "sequence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layout_does_not_matter(layout, dtype):
    logits, target = torch.randn(3, 6, 10).to(dtype), torch.randint(10, (6,))
    loss, gradient = loss_and_gradient(logits, target)
    argument, gradient_of = lay_out(logits, layout)
    other = dkt_loss(argument, target.repeat_interleave(3)[::3])
    other.backward()
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_of(), gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, device, backend, widest):
    logits, target = 5 * torch.randn(3, 6, 10, device=device), torch.randint(10, (6,), device=device)
    for case in (logits, logits.to(widest), logits.to(dtype)):
        loss, gradient = loss_and_gradient(case, target, backend=backend)
        with torch.autocast(device.type, dtype=dtype):
            other, other_gradient = loss_and_gradient(case, target, backend=backend)
        assert torch.equal(loss, other) and torch.equal(gradient, other_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["target high", "target low", "alternating", "experts disagree"])
def test_finite_for_extreme_logits(dtype, pattern, device, backend):
    logits = torch.full((3, 2, 5), -1e4, dtype=torch.float64)
    if pattern == "target high":
        logits[:, :, 0] = 1e4
    elif pattern == "target low":
        logits[:, :, 1:] = 1e4
    elif pattern == "alternating":
        logits[:, :, ::2] = 1e4
    else:
        for k in range(3):
            logits[k, :, k + 1] = 1e4
    case, target = logits.to(device, dtype), torch.zeros(2, dtype=torch.int64, device=device)
    loss, gradient = loss_and_gradient(case, target, backend=backend)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    terms, _ = closed_form(case.double().cpu().numpy(), [0, 0])
    assert loss.item() == pytest.approx(terms.sum(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("sequence", [False, True])
def test_empty_batch(sequence, device, backend):
    logits = torch.empty(3, 0, 7, device=device, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=device)
    loss, terms = dkt_loss(list(logits.unbind(0)) if sequence else logits, target, return_terms=True, backend=backend)
    loss.backward()
    assert loss.item() == 0 and terms.tolist() == [0, 0, 0]
    assert logits.grad.shape == (3, 0, 7)


def test_incoming_gradient_scales_and_logits_stay():
    logits, target = torch.randn(2, 4, 6, dtype=torch.float64), torch.randint(6, (4,))
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dkt_loss(leaf, target), leaf)
    (scaled,) = torch.autograd.grad(-2.5 * dkt_loss(leaf, target), leaf)
    torch.testing.assert_close(scaled, -2.5 * gradient, rtol=1e-13, atol=0)
    assert torch.equal(leaf.detach(), logits)


def test_repeatable(device, backend):
    logits, target = torch.randn(3, 64, 100, device=device), torch.randint(100, (64,), device=device)
    first, second = (loss_and_gradient(logits, target, backend=backend) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


# A detached teacher makes the gradient differ from the derivative; test_closed_form covers it.
@pytest.mark.parametrize("options", [options for options in OPTIONS if "detach_teacher" not in options], ids=str)
def test_gradcheck(options):
    logits, target = torch.randn(3, 3, 5, dtype=torch.float64, requires_grad=True), torch.tensor([0, 4, 2])
    assert torch.autograd.gradcheck(lambda z: dkt_loss(z, target, **options), (logits,))


def test_gradcheck_of_a_sequence():
    logits, target = (
        [torch.randn(2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)],
        torch.tensor([0, 3]),
    )
    assert torch.autograd.gradcheck(lambda *z: dkt_loss(z, target), logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_reduction": "sum"}, "dkt_loss: kl_reduction must be 'mean' or 'batchmean', got 'sum'"),
        ({"hardest_weight": math.inf}, "dkt_loss: hardest_weight must be finite, got inf"),
        ({"mutual_weight": math.nan}, "dkt_loss: mutual_weight must be finite, got nan"),
        ({"teacher_target_logit": -math.inf}, "dkt_loss: teacher_target_logit must be finite, got -inf"),
        ({"student_target_logit": -math.inf}, "dkt_loss: student_target_logit must be finite, got -inf"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError) as caught:
        dkt_loss(torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.int64), **options)
    assert str(caught.value) == message


def test_weight_of_a_wrong_type():
    with pytest.raises(TypeError, match=r"^dkt_loss: hardest_weight must be a number, got str$"):
        dkt_loss(torch.zeros(3, 4, 5), torch.zeros(4, dtype=torch.int64), hardest_weight="10")
