"""An extended model without a method is the stock model: logits, cache, generate, left padding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import cache_name, states, tiny_family
from widefield.errors import WidefieldError
from widefield.extension import extend, restore

MODELS = {
    "mamba": ("mamba", {}),
    "mamba-relu-bias": ("mamba", {"hidden_act": "relu", "use_bias": True}),
    "mamba-no-conv-bias": ("mamba", {"use_conv_bias": False}),
    "falcon": ("falcon", {}),
    "jamba": ("jamba", {}),
    "jamba-eager-bias": ("jamba", {"attn_implementation": "eager", "mamba_proj_bias": True}),
    "zamba": ("zamba", {}),
    "zamba-one-head-no-conv-bias": ("zamba", {"n_mamba_heads": 1, "mamba_conv_bias": False}),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    family, options = MODELS[request.param]
    return tiny_family(family, **options)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 380, (2, 40), generator=torch.Generator().manual_seed(1))


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


@torch.no_grad()
def test_logits_and_cache_equal_stock(model: PreTrainedModel, ids: Tensor) -> None:
    stock = model(ids, use_cache=True)
    ours = extend(model)(ids, use_cache=True)
    assert relative(ours.logits, stock.logits) < 1e-5
    name = cache_name(model)
    for theirs, mine in zip(states(stock[name]), states(ours[name]), strict=True):
        assert mine.recurrent_states[0].dtype == theirs.recurrent_states[0].dtype
        assert relative(mine.recurrent_states[0], theirs.recurrent_states[0]) < 1e-5
        assert relative(mine.conv_states[0], theirs.conv_states[0]) < 1e-5


@torch.no_grad()
def test_a_left_padded_batch_equals_stock(model: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    stock = model(ids, attention_mask=mask, use_cache=True)
    ours = extend(model)(ids, attention_mask=mask, use_cache=True)
    assert relative(ours.logits[0], stock.logits[0]) < 1e-5
    assert relative(ours.logits[1, 13:], stock.logits[1, 13:]) < 1e-5
    name = cache_name(model)
    for theirs, mine in zip(states(stock[name]), states(ours[name]), strict=True):
        assert relative(mine.recurrent_states[0], theirs.recurrent_states[0]) < 1e-5


def test_greedy_generation_equals_stock(model: PreTrainedModel, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    call = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    stock = model.generate(ids, **call)
    assert torch.equal(extend(model).generate(ids, **call), stock)


def test_beam_search_and_several_answers_equal_stock(model: PreTrainedModel, ids: Tensor) -> None:
    call = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    stock = model.generate(ids, **call)
    assert torch.equal(extend(model).generate(ids, **call), stock)


@torch.no_grad()
def test_a_prefill_continues_from_the_cache(model: PreTrainedModel, ids: Tensor) -> None:
    extend(model)
    whole = model(ids).logits
    name = cache_name(model)
    first = model(ids[:, :17], use_cache=True)
    second = model(ids[:, 17:], **{name: first[name]}, use_cache=True)
    assert relative(second.logits, whole[:, 17:]) < 1e-5
    assert second[name].layers[0].widefield_seen == (40,)


@torch.no_grad()
def test_restore_is_bit_identical(model: PreTrainedModel, ids: Tensor) -> None:
    before, attributes = model(ids).logits, set(model.__dict__)
    kinds = [type(m) for m in model.modules()]
    restore(extend(model))
    assert torch.equal(model(ids).logits, before)
    assert [type(m) for m in model.modules()] == kinds
    assert set(model.__dict__) == attributes


def test_gradients_equal_stock(model: PreTrainedModel, ids: Tensor) -> None:
    twin = copy.deepcopy(model)
    twin(ids, labels=ids, use_cache=False).loss.backward()
    extend(model)(ids, labels=ids, use_cache=False).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert relative(mine.grad, theirs.grad) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_close_to_float32(
    model: PreTrainedModel, ids: Tensor, dtype: torch.dtype
) -> None:
    truth = model(ids).logits
    stock = relative(copy.deepcopy(model).to(dtype)(ids).logits, truth)
    extend(model)
    ours = model.to(dtype)(ids, use_cache=True)
    assert relative(ours.logits, truth) <= 2 * stock + 1e-3
    assert ours[cache_name(model)].layers[0].recurrent_states[0].dtype == torch.float32


class TestBadMasks:
    def test_right_padding_is_refused(self, model: PreTrainedModel, ids: Tensor) -> None:
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        with pytest.raises(WidefieldError, match="right-padded in row 1"):
            extend(model)(ids, attention_mask=mask)

    def test_a_hole_is_refused(self, model: PreTrainedModel, ids: Tensor) -> None:
        mask = torch.ones_like(ids)
        mask[0, 5] = 0
        with pytest.raises(WidefieldError, match="has a hole in row 0"):
            extend(model)(ids, attention_mask=mask)

    def test_an_empty_row_is_refused(self, model: PreTrainedModel, ids: Tensor) -> None:
        mask = torch.ones_like(ids)
        mask[0] = 0
        with pytest.raises(WidefieldError, match="row 0 of attention_mask has no token"):
            extend(model)(ids, attention_mask=mask)

    def test_a_mask_that_is_too_short_is_refused(self, model: PreTrainedModel, ids: Tensor) -> None:
        with pytest.raises(WidefieldError, match="covers 39 tokens, the input has 40"):
            extend(model)(ids, attention_mask=torch.ones(2, 39))
