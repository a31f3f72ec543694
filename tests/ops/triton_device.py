"""Where Triton's kernels run in a test: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

Test = TypeVar("Test", bound=Callable[..., None])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
_MARKS = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
    ),
]
# The interpreter cuts off what a bfloat16 cannot hold instead of rounding it.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 63] if INTERPRETED else [1, 63, 1000, 65_537]


def on_triton(test: Test) -> Test:
    """A test of a Triton kernel; without an interpreter it is one of a GPU."""
    for mark in _MARKS if INTERPRETED else [pytest.mark.gpu, *_MARKS]:
        test = mark(test)
    return test


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, computed in float64 where `truth` lies."""
    value, truth = value.detach().to(truth.device).double(), truth.detach()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))
