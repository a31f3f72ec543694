"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from widefield import decoding, recording


class Rerun:
    """Runs what was recorded again instead of replaying it, in the same tensors."""

    def __init__(self, run: Callable[[], Any]) -> None:
        result = run()
        self.run, self.result = run, result.clone() if isinstance(result, Tensor) else result

    def replay(self) -> None:
        new = self.run()
        for ours, theirs in zip(_tensors(self.result), _tensors(new), strict=True):
            if ours is not theirs:
                ours.copy_(theirs)


def _tensors(result: Any) -> list[Tensor]:
    """Of the logits of a step, or of the output of a chunk."""
    if isinstance(result, Tensor):
        return [result]
    cache = result.get("cache_params") or result.get("past_key_values")
    return [result.logits, *decoding.states_of(cache)]


def rerun_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on what a model on the CPU does is "recorded", too."""

    def record(run: Callable[[], Any], *rest: Any) -> tuple[Any, Any]:
        graph = Rerun(run)
        return graph, graph.result

    for module in (decoding, recording):
        monkeypatch.setattr(module, "record", record)
    monkeypatch.setattr(decoding, "_GPU", "cpu")
