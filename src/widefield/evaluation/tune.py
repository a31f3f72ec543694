"""Choose LongMamba's clamp share, threshold, reduction and layers for one model, by measurement.

Every setting is asked for hidden keys in long prompts and scored on long texts. The best one
retrieves most among those whose bits per byte stay within a limit of the unmodified model's.
Settings see the same prompts and the same texts, so small samples suffice to compare them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.evaluation.batches import default_batch_tokens
from widefield.evaluation.bench import Bench
from widefield.evaluation.grid import DEFAULT_DEPTHS
from widefield.evaluation.search import Candidates, Progress, Search, TuneRow
from widefield.families import describe
from widefield.methods import LongMamba
from widefield.tasks.passkey import PasskeyTask
from widefield.tasks.perplexity import Windows
from widefield.tasks.texts import Haystack, default_haystack

__all__ = ["Candidates", "Progress", "TuneResult", "TuneRow", "tune"]


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
    confirmation: int = 20,
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

    First clamp shares and thresholds, then the other reductions at the best of them, then layer by
    layer whether leaving it out keeps the retrieval. A setting that costs too much is
    not asked for keys. Whatever leads in the end is asked for more keys, until the leader holds.

    Args:
        model: a live transformers model; it is left as it was.
        calibration: of this model.
        tokenizer: of this model.
        haystack: text around the keys; None takes the Python documentation.
        texts: long texts for the quality cost; None takes the haystack.
        lengths: context lengths in tokens; None = 16 times the training length.
        depths: where the keys lie, 0 to 1; a setting's trials go round them.
        trials: prompts a setting and length.
        confirmation: further prompts a length for a setting that leads in the end; 0 for none.
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
        WidefieldError: if the calibration is of another model, a length cannot hold the needle, no
            text is long enough, no setting filters a channel, or the budget ends before the first.
    """
    if trials < 1 or windows < 1 or last < 1:
        raise WidefieldError(
            f"trials, windows and last are {trials}, {windows} and {last}; give at least 1 of each"
        )
    haystack = default_haystack() if haystack is None else haystack
    haystack = Haystack("haystack", haystack) if isinstance(haystack, str) else haystack
    lengths = tuple(lengths) if lengths else (16 * calibration.train_length,)
    layout = describe(model)
    calibration.check(layout)
    task = PasskeyTask(tokenizer, haystack)
    for length in lengths:
        task.check_length(length)
    texts = [haystack.text] if texts is None else texts
    bench = Bench(
        model=model,
        task=task,
        lengths=lengths,
        depths=tuple(depths),
        windows=Windows.draw(tokenizer, texts, max(lengths), windows, seed),
        last=last,
        seed=seed,
        tokens=batch_tokens or default_batch_tokens(model),
        layout=layout,
    )
    search = Search(
        bench=bench,
        calibration=calibration,
        candidates=candidates or Candidates(),
        trials=range(trials),
        confirmation=range(trials, trials + confirmation),
        limit=quality_limit,
        budget_seconds=budget_seconds,
        progress=progress,
    )
    search.run()
    return _result(search)


def _result(search: Search) -> TuneResult:
    if not search.measured:
        raise WidefieldError(
            f"the budget of {search.budget_seconds:g} s ended before the first setting was "
            "measured; raise it or choose shorter lengths"
        )
    best, row = search.winner()
    return TuneResult(
        best=best,
        row=row,
        table=tuple(search.table),
        lengths=search.bench.lengths,
        quality_limit=search.limit,
        within_limit=row.cost <= search.limit,
        stopped=search.stopped,
        notes=tuple(_notes(search, row)),
    )


def _notes(search: Search, row: TuneRow) -> Iterator[str]:
    if search.stopped == "budget":
        yield f"stopped after {search.budget_seconds:g} s; a longer budget tries more settings"
    if search.stopped == "interrupted":
        yield "interrupted; this is the best of the settings measured so far"
    if row.cost > search.limit:
        yield f"no setting stays within {search.limit:.1%} of the unmodified bits per byte"
    if not row.share:
        yield "no key was retrieved; does the model repeat one at its training length?"
