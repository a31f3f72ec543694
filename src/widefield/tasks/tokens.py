"""Text to token ids, without special tokens, for any tokenizer of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

__all__ = ["BYTE_OFFSET", "bos_ids", "decode", "encode", "is_byte_level"]

BYTE_OFFSET = 3
"""ByT5's ids: byte + 3, after pad (0), end of sequence (1) and unknown (2)."""


def is_byte_level(tokenizer: Any) -> bool:
    """Whether one token is one byte (transformers' ByT5Tokenizer)."""
    return any(base.__name__ == "ByT5Tokenizer" for base in type(tokenizer).__mro__)


def encode(tokenizer: Any, text: str) -> Int[np.ndarray, " tokens"]:
    """The ids of a text, int64, with no special token among them.

    Args:
        tokenizer: any tokenizer of transformers; ByT5's is bypassed, since its own loop over
            characters is slow and reads markers such as "</s>" in the text as special tokens.
        text: any text; for byte-level tokenizers its UTF-8 bytes count.
    """
    if is_byte_level(tokenizer):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + BYTE_OFFSET
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = np.asarray(ids, dtype=np.int64)
    return ids[~np.isin(ids, np.asarray(tokenizer.all_special_ids, dtype=np.int64))]


def decode(tokenizer: Any, ids: Any) -> str:
    """The text of some ids; special tokens are left out, nothing is tidied up."""
    return tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def bos_ids(tokenizer: Any) -> Int[np.ndarray, " tokens"]:
    """The id that the tokenizer puts before every text: one begin-of-sequence id, or none."""
    bos = tokenizer.bos_token_id
    wanted = bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos]
    return np.asarray([bos] if wanted else [], dtype=np.int64)
