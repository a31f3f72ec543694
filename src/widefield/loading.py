"""Load a model, its tokenizer, its calibration and the methods that were saved with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError

from widefield import original
from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.extension import extend, read_methods

__all__ = ["Loaded", "load"]

_CALIBRATIONS = ("calibration.safetensors", "widefield.safetensors")


class Loaded(NamedTuple):
    """A model with what belongs to it.

    Attributes:
        model: the live transformers model, in eval mode.
        tokenizer: its tokenizer, or None if there is none beside it.
        calibration: the calibration that lies beside its weights, or None.
    """

    model: Any
    tokenizer: Any | None
    calibration: Calibration | None


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] | None = None,
    methods: bool = True,
    **kwargs: Any,
) -> Loaded:
    """Load a checkpoint and whatever widefield saved beside it.

    Read are checkpoints of transformers, and the original ones of Mamba and Mamba-2, such as
    "state-spaces/mamba-130m", which become the same transformers classes.

    Args:
        path: a folder, or a hub id such as "state-spaces/mamba-130m-hf".
        device: where the model goes.
        dtype: of the weights; None = the checkpoint's own, float16 on a CPU becoming float32;
            "auto" = the checkpoint's own in any case.
        methods: put the methods on that `save_pretrained` wrote; False leaves the model as
            transformers loads it.
        **kwargs: passed to `from_pretrained` of the model.

    Raises:
        WidefieldError: if there is no such model, its files are damaged or do not belong together,
            or saved methods do not fit it.
    """
    folder = Path(path)
    device = torch.device(device)
    if folder.exists() and not (folder / "config.json").is_file():
        raise WidefieldError(
            f"no model at {folder}: expected a folder with config.json and *.safetensors, or a "
            "hub id"
        )
    try:
        model = _load_model(str(path), None if dtype == "auto" else dtype, kwargs)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise WidefieldError(f"cannot load {str(path)!r}: {_first_line(error)}") from error
    if dtype is None and device.type == "cpu" and model.dtype == torch.float16:
        model = model.float()
    model = model.to(device).eval()
    calibration = _calibration_beside(folder)
    if methods and folder.is_dir():
        saved = read_methods(folder)
        if saved:
            extend(model, *saved)
    return Loaded(model, _load_tokenizer(path, _hub_options(kwargs)), calibration)


def _load_model(path: str, dtype: torch.dtype | None, kwargs: dict[str, Any]) -> Any:
    """The transformers model of a checkpoint in either layout, its dtype None = as stored."""
    from transformers import AutoModelForCausalLM

    hub = _hub_options(kwargs)
    place = original.Place(path, hub)
    config = place.config()
    if original.is_original(config):
        others = {name: value for name, value in kwargs.items() if name not in hub}
        return original.build(place, config, dtype=dtype, **others)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype="auto" if dtype is None else dtype, use_safetensors=True, **kwargs
    )


def _hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the keywords that say where files are."""
    return {name: kwargs[name] for name in original.HUB_OPTIONS if name in kwargs}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _calibration_beside(folder: Path) -> Calibration | None:
    for name in _CALIBRATIONS:
        if (folder / name).is_file():
            return Calibration.load(folder / name)
    return None


def _load_tokenizer(path: str | Path, hub: dict[str, Any]) -> Any | None:
    from transformers import AutoTokenizer, ByT5Tokenizer

    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        return ByT5Tokenizer() if _is_byte_level(folder) else None
    try:
        return AutoTokenizer.from_pretrained(str(path), **hub)
    except (OSError, ValueError, KeyError):
        return None


def _is_byte_level(folder: Path) -> bool:
    """Whether the model says of itself that it reads bytes; such a tokenizer needs no file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("tokenizer_class") == "ByT5Tokenizer"
