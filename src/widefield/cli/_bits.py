"""Run a table of bits a byte before the user's eyes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from widefield.cli._board import title
from widefield.cli._common import Interrupted
from widefield.evaluation.grid import BitsGrid, length_label
from widefield.evaluation.header import Subject
from widefield.evaluation.results import Cell, Results
from widefield.evaluation.runner import run_bits

__all__ = ["run_table"]


def run_table(
    asked: Sequence[Subject], texts: Sequence[str], grid: BitsGrid, folder: Path
) -> Results:
    """Measure bits a byte: a line for each length, then a table; results.json in a folder.

    Raises:
        Interrupted: after Ctrl-C, with what was kept and how to go on.
        WidefieldError: as `run_bits`.
    """
    done: list[Cell] = []

    def tell(cell: Cell) -> None:
        done.append(cell)
        print(
            f"{title(cell.method)}, {length_label(cell.length)}: {cell.bits:.3f} bits a byte "
            f"({cell.seconds:.1f} s)",
            flush=True,
        )

    try:
        results = run_bits(asked, texts, grid, folder, tell)
    except KeyboardInterrupt:
        raise Interrupted(
            f"{len(done)} of {len(asked) * len(grid.lengths)} cells are kept in "
            f"{folder / 'results.json'}; run the same command again to go on"
            if done
            else "no cell was finished yet; run the same command again to start over"
        ) from None
    Console().print(_table(asked, grid, done))
    print(results.path)
    return results


def _table(asked: Sequence[Subject], grid: BitsGrid, done: Sequence[Cell]) -> Table:
    """Methods down, lengths across, each with its distance from the first method."""
    bits = {(cell.method, cell.length): cell.bits or float("nan") for cell in done}
    first = asked[0].name
    table = Table(title="bits a byte (lower is better)", title_style="bold")
    table.add_column("method", no_wrap=True)
    for length in grid.lengths:
        table.add_column(length_label(length), justify="right", no_wrap=True)
    for subject in asked:
        row = []
        for length in grid.lengths:
            value, base = bits[subject.name, length], bits[first, length]
            change = "" if subject.name == first else f" ({value / base - 1:+.1%})"
            row.append(f"{value:.3f}{change}")
        table.add_row(title(subject.name), *row)
    return table
