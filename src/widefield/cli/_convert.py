"""Write a loaded model as a folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from widefield.cli._common import Interrupted
from widefield.cli._models import Source
from widefield.errors import WidefieldError
from widefield.families import describe

__all__ = ["write_checkpoint"]


def write_checkpoint(source: Source, folder: Path) -> None:
    """Write a model, and what came with it, in the layout of transformers.

    Args:
        source: as it was loaded.
        folder: does not exist yet, or is empty.

    Raises:
        Interrupted: after Ctrl-C; nothing is left behind then.
        OSError: if the folder cannot be written; nothing is left behind then, either.
    """
    try:
        with _whole(folder) as part:
            source.model.save_pretrained(part)
            if source.tokenizer is not None:
                source.tokenizer.save_pretrained(part)
            note = _write_calibration(source, part)
    except KeyboardInterrupt:
        raise Interrupted(f"nothing was written to {folder}") from None
    print(f"{folder}: {_in_words(source, folder)}")
    for line in filter(None, (note, _no_tokenizer(source))):
        print(line, file=sys.stderr)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder beside the one that is wanted, which takes its place if the block succeeds."""
    made = [parent for parent in folder.absolute().parents if not parent.exists()]
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


def _write_calibration(source: Source, part: Path) -> str | None:
    """Write the calibration beside the weights, or say why it does not go with them."""
    calibration = source.calibration
    if calibration is None or (part / "widefield.safetensors").exists():
        return None
    try:
        calibration.check(describe(source.model))
    except WidefieldError as error:
        return f"the calibration was left out: {error}"
    calibration.save(part / "calibration.safetensors")
    return None


def _in_words(source: Source, folder: Path) -> str:
    model = source.model
    count = len(list(folder.glob("model*.safetensors")))
    files = "1 file" if count == 1 else f"{count} files"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{type(model).__name__}, {parameters:,} parameters in {dtype}, {files} of weights"


def _no_tokenizer(source: Source) -> str | None:
    if source.tokenizer is not None:
        return None
    return (
        f"{source.name} came without a tokenizer; the models of state-spaces were trained with "
        "that of EleutherAI/gpt-neox-20b"
    )
