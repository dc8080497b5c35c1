"""The CUDA kernels of depth-wise knowledge fusion, with their blocks and threads, emulated on the CPU."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shike_fast.ops import _native_dkf
from shike_fast.ops._native import native

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
LAYOUTS = ("channels last", "NCHW", "sliced", "reversed", "unaligned")
MOMENTUM = 0.3


@pytest.fixture(autouse=True)
def _one_thread():
    """The arrays are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels last":
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "NCHW":
        return values.contiguous()
    batch, channels, height, width = values.shape
    if layout == "sliced":  # of a larger channels-last map
        room = torch.zeros(batch, channels + 8, height + 1, width + 2, dtype=values.dtype)
        view = room.contiguous(memory_format=torch.channels_last)[:, :channels, 1:, :width]
    elif layout == "reversed":  # w has the largest stride
        view = torch.zeros(width, height, channels, batch, dtype=values.dtype).permute(3, 2, 1, 0)
    else:
        memory = torch.zeros(values.numel() + 1, dtype=values.dtype)[1:]
        view = memory.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return view.copy_(values)


def numbers_of(map_: Tensor) -> list[int]:
    return [map_.data_ptr(), *map_.stride()]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@dataclasses.dataclass
class Case:
    """Maps in the order deep, shallow, shortcut; norms of the shallow, then of the deep maps."""

    maps: list[Tensor]
    relu: list[bool]
    weight: list[Tensor | None]
    bias: list[Tensor | None]
    eps: list[float]
    processors: int = 4

    @property
    def experts(self) -> int:
        return len(self.relu)

    @property
    def norms(self) -> int:
        return len(self.weight)

    @property
    def folded(self) -> bool:
        return len(self.maps) > 2 * self.experts

    @property
    def sums(self) -> int:
        return 2 * self.norms // self.experts

    def call(self, running=()):
        running = running or [None] * (2 * self.norms)
        pairs = zip(self.weight, self.bias, running[::2], running[1::2], strict=True)
        return {
            "maps": [numbers_of(map_) for map_ in self.maps],
            "norms": [[address(tensor) for tensor in norm] for norm in pairs],
            "relu": self.relu,
            "shape": list(self.maps[0].shape),
            "dtype": DTYPES[self.maps[0].dtype],
        }

    def forward(self, normalisers=None, running=(), descending=False):
        batch, channels = self.maps[0].shape[:2]
        training = normalisers is None
        f = torch.full((self.experts, batch, channels), torch.nan, dtype=self.maps[0].dtype)
        sums = torch.full((self.experts, self.sums, batch, channels), torch.nan)
        if training:
            normalisers = torch.full((self.norms, 3, channels), torch.nan)
        statistics = torch.full((self.norms if training else 0, 2, channels), torch.nan)
        native().emulate_dkf_forward(
            **self.call(running),
            eps=self.eps,
            momentum=[MOMENTUM] * self.norms,
            training=training,
            f=f.data_ptr(),
            sums=sums.data_ptr(),
            normalisers=normalisers.data_ptr(),
            statistics=statistics.data_ptr(),
            processors=self.processors,
            descending=descending,
        )
        return f, sums, normalisers, statistics

    def vector_gradients(self, incoming, sums, descending=False):
        vectors = torch.full((self.norms, 2, self.maps[0].shape[1]), torch.nan)
        native().emulate_dkf_vector_gradients(
            **self.call(),
            incoming=incoming.data_ptr(),
            sums=sums.data_ptr(),
            vectors=vectors.data_ptr(),
            descending=descending,
        )
        return vectors

    def map_gradients(self, incoming, normalisers, vectors, inverse_count, results, descending=False):
        native().emulate_dkf_map_gradients(
            **self.call(),
            incoming=incoming.data_ptr(),
            normalisers=normalisers.data_ptr(),
            vectors=vectors.data_ptr(),
            inverse_count=inverse_count,
            results=[numbers_of(result) for result in results],
            processors=self.processors,
            descending=descending,
        )
        return results


def statistics_of(maps, processors=4, descending=False):
    result = torch.full((len(maps), 3, maps[0].shape[1]), torch.nan)
    native().emulate_dkf_statistics(
        maps=[numbers_of(map_) for map_ in maps],
        shape=list(maps[0].shape),
        dtype=DTYPES[maps[0].dtype],
        statistics=result.data_ptr(),
        processors=processors,
        descending=descending,
    )
    return result


class Reference:
    """The composition of PyTorch operators in float64, and its gradients for `incoming`."""

    def __init__(self, case: Case, incoming: Tensor, moments: Tensor | None):
        experts, channels = case.experts, case.maps[0].shape[1]
        # Contiguous: torch.batch_norm's gradients of weight and bias are wrong for some strides of [1, 2, 1, 2].
        self.maps = [map_.double().contiguous().requires_grad_() for map_ in case.maps]
        self.weight = [(torch.ones(channels) if w is None else w).double().requires_grad_() for w in case.weight]
        self.bias = [(torch.zeros(channels) if b is None else b).double().requires_grad_() for b in case.bias]
        self.running = [torch.tensor(v).repeat(channels).double() for _ in case.weight for v in (0.5, 2.0)]
        features, self.margin = [], []

        def normalised(map_, j):
            if moments is None:
                mean, var = self.running[2 * j : 2 * j + 2]
            else:
                mean, var = moments[j].double()
            return functional.batch_norm(
                map_, mean, var, self.weight[j], self.bias[j], moments is None, MOMENTUM, case.eps[j]
            )

        for k in range(experts):
            deep, shallow = self.maps[k], self.maps[experts + k]
            if case.norms:
                shallow = normalised(shallow, k)
                if case.relu[k]:
                    self.margin.append(shallow.detach())
                    shallow = functional.relu(shallow)
            if case.folded:
                deep = normalised(deep, experts + k) + self.maps[2 * experts + k]
                self.margin.append(deep.detach())
                deep = functional.relu(deep)
            features.append((deep * shallow).mean((2, 3)))
        self.f = torch.stack(features)
        leaves = [*self.maps, *self.weight, *self.bias]
        gradients = torch.autograd.grad((self.f * incoming.double()).sum(), leaves)
        self.gradients = gradients[: len(self.maps)]
        vectors = gradients[len(self.maps) :]
        self.vectors = [torch.stack(pair) for pair in zip(vectors[: case.norms], vectors[case.norms :], strict=True)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    """Errors relative to the largest entry: of all, or of `scale` (of what an entry is a difference of)."""
    largest = (expected if scale is None else scale).detach().abs().max().item()
    worst = (actual.double() - expected.detach()).abs().max().item()
    assert worst <= tolerance * max(largest, 1e-30), (worst, largest)


def check(case: Case, incoming: Tensor, given_moments: Tensor | None, results, descending=False) -> None:
    """`results`: memory for the gradients. given_moments [n, 2, C]: mean and variance; None: training.

    Nothing is compared if the argument of a ReLU is so near to 0 that float32 may see its other side.
    """
    dtype, shape = case.maps[0].dtype, case.maps[0].shape
    count = shape[0] * shape[2] * shape[3]
    training = given_moments is None
    reference = Reference(case, incoming, given_moments)
    if any(bool((margin.abs() < 1e-5).any()) for margin in reference.margin):
        return
    rounding = torch.finfo(dtype).eps
    tolerance = 3e-5
    if training:
        running = [torch.tensor(v).repeat(shape[1]) for _ in case.weight for v in (0.5, 2.0)]
        f, sums, normalisers, statistics = case.forward(running=running, descending=descending)
        for actual, expected in zip(running, reference.running, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
        for j in range(case.norms):
            map_ = case.maps[(j + case.experts) % (2 * case.experts)]
            expected = map_.double().transpose(0, 1).flatten(1)
            deviation = expected.std(1, correction=0)
            mean = normalisers[j, 0].double() + normalisers[j, 1].double()
            assert bool(((mean - expected.mean(1)).abs() <= 3e-6 * deviation + 1e-12).all())
            torch.testing.assert_close(statistics[j, 0].double(), expected.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(statistics[j, 1].double(), expected.var(1), rtol=2e-5, atol=1e-12)
    else:
        high = given_moments[:, 0].float()
        rest = (given_moments[:, 0] - high.double()).float()
        eps = torch.tensor(case.eps, dtype=torch.float64)[:, None]
        normalisers = torch.stack([high, rest, (given_moments[:, 1] + eps).rsqrt().float()], 1)
        f, sums, _, _ = case.forward(normalisers=normalisers, descending=descending)
    assert_near(f, reference.f, tolerance + rounding)
    vectors = case.vector_gradients(incoming, sums, descending)
    for actual, expected in zip(vectors, reference.vectors, strict=True):
        assert_near(actual, expected, tolerance)
    inverse_count = 1 / count if training else 0.0
    gradients = case.map_gradients(incoming, normalisers, vectors, inverse_count, results, descending)
    for j, (actual, expected) in enumerate(zip(gradients, reference.gradients, strict=True)):
        norm = (j + case.experts) % (2 * case.experts)  # of a deep or shallow map
        scale = expected
        if training and j < 2 * case.experts and norm < case.norms:  # the gradient before its projection
            upstream = float(incoming.abs().max()) * 8 / (shape[2] * shape[3])
            scale = torch.tensor([upstream * float(normalisers[norm, 2].max()), float(expected.abs().max())])
        assert_near(actual, expected, tolerance + rounding, scale)


@st.composite
def cases(draw):
    experts = draw(st.sampled_from([1, 1, 2, 3]))
    kind = draw(st.sampled_from(["pool", "normalised", "normalised", "folded"]))
    dtype = draw(st.sampled_from(list(DTYPES)))
    channels = draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 64, 72, 136, 264, 300])))
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    most = max(1, min(64, 60_000 // (channels * height * width * experts)))
    batch = draw(st.integers(1, most))
    if batch * height * width == 1:
        batch = 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    usual = draw(st.sampled_from([*LAYOUTS[:2], None]))
    count = {"pool": 2, "normalised": 2, "folded": 3}[kind] * experts
    norms = {"pool": 0, "normalised": 1, "folded": 2}[kind] * experts

    def layout():
        return usual or draw(st.sampled_from(LAYOUTS))

    def vector():
        return torch.randn(channels, generator=generator) if draw(st.booleans()) else None

    maps = []
    for _ in range(count):
        values = torch.randn(batch, channels, height, width, generator=generator)
        offset = draw(st.sampled_from([0.0, 2.0]))
        maps.append(laid_out((values + offset).to(dtype), layout()))
    results = [laid_out(torch.full_like(map_, torch.nan), layout()) for map_ in maps]
    case = Case(
        maps=maps,
        relu=[draw(st.booleans()) for _ in range(experts)],
        weight=[vector() for _ in range(norms)],
        bias=[vector() for _ in range(norms)],
        eps=[draw(st.sampled_from([1e-5, 1e-2])) for _ in range(norms)],
        processors=draw(st.sampled_from([1, 3, 16, 132])),
    )
    incoming = torch.randn(experts, batch, channels, generator=generator).to(dtype)
    moments = None
    if draw(st.booleans()):
        moments = torch.rand(norms, 2, channels, generator=generator, dtype=torch.float64) + 0.5
    return case, incoming, moments, results


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.booleans())
def test_any_case(arguments, descending):
    case, incoming, moments, results = arguments
    check(case, incoming, moments, results, descending)


def channels_with(mean: float, deviation: float, dtype: torch.dtype, layout: str, shape=(16, 24, 7, 7)) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * deviation + mean
    return laid_out(values.to(dtype), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("processors", [1, 8, 132])
@pytest.mark.parametrize("mean", [0.0, 1e4, -3e6])
def test_statistics(layout, processors, mean):
    maps = [channels_with(mean, 1.0, torch.float32, layout), channels_with(-mean, 0.5, torch.float32, layout)]
    high, rest, squares = statistics_of(maps, processors).double().unbind(1)
    for j, map_ in enumerate(maps):
        expected = map_.double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(high[j] + rest[j], expected.mean(1), rtol=0, atol=1e-6)
        torch.testing.assert_close(squares[j], expected.var(1, correction=0) * expected.shape[1], rtol=3e-6, atol=0)
        assert bool((rest[j].abs() <= 2.0**-23 * high[j].abs() + 1e-30).all())


# What the values seen first are, or those of some part, must not matter.
DISTURBANCES = {
    "none": lambda x: x,
    "the first value of all": lambda x: x[0, :, 0, 0].add_(300.0),
    "the first value of each sample": lambda x: x[:, :, 0, 0].add_(30.0),
    "the first row": lambda x: x[:, :, 0].sub_(5.0),
    "the first sample": lambda x: x[0].sub_(40.0),
    "one half": lambda x: x[len(x) // 2 :].add_(1000.0),
    "the mean": lambda x: x.add_(1000.0),
}


# PyTorch's float32 variance of these maps is within 1.5 eps on the CPU, where it is added up in double.
@pytest.mark.parametrize(("backend", "eps_of_variance"), [("emulated", 2.0), ("cpu", 1.5)])
@pytest.mark.parametrize("layout", ["channels last", "NCHW"])
@pytest.mark.parametrize("disturbed", DISTURBANCES)
def test_no_value_spoils_the_statistics(disturbed, layout, backend, eps_of_variance):
    eps = torch.finfo(torch.float32).eps
    for shape in [(1, 16, 26, 27), (1, 8, 56, 56), (8, 16, 28, 28), (64, 64, 7, 7), (33, 40, 7, 7), (3, 24, 2, 2)]:
        for dtype in DTYPES:
            values = torch.randn(shape) * 1.16
            DISTURBANCES[disturbed](values)
            map_ = laid_out(values.to(dtype), layout)
            expected = map_.double().transpose(0, 1).flatten(1)
            deviation, squares = expected.std(1, correction=0), expected.var(1, correction=0) * expected.shape[1]
            for processors in (1, 132) if backend == "emulated" else (0,):
                results = statistics_of([map_], processors) if processors else _native_dkf.dkf_statistics([map_])
                high, rest, actual = results[0].double()
                case = shape, dtype, processors
                assert bool(((actual - squares).abs() <= eps_of_variance * eps * squares).all()), case
                assert bool(((high + rest - expected.mean(1)).abs() <= eps * deviation).all()), case


@pytest.mark.parametrize("disturbed", DISTURBANCES)
@pytest.mark.parametrize("layout", ["channels last", "NCHW"])
@pytest.mark.parametrize(("shape", "processors"), [((8, 16, 14, 14), 4), ((64, 64, 7, 7), 1)])
def test_no_value_spoils_the_features(shape, processors, layout, disturbed):
    """Of the one-reading form, whose sums are relative to values of the map: no worse than eager PyTorch's."""
    deep, shallow = torch.rand(shape), torch.randn(shape)
    DISTURBANCES[disturbed](shallow)
    product = deep.double() * functional.batch_norm(shallow.double(), None, None, training=True)
    eager = (deep * functional.batch_norm(shallow, None, None, training=True)).mean((2, 3))  # NCHW, the more exact
    maps = [laid_out(deep, layout), laid_out(shallow, layout)]
    f, *_ = Case(maps, [False], [None], [None], [1e-5], processors).forward()
    size = product.abs().mean((2, 3))
    error, error_of_eager = (((x.double() - product.mean((2, 3))) / size).square() for x in (f[0], eager))
    assert float(error.mean() / error_of_eager.mean()) <= 2.5**2
    assert float(error.max() / error_of_eager.max()) <= 3**2
    assert float((error.mean(1) / error_of_eager.mean(1)).max()) <= 4**2  # in a sample, of few values


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_large_mean(layout, relu, folded):
    maps = [channels_with(mean, 1.0, torch.float32, layout) for mean in ((1e4, -1e4, 0.0) if folded else (0.5, 1e4))]
    norms = 2 if folded else 1
    case = Case(maps, [relu], [None] * norms, [torch.full((24,), 0.25)] * norms, [1e-5] * norms)
    incoming = torch.randn(1, 16, 24)
    check(case, incoming, None, [torch.empty_like(map_) for map_ in maps])
    moments = torch.tensor([[1e4, 1.0], [1e4, 1.0]], dtype=torch.float64)[:norms, :, None].repeat(1, 1, 24)
    check(case, incoming, moments, [torch.empty_like(map_) for map_ in maps])


def test_large_mean_of_a_map_that_the_features_follow():
    """d(weight) is large then, and so is its share in the gradient of the map."""
    shallow = channels_with(1e4, 1.0, torch.float32, "channels last")
    case = Case([shallow - 1e4, shallow], [False], [None], [None], [1e-5])
    _, sums, normalisers, _ = case.forward()
    vectors = case.vector_gradients(torch.ones(1, 16, 24), sums)
    results = [torch.empty_like(shallow) for _ in range(2)]
    _, gradient = case.map_gradients(torch.ones(1, 16, 24), normalisers, vectors, 1 / (16 * 49), results)
    expected = Reference(case, torch.ones(1, 16, 24), None).gradients[1]  # 0 but for eps: the features are x_hat + c
    assert float((gradient - expected).abs().max()) <= 2e-5 / 49


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channels(value, layout):
    maps = [channels_with(0.5, 1.0, torch.float32, layout), channels_with(value, 0.0, torch.float32, layout)]
    high, rest, squares = statistics_of(maps[1:]).unbind(1)
    assert bool((high == torch.tensor(value)).all()) and not rest.any() and not squares.any()
    case = Case(maps, [False], [None], [torch.ones(24)], [1e-5])
    f, *_ = case.forward()
    torch.testing.assert_close(f[0], maps[0].mean((2, 3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["no ReLU", "ReLU", "folded"])
def test_same_bits_in_any_order_of_threads(layout, kind):
    folded = kind == "folded"
    shape = (33, 40, 7, 7)
    maps = [channels_with(0.1, 1.0, torch.bfloat16, layout, shape) for _ in range(3 if folded else 2)]
    norms = 2 if folded else 1
    case = Case(maps, [kind == "ReLU"], [torch.rand(40)] * norms, [torch.rand(40)] * norms, [1e-5] * norms, 16)
    incoming = torch.randn(1, 33, 40).bfloat16()
    runs = []
    for descending in (False, False, True):
        f, sums, normalisers, statistics = case.forward(descending=descending)
        vectors = case.vector_gradients(incoming, sums, descending)
        gradients = [torch.empty_like(map_) for map_ in maps]
        case.map_gradients(incoming, normalisers, vectors, 1e-3, gradients, descending)
        runs.append([f, sums, normalisers, statistics, vectors, *gradients, statistics_of(maps, 16, descending)])
    for run in runs[1:]:
        for actual, expected in zip(run, runs[0], strict=True):
            assert torch.equal(actual, expected) and bool(torch.isfinite(actual).all())


def test_running_statistics_may_be_absent():
    maps = [channels_with(0.0, 1.0, torch.float32, "NCHW") for _ in range(2)]
    case = Case(maps, [True], [None], [None], [1e-5])
    mean, var = torch.zeros(24), torch.ones(24)
    expected = case.forward(running=[mean, var])
    assert bool(mean.any())
    for actual, other in zip(case.forward(), expected, strict=True):
        assert torch.equal(actual, other)


@pytest.mark.parametrize("kind", ["pool", "no ReLU", "ReLU", "folded"])
def test_what_is_not_finite_is_seen(kind):
    maps = [channels_with(0.0, 1.0, torch.float32, "channels last") for _ in range(3 if kind == "folded" else 2)]
    maps[1][2, 5, 0, 0] = torch.nan
    norms = {"pool": 0, "folded": 2}.get(kind, 1)
    f, *_ = Case(maps, [kind in ("ReLU", "folded")], [None] * norms, [None] * norms, [1e-5] * norms).forward()
    assert bool(f[0, 2, 5].isnan()) and bool(f[0, :, :5].isfinite().all())


def test_float64_and_nine_experts_are_refused():
    maps = [channels_with(0.0, 1.0, torch.float32, "NCHW") for _ in range(2)]
    shape = list(maps[0].shape)
    with pytest.raises(RuntimeError, match=r"dkf_statistics: float64 is not supported .* \[B=16, C=24, H=7, W=7\]"):
        native().emulate_dkf_statistics([numbers_of(maps[0])], shape, 1, 0, 4, False)
    with pytest.raises(RuntimeError, match="at most 16"):
        native().emulate_dkf_statistics([numbers_of(maps[0])] * 17, shape, 0, 0, 4, False)
