"""LongMamba: freeze far-seeing channels at tokens with small Δ: they decay as in training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from widefield.calibration import REDUCTIONS, Calibration
from widefield.errors import WidefieldError, unknown
from widefield.methods import _checks
from widefield.methods._channels import global_channels, log_decay, mean_log_decay
from widefield.plan import LayerPlan, ModelLayout

__all__ = ["CHANNELS", "PRESETS", "LongMamba"]

CHANNELS = ("global", "local", "random")
# Th and C of the paper's final version, by model.
PRESETS: dict[str, dict[str, float]] = {
    "mamba-1.4b": {"decay_threshold": 1e-30, "clamp_share": 0.20},
    "mamba2-1.3b": {"decay_threshold": 5e-2, "clamp_share": 0.05},
    "zamba2": {"decay_threshold": 1e-5, "clamp_share": 0.05},
    "zamba2-1.2b": {"decay_threshold": 1e-5, "clamp_share": 0.05},
    "zamba2-2.7b": {"decay_threshold": 1e-5, "clamp_share": 0.05},
}


@dataclass(frozen=True)
class LongMamba:
    """Training-free token filtering (LongMamba, Eq. 15 to 18).

    A channel is global if its state keeps more than Th of itself over the training length L0. In
    global channels a prefill of context length S > L0 freezes the state at tokens with Δ < g(S),
    where g(S) is the least threshold that keeps the cumulative decay within that of L0 tokens of
    the calibrated distribution. For S ≤ L0 nothing is filtered at all.

    The clamp, from the paper's final version, replaces Δ by min(Δ, q) before g(S) is found, with q
    the value that the share C of the tokens reaches: that share is then always kept, and a few
    tokens of very large Δ do not eat the whole budget. The paper as submitted has no clamp:
    `clamp_share=None`. The limit C → 0 (q is the largest Δ) is the same thing, so 0 is refused as
    ambiguous; 1.0, a name that is in use for "no clamp", means None, too. (Taken by the formula, C
    = 1 would keep every token, which is no method.)

    Attributes:
        calibration: of the model that is to be extended.
        decay_threshold: Th, between 0 and 1; compared in logs, so 1e-300 is as good as any.
        clamp_share: C, between 0 and 1; None for no clamp; "follow" for max(clamp_floor,
            clamp_kappa · L0 / S), which filters less at moderate lengths (nothing at all below
            clamp_kappa · L0) and costs least in quality.
        clamp_floor: least C of "follow".
        clamp_kappa: κ of "follow": how many training lengths' worth of tokens are kept at least.
        reduction: which of a Mamba-1 channel's N decay rates decides: "slowest", "mean" or
            "fastest".
        channels: which are filtered: "global" (the method), "local" or "random" (the paper's
            ablations; random ones are as many as the global ones in each layer).
        layers: "all", or the indices of the layers that are filtered, ascending.
        top_layers: of those, only so many with the largest mean cumulative decay (Fig. 5b); None
            for all.
        table_step: None for thresholds that are exact for every S; n looks them up at the next
            multiple of n tokens that is not below S, so that the budget is never exceeded (the
            paper has a table with n = 1000).
        seed: of the random channels.

    Raises:
        WidefieldError: if an option is out of range.
    """

    name: ClassVar[str] = "longmamba"

    calibration: Calibration
    decay_threshold: float = 1e-30
    clamp_share: float | Literal["follow"] | None = 0.01
    clamp_floor: float = 0.003
    clamp_kappa: float = 2.0
    reduction: str = "fastest"
    channels: str = "global"
    layers: Literal["all"] | tuple[int, ...] = "all"
    top_layers: int | None = None
    table_step: int | None = None
    seed: int = 0
    _selected: dict[int, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.calibration, Calibration):
            raise WidefieldError(
                f"calibration={self.calibration!r}: LongMamba needs a Calibration of the model; "
                "make one with wf.calibrate or read one with wf.Calibration.load"
            )
        _checks.real(
            "decay_threshold",
            self.decay_threshold,
            "Th between 0 and 1, e.g. 1e-30",
            above=0,
            below=1,
        )
        self._check_clamp()
        _checks.one_of("reduction", self.reduction, REDUCTIONS)
        _checks.one_of("channels", self.channels, CHANNELS)
        if self.layers != "all":
            object.__setattr__(self, "layers", _checks.indices("layers", self.layers))
        if self.top_layers is not None:
            _checks.whole("top_layers", self.top_layers, "how many layers, at least 1", least=1)
        if self.table_step is not None:
            _checks.whole("table_step", self.table_step, "tokens, at least 1, or None", least=1)
        _checks.whole("seed", self.seed, "a whole number, at least 0", least=0)

    def _check_clamp(self) -> None:
        if self.clamp_share in (1, 1.0) and not isinstance(self.clamp_share, bool):
            object.__setattr__(self, "clamp_share", None)
        if isinstance(self.clamp_share, str):
            _checks.one_of("clamp_share", self.clamp_share, ("follow",))
        elif self.clamp_share is not None:
            expected = "C between 0 and 1, None for no clamp, or 'follow'"
            _checks.real("clamp_share", self.clamp_share, expected, above=0, below=1)
        _checks.real("clamp_floor", self.clamp_floor, "a share between 0 and 1", above=0, below=1)
        _checks.real("clamp_kappa", self.clamp_kappa, "a number above 0, e.g. 2", above=0)

    @classmethod
    def preset(cls, name: str, calibration: Calibration, **options: Any) -> LongMamba:
        """The method with the published settings of a model.

        Args:
            name: "mamba-1.4b", "mamba2-1.3b", "zamba2-1.2b" or "zamba2-2.7b"; "zamba2" is short for
                the last two, which share their settings.
            calibration: of the model at hand.
            **options: what should differ.

        Raises:
            WidefieldError: for an unknown name, with the nearest ones.
        """
        if name not in PRESETS:
            raise unknown("preset of longmamba", name, PRESETS)
        return cls(calibration, **{**PRESETS[name], **options})

    def validate(self, layout: ModelLayout) -> None:
        """Check that the calibration is of this model, and that there is a channel to filter.

        Raises:
            WidefieldError: otherwise.
        """
        self.calibration.check(layout)
        if self.layers != "all":
            _checks.present("layers", self.layers, layout)
        chosen = self.chosen_layers()
        if not any(bool(self.selected(layer).any()) for layer in chosen):
            raise WidefieldError(self._nothing_to_do(chosen))

    def _nothing_to_do(self, chosen: Sequence[int]) -> str:
        decays = [log_decay(self.calibration, layer, self.reduction) for layer in chosen]
        count = sum(d.shape[0] for d in decays)
        start = (
            f"longmamba would filter none of the {count} channels of {len(chosen)} layers: with "
            f"decay_threshold={self.decay_threshold:g} and the {self.reduction} state"
        )
        if self.channels == "local":
            return f"{start} all are global; raise decay_threshold, or choose channels='global'"
        slowest = max(float(d.max()) for d in decays) / math.log(10)
        return (
            f"{start} none is global; the largest cumulative decay over "
            f"{self.calibration.train_length} tokens is 1e{slowest:.0f}: lower decay_threshold "
            "below that, or choose reduction='slowest'"
        )

    def plan(self, layer: int, lengths: Sequence[int]) -> LayerPlan:
        """Thresholds g(S) of one layer as `delta_floor`; 0 in channels that are not filtered.

        Args:
            layer: the model's own index of the layer.
            lengths: context length S in tokens, one for all rows or one a row.
        """
        floors = {length: self._floor(layer, length) for length in set(lengths)}
        if all(floor is None for floor in floors.values()):
            return LayerPlan()
        if len(floors) == 1:
            return LayerPlan(delta_floor=floors[lengths[0]])
        nothing = torch.zeros(self.calibration.layer(layer).channels)
        rows = [floors[length] for length in lengths]
        return LayerPlan(delta_floor=torch.stack([nothing if row is None else row for row in rows]))

    def describe(self) -> dict[str, Any]:
        """The options as JSON-able values, without the calibration."""
        return {
            "decay_threshold": self.decay_threshold,
            "clamp_share": self.clamp_share,
            "clamp_floor": self.clamp_floor,
            "clamp_kappa": self.clamp_kappa,
            "reduction": self.reduction,
            "channels": self.channels,
            "layers": self.layers if self.layers == "all" else list(self.layers),
            "top_layers": self.top_layers,
            "table_step": self.table_step,
            "seed": self.seed,
        }

    def chosen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are filtered, ascending."""
        layers = sorted(self.calibration.layers) if self.layers == "all" else list(self.layers)
        if self.top_layers is None:
            return tuple(layers)
        ranked = sorted(
            layers, key=lambda i: (-mean_log_decay(self.calibration, i, self.reduction), i)
        )
        return tuple(sorted(ranked[: self.top_layers]))

    def selected(self, layer: int) -> Bool[Tensor, " channels"]:
        """Which channels of a layer are filtered."""
        if layer not in self._selected:
            self._selected[layer] = self._select(layer)
        return self._selected[layer]

    def clamp_at(self, length: int) -> float | None:
        """C at a context length; 1 and above mean that every token is kept."""
        if self.clamp_share != "follow":
            return self.clamp_share
        return max(self.clamp_floor, self.clamp_kappa * self.calibration.train_length / length)

    def _select(self, layer: int) -> Bool[Tensor, " channels"]:
        if layer not in self.chosen_layers():
            return torch.zeros(self.calibration.layer(layer).channels, dtype=torch.bool)
        far = global_channels(self.calibration, layer, self.reduction, self.decay_threshold)
        if self.channels == "local":
            return ~far
        if self.channels == "random":
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer)
            order = torch.randperm(far.shape[0], generator=generator)
            return torch.zeros_like(far).index_fill(0, order[: int(far.sum())], True)
        return far

    def _floor(self, layer: int, length: int) -> Float[Tensor, " channels"] | None:
        """g(S) of one layer at one length; None where nothing is filtered."""
        trained = self.calibration.train_length
        if length <= trained or not bool(self.selected(layer).any()):
            return None
        if self.table_step is not None:
            length = -(-length // self.table_step) * self.table_step
        share = self.clamp_at(length)
        if share is not None and share >= 1:
            return None
        threshold = self.calibration.layer(layer).threshold(length / trained, share)
        return torch.where(self.selected(layer), threshold, 0.0)
