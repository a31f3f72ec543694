"""Train small checkpoints: data mixing, curriculum, loop, recipes."""

from __future__ import annotations

from widefield.training.checkpoint import finish, save_checkpoint
from widefield.training.data import load_corpus
from widefield.training.loop import TrainingResult, train
from widefield.training.recipe import Decimation, Recipe, Shape, Stage, load_recipe

__all__ = [
    "Decimation",
    "Recipe",
    "Shape",
    "Stage",
    "TrainingResult",
    "finish",
    "load_corpus",
    "load_recipe",
    "save_checkpoint",
    "train",
]
