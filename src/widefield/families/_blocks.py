"""Blocks around mixers that drop tokens, and attention layers behind them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from widefield.families._attention import fit_attention
from widefield.families._context import Shortened, Trail, mark_shortened, shortened
from widefield.families.ssd import SSDMixer


class DroppingBlock(nn.Module):
    """Mixed into a transformers block class: what its mixer drops is gone for later blocks.

    The mixer's output is 0 at dropped tokens. All else in a block is done token by token, so the
    block runs as transformers has it, and the kept rows are gathered from its output.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block's output (B, L, H), or (B, k, H) if its mixer drops tokens."""
        note = shortened(hidden_states)
        trail = Trail(note)
        for child in self.children():
            if isinstance(child, SSDMixer):
                kwargs["widefield_trail"] = trail
            elif hasattr(child, "q_proj"):
                length = hidden_states.shape[1]
                kwargs = fit_attention(int(child.layer_idx), length, note, kwargs)  # type: ignore[arg-type]
        out = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        if trail.rows is not None:
            out = trail.rows.gather(out)
            note = Shortened(trail.rows, hidden_states.shape[1] if note is None else note.length)
        return out if note is None else mark_shortened(out, note)
