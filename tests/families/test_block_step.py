"""A decode step of a whole block in a few kernels: the same as through its modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

from tests.models import tiny_family
from tests.ops.triton_device import DEVICE, DTYPES, INTERPRETED, on_triton
from widefield.extension import extend
from widefield.families.mamba1 import Mamba1Mixer
from widefield.families.ssd import SSDMixer
from widefield.ops import overlapping, use_backend

IDS = torch.randint(3, 380, (2, 9), generator=torch.Generator().manual_seed(1))


def tiny_mamba2(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
        "num_heads": 4, "head_dim": 16, "n_groups": 1, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return Mamba2ForCausalLM(Mamba2Config(**{**sizes, **options})).eval()


MODELS = {
    "mamba": lambda: tiny_family("mamba", use_bias=True),
    "mamba without biases": lambda: tiny_family("mamba", use_conv_bias=False),
    "mamba in its own dtype": lambda: tiny_family("mamba", residual_in_fp32=False),
    "falcon": lambda: tiny_family("falcon"),
    "mamba2": tiny_mamba2,
    "mamba2 with groups": lambda: tiny_mamba2(n_groups=2, use_bias=True),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which mixers went the short way."""
    names: list[str] = []
    for kind in (Mamba1Mixer, SSDMixer):

        def step(self: Any, *args: Any, before: Any = kind.block_step) -> Tensor:
            names.append(type(self).__name__)
            return before(self, *args)

        monkeypatch.setattr(kind, "block_step", step)
    return names


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time for each program."""
    if INTERPRETED:
        from widefield.ops.project import cuda

        monkeypatch.setattr(cuda, "_PROGRAMS", 1)


def prefilled(model: Any) -> Any:
    with torch.no_grad(), use_backend("reference"):
        return model(IDS.to(DEVICE), use_cache=True).cache_params


def step(model: Any, cache: Any, backend: Any) -> tuple[Tensor, list[Tensor]]:
    """Logits behind one more token, and all states."""
    cache = copy.deepcopy(cache)
    with torch.no_grad(), use_backend(backend):
        logits = model(IDS[:, :1].to(DEVICE), cache_params=cache, use_cache=True).logits
    entries = cache.layers
    states = [s for e in entries for s in (e.conv_states[0], e.recurrent_states[0])]
    return logits, states


@on_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_block_steps_as_its_modules_do(build: Any, dtype: torch.dtype, taken: list[str]) -> None:
    model = extend(build().to(DEVICE, dtype))
    cache = prefilled(model)
    truth, exact = step(model, cache, "reference")
    assert not taken
    ours, states = step(model, cache, "cuda")
    assert len(taken) == model.config.num_hidden_layers
    allowed = 2e-5 if dtype == torch.float32 else 3e-2
    for value, near in zip((ours, *states), (truth, *exact), strict=True):
        assert value.dtype == near.dtype
        difference = (value.double() - near.double()).norm() / near.double().norm()
        assert difference < allowed
    assert [e.widefield_seen for e in cache.layers] == [(9,)] * len(cache.layers)


def hooked(model: Any) -> None:
    model.backbone.layers[0].mixer.out_proj.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    mixer = model.backbone.layers[0].mixer
    mixer.out_proj = nn.Sequential(mixer.out_proj)


def with_another_norm(model: Any) -> None:
    model.backbone.layers[0].norm = nn.RMSNorm(32).to(DEVICE)


@on_triton
@pytest.mark.parametrize("change", [hooked, replaced, with_another_norm])
def test_modules_that_were_touched_are_called(change: Any, taken: list[str]) -> None:
    model = extend(tiny_family("mamba").to(DEVICE))
    cache = prefilled(model)
    change(model)
    truth, _ = step(model, cache, "reference")
    ours, _ = step(model, cache, "cuda")
    assert len(taken) == model.config.num_hidden_layers - 1
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)


@on_triton
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_kernels_that_start_early_give_the_same_bits(build: Any) -> None:
    model = extend(build().to(DEVICE))
    cache = prefilled(model)
    logits, states = step(model, cache, "cuda")
    with overlapping():
        early, after = step(model, cache, "cuda")
    assert torch.equal(early, logits)
    assert all(torch.equal(one, other) for one, other in zip(after, states, strict=True))


@on_triton
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_more_rows_go_through_the_modules(build: Any, taken: list[str]) -> None:
    model = extend(build().to(DEVICE))
    token = IDS[:1, :1].repeat(4, 1).to(DEVICE)
    with torch.no_grad(), use_backend("reference"):
        cache = model(IDS[:1].repeat(4, 1).to(DEVICE), use_cache=True).cache_params
        twin = copy.deepcopy(cache)
        truth = model(token, cache_params=twin, use_cache=True).logits
    with torch.no_grad(), use_backend("cuda"):
        ours = model(token, cache_params=cache, use_cache=True).logits
    assert not taken
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-4)
