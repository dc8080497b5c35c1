"""What the settings mean on this machine: loaders, recorded steps, and what cannot be done here."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from shike_fast import data
from shike_fast._util.cli import cores, most_workers
from shike_fast.data.images.augmented import AugmentedDataset
from shike_fast.data.images.gpu_decode import NoHardwareDecoderError
from shike_fast.data.loaders import choice
from shike_fast.data.loaders.loader import EpochLoader
from shike_fast.data.sampling import Sampler, make_sampler
from shike_fast.engine.config import TrainConfig
from shike_fast.engine.distributed import Processes, local_world_size
from shike_fast.engine.finetuning import check_data
from shike_fast.engine.precision import AMP_DTYPES
from shike_fast.engine.state import build_model
from shike_fast.errors import ConfigError

_ALONE = Processes()
_SMALL_SIDE = 64  # pixels: below, the kernels of a step are shorter than their launches
_MOST_WORKERS = 8  # beside training on a CPU, or where images are only augmented
_MOST_DECODERS = 32  # beside a GPU, each decoding some 500 to 1,500 images a second


def make_loader(
    config: TrainConfig,
    dataset: data.LongTailData,
    device: torch.device,
    *,
    train: bool,
    test_batch_size: int | None = None,
    processes: Processes = _ALONE,
) -> EpochLoader:
    """Loader of this process's share of the training images (shuffled) or of the test images of a run.

    Test batches are four times as large as training batches unless ``test_batch_size`` says otherwise: a forward pass
    that keeps nothing for a backward one has the memory for it. Those of image files are as large as training batches:
    every worker holds some of them.

    Images in memory move to the device and are augmented there, unless the user asks for ``--loader cpu`` or workers.
    Image files are decoded by worker processes and augmented on the device; with ``--loader gpu`` the GPU also decodes.
    Where the user names no number of workers, images that are decoded or augmented one by one get one a core, shared
    among the processes of this machine, at most eight, or 32 that decode for a GPU; those prepared a batch at a time
    need none.

    Training images are drawn by the sampler of the first stage, and shown in the views of the method.

    Raises:
        ConfigError: if ``--loader device`` is asked for images that are files, or ``gpu`` where none can decode, or if
            the data set lacks an augmentation that the method wants, or has nothing that a sampler could draw.
    """
    source = dataset.train if train else dataset.test
    wanted = "cpu" if config.loader == "auto" and config.workers is not None else config.loader
    kind = choice.loader_class(source, wanted)
    if kind is None:
        raise ConfigError(f"--loader: device holds images that fit in memory, {dataset.name} has files; use cpu or gpu")
    batch_size = config.batch_size if train else test_batch_size or (1 if kind.decodes else 4) * config.batch_size
    views = _views(config, dataset) if train else [source]
    workers = _workers(config, views, decodes_for_gpu=kind.decodes and device.type != "cpu")
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": config.seed,
        "shuffle": train,
        "rank": processes.rank,
        "world_size": processes.world_size,
        "sampler": stage_sampler(config, dataset, 1) if train else None,
        "views": views,
    }
    try:
        return choice.make_loader(source, kind, device=device, num_workers=workers, **settings)
    except NoHardwareDecoderError as error:
        raise ConfigError(f"--loader: gpu cannot be used: {error}; use cpu or auto") from error
    except ValueError as error:
        raise ConfigError(f"--batch-size: {error}") from error


def stage_sampler(config: TrainConfig, dataset: data.LongTailData, stage: int) -> Sampler:
    """What draws the training images of a stage, counted from 1.

    Raises:
        ConfigError: there is nothing that it could draw, or the data set cannot show an image twice in an epoch.
    """
    before, own = config.stage_epochs[: stage - 1], config.stage_epochs[stage - 1]
    name = config.stages[stage - 1].sampler or config.sampler
    try:
        sampler = make_sampler(name, dataset.train.labels, first_epoch=sum(before), epochs=own)
    except ValueError as error:
        raise ConfigError(f"--sampler: {error}") from error
    if sampler.repeats and not _shows_again(dataset.train):
        raise ConfigError(
            f"--sampler: '{name}' draws an image of {dataset.name} more than once, but its batch() takes no repeats; "
            "use --sampler instance, or let it take them"
        )
    return sampler


def _views(config: TrainConfig, dataset: data.LongTailData) -> list[data.BatchSource]:
    """The training images as each view of the method shows them."""
    source, names = dataset.train, config.views
    info = dataset.info or data.datasets().get(config.dataset)
    known = () if info is None else info.augmentations
    for name in names:
        if name is not None and (name not in known or not isinstance(source, AugmentedDataset)):
            raise ConfigError(
                f"--method: '{config.method}' wants a view with the augmentation {name!r}, {dataset.name} has "
                f"{', '.join(known) or 'none'}"
            )
    if not names:
        raise ConfigError(f"--method: '{config.method}' takes no view of its images; at least one is needed")
    if len(names) > 1 and not _shows_again(source):
        raise ConfigError(
            f"--method: '{config.method}' takes {len(names)} views of an image, but batch() of {dataset.name} takes no "
            "repeats; use a method of one view, or let it take them"
        )
    return [source.augmented_by(name) if name and isinstance(source, AugmentedDataset) else source for name in names]


def _shows_again(source: data.BatchSource) -> bool:
    return "repeats" in inspect.signature(source.batch).parameters


def _workers(config: TrainConfig, views: list[data.BatchSource], *, decodes_for_gpu: bool) -> int:
    if config.workers is not None:
        return min(config.workers, most_workers())  # a checkpoint may come from a larger machine
    if not any(view.wants_workers for view in views):
        return 0
    return min(_MOST_DECODERS if decodes_for_gpu else _MOST_WORKERS, max(1, cores() // local_world_size()))


def records(config: TrainConfig, dataset: data.LongTailData, device: torch.device, processes: Processes) -> bool:
    """Whether the step becomes a CUDA graph: where asked for, or by default for small images on one GPU."""
    if config.cuda_graph is not None:
        return config.cuda_graph
    launch_bound = dataset.image_size <= _SMALL_SIDE and not config.checkpoint_activations
    return device.type == "cuda" and launch_bound and not processes.is_distributed and config.optimizer != "apex"


def check_setting(
    config: TrainConfig, dataset: data.LongTailData, device: torch.device, processes: Processes = _ALONE
) -> None:
    """Find out before the run begins what would fail in it.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    check_device(config, device)
    passes = processes.world_size * config.accumulate
    if config.batch_size < 2 * passes:  # BatchNorm needs two values a channel
        raise ConfigError(
            f"--batch-size: counts the images of all processes; {processes.world_size} processes with --accumulate "
            f"{config.accumulate} need at least {2 * passes}, got {config.batch_size}"
        )
    _views(config, dataset)
    check_data(config, dataset)
    for stage in range(1, len(config.stages) + 1):
        stage_sampler(config, dataset, stage)
    _check_last_batch(config, dataset, processes)
    if len(dataset.test) < processes.world_size:
        raise ConfigError(f"{dataset.name} has {len(dataset.test)} test images for {processes.world_size} processes")


def check_device(config: TrainConfig, device: torch.device) -> None:
    """Find out, before the data set is read, what the device cannot do.

    Raises:
        ConfigError: naming the option and the remedy.
    """
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError(f"--cuda-graph: needs a GPU, this run is on {device}; leave it out, or try --compile")
    if config.loader == "gpu" and device.type != "cuda":
        raise ConfigError(f"--loader: gpu needs a GPU, this run is on {device}; use cpu or auto")
    _check_amp(config.amp, device)


def _check_last_batch(config: TrainConfig, dataset: data.LongTailData, processes: Processes) -> None:
    """Refuse a last batch that brings a single image to a network whose last maps are a single value."""
    images = len(dataset.train)

    def fits(batch_size: int) -> bool:
        last = min(batch_size, (images - 1) % batch_size + 1)
        return last >= processes.world_size and _fewest_at_a_time(last, config, processes) > 1

    last = min(config.batch_size, (images - 1) % config.batch_size + 1)
    if last < processes.world_size or fits(config.batch_size) or _normalises_one_image(config, dataset):
        return
    shared = f" for {processes.world_size} processes" if processes.is_distributed else ""
    parts = f" with --accumulate {config.accumulate}" if config.accumulate > 1 else ""
    least = 2 * processes.world_size * config.accumulate
    near = sorted(range(least, 2 * config.batch_size + 1), key=lambda size: abs(size - config.batch_size))
    size = next(filter(fits, near), None)
    remedy = "add images" if size is None else f"use --batch-size {size}"
    if processes.is_distributed:
        remedy += ", or another number of processes"
    pixels = f"{dataset.image_size}x{dataset.image_size}"
    raise ConfigError(
        f"--batch-size: of {images} images in batches of {config.batch_size} the last batch holds {last}"
        f"{shared}{parts}, so that BatchNorm sees one alone, which in {config.model}'s last maps at {pixels} pixels is "
        f"a single value a channel; {remedy}"
    )


def _fewest_at_a_time(images: int, config: TrainConfig, processes: Processes) -> int:
    """The fewest images, in all views, over which BatchNorm takes its statistics in a step with so many."""
    views = len(config.views)
    share = images // processes.world_size  # of the processes that get the fewest
    parts = max(1, min(config.accumulate, share))
    if not config.sync_batch_norm:
        return views * (share // parts)
    larger = images % processes.world_size  # processes that get one image more
    return views * (larger * ((share + 1) // parts) + (processes.world_size - larger) * (share // parts))


def _normalises_one_image(config: TrainConfig, dataset: data.LongTailData) -> bool:
    """Whether the network can be trained on one image: the norms must have more than one value a channel."""
    model = build_model(config, dataset, pretrained=False).train()
    image = torch.zeros(1, dataset.in_channels, dataset.image_size, dataset.image_size)
    try:
        with torch.no_grad():
            model.features(image)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    return True


def _check_amp(amp: str, device: torch.device) -> None:
    dtype = AMP_DTYPES.get(amp)
    if dtype is None:
        return
    if device.type == "cuda" and amp == "bf16" and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"--amp: {name} does not compute in bfloat16; use --amp fp16 or off")
    weight = torch.zeros(8, 8, 3, 3, device=device, dtype=dtype, requires_grad=True)
    try:
        torch.conv2d(torch.zeros(2, 8, 8, 8, device=device, dtype=dtype), weight, padding=1).sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--amp: {device} does not convolve in {dtype} ({reason}); use --amp off") from error
