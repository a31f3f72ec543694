"""Run passkey grids before the user's eyes: what `demo` and `eval passkey` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from widefield.cli._board import Board, filling, tell, title
from widefield.cli._common import Interrupted
from widefield.cli._models import choose, load_source, subjects
from widefield.evaluation.grid import PasskeyGrid, length_label
from widefield.evaluation.header import Subject
from widefield.evaluation.results import Results
from widefield.evaluation.runner import run_passkey
from widefield.tasks.texts import Haystack

__all__ = ["bundled_subjects", "run_board"]


def bundled_subjects(checkpoints: Mapping[str, str]) -> list[Subject]:
    """Every method on its own bundled checkpoint, at the settings measured for it.

    Args:
        checkpoints: by method, the bundled checkpoint's name.
    """
    sources = {name: load_source(f"bundled:{name}") for name in dict.fromkeys(checkpoints.values())}
    return [
        subject
        for method, checkpoint in checkpoints.items()
        for subject in subjects(sources[checkpoint], choose(method))
    ]


def run_board(
    asked: Sequence[Subject], haystack: Haystack, grid: PasskeyGrid, folder: Path
) -> Results:
    """Measure a grid, show it while it fills, and leave results.json and passkey.png in a folder.

    Raises:
        Interrupted: after Ctrl-C, with what was kept and how to go on.
        WidefieldError: as `run_passkey`.
    """
    console = Console()
    trained = {
        subject.name: None if subject.calibration is None else subject.calibration.train_length
        for subject in asked
    }
    board = Board([subject.name for subject in asked], grid.lengths, grid.depths, trained)
    try:
        with filling(board, console):
            results = run_passkey(
                asked, haystack, grid, folder, lambda cell: tell(board, cell, console)
            )
    except KeyboardInterrupt:
        raise Interrupted(
            f"{board.done} of {board.total} cells are kept in {folder / 'results.json'}; "
            "run the same command again to go on"
            if board.done
            else "no cell was finished yet; run the same command again to start over"
        ) from None
    picture = draw(results, folder, trained)
    summarise(board)
    if results.resumed:
        print(f"{results.resumed} cells were there from an earlier run")
    print(f"{results.path}\n{picture}")
    return results


def draw(results: Results, folder: Path, trained: dict[str, int | None]) -> Path:
    """One picture of all grids, the training length marked."""
    from widefield.evaluation.plots import heatmaps  # matplotlib takes a second to import

    known = [length for length in trained.values() if length is not None]
    path = folder / "passkey.png"
    heatmaps(results, path, train_length=known[0] if known else None)
    return path


def summarise(board: Board) -> None:
    """The share right of every method, over its whole grid and at the greatest length."""
    width = max(len(title(method)) for method in board.methods)
    longest = max(board.lengths)
    for method in board.methods:
        right, trials = board.share(method)
        at_end, trials_at_end = board.share(method, longest)
        print(
            f"{title(method):<{width}}  {right / trials:4.0%} right ({right} of {trials}), "
            f"{at_end / trials_at_end:.0%} at {length_label(longest)}"
        )
