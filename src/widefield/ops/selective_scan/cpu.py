"""The selective scan on the CPU: one pass over the tokens, nothing of size (L, D, N).

A strip of channels walks along the sequence in chunks of tokens that stay in the cache. For every
chunk one kernel makes Δ and a second advances the states, reads y out of them, adds the skip and
gates it.

Whether a token is frozen (Δ < floor) is decided as the reference decides it, to the last bit: our
softplus and torch's may differ in the last place, so where some Δ lies that close to its floor, the
decisions of its chunk are torch's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from widefield.ops._numba import (
    BYTES,
    WIDTH,
    absolute,
    any_lane,
    exp_product,
    fma,
    full,
    in_parallel,
    kernel,
    load,
    load_flag,
    load_one,
    load_some,
    prefetch,
    silu,
    softplus,
    store,
    store_some,
    where,
)
from widefield.ops.selective_scan.reference import effective_delta
from widefield.plan import LayerPlan, ScanInputs

STRIP = 64  # channels of one task: four cache lines of each token
CHUNK = 512  # tokens
AHEAD = 16  # tokens between a prefetch and its use
_REGISTER = WIDTH * BYTES
_LOG2E = 1 / math.log(2)
_SMALL = 1 << 20  # items of a Δ that is cheap to compute whole


@kernel
def _make_steps(steps, delta, delta_stride, constants, tokens, channels, apply_softplus):
    """Δ of a chunk as [block][token][lane], 0 where frozen. True if one is too near its floor."""
    close = False
    for block in range(0, channels, WIDTH):
        here = constants + 3 * block * BYTES
        bias, scale, floor = load(here), load(here + _REGISTER), load(here + 2 * _REGISTER)
        margin = where(full(0.0) < floor, fma(floor, full(6e-7), full(1e-37)), full(-1.0))
        for t in range(tokens):
            here = delta + (t * delta_stride + block) * BYTES
            prefetch(here + AHEAD * delta_stride * BYTES)
            value = load_some(here, channels - block) + bias
            if apply_softplus:
                value = softplus(value)
            value = value * scale
            close |= any_lane(absolute(value - floor) <= margin)
            value = where(value < floor, full(0.0), value)
            store(steps + (block * tokens + t * WIDTH) * BYTES, value)
    return close


@kernel
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
        for t in range(tokens):
            out = y + (t * y_stride + block) * BYTES
            prefetch(out + AHEAD * y_stride * BYTES)
            prefetch(x + ((t + AHEAD) * x_stride + block) * BYTES)
            if valid != 0 and not load_flag(valid + t):
                store_some(out, full(0.0), count)
                continue
            delta = load(steps + (block * tokens + t * WIDTH) * BYTES)
            token = load_some(x + (t * x_stride + block) * BYTES, count)
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
                gate = z + (t * z_stride + block) * BYTES
                prefetch(gate + AHEAD * z_stride * BYTES)
                total = total * silu(load_some(gate, count))
            store_some(out, total, count)


def selective_scan(
    inputs: ScanInputs, plan: LayerPlan | None = None
) -> tuple[Float[Tensor, "batch length channels"], Float[Tensor, "batch channels state"]]:
    """Selective scan with the signature and the semantics of the reference.

    Args:
        inputs: what the scan reads, in float32, bfloat16 or float16; float32 is not copied.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    batch, _, channels = inputs.x.shape
    with torch.no_grad():
        scan = _Scan.prepare(inputs, plan or LayerPlan())
        in_parallel(scan.run, [(b, c) for b in range(batch) for c in range(0, channels, STRIP)])
        return scan.y, _from_lanes(scan.state, channels).transpose(1, 2).contiguous()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Some tokens of some channels of one row."""

    row: int
    start: int
    tokens: int
    first: int
    channels: int

    def part(self, tensor: Tensor) -> Tensor:
        """This chunk of a (B, L, D) tensor."""
        tokens = slice(self.start, self.start + self.tokens)
        return tensor[self.row, tokens, self.first : self.first + self.channels]

    def of_row(self, values: Tensor) -> Tensor:
        """This row's and strip's channels of (1 or B, D) values."""
        return values[self.row if len(values) > 1 else 0, self.first : self.first + self.channels]

    def address(self, tensor: Tensor, first: int | None = None) -> tuple[int, int]:
        """Where this chunk of a float32 (B, L, D) tensor begins, and the stride of its tokens."""
        row, token, _ = tensor.stride()
        offset = self.row * row + self.start * token + (self.first if first is None else first)
        return tensor.data_ptr() + offset * BYTES, token

    def read(self, tensor: Tensor) -> tuple[int, int, Tensor]:
        """The same for any dtype, and what must stay alive meanwhile: narrow dtypes are widened."""
        if tensor.dtype == torch.float32:
            return *self.address(tensor), tensor
        wide = self.part(tensor).float()
        return wide.data_ptr(), wide.stride(0), wide

    def lanes(self, tensor: Tensor) -> int:
        """Where this row's and strip's blocks begin in a dense (1 or B, blocks, K, lane) tensor."""
        row = self.row if len(tensor) > 1 else 0
        offset = row * tensor.stride(0) + self.first // WIDTH * tensor.stride(1)
        return tensor.data_ptr() + offset * BYTES


@dataclass
class _Scan:
    """One call: its tensors as the kernels read them, and the results that they fill."""

    inputs: ScanInputs  # last dimensions dense; B and C float32
    plan: LayerPlan
    rates: Tensor  # (1 or B, blocks, 2 N, lane); see _split_rates
    constants: Tensor  # (1 or B, blocks, 3, lane): Δ's bias, scale and floor
    skip: Tensor  # (1, blocks, 1, lane)
    state: Tensor  # (B, blocks, N, lane)
    y: Tensor
    torch_delta: Tensor | None = None  # the reference's Δ before the floor, if it was needed

    @staticmethod
    def prepare(inputs: ScanInputs, plan: LayerPlan) -> _Scan:
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
        return _Scan(
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

    def run(self, task: tuple[int, int]) -> None:
        """Walk one strip of channels of one row along the whole sequence."""
        row, first = task
        _, length, channels = self.y.shape
        channels = min(STRIP, channels - first)
        steps = torch.empty(STRIP * min(CHUNK, length))
        for start in range(0, length, CHUNK):
            at = _Chunk(row, start, min(CHUNK, length - start), first, channels)
            self._steps(at, steps)
            self._advance(at, steps)

    def _steps(self, at: _Chunk, steps: Tensor) -> None:
        delta, stride, _alive = at.read(self.inputs.delta)
        shape = at.tokens, at.channels, self.inputs.delta_softplus
        if not _make_steps(steps.data_ptr(), delta, stride, at.lanes(self.constants), *shape):
            return
        open_floor = self.constants.clone()
        open_floor[:, :, 2] = -math.inf
        _make_steps(steps.data_ptr(), delta, stride, at.lanes(open_floor), *shape)
        frozen = _to_lanes(self._frozen(at).float()[None])[0]
        steps[: frozen.numel()].view(frozen.shape).masked_fill_(frozen.bool(), 0.0)

    def _advance(self, at: _Chunk, steps: Tensor) -> None:
        inputs, size = self.inputs, self.state.shape[2]
        x, x_stride, _x = at.read(inputs.x)
        z, z_stride, _z = (0, 0, None) if inputs.z is None else at.read(inputs.z)
        valid = inputs.valid
        wide = self.y.dtype == torch.float32
        y = self.y if wide else torch.empty(1, at.tokens, at.channels)
        _advance(
            *(at.address(y) if wide else (y.data_ptr(), at.channels)),
            at.lanes(self.state),
            steps.data_ptr(),
            *(x, x_stride, z, z_stride),
            *at.address(inputs.B, first=0),
            *at.address(inputs.C, first=0),
            at.lanes(self.rates),
            at.lanes(self.skip),
            0 if valid is None else valid.data_ptr() + at.row * valid.stride(0) + at.start,
            *(at.tokens, at.channels, size),
        )
        if not wide:
            at.part(self.y).copy_(y[0])

    def _frozen(self, at: _Chunk) -> Bool[Tensor, "tokens channels"]:
        """Which Δ of a chunk the reference finds below their floor."""
        floor = self.plan.delta_floor
        assert floor is not None
        return self._torch_delta(at) < at.of_row(_rows(floor))

    def _torch_delta(self, at: _Chunk) -> Float[Tensor, "tokens channels"]:
        """The reference's Δ before the floor.

        torch's own result for the last few items of a tensor may differ in the last place, so a
        small tensor is computed whole, and a piece of a large one is never the end of its tensor.
        """
        inputs, scale = self.inputs, self.plan.delta_scale
        if inputs.delta.numel() <= _SMALL:
            if self.torch_delta is None:
                unmasked = inputs.replace(valid=None)
                self.torch_delta = effective_delta(unmasked, LayerPlan(delta_scale=scale))
            return at.part(self.torch_delta)
        strip = slice(at.first, at.first + at.channels)
        delta = at.part(inputs.delta).float()
        if inputs.delta_bias is not None:
            delta = delta + inputs.delta_bias[strip].float()
        if inputs.delta_softplus:
            shape, more = delta.shape, -delta.numel() % 64
            delta = F.softplus(F.pad(delta.flatten(), (0, more)))[: shape.numel()].view(shape)
        return delta if scale is None else delta * at.of_row(_rows(scale))


def _rows(values: Tensor) -> Float[Tensor, "rows channels"]:
    """(D,) as (1, D); (B, D) as it is."""
    return values.float()[None] if values.ndim == 1 else values.float()


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, copied only if its last dimension is strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


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
