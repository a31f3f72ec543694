"""The small byte-level checkpoints that ship with the package, their calibrations and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer

from widefield.calibration import Calibration
from widefield.errors import WidefieldError, unknown
from widefield.loading import Loaded, load
from widefield.methods import from_config
from widefield.methods.base import Method

__all__ = ["available", "folder", "load_bundled", "recommended_methods", "recommended_options"]

ROOT = Path(__file__).parent


def available() -> tuple[str, ...]:
    """Names of the bundled checkpoints."""
    return tuple(sorted(config.parent.name for config in ROOT.glob("*/config.json")))


def folder(name: str = "base") -> Path:
    """Where a bundled checkpoint lies.

    Raises:
        WidefieldError: if there is none of that name.
    """
    names = available()
    if not names:
        raise WidefieldError(
            f"no checkpoints in {ROOT}: install widefield again from a complete wheel or clone"
        )
    if name not in names:
        raise unknown("bundled checkpoint", name, names)
    return ROOT / name


def load_bundled(name: str = "base", *, device: torch.device | str = "cpu") -> Loaded:
    """A bundled model with its tokenizer and calibration, unextended, in float32 and eval mode.

    Args:
        name: "base", or "decimated" (fine-tuned with DeciMamba's decimation on).
        device: where its weights go.

    Returns:
        The model, its byte-level tokenizer and its calibration.

    Raises:
        WidefieldError: for an unknown name or a damaged file.
    """
    # The weights are stored as float16 for size; every published number was computed in float32.
    loaded = load(str(folder(name)), device=device, dtype=torch.float32, methods=False)
    if loaded.tokenizer is not None:
        return loaded
    return loaded._replace(tokenizer=ByT5Tokenizer())


def recommended_options(name: str = "base") -> dict[str, dict[str, Any]]:
    """The options measured to be best for a bundled checkpoint, by method name."""
    path = folder(name) / "methods.json"
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(chosen) for name, chosen in options.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WidefieldError(f"{path} cannot be read ({error}): install widefield again") from None


def recommended_methods(name: str = "base") -> dict[str, Method]:
    """The methods of a bundled checkpoint at their measured settings, by method name.

    Raises:
        WidefieldError: for an unknown name or a damaged file.
    """
    options = recommended_options(name)
    calibration = Calibration.load(folder(name) / "calibration.safetensors")
    return {method: from_config(method, chosen, calibration) for method, chosen in options.items()}
