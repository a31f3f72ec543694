"""Every family and method: a padded prompt in chunks, decoded from, saved, loaded, gone on from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import widefield as wf
from tests.families.cases import CASES, SUPPORTED_CASES, random_ids, relative
from widefield.errors import WidefieldError
from widefield.extension import extend
from widefield.families import _mixer, mixers
from widefield.methods import DeciMamba, LongMamba
from widefield.methods.base import Method

TRAINED_AT, LENGTH, PADDING, MORE = 12, 60, 33, 21
CLOSE = 1e-5
_MADE: dict[str, tuple[Any, LongMamba, tuple[int, ...]]] = {}


def made(name: str) -> tuple[Any, LongMamba, tuple[int, ...]]:
    """A model, LongMamba for it, and its Mamba layers; made once."""
    if name not in _MADE:
        model = extend(CASES[name].make())
        sample = random_ids(3, TRAINED_AT, seed=3)
        calibration = wf.calibrate(model, sample, train_length=TRAINED_AT)
        method = LongMamba(calibration, reduction="slowest")
        _MADE[name] = model, method, model.widefield.layout.layers
    return _MADE[name]


def decimated(layers: tuple[int, ...], **options: Any) -> DeciMamba:
    return DeciMamba(
        layers=sorted({layers[0], layers[-1]}), base_length=20, min_length=2, **options
    )


DROPPING = ("mamba", "falcon-mamba", "jamba", "mamba2", "granite", "nemotron-h")
TABLE = [
    *(
        (name, m)
        for name in SUPPORTED_CASES
        if CASES[name].told
        for m in ("unmodified", "longmamba")
    ),
    *((name, m) for name in DROPPING for m in ("decimamba", "both")),
]


@pytest.fixture(params=TABLE, ids="-".join)
def model(request: pytest.FixtureRequest) -> Any:
    name, method = request.param
    model, longmamba, layers = made(name)
    chosen: list[Method] = []
    if method in ("longmamba", "both"):
        chosen.append(longmamba)
    if method in ("decimamba", "both"):
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


@pytest.mark.parametrize("name", DROPPING)
def test_with_a_full_residual_stream_chunks_are_refused(name: str, ids: Tensor) -> None:
    model, _, layers = made(name)
    extend(model, decimated(layers, residual="full"))
    with pytest.raises(WidefieldError, match="answers for every token, and which are kept"):
        wf.prefill(model, ids, chunk_size=16)


@pytest.mark.parametrize("name", ["mamba2", "granite", "nemotron-h", "falcon-h1"])
@torch.no_grad()
def test_a_mixer_never_holds_more_than_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_mixer.TILE, "cpu", 32)
    model, longmamba, layers = made(name)
    methods = [(), (longmamba,), (decimated(layers, residual="full"),)]
    methods += [(decimated(layers),)] if name in DROPPING else []
    projected: list[int] = []
    hooks = [
        module.in_proj.register_forward_hook(lambda _, args, out: projected.append(out.shape[1]))
        for _, module in mixers(model)
    ]
    for chosen in methods:
        projected.clear()
        extend(model, *chosen)(random_ids(2, LENGTH))
        assert projected[:4] == [16, 16, 16, 12]
        assert max(projected) == 16
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["mamba2", "nemotron-h"])
@torch.no_grad()
def test_tiles_of_even_length_change_not_one_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, longmamba, layers = made(name)
    ids = random_ids(1, 300)
    for chosen in ((), (longmamba,), (decimated(layers),)):
        extend(model, *chosen)
        monkeypatch.setitem(_mixer.TILE, "cpu", 4096)
        whole = one_pass(model, ids, torch.ones_like(ids)).logits
        monkeypatch.setitem(_mixer.TILE, "cpu", 150)
        assert torch.equal(one_pass(model, ids, torch.ones_like(ids)).logits, whole)


@pytest.mark.parametrize("name", DROPPING)
def test_what_is_held_back_does_not_grow_with_the_prompt(name: str) -> None:
    model, _, layers = made(name)
    extend(model, decimated(layers))
    most = []
    for length in (200, 800):
        held_back: list[int] = []
        cache = DynamicCache(config=model.config)

        def note(done: int, total: int, cache: Any = cache, kept: list = held_back) -> None:
            pieces = cache.widefield_prefill.survivors[layers[0]]._pieces
            kept.append(sum(piece.score.shape[1] for piece in pieces))

        wf.prefill(model, random_ids(1, length), chunk_size=50, cache=cache, progress=note)
        most.append(max(held_back))
    assert most[0] == most[1] == 21 + 21  # of a longer chunk, too, the best ones alone are held
