"""Options are declared once: the parser, the checks and the table of the documentation agree."""

import re
import sys
from dataclasses import dataclass
from typing import Literal

import pytest

from shike_fast._util.cli import ArgumentParser
from shike_fast._util.options import at_least, at_most, option, options_of, positive
from shike_fast.engine.config import options_for, resolve
from shike_fast.engine.options import markdown_table, method_options
from shike_fast.engine.settings import Settings
from shike_fast.errors import ConfigError
from shike_fast.train import make_parser


@dataclass(kw_only=True)
class Example:
    rate: float = option(0.5, "a 100% rate", check=positive)
    count: int | None = option(None, "how many", flag="--number", default_text="all", check=(at_least(1), at_most(9)))
    kind: Literal["a", "b"] = option("a", lambda: "which")
    weights: tuple[float, ...] = option((1.0, 2.0), "of each")
    quiet: bool = option(False, "say nothing")
    check: bool = option(True, "check nothing", flag="--no-check")
    fast: bool = option(True, "quickly")
    maybe: bool | None = option(None, "perhaps")
    inner: int = option(3, flag=None)
    needed: str = option(help="something")
    plain: int = 7


def parse(*arguments):
    import argparse

    parser = ArgumentParser(prog="example", argument_default=argparse.SUPPRESS)
    for one in options_of(Example).values():
        one.add_to(parser)
    return parser, vars(parser.parse_args(arguments))


def test_a_command_line():
    line = "--rate 1 --number 3 --kind b --weights 1 2.5 --quiet --no-check --no-fast --maybe --needed x"
    assert parse(*line.split())[1] == {
        "rate": 1.0,
        "count": 3,
        "kind": "b",
        "weights": [1.0, 2.5],
        "quiet": True,
        "check": False,
        "fast": False,
        "maybe": True,
        "needed": "x",
    }
    assert parse()[1] == {}


def test_help_says_the_default():
    text = " ".join(parse()[0].format_help().split())
    assert "--rate RATE a 100% rate (default 0.5)" in text and "how many (default all)" in text
    assert "--kind a|b which (default a)" in text and "of each (default 1 2)" in text
    assert "inner" not in text and "plain" not in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", 0.0, "--rate: must be a positive number, got 0.0"),
        ("rate", "fast", "--rate: must be a number, got 'fast'"),
        ("count", 0, "--number: must be at least 1, got 0"),
        ("count", 10, "--number: must be at most 9, got 10"),
        ("count", True, "--number: must be a whole number, got True"),
        ("kind", "c", "--kind: must be one of a, b, got 'c'"),
        ("weights", 1.0, "--weights: must be a list, each value a number, got 1.0"),
        ("weights", [1, "x"], "--weights: must be a number, got 'x'"),
        ("check", 1, "--check: must be true or false, got 1"),
        ("inner", None, "inner: must be a whole number, got None"),
    ],
)
def test_values_that_are_refused(name, value, message):
    with pytest.raises(ConfigError) as caught:
        options_of(Example)[name].check(value)
    assert str(caught.value) == message


def test_values_that_are_taken():
    options = options_of(Example)
    assert options["weights"].check([1, 2]) == (1.0, 2.0)
    assert options["count"].check(None) is None
    assert type(options["rate"].check(3)) is float


def test_a_type_that_no_option_has():
    @dataclass
    class Wrong:
        where: bytes = option(b"")

    with pytest.raises(TypeError, match="option where: its type must be bool, int, float, str, Literal or a tuple"):
        options_of(Wrong)


def test_every_flag_is_in_the_table():
    flags = {flag for action in make_parser()._actions for flag in action.option_strings} - {"-h", "--help", "--plugin"}
    found = re.findall(r"`(--[a-z0-9-]+)", "\n".join(line.partition(" |")[0] for line in markdown_table().splitlines()))
    assert sorted(found) == sorted(flags)


def test_every_setting_is_declared_once_and_has_a_value():
    names = [*options_of(Settings), *method_options()]
    assert len(set(names)) == len(names)
    config = resolve({})
    for name, one in options_for(config.method).items():
        assert one.check(getattr(config, name)) == getattr(config, name)


def test_the_table_as_a_command(programs):
    done = programs.run([sys.executable, "-m", "shike_fast.engine.options"])
    assert done.returncode == 0 and done.stdout == markdown_table() + "\n"
