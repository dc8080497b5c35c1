"""Pack a data set of image files into a few large files, no larger than training needs.

Images are reduced to --short-side and kept as JPEG or as raw pixels; --data-dir OUT then trains from the pack. A killed
pack resumes when the same command is repeated. Images that are missing or cannot be decoded are left out, unless they
are too many. docs/data.md describes the format.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shike_fast._util.cli import cores, whole_number
from shike_fast._util.options import add_owned
from shike_fast.data.images.files import ImageDataset
from shike_fast.data.pack import reader, writer
from shike_fast.data.pack.format import EXTENSIONS, MANIFEST, PARTS, Manifest, Settings, Split
from shike_fast.data.registry import dataset_options, datasets, load_dataset, named_options
from shike_fast.errors import ConfigError, DataError

QUALITY = 90  # of JPEG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``pack``."""
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the pack: new, empty, or that of an unfinished pack")
    add("--dataset", required=True, metavar="NAME", help="a data set of image files")
    add("--data-dir", required=True, type=Path, metavar="DIR", help="folder with its files")
    add(
        "--short-side",
        type=whole_number(1),
        default=256,
        metavar="PX",
        help="reduce images to this short side (default 256)",
    )
    add("--format", choices=tuple(EXTENSIONS), default="jpeg", help="JPEG, or raw pixels, of ten times the size")
    add("--quality", type=whole_number(1, 100), metavar="Q", help=f"of JPEG that is encoded anew (default {QUALITY})")
    add("--workers", type=whole_number(1), metavar="N", help="processes; default: one for each CPU")
    add("--shard-images", type=whole_number(1), default=8192, metavar="N", help="images of a file (default 8192)")
    add("--strict", action="store_true", help="stop at the first image that cannot be read instead of leaving it out")
    add("--no-verify", action="store_true", help="accept any number of records in the source")
    add_owned(parser.add_argument_group("data sets of your own"), dataset_options())


def run(arguments: argparse.Namespace) -> int:
    """Write the pack, or resume it; returns the exit status."""
    if reader.is_pack(arguments.data_dir):
        raise DataError(f"--data-dir {arguments.data_dir}: a pack already; pack the files it was made from")
    if arguments.format == "raw" and arguments.quality is not None:
        raise ConfigError("--quality: raw pixels have none; leave it out, or use --format jpeg")
    if arguments.out.resolve().is_relative_to(arguments.data_dir.resolve()):
        raise ConfigError(f"{arguments.out}: lies within --data-dir {arguments.data_dir}; choose a place outside")
    info = datasets().get(arguments.dataset)
    if info is not None and not info.resizable:
        raise _in_memory(arguments.dataset)
    out: Path = arguments.out
    writer.check_place(out)
    own = named_options(vars(arguments))
    data = load_dataset(arguments.dataset, data_dir=arguments.data_dir, verify=not arguments.no_verify, **own)
    sources: dict[str, writer.Source] = {}
    for part, dataset in zip(PARTS, (data.train, data.test), strict=True):
        if not isinstance(dataset, ImageDataset):
            raise _in_memory(data.name)
        sources[part] = writer.Source.of(dataset, arguments.data_dir)
    settings = Settings(
        dataset=data.name,
        short_side=arguments.short_side,
        format=arguments.format,
        quality=(arguments.quality or QUALITY) if arguments.format == "jpeg" else None,
        shard_images=arguments.shard_images,
        source=writer.identity(data, sources),
        options=own,
        split=None if data.validation is None else Split.of(data.validation),
    )
    description = datasets()[data.name].description
    workers = arguments.workers or cores()
    manifest = writer.write_pack(
        out, data, sources, settings, description=description, strict=arguments.strict, workers=workers
    )
    print(f"{out}: complete already" if manifest is None else _summary(out, manifest))
    return 0


def _in_memory(name: str) -> DataError:
    return DataError(f"{name}: its images are kept in memory as they are, so there is nothing to pack")


def _summary(out: Path, manifest: Manifest) -> str:
    parts = (manifest.train, manifest.test)
    size = sum(file.bytes for part in parts for file in (part.index, *part.shards))
    files = sum(len(part.shards) for part in parts)
    lost = sum(len(part.left_out) for part in parts)
    left_out = f"; {lost} left out, listed in {out / MANIFEST}" if lost else ""
    images = f"{manifest.train.images:,} training and {manifest.test.images:,} test images"
    return f"{out}: {images} in {files} shards, {size / 1e6:,.1f} MB{left_out}"
