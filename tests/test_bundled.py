"""The checkpoints that ship with the package, and their loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from widefield.bundled import (
    available,
    folder,
    load_bundled,
    recommended_methods,
    recommended_options,
)
from widefield.errors import WidefieldError
from widefield.families import describe

MOST_BYTES = 8e6


@pytest.fixture(params=["base", "decimated"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param not in available():
        pytest.skip(f"the bundled checkpoint {request.param} is not here")
    return request.param


def test_a_bundled_checkpoint_is_complete_and_small(name: str) -> None:
    files = {path.name: path.stat().st_size for path in folder(name).iterdir()}
    assert {"config.json", "model.safetensors", "calibration.safetensors"} <= files.keys()
    assert {"methods.json", "README.md"} <= files.keys()
    assert sum(files.values()) <= MOST_BYTES


def test_a_bundled_checkpoint_loads_in_float32_with_all_that_belongs_to_it(name: str) -> None:
    model, tokenizer, calibration = load_bundled(name)
    assert model.dtype == torch.float32 and not model.training
    assert isinstance(tokenizer, ByT5Tokenizer)
    assert not hasattr(model, "widefield")
    assert calibration is not None and calibration.train_length == 1024
    calibration.check(describe(model))


def test_the_measured_methods_can_act_on_their_checkpoint(name: str) -> None:
    layout = describe(load_bundled(name).model)
    methods = recommended_methods(name)
    assert "longmamba" in methods
    assert name == "base" or "decimamba" in methods
    for registered, method in methods.items():
        assert method.name == registered
        method.validate(layout)


def test_an_unknown_name_is_answered_with_the_nearest(name: str) -> None:
    with pytest.raises(WidefieldError, match=f"did you mean '{name}'"):
        load_bundled(name[:-1])


def test_a_package_without_checkpoints_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("widefield.bundled.ROOT", tmp_path)
    assert available() == ()
    with pytest.raises(WidefieldError, match="install widefield again"):
        load_bundled()


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_damaged_settings_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    monkeypatch.setattr("widefield.bundled.ROOT", tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({}))
    if content is not None:
        (base / "methods.json").write_text(content)
    with pytest.raises(WidefieldError, match=r"methods\.json"):
        recommended_options()
