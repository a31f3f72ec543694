"""One decode step of either scan."""

from __future__ import annotations

from widefield.ops.state_update.reference import selective_state_update, ssd_state_update

__all__ = ["selective_state_update", "ssd_state_update"]
