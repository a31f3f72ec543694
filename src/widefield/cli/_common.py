"""What every verb needs: reading option values, checking where results go. Nothing heavy here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from widefield.errors import WidefieldError

__all__ = [
    "Interrupted",
    "busy",
    "input_path",
    "new_folder",
    "out_file",
    "out_folder",
    "positive",
    "results_folder",
    "settings",
]


class Interrupted(Exception):
    """Ctrl-C, with the line that tells what was kept and how to go on."""


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr, in a terminal only: importing torch and loading a model take seconds."""
    from rich.console import Console

    with Console(stderr=True).status(what) if sys.stderr.isatty() else nullcontext():
        yield


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


def results_folder(path: Path, fresh: bool) -> Path:
    """A folder for results, as `out_folder`; with `fresh`, results that are there are put aside.

    Raises:
        WidefieldError: as `out_folder`.
    """
    path = out_folder(path)
    if fresh and (path / "results.json").exists():
        os.replace(path / "results.json", path / "results.old.json")
    return path


def out_folder(path: Path, option: str = "--out") -> Path:
    """A folder that results can be written to, checked before a long run and not made yet.

    Raises:
        WidefieldError: if it is a file, lies inside one, or cannot be written to.
    """
    path = path.expanduser()
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise WidefieldError(f"{option} {path}: {there} is a file; give a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise WidefieldError(f"{option} {path}: {there} cannot be written to; give another folder")
    return path


def new_folder(path: Path) -> Path:
    """A folder that is not there yet, or is empty; checked before a long run and not made yet.

    Raises:
        WidefieldError: if there is something, or as `out_folder`.
    """
    path = out_folder(path)
    if path.exists() and any(path.iterdir()):
        raise WidefieldError(f"--out {path} is there and not empty: give a folder that is not")
    return path


def out_file(path: Path, suffix: str, option: str = "--out") -> Path:
    """A file that a result can be written to, checked before a long run; its folder may be missing.

    Args:
        path: where the user wants it.
        suffix: how its name must end, dot included.
        option: how the user named it.

    Raises:
        WidefieldError: if it is a folder, ends otherwise, or cannot be written to.
    """
    path = path.expanduser()
    if path.is_dir():
        raise WidefieldError(f"{option} {path} is a folder: give a file, e.g. {path}/out{suffix}")
    if path.suffix != suffix:
        raise WidefieldError(f"{option} {path}: expected a name that ends in {suffix}")
    out_folder(path.parent, option)
    return path
