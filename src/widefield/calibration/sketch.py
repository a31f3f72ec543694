"""A streaming sketch of how often Δ is how large, for all channels of a layer at once."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
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
        smallest: (D,) float32, the smallest Δ.
        values: (D, C) float32 centroids, descending; on the device of the first Δ, as all tensors.
        weights: (D, C) float32 tokens of each centroid; 0 marks an unused place.
    """

    def __init__(self, channels: int, *, layer: int | None = None, capacity: int = 1024) -> None:
        """An empty sketch.

        Args:
            channels: D.
            layer: index of the layer, named in errors.
            capacity: centroids of a channel, C; ε is about ln(tokens) / C. The state has
                8 · D · C bytes.

        Raises:
            WidefieldError: if there are no channels, or too few centroids.
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
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.smallest = torch.full((channels,), torch.inf)
        self.values = torch.zeros(channels, 0)
        self.weights = torch.zeros(channels, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        state = (self.values, self.weights, self.total, self.smallest)
        return sum(tensor.nbytes for tensor in state)

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
            values = chunk.float().T.contiguous()
            self._check(values)
            # The first tokens as they are: there may be no more.
            places = self.capacity // 2 if self.tokens > self.capacity else chunk.shape[0]
            self._add(values.double().sum(1), values.amin(1), chunk.shape[0])
            self._merge(*_thinned(_sorted(values), places))

    def merge(self, other: DeltaSketch) -> None:
        """Add all that another sketch of the same layer has seen.

        Raises:
            WidefieldError: if the number of channels differs.
        """
        if other.channels != self.channels:
            raise WidefieldError(
                f"cannot merge sketches of {self.channels} and {other.channels} channels: "
                "merge sketches of the same layer"
            )
        self._add(other.total, other.smallest, other.tokens)
        self._merge(other.values, other.weights)

    def compressed(
        self, capacity: int
    ) -> tuple[Float[Tensor, "channels places"], Float[Tensor, "channels places"]]:
        """`values` and `weights` in at most `capacity` centroids; the sketch stays as it is."""
        if self.values.shape[1] <= capacity:
            return self.values, self.weights
        return _cluster(self.values, self.weights, self.tokens, capacity)

    def _check(self, values: Tensor) -> None:
        wrong = ~(torch.isfinite(values) & (values >= 0))
        if not bool(wrong.any()):
            return
        channel, token = wrong.nonzero()[0].tolist()
        where = "" if self.layer is None else f" in layer {self.layer}"
        value = float(values[channel, token])
        if not math.isfinite(value):
            raise WidefieldError(
                f"non-finite Δ{where}: {value} in channel {channel}; check the model's weights and "
                "its dtype (float32 is safest)"
            )
        raise WidefieldError(
            f"negative Δ{where}: {value} in channel {channel}; expected Δ after bias and softplus, "
            "which is never below 0"
        )

    def _add(self, total: Tensor, smallest: Tensor, tokens: int) -> None:
        self.tokens += tokens
        self.total = self.total.to(total.device) + total
        self.smallest = torch.minimum(self.smallest.to(smallest.device), smallest)

    def _merge(self, values: Tensor, weights: Tensor) -> None:
        device = values.device
        values = torch.cat([self.values.to(device), values], 1)
        weights = torch.cat([self.weights.to(device), weights], 1)
        order = _ascending(values).flip(1)
        self.values, self.weights = values.gather(1, order), weights.gather(1, order)
        if values.shape[1] > self.capacity:
            self.values, self.weights = self.compressed(self.capacity)


def _sorted(values: Tensor) -> Float[Tensor, "channels tokens"]:
    """Each row descending."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1)).flip(1)
    return values.sort(1, descending=True).values


def _thinned(
    values: Tensor, capacity: int
) -> tuple[Float[Tensor, "channels places"], Float[Tensor, "channels places"]]:
    """Single descending tokens as at most `capacity` centroids; cheap, as all rows share ranks."""
    tokens = values.shape[1]
    if tokens <= capacity:
        return values, torch.ones_like(values)
    end = torch.ceil(_rank_bounds(tokens, capacity) - 0.5).long().unique().to(values.device)
    weight = end.diff().float().expand(values.shape[0], -1)
    mass = _between(values.cumsum(1, dtype=torch.float64), end.expand(values.shape[0], -1))
    return (mass / weight).float(), weight


def _ascending(values: Tensor) -> Int[Tensor, "channels places"]:
    """Order of each row; numpy's vectorised sort is several times as fast as torch's on a CPU."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.argsort(values.numpy(), axis=1))
    return values.argsort(1)


def _cluster(values: Tensor, weights: Tensor, tokens: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Descending values (D, n) gathered into (D, capacity) centroids, geometric in upper rank."""
    count = weights.cumsum(1, dtype=torch.float64)
    mass = weights.double().mul_(values).cumsum_(1)
    bounds = _rank_bounds(tokens, capacity).to(values.device).expand(values.shape[0], -1)
    end = torch.searchsorted(count - weights / 2, bounds.contiguous())
    weight, mass = (_between(running, end) for running in (count, mass))
    mean = (mass / weight.clamp_min(1)).float()
    # An unused place repeats its larger neighbour: the row stays sorted. Place 0 is always used.
    places = torch.arange(capacity, device=values.device)
    used = torch.where(weight > 0, places, 0).cummax(1).values
    return mean.gather(1, used), weight.float()


def _between(running: Tensor, end: Tensor) -> Tensor:
    """Sums over the runs between neighbouring `end`s, from running sums."""
    sums = torch.where(end > 0, running.gather(1, (end - 1).clamp_min(0)), 0.0)
    return sums.diff(dim=1)


def _rank_bounds(tokens: int, capacity: int) -> Float[Tensor, " bounds"]:
    """Upper ranks between clusters: one for each of the first 1/ε ranks, then 1/ε a factor of e."""
    number = torch.arange(capacity + 1, dtype=torch.float64)
    if tokens > capacity:
        epsilon = _resolution(tokens, capacity)
        scaled = number * epsilon
        number = torch.where(scaled < 1, number, torch.exp(scaled - 1) / epsilon)
    number[-1] = tokens
    return number


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
