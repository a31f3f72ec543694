"""A streaming sketch of how often Δ is how large, for all channels of a layer at once."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float
from torch import Tensor

from widefield.errors import WidefieldError

__all__ = ["DeltaSketch"]

_CHUNK = 4096


class DeltaSketch:
    """The distribution of Δ of each channel, in memory that the number of tokens does not change.

    A merging digest: values are kept as weighted centroids. A centroid that lies at upper rank r (r
    tokens are larger) holds at most about r · ε tokens, so the share of tokens above any value is
    known to about ε, however small that share is, and the largest tokens stay single. As the tokens
    above a value have at least that value, their mass ΣΔ is known as well as their number.

    Attributes:
        channels: D.
        tokens: how many tokens were seen.
        total: (D,) float64, ΣΔ.
        values: (D, C) float32 centroids, descending.
        weights: (D, C) float32 tokens of each centroid; 0 marks an unused place.
    """

    def __init__(self, channels: int, *, layer: int | None = None, capacity: int = 1024) -> None:
        """An empty sketch.

        Args:
            channels: D.
            layer: index of the layer, named in errors.
            capacity: centroids of a channel; ε is about ln(tokens) / capacity. 8 · D · capacity
                bytes.
        """
        if channels < 1 or capacity < 64:
            raise WidefieldError(
                f"a sketch of {channels} channels with {capacity} centroids: "
                "expected at least 1 channel and 64 centroids"
            )
        self.channels = channels
        self.capacity = capacity
        self.layer = layer
        self.tokens = 0
        self.total = np.zeros(channels)
        self.values = np.zeros((channels, 0), np.float32)
        self.weights = np.zeros((channels, 0), np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self.values.nbytes + self.weights.nbytes + self.total.nbytes

    def update(self, delta: Float[Tensor, "tokens channels"]) -> None:
        """Add tokens, in any order and any number at a time.

        Raises:
            WidefieldError: if a value is negative or not finite, or the number of channels differs.
        """
        if delta.shape[1] != self.channels:
            raise WidefieldError(
                f"Δ of {delta.shape[1]} channels for a sketch of {self.channels}: "
                "use one sketch a layer"
            )
        for chunk in delta.detach().split(_CHUNK):
            values = np.ascontiguousarray(chunk.float().cpu().numpy().T)
            self._check(values)
            self.total += values.sum(1, dtype=np.float64)
            self._merge(values, np.ones_like(values), chunk.shape[0])

    def merge(self, other: DeltaSketch) -> None:
        """Add all that another sketch of the same layer has seen."""
        if other.channels != self.channels:
            raise WidefieldError(
                f"cannot merge sketches of {self.channels} and {other.channels} channels: "
                "merge sketches of the same layer"
            )
        self.total += other.total
        self._merge(other.values, other.weights, other.tokens)

    def compressed(self, capacity: int) -> tuple[np.ndarray, np.ndarray]:
        """`values` and `weights` in at most `capacity` centroids; the sketch stays as it is."""
        if self.values.shape[1] <= capacity:
            return self.values, self.weights
        return _cluster(self.values, self.weights, self.tokens, capacity)

    def _check(self, values: np.ndarray) -> None:
        wrong = ~np.isfinite(values) | (values < 0)
        if not wrong.any():
            return
        channel, token = (int(i) for i in np.argwhere(wrong)[0])
        where = "" if self.layer is None else f" in layer {self.layer}"
        value = values[channel, token]
        if not np.isfinite(value):
            raise WidefieldError(
                f"non-finite Δ{where}: {value} in channel {channel}; check the model's weights and "
                "its dtype (float32 is safest)"
            )
        raise WidefieldError(
            f"negative Δ{where}: {value} in channel {channel}; expected Δ after bias and softplus, "
            "which is never below 0"
        )

    def _merge(self, values: np.ndarray, weights: np.ndarray, tokens: int) -> None:
        values = np.concatenate([self.values, values], axis=1)
        weights = np.concatenate([self.weights, weights], axis=1)
        self.tokens += tokens
        order = np.argsort(values, axis=1)[:, ::-1]
        values = np.take_along_axis(values, order, 1)
        weights = np.take_along_axis(weights, order, 1)
        if values.shape[1] > self.capacity:
            values, weights = _cluster(values, weights, self.tokens, self.capacity)
        self.values, self.weights = values, weights


def _cluster(
    values: np.ndarray, weights: np.ndarray, tokens: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Descending values (D, n) gathered into (D, capacity) centroids, geometric in upper rank."""
    channels = values.shape[0]
    middle = np.cumsum(weights, axis=1, dtype=np.float64) - weights / 2
    cluster = _cluster_of_rank(middle, tokens, capacity)
    cell = (cluster + np.arange(channels)[:, None] * capacity).ravel()
    size = (channels, capacity)
    count = np.bincount(cell, weights.ravel(), channels * capacity).reshape(size)
    mass = np.bincount(cell, (weights * values.astype(np.float64)).ravel(), channels * capacity)
    mean = mass.reshape(size) / np.maximum(count, 1)
    # An unused place repeats its larger neighbour, so that the row stays sorted. Place 0 is always
    # used.
    filled = np.maximum.accumulate(np.where(count > 0, np.arange(capacity), 0), axis=1)
    mean = np.take_along_axis(mean, filled, 1)
    return mean.astype(np.float32), count.astype(np.float32)


def _cluster_of_rank(rank: np.ndarray, tokens: int, capacity: int) -> np.ndarray:
    """Cluster of an upper rank: one for each of the first 1/ε ranks, then 1/ε for each factor e."""
    if tokens <= capacity:
        return rank.astype(np.int64)
    epsilon = _resolution(tokens, capacity)
    scaled = rank * epsilon
    number = np.where(scaled < 1, scaled, 1 + np.log(np.maximum(scaled, 1))) / epsilon
    return np.minimum(number.astype(np.int64), capacity - 1)


def _resolution(tokens: int, capacity: int) -> float:
    """The ε at which (1 + ln(ε · tokens)) / ε clusters are `capacity`."""
    low, high = 1 / tokens, 1.0
    for _ in range(60):
        epsilon = math.sqrt(low * high)
        if 1 + math.log(epsilon * tokens) > epsilon * (capacity - 1):
            low = epsilon
        else:
            high = epsilon
    return high
