"""The scan in CUDA C++ whose warps hand the states on: on a GPU, else in the emulator."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.ops import emulated_relay, machine
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
from widefield.ops import _nvrtc, use_backend
from widefield.ops._delta import effective_delta
from widefield.ops.selective_scan import _calls, reference, relay
from widefield.ops.selective_scan._packed import by_sequence
from widefield.plan import LayerPlan, ScanInputs

HAS_CLUSTERS = not ON_GPU or torch.cuda.get_device_capability() >= (9, 0)

SMALL = relay.Layout(clusters=2, cluster=1, warps=2, tile=4)
LAYOUTS = [
    SMALL,
    relay.Layout(clusters=3, cluster=1, warps=3, tile=8),
    relay.Layout(clusters=3, cluster=1, warps=2, columns=32, tile=4),
    relay.Layout(clusters=14, cluster=1, warps=2, columns=8, tile=4),
    relay.Layout(clusters=16, cluster=1, warps=2, tile=4),
]
HOPPER = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=232_448, major=9)
IN_CLUSTERS = [
    relay.Layout(clusters=1, cluster=2, warps=2, tile=4),
    relay.Layout(clusters=3, cluster=2, warps=2, tile=16),
    relay.Layout(clusters=2, cluster=2, warps=8, columns=32, tile=4),
]


@pytest.fixture
def kernels(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.use(relay, emulated_relay, compiled, monkeypatch)


def scan(
    inputs: ScanInputs, plan: LayerPlan, layout: relay.Layout | None = None
) -> tuple[Tensor, Tensor]:
    if ON_GPU:
        assert relay.supports(inputs)
        return relay.selective_scan(inputs, plan, layout)
    tensors = _calls.readable(_calls.read(inputs, plan))
    return relay.run(relay.launch_of(tensors, inputs.delta_softplus, layout or SMALL), tensors)


def exact(inputs: ScanInputs, plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
    return reference.selective_scan(*in_float64(inputs, plan))


def check(inputs: ScanInputs, plan: LayerPlan, layout: relay.Layout | None = None) -> None:
    """At most twice as far from float64 as the reference in the same dtype, on the same device."""
    inputs, plan = moved(inputs, DEVICE), plan.to(DEVICE)
    sides = inputs.cu_seqlens is not None
    truth = by_sequence(exact, inputs, plan) if sides else exact(inputs, plan)
    near = reference.selective_scan(inputs, plan)
    found = scan(inputs, plan, layout)
    for name, value, same, right in zip(("y", "state"), found, near, truth, strict=True):
        assert value.dtype == same.dtype and value.shape == same.shape
        assert error(value, right) <= 2 * error(same, right) + 3e-7, name


@pytest.mark.usefixtures("kernels", "poisoned")
class TestAnywhere:
    """The kernel on a GPU, else its source in the emulator."""

    @pytest.mark.parametrize("length", [1, 33, 150])
    @pytest.mark.parametrize(
        ("options", "dtype", "channels"),
        [
            (bare, torch.float16, 37),
            (usual, torch.bfloat16, 48),
            (everything, torch.float32, 40),
            (packed, torch.bfloat16, 24),
        ],
    )
    def test_is_as_exact_as_the_reference(
        self, length: int, options: Options, dtype: torch.dtype, channels: int
    ) -> None:
        check(*options(scan_inputs(2, length, channels, dtype=dtype)))

    @pytest.mark.parametrize("layout", [*LAYOUTS, *IN_CLUSTERS], ids=str)
    def test_every_layout_is_as_exact_as_the_reference(self, layout: relay.Layout) -> None:
        if layout.cluster > 1 and not HAS_CLUSTERS:
            pytest.skip("needs clusters of blocks")
        check(*everything(scan_inputs(1, 170, 112, dtype=torch.bfloat16)), layout)
        check(*packed(scan_inputs(1, 170, 112)), layout)

    @pytest.mark.parametrize(
        ("states", "dtype"),
        [(1, torch.float32), (8, torch.bfloat16), (24, torch.float32), (32, torch.bfloat16)],
    )
    def test_other_numbers_of_states(self, states: int, dtype: torch.dtype) -> None:
        check(*everything(scan_inputs(2, 70, 32, states, dtype=dtype)))

    @pytest.mark.parametrize("delta", DELTAS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_step_is_too_small_or_too_large(self, delta: str, dtype: torch.dtype) -> None:
        check(scan_inputs(1, 100, 24, delta=delta, dtype=dtype), LayerPlan())

    def test_states_that_cancel_each_other_are_summed_as_well(self) -> None:
        inputs = scan_inputs(1, 200, 24, dtype=torch.bfloat16)
        signs = torch.tensor([1.0, -1.0]).repeat_interleave(8).bfloat16()
        rates = 0.1 + 0.001 * torch.arange(16)
        inputs = inputs.replace(
            A=-rates.expand(24, 16).contiguous(),
            B=torch.ones_like(inputs.B),
            C=signs.expand_as(inputs.C),
            D=None,
            initial_state=None,
        )
        check(inputs, LayerPlan())

    @pytest.mark.parametrize("kind", [torch.int32, torch.int64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sequences_side_by_side_are_scanned_each_for_itself(
        self, kind: torch.dtype, dtype: torch.dtype
    ) -> None:
        """Empty ones, too."""
        ends = torch.tensor([0, 0, 40, 75, 75, 107, 108], dtype=kind)
        inputs = scan_inputs(1, 108, 37, dtype=dtype).replace(
            cu_seqlens=ends, initial_state=torch.randn(6, 37, 16)
        )
        plan = LayerPlan(
            delta_floor=torch.rand(37) * 0.1,
            delta_scale=torch.rand(6, 37) + 0.5,
            decay_scale=torch.rand(6, 37) + 0.5,
        )
        check(inputs, plan)

    @pytest.mark.parametrize("above", [-1e-6, 1e-6])
    def test_a_step_is_frozen_where_torch_freezes_it(self, above: float) -> None:
        inputs, plan = everything(scan_inputs(1, 64, 32))
        inputs = moved(inputs.replace(valid=None), DEVICE)
        every = torch.arange(32, device=DEVICE)
        plan = dataclasses.replace(plan.to(DEVICE), delta_floor=None)
        floor = effective_delta(inputs, plan)[0, every, every] * (1 + above)
        plan = dataclasses.replace(plan, delta_floor=floor)
        frozen = effective_delta(inputs, plan)[0, every, every] == 0
        assert bool((frozen == (above > 0)).all())
        check(inputs, plan)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_in_a_step_shows(self, dtype: torch.dtype) -> None:
        inputs = moved(scan_inputs(1, 64, 32, dtype=dtype), DEVICE)
        inputs.delta[0, 10, 5] = torch.nan
        y, state = scan(inputs, LayerPlan())
        assert y[0, 10:, 5].isnan().all() and state[0, 5].isnan().all()
        assert not y[0, :10].isnan().any() and not y[0, :, 6].isnan().any()

    def test_padding_may_hold_anything(self) -> None:
        inputs, plan = everything(scan_inputs(1, 70, 32))
        inputs, plan = moved(inputs, DEVICE), plan.to(DEVICE)
        expected = scan(inputs, plan)
        assert inputs.valid is not None
        inputs.x[~inputs.valid] = torch.nan
        inputs.delta[~inputs.valid] = torch.inf
        found = scan(inputs, plan)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_going_on_from_a_state_is_the_same_to_the_bit(self, dtype: torch.dtype) -> None:
        """Where a sequence is cut between pieces."""
        inputs = moved(scan_inputs(1, 96, 32, dtype=dtype), DEVICE)
        y, state = scan(inputs, LayerPlan())
        parts, before = [], inputs.initial_state
        for part in (slice(0, 64), slice(64, 96)):
            cut = {name: getattr(inputs, name)[:, part] for name in ("x", "delta", "B", "C", "z")}
            one, before = scan(inputs.replace(**cut, initial_state=before), LayerPlan())
            parts.append(one)
        assert torch.equal(torch.cat(parts, dim=1), y) and torch.equal(before, state)

    def test_a_kept_launch_gives_the_same(self) -> None:
        inputs = moved(scan_inputs(1, 200, 64, dtype=torch.bfloat16), DEVICE)
        tensors = _calls.read(inputs, LayerPlan())
        launch = relay.launch_of(tensors, inputs.delta_softplus, SMALL)
        first = relay.run(launch, tensors)
        relay.keep_launch(tensors, tensors, inputs.delta_softplus, launch)
        again = relay.again(inputs, LayerPlan())
        assert again is not None
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert relay.again(inputs.replace(z=None), LayerPlan()) is None

    def test_rows_that_do_not_lie_evenly_are_read_one_number_at_a_time(self) -> None:
        wide = scan_inputs(1, 60, 33, dtype=torch.bfloat16)
        cut = {name: getattr(wide, name)[..., 1:33] for name in ("x", "z", "delta")}
        cut |= {name: getattr(wide, name)[1:] for name in ("A", "D", "delta_bias")}
        assert wide.initial_state is not None
        check(wide.replace(**cut, initial_state=wide.initial_state[:, 1:]), LayerPlan())


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("layout", [*LAYOUTS, *IN_CLUSTERS, None], ids=str)
    @pytest.mark.parametrize("length", [1, 63, 1000])
    def test_all_layouts_take_all_options(self, length: int, layout: relay.Layout | None) -> None:
        if layout and layout.cluster > 1 and not HAS_CLUSTERS:
            pytest.skip("needs clusters of blocks")
        for dtype, options in (
            (torch.bfloat16, usual),
            (torch.bfloat16, packed),
            (torch.float32, everything),
            (torch.float16, bare),
        ):
            check(*options(scan_inputs(2, length, 100, dtype=dtype)), layout)

    @pytest.mark.parametrize("channels", [512, 1536, 2048, 2560])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_chosen_layout_is_as_exact_as_the_reference(
        self, channels: int, dtype: torch.dtype
    ) -> None:
        check(*usual(scan_inputs(1, 700, channels, dtype=dtype)))

    @pytest.mark.parametrize("states", [32, 64, 128])
    def test_many_states(self, states: int) -> None:
        check(*everything(scan_inputs(1, 1000, 64, states, dtype=torch.bfloat16)))

    @pytest.mark.parametrize("length", [65_537, 1_048_577])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("cluster", [1, 2])
    def test_is_right_past_65536_tokens(
        self, length: int, dtype: torch.dtype, cluster: int
    ) -> None:
        from widefield.ops.selective_scan import cpu

        inputs = scan_inputs(1, length, 24, dtype=dtype)
        wide = {name: getattr(inputs, name).float() for name in ("x", "delta", "B", "C", "z")}
        truth = cpu.selective_scan(inputs.replace(**wide))
        layout = relay.Layout(clusters=1, cluster=cluster, warps=12)
        y, state = relay.selective_scan(moved(inputs, "cuda"), LayerPlan(), layout)
        rounding = error(truth[0].to(dtype), truth[0].double())
        assert error(y.cpu(), truth[0].double()) < 2 * rounding + 1e-5
        assert error(state.cpu(), truth[1].double()) < 1e-5

    @pytest.mark.parametrize("cluster", [1, 2])
    def test_is_right_past_two_to_the_31_elements(self, cluster: int) -> None:
        length, channels, last = 1_100_000, 2048, 2000
        small = scan_inputs(1, 8, channels, dtype=torch.bfloat16)
        x = torch.randn(1, length, channels, device="cuda", dtype=torch.bfloat16)
        B = torch.randn(1, length, 16, device="cuda", dtype=torch.bfloat16)
        inputs = moved(small, "cuda").replace(
            x=x, z=x, delta=x - 1, B=B, C=B.flip(1), initial_state=None
        )
        y, state = relay.selective_scan(
            inputs, LayerPlan(), relay.Layout(128 // cluster - 4, cluster)
        )
        ends = {name: getattr(inputs, name)[:, -last:] for name in ("x", "z", "delta", "B", "C")}
        expected = reference.selective_scan(inputs.replace(**ends))
        assert error(y[:, -last // 2 :], expected[0][:, -last // 2 :].double()) < 4e-3
        assert error(state, expected[1].double()) < 1e-5
        assert not y.isnan().any()

    def test_the_same_call_gives_the_same_bits(self) -> None:
        inputs = moved(scan_inputs(1, 20_000, 2560, dtype=torch.bfloat16), "cuda")
        first = relay.selective_scan(inputs, LayerPlan())
        for _ in range(5):
            again = relay.selective_scan(inputs, LayerPlan())
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_few_rows_without_gradients_run_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from widefield.ops.selective_scan import cuda

        calls = []
        monkeypatch.setattr(relay, "selective_scan", lambda *given, **_: calls.append(given))
        inputs = moved(scan_inputs(1, 20, 512, dtype=torch.bfloat16), "cuda")
        inputs.x.requires_grad_()
        cuda.selective_scan(inputs)[0].sum().backward()
        assert inputs.x.grad is not None and not calls
        with torch.no_grad():
            cuda.selective_scan(inputs)
            assert len(calls) == 1
            with use_backend("triton"):
                cuda.selective_scan(inputs)
        assert len(calls) == 1

    def test_compiled_kernels_are_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        relay._kernel.cache_clear()
        inputs = moved(scan_inputs(1, 20, 16), "cuda")
        first = relay.selective_scan(inputs, LayerPlan())
        (kept,) = _nvrtc.cache_folder().iterdir()
        relay._kernel.cache_clear()
        monkeypatch.setattr(_nvrtc, "_compile", lambda *given: pytest.fail("compiled again"))
        again = relay.selective_scan(inputs, LayerPlan())
        assert kept.suffix == ".cubin" and torch.equal(first[0], again[0])

    @pytest.mark.parametrize("length", [31, 150])
    @pytest.mark.parametrize("channels", [40, 37])
    @pytest.mark.parametrize("options", [bare, usual, everything])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_dtype_takes_all_options(
        self, length: int, channels: int, options: Options, dtype: torch.dtype
    ) -> None:
        check(*options(scan_inputs(2, length, channels, dtype=dtype)))

    def test_rows_share_the_clusters(self) -> None:
        check(*everything(scan_inputs(3, 900, 1300, dtype=torch.bfloat16)))


def test_a_cpu_tensor_is_not_supported() -> None:
    assert not relay.supports(scan_inputs(1, 10, 8))


def test_the_struct_is_the_one_of_the_kernel() -> None:
    machine.assert_struct_is_the_kernels(relay)


@pytest.mark.parametrize(
    ("channels", "narrow", "expected"),
    [
        (2048, True, relay.Layout(128, 1, 16)),
        (2048, False, relay.Layout(128, 1, 12)),
        (1024, True, relay.Layout(64, 2, 16)),
        (1536, True, relay.Layout(66, 2, 16)),
        (4096, True, relay.Layout(128, 1, 16, 32)),
        (512, True, relay.Layout(64, 2, 12, 8)),
        (2560, True, relay.Layout(132, 1, 16)),
        (5120, True, relay.Layout(132, 1, 16, 32)),
    ],
)
def test_a_layout_keeps_all_multiprocessors_busy(
    channels: int, narrow: bool, expected: relay.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: HOPPER)
    shape = relay._Shape(1, 1, channels, 16, (int(narrow),) * 5, True)
    layout = relay.layout_of.__wrapped__(0, shape)
    assert layout == expected
    assert relay._shared_bytes(layout, shape) <= 232_448


@pytest.mark.parametrize(("states", "fits"), [(128, True), (1024, False)])
def test_states_run_here_as_far_as_shared_memory_goes(
    states: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: HOPPER)
    shape = relay._Shape(1, 1, 1536, states, (0,) * 5, True)
    assert (relay.layout_of.__wrapped__(0, shape) is not None) == fits


def test_without_a_compiler_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None)
    assert not _nvrtc.available.__wrapped__()
