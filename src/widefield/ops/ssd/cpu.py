"""The scan of Mamba-2 on the CPU: chunks of tokens as small matrix products, nothing of size L · T.

Within a chunk, y_i = decay(0..i) · S C_i + Σ_{j ≤ i} (C_i · B_j) decay(j..i) Δ_j x_j, with S the
state before the chunk, and then S = decay(0..T) · S + Σ_j decay(j..T) Δ_j x_j ⊗ B_j. torch makes
the products C_i · B_j, which all heads of a group share, for a segment of chunks at a time. The
rest is one kernel; its task is a strip of one head's channels, and it walks along the segment with
its state in the cache. Decays are powers of two of differences of float64 sums, kept as the sum of
two float32 numbers: no digit is lost to the length of the sum.

Δ is torch's own, so that a token is frozen (Δ < floor) exactly where the reference freezes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numba
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from widefield.ops._delta import effective_delta
from widefield.ops._numba import (
    BYTES,
    WIDTH,
    Kernel,
    absolute,
    arguments,
    exp_product,
    fma,
    full,
    inlined,
    load,
    load_number,
    load_one,
    load_some,
    next_task,
    scratch,
    store,
    store_number,
    store_some,
    where,
)
from widefield.ops.ssd._sequences import by_sequence
from widefield.plan import LayerPlan, SSDInputs

CHUNK = 64  # tokens
STRIP = 64  # channels of one task
SEGMENT = 1024  # tokens between two calls of the kernel
_ROWS = 4  # of a tile, which is two registers wide
_GROUP = 16  # products that are summed before they are added to others
_REGISTER = WIDTH * BYTES
_PRODUCTS = CHUNK * CHUNK * BYTES
_LOG2E = 1 / math.log(2)
_LEAST = -1500.0  # log2 of a decay that leaves nothing, even of the largest float32


@inlined
def _sum_decays(sums, delta, stride, rate, tokens):
    """log2 of the decay from the chunk's start up to each token, and from it to the chunk's end.

    Four rows of a chunk's length: the first sum and what float32 leaves of it, then the second.
    """
    rate = numba.float64(load_number(rate)) * _LOG2E
    total = 0.0
    for t in range(tokens):
        step = numba.float64(load_number(delta + t * stride * BYTES)) * rate
        total += _LEAST if step < _LEAST else step
    so_far = 0.0
    for t in range(tokens):
        step = numba.float64(load_number(delta + t * stride * BYTES)) * rate
        so_far += _LEAST if step < _LEAST else step
        at = sums + t * BYTES
        _store_split(at, so_far)
        _store_split(at + 2 * CHUNK * BYTES, total - so_far)


@inlined
def _store_split(address, value):
    """A float64 as two float32 numbers, a chunk's length apart."""
    high = numba.float32(value)
    store_number(address, high)
    store_number(address + CHUNK * BYTES, value - numba.float64(high))


@inlined
def _power(high, low):
    """2^(high + low)."""
    return exp_product(full(1.0), high, low)


@inlined
def _flushed(value):
    """Without subnormal numbers, which make the products that read them ten times as slow."""
    return where(absolute(value) < full(2.0**-126), full(0.0), value)


@inlined
def _weigh(weights, products, sums, tokens):
    """(C_i · B_j) · decay(j..i) for each pair of tokens of a chunk; meaningless for j > i."""
    rest = sums + CHUNK * BYTES
    for i in range(tokens):
        high, low = load_one(sums + i * BYTES), load_one(rest + i * BYTES)
        for j in range(0, i + 1, WIDTH):
            other = load(sums + j * BYTES)
            difference = high - other
            back = difference - high
            lost = (high - (difference - back)) - (other + back)
            lost = lost + (low - load(rest + j * BYTES))
            at = (i * CHUNK + j) * BYTES
            store(weights + at, _flushed(_power(difference, lost) * load(products + at)))


@inlined
def _write(written, kept, decays, delta, delta_stride, x, x_stride, tokens, count):
    """Δ_j x_j of a chunk, and what of it is left at the chunk's end; zeros beyond the channels."""
    for t in range(tokens):
        step = load_one(delta + t * delta_stride * BYTES)
        decay = load_one(decays + t * BYTES)
        for p in range(0, STRIP, WIDTH):
            at = (t * STRIP + p) * BYTES
            new = full(0.0)
            if p < count:
                new = _flushed(step * load_some(x + (t * x_stride + p) * BYTES, count - p))
            store(written + at, new)
            store(kept + at, _flushed(decay * new))


@inlined
def _zeros():
    """The sums of a tile."""
    zero = full(0.0)
    return zero, zero, zero, zero, zero, zero, zero, zero


@inlined
def _accumulate(sums, first, second, third, fourth, row):
    """Add the product of the numbers at four addresses and a row of a tile's width."""
    a, b, c, d, e, f, g, h = sums
    left, right = load(row), load(row + _REGISTER)
    one, two, three, four = load_one(first), load_one(second), load_one(third), load_one(fourth)
    return (
        fma(one, left, a),
        fma(one, right, b),
        fma(two, left, c),
        fma(two, right, d),
        fma(three, left, e),
        fma(three, right, f),
        fma(four, left, g),
        fma(four, right, h),
    )


@inlined
def _product(sums, first, second, third, fourth, step, rows, count):
    """Add the product of four rows, whose items are `step` bytes apart, and `count` rows of a tile.

    The last items come first: they have decayed least, and a sum that starts with subnormal
    numbers is slow. In groups, so that few roundings of a large sum follow each other.
    """
    for stop in range(count, 0, -_GROUP):
        group = _zeros()
        for k in range(stop - 1, max(stop - _GROUP, 0) - 1, -1):
            at = k * step
            row = rows + k * STRIP * BYTES
            group = _accumulate(group, first + at, second + at, third + at, fourth + at, row)
        sums = _add(sums, group)
    return sums


@inlined
def _add(x, y):
    """The sum of two tiles."""
    a, b, c, d, e, f, g, h = x
    i, j, k, m, n, o, p, q = y
    return a + i, b + j, c + k, d + m, e + n, f + o, g + p, h + q


@inlined
def _scale(sums, first, second, third, fourth):
    """Multiply each row of a tile by the number at its address."""
    a, b, c, d, e, f, g, h = sums
    one, two, three, four = load_one(first), load_one(second), load_one(third), load_one(fourth)
    return (
        _flushed(one * a),
        _flushed(one * b),
        _flushed(two * c),
        _flushed(two * d),
        _flushed(three * e),
        _flushed(three * f),
        _flushed(four * g),
        _flushed(four * h),
    )


@inlined
def _emit(y, x, skip, left, right, count):
    """Add the skip to one row of a tile, and write as much of it as there are channels."""
    store_some(y, fma(skip, load_some(x, count), left), count)
    if count > WIDTH:
        count, y, x = count - WIDTH, y + _REGISTER, x + _REGISTER
        store_some(y, fma(skip, load_some(x, count), right), count)


@inlined
def _read_later(sums, i, tokens, first, second, third, rows):
    """Add what the second to fourth of four tokens read of each other and of themselves.

    Apart from the rest, so that no token reads a later one, whatever that holds.
    """
    a, b, c, d, e, f, g, h = sums
    for j in range(i + 1, min(i + _ROWS, tokens)):
        row, at = rows + j * STRIP * BYTES, j * BYTES
        left, right = load(row), load(row + _REGISTER)
        if j == i + 1:
            weight = load_one(first + at)
            c, d = fma(weight, left, c), fma(weight, right, d)
        if j <= i + 2:
            weight = load_one(second + at)
            e, f = fma(weight, left, e), fma(weight, right, f)
        weight = load_one(third + at)
        g, h = fma(weight, left, g), fma(weight, right, h)
    return a, b, c, d, e, f, g, h


@inlined
def _read_rows(
    i, y, y_stride, x, x_stride, skip, C, C_stride, state, weights, written, decays,
    tokens, count, size,
):  # fmt: skip
    """Outputs of four tokens of a chunk, in a tile's width of channels.

    A token beyond the last is computed as the last one, and not written.
    """
    last = tokens - 1
    j, k, m = min(i + 1, last), min(i + 2, last), min(i + 3, last)
    row = C_stride * BYTES
    sums = _product(
        _zeros(), C + i * row, C + j * row, C + k * row, C + m * row, BYTES, state, size
    )
    sums = _scale(
        sums, decays + i * BYTES, decays + j * BYTES, decays + k * BYTES, decays + m * BYTES
    )
    row = CHUNK * BYTES
    first, second, third = weights + j * row, weights + k * row, weights + m * row
    sums = _read_later(sums, i, tokens, first, second, third, written)
    sums = _product(sums, weights + i * row, first, second, third, BYTES, written, i + 1)

    a, b, c, d, e, f, g, h = sums
    y_row, x_row = y_stride * BYTES, x_stride * BYTES
    _emit(y + i * y_row, x + i * x_row, skip, a, b, count)
    if i + 1 < tokens:
        _emit(y + j * y_row, x + j * x_row, skip, c, d, count)
    if i + 2 < tokens:
        _emit(y + k * y_row, x + k * x_row, skip, e, f, count)
    if i + 3 < tokens:
        _emit(y + m * y_row, x + m * x_row, skip, g, h, count)


@inlined
def _keep(row, keep, left, right):
    """Add to one row of the state what is new, after the decay of what was there."""
    store(row, _flushed(fma(keep, load(row), left)))
    store(row + _REGISTER, _flushed(fma(keep, load(row + _REGISTER), right)))


@inlined
def _update_rows(n, state, keep, B, B_stride, kept, tokens, size):
    """Four rows of the state after a chunk, in a tile's width of channels.

    The state has room for rows beyond the last, which come out as the last one.
    """
    last = size - 1
    first, second = B + n * BYTES, B + min(n + 1, last) * BYTES
    third, fourth = B + min(n + 2, last) * BYTES, B + min(n + 3, last) * BYTES
    sums = _product(_zeros(), first, second, third, fourth, B_stride * BYTES, kept, tokens)
    a, b, c, d, e, f, g, h = sums
    row, step = state + n * STRIP * BYTES, STRIP * BYTES
    _keep(row, keep, a, b)
    _keep(row + step, keep, c, d)
    _keep(row + 2 * step, keep, e, f)
    _keep(row + 3 * step, keep, g, h)


@inlined
def _chunk(
    y, y_stride, x, x_stride, delta, delta_stride, B, B_stride, C, C_stride, products, state,
    rate, skip, tokens, count, size, sums, decays, weights, written, kept,
):  # fmt: skip
    """Write y of a chunk, and advance the state [n][channel] over it. The last five are scratch."""
    _sum_decays(sums, delta, delta_stride, rate, tokens)
    for t in range(0, tokens, WIDTH):
        at = t * BYTES
        for half in range(2):
            pair = sums + 2 * half * CHUNK * BYTES + at
            decay = _power(load(pair), load(pair + CHUNK * BYTES))
            store(decays + half * CHUNK * BYTES + at, decay)
    _weigh(weights, products, sums, tokens)
    to_end = decays + CHUNK * BYTES
    _write(written, kept, to_end, delta, delta_stride, x, x_stride, tokens, count)
    for p in range(0, count, 2 * WIDTH):
        at = p * BYTES
        for i in range(0, tokens, _ROWS):
            _read_rows(
                i, y + at, y_stride, x + at, x_stride, skip, C, C_stride,
                state + at, weights, written + at, decays, tokens, count - p, size,
            )  # fmt: skip
        keep = load_one(decays + (tokens - 1) * BYTES)
        for n in range(0, size, _ROWS):
            _update_rows(n, state + at, keep, B, B_stride, kept + at, tokens, size)


@inlined
def _walk(
    task, heads, share, strips, length, width, size,
    y, y_row, y_stride, y_head, x, x_row, x_stride, x_head, delta, delta_row, delta_stride,
    B, B_row, B_stride, B_group, C, C_row, C_stride, C_group,
    products, products_row, products_token, state, state_unit, rates, rates_row, skip,
):  # fmt: skip
    """Take one strip of one head of one row through a segment."""
    row, unit = task // (heads * strips), task % (heads * strips)
    head, first = unit // strips, unit % strips * STRIP
    group = head // share
    sums, decays = scratch(256), scratch(128)
    weights, written, kept = scratch(4096), scratch(4096), scratch(4096)
    for start in range(0, length, CHUNK):
        _chunk(
            y + (row * y_row + start * y_stride + head * y_head + first) * BYTES,
            y_stride,
            x + (row * x_row + start * x_stride + head * x_head + first) * BYTES,
            x_stride,
            delta + (row * delta_row + start * delta_stride + head) * BYTES,
            delta_stride,
            B + (row * B_row + start * B_stride + group * B_group) * BYTES,
            B_stride,
            C + (row * C_row + start * C_stride + group * C_group) * BYTES,
            C_stride,
            products + (row * products_row + start * products_token) * BYTES + group * _PRODUCTS,
            state + task * state_unit * BYTES,
            rates + (row * rates_row + head) * BYTES,
            load_one(skip + head * BYTES),
            min(CHUNK, length - start),
            min(STRIP, width - first),
            size,
            sums,
            decays,
            weights,
            written,
            kept,
        )


@Kernel
def _scan(call):
    while True:
        task = next_task(call)
        if task < 0:
            return
        _walk(task, *arguments(call, 33))


def ssd(
    inputs: SSDInputs, plan: LayerPlan | None = None
) -> tuple[
    Float[Tensor, "batch length heads width"],
    Float[Tensor, "sequences heads width state"],
]:
    """The scan of Mamba-2 with the signature and the semantics of the reference.

    Args:
        inputs: what the scan reads, in float32, bfloat16 or float16; float32 is not copied.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    if inputs.cu_seqlens is not None:
        return by_sequence(ssd, inputs, plan)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        run = _Run.prepare(inputs, plan or LayerPlan())
        for start in range(0, inputs.x.shape[1], SEGMENT):
            run.segment(slice(start, start + SEGMENT))
        state = _from_strips(run.state, inputs.x.shape[-1], inputs.B.shape[-1])
    return run.y, state


@dataclass
class _Run:
    """One call: its tensors as the kernel reads them, and the results that it fills."""

    inputs: SSDInputs
    delta: Tensor  # (B, L, H) float32, as the scan uses it
    rates: Tensor  # (1 or B, H)
    skip: Tensor  # (H,)
    state: Tensor  # (B, H, strips, rows of tiles, STRIP); see _to_strips
    y: Tensor

    @staticmethod
    def prepare(inputs: SSDInputs, plan: LayerPlan) -> _Run:
        """Make Δ and lay out what is small; nothing large is copied here."""
        batch, _, heads, width = inputs.x.shape
        rates = inputs.A.float()
        if plan.decay_scale is not None:
            rates = rates * plan.decay_scale.float()
        state = inputs.initial_state
        if state is None:
            state = rates.new_zeros(batch, heads, width, inputs.B.shape[-1])
        skip = torch.zeros(heads) if inputs.D is None else inputs.D.float().contiguous()
        return _Run(
            inputs=inputs,
            delta=effective_delta(inputs, plan).contiguous(),
            rates=rates.reshape(-1, heads).contiguous(),
            skip=skip,
            state=_to_strips(state.float()),
            y=torch.empty(inputs.x.shape, dtype=inputs.x.dtype),
        )

    def segment(self, part: slice) -> None:
        """Scan some tokens and write their y."""
        inputs, y = self.inputs, self.y[:, part]
        valid = None if inputs.valid is None else inputs.valid[:, part, None, None]
        # These names keep copies alive while the kernel reads them.
        x, B, C = (_readable(t[:, part], valid) for t in (inputs.x, inputs.B, inputs.C))
        delta = self.delta[:, part]
        products = _products(B, C)
        out = y if y.dtype == torch.float32 else torch.empty(y.shape)
        batch, length, heads, width = x.shape
        strips, size = self.state.shape[2], B.shape[-1]
        _scan(
            batch * heads * strips,
            *(heads, heads // B.shape[2], strips, length, width, size),
            *(*_address(out), *_address(x), *_address(delta)[:3], *_address(B), *_address(C)),
            *(products.data_ptr(), products.stride(0), products.stride(1) // CHUNK),
            *(self.state.data_ptr(), self.state.stride(2)),
            *(*_address(self.rates)[:2], self.skip.data_ptr()),
        )
        if out is not y:
            y.copy_(out)
        if valid is not None:
            y.masked_fill_(~valid, 0.0)


def _readable(tensor: Tensor, valid: Tensor | None) -> Tensor:
    """As float32, zero where it is padding, with a dense last dimension."""
    wide = tensor.float()
    if valid is not None:
        wide = wide.masked_fill(~valid, 0.0)
    return wide if wide.stride(-1) == 1 or wide.shape[-1] == 1 else wide.contiguous()


def _products(
    B: Float[Tensor, "batch length groups state"], C: Float[Tensor, "batch length groups state"]
) -> Float[Tensor, "batch chunks groups chunk chunk"]:
    """C_i · B_j of the tokens of each chunk."""
    more = -B.shape[1] % CHUNK
    B, C = (
        F.pad(t, (0, 0, 0, 0, 0, more)).unflatten(1, (-1, CHUNK)).transpose(2, 3) for t in (B, C)
    )
    return torch.matmul(C.double(), B.double().transpose(-1, -2)).float()


def _address(tensor: Tensor) -> tuple[int, ...]:
    """Address and strides without the last; a single row serves them all."""
    row = 0 if len(tensor) == 1 else tensor.stride(0)
    return tensor.data_ptr(), row, *tensor.stride()[1:-1]


def _to_strips(
    state: Float[Tensor, "batch heads width state"],
) -> Float[Tensor, "batch heads strips rows strip"]:
    """Channels last in strips, rows of states; both filled up with zeros."""
    more = (0, -state.shape[-1] % _ROWS, 0, -state.shape[-2] % STRIP)
    strips = F.pad(state, more).unflatten(2, (-1, STRIP))
    return strips.transpose(-1, -2).contiguous()


def _from_strips(
    strips: Float[Tensor, "batch heads strips rows strip"], width: int, size: int
) -> Float[Tensor, "batch heads width state"]:
    """The inverse of `_to_strips`."""
    state = strips.transpose(-1, -2).flatten(2, 3)
    return state[:, :, :width, :size].contiguous()
