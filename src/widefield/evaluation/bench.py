"""What `tune` measures one setting with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from widefield.evaluation.batches import Budget, Stopwatch, run_batches
from widefield.evaluation.header import Subject
from widefield.evaluation.runner import ask, measure_bits
from widefield.extension import extended
from widefield.methods.base import Method
from widefield.plan import ModelLayout
from widefield.tasks.passkey import PasskeyTask, trial_rng
from widefield.tasks.perplexity import Windows

__all__ = ["Bench"]


@dataclass
class Bench:
    """Measures one setting: its cost on texts, and which keys it retrieves."""

    model: Any
    task: PasskeyTask
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    windows: Windows
    last: int
    seed: int
    tokens: int
    layout: ModelLayout

    def bits(self, methods: tuple[Method, ...]) -> dict[int, float]:
        """Bits per byte at every length."""
        subject = Subject("tune", self.model, self.task.tokenizer, methods)
        cells = {
            length: measure_bits(subject, self.windows, length, self.last, self.tokens).bits
            for length in self.lengths
        }
        return {length: bits or 0.0 for length, bits in cells.items()}

    def rounds(self, methods: tuple[Method, ...], numbers: range) -> Iterator[list[bool]]:
        """The answers to the prompts of these numbers, one round of depths after the other."""
        for start in range(0, len(numbers), len(self.depths)):
            part = numbers[start : start + len(self.depths)]
            with extended(self.model, *methods), torch.inference_mode():
                answers = [right for length in self.lengths for right in self._ask(length, part)]
            yield answers

    def _ask(self, length: int, numbers: Sequence[int]) -> list[bool]:
        budget, timer = Budget(self.tokens), Stopwatch(self.model.device)
        return [
            right for _, right, _ in run_batches(numbers, length, budget, self._run(length), timer)
        ]

    def _run(self, length: int) -> Callable[[Sequence[int]], list[bool]]:
        def run(batch: Sequence[int]) -> list[bool]:
            samples = []
            for number in batch:
                depth = self.depths[number % len(self.depths)]
                rng = trial_rng(self.seed, length, depth, number // len(self.depths))
                samples.append(self.task.sample(length, depth, rng))
            return ask(self.model, self.task, samples)

        return run
