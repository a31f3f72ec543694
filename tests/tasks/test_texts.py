"""Haystacks: the one that every machine has, and the user's files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from widefield.errors import WidefieldError
from widefield.tasks.texts import default_haystack, load_haystack, load_texts


def test_the_default_haystack_is_long_plain_text_and_always_the_same() -> None:
    haystack = default_haystack()
    assert haystack.text.isascii() and len(haystack.text) > 100_000
    assert haystack.sha256 == default_haystack().sha256
    assert "pass key" not in haystack.text


def test_a_python_without_topics_asks_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(WidefieldError, match="--haystack FILE"):
        default_haystack()


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("not text to us")
    assert load_texts(tmp_path) == ["first", "second"]
    haystack = load_haystack(tmp_path)
    assert haystack.text == "first\n\nsecond" and haystack.name == tmp_path.name


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n ", "is empty"), (b"\xff\xfe", "not UTF-8"), (b"a\0b", "not text")],
)
def test_a_file_that_holds_no_text_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    with pytest.raises(WidefieldError, match=message):
        load_haystack(path)


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WidefieldError, match="no such file or folder"):
        load_haystack(tmp_path / "nothing.txt")
    with pytest.raises(WidefieldError, match=r"no \.txt file"):
        load_haystack(tmp_path)
