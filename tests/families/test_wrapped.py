"""Models that other libraries have changed: compiled, with adapters, with other linear layers."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.families.cases import CASES, random_ids, relative
from widefield.extension import extend, restore

CLOSE = 1e-5
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
NAMES = ["mamba", "falcon-mamba", "jamba", "mamba2", "nemotron-h", "falcon-h1"]


@pytest.fixture
def ids() -> Tensor:
    return random_ids(2, 30)


@pytest.fixture
def mask(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    return mask


class LowRank(nn.Module):
    """A frozen linear layer and a term of rank 2 beside it, as adapters add it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.3)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T

    def merged(self) -> nn.Linear:
        linear = copy.deepcopy(self.base)
        linear.weight.data += self.up @ self.down
        return linear


class Bytes(nn.Module):
    """A linear layer whose weight is no matrix of floats, as quantization leaves it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(base.weight.detach().abs().amax(1, keepdim=True) / 127)
        whole = (base.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)

    def merged(self) -> nn.Linear:
        linear = nn.Linear(self.weight.shape[1], self.weight.shape[0], self.bias is not None)
        linear.weight.data = (self.weight * self.scale).detach()
        linear.bias = self.bias
        return linear


def replaced(model: nn.Module, change: Callable[[Any], nn.Module], kind: type[nn.Module]) -> None:
    """Exchange every projection of that kind in a model's mixers."""
    for module in list(model.modules()):
        if hasattr(module, "A_log"):
            for name in PROJECTIONS:
                if isinstance(getattr(module, name, None), kind):
                    setattr(module, name, change(getattr(module, name)))


@torch.no_grad()
def seen(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """Logits of a padded batch, and of one token more."""
    first = model(ids, attention_mask=mask, use_cache=True)
    name = "cache_params" if "cache_params" in first else "past_key_values"
    mask = torch.cat([mask, mask[:, -1:]], dim=1)
    step = model(ids[:, :1], attention_mask=mask, use_cache=True, **{name: first[name]})
    return [first.logits[0], first.logits[1, 11:], step.logits]


@pytest.mark.parametrize("kind", [LowRank, Bytes])
@pytest.mark.parametrize("name", NAMES)
def test_projections_that_were_replaced_are_honoured(
    name: str, kind: Any, ids: Tensor, mask: Tensor
) -> None:
    model = CASES[name].make()
    plain = seen(extend(model), ids, mask)
    restore(model)
    replaced(model, kind, nn.Linear)
    ours = seen(extend(model), ids, mask)
    restore(model)
    replaced(model, kind.merged, kind)
    truth = seen(extend(model), ids, mask)
    for mine, merged, before in zip(ours, truth, plain, strict=True):
        assert relative(mine, merged) < CLOSE
        assert relative(mine, before) > 1e-3


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("first", ["extended", "adapted"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_adapters_of_peft_are_honoured(name: str, first: str, ids: Tensor, mask: Tensor) -> None:
    peft = pytest.importorskip("peft")
    names = ["in_proj", "x_proj", "dt_proj"] if name == "mamba" else ["in_proj"]
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False, r=2)
    model = CASES[name].make()
    if first == "extended":
        extend(model)
    adapted = peft.get_peft_model(model, config)
    extend(model)
    ours = seen(adapted, ids, mask)
    truth = seen(extend(restore(adapted.merge_and_unload())), ids, mask)
    for mine, merged in zip(ours, truth, strict=True):
        assert relative(mine, merged) < CLOSE


COMPILED = """
import warnings
import torch, widefield as wf
from tests.families.cases import CASES, random_ids, relative
warnings.simplefilter("error")
torch.set_num_threads(1)
ids = random_ids(2, 30)
mask = torch.ones_like(ids)
mask[1, :11] = 0
for name in ("mamba", "mamba2"):
    method = wf.DeciMamba(layers=[1], base_length=12, min_length=2)
    model = wf.extend(CASES[name].make(num_hidden_layers=2), method)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        ours, plain = (m(ids, attention_mask=mask).logits for m in (compiled, model))
    assert ours.shape == plain.shape == (2, 12, 384)
    assert relative(ours[:, -1], plain[:, -1]) < 1e-4
    print(name)
"""


def test_a_compiled_model_says_the_same() -> None:
    # On its own: what checks shapes in the tests is no code that a user would compile.
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert run.stdout.split() == ["mamba", "mamba2"], run.stderr
