import sys
from pathlib import Path

import pytest
from programs import Programs
from runs import Runs

from shike_fast import models
from shike_fast.data import registry as datasets
from shike_fast.methods import registry


@pytest.fixture
def runs(tmp_path: Path, programs: Programs) -> Runs:
    return Runs(tmp_path, programs)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of the user's own modules; what they register is forgotten after the test."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(datasets, "_REGISTRY", dict(datasets._REGISTRY))
    monkeypatch.setattr(models.registry, "_BUILDERS", dict(models.registry._BUILDERS))
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
