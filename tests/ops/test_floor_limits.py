"""Which tokens the scans in CUDA C++ freeze: on a GPU exactly those that torch freezes.

They compare what the softplus is made of with a limit, found for each channel at the start. In the
emulator the yardstick is the C library's arithmetic, which the kernels' source then uses, too.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops import emulated_relay, emulated_wide, machine
from tests.ops.machine import DEVICE, ON_GPU
from widefield.ops.selective_scan import _calls, relay, wide
from widefield.plan import LayerPlan, ScanInputs

NEVER = 50.0  # Δ of tokens that are not frozen, and that no other token has

Scan = Callable[[ScanInputs, LayerPlan], Tensor]


def few_rows(inputs: ScanInputs, plan: LayerPlan) -> Tensor:
    """y of the scan for few long rows."""
    if ON_GPU:
        return relay.selective_scan(inputs, plan)[0]
    tensors = _calls.readable(_calls.read(inputs, plan))
    layout = relay.Layout(warps=2, tile=4)
    return relay.run(relay.launch_of(tensors, inputs.delta_softplus, layout), tensors)[0]


def many_rows(inputs: ScanInputs, plan: LayerPlan) -> Tensor:
    """y of the scan for many rows."""
    return wide.Call.prepare(inputs, plan, _small()).forward(save=False)[0]


def _small() -> tuple[wide.Layout, wide.Layout] | None:
    """Layouts that take little time in the emulator."""
    small = wide.Layout(per_lane=2, tile=8, chunk=8, warps=1, blocks=1)
    return None if ON_GPU else (small, small)


@pytest.fixture(params=[few_rows, many_rows])
def scan(request: pytest.FixtureRequest, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Scan:
    kernels = {few_rows: (relay, emulated_relay), many_rows: (wide, emulated_wide)}
    machine.use(*kernels[request.param], compiled, monkeypatch)
    return request.param


def softplus(v: Tensor) -> Tensor:
    """As the kernels' yardstick has it: torch on a GPU, else the C library."""
    if ON_GPU:
        return F.softplus(v)
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    for name in ("expf", "log1pf"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float]
    wanted = [u if u > 20 else library.log1pf(library.expf(u)) for u in v.flatten().tolist()]
    return torch.tensor(wanted, dtype=torch.float32).view(v.shape)


def steps_of(delta: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """Δ before its floor, of tokens and channels."""
    v = delta.float() if bias is None else delta.float() + bias
    return softplus(v) if scale is None else softplus(v) * scale


def scan_inputs(delta: Tensor, bias: Tensor | None = None, softplus: bool = True) -> ScanInputs:
    """One row of tokens, in which everything but Δ is 1."""
    ones = torch.ones(1, *delta.shape, dtype=delta.dtype, device=delta.device)
    return ScanInputs(
        x=ones,
        delta=delta[None],
        A=-torch.ones(delta.shape[1], 16, device=delta.device),
        B=ones[..., :1].expand(-1, -1, 16).contiguous(),
        C=ones[..., :1].expand(-1, -1, 16).contiguous(),
        delta_bias=bias,
        delta_softplus=softplus,
    )


def frozen(
    scan: Scan, delta: Tensor, bias: Tensor | None, floor: Tensor, scale: Tensor | None
) -> Tensor:
    """Which of (tokens, channels) the scan freezes.

    A state forgets at once, unless it is frozen. So behind a token with a Δ of `NEVER`, y is the
    same again only if the next one is frozen.
    """
    tokens, channels = delta.shape
    between = torch.stack([torch.full_like(delta, NEVER), delta], dim=1)
    inputs = scan_inputs(between.view(2 * tokens, channels), bias)
    inputs = inputs.replace(A=torch.full_like(inputs.A, -3e38))
    y = scan(inputs, LayerPlan(delta_floor=floor, delta_scale=scale))[0]
    return y[1::2] == y[::2]


def assert_decided(
    scan: Scan, delta: Tensor, bias: Tensor | None, floor: Tensor, scale: Tensor | None = None
) -> None:
    """That the scan freezes what lies below its floor, wherever that can be seen from outside."""
    steps = steps_of(delta, bias, scale)
    seen = ((steps > 1e-34) & (delta < 30)) | (steps < floor)
    found = frozen(scan, delta, bias, floor, scale)
    assert torch.equal(found[seen], (steps < floor)[seen])
    assert bool(seen.any())


def values_of_bfloat16(step: int) -> Tensor:
    """All of them up to 30, or each so many-th."""
    values = torch.arange(0, 1 << 16, step, dtype=torch.int32).to(torch.int16)
    values = values.view(torch.bfloat16)
    return values[values < 30].to(DEVICE)


def floors_near(steps: Tensor, seed: int) -> list[Tensor]:
    """Floors that are one token's Δ in each channel, and the floats next to it."""
    generator = torch.Generator().manual_seed(seed)
    likely = ((steps > 1e-3) & (steps < 10)).double().cpu().T
    tie = steps.gather(0, likely.multinomial(1, generator=generator).T.to(steps.device))[0]
    return [tie, torch.nextafter(tie, tie + 1), torch.nextafter(tie, tie - 1)]


@pytest.mark.parametrize("options", [(), ("bias",), ("bias", "scale")], ids=str)
def test_bfloat16_steps_at_a_floor_are_decided_as_torch_does(
    scan: Scan, options: tuple[str, ...]
) -> None:
    channels = 36 if ON_GPU else 12
    delta = values_of_bfloat16(1 if ON_GPU else 199)[:, None].expand(-1, channels).contiguous()
    bias = (4 * torch.rand(channels) - 5).to(DEVICE) if "bias" in options else None
    scale = (3 * torch.rand(channels) + 0.01).to(DEVICE) if "scale" in options else None
    for floor in floors_near(steps_of(delta, bias, scale), 3):
        assert_decided(scan, delta, bias, floor, scale)


@pytest.mark.parametrize("scaled", [False, True])
def test_floats_next_to_a_floor_are_decided_as_torch_does(scan: Scan, scaled: bool) -> None:
    channels = 1536 if ON_GPU else 12
    reach = torch.arange(-100, 101, 1 if ON_GPU else 5, dtype=torch.int32)[:, None]
    middle = torch.cat([12 * torch.rand(channels // 2) - 9, torch.randn(channels // 2) / 100])
    delta = (middle.view(torch.int32) + reach).view(torch.float32).to(DEVICE)
    scale = (3 * torch.rand(channels) + 0.01).to(DEVICE) if scaled else None
    floor = steps_of(delta, None, scale)[len(reach) // 2].contiguous()
    assert_decided(scan, delta, None, floor, scale)
    assert_decided(scan, delta, None, torch.nextafter(floor, floor + 1), scale)


@pytest.mark.parametrize("scaled", [False, True])
def test_extraordinary_floors_and_scales(scan: Scan, scaled: bool) -> None:
    floors = [0.0, -1.0, -math.inf, math.nan, 1e-45, 1e-42, 1e-38, 1e-20, math.log(2), 20.0,
              math.nextafter(20, 21), 29.0]  # fmt: skip
    scales = [1.0, 0.5, 1e-30, 1e30] if scaled else [1.0]
    floor = torch.tensor(floors).repeat(len(scales)).to(DEVICE)
    scale = torch.tensor(scales).repeat_interleave(len(floors)).to(DEVICE)
    values = [-1e30, -100.0, -87.0, -60.0, -3.0, -1e-8, 0.0, 1e-8, 19.5, 20.0, 20.5, 28.5]
    delta = torch.tensor(values, device=DEVICE)[:, None].expand(-1, len(floor)).contiguous()
    unscaled = steps_of(delta, None, None)
    below = unscaled * scale < floor
    # With a scale of 1e-30 a floor freezes the tokens between, too, and nothing can be seen.
    seen = ((unscaled * scale.clamp_max(1.0) > 1e-34) | below) & ~(NEVER * scale < floor)
    found = frozen(scan, delta, None, floor, scale if scaled else None)
    assert torch.equal(found[seen], below[seen])


def test_an_infinite_floor_freezes_all_but_an_infinite_step(scan: Scan) -> None:
    delta = torch.tensor([-1.0, 30.0, 3e38], device=DEVICE)[:, None].expand(3, 12)
    inputs = scan_inputs(delta.contiguous())
    floor = torch.full((12,), math.inf, device=DEVICE)
    assert not scan(inputs, LayerPlan(delta_floor=floor)).any()
    scale = torch.full((12,), 10.0, device=DEVICE)
    y = scan(inputs, LayerPlan(delta_floor=floor, delta_scale=scale))
    assert not y[:, :2].any() and y[:, 2].isinf().all()


def test_steps_without_a_softplus_are_compared_as_they_are(scan: Scan) -> None:
    channels = 12
    delta = values_of_bfloat16(1 if ON_GPU else 997)
    delta = delta[delta > 0][:, None].expand(-1, channels).contiguous()
    floor = torch.rand(channels, device=DEVICE).bfloat16().float()
    inputs = scan_inputs(delta, softplus=False)
    inputs = inputs.replace(A=torch.full_like(inputs.A, -3e38))
    y = scan(inputs, LayerPlan(delta_floor=floor))[0].float()
    previous = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    seen = delta.float() > 1e-34
    assert torch.equal((y == previous)[seen], (delta < floor)[seen])


def gradient_of_delta(inputs: ScanInputs, floor: Tensor) -> Tensor:
    """For gradients of y that are all 1."""
    call = wide.Call.prepare(inputs, LayerPlan(delta_floor=floor), _small())
    y, final, saved = call.forward(save=True)
    assert saved is not None
    gradient = call.backward(torch.ones_like(y), torch.zeros_like(final), saved)[1]
    assert gradient is not None
    return gradient[0]


@pytest.mark.parametrize("scan", [many_rows], indirect=True)
def test_just_the_frozen_tokens_get_no_gradient(scan: Scan) -> None:
    reach = torch.arange(-20, 21, dtype=torch.int32)[:, None]
    middle = torch.cat([6 * torch.rand(6) - 7, torch.tensor([-0.3, -1e-3, 1e-4, 0.2, 0.7, 1.9])])
    delta = (middle.view(torch.int32) + reach).view(torch.float32).to(DEVICE)
    steps = steps_of(delta, None, None)
    for floor in (steps[20], torch.nextafter(steps[20], steps[20] + 1)):
        gradient = gradient_of_delta(scan_inputs(delta), floor.contiguous())
        assert torch.equal(gradient == 0, steps < floor)


@pytest.mark.parametrize("scan", [many_rows], indirect=True)
def test_below_a_negative_floor_there_is_no_gradient_either(scan: Scan) -> None:
    delta = torch.tensor([-0.5, -0.2, -0.1, 0.0, 0.3], device=DEVICE)[:, None].expand(-1, 12)
    floor = torch.full((12,), -0.15, device=DEVICE)
    gradient = gradient_of_delta(scan_inputs(delta.contiguous(), softplus=False), floor)
    assert torch.equal(gradient == 0, delta < floor)
