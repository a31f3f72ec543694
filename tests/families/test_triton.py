"""Whole models on Triton: on a GPU, or in its interpreter; hooks see what they did before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import widefield as wf
from tests.families.cases import CASES, random_ids, relative
from tests.ops.triton_device import DEVICE, on_triton
from widefield import ops
from widefield.families import _mixer
from widefield.ops import use_backend

KINDS = ("mamba", "falcon-mamba", "mamba2", "falcon-h1-norm")
LENGTH = 9


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, LENGTH).to(DEVICE)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    """Triton, and no gradients, for which these kernels have no use."""
    with use_backend("cuda"), torch.no_grad():
        yield


def pair(name: str = "mamba", **options: Any) -> tuple[Any, Any]:
    """A stock model of two layers and its extended twin."""
    stock, ours = (CASES[name].make(num_hidden_layers=2, **options) for _ in range(2))
    return stock.to(DEVICE), wf.extend(ours.to(DEVICE))


def add_one(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 1.0


def add_one_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.add_(1.0)


@on_triton
@pytest.mark.parametrize("name", KINDS)
def test_logits_equal_plain_torch_with_and_without_padding(name: str, ids: Tensor) -> None:
    _, ours = pair(name)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with use_backend("reference"):  # where mamba_ssm is installed, stock is no measure
        plain = ours(ids).logits
        padded = ours(ids, attention_mask=mask).logits[mask.bool()]
    assert relative(ours(ids).logits, plain) < 1e-5
    assert relative(ours(ids, attention_mask=mask).logits[mask.bool()], padded) < 1e-5


@on_triton
@pytest.mark.parametrize("name", KINDS)
@torch.enable_grad()
def test_gradients_in_training_equal_plain_torch(name: str, ids: Tensor) -> None:
    _, ours = pair(name)
    names, parameters = zip(*ours.train().named_parameters(), strict=True)
    with use_backend("reference"):
        plain = torch.autograd.grad(ours(ids, labels=ids, use_cache=False).loss, parameters)
    mine = torch.autograd.grad(ours(ids, labels=ids, use_cache=False).loss, parameters)
    for parameter, value, expected in zip(names, mine, plain, strict=True):
        assert relative(value, expected) < 1e-4, parameter


@on_triton
@pytest.mark.parametrize("in_fp32", [True, False])
def test_a_half_precision_stream_has_the_dtype_of_stock(in_fp32: bool, ids: Tensor) -> None:
    stock, ours = (m.half() for m in pair(residual_in_fp32=in_fp32))
    call = {"output_hidden_states": True}
    theirs, mine = stock(ids, **call).hidden_states, ours(ids, **call).hidden_states
    for value, expected in zip(mine, theirs, strict=True):
        assert value.dtype == expected.dtype
        assert relative(value.float(), expected.float()) < 1e-2


@on_triton
@pytest.mark.parametrize("hook", [add_one, add_one_in_place])
@pytest.mark.parametrize("where", ["norm", "mixer", ""])
def test_hooks_of_a_block_and_its_parts_have_their_way(hook: Any, where: str, ids: Tensor) -> None:
    models = pair()
    plain = models[0](ids).logits
    for model in models:
        block = model.backbone.layers[1]
        (getattr(block, where) if where else block).register_forward_hook(hook)
    stock, ours = models
    expected = stock(ids).logits
    assert relative(expected, plain) > 1e-3
    assert relative(ours(ids).logits, expected) < 1e-5


@on_triton
@pytest.mark.parametrize("where", ["mixer", ""])
def test_hooks_have_their_way_in_inference_mode(where: str, ids: Tensor) -> None:
    models = pair()
    for model in models:
        block = model.backbone.layers[1]
        (getattr(block, where) if where else block).register_forward_hook(add_one_in_place)
    stock, ours = models
    with torch.inference_mode():
        assert relative(ours(ids).logits, stock(ids).logits) < 1e-5


@on_triton
def test_no_norm_outlives_the_block_that_uses_it(ids: Tensor) -> None:
    _, ours = pair()
    for value in ours(ids, output_hidden_states=True).hidden_states:
        assert not hasattr(value, "_widefield_normed")


@on_triton
def test_an_extended_model_runs_in_inference_mode(ids: Tensor) -> None:
    stock, ours = pair()
    with torch.inference_mode():
        assert relative(ours(ids).logits, stock(ids).logits) < 1e-5


@on_triton
@pytest.mark.parametrize("hook", [add_one, add_one_in_place])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_between_blocks_have_their_way_in_inference_mode(
    hook: Any, before: bool, ids: Tensor
) -> None:
    models = pair()
    for model in models:
        first, second = model.backbone.layers
        if before:
            second.register_forward_pre_hook(lambda module, args: hook(module, (), args[0]))
        else:
            first.register_forward_hook(hook)
    stock, ours = models
    with torch.inference_mode():
        assert relative(ours(ids).logits, stock(ids).logits) < 1e-5
        assert relative(ours(ids).logits, pair()[1](ids).logits) > 1e-3


@on_triton
def test_another_norm_is_left_alone(ids: Tensor) -> None:
    class Doubled(type(CASES["mamba"].make().backbone.layers[0].norm)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    stock, ours = CASES["mamba"].make().to(DEVICE), CASES["mamba"].make().to(DEVICE)
    for model in (stock, ours):
        model.backbone.layers[1].norm.__class__ = Doubled
    assert relative(wf.extend(ours)(ids).logits, stock(ids).logits) < 1e-5


@on_triton
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_decimation_and_chunks_go_the_same_way_as_on_a_cpu(name: str, ids: Tensor) -> None:
    _, ours = pair(name)
    wf.extend(ours, wf.DeciMamba(layers=[1], base_length=5))
    with use_backend("reference"):
        expected = ours(ids).logits[:, -1]
    assert relative(ours(ids).logits[:, -1], expected) < 1e-5
    parts = wf.prefill(ours, ids, chunk_size=4).logits[:, -1]
    assert relative(parts, expected) < 1e-5


@on_triton
def test_the_states_of_a_cache_are_its_own(ids: Tensor) -> None:
    _, ours = pair()
    first = ours(ids, use_cache=True).cache_params
    before = [entry.recurrent_states[0].clone() for entry in first.layers]
    ours(ids.flip(1), use_cache=True)
    for entry, state in zip(first.layers, before, strict=True):
        assert torch.equal(entry.recurrent_states[0], state)


@on_triton
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("tile", [4, 64])
def test_a_gated_norm_may_scale_rows_behind_out_proj(
    hooked: bool, tile: int, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair("mamba2")
    if hooked:
        ours.backbone.layers[0].mixer.register_forward_hook(add_one)
    expected = ours(ids).logits
    monkeypatch.setattr(ops, "gates_in_the_scan", lambda *tensors: True)
    monkeypatch.setitem(_mixer.TILE, DEVICE, tile)
    assert relative(ours(ids).logits, expected) < 1e-5
    with torch.inference_mode():
        assert relative(ours(ids).logits, expected) < 1e-5
