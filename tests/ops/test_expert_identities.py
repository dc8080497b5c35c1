"""What must be equal among expert_loss, expert_kl and the other losses, on every backend; and gradcheck."""

# ruff: noqa: B023  (no function outlives its iteration)

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from shike_fast import ops
from shike_fast.ops import ExpertKL, expert_kl, expert_loss

OP = "expert_loss"
K, B, C = 3, 6, 9


@pytest.fixture
def tensors(device, widest):
    """Logits, a target, a second one that differs in all rows, a bias [K, C] and counts."""
    logits, bias = torch.randn(K, B, C, dtype=widest), torch.randn(K, C, dtype=widest)
    target = torch.tensor([0, 8, 3, 3, 5, 1])
    counts = torch.tensor([90, 40, 12, 5, 2, 1, 1, 1, 1])
    return tuple(t.to(device) for t in (3 * logits, target, (target + 2) % C, bias, counts))


def value_and_gradient(function, logits):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf)
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return loss.detach(), *torch.autograd.grad((weights * loss).sum(), leaf)


def same(logits, mine, theirs, tolerance=2e-6):
    tolerance = 1e-12 if logits.dtype == torch.float64 else tolerance
    for one, other in zip(value_and_gradient(mine, logits), value_and_gradient(theirs, logits), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- other losses


def test_the_cross_entropies_are_cases(tensors, backend):
    logits, target, _, bias, counts = tensors
    same(
        logits,
        lambda z: expert_loss(z, target, bias=bias, label_smoothing=0.1, backend=backend),
        lambda z: ops.expert_cross_entropy(z, target, bias=bias, label_smoothing=0.1, backend=backend),
    )
    same(
        logits,
        lambda z: expert_loss(z, target, bias=counts.double().log(), backend=backend),
        lambda z: ops.balanced_softmax_loss(z, target, counts, backend=backend),
    )


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("detach", [False, True])
def test_the_mutual_term_of_dkt(tensors, backend, reduction, detach):
    logits, target, *_ = tensors

    def dkt(z):
        options = {"kl_reduction": reduction, "detach_teacher": detach, "hardest_weight": 0.0}
        return ops.dkt_loss(z, target, mutual_weight=0.7, **options, backend=backend)

    def mine(z):
        kl = ExpertKL(weight=0.7, reduction=reduction, detach=detach)
        return expert_loss(z, target, kl=kl, backend=backend)

    same(logits, mine, dkt)
    same(
        logits,
        lambda z: expert_kl(z, weight=0.7, reduction=reduction, detach=detach, backend=backend),
        lambda z: mine(z) - expert_loss(z, target, backend=backend),
        tolerance=1e-5,
    )


# ---- labels


def test_two_labels_of_which_one_counts(tensors, backend):
    logits, target, second, bias, _ = tensors
    options = {"bias": bias, "margin": bias.abs(), "label_smoothing": 0.2, "class_weight": bias[0].abs()}
    loss = partial(expert_loss, **options, backend=backend)
    for reduction in ("mean", "weighted_mean", "none"):
        for lam, label in ((1.0, target), (0.0, second)):
            same(
                logits,
                partial(loss, target=target, target_b=second, lam=lam, reduction=reduction),
                partial(loss, target=label, reduction=reduction),
            )


def test_a_label_twice_is_one_label(tensors, backend):
    logits, target, _, bias, _ = tensors
    for lam in (0.3, torch.linspace(0, 1, B, device=logits.device)):
        same(
            logits,
            lambda z: expert_loss(z, target, target_b=target.clone(), lam=lam, margin=bias.abs(), backend=backend),
            lambda z: expert_loss(z, target, margin=bias.abs(), backend=backend),
        )


def test_labels_exchanged(tensors, backend):
    logits, target, second, bias, _ = tensors
    second = torch.where(torch.arange(B, device=target.device) % 2 == 0, target, second)  # some are equal
    same(
        logits,
        lambda z: expert_loss(z, target, target_b=second, lam=0.3, bias=bias, label_smoothing=0.1, backend=backend),
        lambda z: expert_loss(z, second, target_b=target, lam=0.7, bias=bias, label_smoothing=0.1, backend=backend),
    )


def test_a_target_for_all_experts(tensors, backend):
    logits, target, second, bias, _ = tensors
    for options in ({}, {"margin": bias.abs(), "target_b": second, "lam": 0.2, "class_weight": bias.abs()}):
        wide = {name: value.expand(K, B) if name == "target_b" else value for name, value in options.items()}
        same(
            logits,
            lambda z: expert_loss(z, target.expand(K, B), **wide, backend=backend),
            lambda z: expert_loss(z, target, **options, backend=backend),
        )


# ---- weights, margins, reductions


def test_reductions(tensors, backend):
    logits, target, _, bias, _ = tensors
    weight = bias.abs()

    def loss(reduction, **options):
        return lambda z: expert_loss(z, target, reduction=reduction, **options, backend=backend)

    same(logits, loss("mean/K"), lambda z: loss("mean")(z) / K)
    same(logits, loss("weighted_mean"), loss("mean"))
    same(logits, loss("global_weighted_mean"), loss("mean/K"))
    same(logits, loss("mean", class_weight=weight), lambda z: loss("none", class_weight=weight)(z).sum() / B)
    same(logits, loss("weighted_mean", class_weight=5 * weight), loss("weighted_mean", class_weight=weight))


def test_weights_of_0(tensors, backend):
    logits, target, second, _, _ = tensors
    nothing = torch.zeros(B, device=logits.device)
    for reduction in ("mean", "mean/K", "weighted_mean", "global_weighted_mean", "none"):
        loss, gradient = value_and_gradient(
            lambda z: expert_loss(
                z, target, target_b=second, lam=0.4, sample_weight=nothing, reduction=reduction, backend=backend
            ),
            logits,
        )
        assert (loss == 0).all() and (gradient == 0).all()
    for gate in (nothing, nothing.bool(), nothing.expand(K, B)):
        kl, gradient = value_and_gradient(
            lambda z: expert_kl(z, gate=gate, reduction="gated_mean", backend=backend),
            logits,
        )
        assert kl == 0 and (gradient == 0).all()
    some = torch.arange(B, device=logits.device) % 2
    same(
        logits[:, 1::2].contiguous(),
        lambda z: expert_loss(
            torch.stack([torch.zeros_like(z), z], 2).flatten(1, 2),  # other rows without weight before each
            target,
            sample_weight=some,
            reduction="weighted_mean",
            backend=backend,
        ),
        lambda z: expert_loss(z, target[1::2], backend=backend),
    )


def test_an_expert_without_weight(tensors, backend):
    logits, target, *_ = tensors
    for reduction in ("mean", "weighted_mean", "global_weighted_mean"):
        loss, gradient = value_and_gradient(
            lambda z: expert_loss(z, target, expert_weight=[1, 0, 1], reduction=reduction, backend=backend),
            logits,
        )
        assert (gradient[1] == 0).all() and (gradient[0] != 0).all()
        others = logits[[0, 2]]
        expected, _ = value_and_gradient(lambda z: expert_loss(z, target, reduction=reduction, backend=backend), others)
        torch.testing.assert_close(loss, expected)


def test_a_scale_and_a_margin_by_hand(tensors, backend):
    logits, target, _, bias, _ = tensors
    scale, margin = bias[0].abs() + 0.5, bias.abs()

    def by_hand(z):
        at_target = F.one_hot(target, C) * margin[:, target, None]
        return expert_loss(scale * z + bias[:, None] - at_target, target, backend=backend)

    same(logits, lambda z: expert_loss(z, target, scale=scale, bias=bias, margin=margin, backend=backend), by_hand)


def test_excluded_classes_are_a_bias_of_minus_infinity(tensors, backend):
    logits, target, _, bias, _ = tensors
    kept = torch.ones(C, dtype=torch.bool, device=target.device)
    kept[[2, 7]] = False
    out = torch.where(kept, bias, -torch.inf)
    same(
        logits,
        lambda z: expert_loss(z, target, bias=bias, class_mask=kept.expand(B, C), masked="exclude", backend=backend),
        lambda z: expert_loss(z, target, bias=out, backend=backend),
    )
    everything = torch.ones(B, C, dtype=torch.bool, device=target.device)
    for masked in ("zero", "exclude"):
        same(
            logits,
            lambda z: expert_loss(z, target, class_mask=everything, masked=masked, kl=ExpertKL(), backend=backend),
            lambda z: expert_loss(z, target, kl=ExpertKL(), backend=backend),
        )


# ---- divergences


def test_weights_of_a_divergence(tensors, backend):
    logits = tensors[0]
    weight = torch.rand(B, device=logits.device, dtype=logits.dtype)
    for teacher in ("others", "mean"):
        for weight_of in ("teacher", "student"):
            same(
                logits,
                lambda z: expert_kl(z, teacher, weight=weight.expand(K, B), weight_of=weight_of, backend=backend),
                lambda z: expert_kl(z, teacher, weight=weight, backend=backend),
            )
        same(
            logits,
            lambda z: expert_kl(z, teacher, gate=weight, backend=backend),
            lambda z: expert_kl(z, teacher, weight=weight, backend=backend),
        )
        same(
            logits,
            lambda z: expert_kl(z, teacher, reduction="mean", backend=backend),
            lambda z: expert_kl(z, teacher, backend=backend) / C,
        )


def test_teachers_given_by_hand(tensors, backend):
    logits, target, *_ = tensors
    mean, first = logits.mean(0), logits[:, : B // 2]
    options = {"temperature": 1.5, "backend": backend}
    same(logits, lambda z: expert_kl(z, "mean", **options), lambda z: expert_kl(z, mean, **options))
    same(
        logits[:, B // 2 :].contiguous(),
        lambda z: expert_kl(torch.cat([first, z], 1), "view", **options),
        lambda z: expert_kl(z, first, **options),
    )
    same(
        logits,
        lambda z: expert_kl(z, detach=True, **options),
        lambda z: sum(
            expert_kl(z[k : k + 1], logits[j], **options) for j in range(K) for k in range(K) if j != k
        ),
    )  # fmt: skip
    right = logits.argmax(2) == target
    same(
        logits,
        lambda z: expert_kl(z, target=target, gate="teacher_correct", reduction="gated_mean", **options),
        lambda z: expert_kl(z, gate=right, reduction="gated_mean", **options),
    )


def test_a_temperature_and_a_target_in_passing(tensors, backend):
    logits, target, *_ = tensors
    for teacher in ("others", "mean", logits.flip(1)):
        given = teacher if isinstance(teacher, str) else teacher / 2
        same(
            logits,
            lambda z: expert_kl(z, teacher, temperature=2.0, backend=backend),
            lambda z: 4 * expert_kl(z / 2, given, backend=backend),
        )
        same(
            logits,
            lambda z: expert_kl(z, teacher, temperature=torch.full((C,), 2.0, device=z.device), backend=backend),
            lambda z: expert_kl(z, teacher, temperature=2.0, target=target, backend=backend),
        )


def test_one_expert(tensors, backend):
    logits, target, *_ = tensors
    logits = logits[:1]
    for teacher in ("others", "mean"):
        kl, gradient = value_and_gradient(lambda z: expert_kl(z, teacher, backend=backend), logits)
        assert kl.abs() < 1e-6 and gradient.abs().max() < 1e-6
    same(
        logits,
        lambda z: expert_loss(z, target, kl=ExpertKL(), ensemble="mean", ensemble_weight=2.0, backend=backend),
        lambda z: 3 * expert_loss(z, target, backend=backend),
    )


# ---- edges


@pytest.mark.parametrize("kl", [None, "others", "mean", "view"])
def test_empty_batch(device, backend, kl):
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    for reduction in ("mean", "weighted_mean", "global_weighted_mean", "none"):
        empty = torch.empty(2, 0, 3, device=device, requires_grad=True)
        if kl is not None and reduction == "none":
            continue
        loss, terms, rows = expert_loss(
            *(empty, nothing),
            **{"target_b": nothing, "lam": 0.5, "class_weight": [1, 2, 3], "reduction": reduction},
            kl=None if kl is None else ExpertKL(kl),
            return_terms=True,
            return_rows=True,
            backend=backend,
        )
        loss.sum().backward()
        assert loss.shape == ((2, 0) if reduction == "none" else ()) and loss.sum() == 0
        assert (terms == 0).all() and empty.grad.shape == (2, 0, 3) and all(row.shape == (2, 0) for row in rows)
    if kl is not None:
        empty = torch.empty(2, 0, 3, device=device, requires_grad=True)
        gate = torch.empty(2, 0, device=device)
        loss = expert_kl(empty, kl, gate=gate, reduction="gated_mean", backend=backend)
        loss.backward()
        assert loss == 0 and empty.grad.shape == (2, 0, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_makes_its_rows_nan(tensors, backend, value):
    logits, target, second, bias, _ = tensors
    for place in (3, 7):  # at the label, and elsewhere
        broken = logits.clone()
        broken[1, 2, place] = value
        weight = torch.ones(B, device=logits.device)
        weight[2] = 0  # a weight of 0 does not hide it
        for options in ({}, {"target_b": second, "lam": 0.5, "bias": bias}, {"sample_weight": weight}):
            loss, gradient = value_and_gradient(
                lambda z: expert_loss(z, target, **options, reduction="none", backend=backend),
                broken,
            )
            wrong = torch.zeros(K, B, dtype=torch.bool, device=logits.device)
            wrong[1, 2] = True
            assert torch.equal(~torch.isfinite(loss), wrong), (place, options, loss)
            assert torch.equal(~torch.isfinite(gradient).all(2), wrong)
        for teacher in ("others", "mean", logits[0]):
            loss, gradient = value_and_gradient(lambda z: expert_kl(z, teacher, backend=backend), broken)
            others = torch.arange(B, device=logits.device) != 2
            assert loss.isnan() and gradient[1, 2].isnan().any() and torch.isfinite(gradient[:, others]).all()


def test_expected_infinities(device, backend):
    logits = torch.zeros(1, 1, 3, device=device)
    target = torch.zeros(1, dtype=torch.int64, device=device)
    logits[..., 0] = -torch.inf
    assert expert_loss(logits, target, backend=backend) == torch.inf
    bias = torch.tensor([0.0, -torch.inf, -torch.inf], device=device)
    assert expert_loss(torch.ones(1, 1, 3, device=device), target, bias=bias, backend=backend) == 0


# ---- gradcheck

TARGET, SECOND = torch.tensor([0, 3, 2, 2]), torch.tensor([1, 3, 0, 2])
MASK = torch.ones(4, 4, dtype=torch.bool)
MASK[[0, 2], [2, 3]] = False


def leaf(*shape, least=None):
    values = (
        torch.randn(shape, dtype=torch.float64) if least is None else least + torch.rand(shape, dtype=torch.float64)
    )
    return values.requires_grad_()


CHECKED = {
    "classes": ({}, {"bias": leaf(4), "scale": leaf(2, 4, least=0.5), "margin": leaf(4)}),
    "of experts": ({"label_smoothing": 0.1}, {"bias": leaf(2, 4), "scale": leaf(4), "margin": leaf(2, 4)}),
    "weighted": (
        {"reduction": "weighted_mean"},
        {"class_weight": leaf(4, least=0.2), "sample_weight": leaf(4, least=0.2)},
    ),
    "weighted by expert": (
        {"reduction": "global_weighted_mean", "target_b": SECOND},
        {"class_weight": leaf(2, 4, least=0.2), "expert_weight": leaf(2, least=0.2), "lam": leaf(4)},
    ),
    "rows": ({"reduction": "none", "target_b": SECOND}, {"lam": leaf(), "sample_weight": leaf(2, 4)}),
    "soft": ({"masked": "zero", "class_mask": MASK}, {"soft_target": leaf(4, 4, least=0.1)}),
    "ensemble": ({"ensemble": "sum", "ensemble_weight": 0.3}, {"bias": leaf(2, 4), "margin": leaf(4)}),
    "excluded": ({"masked": "exclude", "class_mask": MASK}, {"margin": leaf(4)}),
}
KL_CHECKED = {
    "others": ({}, {"weight": leaf(), "temperature": leaf(4, least=0.8)}),
    "others, eps": ({"eps": 1e-2, "weight_of": "student"}, {"weight": leaf(2, 4), "gate": leaf(4, least=0.1)}),
    "others, part": ({"class_mask": MASK, "masked": "partial", "eps": 1e-3}, {"weight": leaf(4)}),
    "gated": ({"reduction": "gated_mean", "teacher": "mean", "detach": False}, {"gate": leaf(2, 4, least=0.1)}),
    "mean": ({"teacher": "mean", "detach": False, "temperature": 2.0}, {"weight": leaf(2, 4)}),
    "view": ({"teacher": "view", "detach": False}, {"weight": leaf(2)}),
    "given": ({"detach": False}, {"teacher": leaf(4, 4), "temperature": leaf(4, least=0.8)}),
    "given by expert": ({"detach": False, "class_mask": MASK, "masked": "exclude"}, {"teacher": leaf(2, 4, 4)}),
}


def gradcheck(function, options, inputs):
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def call(z, *values):
        return function(z, **options, **dict(zip(inputs, values, strict=True)))

    assert torch.autograd.gradcheck(call, (logits, *inputs.values()), fast_mode=True)
    _, *gradients = torch.autograd.grad(call(logits, *inputs.values()).sum(), (logits, *inputs.values()))
    assert all((gradient != 0).any() for gradient in gradients)


@pytest.mark.parametrize("case", CHECKED)
def test_gradcheck(case):
    gradcheck(lambda z, **options: expert_loss(z, TARGET, **options, backend="reference"), *CHECKED[case])


@pytest.mark.parametrize("case", KL_CHECKED)
def test_gradcheck_of_divergences(case):
    gradcheck(lambda z, **options: expert_kl(z, **options, backend="reference"), *KL_CHECKED[case])
    options, inputs = KL_CHECKED[case]
    if "class_mask" in options:
        return

    def within(z, **values):
        bias = torch.linspace(-1, 1, 4, dtype=torch.float64)
        return expert_loss(z, TARGET, bias=bias, kl=ExpertKL(**values), backend="reference")

    gradcheck(within, options, inputs)


def test_the_reference_differentiates_twice():
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda z: expert_loss(z, TARGET, margin=torch.ones(4), kl=ExpertKL(eps=1e-3), backend="reference"),
        (logits,),
        fast_mode=True,
    )
