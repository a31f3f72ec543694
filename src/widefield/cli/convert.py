"""`widefield convert`: write a checkpoint in the layout of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options


def convert(
    source: Annotated[
        str, typer.Argument(help="A folder or a hub id, e.g. state-spaces/mamba-130m.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; it must not be there yet.")],
    dtype: _options.Dtype = None,
) -> None:
    """Write a checkpoint in the layout of transformers.

    For the original checkpoints of Mamba and Mamba-2, which other programs cannot read.
    """
    folder = _common.new_folder(out)
    with _common.busy(f"loading {source}"):
        from widefield.cli._convert import write_checkpoint
        from widefield.cli._models import load_source

        loaded = load_source(source, dtype=dtype, as_stored=True, saved_methods=True)
    with _common.busy(f"writing {folder}"):
        write_checkpoint(loaded, folder)
