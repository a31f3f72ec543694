"""Which channels see far: by the decay of their states over the training length."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from widefield.calibration import Calibration


def log_decay(calibration: Calibration, layer: int, reduction: str) -> Float[Tensor, " channels"]:
    """Log of the cumulative decay over the training length, -a · L0 · E[Δ] (Eq. 15), float64.

    Args:
        calibration: of the model.
        layer: the model's own index of the layer.
        reduction: which |A| of a channel's N states is a: "slowest", "mean" or "fastest".
    """
    found = calibration.layer(layer)
    rate = found.decay_rate(reduction).double()
    return -rate * calibration.train_length * found.mean_delta.double()


def global_channels(
    calibration: Calibration, layer: int, reduction: str, decay_threshold: float
) -> Bool[Tensor, " channels"]:
    """Channels whose cumulative decay over the training length exceeds Th; compared in logs."""
    return log_decay(calibration, layer, reduction) > math.log(decay_threshold)


def mean_log_decay(calibration: Calibration, layer: int, reduction: str) -> float:
    """Log of the mean cumulative decay of a layer's channels: the paper's measure of a layer."""
    decay = log_decay(calibration, layer, reduction)
    return float(torch.logsumexp(decay, 0)) - math.log(decay.shape[0])
