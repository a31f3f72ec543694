"""Where Triton's kernels run in a test: on a GPU, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
on_triton = pytest.mark.triton
# The interpreter cuts off what a bfloat16 cannot hold instead of rounding it.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 63] if INTERPRETED else [1, 63, 1000, 65_537]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """‖value − truth‖ / ‖truth‖, computed in float64 where `truth` lies."""
    value, truth = value.detach().to(truth.device).double(), truth.detach()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))
