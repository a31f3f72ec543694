"""Distributions of Δ that a calibration must cope with, and layers calibrated on them."""

from __future__ import annotations

import numpy as np
import torch

from widefield.calibration import Calibration, DeltaSketch, LayerCalibration
from widefield.plan import ModelLayout

LENGTH = 256

SHAPES = (
    "gamma",
    "lognormal",
    "heavy",
    "two modes",
    "two narrow modes",
    "narrow",
    "softplus",
    "near atoms",
)


def draw(shape: str, tokens: int, channels: int, seed: int = 0) -> np.ndarray:
    """(tokens, channels) float32 samples of Δ."""
    rng = np.random.default_rng(seed)
    size = (tokens, channels)
    upper = rng.random(size) < rng.uniform(0.02, 0.9, channels)
    if shape == "gamma":
        delta = rng.gamma(0.7, 0.1, size)
    elif shape == "lognormal":
        delta = rng.lognormal(-3, 1, size)
    elif shape == "heavy":
        delta = rng.pareto(2.5, size) + 0.01
    elif shape == "two modes":
        delta = np.where(upper, rng.lognormal(0, 0.1, size), rng.lognormal(-5, 0.3, size))
    elif shape == "two narrow modes":
        delta = np.where(upper, rng.normal(1, 1e-3, size), rng.normal(0.1, 1e-4, size))
    elif shape == "narrow":
        delta = rng.normal(0.05, 1e-5, size)
    elif shape == "softplus":
        delta = np.log1p(np.exp(rng.normal(-4, 2, size)))
    elif shape == "near atoms":
        atoms = rng.lognormal(-3, 1, (500, channels))
        delta = atoms[rng.integers(0, 500, tokens)] * np.exp(1e-3 * rng.normal(size=size))
    else:
        raise ValueError(shape)
    return np.maximum(delta, 0).astype(np.float32)


def calibrate_layer(
    delta: np.ndarray,
    *,
    knots: int = 128,
    finest: float = 3e-4,
    chunk: int = 1024,
    rates: np.ndarray | None = None,
) -> LayerCalibration:
    """A layer calibrated on (tokens, channels); rates (channels, states), ones by default."""
    sketch = DeltaSketch(delta.shape[1])
    for start in range(0, len(delta), chunk):
        sketch.update(torch.from_numpy(delta[start : start + chunk]))
    rates = np.ones((delta.shape[1], 1)) if rates is None else rates
    A = -torch.from_numpy(rates).float()
    return LayerCalibration.from_sketch(sketch, A, knots=knots, finest=finest)


def calibrate_layers(
    *deltas: np.ndarray,
    rates: tuple[np.ndarray, ...] | None = None,
    train_length: int = LENGTH,
    fingerprint: str = "0123456789abcdef",
) -> Calibration:
    """A calibration with layers 0, 1, … of these samples."""
    layers = {
        i: calibrate_layer(delta, rates=None if rates is None else rates[i])
        for i, delta in enumerate(deltas)
    }
    return Calibration(
        layers=layers,
        fingerprint=fingerprint,
        model_class="MambaForCausalLM",
        train_length=train_length,
        corpus_hash="feedfacefeedface",
        sequences=len(deltas[0]) // train_length,
        tokens=len(deltas[0]),
    )


def layout_of(calibration: Calibration, **changes: object) -> ModelLayout:
    """The layout of the model that a calibration is of."""
    fields: dict = {
        "model_class": calibration.model_class,
        "fingerprint": calibration.fingerprint,
        "layers": tuple(calibration.layers),
        "channels": tuple(layer.channels for layer in calibration.layers.values()),
        "decimation": None,
    }
    return ModelLayout(**{**fields, **changes})
