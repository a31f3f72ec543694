"""Calibrations on disk: one safetensors file, written in one piece, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from widefield.calibration.layer import LayerCalibration
from widefield.errors import WidefieldError
from widefield.plan import ModelLayout

__all__ = ["Calibration"]

_KEY = "widefield.calibration"
_FORMAT = 2  # 1 had the knots uncompressed
_MOST_KNOTS = 1024
_AGAIN = "make a new one with wf.calibrate (widefield calibrate)"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the unmodified model's Δ looks like; what LongMamba needs to know of a model.

    Attributes:
        layers: the model's own index of a Mamba layer → its calibration.
        fingerprint: of the model that was calibrated, as `families.describe` gives it.
        model_class: of that model, e.g. "MambaForCausalLM".
        train_length: L0, the length that the model was trained at, in tokens.
        corpus_hash: 16 hex digits of the token ids that it was calibrated on.
        sequences: how many sequences of `train_length` tokens those were.
        tokens: how many tokens were counted.
    """

    layers: Mapping[int, LayerCalibration] = field(repr=False)
    fingerprint: str
    model_class: str
    train_length: int
    corpus_hash: str
    sequences: int
    tokens: int

    def __post_init__(self) -> None:
        if not self.layers:
            raise WidefieldError(f"a calibration without layers: {_AGAIN}")
        if self.train_length < 1:
            raise WidefieldError(
                f"training length {self.train_length}: expected at least 1 token; {_AGAIN}"
            )

    def layer(self, index: int) -> LayerCalibration:
        """The calibration of one layer.

        Raises:
            WidefieldError: if that layer was not calibrated.
        """
        if index not in self.layers:
            raise WidefieldError(
                f"layer {index} is not in this calibration of {self.model_class} "
                f"{self.fingerprint}: it has layers {', '.join(map(str, sorted(self.layers)))}"
            )
        return self.layers[index]

    @cached_property
    def identity(self) -> str:
        """16 hex digits of the content, the same before and after saving; for results' headers."""
        return _digest(self._header(), self._tensors())

    def check(self, layout: ModelLayout, train_length: int | None = None) -> None:
        """Make sure that this calibration is of the model at hand.

        Args:
            layout: the model's `ModelLayout`.
            train_length: what the model was trained at, if that is to be checked, too.

        Raises:
            WidefieldError: naming both models, or both lengths.
        """
        ours = f"{self.model_class} {self.fingerprint}"
        theirs = f"{layout.model_class} {layout.fingerprint}"
        if self.fingerprint != layout.fingerprint:
            raise WidefieldError(
                f"this calibration belongs to {ours}, the model is {theirs}: run wf.calibrate on "
                "this model, or load the model that was calibrated"
            )
        missing = sorted(set(layout.layers) - set(self.layers))
        if missing:
            raise WidefieldError(
                f"this calibration of {ours} lacks layers {missing} of the model: {_AGAIN}"
            )
        for index, channels in zip(layout.layers, layout.channels, strict=True):
            if self.layers[index].channels != channels:
                raise WidefieldError(
                    f"this calibration of {ours} has {self.layers[index].channels} channels in "
                    f"layer {index}, the model has {channels}: {_AGAIN}"
                )
        if train_length is not None and train_length != self.train_length:
            raise WidefieldError(
                f"this calibration was made at a training length of {self.train_length} tokens, "
                f"expected {train_length}: run wf.calibrate with train_length={train_length}"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            WidefieldError: if the file cannot be written.
        """
        path = Path(path)
        header = {**self._header(), "format": _FORMAT, "identity": self.identity}
        content = to_bytes(_packed(self._tensors()), {_KEY: json.dumps(header, sort_keys=True)})
        try:
            _write_whole(path, content)
        except OSError as error:
            raise WidefieldError(
                f"cannot write the calibration to {path}: {error.strerror or error}; "
                "choose a path in a folder that exists and can be written"
            ) from None

    @staticmethod
    def load(path: str | Path) -> Calibration:
        """Read what `save` wrote, and check that it is whole.

        Raises:
            WidefieldError: if there is no such file, or it is truncated, changed, or something
                else.
        """
        path = Path(path)
        if not path.is_file():
            raise WidefieldError(
                f"no calibration at {path}: give a file that wf.calibrate(...).save(...) or "
                "`widefield calibrate` wrote"
            )
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise WidefieldError(
                f"{path} is damaged or no safetensors file ({_first_line(error)}): {_AGAIN}, "
                "or copy it again"
            ) from None
        if text is None:
            raise WidefieldError(
                f"{path} is a safetensors file, but not a calibration: "
                "give one that wf.calibrate wrote"
            )
        return _from_file(path, text, tensors)

    def _header(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "model_class": self.model_class,
            "train_length": self.train_length,
            "corpus_hash": self.corpus_hash,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "layers": {str(i): self.layers[i].tokens for i in sorted(self.layers)},
        }

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for index, layer in self.layers.items():
            tensors[f"{index}.delta"] = torch.stack([layer.lowest, layer.highest, layer.mean_delta])
            tensors[f"{index}.decay"] = layer.decay.contiguous()
            tensors[f"{index}.knots"] = torch.stack([layer.steps, layer.falls])
        return tensors


def _from_file(path: Path, text: str, tensors: dict[str, Tensor]) -> Calibration:
    try:
        header = json.loads(text)
        version, identity = header.pop("format"), header.pop("identity")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WidefieldError(f"{path} is not a whole calibration (its header): {_AGAIN}") from None
    if version not in range(1, _FORMAT + 1):
        raise WidefieldError(
            f"{path} has calibration format {version}, this version of widefield reads up to "
            f"{_FORMAT}: update widefield, or {_AGAIN}"
        )
    try:
        tensors = _unpacked(tensors)
        layers = {int(i): _layer(tensors, i, n) for i, n in header.pop("layers").items()}
        calibration = Calibration(layers=layers, **header)
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        reason = error if isinstance(error, WidefieldError) else type(error).__name__
        raise WidefieldError(f"{path} is not a whole calibration ({reason}): {_AGAIN}") from None
    if calibration.identity != identity:
        raise WidefieldError(f"{path} was changed after it was written: {_AGAIN}, or copy it again")
    return calibration


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The knots as compressed bytes: a channel that needs few leaves the others of its row 0."""
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(".knots")]:
        content = zlib.compress(tensors[name].numpy().tobytes(), 9)
        packed[name] = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
    return packed


def _unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(2, D, K) knots from their bytes, never more of them than a calibration can have."""
    whole = dict(tensors)
    for name in [name for name in tensors if name.endswith(".knots") and tensors[name].ndim == 1]:
        channels = tensors[name.replace(".knots", ".delta")].shape[-1]
        stream = zlib.decompressobj()
        content = stream.decompress(tensors[name].numpy().tobytes(), 2 * channels * _MOST_KNOTS)
        knots = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
        if not stream.eof or tensors[name].dtype != torch.uint8:
            raise WidefieldError(f"{name} holds too much or is cut off")
        whole[name] = knots.reshape(2, channels, -1)
    return whole


def _layer(tensors: dict[str, Tensor], index: str, tokens: int) -> LayerCalibration:
    delta, decay, knots = (tensors[f"{index}.{name}"] for name in ("delta", "decay", "knots"))
    channels = delta.shape[-1]
    shapes_fit = (
        delta.shape == decay.shape == (3, channels)
        and knots.ndim == 3
        and knots.shape[:2] == (2, channels)
        and knots.shape[2] > 0
        and (delta.dtype, decay.dtype, knots.dtype) == (torch.float32, torch.float32, torch.uint8)
    )
    if not shapes_fit:
        raise WidefieldError(f"layer {index} has tensors of unexpected shapes or types")
    lowest, highest, mean = delta
    sound = torch.isfinite(delta).all() and torch.isfinite(decay).all()
    sound &= (lowest > 0).all() and (lowest <= highest).all() and (mean >= 0).all()
    if not bool(sound and (decay > 0).all()):
        raise WidefieldError(f"layer {index} holds values that no model has")
    return LayerCalibration(int(tokens), lowest, highest, knots[0], knots[1], mean, decay)


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_whole(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
