"""The Triton kernels of the expert losses in Triton's interpreter, on the CPU.

Triton decides at its import whether it interprets, so the checks run in a separate process: there pytest collects
the functions of this file that are named ``check_``.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

# The interpreter computes in NumPy, which warns of the infinities and NaN that some checks are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
pytest.importorskip("triton", reason="needs Triton, which is not installed")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from triton_losses import LAYOUTS, blocks_of, lay_out  # noqa: E402

from shike_fast.kernels.losses import _batch, _rows  # noqa: E402
from shike_fast.kernels.losses.dkt import dkt_backward, dkt_forward  # noqa: E402
from shike_fast.ops import balanced_softmax_loss, dkt_loss, expert_cross_entropy  # noqa: E402
from shike_fast.ops.cross_entropy import fused_cross_entropy  # noqa: E402

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Everything is computed in float32; a low-precision gradient is rounded once. (The interpreter truncates to bfloat16,
# which compiled kernels round: hence 2⁻⁷ and not 2⁻⁸.)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
DEFAULTS = {
    "hardest_weight": 10.0,
    "mutual_weight": 1.0,
    "kl_reduction": "mean",
    "teacher_target_logit": 0.0,
    "student_target_logit": -30.0,
    "detach_teacher": False,
}


@pytest.mark.slow
def test_in_the_interpreter(interpret):
    interpret(__file__, [name for name in globals() if name.startswith("check_")])


def dkt(logits, target, grad_output=1.0, factors=None, **options):
    """Loss, terms and gradient of the kernels, which leave the divisor that ``kl_reduction`` names to their callers."""
    given = {**DEFAULTS, **options}
    divisor = logits[0].shape[-1] if given.pop("kl_reduction") == "mean" else 1
    arguments = (given.pop("hardest_weight") / divisor, given.pop("mutual_weight") / divisor, *given.values())
    loss, terms, state = dkt_forward(logits, target, factors, *arguments)
    assert loss.dtype == terms.dtype == state.dtype == torch.float32 and loss.shape == () and terms.shape == (3,)
    return loss, terms, dkt_backward(torch.tensor(grad_output), logits, target, factors, state, *arguments)


def cross_entropy(logits, target, bias=None, label_smoothing=0.0):
    """Loss and gradient [K, B, C] of the kernels, without the checks of the public function."""
    leaves = [one.detach().requires_grad_() for one in logits]
    loss = fused_cross_entropy("triton", leaves[0] if leaves[0].dim() == 3 else leaves, target, bias, label_smoothing)
    assert loss.dtype == torch.float32 and loss.shape == ()
    gradients = torch.autograd.grad(loss, leaves)
    return loss.detach(), gradients[0] if leaves[0].dim() == 3 else torch.stack(gradients)


def reference(function, logits, target, **options):
    """Loss, terms (of dkt_loss) and gradient of the reference in float64."""
    leaf = logits.double().requires_grad_()
    if function is dkt_loss:
        loss, terms = dkt_loss(leaf, target, return_terms=True, backend="reference", **options)
    else:
        loss, terms = expert_cross_entropy(leaf, target, backend="reference", **options), None
    loss.backward()
    return loss.detach(), terms, leaf.grad


def golden_cases():
    for name in ("dkt_loss_small", "dkt_loss"):
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
            cases = sorted({key.partition("/")[0] for key in archive.files})
        yield from (pytest.param(name, case, id=f"{name}-{case}") for case in cases)


@pytest.mark.parametrize(("name", "case"), list(golden_cases()))
def check_golden(name, case, golden):
    arrays = {key: torch.from_numpy(golden(name)[f"{case}/{key}"].copy()) for key in ("logits", "target")}
    recorded = {key.partition("/")[2]: value for key, value in golden(name).items() if key.startswith(f"{case}/")}
    logits, target = [arrays["logits"]], arrays["target"]
    log_counts = torch.from_numpy(recorded["class_counts"].copy()).float().log()
    stages = {"stage1": dkt(logits, target)[::2], "stage2": cross_entropy(logits, target, log_counts)}
    for stage, (loss, gradient) in stages.items():
        assert loss.item() == pytest.approx(recorded[f"{stage}_loss"].item(), rel=1e-5)
        expected = recorded[f"{stage}_grad"]
        assert np.abs(gradient.double().numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


@st.composite
def cases(draw):
    experts, batch, classes = draw(st.integers(1, 8)), draw(st.integers(1, 3)), draw(st.integers(2, 41))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "equal", "dominated"]))
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    logits = torch.randn(experts, batch, classes, generator=generator)
    if kind == "ties":  # few values, exact in every dtype and in every sum
        logits, scale = logits.round(), min(scale, 16.0)
    elif kind == "equal":
        logits = torch.ones_like(logits)
    elif kind == "dominated":
        logits[:, :, draw(st.integers(0, classes - 1))] += 8.0
    logits = (logits * scale).clamp(-1e4, 1e4).to(draw(st.sampled_from(DTYPES)))
    target = torch.randint(classes, (batch,), generator=generator)
    return logits, target, draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([None, 8, 16]))


@settings(max_examples=100)
@given(
    case=cases(),
    options=st.fixed_dictionaries(
        {
            "kl_reduction": st.sampled_from(["mean", "batchmean"]),
            "detach_teacher": st.booleans(),
            "hardest_weight": st.sampled_from([0.0, 10.0]),
            "mutual_weight": st.sampled_from([0.0, 1, 0.25]),
            "teacher_target_logit": st.sampled_from([0.0, -4.5, 50.0]),
            "student_target_logit": st.sampled_from([-30.0, 2.0]),
        }
    ),
)
def check_dkt(case, options):
    logits, target, layout, block = case
    arguments = lay_out(logits, layout)
    with blocks_of(block):
        loss, terms, gradient = dkt(arguments, target.repeat_interleave(2)[::2], **options)
    expected_loss, _, expected = reference(dkt_loss, logits, target, **options)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert layout not in ("transposed", "contiguous") or gradient.stride() == arguments[0].stride()
    assert "sequence" not in layout or gradient.is_contiguous()
    assert (options["hardest_weight"] != 0 or terms[1] == 0) and (options["mutual_weight"] != 0 or terms[2] == 0)
    torch.testing.assert_close(terms.sum(), loss)
    # A log-probability carries the rounding of its logits, eps · max |z|; the divergences multiply it by their weights.
    batch, classes = target.numel(), logits.shape[2]
    divisor = batch * (classes if options["kl_reduction"] == "mean" else 1)
    weight = (options["hardest_weight"] + options["mutual_weight"]) * 2 * logits.shape[0] / divisor + 1 / batch
    largest_logit = max(logits.double().abs().max().item(), abs(options["teacher_target_logit"]))
    rounding = 8 * torch.finfo(torch.float32).eps * (largest_logit + 30) * weight
    assert abs(loss - expected_loss) <= 2e-6 * abs(expected_loss) + rounding * batch
    smallest_subnormal = torch.finfo(gradient.dtype).smallest_normal * torch.finfo(gradient.dtype).eps
    error = (gradient.double() - expected).abs().max()
    assert error <= TOLERANCE[logits.dtype] * expected.abs().max() + rounding + smallest_subnormal


@settings(max_examples=50)
@given(
    case=cases(),
    bias_kind=st.sampled_from(["none", "shared", "per expert", "strided"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)
def check_cross_entropy(case, bias_kind, label_smoothing):
    logits, target, layout, block = case
    experts, _, classes = logits.shape
    bias = {
        "none": None,
        "shared": torch.linspace(-2, 3, classes),
        "per expert": torch.linspace(-2, 3, experts * classes).view(experts, classes),
        "strided": torch.linspace(-2, 3, experts * classes).view(classes, experts).t(),
    }[bias_kind]
    with blocks_of(block):
        loss, gradient = cross_entropy(lay_out(logits, layout), target, bias, label_smoothing)
    expected_loss, _, expected = reference(
        expert_cross_entropy, logits, target, bias=bias, label_smoothing=label_smoothing
    )
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    rounding = 8 * torch.finfo(torch.float32).eps * (logits.double().abs().max() + 3)
    assert abs(loss - expected_loss) <= 2e-6 * abs(expected_loss) + rounding * experts
    error = (gradient.double() - expected).abs().max()
    assert error <= TOLERANCE[logits.dtype] * expected.abs().max() + rounding + 1e-7


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
    for block in (None, 2):
        with blocks_of(block):
            loss, terms, gradient = dkt([logits], target)
        expected_loss, expected_terms, _ = reference(dkt_loss, logits, target)
        assert torch.isfinite(gradient).all()
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-5)
        torch.testing.assert_close(terms, expected_terms, rtol=1e-5, atol=1e-5)


def check_ties():
    # Classes 1 and 2 tie as the hardest negative; at class 3 all experts tie. The lowest class and expert win.
    logits = torch.tensor([[[9.0, 1.0, 2.0, -1.0]], [[9.0, 2.0, 1.0, -1.0]]])
    target, options = torch.tensor([0]), {"mutual_weight": 0.0, "kl_reduction": "batchmean"}
    for block in (4, 2):
        with blocks_of(block):
            _, terms, attached = dkt([logits], target, **options)
            _, _, detached = dkt([logits], target, detach_teacher=True, **options)
        _, expected_terms, _ = reference(dkt_loss, logits, target, **options)
        torch.testing.assert_close(terms, expected_terms)
        through_teacher = (attached - detached)[:, 0]
        assert through_teacher[0, 1] == through_teacher[1, 1] != 0  # the mean of the hardest negative, to all
        assert through_teacher[0, 2] != 0 == through_teacher[1, 2]
        assert through_teacher[0, 3] != 0 == through_teacher[1, 3]
        assert (through_teacher[:, 0] == 0).all()  # nothing flows to the target


def check_two_runs_are_identical():
    logits, target = torch.randn(3, 9, 37), torch.randint(37, (9,))
    with blocks_of(16):
        first, second = (dkt([logits], target) + cross_entropy([logits], target) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_incoming_gradient_scales():
    logits, target = torch.randn(3, 2, 7), torch.tensor([6, 2])
    _, _, gradient = dkt([logits], target)
    _, _, scaled = dkt([logits], target, grad_output=-2.5)
    torch.testing.assert_close(scaled, -2.5 * gradient)


@pytest.mark.parametrize("weights", [(7.5, 0.25), (-3.0, 1e-3), (0.0, 0.0)])
@pytest.mark.parametrize("block", [None, 16])
def check_factors_are_weights(weights, block):
    logits, target = [torch.randn(3, 4, 37)], torch.tensor([0, 36, 5, 5])
    factors = torch.tensor(weights, dtype=torch.float64)
    names = ("hardest_weight", "mutual_weight")
    with blocks_of(block):
        actual = dkt(logits, target, factors=factors, hardest_weight=1.0, mutual_weight=1.0)
        expected = dkt(logits, target, **dict(zip(names, weights, strict=True)))
        both = dkt(logits, target, factors=factors / 2, hardest_weight=2.0, mutual_weight=2.0)
        absent = [
            dkt(logits, target, factors=given, hardest_weight=0.0, mutual_weight=0.0) for given in (factors, None)
        ]
    for result in (actual, both):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(*absent, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [1, 32, 33, 1025, 10001])
def check_batch_of_many_programs(rows):
    values, total = torch.rand(rows), torch.empty(())
    end = _batch.batch_of(rows, 1, total.device)
    end.ticket.zero_()
    _sum_kernel[(end.programs,)](values, total, end.partials, end.ticket, rows)
    assert end.programs == end.ticket == -(-rows // 32)
    torch.testing.assert_close(total, values.double().sum().float(), rtol=1e-6, atol=1e-6)


@triton.jit
def _sum_kernel(values, total, partials, ticket, rows):
    row = tl.program_id(0) * _batch.ROWS + tl.arange(0, _batch.ROWS)
    last, sums = _batch.add_rows((tl.load(values + row, row < rows, 0.0),), partials, ticket)
    if last:
        tl.store(total, sums[0])


@pytest.mark.parametrize("sequence", [False, True])
def check_empty_batch(sequence):
    logits, target = torch.empty(3, 0, 7), torch.empty(0, dtype=torch.int64)
    arguments = list(logits.unbind(0)) if sequence else [logits]
    loss, terms, gradient = dkt(arguments, target)
    assert loss == 0 and terms.tolist() == [0, 0, 0] and gradient.shape == (3, 0, 7)
    loss, gradient = cross_entropy(arguments, target)
    assert loss == 0 and gradient.shape == (3, 0, 7)


@pytest.mark.parametrize("at", [(0, 0, 2), (2, 1, 0), (1, 0, 6)])  # row 0 has target 2, row 1 target 5
def check_nan_is_not_swallowed(at):
    logits, target = torch.randn(3, 2, 7), torch.tensor([2, 5])
    logits[at] = torch.nan
    for block in (8, 2):
        with blocks_of(block):
            for weights in ({}, {"hardest_weight": 0.0, "mutual_weight": 0.0}):
                loss, _, gradient = dkt([logits], target, **weights)
                assert loss.isnan() and gradient[at[0], at[1]].isnan().all()
            loss, gradient = cross_entropy([logits], target)
            assert loss.isnan() and gradient[at[0], at[1]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [None, 2])
def check_masked_classes(dtype, block):
    logits, target = torch.randn(2, 3, 7).to(dtype), torch.tensor([1, 6, 2])
    bias = torch.tensor([-torch.inf, 0.0, 1.0, -torch.inf, -torch.inf, -2.0, 0.5])
    masked_logits = (logits.double() + bias.double()).to(dtype)
    with blocks_of(block):
        loss, gradient = cross_entropy([logits], target, bias)
        loss_of_masked, gradient_of_masked = cross_entropy([masked_logits], target)
    for function_logits, options, actual, actual_gradient in (
        (logits, {"bias": bias}, loss, gradient),
        (masked_logits, {}, loss_of_masked, gradient_of_masked),
    ):
        expected_loss, _, expected = reference(expert_cross_entropy, function_logits, target, **options)
        assert actual.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        torch.testing.assert_close(actual_gradient, expected.to(dtype), rtol=2 * TOLERANCE[dtype], atol=1e-6)
        assert (actual_gradient[:, :, [0, 3, 4]] == 0).all()


def check_degenerate_rows():
    logits, bias = torch.zeros(1, 1, 4), torch.tensor([0.0, 0.0, -torch.inf, 0.0])
    loss, gradient = cross_entropy([logits], torch.tensor([2]), bias)  # a target that is masked out
    assert loss == torch.inf and torch.allclose(gradient, torch.tensor([1 / 3, 1 / 3, -1.0, 1 / 3]))
    loss, _ = cross_entropy([logits], torch.tensor([0]), bias, 0.1)
    assert loss == torch.inf
    loss, _ = cross_entropy([logits - torch.inf], torch.tensor([2]))
    assert loss.isnan()
    lowest = torch.full((1, 1, 4), torch.finfo(torch.float32).min)
    assert cross_entropy([lowest], torch.tensor([2]))[0].item() == pytest.approx(np.log(4), rel=1e-6)


@pytest.mark.parametrize("value", [-1, 7, 2**40, -(2**40)])
def check_target_out_of_range_writes_nothing_outside(value, monkeypatch):
    guarded = torch.full((5, 2, 7), 42.0)
    monkeypatch.setattr(_rows.Layout, "new_gradient", lambda _: guarded[1:4])
    logits, target = torch.randn(3, 2, 7), torch.tensor([3, value])
    loss, _, _ = dkt([logits], target)
    assert loss.isnan() and (guarded[[0, 4]] == 42.0).all() and torch.isfinite(guarded[1:4, 0]).all()
    loss, _ = cross_entropy([logits], target)
    assert loss.isnan() and (guarded[[0, 4]] == 42.0).all()


def check_experts_at_odd_distances_are_copied():
    buffers = [bytearray(4 * 14 + 2) for _ in range(2)]
    experts = [torch.frombuffer(memory, dtype=torch.float32, count=14, offset=0).view(2, 7) for memory in buffers]
    shifted = torch.frombuffer(buffers[1], dtype=torch.float32, count=14, offset=2).view(2, 7)
    for expert in (experts[0], shifted):
        expert.copy_(torch.randn(2, 7))
    arguments, target = [experts[0], shifted], torch.tensor([0, 4])
    torch.testing.assert_close(dkt(arguments, target)[2], dkt([torch.stack(arguments)], target)[2], rtol=0, atol=0)


def check_tiles():
    for experts in range(1, 9):
        for classes in (2, 3, 7, 10, 100, 1000, 8142, 65536):
            for widest in (1, 2, 4, 8):
                tile = _rows.choose_tile(classes, experts, widest)
                assert tile.vector in (1, 2, 4, 8) and tile.vector <= widest and experts * tile.vector <= 32
                assert tile.lanes in (32, 64, 128) and tile.warps == tile.lanes // 32
                assert classes >= 2 * tile.vector - 1  # a whole chunk, wherever the row starts
                assert tile.lanes == 32 or tile.lanes * tile.vector < 2 * classes
                for of_lane in (4, 5, 8, 16):
                    unroll, steps = tile.steps(classes, of_lane)
                    assert unroll & (unroll - 1) == 0
                    assert classes <= unroll * steps * tile.classes
                    assert unroll * tile.vector <= max(of_lane, tile.vector)
                    assert (steps - 1) * unroll * tile.classes < classes


OPS = {
    "dkt_loss": lambda logits, target, **kwargs: dkt_loss(logits, target, hardest_weight=5.0, **kwargs),
    "expert_cross_entropy": lambda logits, target, **kwargs: expert_cross_entropy(
        logits, target, bias=torch.linspace(-1, 1, 11), label_smoothing=0.1, **kwargs
    ),
    "balanced_softmax_loss": lambda logits, target, **kwargs: balanced_softmax_loss(
        logits, target, torch.arange(1, 12), **kwargs
    ),
}


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", OPS)
def check_ops(op, compiled, sequence):
    logits, target = torch.randn(3, 5, 11), torch.randint(11, (5,))
    results = []
    for backend in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        function = OPS[op]
        if compiled and backend == "triton":
            function = torch.compile(function, fullgraph=True, backend="aot_eager")
        loss = function(leaf.unbind(0) if sequence else leaf, target, backend=backend)
        (2.0 * loss).backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def check_a_schedule_of_weights_compiles_once():
    logits, target = torch.randn(3, 5, 11), torch.randint(11, (5,))
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=count)
    def compiled(logits, weight):
        return dkt_loss(logits, target, hardest_weight=weight, return_terms=True, backend="triton")

    for weight in (2.0, 3.0, 4.0, 5.5):
        actual = compiled(logits, weight)
        torch.testing.assert_close(actual, dkt_loss(logits, target, hardest_weight=weight, return_terms=True))
    assert len(compilations) <= 2  # the second time the weight turns out to vary
