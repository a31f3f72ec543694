"""Scan inputs for the tests of the ops: ordinary ones, and Δ as unkind as it gets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.ops.selective_scan import reference
from widefield.ops.ssd import chunked
from widefield.plan import LayerPlan, ScanInputs, SSDInputs

Inputs = TypeVar("Inputs", ScanInputs, SSDInputs)
Options = Callable[[ScanInputs], tuple[ScanInputs, LayerPlan]]

DELTAS = ("random", "tiny", "huge", "absurd", "zero", "heavy tails", "constant")


def raw_delta(kind: str, *shape: int) -> Tensor:
    """Δ before its softplus."""
    noise = torch.randn(*shape)
    if kind == "random":
        return noise * 2 - 3
    if kind == "tiny":
        return noise - 46  # Δ near 1e-20
    if kind == "huge":
        return 1e4 * (1 + noise.abs())
    if kind == "absurd":
        return torch.full(shape, 1e30)
    if kind == "zero":
        return torch.full(shape, -1e3)
    if kind == "heavy tails":
        return torch.exp(3 * noise) - 8
    if kind == "constant":
        return (torch.randn(shape[-1]) - 3).expand(*shape).contiguous()
    raise AssertionError(kind)


def scan_inputs(
    batch: int = 2,
    length: int = 50,
    channels: int = 40,
    state: int = 16,
    *,
    delta: str = "random",
    dtype: torch.dtype = torch.float32,
) -> ScanInputs:
    """Inputs of one scan as a model makes them: views into the outputs of wider projections."""
    x, z = torch.randn(batch, length, 2 * channels).to(dtype).chunk(2, dim=-1)
    _, B, C = torch.randn(batch, length, 5 + 2 * state).to(dtype).split([5, state, state], dim=-1)
    return ScanInputs(
        x=x,
        z=z,
        delta=raw_delta(delta, batch, length, channels).to(dtype),
        A=-torch.exp(2 * torch.rand(channels, state) + torch.arange(state).log1p()) / 4,
        B=B,
        C=C,
        D=torch.randn(channels),
        delta_bias=0.1 * torch.randn(channels),
        initial_state=torch.randn(batch, channels, state),
    )


def ssd_inputs(
    batch: int = 2,
    length: int = 50,
    heads: int = 4,
    width: int = 20,
    groups: int = 2,
    state: int = 18,
    *,
    delta: str = "random",
    dtype: torch.dtype = torch.float32,
) -> SSDInputs:
    """Inputs of one scan of Mamba-2 as a model makes them: views into the output of one product."""
    sizes = [heads * width, groups * state, groups * state]
    x, B, C = torch.randn(batch, length, sum(sizes)).to(dtype).split(sizes, dim=-1)
    return SSDInputs(
        x=x.unflatten(-1, (heads, width)),
        delta=raw_delta(delta, batch, length, heads).to(dtype),
        A=-torch.exp(torch.rand(heads) * math.log(16)),
        B=B.unflatten(-1, (groups, state)),
        C=C.unflatten(-1, (groups, state)),
        D=torch.randn(heads),
        delta_bias=0.1 * torch.randn(heads),
        initial_state=torch.randn(batch, heads, width, state),
    )


def in_float64(inputs: Inputs, plan: LayerPlan | None) -> tuple[Inputs, LayerPlan | None]:
    """The same scan in float64, with Δ made in float64 but frozen where float32 freezes it.

    On which side of its floor a Δ falls is decided in float32; error is what is left after that.
    """
    wide = {
        field.name: value.double()
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor) and value.is_floating_point()
    }
    exact = inputs.replace(**wide)
    if plan is None:
        return exact, None
    frozen = reference.effective_delta(inputs, plan) == 0
    delta = reference.effective_delta(exact, LayerPlan(delta_scale=plan.delta_scale))
    exact = exact.replace(
        delta=delta.masked_fill(frozen, 0.0), delta_bias=None, delta_softplus=False
    )
    if isinstance(exact, SSDInputs):
        exact = exact.replace(delta_limit=(0.0, math.inf))  # already in Δ
    return exact, LayerPlan(decay_scale=plan.decay_scale)


def condition(exact: ScanInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    """How large y and state would be without cancellation: what rounding errors are relative to."""
    names = ("x", "B", "C", "D", "initial_state")
    sizes = {n: v.abs() for n in names if (v := getattr(exact, n)) is not None}
    y, state = reference.selective_scan(exact.replace(**sizes, z=None), plan)
    return y if exact.z is None else y * F.silu(exact.z).abs(), state


def ssd_condition(exact: SSDInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    """The same for the scan of Mamba-2; in chunks, since the reference takes long."""
    names = ("x", "B", "C", "D", "initial_state")
    sizes = {n: v.abs() for n in names if (v := getattr(exact, n)) is not None}
    return chunked.ssd(exact.replace(**sizes), plan)


def bare(inputs: ScanInputs) -> tuple[ScanInputs, LayerPlan]:
    """Nothing that can be left out."""
    none = {"D": None, "z": None, "delta_bias": None, "initial_state": None}
    return inputs.replace(**none, delta_softplus=False, delta=inputs.delta.abs()), LayerPlan()


def usual(inputs: ScanInputs) -> tuple[ScanInputs, LayerPlan]:
    return inputs, LayerPlan()


def everything(inputs: ScanInputs, floor: float = 0.1) -> tuple[ScanInputs, LayerPlan]:
    """Padding, and a plan with all that a scan can be asked for, floors up to `floor`."""
    batch, length, channels = inputs.x.shape
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[0, : length // 3] = False
    plan = LayerPlan(
        delta_floor=torch.rand(channels) * floor,
        delta_scale=torch.rand(batch, channels) + 0.5,
        decay_scale=torch.rand(channels) + 0.5,
    )
    return inputs.replace(valid=valid), plan


def packed(inputs: ScanInputs) -> tuple[ScanInputs, LayerPlan]:
    """Sequences of several lengths in one row, some of them empty."""
    length, channels = inputs.x.shape[1:]
    ends = sorted([0, 0, length // 5, (length + 4) // 5, length // 2, length, length])
    plan = LayerPlan(
        delta_floor=torch.rand(len(ends) - 1, channels) * 0.1,
        decay_scale=torch.rand(len(ends) - 1, channels) + 0.5,
    )
    state = torch.randn(len(ends) - 1, channels, inputs.A.shape[1])
    first = {name: getattr(inputs, name)[:1] for name in ("x", "delta", "B", "C", "z")}
    ends = torch.tensor(ends, dtype=torch.int32)
    return inputs.replace(**first, initial_state=state, cu_seqlens=ends), plan


def moved(inputs: ScanInputs, device: str) -> ScanInputs:
    """On a device, the large tensors as views of wider ones."""
    changes = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        if not isinstance(value, Tensor):
            continue
        if value.ndim == 3 and field.name in ("x", "z", "B", "C"):
            wide = torch.cat([value, value], dim=-1).to(device)
            changes[field.name] = wide[..., : value.shape[-1]]
        else:
            changes[field.name] = value.to(device)
    return inputs.replace(**changes)


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))
