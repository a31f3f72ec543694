"""Stream generated text: whole characters only, as soon as they are certain."""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np
import torch
from transformers.generation.streamers import BaseStreamer

from widefield.cli._common import Interrupted
from widefield.cli._models import Choice, Source, build_methods, in_words, need_tokenizer
from widefield.decoding import check_model
from widefield.errors import WidefieldError
from widefield.extension import extend
from widefield.tasks.tokens import BYTE_OFFSET, bos_ids, decode, encode, is_byte_level

__all__ = ["Printer", "stream_text"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTES = 256


class Printer(BaseStreamer):
    """Writes new tokens to a text stream as `generate(streamer=...)` hands them over.

    Args:
        tokenizer: of the model that generates.
        out: where the text goes.
    """

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self.tokenizer = tokenizer
        self.out = out
        self.tokens = 0
        self.first: float | None = None
        self._prompt_seen = False
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._held: list[int] = []
        self._written = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (1, tokens) at the first call, then one token (1,) a call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if self.first is None:
            self.first = time.perf_counter()
        ids = value.flatten().tolist()
        self.tokens += len(ids)
        self._write(self._bytes_of(ids) if is_byte_level(self.tokenizer) else self._text_of(ids))

    def end(self) -> None:
        """Write what was held back; a character that the end cut off shows as a replacement."""
        if is_byte_level(self.tokenizer):
            self._write(self._bytes.decode(b"", final=True) + "\n")
        else:
            self._write(decode(self.tokenizer, self._held)[self._written :] + "\n")

    def _bytes_of(self, ids: list[int]) -> str:
        values = (token - BYTE_OFFSET for token in ids)
        return self._bytes.decode(bytes(value for value in values if 0 <= value < _BYTES))

    def _text_of(self, ids: list[int]) -> str:
        """What the held tokens say beyond what is written; nothing while a character is cut."""
        self._held += ids
        text = decode(self.tokenizer, self._held)
        if text.endswith(_UNFINISHED):
            return ""
        new = text[self._written :]
        self._written = len(text)
        if text.endswith("\n"):
            self._held, self._written = [], 0
        return new

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def stream_text(
    source: Source,
    choice: Choice | None,
    text: str,
    max_new_tokens: int,
    sampling: Mapping[str, float] | None,
    *,
    cuda_graph: bool = False,
) -> None:
    """Generate from a text on stdout; say on stderr what is on and how fast it went.

    Args:
        source: the model.
        choice: one method or combination; None leaves the model as it was loaded.
        text: the prompt.
        max_new_tokens: at most.
        sampling: temperature, top_p and seed; None takes the likeliest token each time.
        cuda_graph: whether a recorded decode step is replayed for every token.

    Raises:
        Interrupted: after Ctrl-C.
        WidefieldError: if the model has no tokenizer, or a method cannot act on it.
    """
    tokenizer = need_tokenizer(source)
    _put_on(source, choice)
    if cuda_graph:
        check_model(source.model)
    ids = _prompt(source, text)
    model = source.model
    on = " + ".join(in_words(method) for method in model.widefield.methods)
    say(f"{source.name}, {on or 'no method on'}")
    trained = "" if source.train_length is None else f", trained at {source.train_length:,}"
    say(f"prompt {ids.shape[1]:,} tokens{trained}; on {model.device}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    printer = Printer(tokenizer, sys.stdout)
    begun = time.perf_counter()
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=printer,
            pad_token_id=model.config.pad_token_id or 0,
            cuda_graph=cuda_graph,
            **_sampling(sampling),
        )
    except KeyboardInterrupt:
        printer.end()
        raise Interrupted(f"{printer.tokens} of {max_new_tokens} tokens were generated") from None
    _say_speed(printer, begun)


def _put_on(source: Source, choice: Choice | None) -> None:
    if choice is None:
        if not hasattr(source.model, "widefield"):
            extend(source.model)
        return
    if len(choice.wanted) != 1:
        names = ",".join(name for name, _ in choice.wanted)
        raise WidefieldError(
            f"--method {names}: expected one, or several joined by + into one model"
        )
    ((_, names),) = choice.wanted
    extend(source.model, *build_methods(source, names, tuned=choice.tuned, changes=choice.changes))


def _prompt(source: Source, text: str) -> torch.Tensor:
    """The prompt's tokens (1, L), int64, on the model's device."""
    ids = np.concatenate([bos_ids(source.tokenizer), encode(source.tokenizer, text)])
    if not len(ids):
        raise WidefieldError("the prompt is empty: its text has no tokens")
    return torch.from_numpy(ids)[None].to(source.model.device)


def _sampling(settings: Mapping[str, float] | None) -> dict[str, Any]:
    if settings is None:
        return {"do_sample": False}
    torch.manual_seed(int(settings["seed"]))
    return {
        "do_sample": True,
        "temperature": settings["temperature"],
        "top_p": settings["top_p"],
        "top_k": 0,
    }


def _say_speed(printer: Printer, begun: float) -> None:
    if printer.first is None:
        return
    decoding = time.perf_counter() - printer.first
    rate = f", then {(printer.tokens - 1) / decoding:.0f} tokens/s" if printer.tokens > 1 else ""
    say(f"{printer.tokens} tokens; the first after {printer.first - begun:.2f} s{rate}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
