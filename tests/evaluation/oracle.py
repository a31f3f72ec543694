"""A stand-in for a model that retrieves: it reads the key from the prompt if a rule lets it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import ByT5Tokenizer

from tests.models import tiny_mamba

Rule = Callable[[int, Any], bool]
"""(length of the prompt, model) → whether the key is found."""


def oracle(rule: Rule, seen: list[torch.Tensor] | None = None) -> Any:
    """A tiny Mamba whose `generate` answers by a rule; its forward is its own.

    Args:
        rule: whether a prompt is answered rightly.
        seen: every batch of prompts is appended to it.
    """
    model: Any = tiny_mamba()

    def generate(ids: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        if seen is not None:
            seen.append(ids.clone())
        answers = torch.stack([answer(row, rule(ids.shape[1], model)) for row in ids])
        logits = (torch.zeros(len(ids), 384),) * answers.shape[1]
        return SimpleNamespace(sequences=torch.cat([ids, answers], dim=1), logits=logits)

    model.generate = generate
    return model


def answer(row: torch.Tensor, right: bool) -> torch.Tensor:
    text = str(ByT5Tokenizer().decode(row))
    found = re.search(r"The pass key is (\d{5})\.", text)
    assert found is not None, "the prompt holds no needle"
    said = found[1] if right else "00000"
    return torch.tensor([3 + byte for byte in said.encode()])
