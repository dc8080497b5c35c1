"""What the matrices do not reach: traps, factors on the device, numbers that are not finite, strides beyond 2^31, the
statistics of difficult maps, the self test."""

import ctypes
from typing import Any

import torch
from common import summary
from disturbances import DISTURBANCES
from host import BASE, SIZE, STATE, compiled, cuda, library, native_dkf, native_expert, native_loss, ops
from loss_inputs import evaluate
from outcomes import BOUND, DTYPES, Outcome, error, faults
from torch import Tensor
from torch.nn.functional import batch_norm

from shike_fast.ops.cross_entropy import fused_cross_entropy

DKT_OPTIONS = (10.0, 1.0, 0.0, -30.0, False)  # hardest and mutual weight, teacher's and student's target, detached


def self_test() -> list[str]:
    with cuda() as device:
        compiled.cuda_self_test(library.device)
    return faults(device)


def traps() -> dict[str, Any]:
    """A target that is no class: the message, and what was reported."""
    logits, target = [torch.randn(3, 4, 50)], torch.tensor([1, 2, 50, 3])
    calls = {
        "dkt_loss": (native_loss.dkt_forward, (logits, target, None, *DKT_OPTIONS)),
        "expert_loss": (fused_cross_entropy, ("cpu", logits[0], target, None, 0.0)),
    }
    found = {}
    for name, (function, arguments) in calls.items():
        device, message = cuda(), "nothing was raised"
        with device:
            try:
                function(*arguments)
            except RuntimeError as failure:
                message = str(failure)
        found[name] = [message, *sorted({report.kind for report in device.reports})]
    return found


def refusal() -> str:
    """The message where maps are in float64."""
    with cuda():
        try:
            native_dkf.dkf_statistics([torch.zeros(16, 24, 7, 7, dtype=torch.float64)])
        except RuntimeError as failure:
            return str(failure)
    return "nothing was raised"


def quick() -> dict[str, Any]:
    """What needs little time."""
    return {
        "self test": self_test(),
        "traps": traps(),
        "refusal": refusal(),
        "variances": variances([[1, 56, 26, 27]], ["none", "the first value of each sample"])
        | variances([[8, 16, 14, 14]], [*DISTURBANCES]),
        "features": features([8, 16, 14, 14], 4),
        "maps": summary(constant_channels() | followed() | not_a_number()),
    }


def factors() -> dict[str, Any]:
    """Weights of the terms that lie on the device, as double."""
    outcomes = {}
    for experts in (1, 3, 8):
        outcome = outcomes[f"{experts} experts"] = Outcome()
        logits, target = torch.randn(experts, 5, 130) * 2, torch.randint(0, 130, (5,))
        given = torch.tensor([10.0, 0.5], dtype=torch.float64)
        options = (1.0 / 130, 2.0 / 130, 0.0, -30.0, False)
        with cuda() as device:
            loss, _, saved = native_loss.dkt_forward([logits], target, given, *options)
            gradient = native_loss.dkt_backward(torch.tensor(3.0), [logits], target, given, saved, *options)
        exact = evaluate("dkt", logits.double(), target, 3.0, "reference", hardest_weight=10.0, mutual_weight=1.0)
        outcome.within("loss", error(loss, exact.loss), 1e-5)
        outcome.within("gradient", error(gradient, exact.gradient), 1e-5)
        outcome.seen("lockstep", device)
    return summary(outcomes)


def minus_infinity() -> dict[str, Any]:
    """Logits and biases that mask classes of the cross-entropy."""
    outcomes = {}
    values, bias = torch.randn(2, 9, 77), torch.randn(77)
    values[:, :, 40:60], bias[65:] = -torch.inf, -torch.inf
    target = torch.randint(0, 30, (9,))
    for name, dtype in DTYPES.items():
        outcome = outcomes[name] = Outcome()
        logits = values.to(dtype)
        with cuda() as device:
            mine = evaluate("cross-entropy", logits, target, 1.0, "cpu", bias=bias)
        exact = evaluate("cross-entropy", logits.double(), target, 1.0, "reference", bias=bias.double())
        outcome.within("loss", error(mine.loss, exact.loss), 1e-5)
        outcome.within("gradient", error(mine.gradient, exact.gradient), BOUND[name])
        outcome.seen("lockstep", device)
    return summary(outcomes)


def not_finite() -> dict[str, list[Any]]:
    """A logit that is NaN or infinite: of mine and of the reference, whether the loss is NaN, and its NaN gradients."""
    found = {}
    for poison in (torch.nan, torch.inf, -torch.inf):
        for place in ((0, 0, 5), (1, 2, 7), (1, 3, 0)):
            logits, target = torch.randn(2, 4, 40), torch.randint(8, 40, (4,))
            logits[place] = poison
            with cuda() as device:
                mine = evaluate("dkt", logits, target, 1.0, "cpu")
            reference = evaluate("dkt", logits, target, 1.0, "reference")
            row = place[1]
            found[f"{poison} at {place}"] = [
                [not bool(torch.isfinite(result.loss)), bool(result.gradient[:, row].isnan().any())]
                for result in (mine, reference)
            ] + [faults(device)]
    return found


# ---- statistics


def variance_errors(maps: Tensor, processors: int = 132) -> tuple[float, float]:
    """Of the variance, relative, and of the mean, relative to the standard deviation; both in float32's eps."""
    eps = torch.finfo(torch.float32).eps
    with cuda(processors) as device:
        statistics = native_dkf.dkf_statistics([maps])[0]
    assert not faults(device), faults(device)
    values = maps.double().transpose(0, 1).flatten(1)
    variance, mean = values.var(1, correction=0), values.mean(1)
    of_variance = (statistics[2].double() / values.shape[1] - variance).abs() / variance
    of_mean = (statistics[0].double() + statistics[1].double() - mean).abs() / variance.sqrt()
    return of_variance.max().item() / eps, of_mean.max().item() / eps


def variances(shapes: list[list[int]], disturbances: list[str]) -> dict[str, list[float]]:
    """The errors of random maps, and of those to which something was done."""
    found = {}
    for shape in shapes:
        for name, dtype in (("f32", torch.float32), ("f16", torch.float16)):
            for layout in (torch.contiguous_format, torch.channels_last):
                for disturbance in disturbances:
                    torch.manual_seed(1)
                    maps = torch.randn(shape).mul(1.16)
                    DISTURBANCES[disturbance](maps)
                    errors = variance_errors(maps.to(dtype).contiguous(memory_format=layout))
                    found[f"{name} {shape} {layout} {disturbance}"] = [*errors]
    return found


def forward_of(
    maps: list[Tensor], relu: bool = False, bias: Tensor | None = None, processors: int = 4
) -> tuple[cuda, list[Tensor]]:
    """One expert's deep and shallow map and, folded, its shortcut: f, sums, mean and rstd in training."""
    norms = len(maps) - 1
    arguments = native_dkf.DkfArguments([maps[0]], [maps[1]], maps[2:], [None] * norms, [bias] * norms, [relu])
    with cuda(processors) as device:
        results = native_dkf.dkf_forward(arguments, None, [1e-5] * norms, [], [0.1] * norms)
    return device, [*results]


def features(shape: list[int], processors: int) -> dict[str, list[float]]:
    """Of the one-reading form: squared errors relative to eager PyTorch's; in all, the largest, the worst sample's."""
    found = {}
    for name, disturb in DISTURBANCES.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(1)
            deep, shallow = torch.rand(shape), torch.randn(shape)
            disturb(shallow)
            product = deep.double() * batch_norm(shallow.double(), None, None, training=True)
            eager = (deep * batch_norm(shallow, None, None, training=True)).mean((2, 3))  # NCHW, the more exact
            device, (f, *_) = forward_of(
                [each.contiguous(memory_format=layout) for each in (deep, shallow)], processors=processors
            )
            size = product.abs().mean((2, 3))
            mine, usual = (((x.double() - product.mean((2, 3))) / size).square() for x in (f[0], eager))
            assert not faults(device), faults(device)
            ratios = mine.mean() / usual.mean(), mine.max() / usual.max(), (mine.mean(1) / usual.mean(1)).max()
            found[f"{name} {layout}"] = [ratio.item() for ratio in ratios]
    return found


def constant_channels() -> dict[str, Outcome]:
    """Their mean is exact, and their variance is 0."""
    outcomes = {}
    for value in (0.0, 0.1, 1e4):
        for layout in (torch.contiguous_format, torch.channels_last):
            outcome = outcomes[f"all are {value}, {layout}"] = Outcome()
            deep, shallow = torch.randn(4, 24, 7, 7), torch.full((4, 24, 7, 7), value)
            maps = [each.contiguous(memory_format=layout) for each in (deep, shallow)]
            with cuda(4) as device:
                statistics = native_dkf.dkf_statistics(maps[1:])[0]
            outcome.seen("statistics", device)
            expected = torch.tensor([value, 0.0, 0.0])[:, None].expand(3, 24)
            outcome.within("statistics", (statistics - expected).abs().max().item(), 0.0)
            device, (f, *_) = forward_of(maps, bias=torch.ones(24))
            outcome.seen("forward", device)
            outcome.within("f", error(f[0], deep.mean((2, 3))), 1e-5)
    return outcomes


def followed() -> dict[str, Outcome]:
    """A map that the features follow: d(weight) is large then, and cancels all but eps of the map's gradient."""
    outcome = Outcome()
    shallow = (torch.randn(16, 24, 7, 7) + 1e4).contiguous(memory_format=torch.channels_last)
    arguments = native_dkf.DkfArguments([shallow - 1e4], [shallow], [], [None], [None], [False])
    with cuda(4) as device:
        _, sums, mean_rstd, _ = native_dkf.dkf_forward(arguments, None, [1e-5], [], [0.1])
        vectors = native_dkf.dkf_vector_gradients(arguments, torch.ones(1, 16, 24), sums)
        gradients = native_dkf.dkf_map_gradients(arguments, torch.ones(1, 16, 24), mean_rstd, vectors, 1 / (16 * 49))
    outcome.seen("lockstep", device)
    leaf = shallow.double().requires_grad_()
    f = ((leaf.detach() - 1e4) * batch_norm(leaf, None, None, training=True)).mean((2, 3))
    (expected,) = torch.autograd.grad(f.sum(), [leaf])
    outcome.within("gradient", (gradients[1] - expected).abs().max().item(), 2e-5 / 49)
    return {"features that follow a map": outcome}


def not_a_number() -> dict[str, Outcome]:
    """It shows in the feature of its sample and channel, and in no other channel."""
    outcomes = {}
    for kind, count, relu in (("no ReLU", 2, False), ("ReLU", 2, True), ("folded", 3, True)):
        outcome = outcomes[f"NaN, {kind}"] = Outcome()
        maps = [torch.randn(4, 24, 7, 7).contiguous(memory_format=torch.channels_last) for _ in range(count)]
        maps[1][2, 5, 0, 0] = torch.nan
        device, (f, *_) = forward_of(maps, relu)
        outcome.seen("lockstep", device)
        others = [channel for channel in range(24) if channel != 5]
        outcome.within("hidden", float(~f[0, 2, 5].isnan()), 0.0)
        outcome.within("spread", float((~f[0, :, others].isfinite()).sum()), 0.0)
    return outcomes


def many_statistics() -> dict[str, Any]:
    """Of up to 16 maps at once."""
    outcomes = {}
    for name, dtype in DTYPES.items():
        for count, shape in ((1, (3, 5, 7, 7)), (16, (2, 40, 3, 5)), (16, (300, 8, 1, 1)), (7, (5, 64, 8, 8))):
            for layout, processors in ((torch.channels_last, 132), (torch.contiguous_format, 1)):
                outcome = outcomes[f"{name} {count} {shape} {layout}"] = Outcome()
                shift = 3 * torch.randn(shape[1]).view(1, -1, 1, 1)
                maps = [(torch.randn(shape) + shift).to(dtype).contiguous(memory_format=layout) for _ in range(count)]
                with cuda(processors) as device:
                    statistics = native_dkf.dkf_statistics(maps)
                values = torch.stack([each.double().transpose(0, 1).flatten(1) for each in maps])
                squares = (values - values.mean(2, keepdim=True)).square().sum(2)
                mean = statistics[:, 0].double() + statistics[:, 1].double()
                outcome.within("mean", error(mean, values.mean(2)), 1e-6)
                outcome.within("squares", error(statistics[:, 2], squares), 1e-5)
                outcome.seen("lockstep", device)
    return summary(outcomes)


# ---- strides beyond 2^31 elements; the arena needs 40 GB of addresses


class Far:
    """Tensors in the part of the arena that nobody has touched, of which only their elements are allocated."""

    def __init__(self) -> None:
        self.at = 2 << 30

    def __call__(self, values: Tensor, strides: tuple[int, ...]) -> Tensor:
        reach = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
        size = values.element_size()
        start = (self.at + 4095) // 4096 * 4096
        self.at = start + reach * size + 4096
        assert self.at < SIZE
        memory = (ctypes.c_uint8 * (reach * size)).from_address(BASE + start)
        view = torch.frombuffer(memory, dtype=values.dtype).as_strided(values.shape, strides)
        view.copy_(values)
        offsets = torch.zeros(values.shape, dtype=torch.int64)
        for dim, stride in enumerate(strides):
            steps = [1] * values.dim()
            steps[dim] = -1
            offsets += (torch.arange(values.shape[dim]) * stride).view(steps)
        places = offsets.flatten().numpy() * size + start
        for byte in range(size):
            STATE[places + byte] = 3
        return view


BIG = 2**31 + 8


def far_logits() -> dict[str, Any]:
    """Logits and gradients."""
    outcomes = {}
    for shape, strides, name in (
        ((2, 3, 12), (16, BIG, 1), "bf16"),
        ((2, 2, 5), (7, 3, 2**29 + 1), "bf16"),
        ((2, 2, 12), (BIG, 16, 1), "f32"),
        ((3, 2, 20), (64, BIG // 2, 2), "f16"),
    ):
        for op in ("dkt", "cross-entropy"):
            outcome, far = Outcome(), Far()
            outcomes[f"{op} {shape} {strides}"] = outcome
            values = (torch.randn(shape) * 2).to(DTYPES[name])
            logits, gradient = far(values, strides), far(torch.zeros(shape, dtype=values.dtype), strides)
            target = torch.randint(0, shape[2], (shape[1],))
            usual, one = native_loss.gradient_like, torch.ones(())
            native_loss.gradient_like = native_expert.gradient_like = lambda _, result=gradient: result
            with cuda() as device:
                if op == "dkt":
                    options = (10.0 / shape[2], 1.0 / shape[2], *DKT_OPTIONS[2:])
                    loss, _, saved = native_loss.dkt_forward([logits], target, None, *options)
                    native_loss.dkt_backward(one, [logits], target, None, saved, *options)
                else:
                    leaf = logits.detach().requires_grad_()
                    loss = fused_cross_entropy("cpu", leaf, target, None, 0.1)
                    torch.autograd.grad(loss, leaf, one)
            native_loss.gradient_like = native_expert.gradient_like = usual
            more = {} if op == "dkt" else {"label_smoothing": 0.1}
            exact = evaluate(op, values.double(), target, 1.0, "reference", **more)
            outcome.within("loss", error(loss, exact.loss), 1e-5)
            outcome.within("gradient", error(gradient, exact.gradient), BOUND[name])
            outcome.seen("lockstep", device)
    return summary(outcomes)


def far_maps() -> dict[str, Any]:
    """One of the maps, and its gradient."""
    outcomes = {}
    for shape, strides, name in (
        ((3, 8, 2, 3), (BIG, 1, 24, 8), "bf16"),
        ((2, 3, 2, 2), (64, 2**30 + 3, 2, 1), "f32"),
        ((2, 2, 3, 2), (1, 2, BIG - 5, 4), "f16"),
        ((2, 16, 2, 3), (32, 1, 2**30 + 64, 2**28 + 64), "bf16"),
    ):
        for count in (2, 3):
            for which in range(count):
                key = f"map {which} of {count}, {shape} {strides}"
                outcomes[key] = _far_map(shape, strides, name, count, which)
    return summary(outcomes)


def _far_map(shape: tuple[int, ...], strides: tuple[int, ...], name: str, count: int, which: int) -> Outcome:
    outcome, far = Outcome(), Far()
    values = [torch.randn(shape).to(DTYPES[name]) for _ in range(count)]
    compact = [each.contiguous(memory_format=torch.channels_last) for each in values]
    maps = [far(each, strides) if i == which else each for i, each in enumerate(compact)]
    results = [torch.zeros_like(each) for each in compact]
    results[which] = far(results[which], strides)
    norms, channels = count - 1, shape[1]
    weight, bias = ([torch.randn(channels) for _ in range(norms)] for _ in range(2))
    arguments = native_dkf.DkfArguments([maps[0]], [maps[1]], maps[2:], weight, bias, [True])
    grad_output = torch.randn(1, *shape[:2]).to(DTYPES[name])
    usual, native_dkf.DkfArguments.new_gradients = native_dkf.DkfArguments.new_gradients, lambda _: results
    with cuda() as device:
        f, sums, normalisers, _ = native_dkf.dkf_forward(arguments, None, [1e-5] * norms, [], [0.1] * norms)
        vectors = native_dkf.dkf_vector_gradients(arguments, grad_output, sums)
        native_dkf.dkf_map_gradients(arguments, grad_output, normalisers, vectors, 1.0 / arguments.values)
    native_dkf.DkfArguments.new_gradients = usual
    leaves = [each.double().requires_grad_() for each in values]
    exact = [
        ops.BatchNormArguments(w.double(), b.double(), None, None, True) for w, b in zip(weight, bias, strict=True)
    ]
    folded = {"shortcut": [leaves[2]], "deep_norms": exact[1:]} if count == 3 else {}
    expected = ops.dkf_experts([leaves[0]], [leaves[1]], exact[:1], relu=[True], **folded, backend="reference")
    gradients = torch.autograd.grad(expected, leaves, grad_output.double())
    outcome.within("f", error(f, expected.detach()), BOUND[name])
    for mine, gradient in zip(results, gradients, strict=True):
        outcome.within("gradient of a map", error(mine, gradient), 1.5 * BOUND[name])
    outcome.seen("lockstep", device)
    return outcome
