"""The header of a results file: with what, on what, of what the results were made."""

from __future__ import annotations

import functools
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from widefield.calibration import Calibration
from widefield.evaluation.results import FORMAT
from widefield.methods.base import Method

__all__ = ["Subject", "device_name", "make_header"]


@dataclass(frozen=True)
class Subject:
    """A model with the methods that are to be on in it.

    Attributes:
        name: what the results call it, e.g. "longmamba".
        model: a live transformers model; it is left as it was.
        tokenizer: its tokenizer.
        methods: put on for the run; none = the unmodified model on widefield's kernels.
        calibration: what the methods were made from, for the header; None without one.
    """

    name: str
    model: Any
    tokenizer: Any
    methods: tuple[Method, ...] = ()
    calibration: Calibration | None = None


def make_header(
    subjects: Sequence[Subject],
    tasks: dict[str, dict[str, Any]],
    *,
    seed: int,
    command: str | None = None,
) -> dict[str, Any]:
    """The header of a run.

    Args:
        subjects: at least one.
        tasks: the settings of each task by its name, JSON-able.
        seed: of everything that is drawn.
        command: what was typed; None takes the running program's.
    """
    model = subjects[0].model
    return {
        "format": FORMAT,
        "versions": _versions(),
        "device": device_name(model.device),
        "command": command or shlex.join([*_program(), *sys.argv[1:]]),
        "seed": seed,
        "tasks": tasks,
        "subjects": {subject.name: _describe(subject) for subject in subjects},
    }


def _program() -> list[str]:
    """The running program as it is typed: a script's name, or python -m and a module's."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        return [Path(sys.argv[0]).name]
    module = spec.name.removesuffix(".__main__")
    return [module] if module == "widefield" else ["python", "-m", module]


def _versions() -> dict[str, str]:
    import numpy
    import transformers

    from widefield import __version__

    return {
        "widefield": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
    }


def _describe(subject: Subject) -> dict[str, Any]:
    from widefield.families import describe

    layout = describe(subject.model)
    calibration = subject.calibration
    return {
        "model": layout.model_class,
        "fingerprint": layout.fingerprint,
        "parameters": sum(weights.numel() for weights in subject.model.parameters()),
        "layers": len(layout.layers),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "tokenizer": type(subject.tokenizer).__name__,
        "methods": {method.name: method.describe() for method in subject.methods},
        "calibration": None if calibration is None else _describe_calibration(calibration),
    }


def _describe_calibration(calibration: Calibration) -> dict[str, Any]:
    return {
        "fingerprint": calibration.identity,
        "train_length": calibration.train_length,
        "corpus_hash": calibration.corpus_hash,
    }


def device_name(device: torch.device | str) -> str:
    """A device for people: the GPU's name, or the processor's and how many threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads"


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
