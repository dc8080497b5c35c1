"""dkf_experts: its arguments, and what autograd and the tracers see of the fused fusion."""

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shike_fast import ops
from shike_fast.ops import BatchNormArguments, dkf_bn_pool, dkf_experts, dkf_pool

SHAPE, RELU = (4, 6, 3, 5), [True, False]


def maps(count=2, shape=SHAPE, dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(count)]


def norm(channels=6, training=True, **changes):
    vectors = torch.rand(channels), torch.randn(channels), torch.zeros(channels), torch.ones(channels)
    return BatchNormArguments(*vectors, training=training)._replace(**changes)


def copied(one):
    """The same norm with running statistics that no other changes."""
    return one._replace(running_mean=one.running_mean.clone(), running_var=one.running_var.clone())


def arguments(**changes):
    """Valid arguments of two experts with a residual end, changed as asked."""
    values = {
        "deep": maps(),
        "shallow": maps(),
        "norms": [norm(), norm()],
        "relu": RELU,
        "shortcut": maps(),
        "deep_norms": [norm(), norm()],
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"deep": maps()[0]}, TypeError, "deep must be a list or tuple of K tensors"),
        ({"deep": [], "shallow": []}, ValueError, "deep must have K >= 1 members, got none"),
        ({"shallow": maps(3)}, ValueError, "shallow must have K=2 members, got 3"),
        ({"shortcut": maps(1)}, ValueError, "shortcut must have K=2 members, got 1"),
        ({"shortcut": None}, ValueError, "shortcut and deep_norms must both be given or both be None, got no shortcut"),
        ({"deep_norms": None}, ValueError, "must both be given or both be None, got no deep_norms"),
        ({"norms": [norm()]}, ValueError, "norms must have K=2 members, got 1"),
        ({"relu": [True]}, ValueError, "relu must have K=2 members, got 1"),
        ({"deep_norms": [norm()]}, ValueError, "deep_norms must have K=2 members, got 1"),
        ({"deep": [maps()[0], torch.zeros(4, 6, 3, 4)]}, ValueError, r"deep\[1\] must be \[4, 6, 3, 5\] as deep\[0\]"),
        ({"shallow": [maps()[0], torch.zeros(SHAPE).int()]}, TypeError, r"shallow\[1\] must be float16"),
        ({"shortcut": [torch.zeros(4, 6, 15), maps()[0]]}, ValueError, r"shortcut\[0\] must be \[4, 6, 3, 5\] as deep"),
        ({"norms": [norm(), norm(5)]}, ValueError, r"norms\[1\]\.weight must be \[C=6\], got float32 \[5\]"),
        ({"deep_norms": [norm(eps=0.0), norm()]}, ValueError, r"deep_norms\[0\]\.eps must be > 0, got 0\.0"),
        ({"norms": [norm(momentum=float("nan")), norm()]}, ValueError, r"norms\[0\]\.momentum must be finite"),
        ({"norms": [norm(running_var=None), norm()]}, ValueError, r"got no norms\[0\]\.running_var"),
        ({"backend": "fastest"}, ValueError, "backend must be None or one of"),
    ],
)
def test_argument_errors(changes, error, message):
    with pytest.raises(error, match=f"^dkf_experts: .*{message}"):
        dkf_experts(**arguments(**changes))


@pytest.mark.parametrize("experts", [9, 17])
@pytest.mark.parametrize("training", [True, False])
def test_more_experts_than_the_kernels_take_at_once(experts, training):
    norms, of_deep = ([norm(training=training) for _ in range(experts)] for _ in range(2))
    given = {"deep": maps(experts), "shallow": maps(experts), "relu": [k % 3 > 0 for k in range(experts)]}
    expected = torch.stack(
        [
            dkf_bn_pool(d, s, *copied(n)[:4], training=training, relu=relu)
            for d, s, n, relu in zip(given["deep"], given["shallow"], norms, given["relu"], strict=True)
        ]
    )
    torch.testing.assert_close(dkf_experts(**given, norms=[*map(copied, norms)], backend="cpu"), expected)
    given |= {"shortcut": maps(experts)}
    results = []
    for backend in ("cpu", "reference"):
        own, deep_norms = [*map(copied, norms)], [*map(copied, of_deep)]
        f = dkf_experts(**given, norms=own, deep_norms=deep_norms, backend=backend)
        results.append([f, *(statistic for n in own + deep_norms for statistic in n[2:4])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deep": [*maps(1), maps(1, dtype=torch.float16)[0]]}, "it takes maps of one dtype, got float32"),
        ({"norms": [norm(training=False), norm()]}, "some normalisations train and some do not"),
        ({name: maps(shape=(0, 6, 3, 5)) for name in ("deep", "shallow", "shortcut")}, "the batch is empty"),
    ],
)
def test_what_the_kernels_do_not_take(changes, reason):
    values = arguments(**changes)
    with pytest.raises(RuntimeError, match=f"^dkf_experts: backend 'cpu' cannot run: {reason}"):
        dkf_experts(**values, backend="cpu")
    assert torch.equal(dkf_experts(**values), dkf_experts(**values, backend="reference"))


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_separate_calls(training):
    values = arguments(
        norms=[norm(training=training) for _ in RELU], deep_norms=[norm(training=training) for _ in RELU]
    )
    twins = [[n._replace(running_mean=n.running_mean.clone(), running_var=n.running_var.clone()) for n in values[name]]
             for name in ("norms", "deep_norms")]  # fmt: skip
    f = dkf_experts(**values)
    for k, relu in enumerate(RELU):
        own, end = twins[0][k], twins[1][k]
        y = F.batch_norm(values["deep"][k], end.running_mean, end.running_var, end.weight, end.bias, training)
        deep = F.relu(y + values["shortcut"][k])
        expected = dkf_bn_pool(deep, values["shallow"][k], *own[:4], training=training, relu=relu)
        torch.testing.assert_close(f[k], expected)
        for mine, twin in ((values["norms"][k], own), (values["deep_norms"][k], end)):
            torch.testing.assert_close(mine.running_mean, twin.running_mean)
            torch.testing.assert_close(mine.running_var, twin.running_var)


def test_statistics_shared_by_two_experts_are_updated_twice():
    shared = norm()
    values = arguments(norms=[shared, shared], shortcut=None, deep_norms=None)
    expected = torch.zeros(6)
    for map_ in values["shallow"]:
        expected = 0.9 * expected + 0.1 * map_.mean((0, 2, 3))
    dkf_experts(**values)
    torch.testing.assert_close(shared.running_mean, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_of_any_dtype(dtype):
    values = norm(running_mean=torch.zeros(6, dtype=dtype), running_var=torch.ones(12, dtype=dtype)[::2])
    x = maps(1)[0]
    dkf_bn_pool(maps(1)[0], x, *values[:4], training=True, backend="cpu")
    torch.testing.assert_close(values.running_mean.float(), 0.1 * x.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(values.running_var.float(), 0.9 + 0.1 * x.var((0, 2, 3)), rtol=1e-2, atol=1e-3)


def test_a_changed_statistic_is_noticed():
    """As after BatchNorm2d: a backward through what was computed from the former values is refused."""
    statistic = torch.ones(6, requires_grad=False)
    weight = torch.ones(6, requires_grad=True)
    product = weight * statistic
    dkf_bn_pool(*maps(), None, None, torch.zeros(6), statistic, training=True, backend="cpu")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# ---- autograd


def fused(deep, shallow, shortcut, gamma, beta, **options):
    """Everything at once: K = 2, folded, as a function of five tensors."""
    norms = [BatchNormArguments(gamma, beta, None, None, training=True)] * 2
    return dkf_experts(
        [deep, 2.0 * deep], [shallow, deep], norms, relu=RELU, shortcut=[shortcut] * 2, deep_norms=norms, **options
    )


def leaves(dtype=torch.float64, shape=(3, 2, 2, 3)):
    vectors = [torch.randn(shape[1], dtype=dtype) for _ in range(2)]
    return [tensor.requires_grad_() for tensor in (*maps(3, shape, dtype), *vectors)]


def test_gradcheck():
    assert torch.autograd.gradcheck(functools.partial(fused, backend="cpu"), leaves())
    evaluated = BatchNormArguments(None, None, torch.zeros(2).double(), torch.ones(2).double(), training=False)

    def in_evaluation(deep, shallow, shortcut, *_):
        options = {"relu": [True], "shortcut": [shortcut], "deep_norms": [evaluated], "backend": "cpu"}
        return dkf_experts([deep], [shallow], [evaluated], **options)

    assert torch.autograd.gradcheck(in_evaluation, leaves()[:3])
    assert torch.autograd.gradcheck(functools.partial(dkf_pool, backend="cpu"), leaves()[:2])


def test_it_is_differentiable_once():
    inputs = leaves()
    gradients = torch.autograd.grad(fused(*inputs, backend="cpu").sum(), inputs, create_graph=True)
    expected = torch.autograd.grad(fused(*inputs, backend="reference").sum(), inputs, create_graph=True)
    for mine, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
        with pytest.raises(RuntimeError, match=r"^dkf_fused: it can be differentiated once only; backend='reference'"):
            torch.autograd.grad(mine.sum(), inputs, retain_graph=True)
    torch.autograd.grad(expected[0].square().sum(), inputs)


def test_a_second_backward_and_frozen_maps():
    inputs = leaves(torch.float32)
    f = fused(*inputs, backend="cpu")
    first = torch.autograd.grad(f.sum(), inputs, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(f.sum(), inputs), strict=True))
    for frozen in range(5):
        some = [t.detach().requires_grad_(i != frozen) for i, t in enumerate(inputs)]
        fused(*some, backend="cpu").sum().backward()
        for i, (mine, expected) in enumerate(zip(some, first, strict=True)):
            assert mine.grad is None if i == frozen else torch.equal(mine.grad, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_threads_do_not_change_the_result(threads):
    inputs = leaves(torch.float32, (37, 80, 7, 7))
    results, former = [], torch.get_num_threads()
    for count in (former, threads):
        torch.set_num_threads(count)
        f = fused(*inputs, backend="cpu")
        results.append((f, *torch.autograd.grad(f.square().sum(), inputs)))
    torch.set_num_threads(former)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("folded", [False, True])
def test_memory_is_the_gradients_and_a_few_vectors(folded):
    shape = (16, 64, 12, 12)
    options = {"shortcut": maps(2, shape), "deep_norms": [norm(64), norm(64)]} if folded else {}
    deep, shallow = maps(2, shape), maps(2, shape)
    inputs = [t.requires_grad_() for t in (*deep, *shallow, *options.get("shortcut", []))]
    incoming = torch.randn(2, 16, 64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        f = dkf_experts(deep, shallow, [norm(64), norm(64)], relu=RELU, backend="cpu", **options)
    of_forward = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        torch.autograd.grad(f, inputs, incoming)
    of_backward = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    vectors = 4 * (2 * 16 * 64 * (5 if folded else 3) + 16 * 4 * 64)  # f and the sums; normalisers, statistics, norms
    assert of_forward <= vectors + 2048
    assert of_backward <= sum(t.numel() * 4 for t in inputs) + vectors


def test_the_gradient_keeps_the_layout_of_the_map():
    for layout in (torch.channels_last, torch.contiguous_format):
        inputs = [torch.randn(SHAPE).to(memory_format=layout).requires_grad_() for _ in range(2)]
        f = dkf_bn_pool(*inputs, None, None, None, None, training=True, backend="cpu")
        assert all(g.is_contiguous(memory_format=layout) for g in torch.autograd.grad(f.sum(), inputs))


# ---- tracers


def test_compiles_exports_and_transforms():
    inputs = leaves(torch.float32, (4, 6, 3, 3))
    function = functools.partial(fused, backend="cpu")
    expected = function(*inputs)
    gradients = torch.autograd.grad(expected.sum(), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    recomputed = checkpoint(function, *inputs, use_reentrant=False)
    for mine in (compiled(*inputs), recomputed):
        torch.testing.assert_close(mine, expected)
        for actual, theirs in zip(torch.autograd.grad(mine.sum(), inputs), gradients, strict=True):
            torch.testing.assert_close(actual, theirs)
    transformed = torch.func.grad(lambda *t: function(*t).sum(), tuple(range(5)))(*(t.detach() for t in inputs))
    for actual, theirs in zip(transformed, gradients, strict=True):
        torch.testing.assert_close(actual, theirs)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    program = torch.export.export(Module(), tuple(t.detach() for t in inputs))
    torch.testing.assert_close(program.module()(*inputs), expected)


def test_compiled_statistics_of_all_norms():
    def step(values):
        return dkf_experts(**values)

    eager = arguments()
    compiled_values = {
        **eager,
        **{
            name: [
                n._replace(running_mean=n.running_mean.clone(), running_var=n.running_var.clone()) for n in eager[name]
            ]
            for name in ("norms", "deep_norms")
        },
    }
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="aot_eager")(compiled_values), step(eager))
    for name in ("norms", "deep_norms"):
        for mine, theirs in zip(compiled_values[name], eager[name], strict=True):
            torch.testing.assert_close(mine.running_mean, theirs.running_mean)
            torch.testing.assert_close(mine.running_var, theirs.running_var)


def test_compiles_once_for_all_batch_sizes():
    compiled = torch.compile(ops.dkf_pool, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (5, 9, 2):
        pair = maps(2, (batch, 3, 4, 4))
        torch.testing.assert_close(compiled(*pair), ops.dkf_pool(*pair))


def test_vmap_goes_to_the_reference():
    stacked = [torch.randn(2, *SHAPE) for _ in range(2)]
    f = torch.vmap(dkf_pool)(*stacked)
    torch.testing.assert_close(f[1], dkf_pool(stacked[0][1], stacked[1][1]))
    with pytest.raises(RuntimeError, match=r"no rule for torch\.func\.vmap"):
        torch.vmap(functools.partial(dkf_pool, backend="cpu"))(*stacked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_opcheck(dtype, folded, training):
    deep, shallow, shortcut = maps(2, dtype=dtype), maps(2, dtype=dtype), maps(2, dtype=dtype) if folded else []
    norms = 4 if folded else 2
    weight, bias = (
        [torch.rand(6).requires_grad_() for _ in range(norms)],
        [None, *(torch.rand(6) for _ in range(norms - 1))],
    )
    tensors = [[t.requires_grad_() for t in group] for group in (deep, shallow, shortcut)]
    mean_rstd = None if training else torch.rand(norms, 3, 6)
    options = ([1e-5] * norms, RELU, "cpu")
    op = torch.ops.shike_fast.dkf_fused.default
    results = torch.library.opcheck(op, (*tensors, weight, bias, mean_rstd, *options))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
    _, _, sums, new_mean_rstd = op(*tensors, weight, bias, mean_rstd, *options)
    plain = [[None if t is None else t.detach() for t in group] for group in (*tensors, weight, bias)]
    backward = torch.ops.shike_fast.dkf_fused_backward.default
    grad_output = torch.randn(2, 4, 6, dtype=dtype)
    saved = sums.detach(), new_mean_rstd.detach()
    results = torch.library.opcheck(backward, (grad_output, *plain, mean_rstd, *saved, *options))
    assert set(results.values()) == {"SUCCESS"} and len(results) == 4
