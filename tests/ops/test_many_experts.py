"""More experts than the kernels take at once: expert_loss and expert_kl by groups against the reference."""

import pytest
import torch

from shike_fast.ops import ExpertKL, expert_kl, expert_loss

K, B, C = 19, 6, 7
TARGET, SECOND = torch.tensor([0, 3, 6, 2, 2, 5]), torch.tensor([1, 3, 0, 2, 4, 5])
MASK = torch.rand(B, C, generator=torch.Generator().manual_seed(0)) < 0.5
MASK |= torch.nn.functional.one_hot(TARGET, C).bool()


def numbers(*shape):
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return 0.25 + torch.rand(shape, generator=generator, dtype=torch.float64)


LOSSES = {
    "plain": {},
    "by expert": {"bias": numbers(K, C), "scale": numbers(K, C), "margin": numbers(K, C), "label_smoothing": 0.1},
    "labels by expert": {"target": TARGET.expand(K, B), "class_weight": numbers(K, C), "sample_weight": numbers(K, B)},
    "two labels": {"target_b": SECOND, "lam": numbers(B) / 2, "class_weight": numbers(C), "reduction": "weighted_mean"},
    "weights of experts": {"expert_weight": numbers(K)},
    "weighted mean": {"class_weight": numbers(K, C), "expert_weight": numbers(K), "reduction": "weighted_mean"},
    "mean of all": {"reduction": "mean/K", "class_weight": numbers(C)},
    "weighted mean of all": {"reduction": "mean/K", "expert_weight": numbers(K)},
    "global": {"class_weight": numbers(C), "expert_weight": numbers(K), "reduction": "global_weighted_mean"},
    "global of two labels": {"target_b": SECOND, "lam": 0.3, "reduction": "global_weighted_mean"},
    "global of nothing": {"sample_weight": torch.zeros(K, B), "reduction": "global_weighted_mean"},
    "rows": {"reduction": "none", "class_weight": numbers(K, C)},
    "masked": {"class_mask": MASK, "masked": "exclude"},
    "ensemble": {"ensemble": "mean", "bias": numbers(K, C)},
    "and the mean": {"kl": ExpertKL("mean", temperature=2.0, weight=-0.2), "bias": numbers(C)},
    "and the plain mean": {"kl": ExpertKL("mean", adjusted=False), "bias": numbers(K, C), "reduction": "mean/K"},
    "and the masked mean": {"kl": ExpertKL("mean", gate="teacher_correct"), "class_mask": MASK, "masked": "zero"},
    "and views": {"kl": ExpertKL("view", weight=numbers(K, 3), gate="teacher_correct", reduction="gated_mean")},
    "and logits": {"kl": ExpertKL(numbers(B, C), temperature=numbers(C), gate=numbers(K, B))},
    "and logits by expert": {"kl": ExpertKL(numbers(K, B, C), weight=numbers(B)), "bias": numbers(K, C)},
}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_against_the_reference(kernels, name, sequence):
    backend, device = kernels
    results = []
    for one in (backend, "reference"):
        torch.manual_seed(1)
        leaf = torch.randn(K, B, C, dtype=torch.float32, device=device, requires_grad=True)
        options = {"target": TARGET} | LOSSES[name]
        given = [expert.clone() for expert in leaf] if sequence else leaf
        asked = {"return_terms": True, "return_rows": True, "backend": one}
        loss, terms, rows = expert_loss(given, **{key: on(value, device) for key, value in options.items()}, **asked)
        (gradient,) = torch.autograd.grad(loss, leaf, torch.arange(1, loss.numel() + 1.0).view(loss.shape).to(device))
        results.append([loss.detach(), terms, *rows, gradient])
        plain = expert_loss(given, **{key: on(value, device) for key, value in options.items()}, backend=one)
        assert torch.equal(plain, loss)
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


def on(value, device):
    if isinstance(value, ExpertKL):
        return ExpertKL(**{name: on(part, device) for name, part in vars(value).items()})
    return value.to(device) if torch.is_tensor(value) else value


@pytest.mark.parametrize("teacher", ["mean", "view", numbers(B, C)])
def test_a_divergence_alone(teacher):
    logits = torch.randn(K, B, C)
    torch.testing.assert_close(
        expert_kl(logits, teacher, backend="cpu"), expert_kl(logits, teacher, backend="reference")
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kl": ExpertKL()}, "a divergence between them"),
        ({"kl": ExpertKL("mean"), "scale": numbers(K, C)}, "their mean as a teacher and a bias or scale by expert"),
        (
            {"target_b": SECOND, "lam": 0.5, "class_weight": numbers(C), "reduction": "global_weighted_mean"},
            "a global weighted mean over two labels",
        ),
    ],
)
def test_what_is_no_sum_over_the_experts(options, reason):
    logits = torch.randn(K, B, C)
    with pytest.raises(RuntimeError) as caught:
        expert_loss(logits, TARGET, **options, backend="cpu")
    assert str(caught.value) == (
        "expert_loss: backend 'cpu' cannot run: more than 8 experts with " + reason + " are a matter of the reference"
    )
    assert torch.equal(
        expert_loss(logits, TARGET, **options), expert_loss(logits, TARGET, **options, backend="reference")
    )


def test_in_one_graph():
    """Compiled whole, and one graph for several sizes of batch."""
    call = torch.compile(
        lambda z, y: expert_loss(z, y, backend="cpu"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for batch in (6, 4):
        logits = torch.randn(K, batch, C)
        torch.testing.assert_close(call(logits, TARGET[:batch]), expert_loss(logits, TARGET[:batch]))
