"""What the tests of the ops share: one thread, a folder for compiled kernels, poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """References are thousands of small operations, whose threads would only wait for each other.

    Tests of threads set their own number; what was set before is set again
    afterwards.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels are kept that were compiled for the CPU."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
