"""Groups of channels with their own B and C are as many scans side by side."""

from __future__ import annotations

import pytest
import torch

from tests.ops.cases import scan_inputs
from widefield import ops
from widefield.plan import LayerPlan, ScanInputs

GROUPS, WIDTH = 3, 20
_CHANNELS = ("x", "z", "delta", "delta_bias", "D")


def grouped(parts: list[ScanInputs]) -> ScanInputs:
    wide = {n: torch.cat([getattr(p, n) for p in parts], dim=-1) for n in _CHANNELS}
    return parts[0].replace(
        **wide,
        A=torch.cat([p.A for p in parts]),
        B=torch.stack([p.B for p in parts], dim=2),
        C=torch.stack([p.C for p in parts], dim=2),
        initial_state=torch.cat([_state(p) for p in parts], dim=1),
    )


def _state(inputs: ScanInputs) -> torch.Tensor:
    assert inputs.initial_state is not None
    return inputs.initial_state.clone()


def _gate(inputs: ScanInputs) -> torch.Tensor:
    assert inputs.z is not None
    return inputs.z[:, 0]


def parts_of() -> list[ScanInputs]:
    return [scan_inputs(2, 50, WIDTH, 8) for _ in range(GROUPS)]


@pytest.mark.parametrize("rows", [False, True])
def test_a_grouped_scan_is_its_groups_scans(rows: bool) -> None:
    parts, shape = parts_of(), (2, GROUPS * WIDTH) if rows else (GROUPS * WIDTH,)
    fields = {
        "delta_floor": 0.1 * torch.rand(shape),
        "delta_scale": 0.5 + torch.rand(shape),
        "decay_scale": 0.5 + torch.rand(shape),
    }
    for whole in (None, LayerPlan(**fields)):
        y, state = ops.selective_scan(grouped(parts), whole)
        for g, part in enumerate(parts):
            here = slice(g * WIDTH, (g + 1) * WIDTH)
            cut = {name: value[..., here] for name, value in fields.items()}
            own = None if whole is None else LayerPlan(**cut)
            wanted_y, wanted_state = ops.selective_scan(part, own)
            assert torch.equal(y[..., here], wanted_y)
            assert torch.equal(state[:, here], wanted_state)


def test_a_grouped_step_is_its_groups_steps() -> None:
    parts = parts_of()
    whole = grouped(parts)
    state = _state(whole)
    y = ops.selective_state_update(
        state, whole.x[:, 0], whole.delta[:, 0], whole.A, whole.B[:, 0], whole.C[:, 0],
        whole.D, _gate(whole), whole.delta_bias,
    )  # fmt: skip
    for g, part in enumerate(parts):
        here, own = slice(g * WIDTH, (g + 1) * WIDTH), _state(part)
        wanted = ops.selective_state_update(
            own, part.x[:, 0], part.delta[:, 0], part.A, part.B[:, 0], part.C[:, 0],
            part.D, _gate(part), part.delta_bias,
        )  # fmt: skip
        torch.testing.assert_close(y[:, here], wanted)
        torch.testing.assert_close(state[:, here], own)
