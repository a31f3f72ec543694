"""Bits per byte: the loss that transformers computes, on the same tokens at every length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import ByT5Tokenizer

from tests.models import tiny_mamba
from widefield.errors import WidefieldError
from widefield.plan import LayerPlan, ModelLayout
from widefield.tasks import perplexity
from widefield.tasks.perplexity import Windows, byte_count, protecting, scored_tokens, token_bits

TEXT = "".join(f"Sentence {i} says nothing that matters much. " for i in range(300))


class Filtering:
    """A method that drops nothing."""

    name: ClassVar[str] = "filtering"

    def validate(self, layout: ModelLayout) -> None:
        pass

    def plan(self, layer: int, lengths: Any) -> LayerPlan:
        return LayerPlan()

    def describe(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Dropping(Filtering):
    protect: int = 1


def test_bits_equal_the_loss_of_transformers() -> None:
    model = tiny_mamba()
    windows = Windows.draw(ByT5Tokenizer(), [TEXT], 120, 3, seed=1)
    ids = torch.from_numpy(windows.ids)
    with torch.no_grad():
        bits = token_bits(model, ids, 119)
        loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(bits.mean(), loss / torch.log(torch.tensor(2.0)))


def test_bits_in_chunks_are_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mamba()
    ids = torch.randint(3, 259, (2, 50))
    with torch.no_grad():
        whole = token_bits(model, ids, 33)
        monkeypatch.setattr(perplexity, "_CHUNK", 2 * 384 * 5)
        torch.testing.assert_close(token_bits(model, ids, 33), whole)


def test_probabilities_that_are_not_finite_are_an_error() -> None:
    model = tiny_mamba()
    model.backbone.norm_f.weight.data.fill_(float("nan"))
    with pytest.raises(WidefieldError, match="not finite"), torch.no_grad():
        token_bits(model, torch.randint(3, 259, (1, 20)), 5)


def test_the_scored_tokens_are_the_same_at_every_length() -> None:
    windows = Windows.draw(ByT5Tokenizer(), [TEXT, TEXT[::-1]], 400, 2, seed=0)
    short, long = windows.at(64, ByT5Tokenizer()), windows.at(400, ByT5Tokenizer())
    assert (short[:, -32:] == long[:, -32:]).all() and short.shape == (2, 64)


def test_texts_that_are_too_short_are_named() -> None:
    with pytest.raises(WidefieldError, match=r"no text has 400 tokens .*has 14"):
        Windows.draw(ByT5Tokenizer(), ["too short", "also too short"], 400, 1, 0)


def test_windows_come_from_different_texts_while_there_are_enough() -> None:
    texts = [letter * 50 for letter in "abcd"]
    windows = Windows.draw(ByT5Tokenizer(), [*texts, "short"], 20, 4, seed=0)
    assert len({int(row[0]) for row in windows.ids}) == 4
    assert Windows.draw(ByT5Tokenizer(), texts[:1], 20, 4, seed=0).ids.shape == (4, 20)


def test_the_first_token_is_never_scored() -> None:
    assert scored_tokens(100, 2048) == 99 and scored_tokens(4096, 2048) == 2048


def test_bytes_are_counted_by_the_text_behind_the_tokens() -> None:
    tokenizer: Any = ByT5Tokenizer()
    assert byte_count(tokenizer, np.full((2, 7), 100)) == 14


def test_methods_that_drop_tokens_are_told_to_keep_the_scored_ones() -> None:
    filtering = Filtering()
    few, many, unchanged = protecting([Dropping(1), Dropping(900), filtering], 20)
    assert few == Dropping(21) and many == Dropping(900) and unchanged is filtering
