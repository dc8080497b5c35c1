"""dkf_pool, dkf_bn_pool and dkf_experts on tokens [B, N, C]: as on the same values in a map [B, C, N, 1]."""

import pytest
import torch

from shike_fast.ops import BatchNormArguments, dkf_bn_pool, dkf_experts, dkf_pool

OP = "dkf_experts"
PLAIN = BatchNormArguments(None, None, None, None, training=True)


def tokens(shape=(4, 9, 6), dtype=torch.float64, device="cpu"):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype).requires_grad_()


def as_map(x):
    return x.transpose(1, 2)[..., None]


def vectors(device="cpu", dtype=torch.float64):
    drawn = [torch.randn(6), torch.randn(6), torch.zeros(6), torch.ones(6)]
    return [vector.to(device, dtype) for vector in drawn]


CALLS = {
    "dkf_pool": dkf_pool,
    "dkf_bn_pool": lambda x, y, **options: dkf_bn_pool(
        x, y, *vectors(x.device, torch.float64), training=True, relu=True, **options
    ),
    "dkf_bn_pool, evaluated": lambda x, y, **options: dkf_bn_pool(
        x, y, *vectors(x.device, torch.float64), training=False, **options
    ),
    "dkf_experts": lambda x, y, **options: dkf_experts([x, y], [y, x], [PLAIN, PLAIN], relu=[True, False], **options),
    "dkf_experts with shortcuts": lambda x, y, **options: dkf_experts(
        [x], [y], [PLAIN], relu=[True], shortcut=[torch.ones_like(y)], deep_norms=[PLAIN], **options
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tokens_are_a_map_of_one_column(name, dtype, device, backend):
    inputs = [tokens(dtype=dtype, device=device) for _ in range(2)]
    results = []
    for view in (lambda x: x, as_map):
        torch.manual_seed(1)
        f = CALLS[name](*map(view, inputs), backend=backend)
        torch.manual_seed(2)
        results.append([f, *torch.autograd.grad(f, inputs, torch.randn_like(f))])
    assert results[0][0].shape[-2:] == (4, 6)
    assert all(map(torch.equal, *results))


def test_the_formula():
    deep, shallow = tokens(), tokens()
    torch.testing.assert_close(dkf_pool(deep, shallow), (deep * shallow).mean(1), rtol=1e-12, atol=1e-12)
    normalised = torch.nn.functional.batch_norm(shallow.transpose(1, 2), None, None, training=True).transpose(1, 2)
    f = dkf_bn_pool(deep, shallow, None, None, None, None, training=True, relu=True)
    torch.testing.assert_close(f, (deep * normalised.relu()).mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    def call(*inputs):
        torch.manual_seed(1)  # weight and bias
        return CALLS[name](*inputs)

    assert torch.autograd.gradcheck(call, (tokens((3, 4, 6)), tokens((3, 4, 6))))


@pytest.mark.parametrize("name", CALLS)
def test_one_graph(name):
    def call(*inputs):
        return CALLS[name](*inputs)

    torch._dynamo.reset()
    inputs = [tokens(dtype=torch.float32) for _ in range(2)]
    if "bn_pool" in name:
        constant = vectors(dtype=torch.float32)
        training = "evaluated" not in name

        def call(*inputs):
            return dkf_bn_pool(*inputs, *constant, training=training, relu=True, momentum=0.0)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for function in (call, compiled):
        f = function(*inputs)
        gradients = torch.autograd.grad(f.square().sum(), inputs)
        if function is call:
            expected = f, gradients
    torch.testing.assert_close((f, gradients), expected)


def test_opcheck_of_the_fused_operator_on_views_of_tokens():
    """What the public functions pass on: strides as they come from a transposed sequence."""
    deep, shallow = ([as_map(tokens(dtype=torch.float32).detach()).requires_grad_()] for _ in range(2))
    arguments = deep, shallow, [], [None], [None], None, [1e-5], [True], "cpu"
    torch.library.opcheck(torch.ops.shike_fast.dkf_fused.default, arguments)


def test_nothing_is_copied():
    """The kernels read tokens where they are: contiguous ones look like a channels-last map."""
    view = as_map(tokens((4, 9, 6)))
    assert view.is_contiguous(memory_format=torch.channels_last)
    patches = tokens((4, 10, 6))[:, 1:]  # without a class token
    torch.testing.assert_close(dkf_pool(patches, patches), patches.square().mean(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (([torch.zeros(2, 3)], [torch.zeros(2, 3)]), ValueError, r"deep\[0\] must be \[B, C, H, W\] or \[B, N, C\]"),
        (
            ([torch.zeros(2, 3, 4)], [torch.zeros(2, 4, 3)]),
            ValueError,
            r"shallow\[0\] must be \[2, 3, 4\] as deep\[0\], got float32 \[2, 4, 3\]",
        ),
        (
            ([torch.zeros(2, 3, 4)], [torch.zeros(2, 4, 3, 1)]),
            ValueError,
            r"shallow\[0\] must be \[2, 3, 4\] as deep\[0\], got float32 \[2, 4, 3, 1\]",
        ),
        (
            (torch.zeros(1, 2, 3, 4), [torch.zeros(2, 3, 4)]),
            TypeError,
            r"deep must be a list or tuple of K tensors \[B, C, H, W\] or \[B, N, C\], got Tensor",
        ),
        (([torch.zeros(1, 1, 4)], [torch.zeros(1, 1, 4)]), ValueError, "Expected more than 1 value per channel"),
    ],
)
def test_errors(inputs, error, message):
    with pytest.raises(error, match=f"^dkf_experts: {message}"):
        dkf_experts(*inputs, [PLAIN], relu=[True])
