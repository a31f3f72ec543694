"""Which model, with which methods: what `--model`, `--method`, `--set` and `--calibration` mean."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from widefield.bundled import available, load_bundled, recommended_options
from widefield.calibration import Calibration
from widefield.cli import _common
from widefield.errors import WidefieldError, unknown
from widefield.evaluation.grid import parse_methods
from widefield.evaluation.header import Subject
from widefield.extension import Extension
from widefield.families import describe
from widefield.loading import load
from widefield.methods import METHODS, from_config
from widefield.methods.base import Method

__all__ = [
    "Choice",
    "Source",
    "build_methods",
    "choose",
    "find_device",
    "find_dtype",
    "in_words",
    "load_source",
    "need_calibration",
    "need_tokenizer",
    "subjects",
]

DTYPES = ("float32", "bfloat16", "float16", "float64")
BUNDLED = "bundled"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Options = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """A loaded model and what came with it.

    Attributes:
        name: as the user named it.
        model: live, in eval mode, unextended.
        tokenizer: or None if there is none beside it.
        calibration: `--calibration`, or the one beside the weights, or None.
        options: by method name, the settings measured for this model; empty if none are known.
    """

    name: str
    model: Any
    tokenizer: Any | None
    calibration: Calibration | None
    options: Options = field(default_factory=dict)

    @property
    def train_length(self) -> int | None:
        """Tokens of the sequences that the model was trained on, where it is known."""
        return None if self.calibration is None else self.calibration.train_length


def find_device(name: str) -> torch.device:
    """The device of a name: `auto` is a GPU where there is one.

    Raises:
        WidefieldError: for a name torch does not know, or a GPU that is not there.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise unknown("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    wanted = torch.device(name)
    if wanted.type == "cuda" and (wanted.index or 0) >= count:
        seen = f"torch {torch.__version__} sees {count or 'no'} GPU{'' if count == 1 else 's'}"
        raise WidefieldError(f"--device {name} is not there: {seen}; use --device cpu or auto")
    return wanted


def find_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name.

    Raises:
        WidefieldError: for a name that is none of float32, bfloat16, float16, float64.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return getattr(torch, name)


def _quiet() -> None:
    """Keep transformers' notices and loading bars out; errors still come as exceptions."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_source(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    calibration: Path | None = None,
    saved_methods: bool = False,
    as_stored: bool = False,
) -> Source:
    """Load a model by the name a user gives it.

    Args:
        name: `bundled:base`, `bundled` for the same, a folder, or a hub id.
        device: cpu, cuda, cuda:N or auto.
        dtype: of the weights; None = the checkpoint's own.
        calibration: a file that takes the place of the one beside the weights.
        saved_methods: put the methods on that were saved with the model.
        as_stored: without a dtype, leave float16 as it is, where a CPU would compute in float32.

    Raises:
        WidefieldError: if there is no such model, device, dtype or calibration.
    """
    wanted = None if dtype is None else find_dtype(dtype)
    where = find_device(device)
    kind, _, checkpoint = name.partition(":")
    options: Options = {}
    if kind == BUNDLED:
        checkpoint = checkpoint or "base"
        options = recommended_options(checkpoint)
        _quiet()
        loaded = load_bundled(checkpoint, device=where)
        if wanted is not None:
            loaded.model.to(wanted)
    else:
        path = _existing(name)
        _quiet()
        chosen_dtype = "auto" if as_stored and wanted is None else wanted
        loaded = load(path, device=where, dtype=chosen_dtype, methods=saved_methods)
    chosen = loaded.calibration
    if calibration is not None:
        chosen = Calibration.load(_common.input_path(calibration, "--calibration"))
    return Source(name, loaded.model, loaded.tokenizer, chosen, options)


def _existing(name: str) -> str:
    """A folder that is there, or what can be a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    looks_local = name.startswith((".", "/", "~")) or path.exists() or not _HUB_ID.fullmatch(name)
    if looks_local:
        hint = _bundled_hint(name)
        raise WidefieldError(
            f"no model at {name}: expected a folder with config.json, a hub id such as "
            f"state-spaces/mamba-130m-hf, or bundled:base{hint}"
        )
    return name


def _bundled_hint(name: str) -> str:
    return f"; did you mean bundled:{name}?" if name in available() else ""


@dataclass(frozen=True)
class Choice:
    """Which methods a user asked for, checked before any model is loaded.

    Attributes:
        wanted: name of each combination, and its methods' registered names (none = unmodified).
        tuned: options from `--methods FILE`, by method name.
        changes: options from `--set`, by method name.
    """

    wanted: tuple[tuple[str, tuple[str, ...]], ...]
    tuned: Options
    changes: Options


def choose(spec: str, changes: Sequence[str] | None = None, tuned: Path | None = None) -> Choice:
    """Read `--method unmodified,longmamba,longmamba+decimamba`, `--set` and `--methods`.

    Raises:
        WidefieldError: for an unknown method, a `--set` without effect, or a file without methods.
    """
    wanted = parse_methods(spec)
    settings = _common.settings(changes or ())
    _check_changes(settings, {part for _, parts in wanted for part in parts})
    return Choice(wanted, {} if tuned is None else _read_tuned(tuned), settings)


def _check_changes(changes: Options, used: set[str]) -> None:
    for name, options in changes.items():
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        if name not in used:
            raise WidefieldError(
                f"--set {name}.{next(iter(options))} has no effect: "
                f"{name} is not among the methods of --method"
            )


def _read_tuned(path: Path) -> Options:
    """The methods of a file written by `widefield tune`: {"methods": {"longmamba": {options}}}."""
    path = _common.input_path(path, "--methods")
    try:
        methods = json.loads(path.read_text(encoding="utf-8"))["methods"]
        return {str(name): dict(options) for name, options in methods.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise WidefieldError(
            f"--methods {path}: not a file of methods; `widefield tune` writes one"
        ) from None


def build_methods(
    source: Source,
    names: Sequence[str],
    *,
    tuned: Options | None = None,
    changes: Options | None = None,
) -> tuple[Method, ...]:
    """The methods of one combination.

    An option is what `changes` says, else what `tuned` says, else what was measured for this model,
    else the method's default.

    Args:
        source: the model they are for.
        names: registered names; none = the unmodified model.
        tuned: by method name; takes the place of the measured options.
        changes: by method name; single options.

    Raises:
        WidefieldError: for an unknown option, a missing calibration, or a method that cannot act on
            the model.
    """
    built = []
    for name in names:
        measured = source.options.get(name, {})
        options = {**(tuned or {}).get(name, measured), **(changes or {}).get(name, {})}
        _need_options(name, options)
        if name == "longmamba" or options.get("score", "norm") != "norm":
            need_calibration(source, name)
        built.append(from_config(name, options, source.calibration))
    # Whether they can act on this model, and together, is found out before anything runs.
    Extension(describe(source.model), built)
    return tuple(built)


def _need_options(name: str, options: Mapping[str, Any]) -> None:
    """Say in the command line's words which option a method cannot do without."""
    for option in dataclasses.fields(METHODS[name]):
        needed = option.default is dataclasses.MISSING and option.init
        if needed and option.name not in ("calibration", *options):
            raise WidefieldError(
                f"{name} has no measured {option.name} for this model: give them, "
                f"e.g. --set {name}.{option.name}=3"
            )


def need_calibration(source: Source, method: str) -> Calibration:
    """The model's calibration.

    Raises:
        WidefieldError: if there is none, saying how to make one.
    """
    if source.calibration is None:
        raise WidefieldError(
            f"{method} needs a calibration of {source.name}, and none lies beside its weights: "
            f"make one with `widefield calibrate {source.name} --texts FILE --train-length N "
            "--out cal.safetensors` and give it with --calibration cal.safetensors"
        )
    return source.calibration


def in_words(method: Method) -> str:
    """A method with the options that are not at their defaults, on one line."""
    defaults = {option.name: option.default for option in dataclasses.fields(METHODS[method.name])}
    changed = {k: v for k, v in method.describe().items() if v != defaults.get(k)}
    options = ", ".join(f"{name}={value}" for name, value in changed.items())
    return f"{method.name} ({options})" if options else method.name


def need_tokenizer(source: Source) -> Any:
    """The model's tokenizer.

    Raises:
        WidefieldError: if there is none.
    """
    if source.tokenizer is None:
        raise WidefieldError(
            f"{source.name} came without a tokenizer: put its files beside the weights"
        )
    return source.tokenizer


def subjects(source: Source, choice: Choice) -> list[Subject]:
    """One subject for each combination that was chosen.

    Raises:
        WidefieldError: as `build_methods`.
    """
    return [
        Subject(
            name,
            source.model,
            source.tokenizer,
            build_methods(source, parts, tuned=choice.tuned, changes=choice.changes),
            source.calibration,
        )
        for name, parts in choice.wanted
    ]
