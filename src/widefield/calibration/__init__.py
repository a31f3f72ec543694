"""What the unmodified model's Δ looks like: collected as a stream, stored small."""

from __future__ import annotations

from widefield.calibration.layer import REDUCTIONS, LayerCalibration
from widefield.calibration.sketch import DeltaSketch
from widefield.calibration.store import Calibration

__all__ = ["REDUCTIONS", "Calibration", "DeltaSketch", "LayerCalibration"]
