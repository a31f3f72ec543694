"""Shape and dtype checks of every jaxtyping signature, on every call the tests make.

Only arrays are checked: what else an argument may be is pyright's business, and bad input from
users must reach the code that answers it with a WidefieldError.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import isclass
from typing import Any, TypeVar, get_args

from beartype import beartype
from jaxtyping import AbstractArray

Function = TypeVar("Function", bound=Callable[..., Any])


def check(function: Function) -> Function:
    """The function with its arrays checked; the type checker that jaxtyping's import hook calls."""
    hints = function.__annotations__
    for name in [name for name, hint in hints.items() if not holds_array(hint)]:
        del hints[name]
    return beartype(function) if hints else function


def holds_array(hint: Any) -> bool:
    if isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(holds_array(part) for part in get_args(hint))
