"""The Triton kernels of the generalised expert loss in Triton's interpreter, on the CPU, by way of the operators.

Triton decides at its import whether it interprets, so the checks run in a separate process: there pytest collects
the functions of this file that are named ``check_``.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# The interpreter computes in NumPy, which warns of the infinities and NaN that some checks are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
pytest.importorskip("triton", reason="needs Triton, which is not installed")
from triton_losses import LAYOUTS, blocks_of, lay_out  # noqa: E402

from shike_fast.kernels.losses import _rows  # noqa: E402
from shike_fast.ops import ExpertKL, expert_kl, expert_loss  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Everything is computed in float32; a low-precision gradient is rounded once. (The interpreter truncates to bfloat16,
# which compiled kernels round: hence 2⁻⁷ and not 2⁻⁸.)
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
REDUCTIONS = ("mean", "mean/K", "weighted_mean", "global_weighted_mean", "none")


@pytest.mark.slow
def test_in_the_interpreter(interpret):
    interpret(__file__, [name for name in globals() if name.startswith("check_")])


def results(function, logits, backend, grad_output=1.7, **options):
    """The loss, the gradient [K, B, C], and what else the operator returns."""
    leaves = [one.detach().requires_grad_() for one in logits]
    answer = function(leaves[0] if leaves[0].dim() == 3 else leaves, backend=backend, **options)
    loss, *others = answer if isinstance(answer, tuple) else (answer,)
    scale = grad_output * torch.linspace(-0.5, 1.0, max(loss.numel(), 2), dtype=loss.dtype)
    (loss * scale[: loss.numel()].view(loss.shape) if loss.dim() else loss * grad_output).sum().backward()
    gradient = leaves[0].grad if leaves[0].dim() == 3 else torch.stack([leaf.grad for leaf in leaves])
    flat = [loss.detach(), gradient]
    for other in others:
        flat += [other] if isinstance(other, torch.Tensor) else list(other)
    return flat


def compare(function, logits, layout="contiguous", block=None, rounding=0.0, **options):
    """All results against the reference in float64; ``rounding`` is what the rounding of the logits' sums allows."""
    with blocks_of(block):
        mine = results(function, lay_out(logits, layout), "triton", **options)
    expected = results(function, [logits.double()], "reference", **options)
    assert mine[1].dtype == logits.dtype and mine[1].shape == logits.shape
    assert len(mine) == len(expected)
    for number, (got, exact) in enumerate(zip(mine, expected, strict=True)):
        if exact.dtype == torch.bool:
            assert torch.equal(got, exact)
            continue
        size = exact.abs().max() if exact.numel() else 0.0
        tolerance = TOLERANCE[logits.dtype] if number == 1 else TOLERANCE[torch.float32]
        subnormal = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
        assert torch.isfinite(got).all()
        error = (got.double() - exact).abs().max() if exact.numel() else 0.0
        assert error <= tolerance * size + rounding + subnormal, (number, float(error), float(size), rounding)
    return mine


# ---- all options together


def numbers(draw, low, high, *shapes):
    """None, or numbers of one of these shapes."""
    shape = draw(st.sampled_from([None, *shapes]))
    return None if shape is None else low + (high - low) * torch.rand(shape)


@st.composite
def losses(draw):
    """Logits, the options of ``expert_loss``, and the weight with which a rounded logit may count."""
    experts, images = draw(st.integers(1, 8)), draw(st.integers(1, 2))
    batch, classes = 2 * images - draw(st.integers(0, 1)), draw(st.integers(2, 41))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    by_class, by_row = ((classes,), (experts, classes)), ((batch,), (experts, batch))
    logits = torch.randn(experts, batch, classes) * draw(st.sampled_from([1e-3, 1.0, 3.0, 30.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    logits = logits.to(draw(st.sampled_from(DTYPES)))
    diverges, by_expert = draw(st.booleans()), draw(st.booleans())
    label_shape = (experts, batch) if by_expert and not diverges else (batch,)
    options = {
        "target": torch.randint(classes, label_shape),
        "bias": numbers(draw, -2.0, 2.0, *by_class),
        "margin": numbers(draw, 0.0, 2.0, *by_class),
        "class_weight": numbers(draw, 0.1, 2.0, *by_class),
        "sample_weight": numbers(draw, 0.1, 2.0, *by_row),
        "expert_weight": numbers(draw, 0.1, 2.0, (experts,)),
        "reduction": draw(st.sampled_from(REDUCTIONS[:-1] if diverges else REDUCTIONS)),
    }
    scale = numbers(draw, 0.5, 2.0, *by_class)
    options["scale"] = draw(st.sampled_from([1.0, 0.25])) if scale is None else scale
    second = draw(st.sampled_from([None, "others", "some equal"]))
    if second is not None:
        options["target_b"] = torch.randint(classes, label_shape)
        if second == "some equal":
            options["target_b"][..., 0] = options["target"][..., 0]
        options["lam"] = draw(st.sampled_from([0.3, 1.0, torch.tensor(0.6), torch.rand(batch)]))
    mask = draw(st.sampled_from([None, "zero", "exclude"]))
    if mask is None:
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    else:
        options["masked"], options["class_mask"] = mask, kept_classes(options, batch, classes, label_shape)
    weight = 1.0
    if diverges:
        options["kl"], weight = divergence(draw, experts, batch, classes)
    return logits, options, 8 * torch.finfo(torch.float32).eps * (80 if logits.abs().max() > 20 else 12) * weight


def kept_classes(options, batch, classes, label_shape):
    mask = torch.rand(batch, classes) < 0.4
    for name in ("target", "target_b"):
        if name in options:
            mask.scatter_(1, options[name].view(-1, batch).t(), True)
    if batch % 2 == 0:  # both views of an image keep the same classes
        mask = (mask[: batch // 2] | mask[batch // 2 :]).repeat(2, 1)
    return mask


def divergence(draw, experts, batch, classes):
    """Options of a divergence, and their weight."""
    view = batch % 2 == 0
    teacher = draw(st.sampled_from(["others", "mean", "given", "given by expert"] + ["view"] * view))
    rows = batch // 2 if teacher == "view" else batch
    of_rows = ((rows,), (experts, rows))
    low = torch.float64 if experts == 2 else torch.bfloat16
    options = {
        "teacher": teacher,
        "temperature": draw(st.sampled_from([1.0, 1.0, 2.5, torch.rand(classes) + 0.5])),
        "detach": draw(st.booleans()) if teacher == "others" else True,
        "weight": numbers(draw, -1.0, 1.0, (), *of_rows),
        "gate": draw(st.sampled_from([None, None, "teacher_correct", torch.rand(rows), torch.rand(experts, rows)])),
        "reduction": draw(st.sampled_from(["batchmean", "mean", "gated_mean"])),
        "weight_of": draw(st.sampled_from(["teacher", "student"])),
        "adjusted": draw(st.booleans()),
    }
    if teacher == "given":
        options["teacher"] = (2 * torch.randn(classes, batch)).t().to(low)
    elif teacher == "given by expert":
        options["teacher"] = (2 * torch.randn(experts, batch, classes + 1))[:, :, 1:]
    options["weight"] = 0.7 if options["weight"] is None else options["weight"]
    if isinstance(options["gate"], str) and teacher == "others":
        options["weight_of"] = "teacher"
    return ExpertKL(**options), 1.0 + 6 * experts


@settings(max_examples=50)
@given(case=losses(), layout=st.sampled_from(LAYOUTS), block=st.sampled_from([None, 8, 16]))
def check_expert_loss(case, layout, block):
    logits, options, rounding = case
    compare(expert_loss, logits, layout, block, rounding, return_terms=True, return_rows=True, **options)


@settings(max_examples=20)
@given(data=st.data(), layout=st.sampled_from(LAYOUTS), block=st.sampled_from([None, 8]))
def check_expert_kl(data, layout, block):
    experts, batch, classes = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4)), data.draw(st.integers(2, 41))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    logits = (3 * torch.randn(experts, batch, classes)).to(data.draw(st.sampled_from(DTYPES)))
    kl, weight = divergence(data.draw, experts, batch, classes)
    options = {name: getattr(kl, name) for name in ("temperature", "detach", "weight", "gate", "reduction")}
    options |= {"weight_of": kl.weight_of, "target": logits.float().sum(0).argmax(1)}
    if data.draw(st.booleans()):
        options["masked"] = data.draw(st.sampled_from(["zero", "exclude"]))
        options["class_mask"] = kept_classes(options, batch, classes, (batch,))
    if options["gate"] is None and data.draw(st.booleans()):
        options["target"] = None
    compare(expert_kl, logits, layout, block, 1e-5 * weight, teacher=kl.teacher, **options)


# ---- one thing each


def check_one_of_each():
    """Every teacher and every kind of tensor once, in few calls."""
    experts, batch, classes = 3, 4, 19
    logits, target = 3 * torch.randn(experts, batch, classes), torch.randint(classes, (batch,))
    second = torch.cat([target[:1], torch.randint(classes, (batch - 1,))])
    mask = torch.rand(2, classes).lt(0.5).repeat(2, 1)
    for labels in (target, second):
        mask[torch.arange(batch), labels] = mask[(torch.arange(batch) + 2) % batch, labels] = True
    by_class, by_expert = torch.rand(classes), torch.rand(experts, classes)
    seen = {"return_terms": True, "return_rows": True}
    calls = (
        {"bias": by_class, "label_smoothing": 0.1, "margin": by_expert, "kl": ExpertKL(gate="teacher_correct")},
        {"bias": by_expert, "target_b": second, "lam": torch.rand(batch), "kl": ExpertKL("mean", by_class + 0.5)},
        {"scale": by_class + 0.5, "class_mask": mask, "kl": ExpertKL("view", weight=torch.rand(experts, 2))},
        {"class_mask": mask, "masked": "exclude", "kl": ExpertKL(weight=torch.rand(3, 4), weight_of="student")},
        {"scale": 2.0, "kl": ExpertKL(torch.randn(batch, classes), temperature=2.0, adjusted=False)},
        {"reduction": "none", "class_weight": by_class, "target_b": second, "lam": 0.3},
    )
    for call in calls:
        compare(expert_loss, logits, target=target, rounding=2e-6, **call, **seen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["target high", "target low", "alternating", "experts disagree"])
def check_extreme_logits(dtype, pattern):
    logits = torch.full((3, 2, 5), -1e4)
    if pattern == "target high":
        logits[:, :, 0] = 1e4
    elif pattern == "target low":
        logits[:, :, 1:] = 1e4
    elif pattern == "alternating":
        logits[:, :, ::2] = 1e4
    else:
        for k in range(3):
            logits[k, :, k + 1] = 1e4
    logits, target = logits.to(dtype), torch.zeros(2, dtype=torch.int64)
    for block, teachers in ((None, ("others", "mean")), (2, ("others", "view"))):
        for teacher in teachers:
            options = {"target": target, "kl": ExpertKL(teacher), "return_terms": True}
            compare(expert_loss, logits, block=block, rounding=2e-2, **options)
        compare(expert_loss, logits, block=block, rounding=1e-6, target=target, return_rows=True)


@pytest.mark.parametrize("apart", [60.0, 1000.0])
@pytest.mark.parametrize("teacher", ["others", "mean"])
def check_experts_apart(teacher, apart):
    """Each has its own pivot: an expert far below the others loses nothing."""
    logits = 3 * torch.randn(3, 2, 37) + apart * torch.tensor([0.0, -1.0, 1.0])[:, None, None]
    for block in (None, 8):
        compare(expert_kl, logits, block=block, rounding=1e-6 * apart, teacher=teacher)


@pytest.mark.parametrize("kl", [None, ExpertKL(), ExpertKL("mean")])
def check_confident_experts(kl):
    """Where p[y] rounds to 1, the gradient at the label is the sum of the others, to full relative precision."""
    logits, target = torch.randn(2, 3, 11), torch.tensor([0, 10, 5])
    logits.scatter_add_(2, target.view(1, 3, 1).expand(2, -1, -1), torch.full((2, 3, 1), 25.0))
    options = {"target": target, "kl": kl, "return_rows": True}
    mine = results(expert_loss, [logits], "triton", **options)
    exact = results(expert_loss, [logits.double()], "reference", **options)
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=1e-5, atol=0)
    at_label = [one.double().gather(2, target.view(1, 3, 1).expand(2, -1, -1)) for one in (mine[1], exact[1])]
    torch.testing.assert_close(*at_label, rtol=2e-5, atol=0)


def check_ties_of_the_answer():
    """The lowest class of several is the answer, wherever the others lie."""
    for classes in (3, 11):
        logits = torch.zeros(1, classes, classes)  # each class is the target of a row
        logits[0, :, [0, classes - 1]] = 1.0
        target = torch.arange(classes)
        for block in (None, 4):
            for second in (None, target.flip(0)):
                options = {"target_b": second, "lam": None if second is None else 0.5}
                with blocks_of(block):
                    _, rows = expert_loss(logits, target, return_rows=True, backend="triton", **options)
                assert rows.correct.tolist() == [[True] + [False] * (classes - 1)]


@pytest.mark.parametrize("block", [None, 8])
def check_biases_of_minus_infinity(block):
    """The class has probability 0, to every expert, and its gradient is 0."""
    logits, target = torch.randn(2, 3, 17), torch.tensor([1, 16, 2])
    bias = torch.randn(17)
    bias[[0, 3, 15]] = -torch.inf
    for kl in (None, ExpertKL(), ExpertKL("mean"), ExpertKL(torch.randn(3, 17), 2.0)):
        mine = compare(expert_loss, logits, block=block, rounding=2e-6, target=target, bias=bias, kl=kl)
        assert (mine[1][:, :, [0, 3, 15]] == 0).all()


def check_two_labels_and_no_other_class():
    logits, target = torch.randn(3, 4, 2), torch.tensor([0, 1, 1, 0])
    options = {"target_b": 1 - target, "lam": 0.3, "label_smoothing": 0.1, "return_rows": True}
    for kl in (None, ExpertKL(), ExpertKL("view", 2.0), ExpertKL("mean")):
        compare(expert_loss, logits, rounding=1e-6, target=target, kl=kl, **options)
    mask = torch.zeros(4, 2, dtype=torch.bool).scatter_(1, target[:, None], True)
    compare(expert_loss, logits, target=target, class_mask=mask, masked="exclude", rounding=1e-6)


def check_degenerate_rows():
    logits, bias = torch.zeros(1, 1, 4), torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    masked_out = {"target": torch.tensor([2]), "bias": bias}
    loss, gradient = results(expert_loss, [logits], "triton", 1.0, **masked_out)
    assert loss == torch.inf and torch.allclose(gradient, torch.tensor([1 / 3, 1 / 3, -1.0, 1 / 3]))
    smoothed = {"target": torch.tensor([0]), "bias": bias, "label_smoothing": 0.1}
    assert results(expert_loss, [logits], "triton", **smoothed)[0] == torch.inf
    assert results(expert_loss, [logits - torch.inf], "triton", target=torch.tensor([2]))[0].isnan()


@pytest.mark.parametrize("sequence", [False, True])
def check_empty_batch(sequence):
    logits, target = torch.empty(3, 0, 7), torch.empty(0, dtype=torch.int64)
    arguments = list(logits.unbind(0)) if sequence else [logits]
    options = {"kl": ExpertKL(), "return_terms": True, "return_rows": True, "class_weight": torch.ones(7)}
    loss, gradient, terms, *rows = results(expert_loss, arguments, "triton", target=target, **options)
    assert loss == 0 and terms.tolist() == [0, 0] and gradient.shape == (3, 0, 7)
    assert all(row.shape == (3, 0) for row in rows)
    loss, gradient = results(expert_loss, arguments, "triton", target=target, reduction="none")
    assert loss.shape == (3, 0) and gradient.shape == (3, 0, 7)


@pytest.mark.parametrize("at", [(0, 0, 2), (2, 1, 0), (1, 0, 6)])  # row 0 has target 2, row 1 target 5
@pytest.mark.parametrize("kl", [None, ExpertKL(), ExpertKL("mean"), ExpertKL(temperature=2.0)])
def check_nan_is_not_swallowed(at, kl):
    logits, target = torch.randn(3, 2, 7), torch.tensor([2, 5])
    logits[at] = torch.nan
    for block in (8, 2):
        with blocks_of(block):
            loss, gradient = results(expert_loss, [logits], "triton", target=target, kl=kl)
        assert loss.isnan() and gradient[at[0], at[1]].isnan().all()


@pytest.mark.parametrize("value", [-1, 7, 2**40, -(2**40)])
def check_target_out_of_range_writes_nothing_outside(value, monkeypatch):
    from shike_fast.ops import _expert_fused
    from shike_fast.ops._triton_expert import expert_backward, expert_forward

    calls = []
    monkeypatch.setattr(_expert_fused._FUSED, "forward", lambda *args: calls.append(args) or expert_forward(*args[:-1]))
    logits, target = torch.randn(3, 2, 7), torch.tensor([3, 6])
    expert_loss(logits, target, margin=torch.ones(7), kl=ExpertKL(), backend="triton")
    guarded = torch.full((5, 2, 7), 42.0)
    monkeypatch.setattr(_rows.Layout, "new_gradient", lambda _: guarded[1:4])
    target[1] = value  # past the check of the operator, as on a GPU
    (_, _, *others, _), count = calls[0], 13
    loss, _, _, saved = expert_forward([logits], target, *others)
    expert_backward(torch.ones(()), [logits], target, *others[:count], saved, *others[count:])
    assert loss.isnan() and (guarded[[0, 4]] == 42.0).all() and torch.isfinite(guarded[1:4, 0]).all()


def check_two_runs_are_identical():
    logits, target = torch.randn(2, 34, 11), torch.randint(11, (34,))
    options = {"target": target, "kl": ExpertKL(weight=torch.rand(2, 34)), "return_terms": True, "return_rows": True}
    with blocks_of(8):
        first, second = (results(expert_loss, [logits], "triton", **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_labels_and_tensors_of_any_strides():
    logits = torch.randn(3, 4, 19)
    target, second = torch.randint(19, (4, 3)).t(), torch.randint(19, (3, 8))[:, ::2]
    mask = torch.rand(19, 4).lt(0.5).t()
    mask = mask | torch.zeros_like(mask).scatter(1, torch.cat([target, second]).t(), True)
    compare(expert_loss, logits, target=target, target_b=second, lam=0.4, class_mask=mask, return_rows=True)
    teacher = torch.randn(19, 3, 4).permute(1, 2, 0)
    compare(expert_kl, logits, teacher=teacher, weight=torch.rand(4, 3).t(), class_mask=mask, rounding=2e-6)
    compare(expert_loss, logits, target=target, margin=torch.rand(19, 3).t(), bias=torch.rand(3, 38)[:, ::2])


def check_an_expanded_grad_output():
    logits, target = torch.randn(3, 4, 19), torch.randint(19, (4,))
    gradients = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        expert_loss(leaf, target, reduction="none", backend=backend).sum(0).mean().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def check_ops(compiled, sequence):
    logits, target = torch.randn(3, 4, 11), torch.randint(11, (4,))

    def function(logits, target, backend):
        loss, terms, rows = expert_loss(
            *(logits, target),
            bias=torch.linspace(-1, 1, 11),
            sample_weight=torch.linspace(0, 1, 4),
            kl=ExpertKL("view"),
            **{"return_terms": True, "return_rows": True, "backend": backend},
        )
        return loss + expert_kl(logits, gate="teacher_correct", target=target, backend=backend), terms, rows

    answers = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        call = function
        if compiled and backend == "triton":
            call = torch.compile(function, fullgraph=True, backend="aot_eager")
        loss, terms, rows = call(leaf.unbind(0) if sequence else leaf, target, backend)
        (2.0 * loss).backward()
        answers.append((loss.detach(), leaf.grad, terms, *rows))
    torch.testing.assert_close(*answers, rtol=1e-5, atol=1e-6)
