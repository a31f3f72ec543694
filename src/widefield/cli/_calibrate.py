"""Run a calibration and say what came of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from widefield.calibration import Calibration
from widefield.cli._common import Interrupted
from widefield.cli._models import Source, need_tokenizer
from widefield.collect import calibrate

__all__ = ["run_calibration"]


def run_calibration(
    source: Source,
    texts: Sequence[str],
    train_length: int,
    sequences: int,
    batch_size: int,
    file: Path,
) -> Calibration:
    """Calibrate a model on texts and write the file.

    Raises:
        Interrupted: after Ctrl-C; nothing is written then.
        WidefieldError: as `wf.calibrate`, or if the model has no tokenizer.
    """
    try:
        calibration = calibrate(
            source.model,
            texts,
            train_length=train_length,
            tokenizer=need_tokenizer(source),
            sequences=sequences,
            batch_size=batch_size,
            progress=sys.stderr.isatty(),
        )
    except KeyboardInterrupt:
        raise Interrupted(f"nothing was written to {file}") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    calibration.save(file)
    print(
        f"{file}: {calibration.model_class} {calibration.fingerprint}, "
        f"{len(calibration.layers)} layers, {calibration.sequences} sequences of "
        f"{calibration.train_length:,} tokens, {file.stat().st_size / 1e6:.1f} MB"
    )
    return calibration
