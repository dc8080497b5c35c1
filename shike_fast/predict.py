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

import torch
from torch import Tensor

from shike_fast._util.cli import ArgumentParser, check_workers, choose_device, cores, run_command
from shike_fast._util.files import check_output_file, naming, replacing
from shike_fast._util.plugins import add_plugin_option, parse_with_plugins
from shike_fast.data.datasets.imagefolder import EXTENSIONS, image_files
from shike_fast.data.images.paths import PathTable
from shike_fast.data.images.stores import FileStore
from shike_fast.data.loaders.photo import PhotoLoader
from shike_fast.engine.classifier import Classifier, ImageClassifier
from shike_fast.engine.foreign import ForeignData
from shike_fast.engine.inference import load_trained
from shike_fast.engine.programs import ONNX, TORCH, load_program
from shike_fast.errors import ConfigError

_FIRST_COLUMN = "image"
_OF_A_CLASS = ("class", "name", "probability")
_MOST_WORKERS = 8
_BATCH = 64  # images at a time through a program


def make_parser() -> ArgumentParser:
    """The command line of ``shike_fast.predict``."""
    parser = ArgumentParser(prog="python -m shike_fast.predict", description=__doc__)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.pt or last.pt of a run directory, an exported file (.pt2, .onnx, .safetensors or a folder with it), "
        "or weights of elsewhere",
    )
    add("--images", type=Path, required=True, metavar="DIR", help="folder of images, with all folders below it")
    add("--output", type=Path, default=Path("predictions.csv"), metavar="FILE", help="default predictions.csv")
    add("--top", type=int, default=5, metavar="N", help="classes an image (default 5)")
    add("--stage", type=int, metavar="N", help="of the method, from 1; default the one the checkpoint was training")
    add("--batch-size", type=int, metavar="B", help="images at a time; default that of the run")
    add("--workers", type=int, metavar="N", help="processes that decode; default one a core, at most 8")
    add("--threads", type=int, metavar="N", help="CPU threads; default that of the run")
    add("--device", help="cpu, cuda or cuda:N; default cuda where there is one")
    add("--amp", metavar="auto|off|bf16|fp16", help="mixed precision; default that of the run")
    ForeignData.add_options(parser)
    add_plugin_option(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 where some images could not be read."""
    return run_command(lambda: _predict(parse_with_plugins(make_parser, argv)))


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
    model = _classifier(source, arguments)
    paths = _list_images(arguments["images"])
    dataset = model.transform.dataset(FileStore(arguments["images"], paths))
    workers = arguments["workers"]
    loader = PhotoLoader(
        dataset,
        batch_size=arguments["batch_size"] or _batch_size(model),
        shuffle=False,
        device=model.device,
        num_workers=min(_MOST_WORKERS, cores()) if workers is None else workers,
        report=lambda _: None,
        most_broken=len(dataset),
    )

    def probabilities() -> Iterator[Tensor]:
        with torch.inference_mode():
            for images, _ in loader.epoch(0):
                yield model.probabilities(model.transform.with_channels(images))

    names = model.class_names
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


def _classifier(source: Path, arguments: dict[str, Any]) -> ImageClassifier:
    """The network that is named, with this process prepared for it."""
    given = {name: arguments[name] for name in ("stage", "device", "amp")}
    if source.suffix not in (TORCH, ONNX):
        settings = {name: arguments[name] for name in ("device", "threads", "amp")}
        trained = load_trained(source, arguments["stage"], settings, ForeignData.of(arguments).load())
        trained.prepare_process()
        return Classifier(trained, source)
    for name in (name for name, value in given.items() if value is not None):
        if name != "device" or choose_device(given["device"]).type != "cpu":
            raise ConfigError(f"--{name}: is settled in an exported program, which runs on the CPU; leave it out")
    if arguments["threads"] is not None:
        torch.set_num_threads(arguments["threads"])
    return load_program(source)


def _batch_size(model: ImageClassifier) -> int:
    return model.trained.config.batch_size if isinstance(model, Classifier) else _BATCH


def _holds_predictions(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.readline().startswith(f"{_FIRST_COLUMN},class_1,".encode())


def _list_images(folder: Path) -> PathTable:
    paths = PathTable(sorted(os.path.relpath(path, folder) for path in image_files(folder)))
    if not len(paths):
        raise ConfigError(f"--images: {folder} holds no images ({', '.join(EXTENSIONS)})")
    return paths


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
