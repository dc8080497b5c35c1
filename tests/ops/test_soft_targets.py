"""Targets of class probabilities, against PyTorch's cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from shike_fast.ops import balanced_softmax_loss, dkt_loss, expert_cross_entropy, expert_loss

K, B, C = 3, 5, 4
COUNTS = torch.tensor([8, 4, 2, 1])


def given(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    logits = torch.randn(K, B, C, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)


def plain(logits, soft, bias=0.0, **options):
    targets = soft if soft.dim() == 3 else [soft] * K
    return sum(F.cross_entropy(z + bias, t, **options) for z, t in zip(logits, targets, strict=True))


@pytest.mark.parametrize("shape", [(B, C), (K, B, C)])
@pytest.mark.parametrize("sequence", [False, True])
def test_against_pytorch(shape, sequence):
    logits, soft = given(*shape)
    z = list(logits) if sequence else logits
    bias = COUNTS.double().log()
    pairs = {
        "plain": (expert_cross_entropy(z, soft), plain(logits, soft)),
        "smoothed": (expert_cross_entropy(z, soft, label_smoothing=0.2), plain(logits, soft, label_smoothing=0.2)),
        "biased": (expert_cross_entropy(z, soft, bias=bias), plain(logits, soft, bias)),
        "balanced": (balanced_softmax_loss(z, soft, COUNTS), plain(logits, soft, bias)),
        "generalised": (expert_loss(z, soft.argmax(-1), soft_target=soft, bias=bias), plain(logits, soft, bias)),
    }
    for name, (mine, theirs) in pairs.items():
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (mine, theirs)]
        torch.testing.assert_close([mine, gradients[0]], [theirs, gradients[1]], rtol=1e-12, atol=1e-12, msg=name)


def test_one_hot_probabilities_are_class_numbers():
    logits, _ = given(B, C)
    target = torch.tensor([0, 3, 1, 2, 2])
    one_hot = F.one_hot(target, C).double()
    torch.testing.assert_close(expert_cross_entropy(logits, one_hot), expert_cross_entropy(logits, target))
    mixed = 0.3 * one_hot + 0.7 * one_hot.flip(0)
    two_labels = expert_loss(logits, target, target_b=target.flip(0), lam=0.3)
    torch.testing.assert_close(expert_cross_entropy(logits, mixed.float()), two_labels, rtol=1e-6, atol=1e-6)


def test_a_class_without_probability_may_be_out_of_the_softmax():
    logits, _ = given(B, C)
    soft = torch.tensor([0.25, 0.75, 0.0, 0.0]).double().expand(B, C)
    mask = torch.tensor([True, True, True, False]).expand(B, C)
    counts = torch.tensor([1, 1, 1, 0])
    losses = (
        balanced_softmax_loss(logits, soft, counts),
        expert_cross_entropy(logits, soft, bias=counts.double().log()),
        expert_loss(logits, torch.zeros(B, dtype=torch.int64), soft_target=soft, class_mask=mask, masked="exclude"),
    )
    for loss in losses:
        torch.testing.assert_close(loss, plain(logits[..., :3], soft[:, :3]))
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient[..., 3] == 0).all()


def test_probabilities_are_differentiable():
    logits, soft = given(K, B, C)
    assert torch.autograd.gradcheck(expert_cross_entropy, (logits, soft.requires_grad_()))


def test_they_run_on_the_reference():
    logits, soft = given(B, C)
    for name, loss in (
        ("expert_cross_entropy", expert_cross_entropy),
        ("balanced_softmax_loss", lambda z, y, **options: balanced_softmax_loss(z, y, COUNTS, **options)),
    ):
        with pytest.raises(RuntimeError, match=f"^{name}: backend 'cpu' cannot run: soft targets are a matter of the"):
            loss(logits, soft, backend="cpu")
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(logits, soft), loss(logits, soft))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.ones(B, C + 1), "got float32 [5, 5]"),
        (torch.ones(K, B, 1), "got float32 [3, 5, 1]"),
        (torch.ones(B, C, device="meta"), "target must be on cpu as logits, got float32 [5, 4] on meta"),
    ],
)
def test_other_shapes(target, message):
    with pytest.raises(ValueError) as caught:
        expert_cross_entropy(torch.randn(K, B, C), target)
    assert str(caught.value).startswith("expert_cross_entropy: target must be ")
    assert str(caught.value).endswith(message)
    with pytest.raises(ValueError, match=r"probabilities \[B=3, C=4\] or \[K=5, B, C\], got float32 \[5, 4\]; logits"):
        expert_cross_entropy(torch.randn(B, K, C), torch.ones(B, C))


def test_an_ensemble_has_one_row():
    logits, soft = given(K, B, C)
    with pytest.raises(ValueError, match="ensemble has one row of all experts, got soft_target by expert"):
        expert_loss(logits, soft[0].argmax(1), soft_target=soft, ensemble="mean")


@pytest.mark.parametrize("loss", [dkt_loss, expert_loss])
def test_losses_of_class_numbers_say_where_to_go(loss):
    logits, soft = given(B, C)
    with pytest.raises(TypeError) as caught:
        loss(logits, soft)
    assert str(caught.value) == (
        f"{loss.__name__}: target must be int64 [B=5], got float64 [5, 4]; if it is one-hot, pass target.argmax(1), "
        "for probabilities take expert_cross_entropy or expert_loss(soft_target=...)"
    )


@pytest.mark.parametrize("backend", ["reference", None])
def test_ignored_labels(backend):
    """What ``ignore_index`` of F.cross_entropy does is a weight of 0."""
    logits, target = torch.randn(3, 6, 5, dtype=torch.float64), torch.tensor([0, -100, 3, 4, -100, 1])
    weight = (target != -100).double()
    loss = expert_loss(logits, target.clamp(min=0), sample_weight=weight, reduction="weighted_mean", backend=backend)
    expected = sum(F.cross_entropy(expert, target, ignore_index=-100) for expert in logits)
    torch.testing.assert_close(loss, expected)
