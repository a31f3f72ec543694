"""Options that several verbs have, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "BatchTokens",
    "Calibration",
    "Changes",
    "Compared",
    "ComparedIfGiven",
    "Device",
    "Dtype",
    "Fresh",
    "Haystack",
    "Lengths",
    "Model",
    "ModelArgument",
    "Seed",
    "Tuned",
]

_MODEL = "A folder, a hub id, bundled:base or bundled:decimated."
_METHODS = "Methods to compare, commas between; + puts several into one model."

Model = Annotated[str, typer.Option(help=_MODEL)]
ModelArgument = Annotated[str, typer.Argument(help=_MODEL)]
Compared = Annotated[str, typer.Option(help=_METHODS)]
ComparedIfGiven = Annotated[
    str | None,
    typer.Option(help=_METHODS, show_default="unmodified, and all that the model has settings for"),
]
Lengths = Annotated[str, typer.Option(help="Prompt lengths in tokens, k = 1,024.")]
Haystack = Annotated[
    Path | None,
    typer.Option(
        help="Text to hide keys in: a file, or a folder of .txt.", show_default="Python's own docs"
    ),
]
Changes = Annotated[
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
