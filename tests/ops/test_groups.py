"""Groups of channels with their own B and C are as many scans side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ops.cases import scan_inputs
from widefield import ops
from widefield.plan import LayerPlan

GROUPS, WIDTH = 3, 20
_CHANNELS = ("x", "z", "delta", "delta_bias", "D")


def grouped(parts: list[Any]) -> Any:
    wide = {n: torch.cat([getattr(p, n) for p in parts], dim=-1) for n in _CHANNELS}
    return parts[0].replace(
        **wide,
        A=torch.cat([p.A for p in parts]),
        B=torch.stack([p.B for p in parts], dim=2),
        C=torch.stack([p.C for p in parts], dim=2),
        initial_state=torch.cat([p.initial_state for p in parts], dim=1),
    )


def parts_of() -> list[Any]:
    return [scan_inputs(2, 50, WIDTH, 8) for _ in range(GROUPS)]


@pytest.mark.parametrize("rows", [False, True])
def test_a_grouped_scan_is_its_groups_scans(rows: bool) -> None:
    parts, shape = parts_of(), (2, GROUPS * WIDTH) if rows else (GROUPS * WIDTH,)
    plan: Any = LayerPlan(
        delta_floor=0.1 * torch.rand(shape),
        delta_scale=0.5 + torch.rand(shape),
        decay_scale=0.5 + torch.rand(shape),
    )
    for whole in (None, plan):
        y, state = ops.selective_scan(grouped(parts), whole)
        for g, part in enumerate(parts):
            here = slice(g * WIDTH, (g + 1) * WIDTH)
            own = None
            if whole is not None:
                own = LayerPlan(
                    delta_floor=plan.delta_floor[..., here],
                    delta_scale=plan.delta_scale[..., here],
                    decay_scale=plan.decay_scale[..., here],
                )
            wanted_y, wanted_state = ops.selective_scan(part, own)
            assert torch.equal(y[..., here], wanted_y)
            assert torch.equal(state[:, here], wanted_state)


def test_a_grouped_step_is_its_groups_steps() -> None:
    parts = parts_of()
    whole = grouped(parts)
    state = whole.initial_state.clone()
    y = ops.selective_state_update(
        state, whole.x[:, 0], whole.delta[:, 0], whole.A, whole.B[:, 0], whole.C[:, 0],
        whole.D, whole.z[:, 0], whole.delta_bias,
    )  # fmt: skip
    for g, part in enumerate(parts):
        here, own = slice(g * WIDTH, (g + 1) * WIDTH), part.initial_state.clone()
        wanted = ops.selective_state_update(
            own, part.x[:, 0], part.delta[:, 0], part.A, part.B[:, 0], part.C[:, 0],
            part.D, part.z[:, 0], part.delta_bias,
        )  # fmt: skip
        torch.testing.assert_close(y[:, here], wanted)
        torch.testing.assert_close(state[:, here], own)
