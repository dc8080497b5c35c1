"""The kernels of expert_loss and expert_kl against the float64 reference: a sweep over logits, layouts and options."""

import functools
from typing import NamedTuple

import torch
from expert_logits import LAYOUTS, TOLERANCE, lay_out, logits_and_target, moved, sweep
from hypothesis import strategies as st

from shike_fast.ops import ExpertKL, expert_kl, expert_loss

OP = "expert_loss"


class Options(NamedTuple):
    """What Hypothesis draws of the cross-entropy, and shows when a case fails."""

    bias: str
    scale: str
    margin: str
    class_weight: str
    sample_weight: str
    expert_weight: bool
    second: str
    labels_of_experts: bool
    label_smoothing: float
    reduction: str
    masked: str | None
    seed: int


OF_CLASSES = st.sampled_from(["none", "none", "shared", "per expert"])
OPTIONS = st.builds(
    Options,
    bias=OF_CLASSES,
    scale=st.sampled_from(["none", "none", "number", "shared", "per expert"]),
    margin=OF_CLASSES,
    class_weight=OF_CLASSES,
    sample_weight=OF_CLASSES,
    expert_weight=st.booleans(),
    second=st.sampled_from(["none", "none", "number", "rows"]),
    labels_of_experts=st.sampled_from([False, False, False, True]),
    label_smoothing=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "mean", "mean/K", "weighted_mean", "global_weighted_mean", "none"]),
    masked=st.sampled_from([None, None, None, "zero", "exclude"]),
    seed=st.integers(0, 1000),
)


class Divergence(NamedTuple):
    """The same of the divergence."""

    teacher: str
    temperature: str
    weight: str
    gate: str
    reduction: str
    weight_of: str
    detach: bool
    adjusted: bool
    eps: float


DIVERGENCES = st.builds(
    Divergence,
    teacher=st.sampled_from(["others", "others", "mean", "view", "given", "given per expert"]),
    temperature=st.sampled_from(["none", "none", "number", "shared"]),
    weight=st.sampled_from(["none", "number", "shared", "per expert"]),
    gate=st.sampled_from(["none", "none", "shared", "per expert", "right"]),
    reduction=st.sampled_from(["batchmean", "batchmean", "mean", "gated_mean"]),
    weight_of=st.sampled_from(["teacher", "teacher", "student"]),
    detach=st.booleans(),
    adjusted=st.booleans(),
    eps=st.sampled_from([0.0, 0.0, 0.0, 1e-4]),
)


class Values:
    """Random numbers that float32 holds, so that all backends see the same."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, kind, experts, columns, low=0.25, high=1.25):
        if kind == "none":
            return None
        shape = (experts, columns) if kind == "per expert" else (columns,)
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).double()

    def labels(self, like, classes):
        return torch.randint(classes, like.shape, generator=self.generator)


def arguments(options, logits, target):
    """The target and the keywords of the call that was drawn."""
    experts, batch, classes = logits.shape
    values = Values(options.seed)
    if options.labels_of_experts:
        target = values.labels(target.expand(experts, -1), classes)
    keywords = {
        "bias": values.uniform(options.bias, experts, classes, -2.0, 2.0),
        "scale": 1.5 if options.scale == "number" else values.uniform(options.scale, experts, classes, 0.5, 1.5),
        "margin": values.uniform(options.margin, experts, classes, 0.0, 4.0),
        "class_weight": values.uniform(options.class_weight, experts, classes),
        "sample_weight": values.uniform(options.sample_weight, experts, batch),
        "expert_weight": values.uniform("shared", experts, experts) if options.expert_weight else None,
        "reduction": options.reduction,
    }
    labels = [target]
    if options.second != "none":
        second = values.labels(target, classes)
        keywords["target_b"] = torch.where(torch.rand(batch, generator=values.generator) < 0.3, target, second)
        keywords["lam"] = 0.25 if options.second == "number" else values.uniform("shared", 1, batch, 0.0, 1.0)
        labels.append(keywords["target_b"])
    if options.masked is not None:
        mask = torch.rand(batch, classes, generator=values.generator) < 0.5
        for label in labels:
            mask.scatter_(1, torch.atleast_2d(label).mT, True)
        images = batch // 2
        mask[:images] |= mask[images : 2 * images]  # of an image's views
        mask[images : 2 * images] = mask[:images]
        keywords |= {"class_mask": mask, "masked": options.masked}
    else:  # smoothing together with a mask is a matter of the reference
        keywords["label_smoothing"] = options.label_smoothing
    return target, {name: value for name, value in keywords.items() if value is not None}


def divergence_arguments(drawn, logits, seed, cpu):
    """The keywords of an ExpertKL, and of the logits that it may take."""
    experts, batch, classes = logits.shape
    values = Values(seed + 1)
    rows = batch // 2 if drawn.teacher == "view" else batch
    teacher = drawn.teacher
    if teacher.startswith("given"):
        shape = logits.shape if teacher == "given per expert" else logits.shape[1:]
        teacher = torch.randn(shape, generator=values.generator).to(logits.dtype)
    others = drawn.teacher == "others"
    floored = drawn.eps if cpu and others and drawn.gate != "right" else 0.0
    by_student = others and drawn.weight_of == "student" and drawn.gate != "right" and floored == 0.0
    gate = values.uniform(drawn.gate, experts, rows, 0.0, 1.0) if drawn.gate not in ("none", "right") else None
    temperature = values.uniform(drawn.temperature, 1, classes, 0.5, 1.5)
    weight = -0.5 if drawn.weight == "number" else values.uniform(drawn.weight, experts, rows, -1.0, 1.0)
    keywords = {
        "teacher": teacher,
        "temperature": 1.5 if drawn.temperature == "number" else temperature,
        "weight": weight,
        "gate": "teacher_correct" if drawn.gate == "right" else gate,
        "weight_of": "student" if by_student else "teacher",
        "detach": drawn.detach if others else None,
    }
    keywords = {name: value for name, value in keywords.items() if value is not None}
    return keywords | {"reduction": drawn.reduction, "eps": floored}


def evaluate(function, backend, device, logits, target, keywords, layout):
    """Everything that a call returns, flat, and the gradient for a ``grad_output`` that differs from 1."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    leaf, gradient_of = lay_out(logits.to(device), layout)
    keywords = {name: moved(value, device, wide) for name, value in keywords.items()}
    if target is not None:
        keywords["target"] = target.to(device)
    result = function(leaf, **keywords, backend=backend)
    loss, terms, rows = result if isinstance(result, tuple) else (result, None, None)
    generator = torch.Generator().manual_seed(1)
    grad_output = 0.5 + torch.rand(loss.shape, generator=generator).to(loss)
    loss.backward(grad_output)
    return loss.detach(), terms, rows, gradient_of()


def compare(function, kernels, logits, target, keywords, layout, weight):
    """``weight`` bounds how strongly a gradient takes up an error in one log-probability."""
    backend, device = kernels
    if device.type == "cuda" and logits.dtype == torch.float64:
        logits = logits.float()
    wide = evaluate(function, "reference", torch.device("cpu"), logits.double(), target, keywords, "contiguous")
    mine = evaluate(function, backend, device, logits, target, keywords, layout)
    again = evaluate(function, backend, device, logits, target, keywords, layout)
    assert torch.equal(mine[0], again[0]) and torch.equal(mine[3], again[3])
    assert mine[0].dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert mine[3].dtype == logits.dtype and mine[3].shape == logits.shape
    assert torch.isfinite(wide[0]).all()
    if (target is not None and target.shape[-1] == 0) or logits.shape[1] == 0:
        assert (mine[0] == 0).all()
        return
    largest = 2 * logits.double().abs().max().item() + 30  # scales reach 1.5, biases and margins 6
    rounding = 8 * torch.finfo(mine[0].dtype).eps * largest * weight
    rows = 1 if mine[0].dim() == 2 else logits.shape[0] * logits.shape[1]

    def near(a, b, relative, absolute):
        error, allowed = (a.cpu().double() - b.double()).abs().max().item(), relative * b.abs().max().item() + absolute
        assert error <= allowed, (error, allowed)

    near(mine[0], wide[0], 4e-6, rounding * rows)
    info = torch.finfo(mine[3].dtype)
    near(mine[3], wide[3], TOLERANCE[logits.dtype], rounding + info.smallest_normal * info.eps)
    if mine[1] is None:
        return
    near(mine[1], wide[1], 4e-6, 4 * rounding * logits.shape[0] * logits.shape[1])
    of_a_row = 8 * torch.finfo(mine[0].dtype).eps * largest
    for name in ("loss", "log_sum_exp", "p_target"):
        near(getattr(mine[2], name), getattr(wide[2], name), 4e-6, of_a_row)
    return mine, wide


def compare_cross_entropy(kernels, case, layout, options):
    logits, target = case
    target, keywords = arguments(options, logits, target)
    function = functools.partial(expert_loss, return_terms=True, return_rows=True)
    weight = (
        4.0 if options.reduction in ("none", "weighted_mean", "global_weighted_mean") else 8.0 / max(logits.shape[1], 1)
    )
    compare(function, kernels, logits, target, keywords, layout, weight)


def test_cross_entropy(kernels):
    sweep(
        compare_cross_entropy, kernels, count=50, case=logits_and_target(most=20_000), layout=LAYOUTS, options=OPTIONS
    )


def even(drawn, logits, target):
    """Two views of a whole number of images."""
    return (logits[:, : target.numel() // 2 * 2], target[: target.numel() // 2 * 2]) if drawn.teacher == "view" else (
        logits, target)  # fmt: skip


def weight_of(divergence, logits):
    rows = 1 if divergence["reduction"] == "gated_mean" else max(logits.shape[1] // 2, 1)
    return 4.0 * logits.shape[0] / rows


def compare_divergence(kernels, case, layout, drawn, seed, labelled, masked):
    logits, target = even(drawn, *case)
    divergence = divergence_arguments(drawn, logits, seed, kernels[0] == "cpu")
    gated = isinstance(divergence.get("gate"), str)
    if masked is not None:
        options = Options(*["none"] * 5, False, "none", False, 0.0, "mean", masked, seed)
        divergence |= {k: v for k, v in arguments(options, logits, target)[1].items() if k in ("class_mask", "masked")}
    target = target if gated or labelled else None
    compare(expert_kl, kernels, logits, target, divergence, layout, weight_of(divergence, logits))


def test_divergence(kernels):
    sweep(
        compare_divergence,
        kernels,
        count=50,
        case=logits_and_target(most=20_000),
        layout=LAYOUTS,
        drawn=DIVERGENCES,
        seed=st.integers(0, 1000),
        labelled=st.booleans(),
        masked=st.sampled_from([None, None, "zero", "exclude"]),
    )


def compare_both(kernels, case, layout, options, drawn):
    logits, target = even(drawn, *case)
    if drawn.gate == "right":  # whether a teacher is right must not depend on a rounding
        options = options._replace(bias="none", scale="none")
        drawn = drawn._replace(gate="none" if drawn.teacher == "mean" else "right")
    reduction = "mean" if options.reduction == "none" else options.reduction
    options = options._replace(labels_of_experts=False, reduction=reduction)
    target, keywords = arguments(options, logits, target)
    divergence = divergence_arguments(drawn, logits, options.seed, kernels[0] == "cpu")
    keywords["kl"] = ExpertKL(**divergence, adjusted=drawn.adjusted)
    function = functools.partial(expert_loss, return_terms=True, return_rows=True)
    compare(function, kernels, logits, target, keywords, layout, 8.0 + weight_of(divergence, logits))


def test_both_in_one_pass(kernels):
    sweep(
        compare_both,
        kernels,
        count=50,
        case=logits_and_target(most=20_000),
        layout=LAYOUTS,
        options=OPTIONS,
        drawn=DIVERGENCES,
    )
