"""Kernels of a recorded decode step that start before the one in front of them has ended."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["early"]


def early(x: Tensor) -> dict[str, Any]:
    """Launch options for a kernel that may start before the one in front of it has ended.

    In a graph only: what it reads before it waits must not be the work of that kernel, and weights
    are nobody's work there.
    """
    recorded = x.is_cuda and torch.cuda.is_current_stream_capturing()
    capable = recorded and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if capable else {"EARLY": False}
