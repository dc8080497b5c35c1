"""Every option of the training command as a flag with its help; run as a module, it prints their table."""

from __future__ import annotations

import argparse

from shike_fast import methods
from shike_fast._util.cli import ArgumentParser
from shike_fast._util.options import Option, Owned, add_owned, collect_options, options_of
from shike_fast._util.plugins import add_plugin_option
from shike_fast.data.registry import dataset_options
from shike_fast.engine.settings import RunOptions, Settings


def method_options() -> Owned:
    """The hyper-parameters of all methods by name, each with the methods that have it.

    Raises:
        ConfigError: if a method calls one as another option is called, or two do that are of different types.
    """
    general = options_of(Settings) | options_of(RunOptions)
    return collect_options("method", {name: methods.find_method(name) for name in methods.list_methods()}, general)


def own_options() -> Owned:
    """The options of single data sets and those of methods by name, each with the data sets or methods that have it.

    Raises:
        ConfigError: if one is called as another option is, or two of a name are of different types.
    """
    of_methods = method_options()
    taken = {name: owners[0][1] for name, owners in of_methods.items()}
    return dataset_options(options_of(Settings) | options_of(RunOptions) | taken) | of_methods


def add_options(parser: ArgumentParser) -> None:
    """Add all options to the parser of the training command."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for title in (
        *("data", "data sets of your own", "method", "fine-tuning", "schedule", "speed", "run"),
        "hyper-parameters of methods",
    ):
        groups[title] = parser.add_argument_group(title)
    for one in (*options_of(Settings).values(), *options_of(RunOptions).values()):
        if one.flag is not None:
            one.add_to(groups[one.group])
    of_methods = method_options()
    of_data_sets = {name: owners for name, owners in own_options().items() if name not in of_methods}
    add_owned(groups["data sets of your own"], of_data_sets)
    add_owned(groups["hyper-parameters of methods"], of_methods)
    add_plugin_option(groups["run"])


def markdown_table() -> str:
    """All flags as a Markdown table, for the documentation."""
    lines = ["| option | default | meaning | may change on resume |", "|---|---|---|---|"]
    for one in (*options_of(Settings).values(), *options_of(RunOptions).values()):
        lines += _row(one)
    for owners in own_options().values():
        lines += _row(owners[0][1], f" ({', '.join(method for method, _ in owners)})")
    return "\n".join(lines)


def _row(one: Option, note: str = "") -> list[str]:
    if one.flag is None:
        return []
    default = one.shown_default or ("" if one.has_default else "the recipe's")
    value = f" {one.metavar}".replace("|", "\\|") if one.metavar else ""
    other = f", `--no-{one.flag.removeprefix('--')}`" if one.is_both else ""
    return [f"| `{one.flag}{value}`{other} | {default} | {one.help_of()}{note} | {'yes' if one.changeable else ''} |"]


if __name__ == "__main__":
    print(markdown_table())
