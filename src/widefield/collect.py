"""Run a model as it is over some text, and keep what its Δ looks like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from widefield import families, ops
from widefield.calibration import Calibration, DeltaSketch, LayerCalibration
from widefield.errors import WidefieldError
from widefield.extension import extended, observed
from widefield.plan import ModelLayout, ScanInputs, SSDInputs

__all__ = ["calibrate"]

Ids: TypeAlias = "Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]"
_PIECE = 1 << 16  # characters that are tokenised at a time
_FEW_CHANNELS = 16_384
_FINEST_FEW, _FINEST_MANY = 3e-4, 0.012  # the latter keeps a 130M shape's file below 5 MB


def calibrate(
    model: nn.Module,
    texts_or_ids: str | Ids | Iterable[str] | Iterable[Ids],
    *,
    train_length: int,
    tokenizer: Any | None = None,
    sequences: int | None = None,
    batch_size: int = 1,
    progress: bool = False,
    seed: int = 0,
) -> Calibration:
    """Calibrate a model: the distribution of every channel's Δ at the training length.

    The unmodified model is what is calibrated, also where methods are on. Memory does not depend on
    how many sequences there are: some 8 kB a channel, next to the model and one batch.

    Args:
        model: a supported transformers model, extended or not; left as it was.
        texts_or_ids: a text, or several; or token ids, as tensors, arrays or lists of one or two
            dimensions, one or several of them. What follows each other is packed into sequences of
            exactly `train_length` tokens. An iterator may be endless if `sequences` is given.
        train_length: L0, the length that the model was trained at, in tokens.
        tokenizer: of the model; needed for texts.
        sequences: how many to use (the paper: 10); None for all there are. From a text, a tensor or
            a list they are drawn at random; an iterator is read in order, as far as needed.
        batch_size: sequences a forward pass.
        progress: show a progress bar on stderr.
        seed: of the draw.

    Raises:
        WidefieldError: for an unsupported model, text without a tokenizer, too little text, ids
            that the model does not know, or non-finite Δ.
    """
    _check_counts(train_length, sequences, batch_size)
    layout = families.describe(model)
    corpus = _Corpus(train_length, sequences, _vocabulary(model))
    stream = _ids(texts_or_ids, tokenizer, train_length, seed if sequences is not None else None)
    collector = _Collector(layout)
    with _as_it_is(model), observed(model, collector), _bar(progress, "sequences", sequences) as on:
        for batch in _batches(corpus.pack(stream), batch_size):
            _forward(model, batch)
            on(batch.shape[0])
    corpus.check()
    with _bar(progress, "layers", len(layout.layers)) as on:
        layers = collector.layers(on)
    return Calibration(
        layers=layers,
        fingerprint=layout.fingerprint,
        model_class=layout.model_class,
        train_length=train_length,
        corpus_hash=corpus.digest.hexdigest()[:16],
        sequences=corpus.sequences,
        tokens=corpus.sequences * train_length,
    )


def _check_counts(train_length: int, sequences: int | None, batch_size: int) -> None:
    if train_length < 1:
        raise WidefieldError(f"train_length={train_length}: expected at least 1 token")
    if sequences is not None and sequences < 1:
        raise WidefieldError(f"sequences={sequences}: expected at least 1, or None for all")
    if batch_size < 1:
        raise WidefieldError(f"batch_size={batch_size}: expected at least 1")


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """No method, no dropout, no gradient; everything as before afterwards."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with extended(model), torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _forward(model: nn.Module, ids: Tensor) -> None:
    """One prefill without a cache and without the logits, which nobody reads."""
    body = getattr(model, "base_model", model)
    body(input_ids=ids.to(next(model.parameters()).device), use_cache=False)


class _Collector:
    """An observer that keeps a sketch of Δ and the decay rates of each layer."""

    def __init__(self, layout: ModelLayout) -> None:
        self._channels = dict(zip(layout.layers, layout.channels, strict=True))
        self._sketches: dict[int, DeltaSketch] = {}
        self._rates: dict[int, Tensor] = {}

    def __call__(self, layer: int, inputs: ScanInputs | SSDInputs) -> None:
        delta = ops.effective_delta(inputs).flatten(0, 1)
        if inputs.valid is not None:
            delta = delta[inputs.valid.flatten()]
        if layer not in self._sketches:
            self._sketches[layer] = DeltaSketch(delta.shape[1], layer=layer)
            self._rates[layer] = inputs.A.detach().clone()
        self._sketches[layer].update(delta)

    def layers(self, on: Callable[[int], None]) -> dict[int, LayerCalibration]:
        """The sketches, closed; `on` is told of each one."""
        few = sum(self._channels.values()) <= _FEW_CHANNELS
        finest = _FINEST_FEW if few else _FINEST_MANY
        closed = {}
        for layer in sorted(self._sketches):
            sketch, rates = self._sketches.pop(layer), self._rates.pop(layer)
            closed[layer] = LayerCalibration.from_sketch(sketch, rates, finest=finest)
            on(1)
        return closed


class _Corpus:
    """Packs ids into sequences, and keeps count and hash of what was used."""

    def __init__(self, length: int, wanted: int | None, vocabulary: int) -> None:
        self.digest = hashlib.sha256()
        self.sequences = 0
        self._length = length
        self._wanted = wanted
        self._vocabulary = vocabulary
        self._read = 0

    def pack(self, stream: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Sequences of exactly the training length, until enough are made or the stream ends."""
        rest = np.zeros(0, np.int64)
        for ids in stream:
            self._check_ids(ids)
            self._read += ids.size
            rest = np.concatenate([rest, ids])
            while rest.size >= self._length and self.sequences != self._wanted:
                sequence, rest = rest[: self._length], rest[self._length :]
                self.sequences += 1
                self.digest.update(sequence.astype("<i8").tobytes())
                yield torch.from_numpy(sequence)
            if self.sequences == self._wanted:
                return

    def check(self) -> None:
        """Raise if there was too little."""
        if self._read == 0:
            raise WidefieldError(
                "the calibration corpus is empty: give at least one sequence of text or ids"
            )
        if self.sequences == 0:
            raise WidefieldError(
                f"the calibration corpus has {self._read} tokens, fewer than one sequence of "
                f"train_length={self._length}: give more text, or the model's own length"
            )
        if self._wanted is not None and self.sequences < self._wanted:
            raise WidefieldError(
                f"the calibration corpus has {self.sequences} sequences of {self._length} tokens, "
                f"{self._wanted} were asked for: give more text, or sequences={self.sequences}"
            )

    def _check_ids(self, ids: np.ndarray) -> None:
        wrong = ids[(ids < 0) | (ids >= self._vocabulary)]
        if wrong.size:
            raise WidefieldError(
                f"token id {wrong[0]} is outside the model's vocabulary of {self._vocabulary}: "
                "use the model's own tokenizer"
            )


def _batches(sequences: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for sequence in sequences:
        batch.append(sequence)
        if len(batch) == size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _ids(
    source: Any, tokenizer: Any | None, train_length: int, seed: int | None
) -> Iterator[np.ndarray]:
    """The ids of whatever was given, piece by piece; drawn by `seed` where there is an end."""
    if isinstance(source, str):
        starts = range(0, len(source), _PIECE)
        for start in _drawn(starts, seed):
            yield _tokenised(source[start : start + _PIECE], tokenizer)
    elif _is_array(source):
        yield from _chunks(_array(source), train_length, seed)
    elif isinstance(source, Iterable):
        for piece in _drawn(source, seed):
            if isinstance(piece, str):
                yield from _ids(piece, tokenizer, train_length, None)
            else:
                yield _array(piece)
    else:
        raise WidefieldError(
            f"cannot calibrate on a {type(source).__name__}: expected text, token ids, "
            "or an iterable of them"
        )


def _drawn(pieces: Iterable[Any], seed: int | None) -> Iterable[Any]:
    """In random order where there is an end and a seed."""
    if seed is None or not isinstance(pieces, Sequence):
        return pieces
    order = np.random.default_rng(seed).permutation(len(pieces))
    return (pieces[i] for i in order)


def _is_array(source: Any) -> bool:
    if isinstance(source, Tensor | np.ndarray):
        return True
    return isinstance(source, Sized) and isinstance(source, Sequence) and _first_is_number(source)


def _first_is_number(source: Sequence[Any]) -> bool:
    return len(source) > 0 and isinstance(source[0], int | np.integer)


def _chunks(ids: np.ndarray, length: int, seed: int | None) -> Iterable[np.ndarray]:
    whole = ids.size // length
    if not whole:
        return [ids]
    return _drawn([ids[i * length : (i + 1) * length] for i in range(whole)], seed)


def _array(ids: Any) -> np.ndarray:
    """Ids of one or two dimensions as one row of int64."""
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else _plain(ids)
    if array.dtype.kind not in "iu" and array.size:
        raise WidefieldError(
            f"token ids of type {array.dtype}: expected whole numbers, or texts with a tokenizer"
        )
    if array.ndim not in (1, 2):
        raise WidefieldError(
            f"token ids of {array.ndim} dimensions: expected one or two (sequences of ids)"
        )
    return array.reshape(-1).astype(np.int64)


def _plain(ids: Any) -> np.ndarray:
    try:
        return np.asarray(ids)
    except ValueError:
        return np.concatenate([np.asarray(row) for row in ids])


def _tokenised(text: str, tokenizer: Any | None) -> np.ndarray:
    if tokenizer is None:
        raise WidefieldError(
            "calibrating on text needs tokenizer=...: give the model's tokenizer, or token ids"
        )
    if any(base.__name__ == "ByT5Tokenizer" for base in type(tokenizer).__mro__):
        # ByT5's own loop is slow, and reads "</s>" in a text as the end of a sequence: id = byte +
        # 3.
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + 3
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int64)


@contextmanager
def _bar(shown: bool, what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, or nothing; yields what advances it."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TextColumn(what))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("calibrating", total=total)
        yield lambda count: progress.advance(task, count)
