"""What the unmodified model's Δ looks like in one layer, channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from widefield.calibration.encoding import decode, encode
from widefield.calibration.sketch import DeltaSketch
from widefield.errors import WidefieldError

__all__ = ["REDUCTIONS", "LayerCalibration"]

REDUCTIONS = ("slowest", "mean", "fastest")


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """The distribution of Δ of each channel of one layer, and how fast its states decay.

    The distribution is stored as U(g), the share of tokens with Δ ≥ g, in knots of two bytes; what
    is computed here is computed from those, so a calibration gives the same thresholds before and
    after it is saved. On 20,000 bytes of text the bundled model keeps the budget within 2 % in
    every channel but one of its first layer, at every length up to 1,000 times the training length;
    so it does with the looser fit of large models (`benchmarks/budget.py`; one token more or less
    aside).

    Tokens with one and the same Δ are kept or frozen together, so no threshold meets a budget that
    falls among many of them; the one above them is taken. The first layer of a byte-level model is
    like that: its Δ depends on the last few bytes alone.

    Attributes:
        tokens: how many tokens were calibrated.
        lowest: smallest Δ above 0.
        highest: largest Δ.
        steps: knots, code of the distance in log Δ from the one before.
        falls: knots, code of the fall of log U from the one before.
        mean_delta: mean Δ.
        decay: |A| reduced over the N states: slowest (smallest), mean, fastest (largest). Mamba-2:
            three equal rows.
    """

    tokens: int
    lowest: Float[Tensor, " channels"]
    highest: Float[Tensor, " channels"]
    steps: UInt8[Tensor, "channels knots"]
    falls: UInt8[Tensor, "channels knots"]
    mean_delta: Float[Tensor, " channels"]
    decay: Float[Tensor, "3 channels"]

    @staticmethod
    def from_sketch(
        sketch: DeltaSketch,
        A: Float[Tensor, "channels ..."],
        *,
        knots: int = 128,
        finest: float = 3e-4,
    ) -> LayerCalibration:
        """Close a sketch.

        Args:
            sketch: of this layer's Δ.
            A: the layer's negative decay rates, (D, N), or (H,) of Mamba-2.
            knots: most knots of a channel; each costs two bytes, less compressed.
            finest: relative error of U below which a channel spends no further knot.

        Raises:
            WidefieldError: if the sketch saw no token, or A is not negative and finite.
        """
        if sketch.tokens == 0:
            raise WidefieldError(
                "the sketch of Δ has seen no token: calibrate on at least one sequence"
            )
        rates = -A.detach().float().cpu().reshape(A.shape[0], -1)
        if rates.shape[0] != sketch.channels or not bool(
            (torch.isfinite(rates) & (rates > 0)).all()
        ):
            raise WidefieldError(
                f"decay rates A of shape {tuple(A.shape)} for {sketch.channels} channels: expected "
                "one negative, finite row a channel; check the model's A_log"
            )
        lowest, highest, steps, falls = (torch.from_numpy(a) for a in encode(sketch, knots, finest))
        return LayerCalibration(
            tokens=sketch.tokens,
            lowest=lowest,
            highest=highest,
            steps=steps,
            falls=falls,
            mean_delta=(sketch.total / sketch.tokens).float().cpu(),
            decay=torch.stack([rates.amin(1), rates.mean(1), rates.amax(1)]),
        )

    @property
    def channels(self) -> int:
        """D of Mamba-1, heads of Mamba-2."""
        return self.mean_delta.shape[0]

    def decay_rate(self, reduction: str) -> Float[Tensor, " channels"]:
        """|A| by "slowest", "mean" or "fastest" state."""
        return self.decay[REDUCTIONS.index(reduction)]

    def quantile(self, upper_share: float) -> Float[Tensor, " channels"]:
        """Δ that this share of the tokens reaches: 0 gives the largest, 1 the smallest Δ."""
        if not 0 <= upper_share <= 1:
            raise WidefieldError(f"upper share {upper_share}: expected a number from 0 to 1")
        log_share = np.log(max(upper_share, 1e-300))
        left = self._last_knot(self._curve.log_share > log_share)
        edge = self._curve.edges(left)
        part = (edge.y1 - log_share) / (edge.y1 - edge.y2).clamp_min(1e-30)
        # Within one step of the grid the tokens count as tied: below them, so that the share holds.
        part = torch.where(edge.neighbours, 0.0, part)
        value = torch.exp(edge.x1 + (edge.x2 - edge.x1) * part.clamp(0, 1))
        beyond = self._curve.log_share[:, -1] > log_share
        return self._bounded(torch.where(beyond, self.highest.double(), value))

    def threshold(
        self, ratio: float, clamp_share: float | None = None
    ) -> Float[Tensor, " channels"]:
        """g(S) of LongMamba, Eq. 18 with the clamp: the cumulative decay stays that of training.

        The least g with ratio · E[min(Δ, q) · 1(Δ ≥ g)] ≤ E[min(Δ, q)], and g ≤ q.

        Args:
            ratio: S / L0; at 1 and below nothing has to be filtered and g is 0.
            clamp_share: C; q is the quantile that the share C of the tokens reaches, so at least
                that share is always kept. None for no clamp.

        Returns:
            (D,) float32: tokens with Δ below it are to be frozen.

        Raises:
            WidefieldError: if a number is out of range.
        """
        if not ratio > 0:
            raise WidefieldError(f"length ratio {ratio}: expected S / L0, a number above 0")
        if clamp_share is not None and not 0 < clamp_share < 1:
            raise WidefieldError(
                f"clamp share {clamp_share}: expected a number between 0 and 1, or None"
            )
        if ratio <= 1:
            return torch.zeros(self.channels)
        q = torch.full_like(self.highest, torch.inf)
        above_q = torch.zeros(self.channels, dtype=torch.float64)
        if clamp_share is not None:
            q, above_q = self._clamp(clamp_share)
        mass = self._curve.mass
        target = above_q + (mass[:, 0].double() - above_q) / ratio
        g = torch.minimum(self._where_mass_is(target), q)
        return torch.where(self.mean_delta > 0, g, 0.0)

    def kept_mass(self, g: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        """E[Δ · 1(Δ ≥ g)] by the stored distribution; for g = 0 about the mean Δ."""
        value = g.double()
        kept = value * self.kept_share(g).double() + self._area_above(g)
        whole = self._curve.mass[:, 0].double()
        return torch.where(value <= self.lowest.double(), whole, kept).float()

    def kept_share(self, g: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        """The share of tokens with Δ ≥ g by the stored distribution."""
        left = self._last_knot(self._curve.value <= g[:, None])
        edge = self._curve.edges(left)
        share = torch.exp(edge.log_share_at(g.double()))
        share = torch.where(g < self.lowest, torch.ones_like(share), share)
        return torch.where(g > self.highest, torch.zeros_like(share), share).float()

    @cached_property
    def _curve(self) -> _Curve:
        return _Curve.of(self)

    @cached_property
    def _clamps(self) -> dict[float, tuple[Tensor, Tensor]]:
        """The newest clamp: most methods ask for one share at every length."""
        return {}

    def _clamp(self, share: float) -> tuple[Tensor, Tensor]:
        """Δ that a share of the tokens reaches, and ∫ U above it."""
        known = self._clamps.get(share)
        if known is None:
            q = self.quantile(share)
            known = q, self._area_above(q)
            self._clamps.clear()
            self._clamps[share] = known
        return known

    def _bounded(self, value: Tensor) -> Float[Tensor, " channels"]:
        return torch.minimum(torch.maximum(value.float(), self.lowest), self.highest)

    def _last_knot(self, holds: Tensor) -> Int[Tensor, " channels"]:
        """Of a property that holds up to some knot: the last such knot that begins a line."""
        return (holds.sum(1) - 1).clamp(0, self._curve.value.shape[1] - 2)

    def _area_above(self, g: Tensor) -> Tensor:
        """∫ U over everything above g, (D,) float64."""
        value = torch.minimum(torch.maximum(g, self.lowest), self.highest).double()
        edge = self._curve.edges(self._last_knot(self._curve.value <= value[:, None]))
        y = edge.log_share_at(value)
        part = _area(torch.log(value), y, edge.x2, edge.y2)
        below = (self.lowest.double() - g.double()).clamp_min(0)
        return edge.area2 + part + below

    def _where_mass_is(self, target: Tensor) -> Float[Tensor, " channels"]:
        """The least g that keeps no more than `target`, exact on the stored curve."""
        mass = self._curve.mass
        left = self._last_knot(mass > target[:, None])
        edge = self._curve.edges(left)
        # On a line U ∝ g^-s, so with P = g · U the mass above g is (P2 - P) · s / (1 - s) more than
        # that above g2.
        run = (edge.x2 - edge.x1).clamp_min(1e-30)
        s = ((edge.y1 - edge.y2) / run).clamp_min(1e-12)
        t = 1 - s
        z = (target - edge.mass2) / (s * torch.exp(edge.x2 + edge.y2))
        shift = torch.where(t.abs() < 1e-9, -z, torch.log1p((-z * t).clamp_min(-1 + 1e-15)) / t)
        x = torch.minimum(torch.maximum(edge.x2 + shift, edge.x1), edge.x2)
        # Within one step of the grid the tokens count as tied: above them, so that the budget
        # holds.
        x = torch.where(edge.neighbours, edge.x2, x)
        g = self._bounded(torch.exp(x))
        g = torch.where(edge.neighbours, edge.value2, g)
        g = torch.where(mass[:, 0] <= target, self.lowest, g)
        above_all = torch.nextafter(self.highest, torch.tensor(torch.inf))
        return torch.where(mass[:, -1] > target, above_all, g)


@dataclass(frozen=True, slots=True)
class _Edges:
    """One line of U a channel, from knot 1 to knot 2; x = log g, y = log U; (D,), float64."""

    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor
    area2: Tensor
    mass2: Tensor
    value2: Tensor
    neighbours: Tensor

    def log_share_at(self, g: Tensor) -> Tensor:
        """Log of U at g, held at the ends of the line."""
        run = self.x2 - self.x1
        part = (torch.log(g.clamp_min(1e-300)) - self.x1) / run.clamp_min(1e-30)
        part = torch.where(run > 0, part.clamp(0, 1), 1.0)
        return self.y1 + (self.y2 - self.y1) * part


@dataclass(frozen=True, slots=True)
class _Curve:
    """The decoded knots, (D, K + 1), ascending in Δ.

    Attributes:
        position: on the grid of the channel, int64.
        value: Δ, float32.
        log_share: log U, float32.
        area: ∫ U over everything above the knot, float32.
        mass: E[Δ · 1(Δ ≥ knot)], float32.
    """

    position: Tensor
    value: Tensor
    log_share: Tensor
    area: Tensor
    mass: Tensor

    @staticmethod
    def of(layer: LayerCalibration) -> _Curve:
        lowest = layer.lowest.numpy()
        position, value, log_share = (
            torch.from_numpy(a)
            for a in decode(lowest, layer.highest.numpy(), layer.steps.numpy(), layer.falls.numpy())
        )
        position = torch.cat([torch.zeros_like(position[:, :1]), position], 1)
        value = torch.cat([layer.lowest[:, None], value], 1)
        log_share = torch.cat([torch.zeros_like(log_share[:, :1]), log_share], 1)
        x = torch.log(value.double())
        strips = _area(x[:, :-1], log_share[:, :-1], x[:, 1:], log_share[:, 1:])
        area = torch.zeros_like(x)
        area[:, :-1] = strips.flip(1).cumsum(1).flip(1)
        mass = torch.exp(x + log_share) + area
        return _Curve(position, value, log_share.float(), area.float(), mass.float())

    def edges(self, left: Int[Tensor, " channels"]) -> _Edges:
        def at(table: Tensor, index: Tensor) -> Tensor:
            return table.gather(1, index[:, None])[:, 0]

        right = left + 1
        return _Edges(
            x1=torch.log(at(self.value, left).double()),
            y1=at(self.log_share, left).double(),
            x2=torch.log(at(self.value, right).double()),
            y2=at(self.log_share, right).double(),
            area2=at(self.area, right).double(),
            mass2=at(self.mass, right).double(),
            value2=at(self.value, right),
            neighbours=at(self.position, right) - at(self.position, left) <= 1,
        )


def _area(x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    """∫ U dg where log U is a straight line over x = log g, from (x1, y1) to (x2, y2); float64."""
    run = x2 - x1
    bend = run + y2 - y1
    mean = torch.where(bend.abs() < 1e-9, 1 + bend / 2, torch.expm1(bend) / bend)
    return torch.exp(x1 + y1) * run * mean
