"""Choose LongMamba's clamp share, threshold, reduction and layers for one model, by measurement.

Every setting is asked for hidden keys in long prompts and scored on long texts. The best one
retrieves most among those whose bits per byte stay within a limit of the unmodified model's.
Settings see the same prompts and the same texts, so small samples suffice to compare them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.evaluation.batches import Budget, Stopwatch, default_batch_tokens, run_batches
from widefield.evaluation.grid import DEFAULT_DEPTHS, UNMODIFIED
from widefield.evaluation.header import Subject
from widefield.evaluation.runner import ask, measure_bits
from widefield.extension import extended
from widefield.families import describe
from widefield.methods import LongMamba
from widefield.tasks.passkey import PasskeyTask, trial_rng
from widefield.tasks.perplexity import Windows
from widefield.tasks.texts import Haystack, default_haystack

__all__ = ["Candidates", "TuneResult", "TuneRow", "tune"]

_SLACK = 2.5
"""A setting may cost this many times the limit and be asked: fewer layers may make it cheap."""
_RACE = 0.21
"""A setting this far behind the best after the first round of depths is not asked further."""


@dataclass(frozen=True)
class Candidates:
    """What is tried, in this order: an early stop has then tried the likeliest first.

    Attributes:
        clamp_shares: C; each with every threshold.
        decay_thresholds: Th.
        reductions: tried at the best C and Th; the first one is the one these are found with.
        layers: whether to try leaving out layers, one after the other.
    """

    clamp_shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.005)
    decay_thresholds: tuple[float, ...] = (1e-17, 1e-22, 1e-13, 1e-30, 1e-9)
    reductions: tuple[str, ...] = ("fastest", "mean", "slowest")
    layers: bool = True

    def __post_init__(self) -> None:
        """Refuse a search without a first setting."""
        for name in ("clamp_shares", "decay_thresholds", "reductions"):
            if not getattr(self, name):
                raise WidefieldError(f"tune has no {name} to try; give at least one")


@dataclass(frozen=True)
class TuneRow:
    """One setting and what it gave.

    Attributes:
        stage: "unmodified", "clamp and threshold", "reduction" or "layers".
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


@dataclass(frozen=True)
class TuneResult:
    """The outcome of `tune`.

    Attributes:
        best: the chosen method, ready for `extend`.
        row: its row of the table.
        table: every setting in the order in which it was measured, the unmodified model first.
        lengths: context lengths in tokens.
        quality_limit: highest relative rise of bits per byte that was allowed.
        within_limit: whether the chosen setting keeps it; False if no setting does.
        stopped: why the search ended early ("budget" or "interrupted"), or None.
        notes: what the reader should know about the figures.
    """

    best: LongMamba
    row: TuneRow
    table: tuple[TuneRow, ...]
    lengths: tuple[int, ...]
    quality_limit: float
    within_limit: bool
    stopped: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON-able values; `best` as its options."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["best"] = self.best.describe()
        plain["row"] = dataclasses.asdict(self.row)
        plain["table"] = [dataclasses.asdict(row) for row in self.table]
        return plain


Progress = Callable[[TuneRow, int, int], None]
Measured = tuple[LongMamba, TuneRow]


def tune(
    model: Any,
    calibration: Calibration,
    tokenizer: Any,
    *,
    haystack: Haystack | str | None = None,
    texts: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEFAULT_DEPTHS,
    trials: int = 10,
    windows: int = 3,
    last: int = 2048,
    candidates: Candidates | None = None,
    budget_seconds: float = 600.0,
    quality_limit: float = 0.03,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> TuneResult:
    """Find the LongMamba settings that retrieve best at a bounded cost in quality.

    First every clamp share with every threshold, then the other reductions at the best of them,
    then layer by layer whether leaving it out keeps the retrieval. A setting that costs too much is
    not asked for keys.

    Args:
        model: a live transformers model; it is left as it was.
        calibration: of this model.
        tokenizer: of this model.
        haystack: text around the keys; None takes the Python documentation.
        texts: long texts for the quality cost; None takes the haystack.
        lengths: context lengths in tokens; None = 16 times the training length.
        depths: where the keys lie, 0 to 1; a setting's trials go round them.
        trials: prompts a setting and length.
        windows: windows of text a setting and length.
        last: scored tokens at the end of each window.
        candidates: what is tried; None for the defaults.
        budget_seconds: no further setting is begun after this time; the best so far is returned.
        quality_limit: highest relative rise of bits per byte at any of the lengths, e.g. 0.03.
        seed: draws keys, windows of the haystack and windows of the texts.
        batch_tokens: most tokens in a batch; None chooses by the device's memory.
        progress: called with each finished row, how many are done and how many are planned at most.

    Returns:
        The choice and the whole table. Ctrl-C ends the search, too, once a setting is measured.

    Raises:
        WidefieldError: if a length cannot hold the needle, no text is long enough, or the budget
            ends before the first setting.
    """
    if trials < 1:
        raise WidefieldError(f"trials is {trials}; give at least 1")
    haystack = default_haystack() if haystack is None else haystack
    haystack = Haystack("haystack", haystack) if isinstance(haystack, str) else haystack
    lengths = tuple(lengths) if lengths else (16 * calibration.train_length,)
    task = PasskeyTask(tokenizer, haystack)
    for length in lengths:
        task.check_length(length)
    texts = [haystack.text] if texts is None else texts
    bench = _Bench(
        model=model,
        task=task,
        lengths=lengths,
        depths=tuple(depths),
        trials=trials,
        windows=Windows.draw(tokenizer, texts, max(lengths), windows, seed),
        last=last,
        seed=seed,
        tokens=batch_tokens or default_batch_tokens(model),
        layers=describe(model).layers,
    )
    search = _Search(
        bench, calibration, candidates or Candidates(), quality_limit, budget_seconds, progress
    )
    search.run()
    return search.result()


@dataclass
class _Bench:
    """Measures one setting: its cost on texts, and which keys it retrieves."""

    model: Any
    task: PasskeyTask
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    trials: int
    windows: Windows
    last: int
    seed: int
    tokens: int
    layers: tuple[int, ...]

    def bits(self, methods: tuple[LongMamba, ...]) -> dict[int, float]:
        """Bits per byte at every length."""
        subject = Subject("tune", self.model, self.task.tokenizer, methods)
        cells = {
            length: measure_bits(subject, self.windows, length, self.last, self.tokens).bits
            for length in self.lengths
        }
        return {length: bits or 0.0 for length, bits in cells.items()}

    def rounds(self, methods: tuple[LongMamba, ...]) -> Iterator[list[bool]]:
        """The answers, one round of depths over all lengths after the other."""
        for start in range(0, self.trials, len(self.depths)):
            numbers = range(start, min(start + len(self.depths), self.trials))
            with extended(self.model, *methods), torch.inference_mode():
                answers = [right for length in self.lengths for right in self._ask(length, numbers)]
            yield answers

    def _ask(self, length: int, numbers: Sequence[int]) -> list[bool]:
        budget, timer = Budget(self.tokens), Stopwatch(self.model.device)
        return [
            right for _, right, _ in run_batches(numbers, length, budget, self._run(length), timer)
        ]

    def _run(self, length: int) -> Callable[[Sequence[int]], list[bool]]:
        def run(batch: Sequence[int]) -> list[bool]:
            samples = []
            for number in batch:
                depth = self.depths[number % len(self.depths)]
                rng = trial_rng(self.seed, length, depth, number // len(self.depths))
                samples.append(self.task.sample(length, depth, rng))
            return ask(self.model, self.task, samples)

        return run


class _OutOfTime(Exception):
    """The budget is spent."""


@dataclass
class _Search:
    """The order in which settings are tried, and the table that grows."""

    bench: _Bench
    calibration: Calibration
    candidates: Candidates
    limit: float
    budget_seconds: float
    progress: Progress | None
    table: list[TuneRow] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    unmodified: dict[int, float] = field(default_factory=dict)
    best_first_round: float = 0.0
    stopped: str | None = None
    started: float = field(default_factory=time.perf_counter)

    def run(self) -> None:
        try:
            self._baseline()
            self._clamp_and_threshold()
            self._reduction()
            if self.candidates.layers:
                self._layers()
        except _OutOfTime:
            self.stopped = "budget"
        except KeyboardInterrupt:
            if not self.measured:
                raise
            self.stopped = "interrupted"

    def _baseline(self) -> None:
        with self._timed() as seconds:
            self.unmodified = self.bench.bits(())
            answers = next(self.bench.rounds(()))
        share = sum(answers) / len(answers)
        bits = max(self.unmodified.values())
        self._keep(TuneRow(UNMODIFIED, {}, share, len(answers), bits, 0.0, seconds()))

    def _clamp_and_threshold(self) -> None:
        for threshold in self.candidates.decay_thresholds:
            for share in self.candidates.clamp_shares:
                self._measure(
                    "clamp and threshold",
                    LongMamba(
                        self.calibration,
                        decay_threshold=threshold,
                        clamp_share=share,
                        reduction=self.candidates.reductions[0],
                    ),
                )
        if not any(row.share is not None for _, row in self.measured):
            method, _ = min(self.measured, key=_cost)
            self._measure("clamp and threshold", method, whatever_it_costs=True)

    def _reduction(self) -> None:
        method, _ = self._leader()
        for reduction in self.candidates.reductions[1:]:
            self._measure("reduction", dataclasses.replace(method, reduction=reduction))

    def _layers(self) -> None:
        """Thin out the best setting, and if that stays too dear, the best one within the limit."""
        leader = self._leader()
        thinned = self._thin_out(*leader)
        within = self._within()
        if thinned.cost > self.limit and within and _best(within) is not leader:
            self._thin_out(*_best(within))

    def _thin_out(self, method: LongMamba, row: TuneRow) -> TuneRow:
        """Leave out each layer in turn, for good if retrieval stays and the cost does not rise."""
        kept = self.bench.layers if method.layers == "all" else tuple(method.layers)
        for layer in kept:
            fewer = tuple(other for other in kept if other != layer)
            if not fewer:
                break
            attempt = dataclasses.replace(method, layers=fewer)
            result = self._measure("layers", attempt)
            if _no_worse(result, row):
                method, row, kept = attempt, result, fewer
        return row

    def _measure(self, stage: str, method: LongMamba, whatever_it_costs: bool = False) -> TuneRow:
        if time.perf_counter() - self.started > self.budget_seconds:
            raise _OutOfTime
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
        for number, right in enumerate(self.bench.rounds((method,))):
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

    def _keep(self, row: TuneRow) -> None:
        self.table.append(row)
        if self.progress is not None:
            self.progress(row, len(self.table), max(self._planned(), len(self.table)))

    def _planned(self) -> int:
        chosen = self.candidates
        settings = len(chosen.clamp_shares) * len(chosen.decay_thresholds)
        layers = len(self.bench.layers) if chosen.layers else 0
        return 1 + settings + len(chosen.reductions) - 1 + layers

    @contextmanager
    def _timed(self) -> Iterator[Callable[[], float]]:
        start = time.perf_counter()
        yield lambda: round(time.perf_counter() - start, 3)

    def result(self) -> TuneResult:
        if not self.measured:
            raise WidefieldError(
                f"the budget of {self.budget_seconds:g} s ended before the first setting was "
                "measured; raise it or choose shorter lengths"
            )
        within = self._within()
        best, row = _best(within) if within else min(self._asked() or self.measured, key=_cost)
        return TuneResult(
            best=best,
            row=row,
            table=tuple(self.table),
            lengths=self.bench.lengths,
            quality_limit=self.limit,
            within_limit=row.cost <= self.limit,
            stopped=self.stopped,
            notes=tuple(self._notes(row)),
        )

    def _notes(self, row: TuneRow) -> Iterator[str]:
        if self.stopped == "budget":
            yield f"stopped after {self.budget_seconds:g} s; a longer budget tries more settings"
        if self.stopped == "interrupted":
            yield "interrupted; the best of the settings measured so far"
        if row.cost > self.limit:
            yield f"no setting stays within {self.limit:.1%} of the unmodified bits per byte"
        if not row.share:
            yield "no key was retrieved; does the model repeat one at its training length?"


def _best(pairs: Sequence[Measured]) -> Measured:
    """The highest share, ties by the lower cost."""
    return max(pairs, key=lambda pair: (pair[1].share or 0.0, -pair[1].cost))


def _cost(pair: Measured) -> float:
    return pair[1].cost


def _no_worse(new: TuneRow, old: TuneRow) -> bool:
    return new.share is not None and new.share >= (old.share or 0.0) and new.cost <= old.cost
