"""Describe a data set: its imbalance, and what is odd about its classes and files.

Printed are class sizes with the figures of the field, shots, and what was found: images that are in training and in the
test, copies with different labels, duplicates, classes on one side alone or with a single image, class names that are
hard to tell apart, image files that the data set does not name. Images are compared by content; of files, only those
of one size are read. Exit status: 0 for a report, 1 where something named by --fail-on was found, 2 bad input.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from shike_fast._util.files import atomic_write, check_output_file
from shike_fast._util.options import add_owned
from shike_fast._util.page import DESCRIPTION, is_page_of
from shike_fast._util.pictures import is_picture
from shike_fast.data.commands import description_files
from shike_fast.data.commands.description_text import as_text
from shike_fast.data.description.describe import FINDINGS, Description, describe
from shike_fast.data.longtail import PROFILES, SUBSETS
from shike_fast.data.registry import dataset_options, load_dataset, named_options
from shike_fast.errors import ConfigError, DataError

_COMPARING = ("leakage", "contradictions", "duplicates")  # findings that --no-duplicates leaves out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``describe``."""
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="name of the data set")
    add("--data-dir", type=Path, metavar="DIR", help="folder with its files")
    add("--imbalance-factor", type=float, metavar="F", help="describe the long-tail subset of this factor")
    add("--subset", choices=tuple(SUBSETS), default="first", help="which images of a class it holds (default first)")
    add("--long-tail", choices=tuple(PROFILES), default="exp", help="how its classes shrink (default exp)")
    add("--no-verify", action="store_true", help="accept any number of records")
    add("--no-duplicates", action="store_true", help="do not compare images")
    add("--all", action="store_true", help="show all classes and findings, not just the first")
    add("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    add("--html", type=Path, metavar="FILE", help="write a page with the figures and the picture to FILE")
    add("--picture", type=Path, metavar="FILE", help="draw the sizes of the classes: FILE.png or FILE.svg")
    add(
        "--fail-on",
        nargs="+",
        choices=tuple(FINDINGS),
        default=[],
        metavar="FINDING",
        help=f"end with status 1 if there are any: {', '.join(FINDINGS)}",
    )
    add_owned(parser.add_argument_group("data sets of your own"), dataset_options())


def run(arguments: argparse.Namespace) -> int:
    """Describe the data set and write the files that are asked for; returns the exit status."""
    _check(arguments)
    data = load_dataset(
        arguments.dataset,
        data_dir=arguments.data_dir,
        imbalance_factor=arguments.imbalance_factor,
        subset=arguments.subset,
        long_tail=arguments.long_tail,
        verify=not arguments.no_verify,
        **named_options(vars(arguments)),
    )
    description = describe(data, data_dir=arguments.data_dir, duplicates=not arguments.no_duplicates)
    if arguments.json is not None:
        atomic_write(arguments.json, description_files.as_json(description))
    if arguments.html is not None:
        atomic_write(arguments.html, description_files.as_page(description).encode())
    if arguments.picture is not None:
        atomic_write(arguments.picture, description_files.as_picture(description, arguments.picture.suffix[1:]))
    print(as_text(description, everything=arguments.all, compared=not arguments.no_duplicates))
    failures = _failures(description, arguments.fail_on)
    if failures:
        print(f"failed on: {', '.join(failures)}")
    return 1 if failures else 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be done before the work."""
    if arguments.no_duplicates and (lost := [name for name in _COMPARING if name in arguments.fail_on]):
        raise ConfigError(f"--fail-on {lost[0]}: needs the comparison of images; leave out --no-duplicates")
    picture: Path | None = arguments.picture
    if picture is not None and picture.suffix[1:] not in description_files.FORMS:
        raise ConfigError(f"--picture: {picture} must end in {' or '.join(f'.{f}' for f in description_files.FORMS)}")
    for option, path, ours, refusal in (
        ("--json", arguments.json, description_files.is_json, "is no description of a data set"),
        ("--html", arguments.html, lambda path: is_page_of(DESCRIPTION, path), "is no description of a data set"),
        ("--picture", picture, is_picture, "is no picture of this command"),
    ):
        if path is not None:
            check_output_file(option, path, ours, refusal)


def _failures(description: Description, wanted: Sequence[str]) -> list[str]:
    found = description.findings
    unknown = [name for name in wanted if found[name] is None]
    if unknown:
        raise DataError(f"--fail-on {unknown[0]}: cannot be found out of {description.name}; leave it out")
    return [f"{name} ({found[name]:,})" for name in dict.fromkeys(wanted) if found[name]]
