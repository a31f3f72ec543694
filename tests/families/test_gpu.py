"""Every family on a GPU: stock's logits, the methods' choices, chunks, generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import widefield as wf
from tests.families.cases import CASES, SUPPORTED_CASES, random_ids, relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LENGTH = 300
METHODS = ("longmamba", "decimamba")


@pytest.fixture(params=SUPPORTED_CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def padded(batch: int) -> Tensor:
    """A mask with padding in the last row."""
    mask = torch.ones(batch, LENGTH, dtype=torch.long)
    mask[-1, :113] = 0
    return mask


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of all tokens, in float64 on the CPU."""
    device = next(model.parameters()).device
    mask = None if mask is None else mask.to(device)
    return model(ids.to(device), attention_mask=mask).logits.double().cpu()


def methods(model: Any) -> dict[str, Any]:
    """One instance of each method that takes the model."""
    calibration = wf.calibrate(model, random_ids(3, 40, seed=3), train_length=40)
    found: dict[str, Any] = {"longmamba": wf.LongMamba(calibration, reduction="slowest")}
    layout = wf.extend(model).widefield.layout
    if layout.decimation is None:
        found["decimamba"] = wf.DeciMamba(layers=[layout.layers[1]], base_length=100)
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefill_is_as_exact_as_stock(name: str, dtype: torch.dtype) -> None:
    stock, ids = CASES[name].make(), random_ids(2, LENGTH)
    truth = logits(copy.deepcopy(stock).double(), ids)
    stock = stock.to("cuda", dtype)
    allowed = relative(logits(stock, ids), truth)
    ours = relative(logits(wf.extend(stock), ids), truth)
    assert ours <= 2 * allowed + 3e-7


@torch.no_grad()
def test_a_left_padded_batch_equals_stock(name: str) -> None:
    model, ids, mask = CASES[name].make().cuda(), random_ids(2, LENGTH), padded(2)
    stock = logits(model, ids, mask)[mask.bool()]
    assert relative(logits(wf.extend(model), ids, mask)[mask.bool()], stock) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_what_it_does_on_the_cpu(name: str, method: str) -> None:
    model, ids = CASES[name].make(), random_ids(2, LENGTH)
    found = methods(model)
    if method not in found:
        pytest.skip("the method does not take the family")
    plain = logits(wf.extend(model), ids)[:, -1]
    wf.extend(model, found[method])
    truth = logits(model, ids)[:, -1]
    ours = logits(model.cuda(), ids)[:, -1]
    assert relative(ours, truth) < 1e-5
    assert relative(truth, plain) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("method", [None, *METHODS])
def test_chunks_are_the_whole(name: str, method: str | None) -> None:
    model, ids = CASES[name].make(), random_ids(2, LENGTH)
    found = methods(model)
    if method is not None and method not in found:
        pytest.skip("the method does not take the family")
    wf.extend(model, *([] if method is None else [found[method]])).cuda()
    whole = logits(model, ids)[:, -1]
    parts = wf.prefill(model, ids.cuda(), chunk_size=77).logits[:, -1]
    assert relative(parts.double().cpu(), whole) < 1e-5


def test_greedy_generation_equals_stock(name: str) -> None:
    model, ids = CASES[name].make().cuda(), random_ids(2, LENGTH).cuda()
    call = {"attention_mask": padded(2).cuda(), "max_new_tokens": 6, "do_sample": False}
    stock = model.generate(ids, **call)
    assert torch.equal(wf.extend(model).generate(ids, **call), stock)


@torch.no_grad()
def test_a_state_that_is_not_finite_is_an_error(name: str) -> None:
    model = CASES[name].make()
    wf.extend(model, methods(model)["longmamba"]).cuda()
    first = next(p for n, p in model.named_parameters() if n.endswith("A_log"))
    first.data.view(-1)[0] = torch.nan
    with pytest.raises(wf.WidefieldError, match="not finite"):
        model(random_ids(1, LENGTH).cuda())
