"""Modules of the user's own that register data sets, methods and networks before a command begins."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any

from shike_fast._util.cli import ArgumentParser
from shike_fast.errors import ConfigError

GROUP = "shike_fast.plugins"  # of entry points


def add_plugin_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--plugin``, which :func:`load_plugins` has seen to before the rest is parsed."""
    parser.add_argument(
        "--plugin",
        action="append",
        dest="plugins",
        metavar="MODULE",
        help="import a module that registers data sets, methods or networks; may be repeated",
    )


def parse_with_plugins(
    make_parser: Callable[[], argparse.ArgumentParser], argv: Sequence[str] | None
) -> dict[str, Any]:
    """What a command line says, read by the parser that is made once the plugins are there."""
    load_plugins(argv)
    return vars(make_parser().parse_args(argv))


def load_plugins(argv: Sequence[str] | None) -> tuple[str, ...]:
    """Import the modules that ``--plugin`` names in a command line, and those of installed packages.

    A package makes its plugin known by an entry point of the group ``shike_fast.plugins``.

    Args:
        argv: arguments of the command; None for those of this program.

    Returns:
        Their names.

    Raises:
        ConfigError: if one is missing, or raises an error.
    """
    parser = ArgumentParser(prog="python -m shike_fast", add_help=False)
    add_plugin_option(parser)
    return import_plugins(parser.parse_known_args(argv)[0].plugins or [])


def import_plugins(named: Iterable[str]) -> tuple[str, ...]:
    """Import modules, and those of installed packages, as :func:`load_plugins` does; returns all names.

    Raises:
        ConfigError: if one is missing, or raises an error.
    """
    named = list(named)
    installed = [(point.module, f"entry point '{point.name}'") for point in metadata.entry_points(group=GROUP)]
    for module, source in [*installed, *((name, "--plugin") for name in named)]:
        _import(module, source)
    return tuple(dict.fromkeys([*(module for module, _ in installed), *named]))


def _import(name: str, source: str) -> None:
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever code of others raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{source}: there is no module '{name}'; it must lie in this folder or be installed ({error})"
            ) from error
        raise ConfigError(f"{source}: module '{name}' cannot be imported ({reason})") from error


def missing_plugins(names: Iterable[str]) -> str:
    """The options that a command lacks of those ``--plugin`` that a run had; empty where it lacks none."""
    return " ".join(f"--plugin {name}" for name in names if name not in sys.modules)
