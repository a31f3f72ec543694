"""What Triton kernels share: a softplus exact to float32's last places, numbers of a launch.

`triton.cdiv` and `triton.next_power_of_2` are made for kernels; called from Python they take longer
than many a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950216293335)  # log2(e), rounded to float32
_LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # what that rounding left
_ALIGNED = 15  # bits of an address that are 0 where Triton reads 16 bytes at once
_MOST = 4096


def blocks(length: int, size: int) -> int:
    """How many blocks of a size cover a length."""
    return -(-length // size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least as large."""
    return 1 << (number - 1).bit_length()


class Variant:
    """A kernel with its constants, launched without asking Triton each time how to compile it.

    Triton looks at every argument of every call. Calls with the same numbers, and with tensors of
    the same dtypes and alignment, run the same machine code: what launches it is kept.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], **options: Any) -> None:
        """Choose the constants, which stand behind all other parameters, in the kernel's order.

        Args:
            kernel: a function under `triton.jit`.
            constants: its `constexpr` parameters.
            **options: of the launch, e.g. `num_warps`.
        """
        self._kernel, self._given = kernel, constants | options
        self._constants = tuple(constants.values())
        self._known: dict[tuple[Any, ...], Any] = {}

    def launch(
        self, grid: tuple[int, int, int], tensors: Sequence[Tensor], numbers: tuple[int, ...]
    ) -> None:
        """Launch on the current device, which holds the tensors.

        Args:
            grid: how many programs.
            tensors: the kernel's first parameters.
            numbers: those that follow.
        """
        pointers = [t.data_ptr() for t in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        key = (grid, numbers, tensors[0].get_device(), *[t.dtype for t in tensors])
        run = self._known.get(key)
        if run is not None and not bits & _ALIGNED:
            run(*pointers, *numbers, *self._constants)
            return
        compiled = self._kernel[grid](*tensors, *numbers, **self._given)
        if not bits & _ALIGNED and isinstance(compiled, triton.compiler.CompiledKernel):
            if len(self._known) >= _MOST:  # every length of a prompt is one
                self._known.clear()
            self._known[key] = compiled[grid]


@triton.jit
def exp_negative(x):
    """Exp of x ≤ 0, right where x is large, too: the rounding of x · log2(e) is made good again."""
    high = x * _LOG2E
    low = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -high))
    return tl.where(x < -87.0, 0.0, tl.exp2(high) * tl.fma(low, 0.6931471805599453, 1.0))


@triton.jit
def log1p_fraction(u):
    """log(1 + u) of 0 ≤ u ≤ 1, as the first terms of 2 · artanh(u / (2 + u))."""
    s = u / (2.0 + u)
    q = s * s
    p = tl.fma(q, 1.0 / 15.0, 1.0 / 13.0)
    p = tl.fma(q, p, 1.0 / 11.0)
    p = tl.fma(q, p, 1.0 / 9.0)
    p = tl.fma(q, p, 1.0 / 7.0)
    p = tl.fma(q, p, 1.0 / 5.0)
    p = tl.fma(q, p, 1.0 / 3.0)
    return 2.0 * tl.fma(s * q, p, s)


@triton.jit
def softplus(v):
    """log(1 + exp(v)); NaN stays NaN."""
    small = tl.where(v > 0.0, v, 0.0) + log1p_fraction(exp_negative(-tl.abs(v)))
    return tl.where((v > 20.0) | (v != v), v, small)
