"""The CUDA kernels' split of a row over threads and blocks, and their order of reduction, emulated on the CPU."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shike_fast.ops import dkt_loss
from shike_fast.ops._native import native

GROUPS = (8, 16, 32, 64, 128, 256, 512, 1024)


def emulate(logits, target, *, group, splits, shift=0, hardest_weight=1.0, mutual_weight=1.0, detach_teacher=False):
    """Terms [B, 3] without weights and saved [B, 5K + 4]; the divergences have the weights of "batchmean"."""
    experts, batch, _ = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    saved, terms = torch.full((batch, 5 * experts + 4), torch.nan), torch.full((batch, 3), torch.nan)
    native().emulate_dkt_forward(
        dtype=0,
        shape=logits.shape,
        logits=[logits],
        target=target,
        saved=saved,
        factors=None,
        hardest_weight=hardest_weight / batch,
        mutual_weight=mutual_weight / batch,
        teacher_target_logit=0.0,
        student_target_logit=-30.0,
        detach_teacher=detach_teacher,
        group=group,
        splits=splits,
        shift=shift,
        terms=terms,
    )
    return terms, saved


def check(logits, target, *, group, splits, shift=0, detach_teacher=False):
    terms, saved = emulate(logits, target, group=group, splits=splits, shift=shift, detach_teacher=detach_teacher)
    experts, batch, classes = logits.shape
    eps = torch.finfo(torch.float32).eps
    for b in range(batch):
        row, y = logits[:, b], int(target[b])
        leaf = row.double().unsqueeze(1).requires_grad_()
        loss, expected = dkt_loss(
            leaf,
            target[b : b + 1],
            hardest_weight=1.0,
            mutual_weight=1.0,
            kl_reduction="batchmean",
            detach_teacher=detach_teacher,
            return_terms=True,
            backend="reference",
        )
        loss.backward()
        # A log-probability carries the rounding of its logits, eps · max |z|.
        rounding = 8 * eps * (float(row.abs().max()) + 30) * experts
        torch.testing.assert_close(terms[b], expected, rtol=4e-6, atol=rounding)

        others = np.delete(np.arange(classes), y)
        assert torch.equal(saved[b, :experts], row[:, others].amax(1))
        total = row[0].clone()
        for expert in row[1:]:
            total = total + expert
        assert saved[b, -1] == others[total[others].argmax()]  # the lowest of tied classes
        expected_gradient = leaf.grad[:, 0, y].float() / batch
        gradient_rounding = 2 * rounding / batch + 4e-6 * float(leaf.grad.abs().max()) / batch
        torch.testing.assert_close(
            saved[b, 4 * experts : 5 * experts], expected_gradient, rtol=4e-6, atol=gradient_rounding
        )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("experts", range(1, 9))
def test_every_group(experts, group):
    logits = 3 * torch.randn(experts, 2, 1501)
    target = torch.randint(1501, (2,))
    for splits in (1, 3):
        check(logits, target, group=group, splits=splits, shift=experts % 4)


@st.composite
def rows(draw):
    experts, classes = draw(st.integers(1, 8)), draw(st.integers(2, 400))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["normal", "ties", "equal", "dominated", "target dominates", "ramp"]))
    logits = torch.randn(experts, 2, classes, generator=generator)
    target = torch.randint(classes, (2,), generator=generator)
    scale = draw(st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
    if kind == "ties":
        logits, scale = logits.round(), 1.0
    elif kind == "equal":
        logits = torch.ones_like(logits)
    elif kind == "dominated":
        logits[:, :, draw(st.integers(0, classes - 1))] += 8.0
    elif kind == "target dominates":
        logits[:, torch.arange(2), target] += 8.0
    elif kind == "ramp":  # every chunk moves the pivots and replaces the hardest negative
        logits = logits * 0.1 + torch.linspace(0, 4, classes)
    return (logits * scale).contiguous(), target


@settings(max_examples=150)
@given(rows(), st.sampled_from(GROUPS), st.integers(1, 32), st.integers(0, 7), st.booleans())
def test_any_row(row, group, splits, shift, detach_teacher):
    logits, target = row
    check(logits, target, group=group, splits=splits, shift=shift, detach_teacher=detach_teacher)


@pytest.mark.parametrize("group", GROUPS)
def test_tie_of_distant_classes_is_the_lowest(group):
    logits = torch.zeros(3, 1, 3000)
    for low, high in [(5, 2999), (1023, 1024), (7, 8), (40, 2048), (255, 2600)]:
        case = logits.clone()
        case[:, 0, [low, high]] = 2.0
        case[1, 0, low] += 1.0  # other logits, the same sum
        case[2, 0, low] -= 1.0
        for splits in (1, 2, 7):
            check(case, torch.tensor([0]), group=group, splits=splits, shift=3)


def test_terms_that_are_off_are_zero():
    logits, target = torch.randn(3, 2, 100), torch.tensor([1, 99])
    terms, saved = emulate(logits, target, group=8, splits=1, hardest_weight=0.0, mutual_weight=0.0)
    assert (terms[:, 0] > 0).all() and (terms[:, 1:] == 0).all() and torch.isfinite(saved).all()
    logits[0, :, 5] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits.transpose(0, 1).reshape(6, 100), target.repeat_interleave(3))
    terms, _ = emulate(logits, target, group=16, splits=2, hardest_weight=0.0, mutual_weight=0.0)
    torch.testing.assert_close(terms[:, 0].sum() / 6, expected)


@pytest.mark.parametrize("experts", [3, 8])
@pytest.mark.parametrize("group", [8, 64])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_each_class_has_one_thread(experts, group, splits):
    for classes, shift in itertools.product((2, 7, 8, 9, 100, 1001), range(8 if experts == 3 else 4)):
        visited, served = native().classes_of_threads(experts, classes, shift, group, splits)
        assert all(len(threads) == 1 for threads in visited)
        assert visited == served


@settings(max_examples=300)
@given(st.integers(1, 8), st.integers(1, 2**22), st.integers(2, 2**16), st.sampled_from([20, 132, 170]), st.booleans())
def test_plan(experts, rows, classes, processors, reducing):
    group, rows_of_block, splits = native().block_plan(experts, rows, classes, processors, reducing)
    threads = group * rows_of_block
    assert group & (group - 1) == 0 and 8 <= group <= 256
    assert threads % 32 == 0 and 32 <= threads <= 256
    assert 1 <= splits <= 32 and (splits == 1 or (rows_of_block == 1 and group == 256))
    assert -(-rows // rows_of_block) * splits < 2**31
    chunk = 8 if experts <= 4 else 4
    assert group * splits * chunk <= 4 * max(classes, 16)  # few threads without work


def test_plan_of_known_sizes():
    assert native().block_plan(3, 128, 100, 132, True) == [16, 2, 1]  # a class has its own thread; all processors work
    assert native().block_plan(3, 4096, 8142, 132, True) == [64, 2, 1]
    assert native().block_plan(3, 4, 65536, 132, True)[2] > 1
