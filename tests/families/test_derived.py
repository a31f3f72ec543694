"""What is made of a weight and kept: it is never that of an earlier weight."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families.cases import CASES, random_ids
from widefield.extension import extend

KINDS = ("mamba", "falcon-mamba", "mamba2", "jamba")


def mixer_of(model: Any) -> Any:
    return next(m for m in model.modules() if hasattr(m, "A_log"))


def in_place(mixer: Any) -> None:
    mixer.A_log.add_(0.5)


def replaced(mixer: Any) -> None:
    mixer.A_log = nn.Parameter(mixer.A_log + 0.5)


def new_data(mixer: Any) -> None:
    mixer.A_log.data = mixer.A_log.data + 0.5


def new_data_again_and_again(mixer: Any) -> None:
    """Memory that is freed is taken again: the second new one may lie where the first was."""
    for step in (0.25, 0.25):
        mixer.A_log.data = mixer.A_log.data + step


def other_taps(mixer: Any) -> None:
    mixer.conv1d.weight.data = mixer.conv1d.weight.data * 1.5


def taps_in_place(mixer: Any) -> None:
    mixer.conv1d.weight.mul_(1.5)


CHANGES = (in_place, replaced, new_data, new_data_again_and_again, other_taps, taps_in_place)


def fresh(model: Any) -> Any:
    """The same weights in a model that has never run."""
    twin = copy.deepcopy(model)
    assert not mixer_of(twin).__dict__["_widefield_derived"].get("rates")
    return twin


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_seen_by_the_next_prefill(
    kind: str, change: Callable[[Any], None]
) -> None:
    model, ids = extend(CASES[kind].make()), random_ids(2, 12)
    before = model(ids).logits
    change(mixer_of(model))
    after = model(ids).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(model)(ids).logits)


def test_training_keeps_nothing_and_its_gradients_are_whole() -> None:
    model, ids = extend(CASES["mamba"].make()), random_ids(2, 12)
    with torch.no_grad():
        model(ids)
    model(ids).logits.square().mean().backward()
    mixer = mixer_of(model)
    assert all(p.grad is not None and p.grad.any() for p in (mixer.A_log, mixer.conv1d.weight))
    model.train()
    with torch.no_grad():
        mixer.A_log.data.add_(0.5)  # no version tells of this
        twin = fresh(model)
        assert torch.equal(model(ids).logits, twin(ids).logits)


def test_weights_of_inference_mode_are_read_anew_each_time() -> None:
    ids = random_ids(2, 12)
    with torch.inference_mode():
        model = extend(CASES["mamba"].make())
        before = model(ids).logits
        mixer_of(model).A_log.add_(0.5)
        assert not torch.equal(before, model(ids).logits)


@torch.no_grad()
def test_what_is_kept_is_in_no_copy_and_in_no_file() -> None:
    model, ids = extend(CASES["mamba"].make()), random_ids(2, 12)
    logits: Tensor = model(ids).logits
    kept = mixer_of(model).__dict__["_widefield_derived"]
    assert set(kept) == {"rates", "taps"}
    assert all(value is None for value in copy.deepcopy(kept).values())
    assert not any("derived" in name for name in model.state_dict())
    file = io.BytesIO()
    torch.save(kept, file)
    assert len(file.getvalue()) < 2000
    assert torch.equal(copy.deepcopy(model)(ids).logits, logits)
