"""The kernels of depth-wise knowledge fusion against the float64 reference: shapes, values, layouts, options."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shike_fast.ops import BatchNormArguments, dkf_bn_pool, dkf_experts, dkf_pool

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of the sum of the absolute values of what is added up; a low-precision result is rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LAYOUTS = ("channels last", "contiguous", "strided", "mixed", "unaligned")
EPS, RUNNING = 1e-5, (0.25, 1.5)


class Case(NamedTuple):
    """K experts in float64, as values that the dtype can hold; vectors in float32 values."""

    deep: list[torch.Tensor]
    shallow: list[torch.Tensor]
    shortcut: list[torch.Tensor]  # none: the deep maps as they are
    weight: list[torch.Tensor | None]  # of the shallow norms, then of the deep ones
    bias: list[torch.Tensor | None]
    incoming: torch.Tensor  # [K, B, C]

    @property
    def normed(self):
        """The maps that pass through the norms."""
        return [*self.shallow, *self.deep][: len(self.weight)]


KINDS = ("normal", "normal", "large mean", "constant channels", "samples apart")


class Recipe(NamedTuple):
    """What Hypothesis draws, and shows when a case fails."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    relu: list[bool]  # K
    folded: bool
    training: bool
    kinds: list[str]  # of the maps that are normalised
    scale: float  # of them
    absent: list[bool]  # of 4K: weights and biases
    layout: str
    seed: int

    def case(self):
        generator = torch.Generator().manual_seed(self.seed)
        experts, channels = len(self.relu), self.shape[1]

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64)

        def rounded(values):
            return values.to(self.dtype).double()

        def normed(kind):
            values = self.scale * normal(*self.shape)
            if kind == "large mean":
                values += 1e4
            elif kind == "constant channels":
                values[:, ::2] = 2.0
            elif kind == "samples apart":  # partial statistics with different means
                values += 300.0 * normal(self.shape[0], 1, 1, 1)
            return rounded(values)

        norms = (1 + self.folded) * experts
        vectors = [None if absent else normal(channels).float().double() for absent in self.absent[: 2 * norms]]
        maps = [normed(kind) for kind in self.kinds[:norms]]
        deep = maps[experts:] or [rounded(normal(*self.shape)) for _ in range(experts)]
        shortcut = [rounded(normal(*self.shape)) for _ in range(experts if self.folded else 0)]
        incoming = rounded(normal(experts, *self.shape[:2]))
        return Case(deep, maps[:experts], shortcut, vectors[:norms], vectors[norms:], incoming)


@st.composite
def recipes(draw):
    """B 1-64, C 1-2048, H and W 1-56, at most 40,000 values a map; 1-3 experts."""
    height, width = (draw(st.integers(1, 9) | st.integers(1, 56)) for _ in range(2))
    channels = draw(st.integers(1, 70) | st.sampled_from([128, 255, 512, 513, 1000, 2048]))
    channels = max(1, min(channels, 40_000 // (height * width)))
    batch = draw(st.integers(1, max(1, min(64, 40_000 // (height * width * channels)))))
    training, experts = draw(st.booleans()), draw(st.integers(1, 3))
    if training and batch * height * width == 1:
        height = 2
    return Recipe(
        (batch, channels, height, width),
        draw(st.sampled_from(DTYPES)),
        [draw(st.booleans()) for _ in range(experts)],
        draw(st.booleans()),
        training,
        [draw(st.sampled_from(KINDS)) for _ in range(2 * experts)],
        draw(st.sampled_from([1.0, 1.0, 1e-3, 100.0])),
        [draw(st.integers(0, 3)) == 0 for _ in range(4 * experts)],
        draw(st.sampled_from(LAYOUTS)),
        draw(st.integers(0, 2**31)),
    )


def lay_out(values, layout, index):
    """The same values in another layout; the maps of a "mixed" case differ."""
    if layout == "mixed":
        layout = ("channels last", "contiguous", "strided")[index % 3]
    if layout == "channels last":
        return values.to(memory_format=torch.channels_last)
    if layout == "strided":  # every other column of a padded map, height and batch exchanged
        batch, channels, height, width = values.shape
        memory = values.new_full((height, batch, channels, 2 * width + 1), float("nan"))
        view = memory.permute(1, 2, 0, 3)[..., 1::2]
        return view.copy_(values)
    if layout == "unaligned":  # channels last, from the second element on
        batch, channels, height, width = values.shape
        memory = values.new_zeros(values.numel() + 1)[1:].view(batch, height, width, channels)
        return memory.permute(0, 3, 1, 2).copy_(values)
    return values.contiguous()


def evaluate(recipe, case, dtype, device, backend, layout):
    """f, and the gradients of everything, in one list; and the running statistics."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [*case.deep, *case.shallow, *case.shortcut]
    leaves = [lay_out(m.to(device, dtype), layout, i).detach().requires_grad_() for i, m in enumerate(maps)]
    experts, channels = len(case.deep), case.deep[0].shape[1]
    weight, bias = (
        [None if v is None else v.to(device, wide).requires_grad_() for v in vectors]
        for vectors in (case.weight, case.bias)
    )
    running = [[torch.full((channels,), v, dtype=wide, device=device) for v in RUNNING] for _ in weight]
    norms = [
        BatchNormArguments(w, b, *statistics, training=recipe.training, momentum=0.3, eps=EPS)
        for w, b, statistics in zip(weight, bias, running, strict=True)
    ]
    f = dkf_experts(
        leaves[:experts],
        leaves[experts : 2 * experts],
        norms[:experts],
        relu=recipe.relu,
        shortcut=leaves[2 * experts :] or None,
        deep_norms=norms[experts:] or None,
        backend=backend,
    )
    inputs = leaves + [v for v in (*weight, *bias) if v is not None]
    gradients = torch.autograd.grad(f, inputs, case.incoming.to(device, dtype))
    for gradient, leaf in zip(gradients, inputs, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    return [f.detach(), *gradients], [vector for pair in running for vector in pair]


def column(vector):
    return vector[:, :, None, None] if vector.dim() == 2 else vector[:, None, None]


class Magnitudes(NamedTuple):
    """The absolute values of what is added up where a map passes through its norm: rounding is relative to them."""

    gain: torch.Tensor  # |γ| / σ
    x_hat: torch.Tensor  # |x̂|; and 1, for the mean; and a share of |x| / σ: the mean has to be as exact as two floats
    affine: torch.Tensor  # |γ x̂| + |β|
    argument: torch.Tensor  # γ x̂ + β itself


def magnitudes(recipe, case, i):
    x, ones = case.normed[i], torch.ones(case.deep[0].shape[1], dtype=torch.float64)
    weight = ones if case.weight[i] is None else case.weight[i]
    bias = 0 * ones if case.bias[i] is None else case.bias[i]
    mean, var = RUNNING[0] * ones, RUNNING[1] * ones
    if recipe.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    rstd = (var + EPS).rsqrt()
    x_hat = (x - column(mean)) * column(rstd)
    share = 1.0 if recipe.dtype == torch.float64 else 1e-3  # the reference is no better than that in float64
    size = x_hat.abs() + column(var.sqrt() * rstd) + share * x.abs() * column(rstd)
    return Magnitudes(
        weight.abs() * rstd,
        size,
        column(weight.abs()) * size + column(bias.abs()),
        column(weight) * x_hat + column(bias),
    )


def bounds(recipe, case):
    """For every entry of every result the sum of the absolute values of its terms; and how near to 0 the argument of a
    ReLU comes, relative to its terms."""
    experts, positions = len(case.deep), recipe.shape[2] * recipe.shape[3]
    norms = [magnitudes(recipe, case, i) for i in range(len(case.weight))]
    nearest, f, deep_maps, shallow_maps, shortcuts = 1.0, [], [], [], []
    weights, biases = [torch.empty(0)] * len(norms), [torch.empty(0)] * len(norms)

    def nearest_kink(argument, size):
        relative = argument.abs() / size
        return relative[size > 0].min().item() if (size > 0).any() else 1.0

    def through_norm(i, upstream):
        weights[i], biases[i] = (upstream * norms[i].x_hat).sum((0, 2, 3)), upstream.sum((0, 2, 3))
        count = upstream.numel() / upstream.shape[1]
        means = column(biases[i] / count) + norms[i].x_hat * column(weights[i] / count)
        return column(norms[i].gain) * (upstream + means)

    for k in range(experts):
        deep, upstream = case.deep[k].abs(), column(case.incoming[k].abs()) / positions
        if recipe.relu[k]:
            nearest = min(nearest, nearest_kink(norms[k].argument, norms[k].affine))
        if recipe.folded:
            own, added = norms[experts + k], case.shortcut[k]
            deep = own.affine + added.abs()
            nearest = min(nearest, nearest_kink(own.argument + added, deep))
        f.append((deep * norms[k].affine).mean((2, 3)))
        shallow_maps.append(through_norm(k, upstream * deep))
        to_deep = upstream * norms[k].affine
        if recipe.folded:
            shortcuts.append(to_deep)
            to_deep = through_norm(experts + k, to_deep)
        deep_maps.append(to_deep)
    present = [
        bound
        for bound, vector in zip([*weights, *biases], [*case.weight, *case.bias], strict=True)
        if vector is not None
    ]
    return [torch.stack(f), *deep_maps, *shallow_maps, *shortcuts, *present], nearest


def compare(kernels, recipe):
    backend, device = kernels
    dtype = torch.float32 if device.type == "cuda" and recipe.dtype == torch.float64 else recipe.dtype
    case = recipe._replace(dtype=dtype).case()
    allowed, nearest_kink = bounds(recipe, case)
    assume(nearest_kink > 2e-6)  # float32 may see another sign there than float64
    exact, exact_running = evaluate(recipe, case, torch.float64, "cpu", "reference", "contiguous")
    assume(all(expected.abs().max() < torch.finfo(dtype).max / 2 for expected in exact))  # of float16
    mine, running = evaluate(recipe, case, dtype, device, backend, recipe.layout)
    again, _ = evaluate(recipe, case, dtype, device, backend, recipe.layout)
    for result, expected, twin, size in zip(mine, exact, again, allowed, strict=True):
        assert torch.equal(result, twin)
        assert torch.isfinite(result).all()
        error, info = (result.cpu().double() - expected).abs(), torch.finfo(result.dtype)
        assert (error <= TOLERANCE[result.dtype] * size + info.smallest_normal * info.eps).all()
    for i, (vector, expected) in enumerate(zip(running, exact_running, strict=True)):
        x = case.normed[i // 2]
        mean_size, var = x.abs().amax((0, 2, 3)), x.var((0, 2, 3), correction=0)
        size = mean_size if i % 2 == 0 else var + (mean_size * var.sqrt() if dtype == torch.float64 else 0)
        error = (vector.cpu().double() - expected).abs()
        assert (error <= 4 * torch.finfo(vector.dtype).eps * (size + expected.abs())).all()


def test_sweep(kernels):
    count = 6 if kernels[0] == "triton" else 100  # it compiles for every dtype, layout and number of positions
    settings(max_examples=count)(given(recipe=recipes())(compare))(kernels)


def eager(deep, shallow, gamma, beta, relu):
    normalised = F.batch_norm(shallow, None, None, gamma, beta, training=True, eps=EPS)
    return (deep * (normalised.relu() if relu else normalised)).mean((2, 3))


def with_gradients(function, leaves, incoming, dtype, device):
    leaves = [t.to(device, dtype or t.dtype).requires_grad_() for t in leaves]
    f = function(*leaves)
    return [f, *torch.autograd.grad(f, leaves, incoming.to(device, f.dtype))]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mean"),
    [(dtype, mean) for dtype in DTYPES[:3] for mean in (0.0, 1.0, 30.0)] + [(torch.float32, 1e4)],
)
def test_the_error_is_no_larger_than_that_of_eager_pytorch(kernels, mean, relu, dtype):
    """Mean square over maps of three shapes, of f and of every gradient, relative to their mean squares."""
    backend, device = kernels

    def mine(*leaves):
        return dkf_bn_pool(*leaves, None, None, training=True, eps=EPS, relu=relu, backend=backend)

    squares = torch.zeros(2, dtype=torch.float64)
    for shape in [(8, 16, 7, 7), (2, 33, 14, 14), (32, 8, 4, 4)] * 4:
        leaves = [torch.randn(shape).to(dtype), (torch.randn(shape) + mean).to(dtype), *torch.randn(2, shape[1])]
        incoming = torch.randn(shape[:2]).to(dtype)
        exact = with_gradients(lambda *t: eager(*t, relu), leaves, incoming, torch.float64, "cpu")
        for i, function in enumerate((mine, lambda *t: eager(*t, relu))):
            for result, expected in zip(with_gradients(function, leaves, incoming, None, device), exact, strict=True):
                squares[i] += (result.cpu().double() - expected).square().mean() / expected.square().mean()
    assert squares[0] <= squares[1], squares.sqrt()


def test_the_plain_product(kernels):
    """dkf_pool, whose kernels share nothing with a normalisation."""
    backend, device = kernels
    for dtype in DTYPES if backend == "cpu" else DTYPES[:3]:
        for i, layout in enumerate(LAYOUTS):
            deep, shallow = (torch.randn(5, 37 + i, 6, 7).to(dtype) for _ in range(2))
            leaves = [lay_out(t.to(device), layout, k).detach().requires_grad_() for k, t in enumerate((deep, shallow))]
            incoming = torch.randn(5, 37 + i).to(dtype)
            f = dkf_pool(*leaves, backend=backend)
            gradients = torch.autograd.grad(f, leaves, incoming.to(device))
            upstream = incoming.double()[:, :, None, None] / 42
            expected = [(deep.double() * shallow.double()).mean((2, 3)), upstream * shallow, upstream * deep]
            for mine, exact in zip([f, *gradients], expected, strict=True):
                assert (mine.cpu().double() - exact).abs().max() <= TOLERANCE[dtype] * exact.abs().max()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_vanish(kernels, poison, relu):
    backend, device = kernels
    for which in range(2):
        for training in (False, True):
            maps = [torch.randn(3, 5, 4, 4) for _ in range(2)]
            maps[which][1, 2, 3, 1] = poison
            statistics = torch.zeros(5, device=device), torch.ones(5, device=device)
            beta = torch.full((5,), 9.0, device=device)  # the ReLU is active everywhere
            f = dkf_bn_pool(
                *(t.to(device) for t in maps), None, beta, *statistics, training=training, relu=relu, backend=backend
            )
            assert not torch.isfinite(f[1, 2])
            assert torch.isfinite(f[:, :2]).all()
