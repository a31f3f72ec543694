"""The scan in CUDA C++ for many rows, and its gradients: on a GPU, else in the emulator."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops import emulated_wide, machine
from tests.ops.cases import (
    DELTAS,
    Options,
    bare,
    error,
    everything,
    in_float64,
    moved,
    packed,
    scan_inputs,
    usual,
)
from tests.ops.machine import DEVICE, ON_GPU, gpu
from widefield.ops import use_backend
from widefield.ops.selective_scan import reference, relay, wide
from widefield.plan import LayerPlan, ScanInputs

SMALL = wide.Layout(per_lane=1, tile=8, chunk=16, warps=1, blocks=1)
LAYOUTS = [
    SMALL,
    wide.Layout(per_lane=1, tile=16, chunk=32, warps=2, blocks=1),
    wide.Layout(per_lane=2, tile=8, chunk=8, warps=1, blocks=1),
    wide.Layout(per_lane=2, tile=4, chunk=16, warps=2, blocks=1),
]


@pytest.fixture
def kernels(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.use(wide, emulated_wide, compiled, monkeypatch)


LEAVES = ("x", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def results(
    scan: Callable[[ScanInputs, LayerPlan], tuple[Tensor, Tensor]],
    inputs: ScanInputs,
    plan: LayerPlan,
) -> dict[str, Tensor]:
    """Outputs and the gradients of everything, for random gradients of the outputs."""
    leaves = {
        name: value.detach().requires_grad_()
        for name in LEAVES
        if (value := getattr(inputs, name)) is not None
    }
    y, state = scan(inputs.replace(**leaves), plan)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in (y, state)]
    weights[0] = weights[0].to(inputs.x.dtype).double()
    ((y.double() * weights[0]).sum() + (state.double() * weights[1]).sum()).backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "state": state.detach(), **gradients}  # type: ignore[dict-item]


def truth_of(inputs: ScanInputs, plan: LayerPlan) -> dict[str, Tensor]:
    """In float64, but frozen where float32 freezes, so that Δ's gradient goes through softplus."""
    exact, _ = in_float64(inputs, None)
    if plan.delta_floor is None:
        return results(reference.selective_scan, exact, plan)
    return results(partial(_frozen_scan, inputs), exact, plan)


def _frozen_scan(narrow: ScanInputs, exact: ScanInputs, plan: LayerPlan) -> tuple[Tensor, Tensor]:
    """The scan of `exact`, with those of its tokens frozen that are in `narrow`."""
    if narrow.cu_seqlens is not None:
        from widefield.ops.selective_scan._packed import _row, _sequence

        ends = narrow.cu_seqlens.tolist()
        parts = []
        for i in range(len(ends) - 1):
            tokens = slice(*ends[i : i + 2])
            one = _sequence(narrow, i, tokens), _sequence(exact, i, tokens)
            row = _row(plan, i)
            assert row is not None
            parts.append(_frozen_scan(*one, row))
        return torch.cat([y for y, _ in parts], 1), torch.cat([state for _, state in parts])
    unmasked = dataclasses.replace(plan, delta_floor=None, decay_scale=None)
    delta = reference.effective_delta(exact, unmasked)
    frozen = reference.effective_delta(narrow, plan) == 0
    exact = exact.replace(
        delta=delta.masked_fill(frozen, 0.0), delta_bias=None, delta_softplus=False
    )
    return reference.selective_scan(exact, LayerPlan(decay_scale=plan.decay_scale))


def check(
    inputs: ScanInputs, plan: LayerPlan, layouts: tuple[wide.Layout, wide.Layout] | None = None
) -> None:
    """At most twice as far from float64 as the reference in the same dtype, on the same device."""
    with pytest.MonkeyPatch.context() as patch:
        if layouts is not None:
            patch.setattr(wide, "_layouts", lambda *given: layouts)
        ours = results(wide.selective_scan, inputs, plan)
    truth, same = truth_of(inputs, plan), results(reference.selective_scan, inputs, plan)
    for name, value in truth.items():
        assert ours[name].dtype == same[name].dtype and ours[name].shape == same[name].shape, name
        allowed = 2 * error(same[name], value) + 3e-7
        assert error(ours[name], value) <= allowed, name


def layouts_here(layout: wide.Layout = SMALL) -> tuple[wide.Layout, wide.Layout] | None:
    """The chosen layouts on a GPU; in the emulator one that takes little time."""
    return None if ON_GPU else (layout, layout)


@pytest.mark.usefixtures("kernels", "poisoned")
class TestAnywhere:
    """The kernels on a GPU, else their source in the emulator."""

    @pytest.mark.parametrize("length", [1, 63])
    @pytest.mark.parametrize(
        ("options", "dtype", "channels"),
        [
            (bare, torch.float16, 37),
            (usual, torch.bfloat16, 32),
            (everything, torch.float32, 40),
            (packed, torch.float32, 36),
        ],
    )
    def test_gradients_are_as_exact_as_those_of_the_reference(
        self, length: int, options: Options, dtype: torch.dtype, channels: int
    ) -> None:
        inputs, plan = options(scan_inputs(2, length, channels, dtype=dtype))
        check(moved(inputs, DEVICE), plan.to(DEVICE), layouts_here())

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_every_layout_is_as_exact_as_the_reference(self, layout: wide.Layout) -> None:
        inputs, plan = everything(scan_inputs(2, 50, 72))
        check(moved(inputs, DEVICE), plan.to(DEVICE), (layout, layout))

    def test_more_chunks_than_are_summed_up_in_one_go(self) -> None:
        short = wide.Layout(per_lane=1, tile=4, chunk=4, warps=1, blocks=1)
        inputs, plan = usual(scan_inputs(1, 4 * 130 + 1, 32, 2))
        check(moved(inputs, DEVICE), plan, (short, short))

    @pytest.mark.parametrize("states", [1, 8, 20])
    def test_any_number_of_states(self, states: int) -> None:
        inputs, plan = everything(scan_inputs(2, 30, 33, states))
        check(moved(inputs, DEVICE), plan.to(DEVICE), layouts_here())

    @pytest.mark.parametrize("delta", DELTAS)
    def test_no_step_is_too_small_or_too_large(self, delta: str) -> None:
        check(moved(scan_inputs(1, 40, 32, delta=delta), DEVICE), LayerPlan(), layouts_here())

    def test_a_frozen_token_passes_no_gradient_to_its_step_or_its_write(self) -> None:
        inputs = moved(scan_inputs(1, 40, 32).replace(D=None), DEVICE)
        floor = torch.full((32,), torch.inf, device=DEVICE)
        with pytest.MonkeyPatch.context() as patch:
            if not ON_GPU:
                patch.setattr(wide, "_layouts", lambda *given: (SMALL, SMALL))
            found = results(wide.selective_scan, inputs, LayerPlan(delta_floor=floor))
        for name in ("dx", "ddelta", "dB", "dA", "ddelta_bias"):
            assert torch.equal(found[name], torch.zeros_like(found[name])), name
        assert inputs.initial_state is not None
        assert torch.equal(found["state"], inputs.initial_state)
        for name in ("dC", "dz", "dinitial_state"):
            assert bool((found[name] != 0).any()), name

    @pytest.mark.parametrize("above", [-1e-6, 1e-6])
    def test_a_step_is_frozen_where_torch_freezes_it(self, above: float) -> None:
        inputs = moved(scan_inputs(1, 40, 32), DEVICE)
        every = torch.arange(32, device=DEVICE)
        floor = reference.effective_delta(inputs)[0, every, every] * (1 + above)
        plan = LayerPlan(delta_floor=floor)
        frozen = reference.effective_delta(inputs, plan)[0, every, every] == 0
        assert bool((frozen == (above > 0)).all())
        check(inputs, plan, layouts_here())

    def test_nan_in_a_step_shows(self) -> None:
        inputs = moved(scan_inputs(1, 40, 32), DEVICE)
        inputs.delta[0, 10, 5] = torch.nan
        call = wide.Call.prepare(inputs, LayerPlan(), (SMALL, SMALL))
        y, state, _ = call.forward(save=False)
        assert y[0, 10:, 5].isnan().all() and state[0, 5].isnan().all()
        assert not y[0, :10].isnan().any() and not y[0, :, 6].isnan().any()

    def test_padding_may_hold_anything(self) -> None:
        inputs, plan = everything(scan_inputs(1, 40, 32))
        inputs = moved(inputs, DEVICE)
        layouts = (SMALL, SMALL)
        expected = wide.Call.prepare(inputs, plan.to(DEVICE), layouts).forward(save=False)
        assert inputs.valid is not None
        inputs.x[~inputs.valid] = torch.nan
        inputs.delta[~inputs.valid] = torch.inf
        found = wide.Call.prepare(inputs, plan.to(DEVICE), layouts).forward(save=False)
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))

    def test_going_on_from_a_state_is_the_same_to_the_bit(self) -> None:
        inputs = moved(scan_inputs(1, 48, 32), DEVICE)
        layouts = (SMALL, SMALL)
        y, state, _ = wide.Call.prepare(inputs, LayerPlan(), layouts).forward(save=False)
        parts, before = [], inputs.initial_state
        for part in (slice(0, 24), slice(24, 48)):
            cut = {name: getattr(inputs, name)[:, part] for name in ("x", "delta", "B", "C", "z")}
            piece = inputs.replace(**cut, initial_state=before)
            one, before, _ = wide.Call.prepare(piece, LayerPlan(), layouts).forward(save=False)
            parts.append(one)
        assert torch.equal(torch.cat(parts, dim=1), y) and torch.equal(before, state)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("length", [1, 63, 1000])
    @pytest.mark.parametrize("options", [bare, usual, everything, packed])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_dtype_takes_all_options(
        self, length: int, options: Options, dtype: torch.dtype
    ) -> None:
        inputs, plan = options(scan_inputs(2, length, 300, dtype=dtype))
        check(moved(inputs, "cuda"), plan.to("cuda"))

    @pytest.mark.parametrize("delta", DELTAS)
    def test_no_step_of_a_long_sequence_is_too_small_or_too_large(self, delta: str) -> None:
        check(moved(scan_inputs(1, 1000, 64, delta=delta), "cuda"), LayerPlan())

    @pytest.mark.parametrize("states", [1, 8, 32, 64, 100, 128, 256])
    def test_any_number_of_states_fits(self, states: int) -> None:
        inputs, plan = everything(scan_inputs(2, 100, 70, states))
        check(moved(inputs, "cuda"), plan.to("cuda"))

    def test_two_runs_are_the_same_to_the_bit(self) -> None:
        inputs = moved(scan_inputs(4, 300, 512), "cuda")
        first, second = (results(wide.selective_scan, inputs, LayerPlan()) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_rows_are_scanned_as_if_alone(self) -> None:
        inputs = moved(scan_inputs(64, 100, 512, dtype=torch.bfloat16), "cuda")
        y, state = wide.selective_scan(inputs, LayerPlan())
        for row in (0, 63):
            names = ("x", "delta", "B", "C", "z", "initial_state")
            alone = inputs.replace(**{n: getattr(inputs, n)[row : row + 1] for n in names})
            one, final = wide.selective_scan(alone, LayerPlan())
            assert torch.equal(one[0], y[row]) and torch.equal(final[0], state[row])

    def test_gradients_of_a_long_sequence(self) -> None:
        inputs = moved(scan_inputs(1, 65_537, 32), "cuda")
        truth = in_pieces(in_float64(inputs, None)[0])
        same = in_pieces(inputs)
        ours = results(wide.selective_scan, inputs, LayerPlan())
        for name, value in truth.items():
            allowed = 2 * error(same[name], value) + 3e-7
            assert error(ours[name], value) <= allowed, name

    def test_a_million_tokens(self) -> None:
        from widefield.ops.selective_scan import cpu

        inputs = scan_inputs(1, 1_048_577, 8)
        expected = cpu.selective_scan(inputs)
        found = wide.selective_scan(moved(inputs, "cuda"), LayerPlan())
        for value, truth in zip(found, expected, strict=True):
            assert error(value.cpu(), truth.double()) < 1e-5

    def test_offsets_past_two_billion_elements(self) -> None:
        batch, length, channels = 2, 1 << 19, 2112  # 2.2e9 elements
        free, _ = torch.cuda.mem_get_info()
        if free < 30e9:
            pytest.skip("needs 30 GB of GPU memory")
        small = scan_inputs(1, 64, channels, dtype=torch.bfloat16)
        small = moved(small.replace(z=None), "cuda")
        x = torch.zeros(batch, length, channels, dtype=torch.bfloat16, device="cuda")
        delta = torch.full_like(x, -1e3)  # no step at all: the state stays as it is
        x[-1, -64:], delta[-1, -64:] = small.x[0], small.delta[0]
        B = torch.zeros(batch, length, 16, dtype=torch.bfloat16, device="cuda")
        C = torch.zeros_like(B)
        B[-1, -64:], C[-1, -64:] = small.B[0], small.C[0]
        state = small.initial_state
        assert state is not None
        big = small.replace(x=x, delta=delta, B=B, C=C, initial_state=state.expand(2, -1, -1))
        y, final = wide.selective_scan(big, LayerPlan())
        expected, last = wide.selective_scan(small, LayerPlan())
        assert torch.equal(y[-1, -64:], expected[0]) and torch.equal(final[-1], last[0])
        assert torch.equal(final[0], state[0])

    def test_nothing_waits_for_the_gpu(self) -> None:
        from widefield.ops.selective_scan import cuda

        inputs = moved(packed(scan_inputs(2, 100, 64))[0], "cuda")
        results(wide.selective_scan, inputs, LayerPlan())
        leaf = inputs.x.detach().requires_grad_()
        weight = torch.ones_like(leaf)
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode is a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            y, _ = cuda.selective_scan(inputs.replace(x=leaf))
            y.backward(weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_gradients_and_many_rows_run_here_and_few_rows_do_not(self) -> None:
        from widefield.ops.selective_scan import cuda

        few = moved(scan_inputs(1, 20, 64), "cuda")
        assert cuda._chosen(few) is relay
        assert cuda._chosen(few.replace(x=few.x.detach().requires_grad_())) is wide
        assert cuda._chosen(moved(scan_inputs(64, 20, 512), "cuda")) is wide
        with use_backend("triton"):
            assert cuda._chosen(few) is None


def in_pieces(inputs: ScanInputs, size: int = 512) -> dict[str, Tensor]:
    """Outputs and gradients of the reference in pieces of a sequence: little memory."""
    state = inputs.initial_state
    assert state is not None
    length = inputs.x.shape[1]
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(inputs.x.shape, generator=generator).to(inputs.x.device)
    states = [state.detach()]
    large = ("x", "delta", "B", "C", "z")
    starts = list(range(0, length, size))
    outputs = []
    for start in starts:
        cut = {n: getattr(inputs, n)[:, start : start + size] for n in large}
        y, state = reference.selective_scan(inputs.replace(**cut, initial_state=states[-1]))
        outputs.append(y)
        states.append(state)
    gradient = torch.randn(state.shape, generator=generator).to(state)
    found: dict[str, list[Tensor]] = {name: [] for name in LEAVES}
    for index, start in reversed(list(enumerate(starts))):
        leaves = {n: getattr(inputs, n)[:, start : start + size] for n in large}
        leaves |= {n: getattr(inputs, n) for n in ("A", "D", "delta_bias")}
        leaves = {n: t.detach().requires_grad_() for n, t in leaves.items()}
        leaves["initial_state"] = states[index].detach().requires_grad_()
        y, last = reference.selective_scan(inputs.replace(**leaves))
        part = weight[:, start : start + size].to(y)
        torch.autograd.backward([y, last], [part, gradient])
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            found[name].insert(0, leaf.grad)
        gradient = found["initial_state"][0]
    joined = {f"d{n}": torch.cat(found[n], dim=1) for n in large}
    summed = {f"d{n}": torch.stack(found[n]).sum(0) for n in ("A", "D", "delta_bias")}
    first = {"dinitial_state": found["initial_state"][0]}
    return {"y": torch.cat(outputs, dim=1), "state": states[-1], **joined, **summed, **first}


def test_long_sequences_save_half_as_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_shared_memory", lambda device: 232_448)
    monkeypatch.setattr(wide, "_SAVED", 1 << 20)
    wide._layouts.cache_clear()
    few, many = (wide._layouts_of(scan_inputs(1, length, 64)) for length in (16, 8192))
    assert [layout.chunk for layout in (*few, *many)] == [16, 16, 32, 32]


def test_many_channels_are_two_a_lane_in_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "_shared_memory", lambda device: 232_448)
    wide._layouts.cache_clear()
    few, many = (wide._layouts_of(scan_inputs(rows, 2, 2048)) for rows in (1, 32))
    assert [layout.per_lane for layout in (*few, *many)] == [1, 1, 2, 1]


def test_a_cpu_tensor_is_not_supported() -> None:
    assert not wide.supports(scan_inputs(1, 10, 8))


def test_the_struct_is_the_one_of_the_kernels() -> None:
    machine.assert_struct_is_the_kernels(wide)


@pytest.mark.parametrize("states", [1, 8, 16, 32, 33, 64, 128, 200, 256])
@pytest.mark.parametrize("shared", [166_912, 232_448])
def test_layouts_fit_into_shared_memory(states: int, shared: int) -> None:
    forward, backward = wide.forward_layout(states, shared), wide.backward_layout(states, shared)
    assert forward.shared_bytes(states, backward=False) <= shared
    assert backward.shared_bytes(states, backward=True) <= shared
    assert backward.chunk % backward.tile == 0
