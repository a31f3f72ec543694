"""`widefield eval`: one model, several methods, a grid of lengths; every setting an option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common

app = typer.Typer(no_args_is_help=True, help="Measure methods on a model: passkey, bits.")

Model = Annotated[str, typer.Option(help="A folder, a hub id, bundled:base or bundled:decimated.")]
Method = Annotated[
    str, typer.Option(help="Methods to compare, commas between; + puts several into one model.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="METHOD.OPTION=VALUE",
        help="Change a method's option, e.g. longmamba.clamp_share=0.01. Repeatable.",
    ),
]
Tuned = Annotated[
    Path | None, typer.Option("--methods", help="Settings written by `widefield tune`.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Written by `widefield calibrate`.", show_default="the model's own"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:N or auto.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or float64.", show_default="the checkpoint's"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start over; results there become results.old.json.")
]
Seed = Annotated[int, typer.Option(help="Draws keys and pieces of text.")]
BatchTokens = Annotated[
    int | None, typer.Option(help="Most tokens in a batch.", show_default="by free memory")
]


@app.command()
def passkey(
    model: Model = "bundled:base",
    method: Method = "unmodified,longmamba",
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths in tokens, k = 1,024.")
    ] = "1k,4k,16k",
    depths: Annotated[str, typer.Option(help="Where the key lies, 0 to 1.")] = "0,0.25,0.5,0.75,1",
    trials: Annotated[int, typer.Option(help="Prompts a cell.")] = 4,
    haystack: Annotated[
        Path | None,
        typer.Option(
            help="Text to hide keys in: a file, or a folder of .txt.",
            show_default="Python's own docs",
        ),
    ] = None,
    calibration: Calibration = None,
    tuned: Tuned = None,
    changes: Set = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Seed = 0,
    batch_tokens: BatchTokens = None,
    fresh: Fresh = False,
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
    model: Model = "bundled:base",
    method: Method = "unmodified,longmamba",
    lengths: Annotated[
        str, typer.Option(help="Context lengths in tokens, k = 1,024.")
    ] = "1k,4k,16k",
    windows: Annotated[int, typer.Option(help="Windows of text a length.")] = 8,
    last: Annotated[int, typer.Option(help="Scored tokens at the end of each window.")] = 2048,
    calibration: Calibration = None,
    tuned: Tuned = None,
    changes: Set = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    seed: Seed = 0,
    batch_tokens: BatchTokens = None,
    fresh: Fresh = False,
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
