"""What every verb needs: reading option values, checking where results go. Nothing heavy here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from widefield.errors import WidefieldError

__all__ = [
    "Interrupted",
    "input_path",
    "out_file",
    "out_folder",
    "positive",
    "settings",
]


class Interrupted(Exception):
    """Ctrl-C, with the line that tells what was kept and how to go on."""


def positive(value: int, option: str) -> int:
    """`value`, if it is at least 1.

    Raises:
        WidefieldError: if it is less.
    """
    if value < 1:
        raise WidefieldError(f"{option} {value}: expected a whole number of at least 1")
    return value


def settings(values: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["longmamba.clamp_share=0.05"]` as {"longmamba": {"clamp_share": 0.05}}.

    A value is read as JSON (0.05, true, null, [3, 5]); 3,5 is a list; anything else is a string.

    Raises:
        WidefieldError: for a value that is not METHOD.OPTION=VALUE.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for text in values:
        target, equals, value = text.partition("=")
        method, dot, option = target.strip().partition(".")
        if not (equals and dot and method and option):
            raise WidefieldError(
                f"--set {text!r} is not a setting: expected METHOD.OPTION=VALUE, "
                "such as longmamba.clamp_share=0.01"
            )
        chosen.setdefault(method, {})[option] = _value(value.strip())
    return chosen


def _value(text: str) -> Any:
    for candidate in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(candidate)
        except json.JSONDecodeError:
            continue
    return text


def input_path(path: Path, option: str) -> Path:
    """`path`, if it is there and can be read.

    Raises:
        WidefieldError: if not.
    """
    path = path.expanduser()
    if not path.exists():
        raise WidefieldError(f"{option} {path}: no such file or folder")
    if not os.access(path, os.R_OK):
        raise WidefieldError(f"{option} {path}: cannot be read; check its permissions")
    return path


def out_folder(path: Path) -> Path:
    """A folder for results, made if it is not there, so that a long run does not fail at its end.

    Raises:
        WidefieldError: if it is a file or cannot be written to.
    """
    path = path.expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (FileExistsError, NotADirectoryError):
        raise WidefieldError(f"--out {path}: a file is in the way; give a folder") from None
    except OSError as error:
        raise WidefieldError(f"--out {path}: cannot be written to ({error.strerror})") from None
    return path


def out_file(path: Path, suffix: str) -> Path:
    """A file for a result, its folder made if it is not there.

    Args:
        path: where the user wants it.
        suffix: how its name must end, dot included.

    Raises:
        WidefieldError: if it is a folder, ends otherwise, or cannot be written to.
    """
    path = path.expanduser()
    if path.is_dir():
        raise WidefieldError(
            f"--out {path} is a folder: give a file, such as {path / ('out' + suffix)}"
        )
    if path.suffix != suffix:
        raise WidefieldError(f"--out {path}: expected a name that ends in {suffix}")
    out_folder(path.parent)
    return path
