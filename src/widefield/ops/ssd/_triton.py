"""What the Triton kernels of Mamba-2 share: Δ, sums of decays, exact products with weights."""

from __future__ import annotations

import inspect
from typing import Any

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Differ from prompt to prompt: not worth a compilation.
_VARIES = (
    "length", "segment", "slots", "rows", "sxb", "sBb", "sCb", "syb", "sdb", "svb", "scale_row",
    "floor_row", "decay_row", "sub", "swb", "skb", "smb", "sign", "several",
)  # fmt: skip
# A token whose decay is below 2^-150 leaves nothing in float32, however much it is below.
LEAST = tl.constexpr(-150.0)


def _kernel(function: Any) -> Any:
    """Compiled once for a model, whatever the length and the batch."""
    varies = [name for name in inspect.signature(function).parameters if name in _VARIES]
    return triton.jit(function, do_not_specialize=varies)


@triton.jit
def softplus(v):
    """Exact to float32's last places, which the GPU's own logarithm near 1 is not."""
    tiny = v < -87.0
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
    v = tl.where(v > 20.0, v, tl.maximum(v, 0.0) + 2.0 * tl.fma(s * q, p, s)) + v * 0.0
    return tl.where(tiny, 0.0, v)


@triton.jit
def _upper_half(a):
    """The part of a float32 that a bfloat16 can hold, so that the rest is exact."""
    return (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def split(a, PARTS: tl.constexpr):
    """A float32 tile as a sum of so many of bfloat16, three of which are exact."""
    high = a
    middle = a
    low = a
    if PARTS > 1:
        high = _upper_half(a)
        middle = a - high
    if PARTS > 2:
        rest = middle
        middle = _upper_half(rest)
        low = rest - middle
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@triton.jit
def times_narrow(a, b, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` + a·b of a float32 a, as exact as its PARTS are where b is narrower."""
    if b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        high, middle, low = split(a, PARTS)
        if PARTS > 2:
            acc = tl.dot(low, b, acc)
        if PARTS > 1:
            acc = tl.dot(middle, b, acc)
        acc = tl.dot(high, b, acc)
    return acc


@triton.jit
def _bounds(table_ptr, row, slot, slots, length, segment, VARLEN: tl.constexpr):
    """Of a segment: sequence, first token, tokens, number in the sequence, last of it, place."""
    if VARLEN:
        sequence = tl.load(table_ptr + slot * 4)
        begin = tl.load(table_ptr + slot * 4 + 1)
        end = tl.load(table_ptr + slot * 4 + 2)
        number = tl.load(table_ptr + slot * 4 + 3)
        last = tl.load(table_ptr + slot * 4 + 4) != sequence
        place = slot.to(tl.int64)
    else:
        sequence = row
        begin = slot.to(tl.int64) * segment
        end = tl.minimum(begin + segment, length)
        number = slot.to(tl.int64)
        last = slot == slots - 1
        place = row * slots + slot
    return sequence, begin, (end - begin).to(tl.int32), number, last, place


@_kernel
def deltas(
    delta_ptr, A_ptr, bias_ptr, scale_ptr, floor_ptr, decay_ptr, valid_ptr, table_ptr,
    effective_ptr, sums_ptr, rests_ptr, ddelta_ptr, dA_ptr, dbias_ptr,
    length, segment, slots, heads, blocks, sdb, sdl, sdh, svb, svl,
    scale_row, floor_row, decay_row, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr,
    FLOOR: tl.constexpr, DECAY: tl.constexpr, VALID: tl.constexpr, VARLEN: tl.constexpr,
    BACKWARD: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Δ as the scan uses it, and the sums of the logarithms of decays since a chunk's start.

    Backward: the gradients of raw Δ, A and the bias. `sums` is then what the gradients left of Δ's
    way into the state, in so many blocks, and `rests` that of its way through the decays.
    """
    row = tl.program_id(2).to(tl.int64)
    chunks = tl.cdiv(segment, Q)
    sequence, begin, count, _, _, _ = _bounds(
        table_ptr, row, tl.program_id(0) // chunks, slots, length, segment, VARLEN
    )
    start = (tl.program_id(0) % chunks) * Q
    if (sequence < 0) | (start >= count):
        return
    t = start + tl.arange(0, Q)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    there = head < heads
    at = (begin + t)[:, None]
    inside = (t < count)[:, None] & there[None, :]
    raw = tl.load(
        delta_ptr + row * sdb + at * sdl + head[None, :] * sdh, mask=inside, other=0.0
    ).to(tl.float32)
    rate = tl.load(A_ptr + head, mask=there, other=0.0)
    decay = tl.full((HEADS,), 1.0, tl.float32)
    if DECAY:
        decay = tl.load(decay_ptr + sequence * decay_row + head, mask=there, other=0.0)
        rate *= decay
    if HAS_BIAS:
        raw += tl.load(bias_ptr + head, mask=there, other=0.0).to(tl.float32)[None, :]
    delta = raw
    open = inside
    slope = tl.full((Q, HEADS), 1.0, tl.float32)
    if SOFTPLUS:
        delta = softplus(raw)
        if BACKWARD:
            slope = 1.0 / (1.0 + tl.exp(-raw))
    if LIMIT:
        open = open & ~((delta < low) | (delta > high)) if BACKWARD else open
        delta = tl.where(delta < low, low, delta)
        delta = tl.where(delta > high, high, delta)
    if SCALE:
        scale = tl.load(scale_ptr + sequence * scale_row + head, mask=there, other=0.0)[None, :]
        delta *= scale
        slope *= scale
    shut = ~inside
    if FLOOR:
        floor = tl.load(floor_ptr + sequence * floor_row + head, mask=there, other=0.0)
        shut = shut | (delta < floor[None, :])
    if VALID:
        ok = tl.load(valid_ptr + row * svb + (begin + t) * svl, mask=t < count, other=0)
        shut = shut | (ok == 0)[:, None]
    delta = tl.where(shut, 0.0, delta)
    out = (row * heads + head)[None, :] * length + at
    if BACKWARD:
        direct = tl.zeros((Q, HEADS), tl.float32)
        through = tl.zeros((Q, HEADS), tl.float32)
        for block in range(blocks):
            part = out + tl.cast(block, tl.int64) * tl.num_programs(2) * heads * length
            direct += tl.load(sums_ptr + part, mask=inside, other=0.0)
            through += tl.load(rests_ptr + part, mask=inside, other=0.0)
        ddelta = tl.where(open & ~shut, (direct + through * rate[None, :]) * slope, 0.0)
        tl.store(
            ddelta_ptr + (row * length + at) * heads + head[None, :],
            ddelta.to(ddelta_ptr.dtype.element_ty), mask=inside,
        )  # fmt: skip
        part = (row * tl.num_programs(0) + tl.program_id(0)) * heads + head
        tl.store(dA_ptr + part, tl.sum(through * delta, axis=0) * decay, mask=there)
        tl.store(dbias_ptr + part, tl.sum(ddelta, axis=0), mask=there)
    else:
        # In float64: a rounding of a sum would come back as one of each decay since its start.
        logs = delta.to(tl.float64) * (rate.to(tl.float64) * LOG2E)[None, :]
        logs = tl.cumsum(tl.where(logs < LEAST, LEAST, logs), axis=0)
        sums = logs.to(tl.float32)
        tl.store(effective_ptr + out, delta, mask=inside)
        tl.store(sums_ptr + out, sums, mask=inside)
        tl.store(rests_ptr + out, (logs - sums.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit
def _tile(pointer, far, stride, local, across, size, WHOLE: tl.constexpr):
    """A tile of rows `local` behind row `far`; columns from `size` on are 0."""
    at = pointer + far * stride + (local[:, None] * stride + across[None, :])
    return tl.load(at) if WHOLE else tl.load(at, mask=(across < size)[None, :], other=0.0)


@triton.jit
def _shown(tile, ok, HIDE: tl.constexpr, WIDE: tl.constexpr):
    """A tile as products read it: with HIDE, 0 where it is not `ok`, whatever it holds."""
    if HIDE:
        tile = tl.where(ok[:, None], tile, 0.0)
    return tile.to(tl.float32) if WIDE else tile


@_kernel
def segment_states(
    x_ptr, B_ptr, valid_ptr, table_ptr, effective_ptr, sums_ptr, rests_ptr, local_ptr, kept_ptr,
    length, segment, slots, heads, width, states, share,
    sxb, sxl, sxh, sBb, sBl, sBg, svb, svl,
    VALID: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    BACKWARD: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state of a head, and how much of what was before it leaves.

    From the last chunk to the first: what no float32 can tell from 0 at the segment's end is not
    added up, but not-a-number in it is found. Backward, with dy and C for x and B: what it adds to
    the gradient of the state before it, from the first chunk to the last.
    """
    blocks = tl.cdiv(width, BP)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    sequence, begin, count, _, _, place = _bounds(
        table_ptr, row, tl.program_id(1), slots, length, segment, VARLEN
    )
    if sequence < 0:
        return
    tokens = (row * heads + head) * length + begin
    chunks = tl.cdiv(count, Q)
    alive = 0
    behind = 0.0
    for first in range(0, chunks, 256):
        away = first + tl.arange(0, 256)
        chunk = away if BACKWARD else chunks - 1 - away
        end = tl.minimum((chunk + 1) * Q, count)
        log = tl.load(sums_ptr + tokens + end - 1, mask=away < chunks, other=0.0)
        since = behind + tl.cumsum(log) - log
        lost = (since < LEAST) | (away >= chunks)
        alive = tl.maximum(alive, tl.max(tl.where(lost, 0, away + 1)))
        behind += tl.sum(log)

    i = tl.arange(0, Q)
    xp = x_ptr + row * (sxb * UNIT) + head * (sxh * UNIT) + begin * (sxl * UNIT)
    bp = B_ptr + row * (sBb * UNIT) + (head // share) * (sBg * UNIT) + begin * (sBl * UNIT)
    vp = valid_ptr + row * svb + begin * svl
    nan_x = tl.zeros((Q, BP), tl.float32)
    nan_b = tl.zeros((Q, BN), tl.float32)
    skipped = (alive if BACKWARD else 0) * Q
    for first in tl.range(0, (chunks - alive) * Q, Q, num_stages=3):
        start = first + skipped
        far = tl.cast(start, tl.int64)
        local = tl.minimum(i, count - 1 - start)
        x = _tile(xp, far, sxl * UNIT, local, p, width, WHOLE)
        b = _tile(bp, far, sBl * UNIT, local, n, states, WHOLE)
        if VALID:
            ok = tl.load(vp + (far + local) * svl) != 0
            x = tl.where(ok[:, None], x, 0.0)
            b = tl.where(ok[:, None], b, 0.0)
        nan_x += x.to(tl.float32) * 0.0
        nan_b += b.to(tl.float32) * 0.0
    poison = tl.sum(nan_x) + tl.sum(nan_b)

    state = tl.zeros((BP, BN), tl.float32)
    since = 0.0
    for away in tl.range(0, alive, num_stages=STAGES):
        start = (away if BACKWARD else chunks - 1 - away) * Q
        far = tl.cast(start, tl.int64)
        t = start + i
        inside = t < count
        local = tl.minimum(i, count - 1 - start)
        x = _tile(xp, far, sxl * UNIT, local, p, width, WHOLE)
        b = _tile(bp, far, sBl * UNIT, local, n, states, WHOLE)
        sums = tl.load(sums_ptr + tokens + t, mask=inside, other=0.0)
        rests = tl.load(rests_ptr + tokens + t, mask=inside, other=0.0)
        end = tl.minimum(start + Q, count) - 1
        total = tl.load(sums_ptr + tokens + end)
        rest = tl.load(rests_ptr + tokens + end)
        ok = inside
        if VALID:
            ok = tl.load(vp + (far + local) * svl) != 0
        x, b = _shown(x, ok, VALID, WIDE), _shown(b, ok, VALID, WIDE)
        if BACKWARD:
            weight = tl.where(inside, tl.exp2(sums + rests + since), 0.0)
        else:
            delta = tl.load(effective_ptr + tokens + t, mask=inside, other=0.0)
            weight = delta * tl.exp2((total - sums) + (rest - rests) + since)
        written = tl.trans(x).to(tl.float32) * weight[None, :]
        state = times_narrow(written, b, state, 3, PRECISE)
        since += total + rest
    state += poison
    at = (place * heads + head) * width * states
    tl.store(
        local_ptr + at + p[:, None].to(tl.int64) * states + n[None, :], state,
        mask=(p < width)[:, None] & (n < states)[None, :],
    )  # fmt: skip
    tl.store(kept_ptr + place * heads + head, tl.exp2(behind))


@_kernel
def outputs(
    x_ptr, B_ptr, C_ptr, D_ptr, valid_ptr, initial_ptr, table_ptr,
    effective_ptr, sums_ptr, rests_ptr, local_ptr, kept_ptr, y_ptr, final_ptr,
    length, segment, slots, heads, width, states, share,
    sxb, sxl, sxh, sBb, sBl, sBg, sCb, sCl, sCg, svb, svl,
    HAS_D: tl.constexpr, HAS_INITIAL: tl.constexpr, VALID: tl.constexpr, VARLEN: tl.constexpr,
    WIDE: tl.constexpr, EXACT: tl.constexpr, PRECISE: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The y of a segment of a head; the last segment of a sequence leaves the final state."""
    blocks = tl.cdiv(width, BP)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    p = (tl.program_id(0) % blocks) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    sequence, begin, count, number, last, place = _bounds(
        table_ptr, row, tl.program_id(1), slots, length, segment, VARLEN
    )
    if sequence < 0:
        return
    within = (p < width)[:, None] & (n < states)[None, :]
    tile = p[:, None].to(tl.int64) * states + n[None, :]
    state = tl.zeros((BP, BN), tl.float32)
    if HAS_INITIAL:
        at = (sequence * heads + head) * width * states
        state = tl.load(initial_ptr + at + tile, mask=within, other=0.0)
    for before in range(number):
        at = (place - number + before) * heads + head
        local = tl.load(local_ptr + at * width * states + tile, mask=within, other=0.0)
        state = state * tl.load(kept_ptr + at) + local
    if last:
        at = place * heads + head
        local = tl.load(local_ptr + at * width * states + tile, mask=within, other=0.0)
        at = (sequence * heads + head) * width * states
        local += state * tl.load(kept_ptr + place * heads + head)
        tl.store(final_ptr + at + tile, local, mask=within)

    skip = 0.0
    if HAS_D:
        skip = tl.load(D_ptr + head).to(tl.float32)
    i = tl.arange(0, Q)
    tokens = (row * heads + head) * length + begin
    xp = x_ptr + row * (sxb * UNIT) + head * (sxh * UNIT) + begin * (sxl * UNIT)
    bp = B_ptr + row * (sBb * UNIT) + (head // share) * (sBg * UNIT) + begin * (sBl * UNIT)
    cp = C_ptr + row * (sCb * UNIT) + (head // share) * (sCg * UNIT) + begin * (sCl * UNIT)
    vp = valid_ptr + row * svb + begin * svl
    yp = y_ptr + ((row * length + begin) * heads + head) * width
    for start in tl.range(0, count, Q, num_stages=STAGES):
        t = start + i
        inside = t < count
        far = tl.cast(start, tl.int64)
        local = tl.minimum(i, count - 1 - start)
        x = _tile(xp, far, sxl * UNIT, local, p, width, WHOLE)
        b = _tile(bp, far, sBl * UNIT, local, n, states, WHOLE)
        c = _tile(cp, far, sCl * UNIT, local, n, states, WHOLE)
        delta = tl.load(effective_ptr + tokens + t, mask=inside, other=0.0)
        sums = tl.load(sums_ptr + tokens + t, mask=inside, other=0.0)
        end = tl.minimum(start + Q, count) - 1
        total = tl.load(sums_ptr + tokens + end)
        ok = inside
        if VALID:
            ok = tl.load(vp + (far + local) * svl) != 0
        x, b = _shown(x, ok, VALID, WIDE), _shown(b, ok, VALID, WIDE)
        c = _shown(c, ok, VALID, WIDE)

        # Rows are tokens that are read, columns tokens that read.
        weight = tl.dot(b, tl.trans(c), input_precision=PRECISE)
        # The product with 0 has the layout of the other products: nothing moves between lanes.
        log = (weight * 0.0 + sums[None, :]) - sums[:, None]
        rests = sums
        if EXACT:
            rests = tl.load(rests_ptr + tokens + t, mask=inside, other=0.0)
            log = (log + rests[None, :]) - rests[:, None]
        weight = weight * tl.exp2(log) * delta[:, None]
        weight = tl.where(i[:, None] <= i[None, :], weight, 0.0)
        y = tl.dot(c, tl.trans(state.to(c.dtype)), input_precision=PRECISE)
        y = y * tl.exp2(sums)[:, None]
        y = tl.dot(tl.trans(weight.to(x.dtype)), x, y, input_precision=PRECISE)
        y += x.to(tl.float32) * skip
        if VALID:
            y = tl.where(ok[:, None], y, 0.0)
        stored = inside[:, None]
        if not WHOLE:
            stored = stored & (p < width)[None, :]
        tl.store(
            yp + far * (heads * width) + (i[:, None] * (heads * width) + p[None, :]),
            y.to(y_ptr.dtype.element_ty), mask=stored,
        )  # fmt: skip

        ahead = total - sums
        if EXACT:
            ahead += tl.load(rests_ptr + tokens + end) - rests
        written = tl.trans(x).to(tl.float32) * (delta * tl.exp2(ahead))[None, :]
        state = state * tl.exp2(total)
        state = tl.dot(written.to(b.dtype), b, state, input_precision=PRECISE)


@_kernel
def pass_states(
    local_ptr, kept_ptr, edge_ptr, last_ptr, first_ptr, slots, heads, size,
    HAS_EDGE: tl.constexpr, VARLEN: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What each segment adds becomes the state in front of it; backward, the gradient behind it."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    if VARLEN:
        first = tl.load(first_ptr + sequence)
        count = (tl.load(first_ptr + sequence + 1) - first).to(tl.int32)
    else:
        first = sequence * slots
        count = slots
    edge = (sequence * heads + head) * size + e
    state = tl.zeros((BLOCK,), tl.float32)
    if HAS_EDGE:
        state = tl.load(edge_ptr + edge, mask=e < size, other=0.0)
    for number in range(count):
        at = (first + ((count - 1 - number) if BACKWARD else number)) * heads + head
        local = tl.load(local_ptr + at * size + e, mask=e < size, other=0.0)
        tl.store(local_ptr + at * size + e, state, mask=e < size)
        state = state * tl.load(kept_ptr + at) + local
    tl.store(last_ptr + edge, state, mask=e < size)
