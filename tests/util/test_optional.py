"""Libraries that single options need."""

import sys

import pytest

from shike_fast._util.optional import optional_library
from shike_fast.errors import ConfigError, DataError


def test_an_installed_library_is_imported():
    assert optional_library("json.decoder", "this").JSONDecoder


@pytest.mark.parametrize("module", ["no_such_library", "no_such_library.part"])
def test_a_missing_one_is_named_with_what_helps(module):
    with pytest.raises(ConfigError, match=r"^--this needs it: pip install it, or that$"):
        optional_library(module, "--this", package="it", otherwise=", or that")
    with pytest.raises(DataError, match=rf"^--this needs {module}: pip install {module}$"):
        optional_library(module, "--this", error=DataError)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_part", "No module named 'no_such_part'"),
        ("raise ImportError('built for another')", "built for another"),
        ("raise RuntimeError('operator nms does not exist')", "operator nms does not exist"),
    ],
)
def test_one_that_cannot_be_imported_says_why(tmp_path, monkeypatch, code, reason):
    (tmp_path / "broken_library.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"^--this needs broken_library, which cannot be imported \({reason}\)$"):
        optional_library("broken_library", "--this")
    assert "broken_library" not in sys.modules
