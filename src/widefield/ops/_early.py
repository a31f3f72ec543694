"""Kernels of a decode step that start before the one in front of them has ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = ["early", "overlapping"]

_overlapping: ContextVar[bool] = ContextVar("widefield_overlapping", default=False)


@contextmanager
def overlapping() -> Iterator[None]:
    """Let the kernels of a decode step read their weights while the one before them still runs.

    For a block of code in which nobody writes weights.
    """
    token = _overlapping.set(True)
    try:
        yield
    finally:
        _overlapping.reset(token)


def early(x: Tensor) -> dict[str, Any]:
    """Options of a launch on the device of `x`: whether its kernel may start early."""
    capable = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    if capable and _overlapping.get():
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}
