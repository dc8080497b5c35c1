"""expert_loss and expert_kl on the reference, in float64: against PyTorch's losses a row at a time, and gradcheck."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from shike_fast import ops
from shike_fast.ops import ExpertKL, expert_kl, expert_loss

K, B, C = 3, 6, 5
REDUCTIONS = ("mean", "mean/K", "weighted_mean", "global_weighted_mean", "none")


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def uniform(*shape):
    return 0.2 + torch.rand(shape, dtype=torch.float64)


def loss_of(*args, **options):
    return expert_loss(*args, **options, backend="reference")


def kl_of(*args, **options):
    return expert_kl(*args, **options, backend="reference")


def agree(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


def of_expert(value, k):
    """The entry of expert k where there is one an expert."""
    return value[k] if value.dim() == 2 else value


TARGET = torch.tensor([0, 4, 2, 2, 1, 0])
SECOND = torch.tensor([0, 1, 2, 4, 3, 0])  # equal to the first here and there


@pytest.fixture
def kept():
    """A class mask with the labels among its classes; both views of an image have one mask."""
    mask = torch.zeros(B, C, dtype=torch.bool)
    for labels in (TARGET, SECOND, (TARGET + 1) % C):
        mask[torch.arange(B), labels] = True
    mask[: B // 2] |= mask[B // 2 :]
    mask[B // 2 :] = mask[: B // 2]
    assert not mask.all()
    return mask


# ---- the cross-entropy


def row_loss(z, label, *, scale, bias, margin, label_smoothing, kept, masked):
    """Of one expert and row."""
    x = z * scale + bias
    if kept is not None and masked == "zero":
        x = torch.where(kept, x, 0.0)
    x = x - margin * F.one_hot(label, C)
    if kept is not None and masked == "exclude":
        x, label = x[kept], kept[:label].sum()
    return F.cross_entropy(x, label, label_smoothing=label_smoothing)


def by_rows(
    z,
    target,
    *,
    scale=1.0,
    bias=None,
    margin=None,
    target_b=None,
    lam=None,
    label_smoothing=0.0,
    class_weight=None,
    sample_weight=None,
    expert_weight=None,
    reduction="mean",
    class_mask=None,
    masked="zero",
):
    """The whole loss in loops over labels, experts and rows."""
    one = torch.ones(C, dtype=torch.float64)
    scale, bias, margin = one * scale, 0 * one if bias is None else bias, 0 * one if margin is None else margin
    class_weight = one if class_weight is None else class_weight
    sample_weight = torch.ones(B) if sample_weight is None else sample_weight
    expert_weight = torch.ones(K) if expert_weight is None else expert_weight
    labels = [(target, 1.0)] if target_b is None else [(target, lam), (target_b, 1 - lam)]
    result = torch.zeros(K, B, dtype=torch.float64)
    for label, share in labels:
        rows, weights = torch.zeros(K, B, dtype=torch.float64), torch.zeros(K, B, dtype=torch.float64)
        for k, b in itertools.product(range(K), range(B)):
            y = of_expert(label, k)[b]
            weights[k, b] = of_expert(class_weight, k)[y] * of_expert(sample_weight, k)[b]
            rows[k, b] = row_loss(
                z[k, b],
                y,
                scale=of_expert(scale, k),
                bias=of_expert(bias, k),
                margin=of_expert(margin, k)[y],
                label_smoothing=label_smoothing,
                kept=None if class_mask is None else class_mask[b],
                masked=masked,
            )
        weighted = expert_weight[:, None] * weights
        if reduction == "weighted_mean":
            weighted = weighted / weights.sum(1, keepdim=True)
        elif reduction == "global_weighted_mean":
            weighted = weighted / weighted.sum()
        elif reduction != "none":
            weighted = weighted / (B * K if reduction == "mean/K" else B)
        result += share * weighted * rows
    return result if reduction == "none" else result.sum()


OPTIONS = {
    "plain": {},
    "bias": {"bias": normal(C)},
    "bias by expert, scale": {"bias": normal(K, C), "scale": 2.5},
    "scale by class": {"scale": uniform(C)},
    "scale by expert and class": {"scale": uniform(K, C), "bias": normal(C)},
    "margin": {"margin": 3 * uniform(C)},
    "margin by expert, scale": {"margin": uniform(K, C), "scale": 30.0},
    "label smoothing": {"label_smoothing": 0.1},
    "all is smoothing": {"label_smoothing": 1.0, "margin": uniform(C), "bias": normal(C)},
    "class weight": {"class_weight": uniform(C)},
    "weights by expert": {"class_weight": uniform(K, C), "sample_weight": uniform(K, B), "expert_weight": uniform(K)},
    "sample weight": {"sample_weight": uniform(B), "expert_weight": uniform(K) - 0.7},
    "a label an expert": {"target": torch.stack([TARGET, SECOND, TARGET.flip(0)]), "margin": uniform(C)},
    "two labels": {"target_b": SECOND, "lam": 0.3},
    "two labels by row": {
        **{"target_b": SECOND, "lam": torch.rand(B, dtype=torch.float64), "margin": uniform(C)},
        **{"label_smoothing": 0.2, "class_weight": uniform(C), "bias": normal(K, C)},
    },
    "two labels an expert": {
        **{"target": torch.stack([TARGET, SECOND, TARGET]), "target_b": torch.stack([SECOND, TARGET.flip(0), TARGET])},
        **{"lam": torch.tensor(0.6, dtype=torch.float64), "class_weight": uniform(K, C)},
    },
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", OPTIONS)
def test_against_rows(case, reduction):
    options = {"target": TARGET, **OPTIONS[case], "reduction": reduction}
    target, z = options.pop("target"), 3 * normal(K, B, C)
    agree(loss_of(z, target, **options), by_rows(z, target, **options))
    agree(loss_of(list(z), target, **options), by_rows(z, target, **options))


@pytest.mark.parametrize("masked", ["zero", "exclude", "partial"])
@pytest.mark.parametrize("case", ["plain", "two labels", "margin", "bias by expert, scale", "weights by expert"])
def test_masked_classes(kept, masked, case):
    z, options = 3 * normal(K, B, C), {**OPTIONS[case], "class_mask": kept, "masked": masked}
    agree(loss_of(z, TARGET, **options), by_rows(z, TARGET, **options))
    z.requires_grad_()
    loss_of(z, TARGET, **options).backward()
    assert ((z.grad == 0) == ~kept).all() if masked != "partial" else (z.grad != 0).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_one_expert_is_pytorch_s_loss(label_smoothing):
    z, weight = normal(1, B, C), uniform(C)
    mine = loss_of(z, TARGET, label_smoothing=label_smoothing)
    agree(mine, F.cross_entropy(z[0], TARGET, label_smoothing=label_smoothing))
    for reduction, theirs in (("weighted_mean", "mean"), ("global_weighted_mean", "mean"), ("none", "none")):
        mine = loss_of(z, TARGET, class_weight=weight, reduction=reduction).squeeze(0)
        agree(mine, F.cross_entropy(z[0], TARGET, weight=weight, reduction=theirs))


def test_soft_targets():
    z, soft = normal(K, B, C), uniform(B, C).softmax(1)
    agree(loss_of(z, TARGET, soft_target=soft), sum(F.cross_entropy(expert, soft) for expert in z))
    agree(loss_of(z, TARGET, soft_target=F.one_hot(TARGET, C)), loss_of(z, TARGET))
    weight, bias = uniform(C), normal(K, C)
    mine = loss_of(z, TARGET, soft_target=soft, class_weight=weight, bias=bias, reduction="none")
    agree(
        mine, torch.stack([weight[TARGET] * F.cross_entropy(z[k] + bias[k], soft, reduction="none") for k in range(K)])
    )


@pytest.mark.parametrize("kind", ["mean", "sum"])
def test_ensemble(kind):
    z, bias, margin, scale, weight = normal(K, B, C), normal(K, C), uniform(K, C), uniform(C), uniform(B)
    options = {"scale": scale, "sample_weight": weight, "reduction": "weighted_mean", "return_terms": True}
    of_experts = uniform(K)
    alone, _ = loss_of(z, TARGET, bias=bias, margin=margin, expert_weight=of_experts, **options)
    loss, terms = loss_of(
        z, TARGET, bias=bias, margin=margin, expert_weight=of_experts, ensemble=kind, ensemble_weight=0.7, **options
    )
    x, m = getattr(scale * z + bias[:, None], kind)(0), getattr(margin, kind)(0)
    rows = F.cross_entropy(x - m[TARGET, None] * F.one_hot(TARGET, C), TARGET, reduction="none")
    agree(loss, alone + 0.7 * (weight * rows).sum() / weight.sum())
    torch.testing.assert_close(terms, torch.stack([loss, torch.zeros(())]).float(), rtol=3e-7, atol=0)
    with_kl = loss_of(z, TARGET, bias=bias, ensemble=kind, kl=ExpertKL(weight=2.0))
    x = getattr(z + bias[:, None], kind)(0)
    agree(with_kl, loss_of(z, TARGET, bias=bias, kl=ExpertKL(weight=2.0)) + F.cross_entropy(x, TARGET))


def test_shared_values_count_for_every_expert_of_an_ensemble():
    z, bias, margin = normal(K, B, C), normal(C), uniform(C)
    for kind in ("mean", "sum"):
        shared = loss_of(z, TARGET, bias=bias, margin=margin, ensemble=kind)
        agree(shared, loss_of(z, TARGET, bias=bias.expand(K, C), margin=margin.expand(K, C), ensemble=kind))


@pytest.mark.parametrize("case", ["plain", "margin", "bias by expert, scale", "two labels by row", "weights by expert"])
def test_rows_and_terms(case):
    z, options = 3 * normal(K, B, C), OPTIONS[case]
    loss, terms, rows = loss_of(z, TARGET, **options, kl=ExpertKL(weight=0.5), return_terms=True, return_rows=True)
    unweighted = {name: value for name, value in options.items() if not name.endswith("weight")}
    agree(rows.loss, by_rows(z, TARGET, **unweighted, reduction="none"))
    bias, scale = options.get("bias", torch.zeros(C)), options.get("scale", 1.0)
    x = torch.stack([scale * z[k] + of_expert(bias, k) for k in range(K)])
    agree(rows.log_sum_exp, x.logsumexp(2))
    agree(rows.p_target, x.softmax(2)[:, torch.arange(B), TARGET])
    assert rows.correct.dtype == torch.bool and torch.equal(rows.correct, x.argmax(2) == TARGET)
    assert terms.dtype == torch.float32 and not terms.requires_grad and rows.loss.dtype == torch.float64
    cross_entropy = loss_of(z, TARGET, **options)
    agree(terms, torch.stack([cross_entropy, loss - cross_entropy]).float())
    again, alone = loss_of(z, TARGET, **options, kl=ExpertKL(weight=0.5), return_rows=True)
    agree(again, loss)
    assert isinstance(alone, ops.ExpertRows) and torch.equal(alone.loss, rows.loss)


# ---- the divergence


def divergence(student, teacher, temperature, eps=0.0, counts=None):
    """KL of one row, without the square of the temperature."""
    p, log_q = (teacher / temperature).softmax(0), (student / temperature).log_softmax(0)
    if eps == 0.0 and counts is None:
        return F.kl_div(log_q, p, reduction="sum")
    counts = torch.ones(C, dtype=torch.bool) if counts is None else counts
    return (torch.xlogy(p, p) - p * (log_q.exp() + eps).log())[counts].sum()


def pairs(z, teacher):
    """Teacher, student, their logits [rows, C] each, and the expert whose rows weights belong to by default."""
    for k in range(K):
        if isinstance(teacher, torch.Tensor):
            yield k, k, teacher[k] if teacher.dim() == 3 else teacher, z[k]
        elif teacher == "mean":
            yield k, k, z.mean(0), z[k]
        elif teacher == "view":
            yield k, k, z[k, : B // 2], z[k, B // 2 :]
        else:
            yield from ((j, k, z[j], z[k]) for j in range(K) if j != k)


def kl_by_rows(
    z,
    teacher="others",
    *,
    temperature=1.0,
    weight=1.0,
    gate=None,
    reduction="batchmean",
    weight_of="teacher",
    target=None,
    class_mask=None,
    masked="zero",
    eps=0.0,
    detach=None,
):
    """The whole divergence in loops over pairs and rows."""
    if class_mask is not None and masked == "zero":
        z = torch.where(class_mask, z, 0.0)
        teacher = torch.where(class_mask, teacher, 0.0) if isinstance(teacher, torch.Tensor) else teacher
    square = (temperature.mean() if isinstance(temperature, torch.Tensor) else temperature) ** 2
    result = torch.zeros((), dtype=torch.float64)
    for j, k, of_teacher, of_student in pairs(z, teacher):
        rows, who = len(of_teacher), j if weight_of == "teacher" else k
        weights = torch.as_tensor(weight, dtype=torch.float64)
        weights = (weights[who] if weights.dim() == 2 else weights).expand(rows)
        gates = torch.ones(rows, dtype=torch.float64)
        if isinstance(gate, torch.Tensor):
            gates = of_expert(gate, who).double()
        elif gate is not None:
            gates = (of_teacher.argmax(1) == target[:rows]).double()
        divisor = {"batchmean": rows, "mean": rows * C, "gated_mean": gates.sum()}[reduction]
        if divisor == 0:
            continue
        for b in range(rows):
            chosen = None if class_mask is None or masked == "zero" else class_mask[b]
            s, t = of_student[b], of_teacher[b]
            if masked == "exclude" and chosen is not None:
                one = divergence(s.where(chosen, s.new_tensor(-1e9)), t.where(chosen, t.new_tensor(-1e9)), temperature)
            else:
                one = divergence(s, t, temperature, eps, chosen)
            result = result + weights[b] * gates[b] * square * one / divisor
    return result


# Every other row is right, by far.
GIVEN = normal(B, C) + 9 * (torch.arange(B) % 2)[:, None] * F.one_hot(TARGET, C)
TEACHERS = {
    "others": "others",
    "mean": "mean",
    "view": "view",
    "given": GIVEN,
    "given by expert": GIVEN + normal(K, B, C),
}
KL_OPTIONS = {
    "plain": lambda rows: {},
    "mean": lambda rows: {"reduction": "mean", "temperature": 2.0},
    "temperature by class": lambda rows: {"temperature": uniform(C), "weight": -0.3},
    "weight by row": lambda rows: {"weight": uniform(rows) - 0.5},
    "weight by expert": lambda rows: {"weight": uniform(K, rows), "temperature": 0.5},
    "weight without dimensions": lambda rows: {"weight": torch.tensor(0.25)},
    "gate": lambda rows: {"gate": torch.arange(rows) % 3 != 0, "weight": uniform(rows)},
    "gated mean": lambda rows: {"gate": torch.rand(K, rows) > 0.4, "reduction": "gated_mean"},
    "gated mean of numbers": lambda rows: {"gate": uniform(rows), "reduction": "gated_mean", "temperature": uniform(C)},
    "a gate of 0": lambda rows: {"gate": torch.zeros(rows), "reduction": "gated_mean"},
    "right teachers": lambda rows: {"gate": "teacher_correct", "reduction": "gated_mean", "weight": uniform(K, rows)},
    "right teachers, mean": lambda rows: {"gate": "teacher_correct", "temperature": 1.5},
    "eps": lambda rows: {"eps": 1e-3, "weight": uniform(rows)},
}


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("case", KL_OPTIONS)
def test_divergence_against_rows(case, teacher):
    z, teacher = 2 * normal(K, B, C), TEACHERS[teacher]
    options = KL_OPTIONS[case](B // 2 if isinstance(teacher, str) and teacher == "view" else B)
    expected = kl_by_rows(z, teacher, **options, target=TARGET)
    agree(kl_of(z, teacher, **options, target=TARGET), expected)
    agree(kl_of(list(z), list(teacher) if torch.is_tensor(teacher) and teacher.dim() == 3 else teacher,
                **options, target=TARGET), expected)  # fmt: skip
    assert expected != 0 or case == "a gate of 0"


@pytest.mark.parametrize("case", ["weight by expert", "gated mean"])
def test_weights_of_students(case):
    z, options = normal(K, B, C), KL_OPTIONS[case](B)
    mine = kl_of(z, **options, weight_of="student")
    agree(mine, kl_by_rows(z, **options, weight_of="student"))
    assert not torch.isclose(mine, kl_of(z, **options))


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("masked", ["zero", "exclude", "partial"])
def test_divergence_of_masked_classes(teacher, masked, kept):
    z = 2 * normal(K, B, C)
    for options in ({}, {"temperature": 1.5, "weight": 0.4}):
        mine = kl_of(z, TEACHERS[teacher], **options, class_mask=kept, masked=masked)
        agree(mine, kl_by_rows(z, TEACHERS[teacher], **options, class_mask=kept, masked=masked))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_divergence_within_a_loss(teacher):
    z, teacher, bias, scale = normal(K, B, C), TEACHERS[teacher], normal(K, C), uniform(C)
    options = {"bias": bias, "scale": scale, "margin": uniform(C), "target_b": SECOND, "lam": 0.4}

    def adjusted(logits):
        return scale * logits + (bias[:, None] if logits.dim() == 3 else bias)

    for kl in ({"temperature": 2.0, "weight": -0.5}, {"gate": "teacher_correct", "reduction": "gated_mean"}):
        alone = loss_of(z, TARGET, **options)
        plain = loss_of(z, TARGET, **options, kl=ExpertKL(teacher, **kl, adjusted=False))
        agree(plain, alone + kl_of(z, teacher, **kl, target=TARGET))
        given = teacher if isinstance(teacher, str) else adjusted(teacher.expand(K, B, C))
        both = loss_of(z, TARGET, **options, kl=ExpertKL(teacher, **kl))
        agree(both, alone + kl_of(adjusted(z), given, **kl, target=TARGET))


@pytest.mark.parametrize("teacher", ["others", "mean", "view", "given"])
@pytest.mark.parametrize("detach", [None, False, True])
def test_who_gets_a_gradient(teacher, detach):
    """By the chain rule: the divergence of students from teachers that are, or are not, the same leaves."""
    z, given = normal(K, B, C).requires_grad_(), TEACHERS["given"].clone().requires_grad_()
    teacher = given if teacher == "given" else teacher
    constant = detach if detach is not None else teacher != "others" if isinstance(teacher, str) else True
    of_teacher = (z.detach(), given.detach()) if constant else (z, given)
    expected = torch.zeros((), dtype=torch.float64)
    rows = B // 2 if isinstance(teacher, str) and teacher == "view" else B
    other = of_teacher[1] if torch.is_tensor(teacher) else teacher
    for (*_, t, _), (*_, s) in zip(pairs(of_teacher[0], other), pairs(z, teacher), strict=True):
        expected = expected + F.kl_div(s.log_softmax(1), t.softmax(1), reduction="sum") / rows
    wanted = torch.autograd.grad(expected, (z, given), allow_unused=True)
    got = torch.autograd.grad(kl_of(z, teacher, detach=detach), (z, given), allow_unused=True)
    agree(got[0], wanted[0])
    assert (got[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        agree(got[1], wanted[1])
