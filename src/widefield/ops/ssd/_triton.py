"""What the Triton kernels of Mamba-2 share: Δ, sums of decays, exact products with weights."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A token whose decay is below 2^-150 leaves nothing in float32, however much it is below.
LEAST = tl.constexpr(-150.0)
# Added and taken away again, it rounds a float32 to a multiple of 2^-9: 128 such parts of at most
# 150 add up without an error.
_COARSE = tl.constexpr(1.5 * 2.0**14)


@triton.jit
def softplus(v):
    """Exact to float32's last places, which the GPU's own logarithm near 1 is not."""
    # exp(-|v|) in two factors, 2^n and 2^f with |f| ≤ ½, by polynomial.
    u = tl.maximum(-tl.abs(v), -87.0)
    n = tl.floor(u * LOG2E + 0.5)
    f = tl.fma(n, -0.693145751953125, u)
    f = tl.fma(n, -1.428606765330187e-6, f)
    p = tl.fma(f, 0.0013751150108873844, 0.00836898759007454)
    p = tl.fma(f, p, 0.04166954383254051)
    p = tl.fma(f, p, 0.166665181517601)
    p = tl.fma(f, p, 0.49999988079071045)
    p = tl.fma(f, p, 1.0)
    p = tl.fma(f, p, 1.0)
    u = p * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    # log(1 + u) = 2 artanh(u / (2 + u)), with u / (2 + u) at most a third.
    s = tl.div_rn(u, 2.0 + u)
    q = s * s
    p = tl.fma(q, 1.0 / 15.0, 1.0 / 13.0)
    p = tl.fma(q, p, 1.0 / 11.0)
    p = tl.fma(q, p, 1.0 / 9.0)
    p = tl.fma(q, p, 1.0 / 7.0)
    p = tl.fma(q, p, 1.0 / 5.0)
    p = tl.fma(q, p, 1.0 / 3.0)
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + 2.0 * tl.fma(s * q, p, s)) + v * 0.0


@triton.jit
def log_decay(delta, rate):
    """The binary logarithm of each token's decay, in a coarse part and the rest."""
    log = delta * rate
    log = tl.where(log < LEAST, LEAST, log)
    coarse = (log + _COARSE) - _COARSE
    return coarse, log - coarse


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """`acc` + a·b, where b may have fewer bits than a: a narrow b is multiplied by parts of a."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision=PRECISION)
    high = a.to(b.dtype)
    rest = a - high.to(tl.float32)
    middle = rest.to(b.dtype)
    low = (rest - middle.to(tl.float32)).to(b.dtype)
    acc = tl.dot(low, b, acc)
    acc = tl.dot(middle, b, acc)
    return tl.dot(high, b, acc)
