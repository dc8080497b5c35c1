"""The inputs on which a backend is tried, by operator, and those on which it is timed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast import ops


class Case(NamedTuple):
    """Inputs of an operator: ``call(*leaves, backend=...)`` returns a tensor; leaves are differentiable."""

    name: str
    call: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    values: bool = True  # False: inputs that are not finite, where only which results are finite is compared


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    low = (torch.bfloat16, torch.float16)
    return (torch.float32, torch.float64, *low) if device.type == "cpu" else (torch.float32, *low)


def _random(device: torch.device, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device)


def _targets(device: torch.device, batch: int, classes: int) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(1)).to(device)


def _loss_cases(call: Callable[..., Callable[..., Tensor]]) -> Callable[[torch.device], Iterator[Case]]:
    """Of a loss: ``call(target, classes)`` returns a function of logits, one tensor or several, and a backend."""

    def cases(device: torch.device) -> Iterator[Case]:
        shapes = [(3, 5, 7), (1, 1, 2), (8, 2, 1003), (3, 33, 100), (2, 3, 20011)]
        for dtype in _dtypes(device):
            for experts, batch, classes in shapes if dtype == torch.float32 else shapes[:1]:
                logits = _random(device, experts, batch, classes, scale=3.0).to(dtype)
                function = call(_targets(device, batch, classes), classes)
                yield Case(f"{name_of(dtype)} {experts}x{batch}x{classes}", _one(function), (logits,))
        function = call(_targets(device, 5, 19), 19)
        apart = tuple(_random(device, 5, 20, seed=k)[:, 1:] for k in range(3))
        yield Case("float32 experts apart, not aligned", _several(function), apart)
        yield Case("float32 transposed", _one(function), (_random(device, 19, 5, 3).permute(2, 1, 0),))
        yield Case("float32 logits of 60", _one(function), (_random(device, 3, 5, 19, scale=60.0),))
        below = _random(device, 3, 5, 19) - torch.tensor([0.0, 100.0, 0.0], device=device).view(3, 1, 1)
        yield Case("float32 an expert far below the others", _one(function), (below,))
        yield Case("float32 equal logits", _one(function), (torch.ones(3, 5, 19, device=device),))
        for value in (float("nan"), float("inf")):
            logits = _random(device, 3, 5, 19)
            logits[1, 2, 3] = value
            yield Case(f"float32 with {value}", _one(function), (logits,), values=False)

    return cases


def name_of(dtype: torch.dtype) -> str:
    """``float32`` and so on."""
    return str(dtype).removeprefix("torch.")


def _one(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, backend: function(logits, backend=backend)


def _several(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *logits, backend: function(list(logits), backend=backend)


def _dkt(target: Tensor, classes: int) -> Callable[..., Tensor]:
    return lambda logits, backend: ops.dkt_loss(logits, target, backend=backend)


def _cross_entropy(target: Tensor, classes: int) -> Callable[..., Tensor]:
    bias = (torch.arange(classes, device=target.device) % 7 - 3) / 4  # exact in all dtypes
    return lambda logits, backend: ops.expert_cross_entropy(
        logits, target, bias=bias, label_smoothing=0.1, backend=backend
    )


def _balanced(target: Tensor, classes: int) -> Callable[..., Tensor]:
    counts = torch.arange(classes, 0, -1, device=target.device)
    return lambda logits, backend: ops.balanced_softmax_loss(logits, target, counts, backend=backend)


def _expert_loss(target: Tensor, classes: int) -> Callable[..., Tensor]:
    bias, kl = _ramp(target, classes), ops.ExpertKL()
    return lambda logits, backend: ops.expert_loss(logits, target, bias=bias, kl=kl, backend=backend)


def _expert_kl(target: Tensor, classes: int) -> Callable[..., Tensor]:
    return lambda logits, backend: ops.expert_kl(logits, temperature=2.0, backend=backend)


def _ramp(like: Tensor, *shape: int) -> Tensor:
    """Positive numbers below 2, exact in all dtypes."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, device=like.device) % 13 + 1) / 8).view(shape)


def _expert_loss_cases(device: torch.device) -> Iterator[Case]:
    """Few calls with many options each: Triton compiles for each."""
    low = _dtypes(device)[-2:]

    def case(what: str, dtypes: Sequence[torch.dtype], *shape: int, **options: Any) -> Iterator[Case]:
        def call(logits: Tensor, backend: str) -> Tensor:
            loss: Tensor = ops.expert_loss(logits, target, **options, backend=backend)
            return loss

        target = _targets(device, shape[1], shape[2])
        for dtype in _dtypes(device) if device.type == "cpu" else dtypes:
            yield Case(f"{name_of(dtype)} {what}", call, (_random(device, *shape, scale=3.0).to(dtype),))

    target = _targets(device, 6, 19)
    second = torch.cat([target[:2], (target[2:] + 1) % 19])
    of_class, of_expert, of_row = _ramp(target, 19), _ramp(target, 3, 19), _ramp(target, 6)
    yield from case(
        "of two labels",
        [torch.float32],
        *(3, 6, 19),
        **{"bias": of_expert, "margin": of_class, "scale": of_class, "target_b": second, "lam": of_row / 2},
        **{"label_smoothing": 0.1, "class_weight": of_class, "sample_weight": of_row, "reduction": "weighted_mean"},
    )
    mask = torch.arange(33 * 100, device=device).view(33, 100) % 3 != 0
    mask.scatter_(1, _targets(device, 33, 100)[:, None], True)
    kl = ops.ExpertKL(gate="teacher_correct")
    yield from case("of masked classes", low[:1], 3, 33, 100, class_mask=mask, kl=kl)
    kl = ops.ExpertKL("view", temperature=2.0, weight=_ramp(target, 2, 2), adjusted=False)
    yield from case("of two views", low[1:], 2, 4, 1003, bias=_ramp(target, 1003), kl=kl)
    broken = _random(device, 3, 6, 19)
    broken[1, 2, 3] = float("nan")
    yield Case("float32 with nan", _one(_expert_loss(target, 19)), (broken,), values=False)


def _expert_kl_cases(device: torch.device) -> Iterator[Case]:
    target = _targets(device, 5, 19)

    def by_student(*logits: Tensor, backend: str) -> Tensor:
        weight = _ramp(target, 3, 5) - 1
        return ops.expert_kl(list(logits), weight=weight, weight_of="student", backend=backend)

    def from_a_mean(logits: Tensor, backend: str) -> Tensor:
        return ops.expert_kl(logits, "mean", temperature=_ramp(target, 20011), backend=backend)

    apart = tuple(_random(device, 5, 20, seed=k)[:, 1:] - 100.0 * k for k in range(3))
    yield Case("float32 experts apart, not aligned", by_student, apart)
    yield Case("bfloat16 from a mean", from_a_mean, (_random(device, 3, 3, 20011, scale=3.0).to(torch.bfloat16),))


def _fusion_cases(call: Callable[..., Callable[..., Tensor]], maps: int) -> Callable[[torch.device], Iterator[Case]]:
    """Of a fusion: ``call(channels, relu)`` returns a function of 2·``maps`` maps and a backend."""

    def cases(device: torch.device) -> Iterator[Case]:
        first, last = torch.contiguous_format, torch.channels_last
        kinds = [  # few: Triton compiles for each
            (torch.float32, (3, 17, 5, 3), last, True),
            (torch.float32, (3, 17, 5, 3), first, False),
            (torch.float32, (2, 8, 1, 2), last, False),
            (torch.float32, (4, 64, 8, 8), last, False),
            (torch.float32, (2, 33, 7, 7), first, True),
            *((dtype, (3, 24, 5, 3), last, True) for dtype in _dtypes(device)[1:]),
        ]
        for dtype, shape, layout, relu in kinds:
            given = tuple(
                _away_from_0(_random(device, *shape, seed=i)).to(dtype).to(memory_format=layout)
                for i in range(2 * maps)
            )
            kind = "channels-last" if layout == last else "contiguous"
            name = f"{name_of(dtype)} {'x'.join(map(str, shape))} {kind}{' relu' if relu else ''}"
            yield Case(name, call(shape[1], relu), given)
        sliced = tuple(_random(device, 2, 9, 9, 6, seed=i)[:, 1:, ::2, 1::2] for i in range(2 * maps))
        yield Case("float32 sliced", call(8, False), sliced)
        broken = [_random(device, 3, 17, 5, 3, seed=i) for i in range(2 * maps)]
        broken[0][1, 2, 3, 1] = float("nan")
        yield Case("float32 with nan", call(17, True), tuple(broken), values=False)

    return cases


def _away_from_0(x: Tensor) -> Tensor:
    """Rounding must not decide what a ReLU lets through."""
    return x + 0.05 * x.sign()


def _pool(channels: int, relu: bool) -> Callable[..., Tensor]:
    return lambda deep, shallow, backend: ops.dkf_pool(deep, shallow, backend=backend)


def _norm(map_: Tensor) -> ops.BatchNormArguments:
    channels, dtype = map_.shape[1], torch.float64 if map_.dtype == torch.float64 else torch.float32
    weight = torch.ones(channels, dtype=dtype, device=map_.device)
    bias = torch.full_like(weight, 9.0)  # far from where a ReLU has its kink
    return ops.BatchNormArguments(weight, bias, None, None, True, 0.1, 1e-5)


def _bn_pool(channels: int, relu: bool) -> Callable[..., Tensor]:
    def call(deep: Tensor, shallow: Tensor, backend: str) -> Tensor:
        weight, bias, *_ = _norm(shallow)
        return ops.dkf_bn_pool(deep, shallow, weight, bias, None, None, training=True, relu=relu, backend=backend)

    return call


def _experts(channels: int, relu: bool) -> Callable[..., Tensor]:
    def call(*maps: Tensor, backend: str) -> Tensor:
        deep, shallow = maps[: len(maps) // 2], maps[len(maps) // 2 :]
        norms = [_norm(map_) for map_ in shallow]
        return ops.dkf_experts(deep, shallow, norms, relu=[relu] * len(deep), backend=backend)

    return call


def _logits(**options: object) -> Callable[..., Tensor]:
    return lambda *leaves, backend: ops.expert_logits(*leaves, **options, backend=backend)  # type: ignore[arg-type]


def _factors(device: torch.device, experts: int, batch: int, dim: int, classes: int) -> tuple[Tensor, Tensor]:
    features = _random(device, experts, batch, dim)
    return features, _random(device, 1, dim, classes, seed=1).expand(experts, -1, -1).contiguous()


def _logits_cases(device: torch.device) -> Iterator[Case]:
    cosine, linear = _logits(cosine_scale=30.0), _logits()
    for shape in ((3, 5, 64, 100), (2, 70, 7, 9), (60, 3, 132, 202)):  # few alignments: Triton compiles for each
        yield Case(f"float32 {'x'.join(map(str, shape))}", cosine, _factors(device, *shape))
    features, weight = _factors(device, 3, 130, 300, 100)
    without = features.clone(), weight.clone()
    without[0][0, 5], without[1][-1, :, 99] = 0, 0
    yield Case("float32 with vectors of 0", cosine, without)
    yield Case("bfloat16", cosine, (features.bfloat16(), weight.bfloat16()))
    yield Case("float32 of all lengths", cosine, (features * 1e12, weight * 1e-9))
    alike = features.abs() + 1, weight.abs() + 1  # nothing cancels: roundings in one direction add up
    yield Case("float32 alike", cosine, alike)
    yield Case("float32 strided", cosine, (features[:, ::2].mT.contiguous().mT, weight[:, :, ::2]))
    yield Case("float32 linear", linear, (features, weight, _random(device, 3, 100, seed=2)))
    yield Case("float32 as TF32", _logits(cosine_scale=30.0, precision="high"), (features, weight), values=False)
    features[1, 2, 3] = float("nan")
    yield Case("float32 with nan", cosine, (features, weight), values=False)


CASES: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "dkt_loss": _loss_cases(_dkt),
    "expert_cross_entropy": _loss_cases(_cross_entropy),
    "expert_loss": _expert_loss_cases,
    "expert_kl": _expert_kl_cases,
    "expert_logits": _logits_cases,
    "balanced_softmax_loss": _loss_cases(_balanced),
    "dkf_pool": _fusion_cases(_pool, 1),
    "dkf_bn_pool": _fusion_cases(_bn_pool, 1),
    "dkf_experts": _fusion_cases(_experts, 2),
}

_SIZES = {  # logits of the losses, maps of the fusion, factors of the logits
    "small": ((3, 64, 100), (32, 16, 8, 8), (3, 128, 64, 100)),
    "medium": ((3, 128, 1000), (64, 64, 8, 8), (3, 64, 2048, 1000)),
    "large": ((3, 256, 8142), (64, 2048, 7, 7), (3, 256, 2048, 8142)),
}


_TIMED_LOSSES = {
    "dkt_loss": _dkt,
    "expert_cross_entropy": _cross_entropy,
    "balanced_softmax_loss": _balanced,
    "expert_loss": _expert_loss,
    "expert_kl": _expert_kl,
}


def timed_cases(operator: str, device: torch.device) -> Iterator[Case]:
    """By dtype and size, as ``float32 small``; on a CPU no large ones, which take seconds."""
    on_gpu = device.type == "cuda"
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        for size, (loss_shape, map_shape, factors_shape) in _SIZES.items():
            if size == "large" and not on_gpu:
                continue
            name = f"{name_of(dtype)} {size}"
            if operator == "expert_logits":
                features, weight = _factors(device, *factors_shape)
                yield Case(name, _logits(cosine_scale=30.0), (features.to(dtype), weight))
            elif operator.startswith("dkf"):
                make = {"dkf_pool": _pool, "dkf_bn_pool": _bn_pool, "dkf_experts": _experts}[operator]
                maps = (_random(device, *map_shape, seed=i).to(dtype) for i in range(2))
                leaves = tuple(m.to(memory_format=torch.channels_last) for m in maps)
                yield Case(name, make(map_shape[1], False), leaves)
            else:
                loss = _TIMED_LOSSES[operator]
                function = loss(_targets(device, loss_shape[1], loss_shape[2]), loss_shape[2])
                yield Case(name, _one(function), (_random(device, *loss_shape).to(dtype),))
