from pathlib import Path

import pytest
from programs import Programs
from runs import SMALL, Runs

from shike_fast.train import main


@pytest.fixture
def runs(tmp_path: Path, programs: Programs) -> Runs:
    return Runs(tmp_path, programs)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small run; tests only read it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert main([*SMALL, "--output-dir", str(directory)]) == 0
    return directory
