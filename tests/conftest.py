"""What every test gets: checked shapes, a fixed seed, no network, no display."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
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

KERNELS = {"cpu", "cuda", "_numba", "_triton", "_gradients"}


class KernelsUnchecked(importlib.abc.MetaPathFinder):
    """Keeps the checks away from kernel modules: numba and Triton compile the bare function."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package.startswith("widefield.ops") and name in KERNELS:
            return importlib.machinery.PathFinder.find_spec(fullname, path, target)
        return None


# Triton reads it when a kernel is defined, so a process has either the interpreter or the GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

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


def _why_skipped(item: pytest.Item, slow: bool) -> str | None:
    """What this run lacks that the test's markers ask for."""
    on_gpu = torch.cuda.is_available() and not INTERPRETED
    if "slow" in item.keywords and not slow:
        return "slow; run with --slow"
    if "triton" in item.keywords:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        return None if on_gpu or INTERPRETED else "no CUDA device; `make interpreted` runs it"
    return "no CUDA device" if "gpu" in item.keywords and not on_gpu else None


# Before pytest selects by -m: what Triton's interpreter can run is a test of the GPU, too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED and importlib.util.find_spec("triton") is None:
        raise pytest.UsageError("TRITON_INTERPRET=1 needs Triton: pip install triton")
    for item in items:
        if "triton" in item.keywords:
            item.add_marker("gpu")
        if reason := _why_skipped(item, config.getoption("--slow")):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)
