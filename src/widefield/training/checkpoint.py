"""Write a trained model as a folder that `wf.load` reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.calibration import Calibration
from widefield.errors import WidefieldError
from widefield.tasks.texts import default_haystack
from widefield.training.card import write_card
from widefield.training.data import Corpus, make_batch
from widefield.training.loop import TrainingResult
from widefield.training.recipe import Recipe

__all__ = ["finish", "round_to_half", "save_checkpoint"]


def save_checkpoint(
    result: TrainingResult,
    calibration: Calibration,
    methods: dict[str, dict[str, Any]],
    out: Path,
    command: str,
) -> None:
    """Write the checkpoint; what is in `out` stays as it was if anything fails.

    Args:
        result: of `train`; its weights must already be rounded to half precision (`round_to_half`).
        calibration: of these weights.
        methods: for each method the options that suit this checkpoint.
        out: the folder.
        command: the command line that made it, for the card.
    """
    part = out / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    result.model.half().save_pretrained(part)
    result.model.float()
    calibration.save(part / "calibration.safetensors")
    record = result.record | {"command": command}
    (part / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (part / "methods.json").write_text(json.dumps(methods, indent=2) + "\n", encoding="utf-8")
    write_card(part)
    for file in part.iterdir():
        file.replace(out / file.name)
    part.rmdir()


def round_to_half(model: Any) -> Any:
    """Round every weight to float16 and back, so that what is calibrated is what is saved.

    Raises:
        WidefieldError: if a weight is beyond float16.
    """
    for name, parameter in model.named_parameters():
        half = parameter.data.half()
        if not bool(torch.isfinite(half).all()):
            raise WidefieldError(
                f"{name} has values beyond float16 ({parameter.abs().max():.3g} at most)"
            )
        parameter.data = half.float()
    return model


def finish(
    result: TrainingResult, recipe: Recipe, corpus: Corpus, out: Path, command: str, device: str
) -> None:
    """Round, calibrate and save a trained model with first settings of the methods."""
    from widefield.collect import calibrate

    model = round_to_half(result.model).to(device)
    calibration = calibrate(
        model, _calibration_ids(recipe, corpus), train_length=recipe.length, batch_size=8
    )
    save_checkpoint(result, calibration, _settings(recipe), out, command)


def _calibration_ids(recipe: Recipe, corpus: Corpus) -> Tensor:
    """Half from the corpus, half from the first half of the Python documentation's prose.

    Thresholds from one kind of text are too low for another whose Δ are larger; from both they hold
    for both.
    """
    rng = np.random.default_rng([recipe.seed, 2])
    half = recipe.calibration_sequences // 2
    haystack = default_haystack()
    prose = np.frombuffer(haystack.text.encode(), dtype=np.uint8)
    documentation = Corpus(prose[: len(prose) // 2], ("pydoc_data.topics",), haystack.sha256)
    sources = [(corpus, recipe.calibration_sequences - half), (documentation, half)]
    parts = [
        make_batch(source, recipe.length, count, 0.0, rng, recipe.unwrapped_share).ids
        for source, count in sources
        if count
    ]
    return torch.from_numpy(np.concatenate(parts))


def _settings(recipe: Recipe) -> dict[str, dict[str, Any]]:
    longmamba = {"decay_threshold": 1e-30, "clamp_share": 0.003, "reduction": "fastest"}
    if recipe.decimation is None:
        return {"longmamba": longmamba}
    options = recipe.decimation
    return {
        "longmamba": longmamba,
        "decimamba": {
            "layers": list(options.layers),
            "base_length": options.keep_max,
            "shrink": 1.0,
            "min_length": options.protect,
            "protect": options.protect,
            "score": options.score,
            "decay_threshold": options.decay_threshold,
            "clamp_share": options.clamp_share,
        },
    }
