"""What is asked of a model and how its answer is judged."""

from __future__ import annotations
