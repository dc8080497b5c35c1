"""The Triton kernels of depth-wise knowledge fusion in Triton's interpreter, on the CPU.

Triton decides at its import whether it interprets, so the checks run in a separate process: there pytest collects
the functions of this file that are named ``check_``.
"""

from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

# The interpreter computes in NumPy, which warns of the infinities and NaN that some checks are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
pytest.importorskip("triton", reason="needs Triton, which is not installed")
from shike_fast.kernels.fusion import _backward, _maps, _statistics  # noqa: E402
from shike_fast.kernels.fusion.dkf import (  # noqa: E402
    dkf_forward,
    dkf_map_gradients,
    dkf_statistics,
    dkf_vector_gradients,
)
from shike_fast.ops._dkf_arguments import DkfArguments  # noqa: E402

# Everything is computed in float32; low-precision results are rounded once. (The interpreter truncates to bfloat16,
# which compiled kernels round: hence 2⁻⁷ and not 2⁻⁸.)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@pytest.mark.slow
def test_in_the_interpreter(interpret):
    interpret(__file__, [name for name in globals() if name.startswith("check_")])


def test_a_part_in_the_interpreter(interpret):
    interpret(__file__, ["check_constant_channels_are_exact", "check_nan_is_not_swallowed", "check_statistics"])


def lay_out(values, layout):
    """The same values [B, C, H, W] in another layout."""
    batch, channels, height, width = values.shape
    if layout == "NCHW":
        return values.contiguous()
    if layout == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # every second column and row, and some channels, of a larger map
        large = values.new_full((batch, channels + 3, 2 * height, 2 * width + 1), torch.nan)
        part = large[:, 2 : 2 + channels, ::2, 1::2]
    elif layout == "sliced channels last":  # not aligned to 16 bytes
        large = values.new_full((batch, height, width, channels + 3), torch.nan)
        part = large[..., 1 : 1 + channels].permute(0, 3, 1, 2)
    else:  # "HWBC": the batch is not the outermost
        part = values.new_empty((height, width, batch, channels)).permute(2, 3, 0, 1)
    return part.copy_(values)


class Case(NamedTuple):
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    layouts: tuple[str, ...] = ("channels last",)  # of the maps in turn, over and over
    relu: tuple[bool, ...] = (False,)  # of each expert
    folded: bool = False
    affine: str = "both"  # or weight, bias, neither, first: only of the first expert
    mean: float = 0.3
    norms: bool = True

    @property
    def count(self):  # of normalisations
        return len(self.relu) * (1 + self.folded) if self.norms else 0

    def arguments(self):
        torch.manual_seed(sum(self.shape))
        experts, channels = len(self.relu), self.shape[1]
        layouts = self.layouts * (3 * experts)

        def new(mean, layout):
            values = torch.randn(self.shape) * (1 + torch.rand(channels, 1, 1)) + mean
            if self.affine in ("both", "bias"):  # constant channels; without a bias, ReLU sees but roundings there
                values[:, 2::5] = values[:1, 2::5, :1, :1]
            return lay_out(values.to(self.dtype), layout)

        def vectors(kind, start):
            given = {kind: range(self.count), "both": range(self.count), "first": range(1)}.get(self.affine, ())
            return [torch.randn(channels) + start if i in given else None for i in range(self.count)]

        return DkfArguments(
            [new(self.mean if self.folded else 0.1, layouts[k]) for k in range(experts)],
            [new(self.mean, layouts[experts + k]) for k in range(experts)],
            [new(0.2, layouts[2 * experts + k]) for k in range(experts if self.folded else 0)],
            vectors("weight", 0.5),
            vectors("bias", 0.2),
            list(self.relu),
        )


def reference_normalised(x, weight, bias, eps, normaliser):
    """x̂, γ x̂ + β and the mean, rstd that were used, in float64."""
    if normaliser is None:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        rstd = (var + eps).rsqrt()
        normal = F.batch_norm(x, None, None, None, None, True, 0.0, eps)
    else:
        mean, rstd = normaliser[0] + normaliser[1], normaliser[2]
        normal = (x - mean[:, None, None]) * rstd[:, None, None]
    a = normal if weight is None else normal * weight[:, None, None]
    return normal, a if bias is None else a + bias[:, None, None], torch.stack((mean, rstd))


def reference(args, grad_output, eps, mean_rstd):
    """f, sums, mean and rstd, gradients of the norms' vectors and of the maps: autograd's in float64."""
    double = [map_.double().requires_grad_() for map_ in args.maps]
    vectors = [
        torch.full((args.deep[0].shape[1],), float(i == 0), dtype=torch.float64) if vector is None else vector.double()
        for pair in zip(args.weight, args.bias, strict=True)
        for i, vector in enumerate(pair)
    ]
    vectors = [vector.requires_grad_() for vector in vectors]
    experts = len(args.deep)
    given = [None] * len(args.weight) if mean_rstd is None else list(mean_rstd.double())
    results, sums, used = [], [], []
    for k in range(experts):
        deep, a = double[k], double[experts + k]
        terms = []
        if args.weight:
            x_hat, a, scale = reference_normalised(a, *vectors[2 * k : 2 * k + 2], eps[k], given[k])
            used.append((k, scale))
            kept = (a > 0) | (not args.relu[k])
            a = a * kept
            if args.shortcut:
                n = experts + k
                y_hat, deep, scale = reference_normalised(deep, *vectors[2 * n : 2 * n + 2], eps[n], given[n])
                used.append((n, scale))
                deep = F.relu(deep + double[2 * experts + k])
                terms = [(deep > 0) * a * y_hat, (deep > 0) * a]
            terms = [kept * deep * x_hat, kept * deep, *terms]
        sums.append(torch.stack([term.sum((2, 3)) for term in terms]) if terms else deep.new_empty(0))
        results.append((deep * a).mean((2, 3)))
    f = torch.stack(results)
    (f * grad_output.double()).sum().backward()
    scales = torch.stack([scale for _, scale in sorted(used, key=lambda pair: pair[0])]) if used else None
    return (
        f.detach(),
        torch.stack(sums).detach(),
        None if scales is None else scales.detach(),
        torch.stack([vector.grad for vector in vectors]).unflatten(0, (-1, 2))
        if vectors
        else f.new_empty(0, 2, f.shape[2]),
        [map_.grad for map_ in double],
    )


def assert_close(actual, expected, tolerance, name):
    """The largest error is within ``tolerance`` of the largest entry."""
    assert actual.shape == expected.shape and torch.isfinite(actual).all(), name
    if expected.numel() > 0:
        error, largest = (actual.double() - expected).abs().max(), expected.abs().max()
        assert error <= tolerance * largest, (name, (error / largest).item())


def run_and_compare(case, given):
    """Forward and backward against the reference; with mean_rstd that are given, or in training."""
    args, norms, experts = case.arguments(), case.count, len(case.relu)
    batch, channels, height, width = case.shape
    values, rounded, exact = batch * height * width, TOLERANCE[case.dtype], TOLERANCE[torch.float32]
    eps, momentum = [1e-5 * (1 + i) for i in range(norms)], [0.1 + 0.2 * i for i in range(norms)]
    running = [torch.rand(channels) for _ in range(2 * norms)]
    before = [vector.clone() for vector in running]
    grad_output = torch.randn(experts, batch, channels).to(case.dtype)
    mean_rstd = None
    if given:
        mean = torch.randn(norms, channels) + case.mean
        rest, rstd = 1e-8 * mean * torch.rand(norms, channels), torch.rand(norms, channels) + 0.5
        mean_rstd = torch.stack((mean, rest, rstd), 1)
    f, sums, used, statistics = dkf_forward(args, mean_rstd, eps, running, momentum)
    vectors = dkf_vector_gradients(args, grad_output, sums)
    gradients = dkf_map_gradients(args, grad_output, used, vectors, 0.0 if given else 1 / values)

    expected_f, expected_sums, scales, expected_vectors, expected_gradients = reference(
        args, grad_output, eps, mean_rstd
    )
    assert f.dtype == case.dtype and {t.dtype for t in (sums, used, statistics, vectors)} == {torch.float32}
    assert_close(f, expected_f, rounded, "f")
    assert_close(vectors, expected_vectors, exact, "vectors")
    for k, (actual, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert actual.dtype == case.dtype
        assert_close(actual, expected, rounded, f"gradient {k}")
    if not norms:
        assert (sums.shape, used.shape, statistics.shape) == (
            (experts, 0, batch, channels),
            (0, 3, channels),
            (0, 2, channels),
        )
        return
    assert_close(sums, expected_sums, exact, "sums")
    if given:
        assert used is mean_rstd and statistics.shape == (0, 2, channels)
        assert all(torch.equal(*pair) for pair in zip(running, before, strict=True))
        return
    maps = [*args.shallow, *(args.deep if case.folded else [])]
    for i, x in enumerate(map_.double() for map_ in maps):
        sigma = 1 / scales[i, 1]
        assert (((used[i, 0].double() + used[i, 1]) - scales[i, 0]).abs() <= 1e-6 * sigma).all()
        assert (used[i, 1].abs() <= 2.0**-23 * used[i, 0].abs() + 1e-30).all()
        assert ((used[i, 2].double() * sigma - 1).abs() <= exact).all()
        for j, statistic in enumerate((x.mean((0, 2, 3)), x.var((0, 2, 3)))):
            assert_close(statistics[i, j], statistic, exact, "statistics")
            expected = momentum[i] * statistic + (1 - momentum[i]) * before[2 * i + j]
            assert_close(running[2 * i + j], expected, exact, "running statistics")


@contextmanager
def small_tiles():
    """Within this context samples need several tiles, chunks take several samples, and merges need several tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_maps, "VALUES", 64)
        patch.setattr(_statistics, "PROGRAMS", 1)
        patch.setattr(_backward, "_BLOCKS_IN_PART", 2)
        for module in (_statistics, _backward):
            patch.setattr(module, "row_tile", lambda rows: _maps.RowTile(min(rows, 2), 16))
        yield


BF16, HALF = torch.bfloat16, torch.float16
LAST, NCHW = ("channels last",), ("NCHW",)
CASES = [
    Case((3, 5, 2, 3)),
    Case((5, 70, 7, 7), layouts=LAST, affine="weight"),
    Case((2, 37, 7, 7), layouts=NCHW, affine="bias"),
    Case((4, 33, 7, 7), BF16, relu=(True, True, True)),
    Case((3, 24, 4, 4), HALF, relu=(False, False, False)),
    Case((2, 16, 4, 4), BF16, layouts=NCHW, relu=(True, False)),
    Case((3, 9, 3, 5), layouts=("NCHW", "channels last", "sliced"), relu=(True, False)),
    Case((2, 7, 3, 5), HALF, layouts=("sliced channels last", "HWBC"), relu=(False, True, False), affine="first"),
    Case((4, 6, 1, 1), relu=(False, True), affine="neither"),
    Case((3, 5, 1, 4), layouts=("sliced", "HWBC")),
    Case((3, 5, 4, 1), layouts=("sliced", "sliced channels last"), relu=(True,)),
    Case((1, 3, 5, 5), relu=(True,), affine="neither"),
    Case((3, 1, 4, 3), relu=(False, True), layouts=("NCHW", "channels last")),
    Case((4, 5, 7, 7), mean=1e4),
    Case((4, 5, 7, 7), relu=(True, False), mean=1e4),
    Case((3, 5, 2, 3), relu=(True, False), folded=True),
    Case((2, 40, 7, 7), BF16, relu=(False, True), folded=True, affine="first"),
    Case((3, 5, 3, 3), HALF, layouts=NCHW, relu=(True,), folded=True, affine="neither"),
    Case((2, 9, 3, 4), layouts=("channels last", "NCHW", "sliced", "HWBC"), relu=(True, False, True), folded=True),
    Case((4, 5, 7, 7), relu=(False,), folded=True, mean=1e4),
    Case((1, 1, 1, 1), norms=False, relu=(False, False)),
    Case((3, 35, 3, 5), norms=False, relu=(False,)),
    Case((2, 7, 3, 5), BF16, layouts=("NCHW", "sliced"), norms=False, relu=(False, False, False)),
]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def check_against_reference(case, given):
    run_and_compare(case, given)


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 19, 3, 5), relu=(False, True)),
        Case((5, 17, 7, 7), BF16, layouts=("channels last", "NCHW", "sliced")),
        Case((3, 9, 4, 4), relu=(True, False), folded=True),
        Case((3, 9, 4, 4), norms=False),
    ],
    ids=str,
)
def check_several_tiles(case):
    with small_tiles():
        run_and_compare(case, False)


@pytest.mark.parametrize("tiles", [nullcontext, small_tiles])
def check_statistics(tiles):
    torch.manual_seed(0)
    maps = [torch.randn(5, 18, 4, 3) for _ in range(4)]
    maps[1] += 1e4
    maps[2] += torch.tensor([0.0, 1e4, -3e6, 5.0, 1e-3])[:, None, None, None]  # samples that are far apart
    maps[3] = maps[3] * 1e-3 + torch.linspace(-4, 4, 18)[:, None, None]
    maps[3][0, :, 0, 0] = 1e3  # the first value says nothing of the others
    maps[1:3] = [map_.contiguous(memory_format=torch.channels_last) for map_ in maps[1:3]]
    with tiles():
        result = dkf_statistics(maps)
    assert result.dtype == torch.float32 and result.shape == (4, 3, 18)
    for (mean, rest, squares), map_ in zip(result.double(), maps, strict=True):
        x = map_.double()
        center = x.mean((0, 2, 3))
        expected = (x - center[:, None, None]).square().sum((0, 2, 3))
        sigma = (expected / 60).sqrt()
        assert (rest.abs() <= 2.0**-23 * mean.abs()).all()
        assert ((mean + rest - center).abs() <= 1e-6 * sigma + 1e-10 * center.abs()).all()
        torch.testing.assert_close(squares, expected, rtol=2e-6, atol=0)


def check_constant_channels_are_exact():
    x = torch.tensor([0.1, -1e4 / 3, 0.0, 1e-20, 3e30])[None, :, None, None].expand(4, 5, 3, 3)
    mean, rest, squares = dkf_statistics([x])[0]
    assert torch.equal(mean, x[0, :, 0, 0]) and (rest == 0).all() and (squares == 0).all()


def check_runs_are_identical():
    case = Case((5, 18, 3, 5), relu=(True, False))
    grad_output = torch.randn(2, 5, 18)
    results = []
    for _ in range(2):
        args = case.arguments()
        with small_tiles():
            forward = dkf_forward(args, None, [1e-5] * 2, [], [0.1] * 2)
            vectors = dkf_vector_gradients(args, grad_output, forward[1])
            results.append([*forward, vectors, *dkf_map_gradients(args, grad_output, forward[2], vectors, 0.1)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("folded", [False, True])
def check_gradients_have_strides_of_their_own(folded, monkeypatch):
    """... and nothing is written between their values."""
    case = Case((2, 5, 3, 3), layouts=("channels last", "NCHW"), relu=(True, False), folded=folded)
    grad_output, original = torch.randn(2, 2, 5), DkfArguments.new_gradients
    guarded = []

    def new_gradients(args):
        for i, _ in enumerate(original(args)):
            memory = torch.full((2, 3, 8, 9) if i % 2 else (2, 9, 3, 9), 42.0)
            view = memory.permute(0, 2, 1, 3) if i % 2 else memory
            guarded.append((memory, view[:, 2:7, :, 1:7:2]))
        return [view for _, view in guarded]

    args = case.arguments()
    _, sums, used, _ = dkf_forward(args, None, [1e-5] * case.count, [], [0.1] * case.count)
    vectors = dkf_vector_gradients(args, grad_output, sums)
    expected = dkf_map_gradients(args, grad_output, used, vectors, 0.05)
    monkeypatch.setattr(DkfArguments, "new_gradients", new_gradients)
    actual = dkf_map_gradients(args, grad_output, used, vectors, 0.05)
    for ours, theirs, (memory, view) in zip(actual, expected, guarded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        view.fill_(42.0)
        assert (memory == 42.0).all()


def check_offsets_beyond_32_bits():
    large = torch.empty(2**31 + 16, dtype=torch.float16)  # hardly any of it is touched
    strides = ((2**30, 4, 2, 1), (4, 2**30, 2, 1), (4, 2, 2**30, 1), (1, 3, 0, 2**30))
    shapes = ((3, 2, 2, 2), (2, 3, 2, 2), (2, 2, 3, 2), (2, 2, 1, 3))
    for shape, stride in zip(shapes, strides, strict=True):
        x = large.as_strided(shape, stride).copy_(torch.randn(shape))
        args = DkfArguments([x.clone()], [x], [], [], [], [False])
        expected = x.float().square().mean((2, 3))
        torch.testing.assert_close(dkf_forward(args, None, [], [], [])[0][0].float(), expected, rtol=2e-3, atol=1e-3)
        torch.testing.assert_close(dkf_statistics([x])[0, 0], x.float().mean((0, 2, 3)))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [False, True])
def check_nan_is_not_swallowed(relu, training):
    args = Case((2, 4, 3, 3), relu=(relu,)).arguments()
    args.shallow[0][1, 3, 2, 2] = torch.nan
    mean_rstd = None if training else torch.ones(1, 3, 4)
    f, sums, _, _ = dkf_forward(args, mean_rstd, [1e-5], [], [0.1])
    assert f[0, 1, 3].isnan() and sums[0, 0, 1, 3].isnan()
    assert f.isnan().sum() == (2 if training else 1)


def check_many_experts():
    shape, experts = (2, 3, 3, 3), 8
    run_and_compare(Case(shape, relu=(True, False) * (experts // 2), folded=True), False)
    run_and_compare(Case(shape, relu=(False, True, True, False) * (experts // 4)), False)
