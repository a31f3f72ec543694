"""The seam: what a family hands to the kernels, and what a method asks of them.

Symbols: B batch, L sequence length, D channels, N state size; in Mamba-2 H heads of P channels and
G groups of heads that share B and C. `delta` is Δ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["LayerPlan", "ModelLayout", "Pool", "SSDInputs", "ScanInputs"]


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """Everything that one selective scan reads.

    The recurrence, per channel d and state n, with Δ = softplus(delta + delta_bias):

        h_t = exp(Δ_t · A) ⊙ h_{t-1} + Δ_t · B_t · x_t        y_t = (C_t · h_t + D · x_t) ·
        silu(z_t)

    Tensors are channels-last; the last dimension has stride 1, the others may be strided views.
    Where B and C have a dimension of groups, the channels are that many equal parts in a row, each
    with its own B and C (the heads of Zamba).

    Attributes:
        x: what is written into the state, any floating dtype.
        delta: raw Δ before bias and softplus (or Δ itself if `delta_softplus` is false).
        A: negative decay rates, float32 (or float64 in tests).
        B: input projection, one per token, or one per token and group.
        C: output projection, like B.
        D: skip connection, or None.
        z: gate before its silu, or None.
        delta_bias: added to `delta` before the softplus, or None.
        delta_softplus: whether Δ = softplus(delta + bias).
        initial_state: float32 state before the first token, or None for zeros.
        valid: False marks padding: the state passes through it unchanged and y is 0. None = all
            valid.
        cu_seqlens: (S + 1,) int32 or int64, where a batch of one holds S sequences side by side:
            sequence i is the tokens cu_seqlens[i] to cu_seqlens[i + 1]. Each has its own state: S
            is then the first dimension of states and of a plan's fields per row. Without `valid`.
    """

    x: Float[Tensor, "batch length channels"]
    delta: Float[Tensor, "batch length channels"]
    A: Float[Tensor, "channels state"]
    B: Float[Tensor, "batch length *groups state"]
    C: Float[Tensor, "batch length *groups state"]
    D: Float[Tensor, " channels"] | None = None
    z: Float[Tensor, "batch length channels"] | None = None
    delta_bias: Float[Tensor, " channels"] | None = None
    delta_softplus: bool = True
    initial_state: Float[Tensor, "sequences channels state"] | None = None
    valid: Bool[Tensor, "batch length"] | None = None
    cu_seqlens: Int[Tensor, " ends"] | None = None

    def replace(self, **changes: object) -> ScanInputs:
        """A copy with the given fields exchanged."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SSDInputs:
    """Everything that one scan of Mamba-2 (state-space duality) reads.

    The recurrence, per head h with its P channels and N states, g the group of head h and
    Δ = clamp(softplus(delta + delta_bias), *delta_limit):

        S_t = exp(Δ_t · A) · S_{t-1} + Δ_t · x_t ⊗ B_t        y_t = S_t · C_t + D · x_t

    Where the papers speak of a channel of Mamba-2, they mean a head: Δ and every per-channel field
    of a `LayerPlan` have H entries. The gate is not part of the scan; models apply it in the norm
    behind it.

    Tensors may be strided views; the last dimension has stride 1.

    Attributes:
        x: what is written into the state, any floating dtype.
        delta: raw Δ before bias and softplus (or Δ itself if `delta_softplus` is false).
        A: negative decay rates, float32 (or float64 in tests).
        B: input projection, one per token and group.
        C: output projection, one per token and group.
        D: skip connection, or None.
        delta_bias: added to `delta` before the softplus, or None.
        delta_softplus: whether Δ = softplus(delta + bias).
        delta_limit: smallest and largest Δ that the model allows, applied before a plan's scale and
            floor.
        initial_state: float32 state before the first token, or None for zeros.
        valid: False marks padding: the state passes through it unchanged and y is 0. None = all
            valid.
    """

    x: Float[Tensor, "batch length heads width"]
    delta: Float[Tensor, "batch length heads"]
    A: Float[Tensor, " heads"]
    B: Float[Tensor, "batch length groups state"]
    C: Float[Tensor, "batch length groups state"]
    D: Float[Tensor, " heads"] | None = None
    delta_bias: Float[Tensor, " heads"] | None = None
    delta_softplus: bool = True
    delta_limit: tuple[float, float] = (0.0, math.inf)
    initial_state: Float[Tensor, "batch heads width state"] | None = None
    valid: Bool[Tensor, "batch length"] | None = None

    def replace(self, **changes: object) -> SSDInputs:
        """A copy with the given fields exchanged."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Pool:
    """Decimation of one layer's sequence (DeciMamba).

    The score of a token is ‖w ⊙ min(Δ_t, c)‖₂ over channels; the paper's is w = 1, c = ∞.
    Each row of the batch keeps its min(length, keep) best tokens, in order; ties go to the earlier
    token.

    Attributes:
        keep: how many valid tokens a row keeps at most, at least 1.
        protect: how many of the last tokens are always kept (they count towards `keep`), at least
            1.
        clamp: per-channel cap c of Δ, or None.
        weight: per-channel weight w ≥ 0, or None.
        scatter: dropped tokens stay in the residual stream, where this layer adds nothing to them;
            otherwise they are gone for all later layers.
    """

    keep: int
    protect: int = 1
    clamp: Float[Tensor, " channels"] | None = None
    weight: Float[Tensor, " channels"] | None = None
    scatter: bool = False

    def to(self, device: torch.device | str) -> Pool:
        """The same pool with its tensors on `device`."""
        return replace(self, clamp=_moved(self.clamp, device), weight=_moved(self.weight, device))


def _moved(tensor: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a method asks of one layer at one context length. Data, not a callback: kernels fuse it.

    Per-channel tensors are float32, of shape (D,) or, where the rows of a batch have different
    context
    lengths, (B, D). A field that is None costs nothing.

    Attributes:
        delta_floor: tokens with Δ < floor leave the channel's state as it was (LongMamba, Eq. 17).
        delta_scale: Δ is multiplied by it before the floor is applied (MambaExtend).
        decay_scale: A is multiplied by it (spectral scaling).
        pool: keep only some tokens, in this layer alone or in all later ones, too (DeciMamba).
    """

    delta_floor: Tensor | None = None
    delta_scale: Tensor | None = None
    decay_scale: Tensor | None = None
    pool: Pool | None = None

    @property
    def touches_scan(self) -> bool:
        """Whether the scan itself differs from the unmodified one."""
        return any(f is not None for f in (self.delta_floor, self.delta_scale, self.decay_scale))

    def to(self, device: torch.device | str) -> LayerPlan:
        """The same plan with its tensors on `device`."""
        return LayerPlan(
            _moved(self.delta_floor, device),
            _moved(self.delta_scale, device),
            _moved(self.decay_scale, device),
            None if self.pool is None else self.pool.to(device),
        )


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """What a method may know of a model: its shape and who it is, never its modules.

    Attributes:
        model_class: name of the top class, e.g. "MambaForCausalLM".
        fingerprint: hash of the weights that Δ depends on.
        layers: indices (the model's own numbering) of the layers that hold a Mamba mixer,
            ascending.
        channels: channels of each of those layers (D of Mamba-1, heads of Mamba-2).
        decimation: None if a shorter residual stream is sound in this model, else the reason why it
            is not.
    """

    model_class: str
    fingerprint: str
    layers: tuple[int, ...]
    channels: tuple[int, ...]
    decimation: str | None = None
