"""The Triton kernels of the classifiers in Triton's interpreter, on the CPU, where a product of TF32 is one of float32.

What TF32 makes of it on a GPU is the subject of tests/ptx. Triton decides at its import whether it interprets, so the
checks run in a separate process: there pytest collects the functions of this file that are named ``check_``.
"""

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
pytest.importorskip("triton", reason="needs Triton, which is not installed")
from shike_fast import nn  # noqa: E402
from shike_fast.kernels.classifiers import logits as kernels  # noqa: E402
from shike_fast.ops import expert_logits  # noqa: E402


@pytest.mark.slow
def test_in_the_interpreter(interpret):
    interpret(__file__, [name for name in globals() if name.startswith("check_")])


def factors(experts, batch, dim, classes, dtype=torch.float32):
    return torch.randn(experts, batch, dim).to(dtype), torch.randn(experts, dim, classes).to(dtype)


def results(leaves, backend, dtype=None, call=expert_logits, **options):
    """Logits and gradients, for a grad_output that is no constant."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    z = call(*leaves, backend=backend, **options)
    g = torch.linspace(-0.5, 0.3, z.numel(), dtype=z.dtype).view_as(z)
    return [z.detach(), *torch.autograd.grad(z, leaves, g)]


def compare(leaves, tolerance=2e-6, **options):
    mine, expected = results(leaves, "triton", **options), results(leaves, "reference", torch.float64, **options)
    assert mine[0].dtype == torch.float32
    for got, exact, like in zip(mine, expected, (mine[0], *leaves), strict=True):
        assert got.shape == exact.shape and got.dtype == like.dtype
        size = exact.abs().max() if exact.numel() else 0
        rounding = torch.finfo(got.dtype).eps if got.dtype != torch.float32 else 0
        assert got.numel() == 0 or (got.double() - exact).abs().max() <= (tolerance + rounding) * size


SHAPES = [(2, 5, 7, 9), (1, 70, 33, 130), (60, 2, 3, 4), (1, 1, 2, 1), (3, 0, 4, 5), (1, 600, 3, 70)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "half"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def check_cosines(shape, dtype):
    compare(factors(*shape, dtype), cosine_scale=30.0)


@pytest.mark.parametrize("shape", SHAPES)
def check_linear(shape):
    compare(factors(*shape))
    compare((*factors(*shape), torch.randn(shape[0], shape[3])))


def check_layouts():
    x, w = torch.randn(3, 10, 7).mT[:, ::2, 1:], torch.randn(18, 9, 3).permute(2, 1, 0)[:, :, ::2]
    compare((x, w), cosine_scale=12.5)
    compare((torch._neg_view(-x), torch._neg_view(-w)), cosine_scale=1.0)


@pytest.mark.parametrize("of_features", [1e-20, 1e-11, 1e15])
@pytest.mark.parametrize("of_weight", [1e-20, 1e-11, 1e15])
def check_vectors_of_any_length(of_features, of_weight):
    x, w = factors(2, 5, 16, 7)
    compare((of_features * x, of_weight * w), 1e-5, cosine_scale=30.0)


def check_norms_below_epsilon():
    x, w = factors(3, 5, 16, 7)
    x[2, 3], w[1, :, 2] = 0.0, 0.0
    z, *gradients = results((x, w), "triton", cosine_scale=30.0)
    _, *expected = results((x, w), "reference", torch.float64, cosine_scale=30.0)
    assert not z[1, :, 2].any() and not z[2, 3].any()
    for got, exact in zip(gradients, expected, strict=True):  # of the others, then of those, 1e12 times as large
        ordinary = exact.abs() < 1e6
        for part in (ordinary, ~ordinary):
            torch.testing.assert_close(got[part].double(), exact[part], rtol=1e-4, atol=1e-6 * exact[part].abs().max())


def check_nan_is_not_swallowed():
    x, w = factors(2, 5, 7, 9)
    x[1, 2, 3] = torch.nan
    z = expert_logits(x, w, cosine_scale=30.0, backend="triton")
    assert z[1, 2].isnan().all() and z[0].isfinite().all() and z[1, :2].isfinite().all()


def check_frozen_factors(monkeypatch):
    """Of a factor that needs no gradient none is computed."""
    x, w = factors(2, 5, 7, 9)
    products = []
    real = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda *args, **options: products.append(0) or real(*args, **options))
    _, *expected = results((x, w), "reference", cosine_scale=30.0)
    for number in (0, 1):
        leaves = [x.clone(), w.clone()]
        leaves[number].requires_grad_()
        z = expert_logits(*leaves, cosine_scale=30.0, backend="triton")
        (gradient,) = torch.autograd.grad(z, leaves[number], torch.linspace(-0.5, 0.3, z.numel()).view_as(z))
        torch.testing.assert_close(gradient, expected[number], rtol=1e-4, atol=1e-6)
        assert len(products) == 2
        products.clear()


def check_logits_may_be_changed_in_place():
    x, w = (t.requires_grad_() for t in factors(2, 5, 7, 9))
    results = []
    for backend in ("triton", "reference"):
        z = expert_logits(x, w, cosine_scale=30.0, backend=backend)
        z *= 2.0
        z[:, :, 3] = 0.0
        results.append(torch.autograd.grad(z.square().sum(), (x, w)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def check_two_runs_are_identical():
    leaves = factors(2, 70, 37, 130)
    first, second = (results(leaves, "triton", cosine_scale=30.0) for _ in range(2))
    assert all(map(torch.equal, first, second))


def check_a_second_derivative_is_refused():
    x, w = (t.requires_grad_() for t in factors(2, 3, 4, 5))
    z = expert_logits(x, w, cosine_scale=30.0, backend="triton")
    gradient = torch.autograd.grad(z.square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"expert_logits_fused: it can be differentiated once only; backend='ref"):
        gradient.sum().backward()


def check_tracers():
    x, w = factors(2, 5, 8, 9)
    expected = results((x, w), "reference", cosine_scale=30.0)
    torch._dynamo.reset()
    compiled = torch.compile(expert_logits, fullgraph=True, backend="aot_eager")
    mine = results((x, w), "triton", call=compiled, cosine_scale=30.0)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    g = torch.linspace(-0.5, 0.3, 90).view(2, 5, 9)
    scalar = lambda x, w: (expert_logits(x, w, cosine_scale=30.0, backend="triton") * g).sum()  # noqa: E731
    torch.testing.assert_close([*torch.func.grad(scalar, (0, 1))(x, w)], expected[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.grad(scalar, 1)(x, w), expected[2], rtol=1e-4, atol=1e-5)
    for bias, scale in ((None, 30.0), (torch.randn(2, 9), None)):
        leaves = [t.clone().requires_grad_() for t in (x, w, bias) if t is not None]
        arguments = [leaves[:1], leaves[1:2], leaves[2:], scale, "highest", [True, True]]
        found = torch.library.opcheck(torch.ops.shike_fast.expert_logits_fused.default, arguments)
        assert set(found.values()) == {"SUCCESS"} and len(found) == 4


def check_modules():
    for kind in (nn.CosineClassifier, nn.LinearClassifier):
        mine, reference = (kind(2, 16, 9, backend=backend) for backend in ("triton", "reference"))
        reference.load_state_dict(mine.state_dict())
        x = torch.randn(2, 5, 16).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(mine(x), reference(x), rtol=1e-5, atol=1e-5)


def check_pytorchs_setting_allows_tf32(monkeypatch):
    x, w = factors(1, 2, 3, 4)
    precisions = []
    real = kernels._input_precision
    monkeypatch.setattr(kernels, "_input_precision", lambda name: precisions.append(name) or real(name))
    for setting, asked in (("highest", "highest"), ("highest", "high"), ("high", "highest"), ("medium", "highest")):
        torch.set_float32_matmul_precision(setting)
        expert_logits(x, w, precision=asked, backend="triton")
    torch.set_float32_matmul_precision("highest")
    assert precisions == ["highest", "high", "high", "high"]
    monkeypatch.setattr(kernels, "_TENSOR_CORES", True)
    assert [real(name) for name in ("highest", "high")] == ["tf32x3", "tf32"]
    monkeypatch.setattr(kernels, "_TENSOR_CORES", False)
    assert [real(name) for name in ("highest", "high")] == ["ieee", "ieee"]
