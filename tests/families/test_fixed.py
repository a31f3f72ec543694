"""Attention of one token over a cache of one size: as exact as torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

import widefield as wf
from tests.families.cases import CASES, random_ids
from widefield.families import FixedAttention
from widefield.families._fixed import _in_two_products, attend

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = [pytest.mark.gpu] if GPU else []
# B, heads, groups, widths of keys and values
SHAPES = [(1, 4, 2, 8, 8), (3, 6, 1, 16, 16), (2, 4, 4, 8, 12), (1, 12, 4, 64, 64)]


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def of_torch(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        query, keys, values, attn_mask=~hidden[:, None, None], scale=0.3, enable_gqa=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("held", [1, 63, 1000])
def test_it_is_as_exact_as_attention_of_torch(
    dtype: torch.dtype, shape: tuple[int, ...], held: int
) -> None:
    batch, heads, groups, width, others = shape
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=DEVICE, dtype=dtype)

    query = normal(batch, heads, 1, width)
    keys, values = normal(batch, groups, held, width), normal(batch, groups, held, others)
    hidden = torch.rand(batch, held, generator=g, device=DEVICE) < 0.3
    hidden[:, 0] = False
    mask = hidden[:, None, None].float() * torch.finfo(torch.float32).min
    truth = of_torch(query.double(), keys.double(), values.double(), hidden)
    allowed = 2 * error(of_torch(query, keys, values, hidden), truth) + 3e-7
    # What is hidden counts for nothing, however large it is.
    large = torch.where(hidden[:, None, :, None], 1e3, values)
    for way in (attend, _in_two_products):
        found = way(query, keys, large, mask, 0.3)
        assert found.shape == (batch, heads, 1, others) and found.dtype == dtype
        assert error(found, truth) <= allowed


@torch.no_grad()
def test_attention_that_is_not_torchs_is_refused() -> None:
    model = CASES["bamba"].make().to(DEVICE)
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 5).to(DEVICE), past_key_values=cache, use_cache=True)
    fixed = FixedAttention(model, cache, FixedAttention.room_for(cache, 1))
    with pytest.raises(wf.WidefieldError, match="scaled_dot_product_attention"):
        fixed.step(lambda **arguments: None)
