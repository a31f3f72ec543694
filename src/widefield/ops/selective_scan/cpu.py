"""The selective scan on the CPU: one pass over the tokens, nothing of size (L, D, N).

A task is a strip of channels of one row. It walks along the sequence in chunks of tokens that stay
in the cache: first it makes the Δ of a chunk, then it advances the states, reads y out of them,
adds the skip and gates it.

Whether a token is frozen (Δ < floor) is decided as the reference decides it, to the last bit: our
softplus and torch's may differ in the last place, so where some Δ lies that close to its floor, the
task stops, and goes on with decisions that torch has made for that chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    any_lane,
    arguments,
    exp_product,
    fma,
    full,
    inlined,
    load,
    load_flag,
    load_int,
    load_one,
    load_some,
    next_task,
    prefetch,
    scratch,
    silu,
    softplus,
    store,
    store_int,
    store_some,
    where,
)
from widefield.ops.selective_scan._packed import by_sequence
from widefield.plan import LayerPlan, ScanInputs

STRIP = 64  # channels of one task: four cache lines of each token
CHUNK = 64  # tokens
SEGMENT = 1024  # tokens that are widened at once where the inputs are not float32
_REGISTER = WIDTH * BYTES
_LOG2E = 1 / math.log(2)
_SMALL = 1 << 20  # items of a Δ that is cheap to compute whole


@inlined
def _make_steps(steps, delta, stride, constants, tokens, channels, apply_softplus, frozen):
    """Δ of a chunk as [block][token][lane], 0 where frozen. True if one is too near its floor.

    `frozen` is 0 or the address of decisions that have been made, laid out alike, 1 for frozen.
    """
    near = False
    for block in range(0, channels, WIDTH):
        here = constants + 3 * block * BYTES
        bias, scale, floor = load(here), load(here + _REGISTER), load(here + 2 * _REGISTER)
        margin = where(full(0.0) < floor, fma(floor, full(6e-7), full(1e-37)), full(-1.0))
        ahead = _REGISTER
        if block + WIDTH >= channels:
            ahead = (CHUNK * stride - block) * BYTES
        for t in range(tokens):
            here = delta + (t * stride + block) * BYTES
            prefetch(here + ahead)
            value = load_some(here, channels - block) + bias
            if apply_softplus:
                value = softplus(value)
            value = value * scale
            here = (block * tokens + t * WIDTH) * BYTES
            if frozen != 0:
                value = where(full(0.5) < load(frozen + here), full(0.0), value)
            else:
                near |= any_lane(absolute(value - floor) <= margin)
                value = where(value < floor, full(0.0), value)
            store(steps + here, value)
    return near


@inlined
def _advance(
    y, y_stride, state, steps, x, x_stride, z, z_stride, B, B_stride, C, C_stride,
    rates, skip, valid, tokens, channels, size,
):  # fmt: skip
    """Read a chunk into the states [block][n][lane], in place, and write its y.

    An address of 0 stands for no z, or for all tokens valid.
    """
    for block in range(0, channels, WIDTH):
        count = channels - block
        D = load(skip + block * BYTES)
        h = state + block * size * BYTES
        rate = rates + 2 * block * size * BYTES
        ahead = WIDTH
        last = block + WIDTH >= channels
        for t in range(tokens):
            out = y + (t * y_stride + block) * BYTES
            here = x + (t * x_stride + block) * BYTES
            gate = z + (t * z_stride + block) * BYTES
            prefetch(out + (CHUNK * y_stride - block if last else ahead) * BYTES)
            prefetch(here + (CHUNK * x_stride - block if last else ahead) * BYTES)
            if valid != 0 and not load_flag(valid + t):
                store_some(out, full(0.0), count)
                continue
            delta = load(steps + (block * tokens + t * WIDTH) * BYTES)
            token = load_some(here, count)
            written = delta * token
            a = b = c = d = full(0.0)  # four partial sums in turn: fewer roundings in a row
            for n in range(size):
                at = n * _REGISTER
                decay = exp_product(delta, load(rate + 2 * at), load(rate + 2 * at + _REGISTER))
                new = written * load_one(B + (t * B_stride + n) * BYTES)
                new = fma(decay, load(h + at), new)
                store(h + at, new)
                a, b, c, d = b, c, d, fma(new, load_one(C + (t * C_stride + n) * BYTES), a)
            total = fma(D, token, (a + c) + (b + d))
            if z != 0:
                prefetch(gate + (CHUNK * z_stride - block if last else ahead) * BYTES)
                total = total * silu(load_some(gate, count))
            store_some(out, total, count)


@inlined
def _walk(
    task, strips, length, channels, size, apply_softplus, progress, decisions,
    y, y_row, y_stride, x, x_row, x_stride, z, z_row, z_stride, delta, delta_row, delta_stride,
    B, B_row, B_stride, C, C_row, C_stride, valid, valid_row,
    state, state_row, rates, rates_row, constants, constants_row, skip,
):  # fmt: skip
    """Take one strip of one row from where it stands to the end, or to a chunk too near a floor."""
    row, first = task // strips, task % strips * STRIP
    channels = min(STRIP, channels - first)
    steps = scratch(4096)
    start = load_int(progress + 8 * task)
    frozen = load_int(decisions + 8 * task)
    at = first * BYTES
    while start < length:
        tokens = min(CHUNK, length - start)
        near = _make_steps(
            steps,
            delta + (row * delta_row + start * delta_stride) * BYTES + at,
            delta_stride,
            constants + row * constants_row * BYTES + 3 * at,
            tokens,
            channels,
            apply_softplus != 0,
            frozen,
        )
        if near:
            break
        _advance(
            y + (row * y_row + start * y_stride) * BYTES + at,
            y_stride,
            state + row * state_row * BYTES + size * at,
            steps,
            x + (row * x_row + start * x_stride) * BYTES + at,
            x_stride,
            z + (row * z_row + start * z_stride) * BYTES + at if z != 0 else 0,
            z_stride,
            B + (row * B_row + start * B_stride) * BYTES,
            B_stride,
            C + (row * C_row + start * C_stride) * BYTES,
            C_stride,
            rates + row * rates_row * BYTES + 2 * size * at,
            skip + at,
            valid + row * valid_row + start if valid != 0 else 0,
            tokens,
            channels,
            size,
        )
        start += tokens
        frozen = 0
    store_int(progress + 8 * task, start)


@Kernel
def _scan(call):
    while True:
        task = next_task(call)
        if task < 0:
            return
        _walk(task, *arguments(call, 34))


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan | None = None
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "sequences channels state"]]:
    """Selective scan with the signature and the semantics of the reference.

    Args:
        inputs: what the scan reads, in float32, bfloat16 or float16; float32 is not copied.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32.

    Raises:
        WidefieldError: if `cu_seqlens` does not fit to the other inputs.
    """
    if inputs.cu_seqlens is not None:
        return by_sequence(selective_scan, inputs, plan)
    with torch.no_grad():
        run = _Run.prepare(inputs, plan or LayerPlan())
        large = (inputs.x, inputs.delta, inputs.z)
        if all(t is None or t.dtype == torch.float32 for t in large):
            run.segment(0, run.y)
        else:
            for start in range(0, inputs.x.shape[1], SEGMENT):
                y = torch.empty(run.y[:, start : start + SEGMENT].shape)
                run.segment(start, y)
                run.y[:, start : start + SEGMENT] = y
        state = _from_lanes(run.state, inputs.x.shape[2]).transpose(1, 2).contiguous()
    return run.y, state


@dataclass
class _Run:
    """One call: its tensors as the kernel reads them, and the results that it fills."""

    inputs: ScanInputs  # last dimensions dense; B and C float32
    plan: LayerPlan
    rates: Tensor  # (1 or B, blocks, 2 N, lane); see _split_rates
    constants: Tensor  # (1 or B, blocks, 3, lane): Δ's bias, scale and floor
    skip: Tensor  # (1, blocks, 1, lane)
    state: Tensor  # (B, blocks, N, lane)
    y: Tensor
    torch_delta: Tensor | None = None  # the reference's Δ before the floor, if it was needed

    @staticmethod
    def prepare(inputs: ScanInputs, plan: LayerPlan) -> _Run:
        """Lay out what is small; copy what is large only if its last dimension is strided."""
        batch, _, channels = inputs.x.shape
        A = inputs.A.float()[None]
        if plan.decay_scale is not None:
            A = A * _rows(plan.decay_scale)[..., None]
        state = inputs.initial_state
        if state is None:
            state = A.new_zeros(batch, channels, A.shape[-1])
        zeros = A.new_zeros(1, channels)
        bias = zeros if inputs.delta_bias is None else inputs.delta_bias.float()[None]
        scale = zeros + 1 if plan.delta_scale is None else _rows(plan.delta_scale)
        floor = zeros - math.inf if plan.delta_floor is None else _rows(plan.delta_floor)
        constants = torch.stack(torch.broadcast_tensors(bias, scale, floor), dim=1)
        skip = zeros if inputs.D is None else inputs.D.float()[None]
        return _Run(
            inputs=inputs.replace(
                x=_dense(inputs.x),
                delta=_dense(inputs.delta),
                B=_dense(inputs.B.float()),
                C=_dense(inputs.C.float()),
                z=None if inputs.z is None else _dense(inputs.z),
                valid=None if inputs.valid is None else inputs.valid.contiguous(),
            ),
            plan=plan,
            rates=_to_lanes(_split_rates(A)),
            constants=_to_lanes(constants),
            skip=_to_lanes(skip[:, None]),
            state=_to_lanes(state.float().transpose(1, 2)),
            y=torch.empty(inputs.x.shape, dtype=inputs.x.dtype),
        )

    def segment(self, first: int, y: Float[Tensor, "batch length channels"]) -> None:
        """Scan as many tokens from `first` on as `y` has, and write them to it."""
        batch, length, channels = y.shape
        strips = -(-channels // STRIP)
        part = slice(first, first + length)
        inputs, valid = self.inputs, self.inputs.valid
        # These names keep widened copies alive while the kernel reads them.
        x, delta = inputs.x[:, part].float(), inputs.delta[:, part].float()
        z = None if inputs.z is None else inputs.z[:, part].float()
        progress = torch.zeros(batch * strips, dtype=torch.int64)
        decisions = torch.zeros_like(progress)
        arguments = (
            *(strips, length, channels, self.state.shape[2], inputs.delta_softplus),
            *(progress.data_ptr(), decisions.data_ptr()),
            *(*_address(y), *_address(x), *_address(z), *_address(delta)),
            *(*_address(inputs.B[:, part]), *_address(inputs.C[:, part])),
            *_address(None if valid is None else valid[:, part])[:2],
            *(*_address(self.state)[:2], *_address(self.rates)[:2]),
            *(*_address(self.constants)[:2], self.skip.data_ptr()),
        )
        while True:
            _scan(batch * strips, *arguments)
            stopped = [(task, at) for task, at in enumerate(progress.tolist()) if at < length]
            if not stopped:
                return
            made = [
                self._decide(*divmod(task, strips), first + at, part.stop) for task, at in stopped
            ]
            decisions.zero_()
            for (task, _), frozen in zip(stopped, made, strict=True):
                decisions[task] = frozen.data_ptr()

    def _decide(
        self, row: int, strip: int, start: int, end: int
    ) -> Float[Tensor, "1 blocks tokens lane"]:
        """Which tokens of the chunk at `start` the reference freezes, 1 for frozen."""
        floor = self.plan.delta_floor
        assert floor is not None
        tokens = slice(start, min(start + CHUNK, end))
        channels = slice(strip * STRIP, (strip + 1) * STRIP)
        frozen = self._torch_delta(row, tokens, channels) < _row(floor, row)[channels]
        return _to_lanes(frozen.float()[None])

    def _torch_delta(
        self, row: int, tokens: slice, channels: slice
    ) -> Float[Tensor, "tokens channels"]:
        """The reference's Δ before the floor.

        torch's own result for the last few items of a tensor may differ in the last place, so a
        small tensor is computed whole, and a piece of a large one is never the end of its tensor.
        """
        inputs, scale = self.inputs, self.plan.delta_scale
        if inputs.delta.numel() <= _SMALL:
            if self.torch_delta is None:
                unmasked = inputs.replace(valid=None)
                self.torch_delta = effective_delta(unmasked, LayerPlan(delta_scale=scale))
            return self.torch_delta[row, tokens, channels]
        delta = inputs.delta[row, tokens, channels].float()
        if inputs.delta_bias is not None:
            delta = delta + inputs.delta_bias[channels].float()
        if inputs.delta_softplus:
            shape, more = delta.shape, -delta.numel() % 64
            delta = F.softplus(F.pad(delta.flatten(), (0, more)))[: shape.numel()].view(shape)
        return delta if scale is None else delta * _row(scale, row)[channels]


def _rows(values: Tensor) -> Float[Tensor, "rows channels"]:
    """(D,) as (1, D); (B, D) as it is."""
    return values.float()[None] if values.ndim == 1 else values.float()


def _row(values: Tensor, row: int) -> Float[Tensor, " channels"]:
    """One row's values of (D,) or (B, D)."""
    return values.float() if values.ndim == 1 else values[row].float()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _address(tensor: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of rows and tokens; a single row serves them all; zeros for None."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), 0 if len(tensor) == 1 else tensor.stride(0), tensor.stride(1)


def _split_rates(
    A: Float[Tensor, "rows channels state"],
) -> Float[Tensor, "rows twice_state channels"]:
    """For each n, A · log2(e) in float32, and then what the rounding left over."""
    exact = A.double().transpose(1, 2) * _LOG2E
    high = exact.float()
    low = torch.nan_to_num((exact - high.double()).float(), nan=0.0)  # A = -inf leaves nothing
    return torch.stack([high, low], dim=2).flatten(1, 2)


def _to_lanes(
    values: Float[Tensor, "rows items channels"],
) -> Float[Tensor, "rows blocks items lane"]:
    """Channels in blocks of lanes, the last one filled up with zeros."""
    padded = F.pad(values, (0, -values.shape[-1] % WIDTH))
    return padded.unflatten(-1, (-1, WIDTH)).transpose(1, 2).contiguous()


def _from_lanes(
    values: Float[Tensor, "rows blocks items lane"], channels: int
) -> Float[Tensor, "rows items channels"]:
    """The inverse of `_to_lanes`."""
    return values.transpose(1, 2).flatten(2)[..., :channels]
