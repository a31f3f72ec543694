"""`widefield bench`: how fast a model is here, with and without widefield."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options


def bench(
    model: _options.ModelArgument = "bundled:base",
    lengths: _options.Lengths = "1k,4k,16k",
    method: _options.ComparedIfGiven = None,
    stock: Annotated[
        bool, typer.Option(help="Time the model as transformers runs it, too.")
    ] = True,
    repeats: Annotated[int, typer.Option(help="Runs of each; the one in the middle counts.")] = 3,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate one by one; 0 for none.")
    ] = 64,
    limit: Annotated[
        float, typer.Option(help="Seconds: longer prompts than that are left out.")
    ] = 60.0,
    calibration: _options.Calibration = None,
    tuned: _options.Tuned = None,
    changes: _options.Changes = None,
    device: _options.Device = "cpu",
    dtype: _options.Dtype = None,
    seed: Annotated[int, typer.Option(help="Draws the tokens.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The .json file to write.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="The .png file to draw: seconds by length.")
    ] = None,
) -> None:
    """How fast a model is on this machine: stock, on widefield's kernels, and with methods.

    Seconds and memory of a prompt by its length, then tokens a second. The tokens are random, so
    nothing is said about quality.
    """
    from widefield.evaluation.grid import parse_lengths

    sizes = parse_lengths(lengths)
    _common.positive(repeats, "--repeats")
    files = (
        None if out is None else _common.out_file(out, ".json"),
        None if plot is None else _common.out_file(plot, ".png", "--plot"),
    )
    with _common.busy(f"loading {model}"):
        from widefield.cli._bench import run_bench, sides_of
        from widefield.cli._models import choose, load_source
        from widefield.evaluation.speed import SpeedGrid

        grid = SpeedGrid(sizes, repeats, new_tokens, limit, seed)
        choice = None if method is None else choose(method, changes, tuned)
        source = load_source(model, device=device, dtype=dtype, calibration=calibration)
        sides = sides_of(source, choice, changes, tuned, stock=stock)
    run_bench(source, sides, grid, *files)
