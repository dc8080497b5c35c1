"""Fixtures of the model tests."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _one_thread(_threads: None) -> Iterator[None]:
    """The maps here are so small that threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def published_state(golden: Callable[[str], Mapping]) -> Callable[[str], dict[str, Tensor]]:
    """``published_state("resnet8_moe")``: the recorded state_dict under the published names."""

    def load(name: str) -> dict[str, Tensor]:
        arrays = golden(name)
        keys = [key for key in arrays if key.startswith("state/")]
        return {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in keys}

    return load
