"""Longer contexts for live Mamba-family models of transformers.

import widefield as wf
model, tokenizer, calibration = wf.load_bundled()
wf.extend(model, wf.LongMamba(calibration))
model.generate(...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from widefield.bundled import load_bundled
    from widefield.calibration import Calibration
    from widefield.collect import calibrate
    from widefield.errors import WidefieldError
    from widefield.evaluation.tune import tune
    from widefield.extension import extend, extended, restore
    from widefield.loading import load
    from widefield.methods import DeciMamba, LongMamba
    from widefield.prefilling import prefill
    from widefield.states import fork_state, load_state, save_state

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "DeciMamba",
    "LongMamba",
    "WidefieldError",
    "calibrate",
    "extend",
    "extended",
    "fork_state",
    "load",
    "load_bundled",
    "load_state",
    "prefill",
    "restore",
    "save_state",
    "tune",
]

# Where each public name lives; imported at first use, so that `import widefield` and `widefield
# --help` are quick.
_HOMES = {
    "Calibration": "widefield.calibration",
    "DeciMamba": "widefield.methods",
    "LongMamba": "widefield.methods",
    "WidefieldError": "widefield.errors",
    "calibrate": "widefield.collect",
    "extend": "widefield.extension",
    "extended": "widefield.extension",
    "fork_state": "widefield.states",
    "load": "widefield.loading",
    "load_bundled": "widefield.bundled",
    "load_state": "widefield.states",
    "prefill": "widefield.prefilling",
    "restore": "widefield.extension",
    "save_state": "widefield.states",
    "tune": "widefield.evaluation.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'widefield' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
