"""DeciMamba: a few layers keep only the most important tokens, for themselves and the later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from widefield.calibration import REDUCTIONS, Calibration
from widefield.errors import WidefieldError
from widefield.methods import _checks
from widefield.methods._channels import global_channels
from widefield.plan import LayerPlan, ModelLayout, Pool

__all__ = ["RESIDUALS", "SCORES", "DeciMamba", "find_first_layer"]

SCORES = ("norm", "clamped", "global")
RESIDUALS = ("shortened", "full")


@dataclass(frozen=True)
class DeciMamba:
    """Sequence decimation (DeciMamba).

    Decimating layer number s = 0, 1, … keeps the max(L_base · β^s, min_length) best tokens of a
    prefill, in order. A prefill that is no longer than that stays as it is. Every prefill pools its
    own new tokens: in a conversation each turn is decimated for itself, and what the cache already
    holds stays. Decoded tokens are never dropped, nor are the last `protect` tokens of a prefill.

    Attributes:
        layers: indices of the decimating layers, ascending.
        base_length: L_base, tokens that the first of them keeps.
        shrink: β, from one decimating layer to the next; above 0, at most 1.
        min_length: tokens that every layer may keep.
        score: importance of a token: "norm", ‖Δ‖₂ over channels (the paper's); "clamped", the same
            of min(Δ, q), so that a few channels with heavy tails do not decide alone; "global",
            that over global channels only.
        protect: how many of the last tokens are always kept (in training: the answer's), at least
            1. They count among the kept ones, of which there are never fewer.
        calibration: of the model; needed for "clamped" and "global".
        decay_threshold: Th that makes a channel global, as in LongMamba.
        clamp_share: C; q is the value that this share of the tokens reaches.
        reduction: which of a channel's decay rates decides: "slowest", "mean" or "fastest".
        residual: "shortened", later layers see the kept tokens alone (the paper's); "full", a
            decimating layer scans the kept tokens and adds nothing to the others, which stay in the
            residual stream: for models where a shorter one is unsound, and no faster elsewhere.

    Raises:
        WidefieldError: if an option is out of range.
    """

    name: ClassVar[str] = "decimamba"

    layers: tuple[int, ...]
    base_length: int = 2000
    shrink: float = 0.5
    min_length: int = 20
    score: str = "norm"
    protect: int = 1
    calibration: Calibration | None = None
    decay_threshold: float = 1e-30
    clamp_share: float = 0.01
    reduction: str = "fastest"
    residual: str = "shortened"
    _pools: dict[int, Pool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", _checks.indices("layers", self.layers))
        _checks.whole("base_length", self.base_length, "tokens, at least 1", least=1)
        _checks.whole("min_length", self.min_length, "tokens, at least 1", least=1)
        _checks.whole("protect", self.protect, "tokens, at least 1", least=1)
        _checks.real("shrink", self.shrink, "β above 0 and at most 1", above=0, below=1 + 1e-12)
        _checks.one_of("score", self.score, SCORES)
        _checks.one_of("reduction", self.reduction, REDUCTIONS)
        _checks.one_of("residual", self.residual, RESIDUALS)
        expected = "Th between 0 and 1, e.g. 1e-30"
        _checks.real("decay_threshold", self.decay_threshold, expected, above=0, below=1)
        _checks.real("clamp_share", self.clamp_share, "C between 0 and 1", above=0, below=1)
        if self.score != "norm" and not isinstance(self.calibration, Calibration):
            raise WidefieldError(
                f"score={self.score!r} needs a calibration of the model, and there is "
                f"{self.calibration!r}: make one with wf.calibrate, or choose score='norm'"
            )

    def validate(self, layout: ModelLayout) -> None:
        """Check that the layers exist, may drop tokens, and have a score that tells tokens apart.

        Raises:
            WidefieldError: otherwise.
        """
        if layout.decimation is not None and self.residual == "shortened":
            raise WidefieldError(
                f"decimamba cannot drop tokens from the residual stream of {layout.model_class}: "
                f"{layout.decimation}; residual='full' drops them inside the layer alone, and "
                "longmamba keeps all of them"
            )
        _checks.present("layers", self.layers, layout)
        if self.score == "norm" or self.calibration is None:
            return
        self.calibration.check(layout)
        for layer in self.layers:
            weight = self.pool(layer).weight
            if weight is not None and not bool(weight.any()):
                raise WidefieldError(
                    f"score='global' finds no global channel in layer {layer} with "
                    f"decay_threshold={self.decay_threshold:g} and the {self.reduction} state: "
                    "lower the threshold, choose another layer, or score='clamped'"
                )

    def keep(self, layer: int) -> int:
        """How many tokens a decimating layer keeps at most."""
        step = self.layers.index(layer)
        shrunk = int(self.base_length * self.shrink**step)
        return max(shrunk, self.min_length, self.protect)

    def plan(self, layer: int, lengths: Sequence[int]) -> LayerPlan:
        """A pool in decimating layers, if the prefill can be longer than what they keep.

        Args:
            layer: the model's own index of the layer.
            lengths: context length S in tokens, one for all rows or one a row.
        """
        if layer not in self.layers or max(lengths) <= self.keep(layer):
            return LayerPlan()
        return LayerPlan(pool=self.pool(layer))

    def describe(self) -> dict[str, Any]:
        """The options as JSON-able values, without the calibration."""
        return {
            "layers": list(self.layers),
            "base_length": self.base_length,
            "shrink": self.shrink,
            "min_length": self.min_length,
            "score": self.score,
            "protect": self.protect,
            "decay_threshold": self.decay_threshold,
            "clamp_share": self.clamp_share,
            "reduction": self.reduction,
            "residual": self.residual,
        }

    def pool(self, layer: int) -> Pool:
        """What a decimating layer is asked to do, whatever the length."""
        if layer not in self._pools:
            self._pools[layer] = self._make_pool(layer)
        return self._pools[layer]

    def _make_pool(self, layer: int) -> Pool:
        keep, full = self.keep(layer), self.residual == "full"
        if self.score == "norm" or self.calibration is None:
            return Pool(keep, self.protect, scatter=full)
        clamp = self.calibration.layer(layer).quantile(self.clamp_share)
        weight = None
        if self.score == "global":
            far = global_channels(self.calibration, layer, self.reduction, self.decay_threshold)
            weight = far.float()
        return Pool(keep, self.protect, clamp=clamp, weight=weight, scatter=full)


def find_first_layer(
    score_layer: Callable[[DeciMamba], float], layout: ModelLayout, **options: Any
) -> tuple[DeciMamba, dict[int, float]]:
    """Try decimation in each layer alone and keep the best, as the authors search the first layer.

    Args:
        score_layer: how well the model does with a method; higher is better.
        layout: of the model.
        **options: of `DeciMamba`, without `layers`.

    Returns:
        The best method (the earliest of equals), and the score of every layer.

    Raises:
        WidefieldError: if no layer can be decimated.
    """
    candidates = {layer: DeciMamba(layers=(layer,), **options) for layer in layout.layers}
    table: dict[int, float] = {}
    reasons = []
    for layer, method in candidates.items():
        try:
            method.validate(layout)
        except WidefieldError as error:
            reasons.append(str(error))
        else:
            table[layer] = float(score_layer(method))
    if not table:
        raise WidefieldError(reasons[0])
    best = max(table, key=lambda layer: (table[layer], -layer))
    return candidates[best], table
