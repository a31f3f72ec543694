"""`widefield eval`: one model, several methods, a grid of lengths; every setting an option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options

app = typer.Typer(no_args_is_help=True, help="Measure methods on a model: passkey, bits.")


@app.command()
def passkey(
    model: _options.Model = "bundled:base",
    method: _options.Compared = "unmodified,longmamba",
    lengths: _options.Lengths = "1k,4k,16k",
    depths: Annotated[str, typer.Option(help="Where the key lies, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Prompts a cell.")] = 4,
    haystack: _options.Haystack = None,
    calibration: _options.Calibration = None,
    tuned: _options.Tuned = None,
    changes: _options.Changes = None,
    device: _options.Device = "cpu",
    dtype: _options.Dtype = None,
    seed: _options.Seed = 0,
    batch_tokens: _options.BatchTokens = None,
    fresh: _options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json and passkey.png.")] = Path(
        "widefield-results/passkey"
    ),
) -> None:
    """How often a model repeats a five-digit key hidden in a long text, by length and depth."""
    from widefield.evaluation.grid import PasskeyGrid, parse_depths, parse_lengths
    from widefield.tasks.texts import default_haystack, load_haystack

    grid = PasskeyGrid(parse_lengths(lengths), parse_depths(depths), trials, seed, batch_tokens)
    text = load_haystack(haystack) if haystack is not None else default_haystack()
    _common.out_folder(out)
    with _common.busy(f"loading {model}"):
        from widefield.cli import _models
        from widefield.cli._passkey import run_board

        choice = _models.choose(method, changes, tuned)
        source = _models.load_source(model, device=device, dtype=dtype, calibration=calibration)
        subjects = _models.subjects(source, choice)
    folder = _common.results_folder(out, fresh)
    run_board(subjects, text, grid, folder)


@app.command()
def bits(
    texts: Annotated[Path, typer.Option(help="Long texts: a file, or a folder of .txt files.")],
    model: _options.Model = "bundled:base",
    method: _options.Compared = "unmodified,longmamba",
    lengths: Annotated[
        str, typer.Option(help="Context lengths in tokens, k = 1,024.")
    ] = "1k,4k,16k",
    windows: Annotated[int, typer.Option(help="Windows of text a length.")] = 8,
    last: Annotated[int, typer.Option(help="Scored tokens at the end of each window.")] = 2048,
    calibration: _options.Calibration = None,
    tuned: _options.Tuned = None,
    changes: _options.Changes = None,
    device: _options.Device = "cpu",
    dtype: _options.Dtype = None,
    seed: _options.Seed = 0,
    batch_tokens: _options.BatchTokens = None,
    fresh: _options.Fresh = False,
    out: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path(
        "widefield-results/bits"
    ),
) -> None:
    """How well a model predicts text, in bits a byte, by how much text stands before it."""
    from widefield.evaluation.grid import BitsGrid, parse_lengths
    from widefield.tasks.texts import load_texts

    grid = BitsGrid(parse_lengths(lengths), windows, last, seed, batch_tokens)
    read = load_texts(texts)
    _common.out_folder(out)
    with _common.busy(f"loading {model}"):
        from widefield.cli import _models
        from widefield.cli._bits import run_table

        choice = _models.choose(method, changes, tuned)
        source = _models.load_source(model, device=device, dtype=dtype, calibration=calibration)
        subjects = _models.subjects(source, choice)
    folder = _common.results_folder(out, fresh)
    run_table(subjects, read, grid, folder)
