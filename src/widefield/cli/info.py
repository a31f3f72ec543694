"""`widefield info`: what a model is, and what widefield can do with it."""

from __future__ import annotations

from typing import Annotated

import typer

from widefield.cli import _common, _options


def info(
    model: _options.ModelArgument = "bundled:base",
    calibration: _options.Calibration = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for other programs.")
    ] = False,
) -> None:
    """What a model is made of and what is on in it.

    Layers, channels, the share of global channels, the training length, methods saved with it.
    """
    with _common.busy(f"loading {model}"):
        from widefield.cli._info import describe_source, show
        from widefield.cli._models import load_source

        source = load_source(model, calibration=calibration, saved_methods=True)
    show(describe_source(source), as_json)
