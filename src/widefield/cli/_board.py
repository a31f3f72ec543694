"""Grids of passkey results that fill while they are measured."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from widefield.evaluation.grid import length_label

if TYPE_CHECKING:
    from widefield.evaluation.results import Cell

__all__ = ["Board", "filling", "title"]

_TITLES = {"longmamba": "LongMamba", "decimamba": "DeciMamba"}
_SHADES = ((0.3, "white on red3"), (0.7, "black on orange1"), (0.95, "black on yellow3"))
_BEST = "black on green3"


def title(method: str) -> str:
    """A method for people: `longmamba+decimamba` is LongMamba + DeciMamba."""
    return " + ".join(_TITLES.get(part, part) for part in method.split("+"))


class Board:
    """What is known so far of every (method, length, depth).

    Args:
        methods: one grid each, in the order in which they run.
        lengths: columns, in tokens.
        depths: rows, 0 to 1.
        train_lengths: by method, the length its model was trained at; marked in the grid.
    """

    def __init__(
        self,
        methods: Sequence[str],
        lengths: Sequence[int],
        depths: Sequence[float],
        train_lengths: Mapping[str, int | None],
    ) -> None:
        self.methods = tuple(methods)
        self.lengths = tuple(lengths)
        self.depths = tuple(depths)
        self.train_lengths = train_lengths
        self._cells: dict[tuple[str, int, float | None], Cell] = {}

    @property
    def total(self) -> int:
        """How many cells there will be."""
        return len(self.methods) * len(self.lengths) * len(self.depths)

    @property
    def done(self) -> int:
        """How many cells there are."""
        return len(self._cells)

    def add(self, cell: Cell) -> None:
        """Note a finished cell."""
        self._cells[cell.method, cell.length, cell.depth] = cell

    def current(self) -> str:
        """The method that is running, or the last one."""
        per_method = len(self.lengths) * len(self.depths)
        return self.methods[min(self.done // per_method, len(self.methods) - 1)]

    def share(self, method: str, length: int | None = None) -> tuple[int, int]:
        """Right answers and trials of a method, at one length or over all its cells."""
        cells = [
            c for c in self._cells.values() if c.method == method and length in (None, c.length)
        ]
        return sum(cell.correct or 0 for cell in cells), sum(cell.trials for cell in cells)

    def row(self, method: str, length: int) -> list[Cell] | None:
        """The cells of one length in the order of the depths, once all are there."""
        cells = [self._cells.get((method, length, depth)) for depth in self.depths]
        found = [cell for cell in cells if cell is not None]
        return found if len(found) == len(cells) else None

    def grid(self, method: str, depths: bool = True) -> Table:
        """One method's grid: lengths across, depths down, with their labels or without."""
        trained = self.train_lengths.get(method)
        table = Table(
            title=title(method),
            title_style="bold",
            box=None,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            min_width=len(title(method)),
        )
        if depths:
            table.add_column("depth", justify="right", no_wrap=True)
        for length in self.lengths:
            mark = "*" if length == trained else ""
            table.add_column(
                length_label(length) + mark, justify="right", min_width=3, no_wrap=True
            )
        for depth in self.depths:
            label = [f"{depth:.0%}"] if depths else []
            table.add_row(*label, *(self._shaded(method, length, depth) for length in self.lengths))
        return table

    def _shaded(self, method: str, length: int, depth: float) -> Text:
        cell = self._cells.get((method, length, depth))
        if cell is None:
            return Text("·", style="dim")
        style = next((shade for bound, shade in _SHADES if cell.share < bound), _BEST)
        return Text(percent(cell.share), style=style)

    def legend(self) -> Text:
        """What the figures are and what the star means."""
        known = sorted({length for length in self.train_lengths.values() if length is not None})
        star = f"; * = training length ({known[0]:,} tokens)" if len(known) == 1 else ""
        return Text(f"% of keys repeated exactly{star}", "dim")

    def picture(self, methods: Sequence[str], width: int) -> Group:
        """The grids of some methods, as many side by side as `width` characters hold."""
        across = len(methods)
        while across > 1 and self._width(methods[:across]) > width:
            across -= 1
        rows = [methods[start : start + across] for start in range(0, len(methods), across)]
        return Group(*(self._side_by_side(row) for row in rows), self.legend())

    def _width(self, methods: Sequence[str]) -> int:
        measured = Console(width=10_000).measure(self._side_by_side(methods))
        return measured.maximum

    def _side_by_side(self, methods: Sequence[str]) -> Table:
        row = Table.grid(padding=(0, 2, 1, 0))
        row.add_row(*(self.grid(method, depths=i == 0) for i, method in enumerate(methods)))
        return row


def percent(share: float) -> str:
    """A share in whole per cent; 100 and 0 only where all or none are right."""
    if 0 < share < 1:
        return str(min(max(round(100 * share), 1), 99))
    return "100" if share >= 1 else "0"


class _Filling:
    """The board with its status line; where that is too tall, only the running method's grid."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self.begun = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        everything = self.board.picture(self.board.methods, width)
        tall = len(console.render_lines(everything, options.update(height=None)))
        fits = tall + 2 <= console.height
        yield everything if fits else self.board.picture([self.board.current()], width)
        yield Text(self._status(), "dim")

    def _status(self) -> str:
        board, seconds = self.board, int(time.monotonic() - self.begun)
        clock = f"{seconds // 60}:{seconds % 60:02d}"
        if not board.done:
            return f"{clock} (the first run on a machine compiles its kernels, which takes a while)"
        running = title(board.current())
        return f"{clock} {board.done} of {board.total} cells, {running} (Ctrl-C keeps them)"


@contextmanager
def filling(board: Board, console: Console) -> Iterator[None]:
    """Show the board while it fills, and once more when the block is left, finished or not.

    In a terminal the grids fill in place; elsewhere `tell` prints a line when a length is complete.
    """
    try:
        if console.is_terminal:
            with Live(_Filling(board), console=console, transient=True, refresh_per_second=4):
                yield
        else:
            yield
    finally:
        if board.done:
            console.print(board.picture(board.methods, console.width))


def tell(board: Board, cell: Cell, console: Console) -> None:
    """Add a finished cell; where nothing fills in place, say so when it completes a length."""
    board.add(cell)
    row = board.row(cell.method, cell.length)
    if console.is_terminal or row is None:
        return
    shares = " ".join(percent(done.share) for done in row)
    seconds = sum(done.seconds for done in row)
    print(
        f"{title(cell.method)}, {length_label(cell.length)}: {shares} % right ({seconds:.1f} s)",
        file=console.file,
        flush=True,
    )
