"""`widefield calibrate`: measure how large Δ usually is in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from widefield.cli import _common, _options


def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, a hub id or bundled:NAME.")],
    texts: Annotated[
        Path, typer.Option(help="Text of any kind: a file, or a folder of .txt files.")
    ],
    train_length: Annotated[
        str, typer.Option(help="Tokens of the sequences the model was trained on, e.g. 2k or 2048.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    sequences: Annotated[int, typer.Option(help="Sequences of the training length to read.")] = 16,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 4,
    device: _options.Device = "cpu",
    dtype: _options.Dtype = None,
) -> None:
    """Measure a model's Δ, which LongMamba needs.

    A few sequences of text go through the unmodified model; nothing is trained.
    """
    from widefield.evaluation.grid import parse_length
    from widefield.tasks.texts import load_texts

    _common.positive(sequences, "--sequences")
    _common.positive(batch_size, "--batch-size")
    length = parse_length(train_length)
    read = load_texts(texts)
    file = _common.out_file(out, ".safetensors")
    with _common.busy(f"loading {model}"):
        from widefield.cli._calibrate import run_calibration
        from widefield.cli._models import load_source

        source = load_source(model, device=device, dtype=dtype)
    run_calibration(source, read, length, sequences, batch_size, file)
