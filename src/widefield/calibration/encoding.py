"""A channel's distribution of Δ in two bytes a knot.

Stored is U(g), the share of tokens with Δ ≥ g, as straight lines of log U over log g between knots.
The mass kept above a threshold, clamped or not, is a positive sum of U: an error of U within ±ε
bounds that of the mass, too. g lies on a grid of 65,535 equal steps of log g between the channel's
smallest and largest Δ; each knot is a pair of bytes, how many steps it lies above the one before,
and how far log U falls. Steps are companded, and each knot is chosen from where the decoded ones
really lie, so errors of rounding do not add up.
"""

from __future__ import annotations

import numpy as np

from widefield.calibration.sketch import DeltaSketch

__all__ = ["decode", "encode"]

_GRID = 1 << 22  # steps of log Δ between a channel's smallest and largest
_POINTS = 512  # centroids that the knots are fitted to
_SMALLEST = 1e-9  # Δ below this share of the channel's largest counts as none
_FLOAT32_APART = 2.4e-7  # relative distance at which float32 values are surely different
_NEEDED = 5e-4  # half the mass share kept at 1,000 times the training length; beyond, looser fit
_FELT = 0.02  # share of the mass above it that a gap between tokens may move
_LANES = 8192  # channels fitted at a time
_WINDOW = 16  # points that a line is tried on at a time
_ROUNDS = 8  # halvings of the interval of log ε


def _grid_steps() -> np.ndarray:
    """256 ascending numbers of grid steps, 0 and 1 first, geometric as far as they are integers."""
    wanted = 256
    steps = np.zeros(0)
    while len(steps) < 255:
        wanted += 1
        steps = np.unique(np.round(np.geomspace(1, _GRID, wanted)))[-255:]
    return np.concatenate([[0], steps]).astype(np.int64)


# Part of the file format: other values need another format number.
_STEPS = _grid_steps()
_FALLS = 4.0 * (np.arange(256) / 255) ** 2


def decode(
    lowest: np.ndarray, highest: np.ndarray, steps: np.ndarray, falls: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Knots from their bytes.

    Args:
        lowest: (D,) float32, smallest Δ.
        highest: (D,) float32, largest Δ.
        steps: (D, K) uint8 codes of grid steps.
        falls: (D, K) uint8 codes of falls of log U.

    Returns:
        (D, K) each: position on the grid (int64), g (float32) and log U (float64).
    """
    position = np.minimum(np.cumsum(_STEPS[steps], axis=1), _grid_size(lowest, highest)[:, None])
    return position, _value(lowest, highest, position), -np.cumsum(_FALLS[falls], axis=1)


def encode(
    sketch: DeltaSketch, knots: int, finest: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """`lowest`, `highest`, `steps` and `falls` (see `decode`) of every channel of a sketch.

    Args:
        sketch: of the channels' Δ.
        knots: K, most knots of a channel; unused ones are 0.
        finest: ε below which no channel spends another knot.
    """
    values, weights = (t.flip(1).cpu().numpy() for t in sketch.compressed(_POINTS))
    smallest = sketch.smallest.cpu().numpy()
    parts = []
    for start in range(0, sketch.channels, _LANES):
        lanes = slice(start, start + _LANES)
        points = _Points.of(values[lanes], weights[lanes], smallest[lanes], sketch.tokens)
        parts.append((points.lowest, points.highest, *_fit(points, knots, finest)))
    lowest, highest, steps, falls = (np.concatenate(column) for column in zip(*parts, strict=True))
    return lowest, highest, steps, falls


def _grid_size(lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Steps from the smallest to the largest Δ, fewer where float32 cannot tell them apart."""
    span = np.log(highest.astype(np.float64)) - np.log(lowest.astype(np.float64))
    return np.clip(np.floor(span / _FLOAT32_APART), 1, _GRID).astype(np.int64)


def _value(lowest: np.ndarray, highest: np.ndarray, position: np.ndarray) -> np.ndarray:
    size = _grid_size(lowest, highest)[:, None]
    low, high = (
        np.log(lowest.astype(np.float64))[:, None],
        np.log(highest.astype(np.float64))[:, None],
    )
    value = np.exp(low + (high - low) * position / size).astype(np.float32)
    value = np.where(position <= 0, lowest[:, None], value)
    return np.where(position >= size, highest[:, None], value)


class _Points:
    """What the knots are fitted to: log U around every centroid, with its tolerance."""

    @classmethod
    def of(
        cls, values: np.ndarray, weights: np.ndarray, smallest: np.ndarray, tokens: int
    ) -> _Points:
        """Of a few channels' ascending centroids."""
        highest = np.maximum(values[:, -1], np.finfo(np.float32).tiny)
        some = np.maximum(_SMALLEST * highest.astype(np.float64), np.finfo(np.float32).tiny)
        positive = np.where(values >= some[:, None], values, np.inf).min(1)
        positive = np.where(smallest >= some, smallest, positive)
        lowest = np.minimum(positive, highest).astype(np.float32)
        return cls(values, weights, tokens, lowest, highest)

    def __init__(
        self,
        values: np.ndarray,
        weights: np.ndarray,
        tokens: int,
        lowest: np.ndarray,
        highest: np.ndarray,
    ) -> None:
        self.lowest, self.highest = lowest, highest
        size = _grid_size(lowest, highest)
        self.position = _candidates(values, lowest, highest, size)
        g = _value(lowest, highest, self.position)
        above = np.maximum(_tokens_above(values, weights, g), 0.5)
        mass = _mass_above(g.astype(np.float64), above)
        slack = _slack(g, mass)
        self.log_share = np.log(above / tokens).astype(np.float32)
        self.least = np.log(np.maximum(above - slack, 0.3) / tokens).astype(np.float32)
        self.most = np.log((above + slack) / tokens).astype(np.float32)
        needed = _NEEDED * mass[:, :1]
        self.looseness = np.maximum(1, needed / np.maximum(mass, 1e-6 * needed)).astype(np.float32)


def _slack(g: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Tokens by which the curve may be off, however few lie above.

    Half a token parts the calibrated tokens in the same place. Less in wide gaps between large
    tokens: there it would be felt in the mass, which is what a threshold is found by.
    """
    wide = np.pad(g, ((0, 0), (2, 2)), mode="edge")
    gap = wide[:, 4:] - wide[:, :-4]
    return 0.5 * np.minimum(1, _FELT * mass / np.maximum(gap, 1e-30))


def _candidates(
    values: np.ndarray, lowest: np.ndarray, highest: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """(D, 2C + 2) ascending positions: both grid neighbours of every centroid, and the ends."""
    low, high = np.log(lowest.astype(np.float64)), np.log(highest.astype(np.float64))
    scale = size / np.maximum(high - low, _FLOAT32_APART)
    place = (np.log(np.maximum(values, lowest[:, None]).astype(np.float64)) - low[:, None]) * scale[
        :, None
    ]
    below = np.floor(place).astype(np.int64)
    below -= _value(lowest, highest, below) > np.maximum(values, lowest[:, None])
    ends = np.stack([np.zeros_like(size), size], axis=1)
    both = np.concatenate([below, below + 1, ends], axis=1)
    return np.sort(np.clip(both, 0, size[:, None]), axis=1)


def _tokens_above(values: np.ndarray, weights: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Tokens with Δ ≥ g, from ascending centroids; half of each lie on either side of it."""
    total = weights.sum(1, dtype=np.float64)
    inclusive = total[:, None] - np.cumsum(weights, axis=1, dtype=np.float64) + weights
    middle = inclusive - weights / 2
    right = np.minimum(_first_not_below(values, g), values.shape[1] - 1)
    left = np.maximum(right - 1, 0)

    def at(table: np.ndarray, index: np.ndarray) -> np.ndarray:
        return np.take_along_axis(table, index, 1)

    gap = at(values, right).astype(np.float64) - at(values, left)
    part = np.where(gap > 0, (g - at(values, left)) / np.where(gap > 0, gap, 1), 1.0)
    above = at(middle, left) + (at(middle, right) - at(middle, left)) * np.clip(part, 0, 1)
    # The log-mean of 0.65 and 1.5 tokens is about 1: the mass of the largest one comes out right.
    above = np.where(g == g[:, -1:], at(inclusive, right) - 0.35, above)
    return np.where(g == g[:, :1], at(inclusive, right), above)


def _first_not_below(values: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Index of the first of the ascending `values` (D, C) that is ≥ g (D, P), row by row."""
    import torch

    return torch.searchsorted(
        torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(np.ascontiguousarray(g))
    ).numpy()


def _mass_above(g: np.ndarray, above: np.ndarray) -> np.ndarray:
    """ΣΔ of the tokens above each position, by trapezoids."""
    strips = (g[:, 1:] - g[:, :-1]) * (above[:, 1:] + above[:, :-1]) / 2
    mass = g * above
    mass[:, :-1] += np.cumsum(strips[:, ::-1], axis=1)[:, ::-1]
    return mass


def _fit(points: _Points, knots: int, finest: float) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of each channel's curve, with about the smallest ε that `knots` knots allow."""
    channels = points.position.shape[0]
    low, high = np.full(channels, np.log(finest)), np.full(channels, np.log(20.0))
    steps, falls, _ = _follow(points, np.exp(high), knots)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        new_steps, new_falls, fits = _follow(points, np.exp(middle), knots)
        steps[fits], falls[fits] = new_steps[fits], new_falls[fits]
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return steps, falls


def _follow(
    points: _Points, epsilon: np.ndarray, knots: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw straight lines within ±ε of all points, each as far as it goes; channels side by side.

    Returns:
        The bytes `steps` and `falls` (D, K), and (D,) whether K knots were enough.
    """
    channels = points.position.shape[0]
    walk = _Walk(points, epsilon, knots)
    everyone = np.arange(channels)
    walk.start(everyone)
    active = everyone
    while active.size:
        closing = walk.advance(active)
        if closing.any():
            walk.close(active[closing])
            active = active[~walk.finished[active]]
    return walk.steps, walk.falls, walk.fits


class _Walk:
    """One pass over the points: each channel's pen, and the slopes that pass all points since."""

    def __init__(self, points: _Points, epsilon: np.ndarray, knots: int) -> None:
        self.x = points.position
        self.y = points.log_share
        slack = epsilon[:, None].astype(np.float32) * points.looseness
        self.floor = np.minimum(points.least, self.y - slack)
        self.ceiling = np.minimum(np.maximum(points.most, self.y + slack), 0)
        channels, self.count = self.x.shape
        self.steps = np.zeros((channels, knots), np.uint8)
        self.falls = np.zeros((channels, knots), np.uint8)
        self.fits = np.ones(channels, bool)
        self.finished = np.zeros(channels, bool)
        self.used = np.zeros(channels, np.int64)
        self.pen_x = np.zeros(channels, np.int64)
        self.pen_y = np.zeros(channels)
        self.next = np.zeros(channels, np.int64)
        self.steepest = np.full(channels, -np.inf)
        self.flattest = np.zeros(channels)
        self._keys = (self.x + np.arange(channels)[:, None] * (_GRID + 2)).ravel()

    def start(self, lanes: np.ndarray) -> None:
        """Put the pen at the smallest Δ, below the share of tokens that have (almost) none."""
        fall = _nearest_fall(-self.y[:, 0].astype(np.float64))
        some = lanes[fall > 0]
        self.falls[some, 0] = fall[some]
        self.used[some] = 1
        self.pen_y[:] = -_FALLS[fall]
        self._seek(lanes)

    def advance(self, lanes: np.ndarray) -> np.ndarray:
        """Take the next few points into each line; True where it cannot pass them all."""
        at = self.next[lanes, None] + np.arange(_WINDOW)
        there = at < self.count
        at = np.where(there, at, self.count - 1)
        rows = lanes[:, None]
        run = np.maximum(self.x[rows, at] - self.pen_x[rows], 1)
        pen = self.pen_y[rows]
        steepest = _running(np.maximum, self.steepest[lanes], (self.floor[rows, at] - pen) / run)
        flattest = _running(np.minimum, self.flattest[lanes], (self.ceiling[rows, at] - pen) / run)
        passed = ((steepest <= flattest)[:, 1:] & there).sum(1)
        self.steepest[lanes] = np.take_along_axis(steepest, passed[:, None], 1)[:, 0]
        self.flattest[lanes] = np.take_along_axis(flattest, passed[:, None], 1)[:, 0]
        self.next[lanes] += passed
        return passed < _WINDOW

    def close(self, lanes: np.ndarray) -> None:
        """End the lines at the last point that they pass, to the precision of two bytes."""
        last = self.next[lanes] - 1
        last = last + (self.x[lanes, last] <= self.pen_x[lanes])
        run = self.x[lanes, last] - self.pen_x[lanes]
        # To the curve itself, as far as all points since the pen allow.
        slope = (self.y[lanes, last] - self.pen_y[lanes]) / run
        slope = np.minimum(np.maximum(slope, self.steepest[lanes]), self.flattest[lanes])
        run = np.minimum(run, np.maximum(-_FALLS[-1] / np.minimum(slope, -1e-30), 1)).astype(
            np.int64
        )
        # Never beyond the point; the very last position is clipped when decoded.
        at_end = self.pen_x[lanes] + run == self.x[lanes, -1]
        step = np.searchsorted(_STEPS, run, side="right") - 1
        step = np.where(at_end, np.searchsorted(_STEPS, run), step)
        run = np.minimum(_STEPS[step], run)
        fall = _nearest_fall(-slope * run)
        self._record(lanes, step, fall)
        self.pen_x[lanes] += run
        self.pen_y[lanes] -= _FALLS[fall]
        self.steepest[lanes], self.flattest[lanes] = -np.inf, 0.0
        self._seek(lanes)
        self.finished[lanes] = ~self.fits[lanes] | (self.next[lanes] >= self.count)

    def _record(self, lanes: np.ndarray, step: np.ndarray, fall: np.ndarray) -> None:
        knots = self.steps.shape[1]
        self.fits[lanes] &= self.used[lanes] < knots
        place = np.minimum(self.used[lanes], knots - 1)
        self.steps[lanes, place], self.falls[lanes, place] = step, fall
        self.used[lanes] += 1

    def _seek(self, lanes: np.ndarray) -> None:
        """Find the first point beyond the pen."""
        key = lanes * (_GRID + 2) + self.pen_x[lanes]
        self.next[lanes] = np.searchsorted(self._keys, key, side="right") - lanes * self.count


def _running(how: np.ufunc, first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """Running maximum or minimum along rows (D, W), begun with `first` (D,): (D, W + 1)."""
    return how.accumulate(np.concatenate([first[:, None], then], axis=1), axis=1)


def _nearest_fall(fall: np.ndarray) -> np.ndarray:
    return np.searchsorted((_FALLS[1:] + _FALLS[:-1]) / 2, fall)
