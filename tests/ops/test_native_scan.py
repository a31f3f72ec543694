"""The selective scan's forward in CUDA C++: on a GPU against float64, else its parts."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import emulated_cuda
from tests.ops.cases import (
    DELTAS,
    Options,
    bare,
    error,
    everything,
    in_float64,
    moved,
    scan_inputs,
    usual,
)
from widefield.ops import _nvrtc, use_backend
from widefield.ops._delta import effective_delta
from widefield.ops.selective_scan import _calls, native, reference
from widefield.ops.selective_scan._packed import by_sequence
from widefield.plan import LayerPlan, ScanInputs

ON_GPU = torch.cuda.is_available() and _nvrtc.available()
DEVICE = "cuda" if ON_GPU else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a GPU and NVRTC")]
LAYOUTS = [*native._LAYOUTS.values(), native._SPREAD, *native._TENSOR.values()]
_everything = partial(everything, floor=0.2)


@pytest.fixture
def machine(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, or the emulator where there is none."""
    if ON_GPU:
        return
    if emulated_cuda.compiler() is None:
        pytest.skip("needs a GPU or a C++ compiler")
    monkeypatch.setattr(_nvrtc, "build", partial(emulated_cuda.build, folder=compiled))
    native._kernel.cache_clear()


def _scan(inputs: ScanInputs, plan: LayerPlan, layout: native.Layout | None = None) -> Any:
    if ON_GPU:
        assert native.supports(inputs)
        return native.selective_scan(inputs, plan, layout)
    tensors = _calls.readable(_calls.read(inputs, plan))
    table = native._LAYOUTS if native._kind(tensors) == "exact" else native._TENSOR
    launch = native.launch_of(tensors, inputs.delta_softplus, layout or table[3])
    return _calls.run(launch, tensors)


def _check(inputs: ScanInputs, plan: LayerPlan, layout: native.Layout | None = None) -> None:
    """At most twice as far from float64 as the reference in the same dtype, on the same device."""
    truth = reference.selective_scan(*in_float64(inputs, plan))
    same = reference.selective_scan(inputs, plan)
    _compare(_scan(inputs, plan, layout), same, truth)


def _compare(
    ours: tuple[Tensor, Tensor], same: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]
) -> None:
    for name, value, near, exact in zip(("y", "state"), ours, same, truth, strict=True):
        assert value.dtype == near.dtype and value.shape == near.shape
        assert error(value, exact) <= 2 * error(near, exact) + 3e-7, name


@pytest.mark.usefixtures("machine", "poisoned")
class TestAnywhere:
    """The kernel on a GPU, else its source in the emulator."""

    @pytest.mark.parametrize("length", [1, 33, 200])
    @pytest.mark.parametrize(
        ("options", "dtype", "channels"),
        [
            (bare, torch.float16, 37),
            (usual, torch.bfloat16, 40),
            (_everything, torch.float32, 28),
        ],
    )
    def test_is_as_exact_as_the_reference(
        self, length: int, options: Options, dtype: torch.dtype, channels: int
    ) -> None:
        inputs, plan = options(scan_inputs(2, length, channels, dtype=dtype))
        _check(moved(inputs, DEVICE), plan.to(DEVICE))

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_every_layout_is_as_exact_as_the_reference(self, layout: native.Layout) -> None:
        dtype = torch.bfloat16 if layout.tensor else torch.float32
        inputs, plan = _everything(scan_inputs(2, 300, 28, dtype=dtype))
        _check(moved(inputs, DEVICE), plan.to(DEVICE), layout)

    @pytest.mark.parametrize("states", [8, 32])
    def test_other_numbers_of_states(self, states: int) -> None:
        inputs, plan = _everything(scan_inputs(2, 70, 16, states))
        _check(moved(inputs, DEVICE), plan.to(DEVICE))

    @pytest.mark.parametrize("delta", DELTAS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_step_is_too_small_or_too_large(self, delta: str, dtype: torch.dtype) -> None:
        _check(moved(scan_inputs(1, 100, 24, delta=delta, dtype=dtype), DEVICE), LayerPlan())

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
        _check(moved(inputs, DEVICE), LayerPlan())

    @pytest.mark.parametrize("kind", [torch.int32, torch.int64])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_sequences_side_by_side_are_scanned_each_for_itself(
        self, kind: torch.dtype, dtype: torch.dtype
    ) -> None:
        ends = torch.tensor([0, 0, 40, 75, 75, 107, 108], dtype=kind)
        inputs = scan_inputs(1, 108, 14, dtype=dtype).replace(
            cu_seqlens=ends, initial_state=torch.randn(6, 14, 16)
        )
        plan = LayerPlan(
            delta_floor=torch.rand(14) * 0.1,
            delta_scale=torch.rand(6, 14) + 0.5,
            decay_scale=torch.rand(6, 14) + 0.5,
        )
        inputs, plan = moved(inputs, DEVICE), plan.to(DEVICE)

        def exact(one: ScanInputs, its_plan: LayerPlan | None) -> tuple[Tensor, Tensor]:
            return reference.selective_scan(*in_float64(one, its_plan))

        truth = by_sequence(exact, inputs, plan)
        _compare(_scan(inputs, plan), reference.selective_scan(inputs, plan), truth)

    @pytest.mark.parametrize("above", [-1e-6, 1e-6])
    def test_a_step_is_frozen_where_torch_freezes_it(self, above: float) -> None:
        inputs, plan = _everything(scan_inputs(1, 64, 32))
        inputs = moved(inputs.replace(valid=None), DEVICE)
        every = torch.arange(32, device=DEVICE)
        plan = dataclasses.replace(plan.to(DEVICE), delta_floor=None)
        floor = effective_delta(inputs, plan)[0, every, every] * (1 + above)
        plan = dataclasses.replace(plan, delta_floor=floor)
        frozen = effective_delta(inputs, plan)[0, every, every] == 0
        assert bool((frozen == (above > 0)).all())
        _check(inputs, plan)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_nan_in_a_step_shows(self, dtype: torch.dtype) -> None:
        inputs = moved(scan_inputs(1, 64, 32, dtype=dtype), DEVICE)
        inputs.delta[0, 10, 5] = torch.nan
        y, state = _scan(inputs, LayerPlan())
        assert y[0, 10:, 5].isnan().all() and state[0, 5].isnan().all()
        assert not y[0, :10].isnan().any() and not y[0, :, 6].isnan().any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_padding_may_hold_anything(self, dtype: torch.dtype) -> None:
        inputs, plan = _everything(scan_inputs(1, 70, 32, dtype=dtype))
        inputs = moved(inputs, DEVICE)
        expected = _scan(inputs, plan.to(DEVICE))
        assert inputs.valid is not None
        inputs.x[~inputs.valid] = torch.nan
        inputs.delta[~inputs.valid] = torch.inf
        found = _scan(inputs, plan.to(DEVICE))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_going_on_from_a_state_is_the_same_to_the_bit(self, dtype: torch.dtype) -> None:
        inputs = moved(scan_inputs(1, 96, 32, dtype=dtype), DEVICE)
        y, state = _scan(inputs, LayerPlan())
        parts = []
        before = inputs.initial_state
        for part in (slice(0, 64), slice(64, 96)):
            cut = {name: getattr(inputs, name)[:, part] for name in ("x", "delta", "B", "C", "z")}
            one, before = _scan(inputs.replace(**cut, initial_state=before), LayerPlan())
            parts.append(one)
        assert torch.equal(torch.cat(parts, dim=1), y) and torch.equal(before, state)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("length", [31, 150])
    @pytest.mark.parametrize("channels", [40, 37])
    @pytest.mark.parametrize("options", [bare, usual, _everything])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_dtype_takes_all_options(
        self, length: int, channels: int, options: Options, dtype: torch.dtype
    ) -> None:
        inputs, plan = options(scan_inputs(2, length, channels, dtype=dtype))
        _check(moved(inputs, "cuda"), plan.to("cuda"))

    def test_many_rows_of_many_channels_run_in_several_waves(self) -> None:
        inputs, plan = _everything(scan_inputs(3, 40, 1300, dtype=torch.bfloat16))
        _check(moved(inputs, "cuda"), plan.to("cuda"))

    @pytest.mark.parametrize("layout", native._TENSOR.values(), ids=str)
    @pytest.mark.parametrize("length", [1, 63, 1000])
    def test_every_layout_for_bfloat16_takes_all_options(
        self, length: int, layout: native.Layout
    ) -> None:
        for options in (bare, usual, _everything):
            inputs, plan = options(scan_inputs(2, length, 37, dtype=torch.bfloat16))
            _check(moved(inputs, "cuda"), plan.to("cuda"), layout)

    @pytest.mark.parametrize("length", [65_537, 1_048_577])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_is_right_past_65536_tokens(self, length: int, dtype: torch.dtype) -> None:
        from widefield.ops.selective_scan import cpu

        inputs = scan_inputs(1, length, 24, dtype=dtype)
        wide = {name: getattr(inputs, name).float() for name in ("x", "delta", "B", "C", "z")}
        truth = cpu.selective_scan(inputs.replace(**wide))
        y, state = native.selective_scan(moved(inputs, "cuda"), LayerPlan())
        rounding = error(truth[0].to(dtype), truth[0].double())
        assert error(y.cpu(), truth[0].double()) < 2 * rounding + 1e-5
        assert error(state.cpu(), truth[1].double()) < 1e-5

    @pytest.mark.parametrize("layout", native._TENSOR.values(), ids=str)
    def test_is_right_past_two_to_the_31_elements(self, layout: native.Layout) -> None:
        length, channels, last = 1_500_000, 1536, 2000
        small = scan_inputs(1, 8, channels, dtype=torch.bfloat16)
        x = torch.randn(1, length, channels, device="cuda", dtype=torch.bfloat16)
        B = torch.randn(1, length, 16, device="cuda", dtype=torch.bfloat16)
        inputs = moved(small, "cuda").replace(
            x=x, z=x, delta=x - 1, B=B, C=B.flip(1), initial_state=None
        )
        y, state = native.selective_scan(inputs, LayerPlan(), layout)
        ends = {name: getattr(inputs, name)[:, -last:] for name in ("x", "z", "delta", "B", "C")}
        expected = reference.selective_scan(inputs.replace(**ends))
        assert error(y[:, -last // 2 :], expected[0][:, -last // 2 :].double()) < 4e-3
        assert error(state, expected[1].double()) < 1e-5
        assert not y.isnan().any()

    def test_few_rows_without_gradients_run_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from widefield.ops.selective_scan import cuda

        calls = []
        monkeypatch.setattr(native, "selective_scan", lambda *given, **_: calls.append(given))
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
        native._kernel.cache_clear()
        inputs = moved(scan_inputs(1, 20, 16), "cuda")
        first = native.selective_scan(inputs, LayerPlan())
        (kept,) = _nvrtc.cache_folder().iterdir()
        native._kernel.cache_clear()
        monkeypatch.setattr(_nvrtc, "_compile", lambda *given: pytest.fail("compiled again"))
        again = native.selective_scan(inputs, LayerPlan())
        assert kept.suffix == ".cubin" and torch.equal(first[0], again[0])


def test_a_cpu_tensor_is_not_supported() -> None:
    assert not native.supports(scan_inputs(1, 10, 8))


def test_the_struct_is_the_one_of_the_kernel() -> None:
    source = native._SOURCE.read_text("utf-8")
    found = re.search(r"struct Parameters \{(.*?)\n\};", source, re.DOTALL)
    assert found is not None
    code = re.sub(r"//.*", "", found[1])
    names = re.findall(r"\*?(\w+)(?=[,;])", code)
    assert names == [field[0] for field in native._Parameters._fields_]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_warp_has_one_role(layout: native.Layout) -> None:
    consumers = (1 << layout.consumers * layout.turns) - 1
    assert not consumers & layout.producers
    assert not (consumers | layout.producers) & layout.finishers
    assert layout.warps <= 32 and layout.channels % 4 == 0


def test_without_a_compiler_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None)
    assert not _nvrtc.available.__wrapped__()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_wait_for_a_buffer_is_ambiguous(layout: native.Layout) -> None:
    assert layout.slots % layout.producers.bit_count() == 0
    assert layout.finishers.bit_count() <= layout.slots
    assert layout.turns // 2 < layout.slots


@pytest.mark.parametrize(
    ("batch", "channels", "states", "layouts", "shared", "expected"),
    [
        (1, 1536, 16, "exact", 232_448, native._LAYOUTS[3]),
        (4, 5120, 16, "exact", 232_448, native._LAYOUTS[3]),
        (1, 1024, 16, "exact", 232_448, native._LAYOUTS[2]),
        (1, 512, 16, "exact", 232_448, native._SPREAD),
        (1, 512, 8, "exact", 232_448, native._LAYOUTS[1]),
        (1, 1536, 32, "exact", 101_376, dataclasses.replace(native._LAYOUTS[3], slots=4)),
        (1, 1536, 16, "brief", 232_448, native._TENSOR[3]),
        (2, 2048, 16, "brief", 101_376, native._TENSOR[4]),
        (2, 2048, 16, "brief", 65_536, dataclasses.replace(native._TENSOR[4], slots=4)),
        (1, 1024, 16, "brief", 232_448, native._TENSOR[2]),
        (1, 512, 16, "brief", 232_448, native._TENSOR[1]),
    ],
)
def test_every_multiprocessor_gets_a_block(
    batch: int,
    channels: int,
    states: int,
    layouts: str,
    shared: int,
    expected: native.Layout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chip = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    layout = native._layout.__wrapped__(0, batch, channels, states, layouts)
    assert layout == expected and layout.shared_bytes(states) <= shared
