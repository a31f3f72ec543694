"""generate() on extended models: beams, padded batches, several answers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, MambaForCausalLM

import widefield as wf
from tests.models import tiny_mamba
from widefield.extension import extend
from widefield.methods import DeciMamba, LongMamba

TRAINED_AT, NEW, PADDING = 32, 6, (0, 40, 89)

METHODS: dict[str, Callable[[wf.Calibration], list[Any]]] = {
    "none": lambda calibration: [],
    "longmamba": lambda calibration: [LongMamba(calibration, decay_threshold=1e-30)],
    "decimamba": lambda calibration: [DeciMamba(layers=(1,), base_length=30, shrink=0.5)],
    "both": lambda calibration: [
        *METHODS["longmamba"](calibration),
        DeciMamba(layers=(1,), base_length=30),
    ],
}


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 380, (batch, length), generator=torch.Generator().manual_seed(seed))


IDS = random_ids(len(PADDING), 90)
MASK = torch.stack([(torch.arange(90) >= padding).long() for padding in PADDING])


@pytest.fixture(scope="module")
def calibration() -> wf.Calibration:
    return wf.calibrate(tiny_mamba(), random_ids(8, TRAINED_AT, seed=3), train_length=TRAINED_AT)


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest, calibration: wf.Calibration) -> MambaForCausalLM:
    """An extended model, with each method."""
    return extend(tiny_mamba(), *METHODS[request.param](calibration))


def generated(model: Any, ids: Tensor = IDS, mask: Tensor | None = MASK, **kwargs: Any) -> Tensor:
    """The new tokens of each row."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **kwargs}
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]


def alone(model: Any, **kwargs: Any) -> Tensor:
    """The new tokens of each row, each without its padding and in a batch of its own."""
    rows = [
        generated(model, IDS[row : row + 1, padding:], None, **kwargs)
        for row, padding in enumerate(PADDING)
    ]
    return torch.cat(rows)


def test_left_padded_rows_are_answered_as_if_each_were_alone(model: MambaForCausalLM) -> None:
    assert torch.equal(generated(model), alone(model))


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_of_left_padded_rows_are_those_of_each_row_alone(
    model: MambaForCausalLM, beams: int
) -> None:
    options = {"num_beams": beams, "num_return_sequences": 2}
    assert torch.equal(generated(model, **options), alone(model, **options))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0}])
def test_without_a_method_tokens_are_those_of_the_stock_model(options: dict[str, Any]) -> None:
    stock = generated(tiny_mamba(), **options)
    assert torch.equal(generated(extend(tiny_mamba()), **options), stock)


def test_beams_differ_from_the_likeliest_tokens() -> None:
    """Otherwise the tests of beams above would hold with beams that are never reordered."""
    model = extend(tiny_mamba())
    assert not torch.equal(generated(model, num_beams=4), generated(model))


def test_the_cache_behind_beams_counts_what_each_row_has_read(model: MambaForCausalLM) -> None:
    cache: Any = DynamicCache(config=model.config)
    plain = DynamicCache(config=model.config)
    generated(model, num_beams=2, cache_params=cache)
    generated(model, cache_params=plain)
    for entry, single in zip(cache.layers, plain.layers, strict=True):
        assert entry.conv_states[0].shape[0] == 2 * len(PADDING)
        assert entry.widefield_seen == tuple(n for n in single.widefield_seen for _ in (0, 1))
    # The last token that was generated has not been read.
    assert cache.layers[0].widefield_seen == tuple(
        90 - padding + NEW - 1 for padding in PADDING for _ in (0, 1)
    )


def test_several_answers_are_those_of_repeated_rows(model: MambaForCausalLM) -> None:
    torch.manual_seed(7)
    several = generated(model, do_sample=True, num_return_sequences=3)
    torch.manual_seed(7)
    repeated = generated(
        model, IDS.repeat_interleave(3, 0), MASK.repeat_interleave(3, 0), do_sample=True
    )
    assert torch.equal(several, repeated)
    assert len(several.unique(dim=0)) == 3 * len(PADDING)


@pytest.mark.parametrize(
    "options",
    [
        {"assistant_model": tiny_mamba()},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 1},
        {"generation_config": GenerationConfig(max_new_tokens=3, prompt_lookup_num_tokens=3)},
        {"generation_config": GenerationConfig(max_new_tokens=3, assistant_early_exit=1)},
    ],
    ids=["assistant", "lookup", "early exit", "lookup by config", "early exit by config"],
)
def test_decoding_with_an_assistant_is_refused_however_it_is_asked_for(
    model: MambaForCausalLM, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"rolls the cache back|assisted generation is not"):
        model.generate(IDS[:1], **options)
    assert generated(model).shape == (len(PADDING), NEW)
