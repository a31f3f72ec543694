"""Kernels behind one dispatch: every op has a plain-torch reference of the same signature."""

from __future__ import annotations

from widefield.ops._backend import forced_backend, runs_kernels, use_backend
from widefield.ops._delta import effective_delta
from widefield.ops._early import overlapping
from widefield.ops.causal_conv1d import causal_conv1d
from widefield.ops.pool import Rows, Survivors, pool_tokens, token_score
from widefield.ops.project import Convolution, project, projects_fast
from widefield.ops.rms_norm import add_rms_norm, gated_rms_norm, inverse_rms, rms_norm
from widefield.ops.selective_scan import selective_scan
from widefield.ops.ssd import gated_ssd, gates_in_the_scan, ssd
from widefield.ops.state_update import (
    causal_conv1d_update,
    low_rank_state_update,
    selective_state_update,
    ssd_state_update,
)

__all__ = [
    "Convolution",
    "Rows",
    "Survivors",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_update",
    "effective_delta",
    "forced_backend",
    "gated_rms_norm",
    "gated_ssd",
    "gates_in_the_scan",
    "inverse_rms",
    "low_rank_state_update",
    "overlapping",
    "pool_tokens",
    "project",
    "projects_fast",
    "rms_norm",
    "runs_kernels",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
    "token_score",
    "use_backend",
]
