"""The search behind `tune`: measure one setting after the other, keep a table, race and confirm."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.evaluation.bench import Bench
from widefield.evaluation.grid import UNMODIFIED
from widefield.methods import LongMamba

__all__ = ["Candidates", "Measured", "Progress", "Search", "TuneRow"]

_SLACK = 2.5
"""A setting may cost this many times the limit and be asked: fewer layers may make it cheap."""
_RACE = 0.21
"""A setting this far behind the best after the first round of depths is not asked further."""


Share = float | Literal["follow"] | None
Pair = tuple[Share, float]


@dataclass(frozen=True)
class Candidates:
    """What is tried, in this order: an early stop has then tried the likeliest first.

    Attributes:
        clamp_shares: C, also None or "follow".
        decay_thresholds: Th.
        reductions: tried at the best C and Th; the first one is the one these are found with.
        layers: whether to try leaving out layers, one after the other.
        exhaustive: every clamp share with every threshold, for a whole picture; else the shares at
            one threshold, the thresholds at the best share, and so on until the best pair stays.
    """

    clamp_shares: tuple[Share, ...] = (0.01, 0.005, 0.002, 0.02, 0.05)
    decay_thresholds: tuple[float, ...] = (1e-17, 1e-22, 1e-13, 1e-30, 1e-9)
    reductions: tuple[str, ...] = ("fastest", "mean", "slowest")
    layers: bool = True
    exhaustive: bool = False

    def __post_init__(self) -> None:
        """Refuse a search without a first setting."""
        for name in ("clamp_shares", "decay_thresholds", "reductions"):
            if not getattr(self, name):
                raise WidefieldError(f"tune has no {name} to try; give at least one")


@dataclass(frozen=True)
class TuneRow:
    """One setting and what it gave.

    Attributes:
        stage: "unmodified", "clamp and threshold", "reduction", "layers" or
            "confirmation" (a setting of before, asked for more keys).
        options: of the method, JSON-able; empty for the unmodified model.
        share: share of right passkeys over all lengths, 0 to 1; None if the setting costs too much
            to be asked.
        trials: prompts behind `share`.
        bits: bits per byte at the length where it costs most.
        cost: relative rise of bits per byte against the unmodified model there, e.g. 0.03.
        seconds: spent on this setting.
    """

    stage: str
    options: dict[str, Any]
    share: float | None
    trials: int
    bits: float
    cost: float
    seconds: float


Progress = Callable[[TuneRow, int, int], None]
Measured = tuple[LongMamba, TuneRow]


class _OutOfTime(Exception):
    """The budget is spent."""


@dataclass
class Search:
    """The order in which settings are tried, and the table that grows."""

    bench: Bench
    calibration: Calibration
    candidates: Candidates
    trials: range
    confirmation: range
    limit: float
    budget_seconds: float
    progress: Progress | None
    table: list[TuneRow] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    unmodified: dict[int, float] = field(default_factory=dict)
    best_first_round: float = 0.0
    stopped: str | None = None
    refusal: WidefieldError | None = None
    started: float = field(default_factory=lambda: time.perf_counter())

    def run(self) -> None:
        """Fill the table until everything is tried, the budget is spent or Ctrl-C is pressed."""
        try:
            self._baseline()
            self._clamp_and_threshold()
            self._reduction()
            if self.candidates.layers:
                self._layers()
            if self.confirmation:
                self._confirm()
        except _OutOfTime:
            self.stopped = "budget"
        except KeyboardInterrupt:
            if not self.measured:
                raise
            self.stopped = "interrupted"

    def _baseline(self) -> None:
        with self._timed() as seconds:
            self.unmodified = self.bench.bits(())
            answers = next(self.bench.rounds((), self.trials))
        share = sum(answers) / len(answers)
        bits = max(self.unmodified.values())
        self._keep(TuneRow(UNMODIFIED, {}, share, len(answers), bits, 0.0, seconds()))

    def _clamp_and_threshold(self) -> None:
        tried: set[Pair] = set()
        for pair in self._pairs():
            if pair not in tried:
                tried.add(pair)
                share, threshold = pair
                self._measure(
                    "clamp and threshold",
                    LongMamba(
                        self.calibration,
                        decay_threshold=threshold,
                        clamp_share=share,
                        reduction=self.candidates.reductions[0],
                    ),
                )
        if not self.measured and self.refusal is not None:
            raise self.refusal
        if not self._asked():
            method, _ = min(self.measured, key=_cost)
            self._measure("clamp and threshold", method, whatever_it_costs=True)

    def _pairs(self) -> Iterator[Pair]:
        """One axis, then the other, until the best pair stays; all, if that finds no key."""
        shares, thresholds = self.candidates.clamp_shares, self.candidates.decay_thresholds
        best: Pair = (shares[0], thresholds[0])
        before: Pair | None = best if self.candidates.exhaustive else None
        while best != before:
            before = best
            for share in shares:
                yield share, best[1]
            best = self._best_pair(best)
            for threshold in thresholds:
                yield best[0], threshold
            best = self._best_pair(best)
        if self.candidates.exhaustive or not any(row.share for _, row in self.measured):
            yield from itertools.product(shares, thresholds)

    def _best_pair(self, otherwise: Pair) -> Pair:
        if not self.measured:
            return otherwise
        method, _ = self.winner()
        return method.clamp_share, method.decay_threshold

    def _reduction(self) -> None:
        method, _ = self._leader()
        for reduction in self.candidates.reductions[1:]:
            self._measure("reduction", dataclasses.replace(method, reduction=reduction))

    def _layers(self) -> None:
        """Thin out the best setting, and if that stays too dear, the best one within the limit.

        Only where there is a cost to be saved: fewer layers retrieve less surely.
        """
        leader = self._leader()
        if leader[1].cost <= 0:
            return
        thinned = self._thin_out(*leader)
        within = self._within()
        if thinned.cost > self.limit and within and _best(within) is not leader:
            self._thin_out(*_best(within))

    def _thin_out(self, method: LongMamba, row: TuneRow) -> TuneRow:
        """Leave out each layer in turn, for good if retrieval stays and the cost does not rise."""
        kept = self.bench.layout.layers if method.layers == "all" else method.layers
        for layer in kept:
            fewer = tuple(other for other in kept if other != layer)
            if not fewer:
                break
            attempt = dataclasses.replace(method, layers=fewer)
            result = self._measure("layers", attempt)
            if result is not None and _no_worse(result, row):
                method, row, kept = attempt, result, fewer
        return row

    def _confirm(self) -> None:
        """Ask whatever leads for more keys; what led by luck falls back, and the next is asked."""
        confirmed: set[int] = set()
        while id(self.winner()[0]) not in confirmed:
            method, row = self.winner()
            self._check_time()
            with self._timed() as seconds:
                rounds = self.bench.rounds((method,), self.confirmation)
                answers = [right for answered in rounds for right in answered]
            trials = row.trials + len(answers)
            share = ((row.share or 0.0) * row.trials + sum(answers)) / trials
            new = dataclasses.replace(
                row, stage="confirmation", share=share, trials=trials, seconds=seconds()
            )
            confirmed.add(id(method))
            self.measured = [(m, new if m is method else r) for m, r in self.measured]
            self._keep(new)

    def _check_time(self) -> None:
        if time.perf_counter() - self.started > self.budget_seconds:
            raise _OutOfTime

    def _measure(
        self, stage: str, method: LongMamba, whatever_it_costs: bool = False
    ) -> TuneRow | None:
        """Measure one setting; None if it would filter no channel at all."""
        try:
            method.validate(self.bench.layout)
        except WidefieldError as error:
            self.refusal = error
            return None
        self._check_time()
        with self._timed() as seconds:
            bits = self.bench.bits((method,))
            costs = {length: bits[length] / self.unmodified[length] - 1 for length in bits}
            worst = max(costs, key=lambda length: costs[length])
            answers: list[bool] = []
            if whatever_it_costs or costs[worst] <= _SLACK * self.limit:
                answers = self._race(method)
        share = sum(answers) / len(answers) if answers else None
        row = TuneRow(
            stage, method.describe(), share, len(answers), bits[worst], costs[worst], seconds()
        )
        self.measured.append((method, row))
        self._keep(row)
        return row

    def _race(self, method: LongMamba) -> list[bool]:
        answers: list[bool] = []
        for number, right in enumerate(self.bench.rounds((method,), self.trials)):
            answers += right
            if number == 0:
                share = sum(right) / len(right)
                if share < self.best_first_round - _RACE:
                    break
                self.best_first_round = max(self.best_first_round, share)
        return answers

    def _asked(self) -> list[Measured]:
        return [pair for pair in self.measured if pair[1].share is not None]

    def _within(self) -> list[Measured]:
        return [pair for pair in self._asked() if pair[1].cost <= self.limit]

    def _leader(self) -> Measured:
        """The best so far, even if it is too dear: it may become cheap."""
        return _best(self._asked())

    def winner(self) -> Measured:
        """The best within the limit; if there is none, the cheapest that was asked."""
        within = self._within()
        return _best(within) if within else min(self._asked() or self.measured, key=_cost)

    def _keep(self, row: TuneRow) -> None:
        self.table.append(row)
        if self.progress is not None:
            self.progress(row, len(self.table), max(self._planned(), len(self.table)))

    def _planned(self) -> int:
        chosen = self.candidates
        settings = len(chosen.clamp_shares) * len(chosen.decay_thresholds)
        layers = len(self.bench.layout.layers) if chosen.layers else 0
        return settings + len(chosen.reductions) + layers + bool(self.confirmation)

    @contextmanager
    def _timed(self) -> Iterator[Callable[[], float]]:
        start = time.perf_counter()
        yield lambda: round(time.perf_counter() - start, 3)


def _best(pairs: Sequence[Measured]) -> Measured:
    """The highest share, ties by the lower cost."""
    return max(pairs, key=lambda pair: (pair[1].share or 0.0, -pair[1].cost))


def _cost(pair: Measured) -> float:
    return pair[1].cost


def _no_worse(new: TuneRow, old: TuneRow) -> bool:
    return new.share is not None and new.share >= (old.share or 0.0) and new.cost <= old.cost
