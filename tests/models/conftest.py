"""Fixtures of the model tests."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The maps here are small."""
