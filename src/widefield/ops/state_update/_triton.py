"""exp, softplus and silu for one decode step in Triton, as exact as torch's own."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2E = tl.constexpr(1.4426950216293335)  # log2(e), rounded to float32
_LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # what that rounding left


@triton.jit
def exp(x):
    # 0 below -87, and as large as exp(88) above 88. Steps multiply thousands of these, so an error
    # that leans to one side adds up: the product is compensated, and a polynomial takes the place
    # of the GPU's exp2.
    x = tl.where(x < -88.0, -88.0, tl.where(x > 88.0, 88.0, x))
    n = tl.floor(x * _LOG2E + 0.5)
    fraction = tl.fma(x, _LOG2E_REST, tl.fma(x, _LOG2E, -n))
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    p = tl.fma(fraction, 0.00015326471475418657, 0.0013390806270763278)
    p = tl.fma(fraction, p, 0.009618505835533142)
    p = tl.fma(fraction, p, 0.05550359934568405)
    p = tl.fma(fraction, p, 0.24022647738456726)
    p = tl.fma(fraction, p, 0.6931471824645996)
    p = tl.fma(fraction, p, 1.0)
    return tl.where(x < -87.0, 0.0, p * power)


@triton.jit
def _log1p(u):
    # log(1 + u) of 0 ≤ u ≤ 1 as 2 artanh(u / (2 + u)), exact to float32's last places, which the
    # GPU's own logarithm near 1 is not.
    s = tl.div_rn(u, 2.0 + u)
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
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + _log1p(exp(-tl.abs(v))))


@triton.jit
def silu(v):
    small = exp(-tl.abs(v))
    return v * tl.div_rn(tl.where(v < 0.0, small, 1.0), 1.0 + small)
