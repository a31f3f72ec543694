"""Measure speed before the user's eyes: a line for each result, then a table, a file, a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from widefield.cli._board import title
from widefield.cli._common import Interrupted
from widefield.cli._models import Choice, Source, build_methods, choose
from widefield.evaluation.grid import UNMODIFIED, length_label
from widefield.evaluation.header import Subject, make_header
from widefield.evaluation.results import write_atomically
from widefield.evaluation.speed import (
    DECODE,
    GRAPH,
    PREFILL,
    REPLAY,
    STOCK,
    Side,
    SpeedGrid,
    Timing,
    measure_speed,
)

__all__ = ["run_bench", "sides_of"]

_TITLES = {STOCK: "transformers", UNMODIFIED: "widefield"}
_NEW = {DECODE: "each new", GRAPH: "… by CUDA graph"}
_CELL = 30  # characters


def sides_of(
    source: Source,
    choice: Choice | None,
    changes: Sequence[str] | None,
    tuned: Path | None,
    *,
    stock: bool,
) -> list[Side]:
    """The stock model, and one side for each combination of methods.

    Args:
        source: the model.
        choice: the methods that were asked for; None for all that there are settings for.
        changes: `--set`.
        tuned: `--methods`.
        stock: whether the stock model is among them.

    Raises:
        WidefieldError: as `choose` and `build_methods`.
    """
    if choice is None:
        known = dict.fromkeys([UNMODIFIED, *source.options])
        if source.calibration is not None:
            known["longmamba"] = None
        if tuned is not None:
            known |= dict.fromkeys(choose(UNMODIFIED, None, tuned).tuned)
        choice = choose(",".join(known), changes, tuned)
    sides = [Side(STOCK, None)] if stock else []
    return sides + [
        Side(name, build_methods(source, parts, tuned=choice.tuned, changes=choice.changes))
        for name, parts in choice.wanted
    ]


def run_bench(
    source: Source, sides: Sequence[Side], grid: SpeedGrid, out: Path | None, plot: Path | None
) -> list[Timing]:
    """Measure, show, and leave a JSON file and a picture where they are wanted.

    Raises:
        Interrupted: after Ctrl-C, with what was kept.
        WidefieldError: if a file cannot be written.
    """
    done: list[Timing] = []
    header = make_header(
        [Subject(s.name, source.model, source.tokenizer, s.methods or ()) for s in sides],
        {"speed": {"repeats": grid.repeats, "limit": grid.limit}},
        seed=grid.seed,
    )

    def note(timing: Timing) -> None:
        done.append(timing)
        print(_line(timing), flush=True)
        if out is not None:
            content = {"header": header, "rows": [t.to_json() for t in done]}
            write_atomically(out, (json.dumps(content, indent=1) + "\n").encode())

    print(f"{source.name} on {header['device']}, {header['subjects'][sides[0].name]['dtype']}")
    try:
        measure_speed(source.model, sides, grid, note)
    except KeyboardInterrupt:
        raise Interrupted(_kept(source, sides, grid, done, out, plot)) from None
    _show(sides, grid, done)
    for path in (out, _draw(source, sides, done, plot)):
        if path is not None:
            print(path)
    return done


def _kept(
    source: Source,
    sides: Sequence[Side],
    grid: SpeedGrid,
    done: Sequence[Timing],
    out: Path | None,
    plot: Path | None,
) -> str:
    """Show what there is after Ctrl-C, and say where it is kept."""
    _show(sides, grid, done)
    if not done:
        return "nothing was measured"
    drawn = _draw(source, sides, done, plot) if any(_prefills(done)) else None
    files = " and ".join(str(path) for path in (out, drawn) if path is not None)
    return f"{len(done)} results are kept in {files}" if files else "nothing was written"


def _name(side: str) -> str:
    return _TITLES.get(side, title(side))


def _line(timing: Timing) -> str:
    how = {DECODE: " new", GRAPH: " new"}.get(timing.task, "")
    what = f"{length_label(timing.tokens)}{how} tokens"
    if timing.task in (REPLAY, GRAPH):
        what += " through a CUDA graph"
    if timing.failed is not None:
        return f"{_name(timing.side)}, {what}: {timing.failed}"
    if timing.task in _NEW:
        return f"{_name(timing.side)}, {what}: {_rate(timing):.1f} tokens/s"
    return f"{_name(timing.side)}, {what}: {timing.median:.3f} s{_memory(timing, ', ')}"


def _rate(timing: Timing) -> float:
    return timing.tokens / timing.median


def _memory(timing: Timing, before: str) -> str:
    return "" if timing.peak_bytes is None else f"{before}{timing.peak_bytes / 1e6:,.0f} MB"


def _show(sides: Sequence[Side], grid: SpeedGrid, done: Sequence[Timing]) -> None:
    """Lengths down, sides across: seconds, how many times as fast as the first, memory."""
    if not done:
        return
    known = {(t.side, t.task, t.tokens): t for t in done}
    table = Table(title="a prompt: seconds, memory beyond the model", title_style="bold")
    table.add_column("tokens", justify="right", no_wrap=True)
    for side in sides:
        table.add_column(_name(side.name), justify="right", no_wrap=True)
    rows = [
        (task, n, length_label(n) if task == PREFILL else _NEW[GRAPH])
        for n in sorted(grid.lengths)
        for task in (PREFILL, REPLAY)
        if any(d.task == task for d in done)
    ]
    rows += [(t, grid.new_tokens, _NEW[t]) for t in _NEW if any(d.task == t for d in done)]
    for task, tokens, label in rows:
        # The stock model has no graph: what it does without one is what a graph is compared with.
        first = known.get((sides[0].name, {GRAPH: DECODE, REPLAY: PREFILL}.get(task, task), tokens))
        cells = [_cell(known.get((side.name, task, tokens)), first) for side in sides]
        table.add_row(label, *cells)
    Console().print(table)
    reasons: dict[str, dict[str, None]] = {}
    for timing in filter(_is_long, done):
        reasons.setdefault(timing.failed or "", {})[_name(timing.side)] = None
    for reason, names in reasons.items():
        print(f"– {', '.join(names)}: {reason}")


def _is_long(timing: Timing) -> bool:
    """Whether what a side failed of is too long for the table."""
    return len(timing.failed or "") > _CELL


def _cell(timing: Timing | None, first: Timing | None) -> str:
    if timing is None:
        return ""
    if timing.failed is not None:
        return "–" if _is_long(timing) else timing.failed
    value = f"{_rate(timing):.1f}/s" if timing.task in _NEW else f"{timing.median:.3f} s"
    ratio = math.nan if first is None or first is timing else first.median / timing.median
    faster = "" if math.isnan(ratio) else f"  {ratio:.1f}×"
    return f"{value}{faster}{_memory(timing, chr(10))}"


def _prefills(done: Sequence[Timing]) -> Iterator[Timing]:
    """Those that a picture shows by length."""
    return (t for t in done if t.task == PREFILL and t.seconds)


def _draw(
    source: Source, sides: Sequence[Side], done: Sequence[Timing], plot: Path | None
) -> Path | None:
    if plot is None:
        return None
    from widefield.evaluation.plots import Curve, speed  # matplotlib takes a second to import

    curves = [
        Curve(
            _name(side.name), {t.tokens: t.median for t in _prefills(done) if t.side == side.name}
        )
        for side in sides
    ]
    rates = {
        _name(t.side) + (", CUDA graph" if t.task == GRAPH else ""): _rate(t)
        for t in done
        if t.task in _NEW and t.seconds
    }
    return speed(curves, plot, "Seconds of a prompt by its length", source.name, rates)
