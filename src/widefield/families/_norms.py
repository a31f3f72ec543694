"""The norms of transformers: the same module, in one pass over its input."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from widefield import ops


class Norm(nn.Module):
    """Mixed into an RMS norm of transformers."""

    weight: Tensor
    variance_epsilon: float
    # Whether the output is as wide as a weight that is wider than the input, in all versions of
    # transformers.
    widens: ClassVar[bool] = True

    def forward(
        self, hidden_states: Float[Tensor, "*batch width"], dtype: torch.dtype | None = None
    ) -> Float[Tensor, "*batch width"]:
        """The normed input.

        Args:
            hidden_states: any floating dtype.
            dtype: what the input would be rounded to first by whoever calls; None for its own.
        """
        known = self.widens or dtype is not None or hidden_states.dtype == self.weight.dtype
        if known and ops.runs_kernels(hidden_states, self.weight, backward=True):
            return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon, dtype=dtype)
        rounded = hidden_states if dtype is None else hidden_states.to(dtype)
        plain: Any = super().forward
        return plain(rounded)


class WeightlessNorm(nn.Module):
    """Mixed into an RMS norm without weights."""

    eps: float

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """The normed input."""
        if ops.runs_kernels(x, backward=True):
            return ops.rms_norm(x, None, self.eps)
        plain: Any = super().forward
        return plain(x)


class GatedNorm(nn.Module):
    """Mixed into a gated RMS norm of transformers."""

    weight: Tensor
    variance_epsilon: float

    @property
    def groups(self) -> int:
        """How many parts of the last dimension are normed apart."""
        width = self.weight.shape[0]
        return width // getattr(self, "group_size", width)  # older versions know one group only

    @property
    def gate_first(self) -> bool:
        """Whether the gate comes before the norm."""
        return True

    def forward(
        self,
        hidden_states: Float[Tensor, "*batch width"],
        gate: Float[Tensor, "*batch width"] | None = None,
    ) -> Float[Tensor, "*batch width"]:
        """The gated and normed input."""
        tensors = (hidden_states, gate, self.weight)
        if gate is None or not ops.runs_kernels(*tensors, backward=True):
            plain: Any = super().forward
            if hidden_states.ndim == 3 and hidden_states.shape[1] == 1:
                # That of FalconH1 in older versions of transformers drops a length of one, and
                # then spreads the gate of one row over all of them.
                return plain(hidden_states[:, 0], None if gate is None else gate[:, 0])[:, None]
            return plain(hidden_states, gate)
        return ops.gated_rms_norm(
            hidden_states,
            gate,
            self.weight,
            self.variance_epsilon,
            groups=self.groups,
            gate_first=self.gate_first,
        )
