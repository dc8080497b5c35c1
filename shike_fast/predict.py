"""Classify a folder of images: ``python -m shike_fast.predict --checkpoint RUN/best.pt --images DIR``.

Writes a CSV with a line an image: its most probable classes, their names and probabilities. The checkpoint brings the
network, the class names and the transform along; neither the data set nor its files are needed.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from shike_fast._util.cli import ArgumentParser, check_workers, choose_device, cores, run_command, use_device
from shike_fast._util.files import check_output_file, naming, replacing
from shike_fast.data.datasets.imagefolder import EXTENSIONS, image_files
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.engine import checkpoint
from shike_fast.engine.config import TrainConfig, replace_settings, stored_config
from shike_fast.engine.precision import settle_amp
from shike_fast.engine.setup import check_device
from shike_fast.engine.state import model_from_checkpoint
from shike_fast.engine.steps import make_autocast
from shike_fast.errors import CheckpointError, ConfigError

_FIRST_COLUMN = "image"
_OF_A_CLASS = ("class", "name", "probability")
_MOST_WORKERS = 8
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, for networks of grey images


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.predict``."""
    parser = ArgumentParser(prog="python -m shike_fast.predict", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="best.pt or last.pt of a run directory")
    add("--images", type=Path, required=True, metavar="DIR", help="folder of images, with all folders below it")
    add("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default predictions.csv")
    add("--top", type=int, default=5, metavar="N", help="classes an image (default 5)")
    add("--stage", type=int, choices=(1, 2), help="whose classifiers to use; default those the checkpoint was training")
    add("--batch-size", type=int, metavar="B", help="images at a time; default that of the run")
    add("--workers", type=int, metavar="N", help="processes that decode; default one a core, at most 8")
    add("--threads", type=int, metavar="N", help="CPU threads; default that of the run")
    add("--device", help="cpu, cuda or cuda:N; default cuda where there is one")
    add("--amp", metavar="auto|off|bf16|fp16", help="mixed precision; default that of the run")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 where some images could not be read."""
    return run_command(lambda: _predict(vars(make_parser().parse_args(argv))))


def _predict(arguments: dict[str, Any]) -> int:
    check_workers(arguments["workers"])
    for name, least in (("top", 1), ("batch_size", 1)):
        if arguments[name] is not None and arguments[name] < least:
            raise ConfigError(f"--{name.replace('_', '-')}: must be at least {least}, got {arguments[name]}")
    output: Path = arguments["output"]
    check_output_file("--output", output, _holds_predictions, "holds no predictions")
    if not arguments["images"].is_dir():
        raise ConfigError(f"--images: {arguments['images']} is not a folder")
    source: Path = arguments["checkpoint"]
    state = checkpoint.load_checkpoint(source)
    device = choose_device(arguments["device"])
    amp, note = settle_amp(arguments["amp"] or state["config"].get("amp"), device)
    config = _config(state, arguments | {"amp": amp}, source)
    if note is not None:
        print(note, file=sys.stderr)
    torch.set_num_threads(config.threads)
    use_device(device)
    check_device(config, device)
    model = model_from_checkpoint(state, source).to(device).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    stage = arguments["stage"] or state["stage"]
    if stage == 2 and config.method == "ce":
        raise CheckpointError(f"--stage: checkpoint {source} was trained with method 'ce', which has no stage 2")
    paths = _list_images(arguments["images"])
    dataset = _dataset(state, source, FileStore(arguments["images"], paths))
    workers = arguments["workers"]
    loader = PhotoLoader(
        dataset,
        batch_size=arguments["batch_size"] or config.batch_size,
        shuffle=False,
        device=device,
        num_workers=min(_MOST_WORKERS, cores()) if workers is None else workers,
        report=lambda _: None,
        most_broken=len(dataset),
    )
    grey = state["data"]["in_channels"] == 1
    autocast = make_autocast(config.amp, device)

    def probabilities() -> Iterator[Tensor]:
        with torch.inference_mode():
            for images, _ in loader.epoch(0):
                if grey:
                    # Normalisation is the same for all three channels, so the luma may come after it.
                    images = (images * torch.tensor(_LUMA, device=device)[:, None, None]).sum(1, keepdim=True)
                with autocast():
                    logits = model(images, stage=stage)
                yield logits.float().mean(0).softmax(1)

    names = state["data"]["class_names"]
    top = min(arguments["top"], len(names))
    try:
        with replacing(output) as file:
            _write(file, output, probabilities(), paths, names, top, loader.broken.messages)
    finally:
        loader.close()
    print(f"{output}: {len(paths):,} images, {top} classes each")
    if len(loader.broken):
        messages = list(loader.broken.messages.values())
        print(f"{len(messages):,} images could not be read, the first: {messages[0]}", file=sys.stderr)
        return 1
    return 0


def _holds_predictions(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.readline().startswith(f"{_FIRST_COLUMN},class_1,".encode())


def _list_images(folder: Path) -> PathTable:
    paths = PathTable(sorted(os.path.relpath(path, folder) for path in image_files(folder)))
    if not len(paths):
        raise ConfigError(f"--images: {folder} holds no images ({', '.join(EXTENSIONS)})")
    return paths


def _config(state: dict[str, Any], arguments: dict[str, Any], source: Path) -> TrainConfig:
    names = ("device", "threads", "amp")
    given = {name: arguments[name] for name in names if arguments[name] is not None}
    given |= {"loader": "auto", "cuda_graph": None}  # the run's may need a device that is not here
    return replace_settings(stored_config(state["config"], str(source)), given)


def _dataset(state: dict[str, Any], source: Path, store: FileStore) -> ImageDataset:
    """The images to classify, with the test transform that the checkpoint describes."""
    data = state["data"]
    try:
        return ImageDataset(
            store,
            np.zeros(len(store), np.int64),
            augmentation="none",
            training=False,
            size=data["image_size"],
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            margin=data["margin"],
        )
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint {source} does not say how images are transformed (no {error}): an older version wrote it"
        ) from error


def _write(
    file: IO[bytes],
    path: Path,
    batches: Iterator[Tensor],
    images: PathTable,
    names: Sequence[str],
    top: int,
    broken: dict[int, str],
) -> None:
    """A header, and for each image its classes by falling probability, or the reason why it has none."""

    def add(rows: list[list[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with naming(path):
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))  # file names need not be UTF-8

    ranks = range(1, top + 1)
    add([[_FIRST_COLUMN, *(f"{what}_{rank}" for rank in ranks for what in _OF_A_CLASS), "error"]])
    index = 0
    for batch in batches:
        rows = []
        values, classes = batch.topk(top, dim=1)
        for row, chosen in zip(values.tolist(), classes.tolist(), strict=True):
            cells: list[Any] = []
            for value, c in zip(row, chosen, strict=True):
                cells += [c, names[c], f"{value:.6f}"]
            if index in broken:
                cells = [""] * len(cells)
            rows.append([images[index], *cells, broken.get(index, "")])
            index += 1
        add(rows)


if __name__ == "__main__":
    sys.exit(main())
