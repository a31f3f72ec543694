"""`widefield demo`: the problem and both answers to it, on the bundled checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options

LENGTHS = "1k,2k,4k,8k,16k"
DEPTHS = "0,0.25,0.5,0.75,1"
METHODS = {"unmodified": "base", "longmamba": "base", "decimamba": "decimated"}
"""Which bundled checkpoint each grid is measured on: DeciMamba needs training with decimation."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results.json and passkey.png.")] = Path(
        "widefield-results/demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="A smaller grid: 1k, 4k, 16k; three depths; one trial.")
    ] = False,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt lengths in bytes, k = 1,024.", show_default=LENGTHS)
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Prompts a cell.", show_default="2")] = None,
    seed: Annotated[int, typer.Option(help="Draws the keys and the text around them.")] = 0,
    fresh: _options.Fresh = False,
) -> None:
    """Find a hidden key at 1 to 16 times the training length.

    Three grids: the unmodified model, LongMamba, DeciMamba, on the bundled checkpoints.
    Works offline on two CPU cores in under two minutes. Interrupted, it goes on where it stopped.
    """
    from widefield.evaluation.grid import PasskeyGrid, parse_depths, parse_lengths
    from widefield.tasks.texts import default_haystack

    _common.out_folder(out)
    grid = PasskeyGrid(
        parse_lengths(lengths or ("1k,4k,16k" if quick else LENGTHS)),
        parse_depths("0,0.5,1" if quick else DEPTHS),
        trials=(1 if quick else 2) if trials is None else trials,
        seed=seed,
    )
    with _common.busy("loading the bundled checkpoints"):
        from widefield.cli._passkey import bundled_subjects, run_board

        subjects = bundled_subjects(METHODS)
    folder = _common.results_folder(out, fresh)
    run_board(subjects, default_haystack(), grid, folder)
