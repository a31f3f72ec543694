"""Batches of plain text and passkey samples, made ahead in a thread."""

from __future__ import annotations

import functools
import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

from widefield.errors import WidefieldError
from widefield.tasks.passkey import DIGITS, NEEDLE, byte_sample
from widefield.tasks.tokens import BYTE_OFFSET

__all__ = ["Batch", "Corpus", "load_corpus", "make_batch", "prefetch"]


_LINE_BREAK, _SPACE = b"\n "


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, and where it came from.

    Attributes:
        text: all files, one after the other.
        files: names, relative to the path that was given.
        sha256: of `text`.
    """

    text: UInt8[np.ndarray, " bytes"]
    files: tuple[str, ...]
    sha256: str

    @functools.cached_property
    def unwrapped(self) -> UInt8[np.ndarray, " bytes"]:
        """`text` with each line break inside a paragraph turned into a space.

        Paragraphs are told apart by empty lines. Books of one source have hard line breaks and
        those of another have none: who has read only the one kind does not know the other.
        """
        breaks = self.text == _LINE_BREAK
        alone = breaks.copy()
        alone[1:] &= ~breaks[:-1]
        alone[:-1] &= ~breaks[1:]
        return np.where(alone, np.uint8(_SPACE), self.text)

    def draw(self, unwrapped_share: float, rng: np.random.Generator) -> UInt8[np.ndarray, " bytes"]:
        """The text, or with that probability the unwrapped text."""
        return self.unwrapped if rng.random() < unwrapped_share else self.text


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's sequences.

    Attributes:
        ids: byte + 3.
        passkeys: how many of the first rows end in a passkey's five digits.
        digits: where each of those rows has the digits of its key in the needle.
    """

    ids: Int[np.ndarray, "batch length"]
    passkeys: int
    digits: Int[np.ndarray, "passkeys digits"]


def load_corpus(paths: Sequence[str | Path]) -> Corpus:
    """Read every text file of some files and folders.

    Args:
        paths: files, or folders whose *.txt, *.raw and *.tokens files are read in the order of
            their names.

    Raises:
        WidefieldError: if a path does not exist or holds no text.
    """
    files: list[tuple[str, Path]] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append((path.name, path))
        elif path.is_dir():
            inside = sorted(p for s in ("*.txt", "*.raw", "*.tokens") for p in path.rglob(s))
            if not inside:
                raise WidefieldError(f"corpus folder {path} holds no .txt, .raw or .tokens file")
            files += [(str(p.relative_to(path.parent)), p) for p in inside]
        else:
            raise WidefieldError(
                f"corpus {path} does not exist: expected a text file or a folder of them"
            )
    text = np.concatenate([np.fromfile(path, dtype=np.uint8) for _, path in files])
    if not len(text):
        raise WidefieldError(f"corpus {', '.join(map(str, paths))} is empty")
    digest = hashlib.sha256(text.tobytes()).hexdigest()
    return Corpus(text, tuple(name for name, _ in files), digest)


def make_batch(
    corpus: Corpus,
    length: int,
    batch: int,
    passkey_share: float,
    rng: np.random.Generator,
    unwrapped_share: float = 0.0,
) -> Batch:
    """Passkey samples first, plain text after them.

    Args:
        corpus: where text and haystacks are drawn from.
        length: bytes a sequence, the answer included.
        batch: sequences.
        passkey_share: share of them that are passkey samples.
        rng: where everything random comes from.
        unwrapped_share: share of the sequences whose text has no line breaks inside paragraphs.

    Raises:
        WidefieldError: if the corpus is shorter than a sequence.
    """
    size = len(corpus.text)
    if size <= length:
        raise WidefieldError(
            f"the corpus has {size} bytes: expected more than one sequence of {length}"
        )
    passkeys = round(batch * passkey_share)
    ids = np.empty((batch, length), dtype=np.int64)
    for row in range(passkeys):
        text = corpus.draw(unwrapped_share, rng)
        ids[row], _ = byte_sample(text, length - DIGITS, float(rng.random()), rng)
    starts = rng.integers(0, size - length, size=batch - passkeys)
    for row, start in enumerate(starts, start=passkeys):
        ids[row] = corpus.draw(unwrapped_share, rng)[start : start + length]
        ids[row] += BYTE_OFFSET
    digits = (
        np.stack([_needle_digits(row) for row in ids[:passkeys]])
        if passkeys
        else np.empty((0, 0), int)
    )
    return Batch(ids, passkeys, digits)


def _needle_digits(row: Int[np.ndarray, " length"]) -> Int[np.ndarray, " digits"]:
    """Positions of the key's digits in a passkey sample's needle, both times."""
    text = (row - BYTE_OFFSET).astype(np.uint8).tobytes()
    key = text[-DIGITS:]
    start = text.index(NEEDLE.partition("{key}")[0].encode() + key)
    first = text.index(key, start)
    second = text.index(key, first + DIGITS)
    return np.concatenate([np.arange(at, at + DIGITS) for at in (first, second)])


def prefetch(make: Callable[[], Batch], ahead: int = 4) -> Iterator[Batch]:
    """Run `make` again and again in a thread, a few batches ahead, until the iterator is closed."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            item: Batch | BaseException
            try:
                item = make()
            except BaseException as error:
                item = error
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)
