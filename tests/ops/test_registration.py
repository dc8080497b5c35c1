"""Every op under torch.library.opcheck, torch.compile, torch.export, torch.func and activation checkpointing."""

import copy
import shutil

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from shike_fast import ops
from shike_fast.ops._expert_call import OTHERS, ExpertOptions, ExpertTensors

TARGET = torch.tensor([0, 6, 3, 2, 2])
COUNTS = torch.tensor([90, 40, 12, 5, 2, 1, 0])


class Fusion(torch.nn.Module):
    """dkf_bn_pool with the parameters and running statistics of a BatchNorm2d, as a network uses it."""

    def __init__(self, channels, relu):
        super().__init__()
        self.norm, self.relu = torch.nn.BatchNorm2d(channels), relu

    def forward(self, deep, shallow):
        norm = self.norm
        return ops.dkf_bn_pool(
            deep,
            shallow,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            training=self.training,
            relu=self.relu,
        )


class Function(torch.nn.Module):
    """A function of tensors as a module, which torch.export wants."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def logits():
    return (torch.randn(3, 5, 7),)


def factors():
    return torch.randn(3, 5, 8), torch.randn(3, 8, 7)


def maps():
    return torch.randn(4, 6, 3, 3), torch.randn(4, 6, 3, 3)


CALLS = {
    "dkt_loss": (lambda z: ops.dkt_loss(z, TARGET), logits),
    "dkt_loss of a sequence": (lambda z: ops.dkt_loss(z.unbind(0), TARGET, detach_teacher=True), logits),
    "expert_cross_entropy": (lambda z: ops.expert_cross_entropy(z, TARGET, label_smoothing=0.1), logits),
    "balanced_softmax_loss": (lambda z: ops.balanced_softmax_loss(z, TARGET, COUNTS), logits),
    "expert_loss": (
        lambda z: ops.expert_loss(
            *(z, TARGET),
            **{"bias": COUNTS.log1p(), "target_b": TARGET.flip(0), "lam": 0.3, "label_smoothing": 0.1},
            kl=ops.ExpertKL("mean", temperature=2.0),
            ensemble="mean",
        ),
        logits,
    ),
    "expert_loss of a sequence": (
        lambda z: ops.expert_loss(z.unbind(0), TARGET, margin=COUNTS / 30, kl=ops.ExpertKL(gate="teacher_correct")),
        logits,
    ),
    "expert_kl": (lambda z: ops.expert_kl(z, weight=TARGET / 6, eps=1e-9), logits),
    "expert_logits": (lambda x, w: ops.expert_logits(x, w, cosine_scale=30.0), factors),
    "dkf_pool": (ops.dkf_pool, maps),
    "dkf_bn_pool": (
        lambda deep, shallow: ops.dkf_bn_pool(deep, shallow, None, None, None, None, training=True, relu=True),
        maps,
    ),
}


@pytest.fixture(params=CALLS)
def call(request):
    """A function and its inputs, which require gradients."""
    function, make = CALLS[request.param]
    return function, tuple(t.requires_grad_() for t in make())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def value_and_gradients(function, inputs):
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value.sum(), inputs)


TENSORS_OF_TWO_LABELS = ExpertTensors(
    TARGET,
    target_b=TARGET.flip(0),
    lam=torch.rand(5),
    bias=torch.randn(3, 7),
    margin=torch.rand(7),
    class_weight=torch.rand(7),
    sample_weight=torch.rand(3, 5),
)
EXPERT_CALLS = [  # of the composite and of the fused operators
    (TENSORS_OF_TWO_LABELS, ExpertOptions(True, label_smoothing=0.1, reduction="weighted_mean", rows=True)),
    (ExpertTensors(TARGET, scale=torch.rand(7)), ExpertOptions(True, reduction="none")),
    (ExpertTensors(TARGET), ExpertOptions(True, teacher=OTHERS, gated=True, detach=False)),
]


OPCHECK = {
    "dkt_loss": [
        (logits, (TARGET, 10.0, 1.0, "mean", 0.0, -30.0, False)),
        (logits, (TARGET, 3.0, 0.0, "batchmean", -1.0, -9.0, True)),
    ],
    "expert_cross_entropy": [(logits, (TARGET, None, 0.0)), (logits, (TARGET, torch.randn(3, 7), 0.1))],
    "balanced_softmax_loss": [(logits, (TARGET, COUNTS))],
    "expert_loss": [(logits, (None, *tensors, *options)) for tensors, options in EXPERT_CALLS[::2]],
    "expert_kl": [(logits, (None, *[None] * len(ExpertTensors._fields), *ExpertOptions(False, teacher=OTHERS)))],
    "expert_logits": [(factors, (None, 30.0, "highest")), (factors, (torch.randn(3, 7), None, "high"))],
    "dkf_pool": [(maps, ())],
    "dkf_bn_pool": [
        (maps, (torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6), True, 0.1, 1e-5, True)),
        (maps, (torch.ones(6), None, torch.zeros(6), torch.ones(6), False, 0.1, 1e-5, False)),
        (maps, (None, None, None, None, True, 0.1, 1e-5, False)),
    ],
}


@pytest.mark.parametrize("name", OPCHECK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    for make, rest in OPCHECK[name]:
        inputs = tuple(t.to(dtype).requires_grad_() for t in make())
        results = torch.library.opcheck(getattr(torch.ops.shike_fast, name).default, (*inputs, *rest))
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_compiles_to_one_graph(call):
    function, inputs = call
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(value_and_gradients(compiled, inputs), value_and_gradients(function, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's inductor backend needs g++")
def test_compiles_with_inductor():
    """All ops in one graph, since most of the time goes into starting the C++ compiler."""
    z, (deep, shallow) = logits()[0], maps()
    inputs = tuple(t.requires_grad_() for t in (z, deep, shallow))

    def together(z, deep, shallow):
        values = [CALLS[name][0](z) for name in ("dkt_loss", "expert_cross_entropy", "balanced_softmax_loss")]
        values += [CALLS[name][0](deep, shallow).sum() for name in ("dkf_pool", "dkf_bn_pool")]
        return torch.stack(values)

    compiled = torch.compile(together, fullgraph=True)
    actual, expected = value_and_gradients(compiled, inputs), value_and_gradients(together, inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_compiles_once_for_all_batch_sizes():
    compiled = torch.compile(ops.dkt_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (5, 9, 2):
        z, y = torch.randn(3, batch, 7), torch.randint(7, (batch,))
        torch.testing.assert_close(compiled(z, y), ops.dkt_loss(z, y), rtol=1e-6, atol=0)


def test_compiles_with_a_weight_that_changes():
    compiled = torch.compile(ops.dkt_loss, fullgraph=True, backend="aot_eager")
    z = torch.randn(3, 5, 7)
    for weight in torch.linspace(10.0, 0.5, 20).tolist():  # more values than a function may be recompiled for
        expected = ops.dkt_loss(z, TARGET, hardest_weight=weight)
        torch.testing.assert_close(compiled(z, TARGET, hardest_weight=weight), expected, rtol=1e-6, atol=0)


def test_compiles_terms_and_argument_errors():
    z = torch.randn(3, 5, 7)
    compiled = torch.compile(lambda z, y: ops.dkt_loss(z, y, return_terms=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, TARGET), ops.dkt_loss(z, TARGET, return_terms=True))
    # The values of a target are not looked at while tracing.
    graph = torch.compile(ops.expert_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(graph(z, TARGET), ops.expert_cross_entropy(z, TARGET))


@pytest.mark.parametrize("strict", [False, True])
def test_exports(call, strict):
    function, inputs = call
    inputs = tuple(t.detach() for t in inputs)
    program = torch.export.export(Function(function), inputs, strict=strict)
    torch.testing.assert_close(program.module()(*inputs), function(*inputs))
    decomposed = program.run_decompositions()
    torch.testing.assert_close(decomposed.module()(*inputs), function(*inputs))


def test_exports_a_dynamic_batch():
    batch = torch.export.Dim("batch", min=2)
    module = Function(lambda z, y: ops.dkt_loss(z, y))
    program = torch.export.export(module, (torch.randn(3, 5, 7), TARGET), dynamic_shapes=(({1: batch}, {0: batch}),))
    z, y = torch.randn(3, 11, 7), torch.randint(7, (11,))
    torch.testing.assert_close(program.module()(z, y), ops.dkt_loss(z, y))


def test_func_grad(call):
    function, inputs = call
    _, *expected = value_and_gradients(function, inputs)
    positions = tuple(range(len(inputs)))
    gradients = torch.func.grad(lambda *args: function(*args).sum(), positions)(*(t.detach() for t in inputs))
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_checkpoint(call):
    function, inputs = call
    recomputed = value_and_gradients(lambda *args: checkpoint(function, *args, use_reentrant=False), inputs)
    for mine, theirs in zip(recomputed, value_and_gradients(function, inputs), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_compiled_module_updates_running_statistics(training, relu):
    eager = Fusion(6, relu).train(training)
    compiled_module = copy.deepcopy(eager)
    compiled = torch.compile(compiled_module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        deep, shallow = maps()
        f, expected = compiled(deep, shallow), eager(deep, shallow)
        torch.testing.assert_close(f, expected)
        f.sum().backward()
        expected.sum().backward()
    for (name, mine), theirs in zip(compiled_module.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    for mine, theirs in zip(compiled_module.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert bool((eager.norm.running_mean != 0).any()) == training


def test_exported_module_updates_running_statistics():
    eager = Fusion(6, True)
    inputs = maps()
    program = torch.export.export(copy.deepcopy(eager), inputs)
    module = program.module()
    torch.testing.assert_close(module(*inputs), eager(*inputs))
    torch.testing.assert_close(dict(module.named_buffers())["norm.running_var"], eager.norm.running_var)


def test_fake_tensors():
    z, (deep, shallow) = logits()[0].bfloat16(), maps()
    with torch._subclasses.FakeTensorMode() as mode:
        z, target, counts, deep, shallow = (mode.from_tensor(t) for t in (z, TARGET, COUNTS, deep, shallow))
        losses = (
            ops.dkt_loss(z, target),
            ops.expert_cross_entropy(z, target),
            ops.balanced_softmax_loss(z, target, counts),
            ops.expert_loss(z, target, bias=counts, kl=ops.ExpertKL(weight=0.5)),
            ops.expert_kl(z, "mean"),
        )
        pooled = (
            ops.dkf_pool(deep, shallow),
            ops.dkf_bn_pool(deep, shallow, None, None, None, None, training=True),
        )
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses)
    assert all(f.shape == (4, 6) and f.dtype == torch.float32 for f in pooled)


def fused_cases():
    """Arguments of the fused ops and of their backward ops: one tensor and a sequence, with every optional tensor.

    The name, the experts, the tensors, and the rest.
    """
    dkt = (10.0, 1.0, 0.0, -30.0, False, "cpu")
    factors = torch.tensor([2.0, 0.5], dtype=torch.float64)
    cases = [
        ("dkt_loss", (TARGET, None), dkt),
        ("dkt_loss", (TARGET, factors), dkt),
        *(("expert_loss", tuple(tensors), (*options, "cpu")) for tensors, options in EXPERT_CALLS),
    ]
    for name, tensors, rest in cases:
        for experts in (logits(), logits()[0].unbind(0)):
            yield name, [expert.clone() for expert in experts], tensors, rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_of_the_fused_ops(dtype):
    for name, experts, tensors, rest in fused_cases():
        experts = [expert.to(dtype).requires_grad_() for expert in experts]
        op = getattr(torch.ops.shike_fast, f"{name}_fused").default
        results = torch.library.opcheck(op, (experts, *tensors, *rest))
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4

        loss, *_, state = (result.detach() for result in op(experts, *tensors, *rest))
        backward = getattr(torch.ops.shike_fast, f"{name}_fused_backward").default
        plain = [expert.detach() for expert in experts]
        arguments = (torch.full_like(loss, 2.0), plain, *tensors, state, *rest)
        results = torch.library.opcheck(backward, arguments)
        assert set(results.values()) == {"SUCCESS"} and len(results) == 4


def test_an_op_called_directly_differentiates():
    for name, experts, tensors, rest in fused_cases():
        op = getattr(torch.ops.shike_fast, f"{name}_fused").default
        leaves = [expert.requires_grad_() for expert in experts]
        loss, *others = op(leaves, *tensors, *rest)
        assert loss.requires_grad and not any(other.requires_grad for other in others)
        gradients = torch.autograd.grad(loss.sum(), leaves)
        assert all(gradient.shape == leaf.shape for gradient, leaf in zip(gradients, leaves, strict=True))
        with torch.no_grad():
            assert torch.equal(op(leaves, *tensors, *rest)[0], loss)
