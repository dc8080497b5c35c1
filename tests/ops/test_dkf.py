"""dkf_pool and dkf_bn_pool against their composition, torch.nn.BatchNorm2d and the closed-form gradients."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shike_fast.ops import dkf_bn_pool, dkf_pool

OP = "dkf_pool"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def maps(shape=(4, 6, 5, 3), dtype=torch.float64, device="cpu"):
    return tuple(torch.randn(shape, dtype=torch.float64).to(device, dtype) for _ in range(2))


def closed_form(deep, x, gamma, beta, g, eps, relu):
    """f [B, C] and the derivatives of Σ g·f with respect to deep, x, γ and β in training, in NumPy."""
    positions = deep.shape[2] * deep.shape[3]
    n = deep.shape[0] * positions
    column = (None, slice(None), None, None)
    mean, sigma = x.mean((0, 2, 3)), np.sqrt(x.var((0, 2, 3)) + eps)
    normalised = (x - mean[column]) / sigma[column]
    affine = gamma[column] * normalised + beta[column]
    mask = (affine > 0) if relu else np.ones_like(affine)
    m1, m2 = (mask * deep * normalised).sum((2, 3)), (mask * deep).sum((2, 3))
    f = (gamma * m1 + beta * m2) / positions
    d_gamma, d_beta = (g * m1).sum(0) / positions, (g * m2).sum(0) / positions
    upstream = g[:, :, None, None] / positions * mask
    d_deep = upstream * affine
    d_x = (gamma / sigma)[column] * (upstream * deep - d_beta[column] / n - normalised * d_gamma[column] / n)
    return f, d_deep, d_x, d_gamma, d_beta


@pytest.mark.parametrize("relu", [False, True])
def test_closed_form(relu, device, backend):
    deep, shallow = maps(device=device)
    gamma, beta = (torch.randn(6, dtype=torch.float64, device=device) for _ in range(2))
    leaves = [t.requires_grad_() for t in (deep, shallow, gamma, beta)]
    f = dkf_bn_pool(*leaves, None, None, training=True, eps=1e-3, relu=relu, backend=backend)
    g = torch.randn_like(f)
    actual = [f, *torch.autograd.grad(f, leaves, g)]
    expected = closed_form(*(t.detach().cpu().numpy() for t in (*leaves, g)), 1e-3, relu)
    for mine, theirs in zip(actual, expected, strict=True):
        assert np.abs(mine.detach().cpu().numpy() - theirs).max() <= 1e-12 * np.abs(theirs).max()


@st.composite
def cases(draw):
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 9)), draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    training = draw(st.booleans())
    if training and shape[0] * shape[2] * shape[3] == 1:
        shape = (2, *shape[1:])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    deep, shallow = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    kind = draw(st.sampled_from(["normal", "large mean", "constant channel"]))
    if kind == "large mean":
        shallow += 30.0
    elif kind == "constant channel":
        shallow[:, 0] = 2.0
    dtype = draw(st.sampled_from(DTYPES))
    vectors = [
        torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5 if draw(st.booleans()) else None
        for _ in range(2)
    ]
    options = {"training": training, "relu": draw(st.booleans()), "momentum": draw(st.sampled_from([0.1, 0.0, 1]))}
    layout = draw(st.sampled_from(["contiguous", "channels last", "strided", "mixed"]))
    return deep.to(dtype), shallow.to(dtype), vectors, options, layout


def lay_out(deep, shallow, layout):
    if layout == "channels last":
        return deep.to(memory_format=torch.channels_last), shallow.to(memory_format=torch.channels_last)
    if layout == "strided":
        return deep.repeat_interleave(2, 3)[..., ::2], shallow.transpose(0, 3).contiguous().transpose(0, 3)
    if layout == "mixed":
        return deep.to(memory_format=torch.channels_last), shallow
    return deep, shallow


@settings(max_examples=120)
@given(cases())
def test_equals_its_composition(case):
    deep, shallow, vectors, options, layout = case
    dtype, channels = deep.dtype, deep.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    vectors = [None if vector is None else vector.to(wide).requires_grad_() for vector in vectors]
    running = [torch.full((channels,), 0.25, dtype=wide), torch.full((channels,), 1.5, dtype=wide)]
    leaves = [t.detach().requires_grad_() for t in lay_out(deep, shallow, layout)]
    f = dkf_bn_pool(*leaves, *vectors, *running, **options)
    inputs = [*leaves, *(vector for vector in vectors if vector is not None)]
    gradients = torch.autograd.grad(f.sum(), inputs)
    assert f.shape == deep.shape[:2] and f.dtype == dtype

    # The same in float64 from the same rounded inputs.
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact_vectors = [None if vector is None else vector.detach().double().requires_grad_() for vector in vectors]
    exact_running = [torch.full((channels,), 0.25).double(), torch.full((channels,), 1.5).double()]
    momentum, training = options["momentum"], options["training"]
    normalised = F.batch_norm(exact_leaves[1], *exact_running, *exact_vectors, training, momentum)
    exact = dkf_pool(exact_leaves[0], normalised.relu() if options["relu"] else normalised)
    exact_inputs = [*exact_leaves, *(vector for vector in exact_vectors if vector is not None)]
    expected_gradients = torch.autograd.grad(exact.sum(), exact_inputs)

    tolerance = TOLERANCE[dtype]
    # float32 statistics of values around 30 carry a rounding of 30·eps, divided by the standard deviation, which is
    # as small as sqrt(eps) for a constant channel.
    slack = 0.0 if dtype == torch.float64 else 2e-4
    assert (f.double() - exact).abs().max() <= tolerance * exact.abs().max() + slack
    for mine, theirs, leaf in zip(gradients, expected_gradients, inputs, strict=True):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        assert torch.isfinite(mine).all()
        if shallow[:, 0].unique().numel() > 1:  # else γ/σ = 1/sqrt(eps) magnifies pure rounding in d(shallow)
            assert (mine.double() - theirs).abs().max() <= 2 * tolerance * theirs.abs().max() + 5 * slack
    for mine, theirs in zip(running, exact_running, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pool(dtype, device, backend):
    deep, shallow = maps((3, 5, 4, 7), dtype, device)
    leaves = [deep.requires_grad_(), shallow.to(memory_format=torch.channels_last).requires_grad_()]
    f = dkf_pool(*leaves, backend=backend)
    g = torch.randn_like(f)
    d_deep, d_shallow = torch.autograd.grad(f, leaves, g)
    wide_deep, wide_shallow, wide_g = deep.detach().double(), shallow.detach().double(), g.double()[:, :, None, None]
    assert f.dtype == d_deep.dtype == d_shallow.dtype == dtype
    for mine, theirs in (
        (f, (wide_deep * wide_shallow).mean((2, 3))),
        (d_deep, wide_g * wide_shallow / 28),
        (d_shallow, wide_g * wide_deep / 28),
    ):
        assert (mine.double() - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def test_low_precision_is_accumulated_in_float32():
    # In float16 the sum of the products would overflow, and each product of 300 · 300 as well.
    deep = shallow = torch.full((1, 2, 8, 8), 300.0, dtype=torch.float16)
    shallow = shallow.clone()
    shallow[:, :, ::2] = -300.0
    shallow[0, 0, 1, 1] = 300.0 - 64.0
    f = dkf_pool(deep, shallow)
    assert f.dtype == torch.float16 and f.tolist() == [[-300.0, 0.0]]


@pytest.mark.parametrize(
    ("deep_dtype", "shallow_dtype", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mixed_dtypes_are_promoted(deep_dtype, shallow_dtype, result):
    deep, shallow = maps()
    leaves = [deep.to(deep_dtype).requires_grad_(), shallow.to(shallow_dtype).requires_grad_()]
    wide = [leaf.detach().to(result) for leaf in leaves]
    for op in (dkf_pool, lambda *pair: dkf_bn_pool(*pair, None, None, None, None, training=True)):
        f = op(*leaves)
        assert f.dtype == result
        torch.testing.assert_close(f.detach(), op(*wide))
        assert [gradient.dtype for gradient in torch.autograd.grad(f.sum(), leaves)] == [deep_dtype, shallow_dtype]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_follows_batch_norm_2d(dtype, relu, device, backend):
    """Three steps of training and one of evaluation; running statistics bit by bit, also as a cumulative average."""
    for momentum in (0.1, 1.0, None):
        theirs = torch.nn.BatchNorm2d(6, momentum=momentum, dtype=dtype, device=device)
        torch.nn.init.normal_(theirs.weight)
        torch.nn.init.normal_(theirs.bias)
        mine = copy.deepcopy(theirs)
        for step in range(4):
            training = step < 3
            theirs.train(training)
            deep, shallow = maps(dtype=dtype, device=device)
            normalised = theirs(shallow)
            expected = (deep * (normalised.relu() if relu else normalised)).mean((2, 3))
            f = dkf_bn_pool(
                deep,
                shallow,
                mine.weight,
                mine.bias,
                mine.running_mean,
                mine.running_var,
                training=training,
                momentum=1 / (step + 1) if momentum is None else momentum,
                relu=relu,
                backend=backend,
            )
            torch.testing.assert_close(f, expected)
            if backend == "reference":
                assert torch.equal(mine.running_mean, theirs.running_mean)
                assert torch.equal(mine.running_var, theirs.running_var)
            torch.testing.assert_close(mine.running_mean, theirs.running_mean)
            torch.testing.assert_close(mine.running_var, theirs.running_var)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_module(dtype):
    """A network converted as a whole: γ, β and the running statistics in low precision too."""
    deep, shallow = maps(dtype=dtype)
    module = torch.nn.BatchNorm2d(6, dtype=dtype)
    statistics = module.running_mean.clone(), module.running_var.clone()
    expected = module(shallow)
    f = dkf_bn_pool(deep, shallow, module.weight, module.bias, *statistics, training=True)
    f.sum().backward()
    assert f.dtype == dtype and module.weight.grad.dtype == dtype and statistics[0].dtype == dtype
    exact = (deep.double() * expected.double()).mean((2, 3))
    assert (f.double() - exact).abs().max() <= 4 * TOLERANCE[dtype] * exact.abs().max()
    tolerance = {"rtol": 2 * TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(statistics[0], module.running_mean, **tolerance)
    torch.testing.assert_close(statistics[1], module.running_var, **tolerance)


def test_low_precision_is_not_rounded_before_the_product():
    deep, shallow = maps((8, 4, 7, 7), torch.bfloat16)
    exact = dkf_bn_pool(deep.double(), shallow.double(), None, None, None, None, training=True)
    fused = dkf_bn_pool(deep, shallow, None, None, None, None, training=True)
    assert torch.equal(fused, exact.to(torch.bfloat16))


def test_large_mean():
    deep, shallow = maps((16, 4, 7, 7))
    case = (shallow + 1e4).float()
    exact = dkf_bn_pool(deep, case.double(), None, None, None, None, training=True)
    mine = dkf_bn_pool(deep.float(), case, None, None, None, None, training=True)
    eager = (deep.float() * F.batch_norm(case, None, None, training=True)).mean((2, 3))
    error, eager_error = (mine - exact).abs().max(), (eager - exact).abs().max()
    assert error <= eager_error and error < 1e-2


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_gradcheck(training, relu, affine):
    deep, shallow = (t.requires_grad_() for t in maps((3, 2, 2, 3)))
    weight = torch.randn(2, dtype=torch.float64, requires_grad=True) if affine in ("both", "weight") else None
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True) if affine in ("both", "bias") else None
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def f(deep, shallow, weight, bias):
        return dkf_bn_pool(deep, shallow, weight, bias, mean.clone(), var.clone(), training=training, relu=relu)

    assert torch.autograd.gradcheck(f, (deep, shallow, weight, bias))


def test_gradcheck_of_pool():
    assert torch.autograd.gradcheck(dkf_pool, tuple(t.requires_grad_() for t in maps((2, 3, 2, 2))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype, device, backend):
    deep, shallow = maps(dtype=torch.float32, device=device)
    for case in ((deep, shallow), (deep.double(), shallow.double()), (deep.to(dtype), shallow.to(dtype))):
        f = dkf_bn_pool(*case, None, None, None, None, training=True, relu=True, backend=backend)
        pooled = dkf_pool(*case, backend=backend)
        with torch.autocast(device.type, dtype=dtype):
            other = dkf_bn_pool(*case, None, None, None, None, training=True, relu=True, backend=backend)
            assert torch.equal(f, other) and torch.equal(pooled, dkf_pool(*case, backend=backend))


def test_empty_batch():
    deep, shallow = (t.requires_grad_() for t in maps((0, 3, 2, 2), torch.float32))
    mean, var = torch.zeros(3), torch.ones(3)
    for training in (True, False):
        f = dkf_bn_pool(deep, shallow, torch.ones(3), torch.zeros(3), mean, var, training=training)
        assert f.shape == (0, 3)
        f.sum().backward()
    assert dkf_pool(deep, shallow).shape == (0, 3)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))
    assert deep.grad.shape == (0, 3, 2, 2)


def test_one_value_per_channel_raises_what_batch_norm_raises():
    deep = torch.zeros(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        torch.nn.BatchNorm2d(3)(deep)
    with pytest.raises(ValueError) as mine:
        dkf_bn_pool(deep, deep, None, None, None, None, training=True)
    assert str(mine.value) == f"dkf_bn_pool: {theirs.value}"
    evaluated = dkf_bn_pool(deep, deep, None, None, torch.zeros(3), torch.ones(3), training=False)
    assert evaluated.shape == (1, 3)
