"""Every family on a GPU, against a CPU: logits, the methods' choices, generation.

Stock itself is no measure here: where mamba_ssm is installed, it runs kernels that need a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import widefield as wf
from tests.families.cases import CASES, SUPPORTED_CASES, random_ids, relative
from widefield.ops import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LENGTH = 300
METHODS = ("longmamba", "decimamba")


@pytest.fixture(params=SUPPORTED_CASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, LENGTH)


@pytest.fixture
def mask() -> Tensor:
    """Padding in the last row."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[-1, :113] = 0
    return mask


def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of all tokens, in float64 on the CPU."""
    device = next(model.parameters()).device
    mask = None if mask is None else mask.to(device)
    return model(ids.to(device), attention_mask=mask).logits.double().cpu()


def extended(name: str, method: str | None) -> Any:
    """A model on the CPU with a method on."""
    model = CASES[name].make()
    if method == "longmamba":
        calibration = wf.calibrate(model, random_ids(3, 40, seed=3), train_length=40)
        return wf.extend(model, wf.LongMamba(calibration, reduction="slowest"))
    if method == "decimamba":
        layout = wf.extend(model).widefield.layout
        if layout.decimation is not None:
            pytest.skip(layout.decimation)
        return wf.extend(model, wf.DeciMamba(layers=[layout.layers[1]], base_length=100))
    return wf.extend(model)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prefill_is_as_exact_as_plain_torch(name: str, dtype: torch.dtype, ids: Tensor) -> None:
    model = wf.extend(CASES[name].make())
    with use_backend("reference"):
        truth = logits(model, ids)  # experts know no float64
        allowed = 2 * relative(logits(copy.deepcopy(model).to(dtype), ids), truth)
    assert relative(logits(model.to("cuda", dtype), ids), truth) <= max(allowed, 1e-5)


@torch.no_grad()
def test_a_left_padded_batch_equals_plain_torch(name: str, ids: Tensor, mask: Tensor) -> None:
    model = wf.extend(CASES[name].make())
    with use_backend("reference"):
        truth = logits(model, ids, mask)[mask.bool()]
    assert relative(logits(model.cuda(), ids, mask)[mask.bool()], truth) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_what_it_does_on_the_cpu(name: str, method: str, ids: Tensor) -> None:
    model = extended(name, method)
    truth = logits(model, ids)[:, -1]
    model.cuda()
    assert relative(logits(model, ids)[:, -1], truth) < 1e-5
    parts = wf.prefill(model, ids.cuda(), chunk_size=77).logits[:, -1]
    assert relative(parts.double().cpu(), truth) < 2e-5
    with wf.extended(model):
        assert relative(logits(model, ids)[:, -1], truth) > 1e-4


def test_greedy_generation_equals_that_of_a_cpu(name: str, ids: Tensor, mask: Tensor) -> None:
    model = wf.extend(CASES[name].make())
    call: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    truth = model.generate(ids, attention_mask=mask, **call)
    ours = model.cuda().generate(ids.cuda(), attention_mask=mask.cuda(), **call)
    assert torch.equal(ours.cpu(), truth)


@torch.no_grad()
def test_a_state_that_is_not_finite_is_an_error(ids: Tensor) -> None:
    model = extended("mamba", "longmamba").cuda()
    first = next(p for n, p in model.named_parameters() if n.endswith("A_log"))
    first.view(-1)[0] = torch.nan
    with pytest.raises(wf.WidefieldError, match="not finite"):
        model(ids.cuda())
