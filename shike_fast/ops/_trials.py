"""The trials of a backend, in a process of their own: what it must compute rightly before it is used unasked.

    python -c "...; main()" BACKEND DEVICE REPORT OPERATOR...

Each operator runs its cases against the reference in float64. In every output the largest error may be four times that
of the reference in the dtype and on the device of the case, plus ``ROUNDINGS`` units of that dtype in the last place of
the largest entry. Memory that the backend allocates lies between guard zones and holds NaN at first. Every case runs
twice and must give equal bits. What passes is timed beside the reference.

``REPORT`` receives one JSON object a line, so that a reader knows where a process ended that died.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shike_fast import ops

TIMES_EAGER = 4
ROUNDINGS = 32
ZONE = 512  # bytes before and behind what is allocated
_FILL, _GUARD = 0xFF, 0xA5  # 0xFF in every byte is NaN in all floating dtypes
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


class Failure(Exception):
    """What is wrong, in one clause."""


class Case(NamedTuple):
    """Inputs of an operator: ``call(*leaves, backend=...)`` returns a tensor; leaves are differentiable."""

    name: str
    call: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    values: bool = True  # False: inputs that are not finite, where only which results are finite is compared


def main() -> None:
    """Try the operators that the command line names."""
    backend, device, report, *names = sys.argv[1:]
    _die_with_the_parent()
    if device == "cpu":
        torch.set_num_threads(1)  # others may use the cores, and threads that wait for each other take seconds
    with open(report, "a", buffering=1, encoding="utf-8") as file:

        def tell(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")

        for name in names:
            if name not in CASES:
                tell(end=name, status="not tried", reason="it has no trials")
                continue
            tell(begin=name, case="its first allocation")
            try:
                try_operator(name, backend, torch.device(device), lambda case: tell(begin=name, case=case))  # noqa: B023
                tell(end=name, status="passed", times=dict(timed(name, backend, torch.device(device))))
            except Failure as failure:
                tell(end=name, status="failed", reason=str(failure))
            except torch.OutOfMemoryError as error:
                tell(end=name, status="not tried", reason=_line(error))
            except Exception as error:  # whatever a broken backend raises is the verdict
                tell(end=name, status="failed", reason=f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _die_with_the_parent() -> None:
    """However it ends: a backend that hangs must not outlive who waits for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        if os.getppid() == 1:
            sys.exit("the parent has ended")


# ---- right


def try_operator(name: str, backend: str, device: torch.device, tell: Callable[[str], None]) -> None:
    """Run all cases of an operator.

    Raises:
        Failure: naming the first case that is wrong.
    """
    for case in CASES[name](device):
        tell(case.name)
        try:
            _try_case(case, backend)
        except Failure as failure:
            raise Failure(f"{case.name}: {failure}") from None


def _try_case(case: Case, backend: str) -> None:
    with guarded() as check:
        mine = _results(case, backend)
        check()
        again = _results(case, backend)
        check()
    for number, (first, second) in enumerate(zip(mine, again, strict=True)):
        if not _equal_bits(first, second):
            raise Failure(f"two runs give different {_what(number)}")
    if mine[0].device.type == "cuda":
        _try_streams(case, backend, mine)
    eager, exact = _results(case, "reference"), _results(case, "reference", torch.float64)
    for number, (got, usual, truth) in enumerate(zip(mine, eager, exact, strict=True)):
        got, usual = got.double(), usual.double()
        if not case.values:
            if not torch.equal(got.isfinite(), usual.isfinite()):
                raise Failure(f"other {_what(number)} are finite than the reference's")
            continue
        if not torch.isfinite(got).all():
            raise Failure(f"{_what(number)} that are not finite")
        unit = torch.finfo(mine[number].dtype).eps
        size = float(truth.abs().max()) if truth.numel() else 0.0
        error = float((got - truth).abs().max()) if truth.numel() else 0.0
        allowed = TIMES_EAGER * (float((usual - truth).abs().max()) if truth.numel() else 0.0) + ROUNDINGS * unit * size
        if error > allowed:
            raise Failure(f"{_what(number)} err by {error:.2g} where {allowed:.2g} is allowed")


def _what(number: int) -> str:
    return "results" if number == 0 else f"gradients of input {number - 1}"


def _results(case: Case, backend: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and the gradients of the leaves, for a grad_output that is no constant."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in _laid_out(case.leaves, dtype)]
    result = case.call(*leaves, backend=backend)
    count = max(result.numel(), 1)
    grad_output = torch.arange(1, result.numel() + 1, device=result.device).reshape(result.shape) / count - 0.3
    # A grad_output given to autograd itself makes PyTorch import sympy, which takes longer than all the rest.
    gradients = torch.autograd.grad((result * grad_output.to(result.dtype)).sum(), leaves)
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)
    return [result.detach(), *gradients]


def _laid_out(leaves: Sequence[Tensor], dtype: torch.dtype | None) -> Sequence[Tensor]:
    return leaves if dtype is None else [leaf.contiguous() for leaf in leaves]


def _equal_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)) and torch.equal(one.isnan(), other.isnan())


def _try_streams(case: Case, backend: str, expected: list[Tensor]) -> None:
    """On another stream, and in a captured graph."""
    device = expected[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        aside = _results(case, backend)
    torch.cuda.synchronize(device)
    if not all(map(_equal_bits, expected, aside)):
        raise Failure("another stream gives other bits")
    graph, inputs = torch.cuda.CUDAGraph(), [leaf.detach() for leaf in case.leaves]
    with torch.cuda.graph(graph):
        captured = case.call(*inputs, backend=backend)
    graph.replay()
    torch.cuda.synchronize(device)
    if not _equal_bits(captured, expected[0]):
        raise Failure("a captured graph gives other bits")


@contextmanager
def guarded() -> Iterator[Callable[[], None]]:
    """Allocations meanwhile hold NaN and lie between guard zones; the function that it gives looks at the zones."""
    taken: list[tuple[Tensor, int]] = []
    before = torch.empty, torch.empty_like, Tensor.new_empty

    def allocate(like: Tensor) -> Tensor:  # of the shape, strides, dtype and device of ``like``
        strides = zip(like.shape, like.stride(), strict=True)
        used = 0 if like.numel() == 0 else 1 + sum((n - 1) * stride for n, stride in strides)
        size = used * like.element_size()
        raw = before[0](ZONE + size + ZONE, dtype=torch.uint8, device=like.device).fill_(_GUARD)
        raw[ZONE : ZONE + size] = _FILL
        taken.append((raw, size))
        own = before[0](0, dtype=like.dtype, device=like.device)
        storage = raw.untyped_storage()
        return own.set_(storage, ZONE // like.element_size(), like.shape, like.stride())

    def check() -> None:
        for raw, size in taken:
            if not bool((raw[:ZONE] == _GUARD).all()) or not bool((raw[ZONE + size :] == _GUARD).all()):
                raise Failure("it writes outside its outputs")
        taken.clear()

    def replacing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: allocate(function(*args, **options))

    torch.empty, torch.empty_like = replacing(before[0]), replacing(before[1])
    Tensor.new_empty = replacing(before[2])  # type: ignore[method-assign]
    try:
        yield check
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = before  # type: ignore[method-assign]


# ---- the cases


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
                yield Case(f"{_name(dtype)} {experts}x{batch}x{classes}", _one(function), (logits,))
        function = call(_targets(device, 5, 19), 19)
        apart = tuple(_random(device, 5, 20, seed=k)[:, 1:] for k in range(3))
        yield Case("float32 experts apart, not aligned", _several(function), apart)
        yield Case("float32 transposed", _one(function), (_random(device, 19, 5, 3).permute(2, 1, 0),))
        yield Case("float32 logits of 60", _one(function), (_random(device, 3, 5, 19, scale=60.0),))
        yield Case("float32 equal logits", _one(function), (torch.ones(3, 5, 19, device=device),))
        for value in (float("nan"), float("inf")):
            logits = _random(device, 3, 5, 19)
            logits[1, 2, 3] = value
            yield Case(f"float32 with {value}", _one(function), (logits,), values=False)

    return cases


def _name(dtype: torch.dtype) -> str:
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


def _fusion_cases(call: Callable[..., Callable[..., Tensor]], maps: int) -> Callable[[torch.device], Iterator[Case]]:
    """Of a fusion: ``call(channels, relu)`` returns a function of 2·``maps`` maps and a backend."""

    def cases(device: torch.device) -> Iterator[Case]:
        shapes = [(3, 17, 5, 3), (2, 8, 1, 2), (4, 64, 8, 8), (2, 33, 7, 7)]
        for dtype in _dtypes(device):
            for shape in shapes if dtype == torch.float32 else shapes[:1]:
                for layout in (torch.contiguous_format, torch.channels_last):
                    for relu in (False, True):
                        given = tuple(
                            _away_from_0(_random(device, *shape, seed=i)).to(dtype).to(memory_format=layout)
                            for i in range(2 * maps)
                        )
                        kind = "channels-last" if layout == torch.channels_last else "contiguous"
                        size = "x".join(map(str, shape))
                        name = f"{_name(dtype)} {size} {kind}{' relu' if relu else ''}"
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


CASES: dict[str, Callable[[torch.device], Iterator[Case]]] = {
    "dkt_loss": _loss_cases(_dkt),
    "expert_cross_entropy": _loss_cases(_cross_entropy),
    "balanced_softmax_loss": _loss_cases(_balanced),
    "dkf_pool": _fusion_cases(_pool, 1),
    "dkf_bn_pool": _fusion_cases(_bn_pool, 1),
    "dkf_experts": _fusion_cases(_experts, 2),
}

# ---- fast

_SIZES = {"small": ((3, 64, 100), (32, 16, 8, 8)), "medium": ((3, 128, 1000), (64, 64, 8, 8))}
_LARGE = {"large": ((3, 256, 8142), (64, 2048, 7, 7))}


def _milliseconds(case: Case, backend: str) -> float:
    leaves = [leaf.detach().requires_grad_() for leaf in case.leaves]
    on_gpu = leaves[0].device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(leaves[0].device)
    start = time.perf_counter()
    result = case.call(*leaves, backend=backend)
    torch.autograd.grad(result if result.dim() == 0 else result.sum(), leaves)
    if on_gpu:
        torch.cuda.synchronize(leaves[0].device)
    return 1e3 * (time.perf_counter() - start)


def timed(name: str, backend: str, device: torch.device) -> Iterator[tuple[str, tuple[float, float]]]:
    """Milliseconds of forward and backward, of the backend and of the reference, side by side."""
    on_gpu = device.type == "cuda"
    for dtype in (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,):
        for size, (loss_shape, map_shape) in (_SIZES | _LARGE if on_gpu else _SIZES).items():
            if name.startswith("dkf"):
                make = {"dkf_pool": _pool, "dkf_bn_pool": _bn_pool, "dkf_experts": _experts}[name]
                maps = [_random(device, *map_shape, seed=i).to(dtype) for i in range(2)]
                leaves = tuple(m.to(memory_format=torch.channels_last) for m in maps)
                case = Case(size, make(map_shape[1], False), leaves)
            else:
                loss = {"dkt_loss": _dkt, "expert_cross_entropy": _cross_entropy}.get(name, _balanced)
                function = loss(_targets(device, loss_shape[1], loss_shape[2]), loss_shape[2])
                case = Case(size, _one(function), (_random(device, *loss_shape).to(dtype),))
            times = {own: float("inf") for own in (backend, "reference")}
            for _ in range(12 if on_gpu else 5):
                for own in times:
                    times[own] = min(times[own], _milliseconds(case, own))
            yield f"{_name(dtype)} {size}", (times[backend], times["reference"])


def refusal(name: str, backend: str, device: torch.device) -> str | None:
    """Why the backend does not take the first case of an operator, or None."""
    try:
        case = next(iter(CASES[name](device)))
        case.call(*case.leaves, backend=backend)
    except RuntimeError as error:
        return _line(error)
    return None


if __name__ == "__main__":
    main()
