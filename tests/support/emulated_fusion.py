"""Calls of the emulated CUDA kernels of depth-wise knowledge fusion, and what they are compared with."""

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from shike_fast.ops._native import native

DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
LAYOUTS = ("channels last", "NCHW", "sliced", "reversed", "unaligned")
MOMENTUM = 0.3


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

    def call(self):
        k = self.experts
        return {
            "dtype": DTYPES[self.maps[0].dtype],
            "shape": self.maps[0].shape,
            "relu": self.relu,
            "deep": self.maps[:k],
            "shallow": self.maps[k : 2 * k],
            "shortcut": self.maps[2 * k :],
            "weight": self.weight,
            "bias": self.bias,
        }

    def forward(self, mean_rstd=None, running=(), descending=False):
        batch, channels = self.maps[0].shape[:2]
        training = mean_rstd is None
        f = torch.full((self.experts, batch, channels), torch.nan, dtype=self.maps[0].dtype)
        sums = torch.full((self.experts, self.sums, batch, channels), torch.nan)
        if training:
            mean_rstd = torch.full((self.norms, 3, channels), torch.nan)
        statistics = torch.full((self.norms if training else 0, 2, channels), torch.nan)
        native().emulate_dkf_forward(
            **self.call(),
            running_mean=running[::2],
            running_var=running[1::2],
            momentum=[MOMENTUM] * self.norms,
            eps=self.eps,
            training=training,
            f=f,
            sums=sums,
            mean_rstd=mean_rstd,
            statistics=statistics,
            processors=self.processors,
            descending=descending,
        )
        return f, sums, mean_rstd, statistics

    def vector_gradients(self, grad_output, sums, descending=False):
        vectors = torch.full((self.norms, 2, self.maps[0].shape[1]), torch.nan)
        native().emulate_dkf_vector_gradients(
            **self.call(), grad_output=grad_output, sums=sums, vectors=vectors, descending=descending
        )
        return vectors

    def map_gradients(self, grad_output, mean_rstd, vectors, inverse_count, results, descending=False):
        k = self.experts
        native().emulate_dkf_map_gradients(
            **self.call(),
            mean_rstd=mean_rstd,
            grad_output=grad_output,
            vectors=vectors,
            inverse_count=inverse_count,
            grad_deep=results[:k],
            grad_shallow=results[k : 2 * k],
            grad_shortcut=results[2 * k :],
            processors=self.processors,
            descending=descending,
        )
        return results


def statistics_of(maps, processors=4, descending=False):
    result = torch.full((len(maps), 3, maps[0].shape[1]), torch.nan)
    native().emulate_dkf_statistics(
        dtype=DTYPES[maps[0].dtype],
        shape=maps[0].shape,
        maps=maps,
        statistics=result,
        processors=processors,
        descending=descending,
    )
    return result


class Reference:
    """The composition of PyTorch operators in float64, and its gradients for `grad_output`."""

    def __init__(self, case: Case, grad_output: Tensor, moments: Tensor | None):
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
        gradients = torch.autograd.grad((self.f * grad_output.double()).sum(), leaves)
        self.gradients = gradients[: len(self.maps)]
        vectors = gradients[len(self.maps) :]
        self.vectors = [torch.stack(pair) for pair in zip(vectors[: case.norms], vectors[case.norms :], strict=True)]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, scale: Tensor | None = None) -> None:
    """Errors relative to the largest entry: of all, or of `scale` (of what an entry is a difference of)."""
    largest = (expected if scale is None else scale).detach().abs().max().item()
    worst = (actual.double() - expected.detach()).abs().max().item()
    assert worst <= tolerance * max(largest, 1e-30), (worst, largest)


def check(case: Case, grad_output: Tensor, given_moments: Tensor | None, results, descending=False) -> None:
    """`results`: memory for the gradients. given_moments [n, 2, C]: mean and variance; None: training.

    Nothing is compared if the argument of a ReLU is so near to 0 that float32 may see its other side.
    """
    dtype, shape = case.maps[0].dtype, case.maps[0].shape
    count = shape[0] * shape[2] * shape[3]
    training = given_moments is None
    reference = Reference(case, grad_output, given_moments)
    if any(bool((margin.abs() < 1e-5).any()) for margin in reference.margin):
        return
    rounding = torch.finfo(dtype).eps
    tolerance = 3e-5
    if training:
        running = [torch.tensor(v).repeat(shape[1]) for _ in case.weight for v in (0.5, 2.0)]
        f, sums, mean_rstd, statistics = case.forward(running=running, descending=descending)
        for actual, expected in zip(running, reference.running, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
        for j in range(case.norms):
            map_ = case.maps[(j + case.experts) % (2 * case.experts)]
            expected = map_.double().transpose(0, 1).flatten(1)
            deviation = expected.std(1, correction=0)
            mean = mean_rstd[j, 0].double() + mean_rstd[j, 1].double()
            assert bool(((mean - expected.mean(1)).abs() <= 3e-6 * deviation + 1e-12).all())
            torch.testing.assert_close(statistics[j, 0].double(), expected.mean(1), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(statistics[j, 1].double(), expected.var(1), rtol=2e-5, atol=1e-12)
    else:
        high = given_moments[:, 0].float()
        rest = (given_moments[:, 0] - high.double()).float()
        eps = torch.tensor(case.eps, dtype=torch.float64)[:, None]
        mean_rstd = torch.stack([high, rest, (given_moments[:, 1] + eps).rsqrt().float()], 1)
        f, sums, _, _ = case.forward(mean_rstd=mean_rstd, descending=descending)
    assert_near(f, reference.f, tolerance + rounding)
    vectors = case.vector_gradients(grad_output, sums, descending)
    for actual, expected in zip(vectors, reference.vectors, strict=True):
        assert_near(actual, expected, tolerance)
    inverse_count = 1 / count if training else 0.0
    gradients = case.map_gradients(grad_output, mean_rstd, vectors, inverse_count, results, descending)
    for j, (actual, expected) in enumerate(zip(gradients, reference.gradients, strict=True)):
        norm = (j + case.experts) % (2 * case.experts)  # of a deep or shallow map
        scale = expected
        if training and j < 2 * case.experts and norm < case.norms:  # the gradient before its projection
            upstream = float(grad_output.abs().max()) * 8 / (shape[2] * shape[3])
            scale = torch.tensor([upstream * float(mean_rstd[norm, 2].max()), float(expected.abs().max())])
        assert_near(actual, expected, tolerance + rounding, scale)
