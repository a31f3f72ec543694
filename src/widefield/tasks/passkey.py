"""Passkey retrieval: a five-digit key hidden at a depth of a long text, to be repeated at its end.

A prompt of `length` tokens is exactly

    PREFIX + haystack[:cut] + NEEDLE + haystack[cut:] + QUESTION

and the answer, which is not counted, follows. Depth 0 puts the needle directly after the prefix,
depth 1 directly before the question.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from widefield.errors import WidefieldError
from widefield.tasks.texts import Haystack
from widefield.tasks.tokens import BYTE_OFFSET, bos_ids, decode, encode, is_byte_level

__all__ = [
    "DIGITS",
    "NEEDLE",
    "PREFIX",
    "QUESTION",
    "PasskeyTask",
    "Sample",
    "byte_minimum_length",
    "byte_sample",
    "trial_rng",
]

PREFIX = (
    "There is an important pass key hidden inside a lot of irrelevant text. "
    "Find it and memorize it.\n"
)
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
DIGITS = 5
"""Digits of a key: 10000 to 99999."""

_PROBES = ("10000", "12345", "38271", "56789", "70707", "99999")
_ANSWER = re.compile(r"\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt and its answer.

    Attributes:
        ids: the prompt, int64, exactly `length` tokens.
        answer: the key as text, five digits.
        answer_ids: the key as tokens.
        depth: where the needle lies, 0 to 1.
        length: tokens of the prompt.
    """

    ids: Int[np.ndarray, " length"]
    answer: str
    answer_ids: tuple[int, ...]
    depth: float
    length: int


def trial_rng(seed: int, length: int, depth: float, trial: int) -> np.random.Generator:
    """The random source of one trial; which others are run, and in what order, changes nothing."""
    return np.random.default_rng([seed, length, round(depth * 1_000_000), trial])


class PasskeyTask:
    """Passkey prompts for one tokenizer and one haystack, and the judge of their answers.

    Args:
        tokenizer: any tokenizer of transformers.
        haystack: the text around the needle; repeated where it is too short.

    Raises:
        WidefieldError: if the haystack has no tokens.
    """

    name = "passkey"

    def __init__(self, tokenizer: Any, haystack: Haystack | str) -> None:
        text = haystack if isinstance(haystack, str) else haystack.text
        self.tokenizer = tokenizer
        self._filler = encode(tokenizer, text)
        if not len(self._filler):
            raise WidefieldError("the haystack is empty; give a text with --haystack FILE")
        self._prefix = np.concatenate([bos_ids(tokenizer), encode(tokenizer, PREFIX)])
        self._question = encode(tokenizer, QUESTION)

    @functools.cached_property
    def needle_length(self) -> int:
        """Tokens of the needle (of the longest tried, where keys differ in their tokens)."""
        return max(len(self._needle(key)) for key in _PROBES)

    @functools.cached_property
    def minimum_length(self) -> int:
        """Tokens of prefix, needle and question: no prompt can be shorter."""
        return len(self._prefix) + self.needle_length + len(self._question)

    @property
    def answer_tokens(self) -> int:
        """How many tokens to generate for a judgement, the same for every sample.

        Byte-level: the five digits. Else at most one token a digit, one for a leading space and one
        to see that the number ends.
        """
        return DIGITS if is_byte_level(self.tokenizer) else DIGITS + 2

    def check_length(self, length: int) -> None:
        """Raise `WidefieldError` if a prompt of this length cannot hold needle and question."""
        if length < self.minimum_length:
            raise _too_short(length, self.minimum_length, self.needle_length)

    def sample(self, length: int, depth: float, rng: np.random.Generator) -> Sample:
        """Make one prompt.

        Args:
            length: tokens of the prompt, at least `minimum_length`.
            depth: where the needle lies, 0 (directly after the prefix) to 1 (directly before the
                question).
            rng: draws the key, then the window of the haystack.

        Raises:
            WidefieldError: for a length that is too short or a depth outside 0 to 1.
        """
        self.check_length(length)
        key = _draw_key(rng)
        ids = _assemble(
            self._prefix, self._needle(key), self._question, self._filler, length, depth, rng
        )
        answer_ids = tuple(int(i) for i in encode(self.tokenizer, key))
        return Sample(ids, key, answer_ids, depth, length)

    def judge(self, sample: Sample, generated: Iterable[int]) -> bool:
        """Whether the first number of the generated text is the key, exactly.

        Args:
            sample: the prompt that was asked.
            generated: the new tokens, `answer_tokens` of them or fewer.
        """
        found = _ANSWER.match(decode(self.tokenizer, generated))
        return found is not None and found[1] == sample.answer

    def _needle(self, key: str) -> Int[np.ndarray, " tokens"]:
        return encode(self.tokenizer, NEEDLE.format(key=key))


def byte_minimum_length() -> int:
    """Bytes of prefix, needle and question."""
    return len(PREFIX) + len(NEEDLE.format(key="0" * DIGITS)) + len(QUESTION)


def byte_sample(
    haystack: UInt8[np.ndarray, " bytes"], length: int, depth: float, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " tokens"], Int[np.ndarray, " answer"]]:
    """A prompt with its answer behind it, for byte-level training; the prompts of `PasskeyTask`.

    Args:
        haystack: the text's bytes, uint8.
        length: bytes of the prompt, the answer not counted.
        depth: where the needle lies, 0 to 1.
        rng: draws the key, then the window of the haystack.

    Returns:
        ids (length + 5,), int64, byte + 3 as ByT5 has it, and the positions of the answer in them:
        the last five. Position p is predicted by the output at p - 1.

    Raises:
        WidefieldError: for a length that is too short, an empty haystack or a depth outside 0 to 1.
    """
    prefix, question = _ascii(PREFIX), _ascii(QUESTION)
    if length < byte_minimum_length():
        raise _too_short(length, byte_minimum_length(), len(NEEDLE.format(key="0" * DIGITS)))
    if not len(haystack):
        raise WidefieldError("the haystack is empty; give a text with at least one byte")
    key = _draw_key(rng)
    needle = _ascii(NEEDLE.format(key=key))
    prompt = _assemble(prefix, needle, question, haystack, length, depth, rng)
    ids = np.concatenate([prompt, _ascii(key)]).astype(np.int64) + BYTE_OFFSET
    return ids, np.arange(length, length + DIGITS)


def _assemble(
    prefix: np.ndarray,
    needle: np.ndarray,
    question: np.ndarray,
    filler: np.ndarray,
    length: int,
    depth: float,
    rng: np.random.Generator,
) -> np.ndarray:
    if not 0.0 <= depth <= 1.0:
        raise WidefieldError(f"depth {depth} is not between 0 (start) and 1 (end)")
    room = length - len(prefix) - len(needle) - len(question)
    if room < 0:
        raise _too_short(length, length - room, len(needle))
    window = _window(filler, room, int(rng.integers(len(filler))))
    cut = round(depth * room)
    return np.concatenate([prefix, window[:cut], needle, window[cut:], question])


def _window(filler: np.ndarray, size: int, start: int) -> np.ndarray:
    """`size` items from `start` on, going round at the end."""
    if start + size <= len(filler):
        return filler[start : start + size]
    return np.resize(np.roll(filler, -start), size)


def _draw_key(rng: np.random.Generator) -> str:
    return str(rng.integers(10 ** (DIGITS - 1), 10**DIGITS))


@functools.cache
def _ascii(text: str) -> UInt8[np.ndarray, " bytes"]:
    return np.frombuffer(text.encode("ascii"), dtype=np.uint8)


def _too_short(length: int, minimum: int, needle: int) -> WidefieldError:
    return WidefieldError(
        f"a prompt of {length} tokens is too short for the passkey task: prefix, needle and "
        f"question take {minimum} (the needle alone {needle}); ask for at least {minimum}"
    )
