"""Every family and method: a padded prompt in chunks, decoded from, saved, loaded, gone on from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import widefield as wf
from tests.families.cases import CASES, SUPPORTED_CASES, random_ids, relative
from widefield.extension import extend
from widefield.families import _mixer
from widefield.methods import DeciMamba, LongMamba
from widefield.methods.base import Method

TRAINED_AT, LENGTH, PADDING, MORE = 12, 60, 33, 21
CLOSE = 1e-5
_MADE: dict[str, tuple[Any, LongMamba, tuple[int, ...], bool]] = {}


def made(name: str) -> tuple[Any, LongMamba, tuple[int, ...], bool]:
    """A model, LongMamba for it, its Mamba layers, and whether it may drop tokens; made once."""
    if name not in _MADE:
        model = extend(CASES[name].make())
        sample = random_ids(3, TRAINED_AT, seed=3)
        calibration = wf.calibrate(model, sample, train_length=TRAINED_AT)
        layout = model.widefield.layout
        method = LongMamba(calibration, reduction="slowest")
        _MADE[name] = model, method, layout.layers, layout.decimation is None
    return _MADE[name]


def decimated(layers: tuple[int, ...], **options: Any) -> DeciMamba:
    return DeciMamba(
        layers=sorted({layers[0], layers[-1]}), base_length=20, min_length=2, **options
    )


@pytest.fixture(params=["unmodified", "longmamba", "decimamba", "both"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in SUPPORTED_CASES if CASES[name].told])
def model(request: pytest.FixtureRequest, method: str) -> Any:
    model, longmamba, layers, drops = made(request.param)
    chosen: list[Method] = []
    if method in ("longmamba", "both"):
        chosen.append(longmamba)
    if method in ("decimamba", "both"):
        if not drops:
            pytest.skip("may not drop tokens: held by test_families.py")
        chosen.append(decimated(layers, protect=3))
    return extend(model, *chosen)


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, LENGTH)


@pytest.fixture
def mask(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return mask


def accepted(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def cache_name(model: Any) -> str:
    return "cache_params" if "cache_params" in accepted(model) else "past_key_values"


@torch.no_grad()
def one_pass(model: Any, ids: Tensor, mask: Tensor, **kwargs: Any) -> Any:
    """The model's own forward, with the positions that `generate()` gives to the tokens."""
    if "position_ids" in accepted(model):
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **kwargs)


def held(cache: Any) -> list[Tensor]:
    """All that a cache keeps, in order."""
    found: list[Tensor] = []
    for entry in cache.layers:
        if getattr(entry, "recurrent_states", None):
            found += [entry.recurrent_states[0], entry.conv_states[0]]
        if getattr(entry, "keys", None) is not None:
            found += [entry.keys, entry.values]
    return [tensor for tensor in found if tensor is not None]


def assert_same(cache: Any, other: Any) -> None:
    for mine, theirs in zip(held(cache), held(other), strict=True):
        assert mine.shape == theirs.shape
        assert relative(mine, theirs) < CLOSE
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        assert getattr(mine, "widefield_seen", None) == getattr(theirs, "widefield_seen", None)


@torch.no_grad()
def continued(model: Any, cache: Any, mask: Tensor) -> list[Tensor]:
    """The last logits after a decoded token, and then after a second turn, in chunks."""
    name, found = cache_name(model), []
    for count in (1, MORE):
        ids = random_ids(2, count, seed=5)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        if count == 1:
            output = one_pass(model, ids, mask, **{name: cache})
        else:
            output = wf.prefill(model, ids, attention_mask=mask, cache=cache, chunk_size=8)
        found.append(output.logits[:, -1])
    return found


@torch.no_grad()
def test_chunks_equal_one_pass_and_a_saved_state_goes_on_like_the_one_at_hand(
    model: Any, ids: Tensor, mask: Tensor, tmp_path: Path
) -> None:
    name = cache_name(model)
    whole = one_pass(model, ids, mask)
    chunks = wf.prefill(model, ids, attention_mask=mask, chunk_size=16)
    assert chunks.logits.shape == whole.logits.shape
    assert relative(chunks.logits, whole.logits) < CLOSE
    assert_same(chunks[name], whole[name])
    assert not hasattr(chunks[name], "widefield_prefill")
    wf.save_state(chunks[name], tmp_path / "state.safetensors", model)
    loaded = wf.load_state(tmp_path / "state.safetensors", model)
    assert_same(loaded, chunks[name])
    expected = continued(model, whole[name], mask)
    for ours in (continued(model, loaded, mask), continued(model, chunks[name], mask)):
        for mine, theirs in zip(ours, expected, strict=True):
            assert relative(mine, theirs) < CLOSE


def test_generation_in_chunks_is_the_same(model: Any, ids: Tensor, mask: Tensor) -> None:
    call = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **call)
    assert torch.equal(model.generate(ids, prefill_chunk_size=25, **call), plain)


@torch.no_grad()
def test_tiles_are_not_to_be_seen(
    model: Any, ids: Tensor, mask: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = one_pass(model, ids, mask)
    monkeypatch.setitem(_mixer.TILE, "cpu", 2 * 7)
    tiled = one_pass(model, ids, mask)
    assert relative(tiled.logits, whole.logits) < CLOSE
    assert_same(tiled[cache_name(model)], whole[cache_name(model)])
