# Triton is for GPUs only and its language is not typed: any name is there, of any type.
from typing import Any

from . import language as language

def __getattr__(name: str) -> Any: ...
