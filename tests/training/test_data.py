from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from widefield.errors import WidefieldError
from widefield.tasks.passkey import NEEDLE, QUESTION
from widefield.tasks.tokens import BYTE_OFFSET
from widefield.training.data import Corpus, load_corpus, make_batch, prefetch

TEXT = np.frombuffer(b"The quick brown fox jumps over the lazy dog. " * 40, dtype=np.uint8)
CORPUS = Corpus(TEXT, ("fox.txt",), "0" * 64)


def as_text(ids: np.ndarray) -> str:
    return bytes((ids - BYTE_OFFSET).astype(np.uint8)).decode()


def test_passkey_rows_end_in_their_key_and_the_rest_is_plain() -> None:
    batch = make_batch(CORPUS, 300, 6, 0.5, np.random.default_rng(0))
    assert batch.passkeys == 3
    for row in batch.ids[:3]:
        text = as_text(row)
        key = text[-5:]
        assert key.isdigit()
        assert NEEDLE.format(key=key) in text
        assert text[:-5].endswith(QUESTION)
    for row in batch.ids[3:]:
        assert as_text(row) in bytes(TEXT).decode()


def test_the_same_seed_makes_the_same_batch() -> None:
    one, two = (make_batch(CORPUS, 300, 4, 0.5, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one.ids, two.ids)


def test_a_corpus_that_is_too_short_says_so() -> None:
    with pytest.raises(WidefieldError, match="the corpus has 9 bytes"):
        make_batch(Corpus(TEXT[:9], ("fox.txt",), ""), 300, 4, 0.5, np.random.default_rng(0))


def test_a_corpus_is_read_in_order_and_hashed(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    corpus = load_corpus([tmp_path])
    assert bytes(corpus.text) == b"a.txtb.txt"
    assert corpus.files == (f"{tmp_path.name}/a.txt", f"{tmp_path.name}/b.txt")
    assert corpus.sha256 == load_corpus([tmp_path / "a.txt", tmp_path / "b.txt"]).sha256


def test_a_missing_or_empty_corpus_says_so(tmp_path: Path) -> None:
    with pytest.raises(WidefieldError, match="does not exist"):
        load_corpus([tmp_path / "none"])
    with pytest.raises(WidefieldError, match=r"holds no \.txt"):
        load_corpus([tmp_path])


def test_an_error_in_the_thread_reaches_the_reader() -> None:
    def fail():
        raise WidefieldError("no more")

    with pytest.raises(WidefieldError, match="no more"):
        next(prefetch(fail))


def test_unwrapping_joins_the_lines_of_a_paragraph_and_leaves_the_paragraphs() -> None:
    wrapped = b"\none\ntwo\n\nthree\n\n\nfour\nfive\n"
    corpus = Corpus(np.frombuffer(wrapped, dtype=np.uint8), ("a.txt",), "")
    assert bytes(corpus.unwrapped) == b" one two\n\nthree\n\n\nfour five "
    assert bytes(corpus.text) == wrapped


def test_the_unwrapped_share_of_the_sequences_has_no_line_breaks() -> None:
    lines = np.frombuffer(b"The quick brown fox\njumps over the lazy dog.\n" * 40, dtype=np.uint8)
    corpus = Corpus(lines, ("fox.txt",), "")
    ids = make_batch(corpus, 100, 400, 0.0, np.random.default_rng(0), 0.25).ids
    without = np.mean([b"\n" not in as_text(row).encode() for row in ids])
    assert 0.17 < without < 0.33
