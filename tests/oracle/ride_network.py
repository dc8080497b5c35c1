"""The network that the published code of RIDE, SADE, BalPoE and MDCS shares: its names and its arithmetic.

A state_dict is made entry by entry, and the logits are computed from it with functions of PyTorch alone, so nothing
here knows of the modules that are tested.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Form:
    """What the published constructors take.

    Attributes:
        blocks: in each stage.
        width: of stem and first stage.
        shared: the number of stages that all experts share.
        factor: of the width of the others.
        expansion: 1 for basic blocks, 4 for bottlenecks.
        groups, width_per_group: of bottlenecks.
        large: 7x7 stem and max-pooling.
        shortcut: what the projection is called; None for zeros as new channels.
        cosine: normalised heads [D, C] times 30, or linear ones [C, D] with a bias.
    """

    blocks: tuple[int, ...] = (1, 1, 1)
    width: int = 16
    shared: int = 1
    factor: float = 0.75
    expansion: int = 1
    groups: int = 1
    width_per_group: int = 64
    large: bool = False
    shortcut: str | None = None
    cosine: bool = True
    experts: int = 3
    classes: int = 10
    channels: int = 3

    def planes(self, stage: int) -> int:
        return int(self.width * 2**stage * (1 if stage < self.shared else self.factor))


def make_state_dict(form: Form, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random entries under the published names, float64."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def convolution(name, channels_out, channels_in, size):
        values = torch.randn(channels_out, channels_in, size, size, generator=generator, dtype=torch.float64)
        state[f"{name}.weight"] = values * (2 / (channels_in * size * size)) ** 0.5

    def norm(name, channels):
        for entry, low, high in (("weight", 0.5, 1.5), ("bias", -0.2, 0.2), ("running_mean", -0.3, 0.3)):
            state[f"{name}.{entry}"] = torch.empty(channels, dtype=torch.float64).uniform_(
                low, high, generator=generator
            )
        state[f"{name}.running_var"] = torch.empty(channels, dtype=torch.float64).uniform_(0.5, 2, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def stage(name, number, channels):
        planes = form.planes(number)
        inner = planes if form.expansion == 1 else planes * form.width_per_group // 64 * form.groups
        leaving = planes * form.expansion
        for i in range(form.blocks[number]):
            block = f"{name}.{i}"
            if form.expansion == 1:
                sizes = ((planes, channels, 3), (planes, planes, 3))
            else:
                sizes = ((inner, channels, 1), (inner, inner // form.groups, 3), (leaving, inner, 1))
            for number_of, (channels_out, channels_in, size) in enumerate(sizes, start=1):
                convolution(f"{block}.conv{number_of}", channels_out, channels_in, size)
                norm(f"{block}.bn{number_of}", channels_out)
            if form.shortcut and i == 0 and (number > 0 or channels != leaving):
                convolution(f"{block}.{form.shortcut}.0", leaving, channels, 1)
                norm(f"{block}.{form.shortcut}.1", leaving)
            channels = leaving
        return channels

    convolution("conv1", form.width, form.channels, 7 if form.large else 3)
    norm("bn1", form.width)
    channels = form.width
    for number in range(form.shared):
        channels = stage(f"layer{number + 1}", number, channels)
    for k in range(form.experts):
        leaving = channels
        for number in range(form.shared, len(form.blocks)):
            leaving = stage(f"layer{number + 1}s.{k}", number, leaving)
        head = torch.randn(leaving, form.classes, generator=generator, dtype=torch.float64)
        state[f"linears.{k}.weight"] = head if form.cosine else head.t().contiguous()
        if not form.cosine:
            state[f"linears.{k}.bias"] = torch.randn(form.classes, generator=generator, dtype=torch.float64)
    return state


def logits(form: Form, state: dict[str, torch.Tensor], images: torch.Tensor, training: bool = False) -> torch.Tensor:
    """Logits [K, B, C] of every expert; in training mode with statistics of the batch, which are kept nowhere."""

    def norm(name, x):
        mean, var = (None, None) if training else (state[f"{name}.running_mean"], state[f"{name}.running_var"])
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"], training=training)

    def block(name, x, stride, leaving):
        y = x
        count = 2 if form.expansion == 1 else 3
        strided = 1 if form.expansion == 1 else 2
        for i in range(1, count + 1):
            weight = state[f"{name}.conv{i}.weight"]
            groups = form.groups if weight.shape[2] == 3 else 1
            y = F.conv2d(y, weight, stride=stride if i == strided else 1, padding=weight.shape[2] // 2, groups=groups)
            y = norm(f"{name}.bn{i}", y)
            y = y.relu() if i < count else y
        if stride != 1 or x.shape[1] != leaving:
            if form.shortcut is None:
                x = x[:, :, ::2, ::2]
                zeros = x.new_zeros(len(x), (leaving - x.shape[1]) // 2, *x.shape[2:])
                x = torch.cat([zeros, x, zeros], dim=1)
            else:
                weight = state[f"{name}.{form.shortcut}.0.weight"]
                x = norm(f"{name}.{form.shortcut}.1", F.conv2d(x, weight, stride=stride))
        return (y + x).relu()

    def stage(name, number, x):
        for i in range(form.blocks[number]):
            stride = 2 if number > 0 and i == 0 else 1
            x = block(f"{name}.{i}", x, stride, form.planes(number) * form.expansion)
        return x

    weight = state["conv1.weight"]
    x = F.conv2d(images, weight, stride=2 if form.large else 1, padding=weight.shape[2] // 2)
    x = norm("bn1", x).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1) if form.large else x
    for number in range(form.shared):
        x = stage(f"layer{number + 1}", number, x)
    results = []
    for k in range(form.experts):
        y = x
        for number in range(form.shared, len(form.blocks)):
            y = stage(f"layer{number + 1}s.{k}", number, y)
        features = y.flatten(2).mean(2)
        head = state[f"linears.{k}.weight"]
        if form.cosine:
            results.append(30 * (features / features.norm(dim=1, keepdim=True)) @ (head / head.norm(dim=0)))
        else:
            results.append(features @ head.t() + state[f"linears.{k}.bias"])
    return torch.stack(results)
