"""The texts that tasks are made of: one that every machine has, or the user's own files."""

from __future__ import annotations

import hashlib
import textwrap
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from widefield.errors import WidefieldError

__all__ = ["Haystack", "default_haystack", "load_haystack", "load_texts"]

_PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")


@dataclass(frozen=True)
class Haystack:
    """A text to hide things in.

    Attributes:
        name: what people know it by, e.g. a file name.
        text: never empty.
    """

    name: str
    text: str

    @cached_property
    def sha256(self) -> str:
        """Hash of the text's UTF-8 bytes, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def default_haystack() -> Haystack:
    """The prose of the Python standard library's documentation topics in plain ASCII, about 170 kB.

    Code, grammars and tables are left out: only paragraphs that read as English are kept. The text
    differs between versions of Python, which is why results carry its hash.

    Raises:
        WidefieldError: if this Python was installed without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise WidefieldError(
            "this Python has no documentation topics (pydoc_data) to hide a key in; "
            "give a text of your own with --haystack FILE"
        ) from error
    text = _to_ascii("\n\n".join(topics[name].strip() for name in sorted(topics)))
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    prose = [textwrap.fill(paragraph, 72) for paragraph in paragraphs if _is_prose(paragraph)]
    return Haystack("prose of the python documentation topics", "\n\n".join(prose))


def _is_prose(paragraph: str) -> bool:
    """Long enough to hold a sentence, and hardly anything in it but words and their punctuation."""
    words = sum(letter.isalpha() or letter in " ,.'" for letter in paragraph)
    return len(paragraph) > 150 and words > 0.95 * len(paragraph)


def _to_ascii(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    return plain.encode("ascii", "ignore").decode()


def load_haystack(path: str | Path) -> Haystack:
    """A haystack from a text file, or from all .txt files of a folder in the order of their names.

    Raises:
        WidefieldError: if the path does not exist, holds no text, or is not UTF-8.
    """
    path = Path(path)
    return Haystack(path.name or str(path), "\n\n".join(load_texts(path)))


def load_texts(path: str | Path) -> list[str]:
    """The texts of a file (one) or of all .txt files of a folder, in the order of their names.

    Raises:
        WidefieldError: if the path does not exist, holds no text, or is not UTF-8.
    """
    path = Path(path)
    if not path.exists():
        raise WidefieldError(f"no text at {path}: there is no such file or folder")
    if not path.is_dir():
        return [_read(path)]
    files = sorted(path.glob("*.txt"))
    if not files:
        raise WidefieldError(f"no text in {path}: the folder holds no .txt file")
    return [_read(file) for file in files]


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WidefieldError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise WidefieldError(
            f"{path} is not UTF-8 text (byte {error.start}); give a plain text file"
        ) from error
    if "\0" in text:
        raise WidefieldError(f"{path} is not text: it holds zero bytes; give a plain text file")
    if not text.strip():
        raise WidefieldError(f"{path} is empty; give a file with text in it")
    return text
