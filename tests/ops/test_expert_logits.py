"""expert_logits: its arguments, its reference, and what it refuses.

Its kernels are tested in tests/kernels and tests/ptx, compilers and tracers in ``test_registration.py``.
"""

import math
import sys

import pytest
import torch
import torch.nn.functional as F

from shike_fast import ops
from shike_fast.ops import _dispatch, _verification, expert_logits
from shike_fast.ops._verdicts import PASSED, Verdict

OP = "expert_logits"


def factors(dtype=torch.float32, device="cpu", shape=(3, 5, 8, 7)):
    experts, batch, dim, classes = shape
    weight = torch.randn(experts, dim, classes) * (torch.rand(experts, 1, classes) + 0.5)
    return torch.randn(experts, batch, dim).to(device, dtype), weight.to(device, dtype)


def published(x, w, scale):
    return scale * F.normalize(x, dim=2) @ F.normalize(w, dim=1)


def test_it_is_the_published_expression(backend, device):
    x, w = factors(device=device, shape=(3, 130, 300, 70))
    exact = published(x.double(), w.double(), 30.0)
    logits = expert_logits(x, w, cosine_scale=30, backend=backend)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 30 * 2.0**-20
    bias = torch.randn(3, 70, device=device)
    size = x.norm(dim=2, keepdim=True) * w.norm(dim=1, keepdim=True) + bias.abs().unsqueeze(1)
    exact = x.double() @ w.double() + bias.double().unsqueeze(1)
    assert ((expert_logits(x, w, bias, backend=backend) - exact).abs() < 2.0**-20 * size).all()
    no_bias = expert_logits(x, w, backend=backend)
    torch.testing.assert_close(no_bias, expert_logits(x, w, 0 * bias, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients(backend, device, dtype):
    x, w = factors(dtype, device)
    g = torch.randn(3, 5, 7, device=device)
    results = []
    for leaves, name in (((x, w), backend), ((x.double(), w.double()), "reference")):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        z = expert_logits(*leaves, cosine_scale=30.0, backend=name)
        results.append(torch.autograd.grad(z, leaves, g.to(z.dtype)))
        again = torch.autograd.grad(expert_logits(*leaves, cosine_scale=30.0, backend=name), leaves, g.to(z.dtype))
        assert all(map(torch.equal, results[-1], again))
    for mine, exact in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - exact).abs().max() <= (1e-5 + torch.finfo(dtype).eps) * exact.abs().max()


@pytest.mark.parametrize("experts", [1, 60])
def test_derivatives(experts):
    x, w = (t.requires_grad_() for t in factors(torch.float64, shape=(experts, 2, 2, 2)))
    bias = torch.randn(experts, 2, dtype=torch.float64, requires_grad=True)
    cosine = lambda x, w: expert_logits(x, w, cosine_scale=3.0)  # noqa: E731
    assert torch.autograd.gradcheck(cosine, (x, w)) and torch.autograd.gradcheck(expert_logits, (x, w, bias))
    if experts == 1:
        assert torch.autograd.gradgradcheck(cosine, (x, w))
        assert torch.autograd.gradgradcheck(expert_logits, (x, w, bias))
        assert torch.autograd.gradcheck(cosine, (x, w), check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(backend, device, dtype):
    x, w = factors(device=device)
    bias = torch.randn(3, 7, device=device)
    for arguments in ({"cosine_scale": 30.0}, {"bias": bias}, {}):
        expected = expert_logits(x, w, **arguments, backend=backend)
        with torch.autocast(device.type, dtype=dtype):
            assert torch.equal(expert_logits(x, w, **arguments, backend=backend), expected)


def test_shapes_without_data():
    x, w = factors(device="meta")
    assert expert_logits(x, w, cosine_scale=30.0).shape == (3, 5, 7)
    x, w = factors(torch.float64, shape=(2, 0, 4, 3))
    logits = expert_logits(x.requires_grad_(), w.requires_grad_(), cosine_scale=30.0)
    assert logits.shape == (2, 0, 3) and logits.dtype == torch.float64
    logits.sum().backward()
    assert x.grad.shape == (2, 0, 4) and not w.grad.any()
    assert expert_logits(x, w.float()).dtype == torch.float64 and expert_logits(x.float(), w).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": None}, TypeError, r"features must be a tensor \[K, B, D\], got NoneType"),
        ({"weight": [1.0]}, TypeError, r"weight must be a tensor \[K, D, C\], got list"),
        ({"bias": 0.5}, TypeError, r"bias must be a tensor \[K, C\], got float"),
        ({"features": torch.zeros(3, 5, 8, dtype=torch.int64)}, TypeError, r"features must be floating point .* int64"),
        (
            {"weight": torch.zeros(3, 8, 7).to_sparse()},
            TypeError,
            "weight must be a dense tensor, got a sparse_coo one",
        ),
        (
            {"weight": torch.zeros(3, 8, 7, device="meta")},
            ValueError,
            r"weight must be on cpu as features, got .* meta",
        ),
        ({"features": torch.zeros(5, 8)}, ValueError, r"features must be \[K, B, D\] with K, D >= 1, got float32 \[5"),
        (
            {"features": torch.zeros(3, 5, 0)},
            ValueError,
            r"features must be \[K, B, D\] with K, D >= 1, got float32 \[3",
        ),
        ({"weight": torch.zeros(3, 7, 8)}, ValueError, r"weight must be \[K=3, D=8, C >= 1\], got float32 \[3, 7, 8\]"),
        ({"weight": torch.zeros(3, 8, 0)}, ValueError, r"weight must be \[K=3, D=8, C >= 1\], got float32 \[3, 8, 0\]"),
        ({"bias": torch.zeros(7)}, ValueError, r"bias must be \[K=3, C=7\], got float32 \[7\]"),
        ({"cosine_scale": 0.0}, ValueError, r"cosine_scale must be positive, got 0.0"),
        ({"cosine_scale": math.nan}, ValueError, r"cosine_scale must be finite, got nan"),
        ({"cosine_scale": "30"}, TypeError, r"cosine_scale must be a number, got str"),
        ({"cosine_scale": 1.0, "bias": torch.zeros(3, 7)}, ValueError, r"a cosine classifier has no bias, got float32"),
        ({"precision": "tf32"}, ValueError, r"precision must be 'highest' or 'high', got 'tf32'"),
        ({"backend": "gpu"}, ValueError, r"backend must be None or one of .*, got 'gpu'"),
    ],
)
def test_bad_arguments(change, error, message):
    x, w = factors()
    with pytest.raises(error, match=f"^expert_logits: {message}"):
        expert_logits(**{"features": x, "weight": w, **change})


def test_backends_that_cannot_run():
    x, w = factors()
    for backend, reason in (
        ("triton", "the features are on cpu, not on a GPU"),
        ("cpu", "it does not implement this op"),
    ):
        with pytest.raises(RuntimeError) as caught:
            expert_logits(x, w, backend=backend)
        assert str(caught.value) == f"expert_logits: backend {backend!r} cannot run: {reason}"


def test_a_cpu_has_no_kernels_of_it_to_verify(monkeypatch, tmp_path):
    """A first call there tries nothing, and says nothing."""
    monkeypatch.setenv("SHIKE_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_verification, "_known", {})
    monkeypatch.setattr(_verification, "verify", lambda *_, **__: pytest.fail("it is tried"))
    monkeypatch.setattr(_dispatch.OPERATORS[OP], "_orders", {})
    x, w = factors()
    expert_logits(x, w)
    torch._dynamo.reset()
    torch.compile(expert_logits, fullgraph=True, backend="eager")(x, w)
    assert OP in _dispatch._implemented()["triton"] and OP not in _dispatch._implemented()["cpu"]
    assert OP not in _dispatch._implemented()["cuda"]


def test_the_triton_backend_is_tried_on_a_gpu_and_the_cuda_one_is_not(monkeypatch):
    tried = {}
    monkeypatch.setattr(_verification._verdicts, "machine", lambda _: {"device": "a GPU"})
    monkeypatch.setattr(_verification._verdicts, "load", lambda _: None)
    monkeypatch.setattr(_verification._verdicts, "store", lambda *_: None)
    monkeypatch.setattr(_verification, "_known", {})

    def trial(backend, device, operators, *, seconds):
        tried[backend] = operators
        return dict.fromkeys(operators, Verdict(PASSED))

    monkeypatch.setattr(_verification, "tried", trial)
    _verification.verify(torch.device("cuda", 0), _dispatch._implemented(), lambda *_: None)
    assert OP in tried["triton"] and OP not in tried["cuda"] and "dkt_loss" in tried["cuda"]


def test_a_slower_kernel_is_not_taken():
    times = {"float32 large": (3.0, 2.0), "float32 small": (1.0, 2.5)}
    known = {"triton": {OP: Verdict(PASSED, "", times)}}
    assert _verification.order(OP, known, torch.float32, "small")[0] == "triton"
    slower = {"triton": {OP: Verdict(PASSED, "", {"float32 large": (5.0, 2.0)})}}
    assert _verification.order(OP, slower, torch.float32, "large")[0] == "reference"


def test_pytorchs_setting_is_read_however_it_was_made(programs):
    """In separate processes: reading it the old way raises where both ways were used."""
    code = (
        "import torch; from shike_fast.ops import expert_logits; import sys; "
        "m = sys.modules['shike_fast.ops.expert_logits']; seen = [m._tf32_is_allowed()]\n"
        "for line in ({}): exec(line); seen.append(m._tf32_is_allowed())\n"
        "print(seen)"
    )
    new = (
        "'torch.backends.cuda.matmul.fp32_precision = \"tf32\"', 'torch.backends.cuda.matmul.fp32_precision = \"ieee\"'"
    )
    old = "'torch.set_float32_matmul_precision(\"high\")', 'torch.backends.cuda.matmul.allow_tf32 = False'"
    for lines in (new, old):
        done = programs.run([sys.executable, "-c", code.format(lines)])
        assert done.stdout.strip() == "[False, True, False]", done.stderr


def test_it_is_public():
    assert ops.expert_logits is expert_logits and "expert_logits" in ops.__all__
