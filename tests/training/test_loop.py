from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import widefield as wf
from widefield.errors import WidefieldError
from widefield.training import Decimation, Recipe, Shape, Stage, finish, train
from widefield.training.data import Corpus
from widefield.training.loop import Progress

TEXT = np.frombuffer(b"The quick brown fox jumps over the lazy dog. " * 60, dtype=np.uint8)
CORPUS = Corpus(TEXT, ("fox.txt",), "0" * 64)
RECIPE = Recipe(
    name="small",
    steps=6,
    shape=Shape(hidden_size=16, layers=2, state_size=4),
    stages=(Stage(0.5, 200, 2), Stage(1.0, 208, 2)),
    calibration_sequences=8,
)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    seen: list[Progress] = []
    recipe = replace(RECIPE, steps=12, stages=(Stage(1.0, 200, 2),), learning_rate=3e-2)
    result = train(recipe, CORPUS, tmp_path, device="cpu", report=seen.append)
    assert seen[-1].text_loss < seen[0].text_loss - 0.5
    assert result.record["steps"] == 12
    assert not hasattr(result.model, "widefield")


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole = train(RECIPE, CORPUS, tmp_path / "whole", device="cpu").model

    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, CORPUS, tmp_path / "cut", device="cpu", report=interrupt)
    assert (tmp_path / "cut" / "resume" / "state.json").is_file()
    resumed = train(RECIPE, CORPUS, tmp_path / "cut", device="cpu").model
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "cut" / "resume").exists()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, CORPUS, tmp_path, device="cpu", report=interrupt)
    with pytest.raises(WidefieldError, match="another recipe or corpus"):
        train(replace(RECIPE, seed=1), CORPUS, tmp_path, device="cpu")


def test_a_finished_run_is_a_folder_that_loads(tmp_path: Path) -> None:
    result = train(RECIPE, CORPUS, tmp_path, device="cpu")
    finish(result, RECIPE, CORPUS, tmp_path, "widefield train small.yaml", "cpu")
    loaded = wf.load(tmp_path)
    assert loaded.calibration is not None
    assert loaded.calibration.train_length == 208
    assert loaded.tokenizer is not None
    wf.extend(loaded.model, wf.LongMamba(loaded.calibration, clamp_share=0.05))
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 6
    assert "widefield train small.yaml" in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*.part"))


def test_fine_tuning_drops_tokens(tmp_path: Path) -> None:
    base = train(RECIPE, CORPUS, tmp_path / "base", device="cpu")
    finish(base, RECIPE, CORPUS, tmp_path / "base", "command", "cpu")
    start = wf.load(tmp_path / "base")
    recipe = replace(
        RECIPE,
        decimation=Decimation(layers=(1,), keep_min=70, keep_max=100, clamp_share=0.05),
        stages=(Stage(1.0, 200, 2),),
        steps=3,
    )
    result = train(
        recipe,
        CORPUS,
        tmp_path / "decimated",
        device="cpu",
        model=start.model,
        calibration=start.calibration,
    )
    assert result.record["steps"] == 3
    finish(result, recipe, CORPUS, tmp_path / "decimated", "command", "cpu")
    assert "decimamba" in json.loads((tmp_path / "decimated" / "methods.json").read_text())
