"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from widefield import decoding


class Rerun:
    """Runs a step again instead of replaying it."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.step, self.logits = step, step().clone()

    def replay(self) -> None:
        self.logits.copy_(self.step())


def rerun_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the steps of a model on the CPU are "recorded", too."""

    def record(graph: Any, model: nn.Module) -> None:
        graph._graph = Rerun(lambda: graph._forward(model))
        graph._logits = graph._graph.logits

    monkeypatch.setattr(decoding.StepGraph, "_record", record)
    monkeypatch.setattr(decoding, "_GPU", "cpu")
