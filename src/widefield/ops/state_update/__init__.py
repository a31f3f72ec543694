"""One decode step of the selective scan."""

from __future__ import annotations

from widefield.ops.state_update.reference import selective_state_update

__all__ = ["selective_state_update"]
