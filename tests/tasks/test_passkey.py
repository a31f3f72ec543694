"""The passkey task: exact lengths, depths, the same samples for everybody, and the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from widefield.errors import WidefieldError
from widefield.tasks.passkey import (
    NEEDLE,
    PREFIX,
    QUESTION,
    PasskeyTask,
    byte_minimum_length,
    byte_sample,
    trial_rng,
)
from widefield.tasks.tokens import BYTE_OFFSET, decode

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def task() -> PasskeyTask:
    return PasskeyTask(ByT5Tokenizer(), TEXT)


class WordTokenizer:
    """One token for two characters, and a begin-of-sequence id, as tokenizers of subwords have."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, 2
    all_special_ids = (1, 2)

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        ids = [3 + ord(pair[0]) * 256 + (ord(pair[1]) if len(pair) > 1 else 0) for pair in pairs]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        pairs = [divmod(i - 3, 256) for i in ids if i not in self.all_special_ids]
        return "".join(chr(a) + (chr(b) if b else "") for a, b in pairs)


def sample_text(task: PasskeyTask, length: int, depth: float, trial: int = 0) -> tuple[str, str]:
    sample = task.sample(length, depth, trial_rng(7, length, depth, trial))
    return decode(task.tokenizer, sample.ids), sample.answer


@given(length=st.integers(195, 4000), depth=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_a_prompt_has_exactly_the_length_asked_for(length: int, depth: float, seed: int) -> None:
    task = PasskeyTask(ByT5Tokenizer(), TEXT)
    sample = task.sample(length, depth, np.random.default_rng(seed))
    assert len(sample.ids) == sample.length == length
    assert len(sample.answer) == 5 and 10000 <= int(sample.answer) <= 99999


def test_depth_zero_puts_the_needle_behind_the_prefix(task: PasskeyTask) -> None:
    text, key = sample_text(task, 600, 0.0)
    assert text.startswith(PREFIX + NEEDLE.format(key=key)) and text.endswith(QUESTION)


def test_depth_one_puts_the_needle_before_the_question(task: PasskeyTask) -> None:
    text, key = sample_text(task, 600, 1.0)
    assert text.startswith(PREFIX) and text.endswith(NEEDLE.format(key=key) + QUESTION)


def test_depth_a_half_puts_the_needle_in_the_middle(task: PasskeyTask) -> None:
    text, key = sample_text(task, 1000, 0.5)
    before = text.index(NEEDLE.format(key=key)) - len(PREFIX)
    after = 1000 - len(PREFIX) - before - len(NEEDLE.format(key=key)) - len(QUESTION)
    assert abs(before - after) <= 1


def test_a_prompt_of_the_minimum_length_holds_only_needle_and_question(task: PasskeyTask) -> None:
    assert task.minimum_length == byte_minimum_length() == 195
    text, key = sample_text(task, task.minimum_length, 0.3)
    assert text == PREFIX + NEEDLE.format(key=key) + QUESTION


def test_a_shorter_prompt_is_refused_with_the_sizes(task: PasskeyTask) -> None:
    with pytest.raises(
        WidefieldError, match=r"prompt of 194 .* take 195 .*needle alone 60"
    ) as caught:
        task.sample(194, 0.5, np.random.default_rng(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [-0.1, 1.1, float("nan")])
def test_a_depth_outside_the_text_is_refused(task: PasskeyTask, depth: float) -> None:
    with pytest.raises(WidefieldError, match="depth"):
        task.sample(300, depth, np.random.default_rng(0))


def test_an_empty_haystack_is_refused() -> None:
    with pytest.raises(WidefieldError, match="empty"):
        PasskeyTask(ByT5Tokenizer(), "")


def test_a_short_haystack_is_repeated(task: PasskeyTask) -> None:
    short = PasskeyTask(ByT5Tokenizer(), "abc")
    text, key = sample_text(short, 700, 1.0)
    filler = text.removeprefix(PREFIX).removesuffix(NEEDLE.format(key=key) + QUESTION)
    assert len(filler) == 505 and filler in "abc" * 200


def test_the_window_goes_round_at_the_end_of_the_haystack() -> None:
    letters = "".join(chr(c) for c in range(ord("A"), ord("z") + 1))
    task = PasskeyTask(ByT5Tokenizer(), letters)
    fillers = []
    for trial in range(20):
        text, key = sample_text(task, 195 + 40, 1.0, trial)
        fillers.append(text.removeprefix(PREFIX).removesuffix(NEEDLE.format(key=key) + QUESTION))
    assert all(filler in letters * 2 for filler in fillers)
    assert any(filler not in letters for filler in fillers)


def test_the_same_trial_is_the_same_sample_whatever_was_drawn_before(task: PasskeyTask) -> None:
    first = task.sample(500, 0.25, trial_rng(3, 500, 0.25, 2))
    task.sample(900, 0.75, trial_rng(3, 900, 0.75, 0))
    again = task.sample(500, 0.25, trial_rng(3, 500, 0.25, 2))
    assert first.answer == again.answer and (first.ids == again.ids).all()


@pytest.mark.parametrize("change", [(4, 500, 0.25, 2), (3, 500, 0.5, 2), (3, 500, 0.25, 1)])
def test_another_seed_depth_or_trial_is_another_sample(
    task: PasskeyTask, change: tuple[int, int, float, int]
) -> None:
    first = task.sample(500, 0.25, trial_rng(3, 500, 0.25, 2))
    other = task.sample(500, change[2], trial_rng(*change))
    assert first.answer != other.answer


@given(length=st.integers(195, 2000), depth=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_the_fast_builder_makes_the_same_prompts(length: int, depth: float, seed: int) -> None:
    data = np.frombuffer(TEXT.encode(), dtype=np.uint8)
    ids, answer = byte_sample(data, length, depth, np.random.default_rng(seed))
    sample = PasskeyTask(ByT5Tokenizer(), TEXT).sample(length, depth, np.random.default_rng(seed))
    assert (ids[:length] == sample.ids).all()
    assert tuple(ids[answer]) == sample.answer_ids
    assert bytes((ids[answer] - BYTE_OFFSET).astype(np.uint8)).decode() == sample.answer


def test_the_fast_builder_refuses_what_the_task_refuses() -> None:
    data = np.frombuffer(TEXT.encode(), dtype=np.uint8)
    with pytest.raises(WidefieldError, match="too short"):
        byte_sample(data, 194, 0.5, np.random.default_rng(0))
    with pytest.raises(WidefieldError, match="empty"):
        byte_sample(data[:0], 300, 0.5, np.random.default_rng(0))


def test_a_tokenizer_with_a_bos_gets_it_first_and_counted() -> None:
    task = PasskeyTask(WordTokenizer(), TEXT)
    sample = task.sample(300, 0.5, np.random.default_rng(1))
    assert len(sample.ids) == 300 and sample.ids[0] == 1 and 1 not in sample.ids[1:]
    text = decode(task.tokenizer, sample.ids)
    assert text.startswith(PREFIX) and NEEDLE.format(key=sample.answer) in text
    assert text.endswith(QUESTION)


def test_markers_in_the_haystack_are_text_and_not_special_tokens() -> None:
    task = PasskeyTask(ByT5Tokenizer(), "a</s><extra_id_3>b<pad>")
    sample = task.sample(400, 0.5, np.random.default_rng(1))
    assert sample.ids.min() >= BYTE_OFFSET and sample.ids.max() < 256 + BYTE_OFFSET


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("{key}", True),
        (" {key}", True),
        ("{key}. Remember", True),
        ("{key}7", False),
        ("the {key}", False),
        ("1{key}", False),
        ("", False),
    ],
)
def test_the_judge_wants_the_first_number_exactly(
    task: PasskeyTask, said: str, right: bool
) -> None:
    sample = task.sample(300, 0.5, np.random.default_rng(1))
    answer = [byte + BYTE_OFFSET for byte in said.format(key=sample.answer).encode()]
    assert task.judge(sample, answer) is right


def test_a_byte_level_answer_takes_five_tokens(task: PasskeyTask) -> None:
    assert task.answer_tokens == 5
    assert PasskeyTask(WordTokenizer(), TEXT).answer_tokens == 7
