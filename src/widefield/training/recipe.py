"""What a training run is: a YAML file read into dataclasses, every value checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from widefield.errors import WidefieldError, unknown

__all__ = ["Decimation", "Recipe", "Shape", "Stage", "load_recipe"]


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum.

    Attributes:
        until: the share of the whole run at which this stage ends, in (0, 1].
        length: bytes of a sequence, its answer included.
        batch: sequences a step.
    """

    until: float
    length: int
    batch: int


@dataclass(frozen=True)
class Shape:
    """A Mamba-1 to be trained from scratch; bytes in, bytes out (ByT5's 384 ids)."""

    hidden_size: int = 256
    layers: int = 6
    state_size: int = 16
    expand: int = 2


@dataclass(frozen=True)
class Decimation:
    """Decimation that is on during training, with a keep count drawn anew for every step.

    Attributes:
        layers: the decimating layers.
        keep_min: fewest tokens that a row keeps.
        keep_max: most tokens that a row keeps; counts are drawn log-uniformly between the two.
        protect: last tokens that are never dropped, and over which the loss is taken.
        score: importance score of `DeciMamba`.
        decay_threshold: Th of the global channels, for score "global".
        clamp_share: share of tokens at the clamp of Δ, for score "global".
        rank_weight: weight of the ranking loss, 0 for none: the digits of the passkey are to
            outscore all but the
            share `rank_share` of the batch's other tokens. A batch holds as many tokens as a
            sequence far longer
            than the training length, so the scores learn to stand out there, too.
        rank_share: the share of other tokens that may score as high.
    """

    layers: tuple[int, ...]
    keep_min: int
    keep_max: int
    protect: int = 64
    score: str = "global"
    decay_threshold: float = 1e-30
    clamp_share: float = 0.01
    rank_weight: float = 0.0
    rank_share: float = 0.001


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Attributes:
        name: of the checkpoint.
        stages: the curriculum, by rising `until`, the last at 1.
        shape: the model if it is trained from scratch.
        decimation: decimation during training, or None.
        seconds: how long the run takes, compilation not counted; exclusive with `steps`.
        steps: how many optimiser steps the run takes; exclusive with `seconds`.
        passkey_share: share of each batch that are passkey samples; the rest is plain text.
        unwrapped_share: share of the sequences whose text has the line breaks inside its
            paragraphs turned into spaces.
        learning_rate: peak, reached after `warmup` and then falling along a cosine to a tenth.
        warmup: share of the run.
        weight_decay: on matrices only: not on A_log, D, norms, biases.
        betas: of AdamW.
        clip: largest norm of the gradient.
        seed: of weights and data.
        train_length: the length that the checkpoint counts as trained at; default the longest
            stage's.
        calibration_sequences: held-out sequences that the finished model is calibrated on.
    """

    name: str
    stages: tuple[Stage, ...]
    shape: Shape = field(default_factory=Shape)
    decimation: Decimation | None = None
    seconds: float | None = None
    steps: int | None = None
    passkey_share: float = 0.5
    unwrapped_share: float = 0.0
    learning_rate: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0
    train_length: int | None = None
    calibration_sequences: int = 64

    def __post_init__(self) -> None:
        """Check what YAML cannot."""
        if (self.seconds is None) == (self.steps is None):
            raise WidefieldError(f"recipe {self.name!r}: give either seconds or steps")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(ends) or ends[-1] != 1.0 or ends[0] <= 0:
            raise WidefieldError(
                f"recipe {self.name!r}: stages end at {ends}; expected rising shares that end "
                "at 1.0"
            )
        for name in ("passkey_share", "unwrapped_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise WidefieldError(
                    f"recipe {self.name!r}: {name} {getattr(self, name)} is not between 0 and 1"
                )
        if self.decimation and self.decimation.keep_min <= self.decimation.protect:
            raise WidefieldError(
                f"recipe {self.name!r}: keep_min {self.decimation.keep_min} leaves nothing "
                "beside the "
                f"{self.decimation.protect} protected tokens; raise it"
            )

    def stage(self, progress: float) -> Stage:
        """The stage at a share of the run."""
        return next(s for s in self.stages if progress < s.until or s.until == 1.0)

    @property
    def length(self) -> int:
        """The length that the checkpoint counts as trained at, in bytes."""
        return self.train_length or max(stage.length for stage in self.stages)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        WidefieldError: if the file is missing, is not YAML, or names something a recipe does not
            have.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WidefieldError(f"cannot read recipe {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WidefieldError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise WidefieldError(f"{path} holds no recipe: expected keys such as name, stages, seconds")
    stages = values.pop("stages", None)
    if not isinstance(stages, list):
        raise WidefieldError(f"{path}: expected stages, a list of {{until, length, batch}}")
    nested: dict[str, Any] = {"stages": tuple(_build(Stage, s, path) for s in stages)}
    for key, kind in (("shape", Shape), ("decimation", Decimation)):
        if values.get(key) is not None:
            nested[key] = _build(kind, values.pop(key), path)
    return _build(Recipe, values | nested, path)


def _build(kind: type, values: Any, path: Path) -> Any:
    if not isinstance(values, dict):
        raise WidefieldError(f"{path}: expected keys of {kind.__name__.lower()}, got {values!r}")
    names = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in names:
            raise unknown(f"key of a {kind.__name__.lower()} in {path}", str(name), names)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise WidefieldError(f"{path}: {error}") from None
