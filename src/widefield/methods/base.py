"""What a method is: a frozen dataclass that turns (layer, context length) into a `LayerPlan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from widefield.plan import LayerPlan, ModelLayout

__all__ = ["Method"]


@runtime_checkable
class Method(Protocol):
    """A context-extension method. It sees calibrations and lengths, never a model.

    Attributes:
        name: the registered name, e.g. "longmamba".
    """

    name: ClassVar[str]

    def validate(self, layout: ModelLayout) -> None:
        """Raise `WidefieldError` if the method cannot act on this model: why, and what to do."""
        ...

    def plan(self, layer: int, lengths: Sequence[int]) -> LayerPlan:
        """The plan of one layer.

        Args:
            layer: the model's own index of the layer.
            lengths: context length S of this prefill in tokens, what the cache already holds
                included: one number for all rows, or one for each row of the batch.

        Returns:
            A plan whose tensors are on the CPU: (D,) for one length, (rows, D) for several.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The options as JSON-able values, without the calibration."""
        ...
