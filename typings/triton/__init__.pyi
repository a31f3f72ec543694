# Triton is a GPU-only dependency whose language is not Python's types; this keeps pyright quiet and honest.
from typing import Any

from . import language as language

def __getattr__(name: str) -> Any: ...
