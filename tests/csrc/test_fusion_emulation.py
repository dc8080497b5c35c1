"""The CUDA kernels of depth-wise knowledge fusion, with their blocks and threads, emulated on the CPU."""

import pytest
import torch
from emulated_fusion import DTYPES, LAYOUTS, Case, Reference, check, laid_out, statistics_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from shike_fast.ops import _native_dkf
from shike_fast.ops._native import native


@pytest.fixture(autouse=True)
def _one_thread():
    """The arrays are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    grad_output = torch.randn(experts, batch, channels, generator=generator).to(dtype)
    moments = None
    if draw(st.booleans()):
        moments = torch.rand(norms, 2, channels, generator=generator, dtype=torch.float64) + 0.5
    return case, grad_output, moments, results


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.booleans())
def test_any_case(arguments, descending):
    case, grad_output, moments, results = arguments
    check(case, grad_output, moments, results, descending)


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
    grad_output = torch.randn(1, 16, 24)
    check(case, grad_output, None, [torch.empty_like(map_) for map_ in maps])
    moments = torch.tensor([[1e4, 1.0], [1e4, 1.0]], dtype=torch.float64)[:norms, :, None].repeat(1, 1, 24)
    check(case, grad_output, moments, [torch.empty_like(map_) for map_ in maps])


def test_large_mean_of_a_map_that_the_features_follow():
    """d(weight) is large then, and so is its share in the gradient of the map."""
    shallow = channels_with(1e4, 1.0, torch.float32, "channels last")
    case = Case([shallow - 1e4, shallow], [False], [None], [None], [1e-5])
    _, sums, mean_rstd, _ = case.forward()
    vectors = case.vector_gradients(torch.ones(1, 16, 24), sums)
    results = [torch.empty_like(shallow) for _ in range(2)]
    _, gradient = case.map_gradients(torch.ones(1, 16, 24), mean_rstd, vectors, 1 / (16 * 49), results)
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
    grad_output = torch.randn(1, 33, 40).bfloat16()
    runs = []
    for descending in (False, False, True):
        f, sums, mean_rstd, statistics = case.forward(descending=descending)
        vectors = case.vector_gradients(grad_output, sums, descending)
        gradients = [torch.empty_like(map_) for map_ in maps]
        case.map_gradients(grad_output, mean_rstd, vectors, 1e-3, gradients, descending)
        runs.append([f, sums, mean_rstd, statistics, vectors, *gradients, statistics_of(maps, 16, descending)])
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


def test_float64_and_seventeen_maps_are_refused():
    maps = [channels_with(0.0, 1.0, torch.float32, "NCHW")]
    rest = {"shape": maps[0].shape, "statistics": torch.empty(1, 3, 24), "processors": 4, "descending": False}
    with pytest.raises(RuntimeError, match=r"dkf_statistics: float64 is not supported .* \[B=16, C=24, H=7, W=7\]"):
        native().emulate_dkf_statistics(dtype=1, maps=maps, **rest)
    with pytest.raises(TypeError, match="emulate_dkf_statistics: argument 'maps': expected 1 to 16 elements, got 17"):
        native().emulate_dkf_statistics(dtype=0, maps=maps * 17, **rest)
