"""``--config``: settings from a file. A run's own ``config.json`` is one."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shike_fast._util.options import Option, options_of
from shike_fast._util.plugins import missing_plugins
from shike_fast.engine.config import options_for
from shike_fast.engine.options import own_options
from shike_fast.engine.settings import NO_WEIGHTS, RunOptions, Settings
from shike_fast.errors import ConfigError
from shike_fast.methods import list_methods

_YAML_KINDS = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}


def settings_from(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, overridden by those that the command line names.

    Settings of other methods and data sets than those that result are left out, so that a file serves several. Keys are
    the names of ``config.json`` or those of the flags.

    Args:
        path: ends with .json, .toml, .yaml or .yml; this says what it is.
        given: settings and run options of the command line.

    Raises:
        ConfigError: naming the file, and the key if one is to blame.
    """
    known = known_settings()
    try:
        values = named_settings(_read(path))
    except UnknownSettingError as error:
        raise ConfigError(f"--config: {path}: {error}") from error
    missing = missing_plugins(values.pop("plugins", ()))
    if missing:
        raise ConfigError(f"--config: {path} was written with {missing}; add that")
    method = given.get("method", values.get("method", known["method"].default))
    dataset = given.get("dataset", values.get("dataset", known["dataset"].default))
    wanted = options_for(method, dataset) if method in list_methods() else known
    checked = {name: _checked(path, wanted[name], value) for name, value in values.items() if name in wanted}
    return {name: value for name, value in checked.items() if value is not None} | given


class UnknownSettingError(ConfigError):
    """A name that is no setting, or that is given twice."""


def known_settings() -> dict[str, Option]:
    """Every setting of a run by any method, by name."""
    return options_of(Settings) | {name: owners[0][1] for name, owners in own_options().items()}


def named_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by their names in ``config.json``; ``given`` may call them as the flags do.

    Raises:
        UnknownSettingError: for what is none, or stands there twice.
    """
    values: dict[str, Any] = {}
    known = known_settings()
    names = {(one.flag or "").removeprefix("--").replace("-", "_"): name for name, one in known.items()}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        name = name if name in known else names.get(name, name)
        if name not in known:
            raise UnknownSettingError(_unknown(str(key), known))
        if name in values:
            raise UnknownSettingError(f"names {name} twice")
        values[name] = value
    return values


def _unknown(key: str, known: dict[str, Option]) -> str:
    if key.replace("-", "_") in options_of(RunOptions):
        return f"{key} is no setting of a run; name it on the command line"
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown setting '{key}'" + (f"; did you mean {close[0]}?" if close else "")


def _checked(path: Path, option: Option, value: Any) -> Any:
    if value is None and option.name == "pretrained":
        return NO_WEIGHTS  # a run that began at random, whatever the recipe
    if value is None and option.has_default:
        return None  # as if it were not there
    try:
        return option.check(value)
    except ConfigError as error:
        raise ConfigError(f"--config: {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[str], Any]] = {
        ".json": json.loads,
        ".toml": tomllib.loads,
        ".yaml": _yaml,
        ".yml": _yaml,
    }
    if path.suffix not in readers:
        raise ConfigError(f"--config: {path} must end with {', '.join(readers)}, which says how to read it")
    try:
        content = readers[path.suffix](path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config: {path} cannot be read: {error.strerror}") from error
    except ModuleNotFoundError as error:
        raise ConfigError(f"--config: {path} needs PyYAML; pip install pyyaml, or write the file as .toml") from error
    except ValueError as error:  # of all three, and of text that is not UTF-8
        raise ConfigError(f"--config: {path} is no {path.suffix[1:]} file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold settings by name, got {type(content).__name__}")
    return content


def _yaml(text: str) -> Any:
    """Read YAML 1.2, in which ``off`` is a text and ``1e-3`` a number; PyYAML reads 1.1, in which they are not."""
    yaml = importlib.import_module("yaml")
    loader: Any = type("Loader", (yaml.SafeLoader,), {"yaml_implicit_resolvers": {}})
    for kind, pattern in _YAML_KINDS.items():
        loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(rf"(?:{pattern})\Z"), None)
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
