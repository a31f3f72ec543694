"""The y of Mamba-2's scan in CUDA C++: in the emulator, and the whole scan on a Hopper GPU."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import emulated_cuda, emulated_ssd
from tests.ops.cases import DELTAS, ssd_inputs
from widefield import ops
from widefield.ops import _nvrtc
from widefield.ops._delta import effective_delta
from widefield.ops.ssd import chunked, native, reference
from widefield.plan import LayerPlan, SSDInputs

ON_HOPPER = torch.cuda.is_available() and native._has_tensor_cores(0)
LOG2E = 1.4426950408889634


@pytest.fixture
def emulated(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if emulated_cuda.compiler() is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(_nvrtc, "build", partial(emulated_ssd.build, folder=compiled))
    native._outputs_kernel.cache_clear()
    native._states_kernel.cache_clear()
    yield
    native._outputs_kernel.cache_clear()
    native._states_kernel.cache_clear()


def wide(inputs: SSDInputs) -> SSDInputs:
    """In float64."""
    tensors = {
        name: value.double()
        for name in ("x", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
        if (value := getattr(inputs, name)) is not None
    }
    return inputs.replace(**tensors)


def error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def strided(inputs: SSDInputs) -> SSDInputs:
    """x, B and C as parts of one tensor, as a mixer has them."""
    names = ("x", "B", "C")
    parts = [getattr(inputs, name) for name in names]
    joined = torch.cat([part.flatten(2) for part in parts], dim=-1)
    pieces = joined.split([part.flatten(2).shape[-1] for part in parts], dim=-1)
    shaped = (p.unflatten(-1, q.shape[2:]) for p, q in zip(pieces, parts, strict=True))
    return inputs.replace(**dict(zip(names, shaped, strict=True)))


def prepared(inputs: SSDInputs, segment: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernels before this one leave: Δ, sums of decays; of segments states and decays."""
    exact = wide(inputs).replace(initial_state=None)
    delta = effective_delta(exact, None)
    logs = delta * exact.A
    starts = range(0, logs.shape[1], segment)
    sums = [c.cumsum(1) for s in starts for c in logs[:, s : s + segment].split(64, 1)]
    exactly = (LOG2E * torch.cat(sums, 1)).transpose(1, 2).contiguous()
    made = [delta.transpose(1, 2).float().contiguous(), exactly.float()]
    made.append((exactly - made[1].double()).float())
    added, kept = [], []
    for start in starts:
        part = slice(start, start + segment)
        pieces = {n: getattr(exact, n)[:, part] for n in ("x", "delta", "B", "C")}
        added.append(reference.ssd(exact.replace(**pieces))[1])
        kept.append(torch.exp(logs[:, part].sum(1)))
    return made, [torch.stack(each, 1).float().contiguous() for each in (added, kept)]


def normed(y: Tensor, squares: Tensor) -> Tensor:
    """What the gated norm makes of y in the end."""
    width = y.shape[2] * y.shape[3]
    scale = torch.rsqrt(squares.double().sum(-1) / width + 1e-5)
    return y.double() * scale[..., None, None]


def assert_y_is_exact(inputs: SSDInputs, gate: native.Gate | None, segment: int) -> None:
    made, passed = prepared(inputs, segment)
    added, kept = native.states(inputs, made, segment, passed[1].shape[1])
    assert error(added, passed[0].double()) <= 3e-7
    logs = passed[1].log2().abs().clamp_max(150).max()
    assert error(kept, passed[1].double()) <= 1e-7 * max(1.0, float(logs))
    y, final, squares = native.outputs(inputs, made, passed, segment, gate)
    truth, state = reference.ssd(wide(inputs))
    assert error(final, state) <= 3e-7
    same, _ = reference.ssd(inputs)
    if gate is not None:
        same, near = reference.gated(same, gate.z, gate.gain)
        truth, exact = reference.gated(truth, gate.z.double(), gate.gain.double())
        assert squares is not None
        assert error(normed(y, squares), normed(truth, exact)) <= 2 * error(
            normed(same, near), normed(truth, exact)
        )
    assert error(y, truth) <= 2 * error(same, truth)


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize(
    ("shape", "segment"),
    [
        # batch, length, heads, channels, groups, states
        ((1, 64, 2, 64, 1, 128), 64),
        ((2, 100, 2, 64, 1, 128), 64),
        ((1, 150, 4, 128, 2, 64), 128),
        ((2, 1, 3, 64, 3, 64), 64),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_each_variant_is_right_in_the_emulator(
    shape: tuple[int, ...], segment: int, gated: bool
) -> None:
    torch.manual_seed(0)
    inputs = strided(ssd_inputs(*shape, dtype=torch.bfloat16))
    gate = None
    if gated:
        z = torch.randn(inputs.x.shape).bfloat16()
        gate = native.Gate(z, torch.rand(shape[2] * shape[3]).bfloat16())
    else:
        inputs = inputs.replace(D=None, initial_state=None)
    assert_y_is_exact(inputs, gate, segment)


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize("delta", DELTAS)
def test_any_delta_is_right_in_the_emulator(delta: str) -> None:
    torch.manual_seed(1)
    inputs = strided(ssd_inputs(1, 100, 2, 64, 1, 64, delta=delta, dtype=torch.bfloat16))
    assert_y_is_exact(inputs, None, 64)


def test_segments_fill_the_processors() -> None:
    for blocks, length in ((40, 65_536), (12, 65_536), (40, 8192), (500, 8192), (1, 1)):
        segment = native.segment_of(132, blocks, length)
        assert segment % 64 == 0
        slots = -(-length // segment)
        rounds = -(-blocks * slots // 132)
        assert blocks * slots / (132 * rounds) > 0.9 or length == 1


def on_device(inputs: SSDInputs) -> SSDInputs:
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias", "initial_state")
    tensors = {n: v.cuda() for n in names if (v := getattr(inputs, n)) is not None}
    return strided(inputs.replace(**tensors))


Pair = tuple[float, float]  # an error, and the reference's


def errors_on_a_gpu(inputs: SSDInputs, plan: LayerPlan | None = None) -> tuple[Pair, Pair]:
    """Of y, and of what the gated norm makes of it; states are judged here."""
    assert native.supports(inputs)
    truth, state = chunked.ssd(wide(inputs), plan)
    y, final = ops.ssd(inputs, plan)
    assert error(final, state) <= 5e-7
    of_y = error(y, truth), error(truth.bfloat16(), truth)
    z = torch.randn(inputs.x.shape, device="cuda").bfloat16()
    gain = torch.rand(inputs.x.shape[2] * inputs.x.shape[3], device="cuda").bfloat16()
    assert ops.gates_in_the_scan(inputs, z, gain)
    y, again, squares = ops.gated_ssd(inputs, z, gain, plan)
    assert torch.equal(final, again)
    exact = normed(*reference.gated(truth, z.double(), gain.double()))
    same = normed(*reference.gated(truth.bfloat16(), z, gain))
    return of_y, (error(normed(y, squares), exact), error(same, exact))


def assert_as_exact(pairs: list[tuple[Pair, Pair]]) -> None:
    """On average over draws: with heavy tails one token may make up most of one."""
    for part in (0, 1):
        ours = sum(pair[part][0] ** 2 for pair in pairs)
        assert math.sqrt(ours) <= 2 * math.sqrt(sum(pair[part][1] ** 2 for pair in pairs))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of capability 9.0 and NVRTC")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("length", [1, 63, 1000, 65_537, 1_048_577])
def test_any_length_is_as_exact_on_a_gpu(length: int) -> None:
    torch.manual_seed(0)
    inputs = ssd_inputs(1, length, 2, 64, 1, 128, dtype=torch.bfloat16)
    assert_as_exact([errors_on_a_gpu(on_device(inputs))])


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of capability 9.0 and NVRTC")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape", [(2, 500, 8, 64, 1, 128), (3, 500, 6, 128, 2, 64), (1, 500, 80, 64, 1, 128)]
)
@pytest.mark.parametrize("delta", DELTAS)
def test_any_shape_and_delta_is_as_exact_on_a_gpu(shape: tuple[int, ...], delta: str) -> None:
    if delta == "absurd":
        pytest.skip("infinite in the reference, too")
    bare, floored = [], []
    plan = LayerPlan(delta_floor=torch.full((shape[2],), 0.05, device="cuda"))
    for seed in range(4):
        torch.manual_seed(seed)
        inputs = on_device(ssd_inputs(*shape, delta=delta, dtype=torch.bfloat16))
        bare.append(errors_on_a_gpu(inputs))
        floored.append(errors_on_a_gpu(inputs, plan))
    assert_as_exact(bare)
    assert_as_exact(floored)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of capability 9.0 and NVRTC")
def test_more_than_two_to_the_31_elements_are_read_and_written_right() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    length, heads = 280_000, 128
    inputs = SSDInputs(
        x=torch.randn(1, length, heads, 64, **shape),
        delta=torch.randn(1, length, heads, **shape) - 3,
        A=-torch.linspace(1, 16, heads, device="cuda"),
        B=torch.randn(1, length, 8, 128, **shape),
        C=torch.randn(1, length, 8, 128, **shape),
    )
    z = torch.randn(1, length, heads, 64, **shape)
    gain = torch.rand(heads * 64, device="cuda")
    assert inputs.x.numel() > 2**31
    y, _, squares = ops.gated_ssd(inputs, z, gain)
    pieces = {n: getattr(inputs, n)[:, -4000:] for n in ("x", "delta", "B", "C")}
    truth, _ = chunked.ssd(wide(inputs.replace(**pieces)))
    truth, exact = reference.gated(truth[:, -1000:], z[:, -1000:].double(), gain.double())
    assert error(y[:, -1000:], truth) <= 2 * 1.7e-3
    assert error(squares[:, -1000:].sum(-1), exact.sum(-1)) <= 2e-3
    assert math.isfinite(float(squares.sum()))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of capability 9.0 and NVRTC")
@pytest.mark.parametrize("name", ["x", "delta", "B"])
@pytest.mark.parametrize("at", [3, 700])
def test_a_value_that_is_no_number_never_vanishes_on_a_gpu(name: str, at: int) -> None:
    # The decay of 1,000 tokens leaves nothing of it in any other state.
    inputs = ssd_inputs(1, 1000, 2, 64, 1, 128, dtype=torch.bfloat16)
    inputs = inputs.replace(delta_bias=None, delta_softplus=False)
    inputs = on_device(inputs.replace(delta=torch.full_like(inputs.delta, 10.0)))
    spoilt = getattr(inputs, name).clone()
    spoilt[0, at] = math.nan
    changed = {n: getattr(inputs, n) for n in ("x", "delta", "B")} | {name: spoilt}
    changed["x"], changed["B"] = (changed[n].contiguous() for n in ("x", "B"))
    y, state = ops.ssd(inputs.replace(**changed))
    assert native.supports(inputs)
    assert y[0, at].isnan().all()
    assert state.isnan().any()
    assert not y[0, : at - at % 64].isnan().any()
