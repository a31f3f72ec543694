"""Every name of the module is there and can be anything."""

from typing import Any

def __getattr__(name: str) -> Any: ...
