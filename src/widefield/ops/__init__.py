"""Kernels behind one dispatch: every op has a plain-torch reference of the same signature."""

from __future__ import annotations

from widefield.ops._backend import runs_kernels, use_backend
from widefield.ops._delta import effective_delta
from widefield.ops.causal_conv1d import causal_conv1d
from widefield.ops.pool import Rows, Survivors, pool_tokens, token_score
from widefield.ops.rms_norm import add_rms_norm, gated_rms_norm, rms_norm
from widefield.ops.selective_scan import selective_scan
from widefield.ops.ssd import ssd
from widefield.ops.state_update import selective_state_update, ssd_state_update

__all__ = [
    "Rows",
    "Survivors",
    "add_rms_norm",
    "causal_conv1d",
    "effective_delta",
    "gated_rms_norm",
    "pool_tokens",
    "rms_norm",
    "runs_kernels",
    "selective_scan",
    "selective_state_update",
    "ssd",
    "ssd_state_update",
    "token_score",
    "use_backend",
]
