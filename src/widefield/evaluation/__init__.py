"""How a grid of (model, method, task, length) is run, stored and drawn."""

from __future__ import annotations
