"""What every test gets: checked shapes, a fixed seed, no network, no display."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

# Before the first import of the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import shapes


class KernelsUnchecked(importlib.abc.MetaPathFinder):
    """Keeps the checks away from kernel modules: numba and Triton compile the bare function."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package.startswith("widefield.ops") and name in {"cpu", "cuda", "_numba", "_triton"}:
            return importlib.machinery.PathFinder.find_spec(fullname, path, target)
        return None


jaxtyping.install_import_hook("widefield", f"{shapes.__name__}.check")
sys.meta_path.insert(0, KernelsUnchecked())

# A runner in the background ignores Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Examples are the same on every machine and every run; compiling a kernel may take its time.
settings.register_profile(
    "widefield",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("widefield")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        for name, skip in skips.items():
            if name in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
