"""The methods derived once more from their definitions, token by token in numpy, from samples of Δ.

Nothing of the package is used here: its thresholds, masks and kept rows are held against this.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def clamp_value(delta: np.ndarray, share: float | None) -> float:
    """q of one channel: the largest value that at least the share C of the tokens reaches."""
    if share is None:
        return math.inf
    descending = sorted(delta.tolist(), reverse=True)
    return descending[math.ceil(share * len(descending)) - 1]


def kept_by_threshold(delta: np.ndarray, ratio: float, share: float | None) -> np.ndarray:
    """Eq. 18 with the clamp for one channel (tokens,): which of the calibrated tokens are kept.

    g is the least value with ratio · Σ min(Δ, q) over {Δ ≥ g} ≤ Σ min(Δ, q), and at most q.
    """
    values = [float(v) for v in delta]
    if ratio <= 1:
        return np.ones(len(values), bool)
    q = clamp_value(delta, share)
    budget = math.fsum(min(v, q) for v in values) / ratio
    g, spent = math.inf, 0.0
    for value, equals in itertools.groupby(sorted(values, reverse=True)):
        spent += sum(min(v, q) for v in equals)
        if spent > budget and value < q:
            break
        g = value
    return np.array([v >= g for v in values])


def is_global(
    delta: np.ndarray, rates: np.ndarray, train_length: int, reduction: str, threshold: float
) -> bool:
    """Eq. 15 for one channel: exp(-a · L0 · mean Δ) > Th, in logs."""
    a = {"slowest": min, "mean": np.mean, "fastest": max}[reduction](rates.tolist())
    return bool(a * train_length * delta.astype(np.float64).mean() < -math.log(threshold))


def filtered_scan(
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    x: np.ndarray,
    D: np.ndarray,
    g: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sequence, Eq. 17: y (L, D), the last state (D, N), and which were frozen (L, D)."""
    length, channels = x.shape
    state = np.zeros((channels, A.shape[1]))
    y = np.zeros((length, channels))
    frozen = np.zeros((length, channels), bool)
    for t in range(length):
        for d in range(channels):
            if delta[t, d] < g[d]:
                frozen[t, d] = True
            else:
                decay = np.exp(delta[t, d] * A[d])
                state[d] = decay * state[d] + delta[t, d] * B[t] * x[t, d]
            y[t, d] = (C[t] * state[d]).sum() + D[d] * x[t, d]
    return y, state, frozen


def kept_rows(
    delta: np.ndarray,
    keep: int,
    protect: int,
    padding: int = 0,
    cap: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> list[int]:
    """DeciMamba, one row (L, D) whose first `padding` tokens are padding: what is kept."""
    length = len(delta)
    tokens = list(range(padding, length))
    keep = min(keep, len(tokens))
    scores = {}
    for t in tokens:
        row = delta[t].astype(np.float64)
        row = row if cap is None else np.minimum(row, cap)
        row = row if weight is None else row * weight
        scores[t] = math.inf if t >= length - protect else math.sqrt((row**2).sum())
    best = sorted(tokens, key=lambda t: (-scores[t], t))[:keep]
    return sorted(best)
