"""Bits per byte and per token of long texts by context length, as PG-19 is measured.

A window's end stands fixed; a context length says how many tokens up to that end the model reads.
The scored tokens, the last ones, are therefore the same at every length, and a method's cost there
is seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.methods.base import Method
from widefield.tasks.tokens import bos_ids, decode, encode, is_byte_level

__all__ = ["Windows", "byte_count", "protecting", "scored_tokens", "token_bits"]

_CHUNK = 1 << 24
"""Logits turned into probabilities at once (64 MB in float32)."""


@dataclass(frozen=True)
class Windows:
    """Windows of long texts, cut to the longest context length.

    Attributes:
        ids: one row a window, int64.
    """

    ids: Int[np.ndarray, "windows longest"]

    @classmethod
    def draw(
        cls, tokenizer: Any, texts: Sequence[str], longest: int, windows: int, seed: int
    ) -> Windows:
        """Draw windows, each from another text as long as there are enough of them.

        Args:
            tokenizer: any tokenizer of transformers.
            texts: at least one of `longest` tokens or more; shorter ones are passed over.
            longest: tokens of a window.
            windows: how many.
            seed: draws the order of the texts and where the windows end.

        Raises:
            WidefieldError: if no text is long enough.
        """
        rng = np.random.default_rng([seed, longest, windows])
        long_enough = []
        most = 0
        for index in rng.permutation(len(texts)):
            ids = encode(tokenizer, texts[int(index)])
            most = max(most, len(ids))
            if len(ids) >= longest:
                long_enough.append(ids)
            if len(long_enough) == windows:
                break
        if not long_enough:
            raise WidefieldError(
                f"no text has {longest} tokens (the longest of {len(texts)} has {most}): ask for "
                "shorter lengths, or join texts into longer files"
            )
        chosen = [long_enough[i % len(long_enough)] for i in range(windows)]
        ends = [int(rng.integers(longest, len(ids) + 1)) for ids in chosen]
        return cls(
            np.stack([ids[end - longest : end] for ids, end in zip(chosen, ends, strict=True)])
        )

    def at(self, length: int, tokenizer: Any) -> Int[np.ndarray, "windows length"]:
        """The last `length` tokens of every window, with the tokenizer's BOS as the first."""
        rows = self.ids[:, -length:].copy()
        bos = bos_ids(tokenizer)
        rows[:, : len(bos)] = bos
        return rows


def scored_tokens(length: int, last: int) -> int:
    """How many tokens of a window are scored: never the first, which nothing predicts."""
    return min(last, length - 1)


def token_bits(
    model: Any, ids: Int[Tensor, "batch length"], last: int
) -> Float[Tensor, "batch scored"]:
    """-log2 p of the last tokens of each row, float32; logits are made for these only.

    Args:
        model: any causal language model of transformers, on the device of `ids`.
        ids: rows without padding.
        last: how many tokens to score, at most length - 1.

    Raises:
        WidefieldError: if the model returns fewer rows (a method dropped scored tokens) or NaN.
    """
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=last + 1).logits
    if logits.shape[1] != last + 1:
        raise WidefieldError(
            f"the method keeps {logits.shape[1]} tokens where {last + 1} are needed: score fewer "
            "tokens, or let it keep and protect more (see protecting())"
        )
    targets = ids[:, -last:]
    step = max(1, _CHUNK // (logits.shape[0] * logits.shape[2]))
    chunks = [
        F.cross_entropy(
            logits[:, i : min(i + step, last)].float().transpose(1, 2),
            targets[:, i : i + step],
            reduction="none",
        )
        for i in range(0, last, step)
    ]
    bits = torch.cat(chunks, dim=1) / math.log(2)
    if not bool(torch.isfinite(bits).all()):
        raise WidefieldError("the model's probabilities are not finite; try float32")
    return bits


def byte_count(tokenizer: Any, ids: Int[np.ndarray, "windows scored"]) -> int:
    """UTF-8 bytes of the text behind some tokens."""
    if is_byte_level(tokenizer):
        return ids.size
    return sum(len(decode(tokenizer, row).encode()) for row in ids)


def protecting(methods: Sequence[Method], last: int) -> tuple[Method, ...]:
    """The same methods, those that drop tokens told to keep the scored ones.

    DeciMamba's `protect` becomes at least last + 1: the rows that predict the scored tokens, and
    the last one. Its `base_length`, times its shrink factors, must leave room for them.
    """
    return tuple(_protect(method, last + 1) for method in methods)


def _protect(method: Any, tokens: int) -> Any:
    if getattr(method, "protect", tokens) >= tokens:
        return method
    return dataclasses.replace(method, protect=tokens)
