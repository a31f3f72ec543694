"""Checkpoints as the authors of Mamba publish them: `d_model`, `n_layer`, and weights of their own.

Their `config.json` names no transformers class, and their embedding has another name; everything
else is as in transformers.
"""

from widefield.original.build import build, is_original
from widefield.original.files import HUB_OPTIONS, Place

__all__ = ["HUB_OPTIONS", "Place", "build", "is_original"]
