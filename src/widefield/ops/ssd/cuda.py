"""The scan of Mamba-2 on a GPU, in Triton; on Hopper y comes from `native`.

A sequence is cut into segments, so many that every multiprocessor has some; one program walks a
segment of one head in chunks and keeps the float32 state in registers. So the state in front of
every segment has to be known beforehand: a first kernel finds what each segment adds to the state,
the second adds that up in front of its own. Neither chunk states nor the products of C and B ever
go through memory.

What is rounded to the inputs' dtype: in y, each factor once, as y itself is; in states, nothing.

Backward, the state in front of each chunk and the gradient behind it do go through memory, and all
chunks are worked on at once. Gradients that are rounded read them rounded once; what float32
gradients are made of, those of A and the bias, is found while the states are walked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from widefield.ops.ssd import _gradients as gradients
from widefield.ops.ssd import _triton as kernels
from widefield.ops.ssd import native
from widefield.plan import LayerPlan, SSDInputs

CHUNK = 64


@dataclass(frozen=True, slots=True)
class _Cut:
    """How sequences are cut into segments.

    Attributes:
        chunk: tokens of a chunk.
        segment: tokens of a segment, a multiple of that.
        slots: segments of a row; where sequences lie side by side, at least as many as there are.
        sequences: the first dimension of states.
        table: (slots + 1, 4) sequence, begin, end and number within the sequence of each segment,
            sequence -1 where there is none; None where rows are sequences.
        first: (sequences + 1) the first segment of each sequence, where there is a table.
    """

    chunk: int
    segment: int
    slots: int
    sequences: int
    table: Tensor | None
    first: Tensor | None


def _parts(size: int, of: int) -> int:
    """How many parts of a size it takes; Triton's own takes microseconds a call."""
    return -(-size // of)


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: so that short sequences have several segments, too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cut(inputs: SSDInputs, segment: int | None = None) -> _Cut:
    """Segments of so many tokens, or for about two programs a multiprocessor."""
    batch, length, heads, width = inputs.x.shape
    large = inputs.x.dtype != torch.bfloat16 and inputs.B.shape[3] > 128
    chunk = CHUNK // 2 if large else CHUNK  # as much as fits into shared memory
    if segment is None:
        programs = batch * heads * _parts(width, 64)
        wanted = 2 * _processors(inputs.x.device) // programs
        slots = max(1, min(wanted, _MOST_SEGMENTS, length // (2 * chunk)))
        segment = max(chunk, chunk * -(-length // (chunk * slots)))
    if inputs.cu_seqlens is None:
        return _Cut(chunk, segment, max(1, -(-length // segment)), batch, None, None)
    sequences = inputs.cu_seqlens.shape[0] - 1
    slots = length // segment + sequences
    tables = _table(inputs.cu_seqlens.long(), segment, slots)
    return _Cut(chunk, segment, slots, sequences, *tables)


def _table(starts: Tensor, segment: int, slots: int) -> tuple[Tensor, Tensor]:
    """The tables of `_Cut`, made without waiting for the device; each sequence has a segment."""
    lengths = starts.diff()
    counts = ((lengths + segment - 1) // segment).clamp_min(1)
    ends = counts.cumsum(0)
    slot = torch.arange(slots + 1, device=starts.device)
    sequence = torch.searchsorted(ends, slot, right=True)
    used = sequence < len(lengths)
    sequence = sequence.clamp_max(len(lengths) - 1)
    number = slot - (ends - counts)[sequence]
    begin = torch.minimum(starts[sequence] + number * segment, starts[sequence + 1])
    end = torch.minimum(begin + segment, starts[sequence + 1])
    table = torch.stack([torch.where(used, sequence, -1), begin, end, number], dim=1)
    return table.contiguous(), F.pad(ends, (1, 0))


def _dense(tensor: Tensor) -> Tensor:
    """The kernels walk the last dimension with stride 1; anything else is copied once."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _in_units(*tensors: Tensor) -> tuple[int, list[int]]:
    """Strides but the last of all, in units of so many elements.

    Triton knows of a stride only whether 16 divides it, and 8 elements are read at once.
    """
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    aligned = all(s % 8 == 0 for s in strides) and all(t.data_ptr() % 16 == 0 for t in tensors)
    unit = 8 if aligned else 1
    return unit, [stride // unit for stride in strides]


def _per_row(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Plan values (H,) or (B, H) as float32, and the stride from row to row."""
    if values is None:
        return None, 0
    values = values.float().contiguous()
    return values, 0 if values.ndim == 1 else values.shape[1]


@dataclass(frozen=True)
class _Call:
    """One scan: its tensors as the kernels read them, how it is cut, and the kernels' settings."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor | None
    inputs: SSDInputs
    plan: LayerPlan
    cut: _Cut

    @staticmethod
    def of(inputs: SSDInputs, plan: LayerPlan, segment: int | None = None) -> _Call:
        x, B, C = (_dense(t) for t in (inputs.x, inputs.B, inputs.C))
        D, bias = (None if t is None else t.contiguous() for t in (inputs.D, inputs.delta_bias))
        initial = inputs.initial_state
        initial = None if initial is None else initial.float().contiguous()
        A = inputs.A.float().contiguous()
        cut = _cut(inputs, segment)
        return _Call(x, inputs.delta, A, B, C, D, bias, initial, inputs, plan, cut)

    @cached_property
    def least_tile(self) -> int:
        # On narrower tiles, Triton's products of float32 were seen to go astray on a GPU.
        return 64 if self.x.is_cuda and self.x.dtype == torch.float32 else 16

    @cached_property
    def width_tile(self) -> int:
        return min(64, max(self.least_tile, _power_of_two(self.x.shape[3])))

    @cached_property
    def states_tile(self) -> int:
        return max(self.least_tile, _power_of_two(self.B.shape[3]))

    @cached_property
    def blocks(self) -> int:
        """Programs that share the channels of a head."""
        return _parts(self.x.shape[3], self.width_tile)

    @cached_property
    def common(self) -> dict[str, Any]:
        return {
            "VARLEN": self.cut.table is not None, "VALID": self.inputs.valid is not None,
            "Q": self.cut.chunk,
        }  # fmt: skip

    def tiles(self, unit: int) -> dict[str, Any]:
        """What the kernels on tiles of tokens and channels or states are compiled for."""
        x = self.x
        return {
            # The interpreter has no products of bfloat16.
            "WIDE": x.dtype != torch.bfloat16 or not x.is_cuda,
            "BP": self.width_tile,
            "BN": self.states_tile,
            "UNIT": unit,
            "PRECISE": _EXACT if x.is_cuda else "ieee",
            **self.common,
        }

    @cached_property
    def whole(self) -> bool:
        """Whether no tile reaches past the channels or the states."""
        states = self.B.shape[3]
        return self.x.shape[3] % self.width_tile == 0 and states == self.states_tile

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        _, length, heads, width = self.x.shape
        groups, states = self.B.shape[2:]
        return (length, self.cut.segment, self.cut.slots, heads, width, states, heads // groups)

    @cached_property
    def grid(self) -> tuple[int, int, int]:
        return (self.x.shape[2] * self.blocks, self.cut.slots, self.x.shape[0])

    def optional(self, *tensors: Tensor | None) -> list[Tensor]:
        """Absent inputs are passed as x: their flag keeps the kernels from reading them."""
        return [self.x if tensor is None else tensor for tensor in tensors]

    @cached_property
    def valid_strides(self) -> tuple[int, ...]:
        return (0, 0) if self.inputs.valid is None else self.inputs.valid.stride()

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def run_deltas(self, made: Sequence[Tensor], gradients: Sequence[Tensor] | None = None) -> None:
        """Fill Δ and sums; or, from what is left of them, the gradients of raw Δ, A and bias."""
        batch, length, heads, _ = self.x.shape
        inputs, plan = self.inputs, self.plan
        floor, floor_row = _per_row(plan.delta_floor)
        scale, scale_row = _per_row(plan.delta_scale)
        decay, decay_row = _per_row(plan.decay_scale)
        few = min(16, _power_of_two(heads))
        grid = (self.chunks, _parts(heads, few), batch)
        kernels.deltas[grid](
            self.delta, self.A,
            *self.optional(self.bias, scale, floor, decay, inputs.valid, self.cut.table),
            *made, *(gradients or made),
            length, self.cut.segment, self.cut.slots, heads, self.blocks,
            *self.delta.stride(), *self.valid_strides, scale_row, floor_row, decay_row,
            *inputs.delta_limit, HAS_BIAS=self.bias is not None, SOFTPLUS=inputs.delta_softplus,
            LIMIT=inputs.delta_limit != (0.0, math.inf), SCALE=scale is not None,
            FLOOR=floor is not None, DECAY=decay is not None, BACKWARD=gradients is not None,
            HEADS=few, **self.common,
        )  # fmt: skip

    @cached_property
    def chunks(self) -> int:
        """Of a row; at least as many as there are tokens for."""
        return self.cut.slots * (self.cut.segment // self.cut.chunk)

    def segment_states(
        self, x: Tensor, B: Tensor, made: Sequence[Tensor], backward: bool
    ) -> tuple[Tensor, Tensor]:
        """What each segment adds to the state, and the decay over it."""
        batch, _, heads, width = x.shape
        local = self.empty(batch, self.cut.slots, heads, width, B.shape[3])
        kept = self.empty(batch, self.cut.slots, heads)
        unit, strides = _in_units(x, B)
        kernels.segment_states[self.grid](
            x, B, *self.optional(self.inputs.valid, self.cut.table), *made, local, kept,
            *self.sizes, *strides, *self.valid_strides,
            BACKWARD=backward, WHOLE=self.whole, **self.tiles(unit),
            STAGES=1 if x.dtype == torch.float32 else 2, num_warps=4,
        )  # fmt: skip
        return local, kept


def _run(
    inputs: SSDInputs, plan: LayerPlan, gate: native.Gate | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state, and with a gate the sums of squares."""
    if not native.supports(inputs, gate):
        return (*_forward(_Call.of(inputs, plan)), None)
    batch, length, heads, width = inputs.x.shape
    blocks = batch * heads * _parts(width, 64)
    together = native.BLOCKS * _processors(inputs.x.device)
    segment = native.segment_of(together, blocks, length)
    return _on_tensor_cores(_Call.of(inputs, plan, segment), gate)


def _on_tensor_cores(call: _Call, gate: native.Gate | None) -> tuple[Tensor, Tensor, Tensor | None]:
    batch, length, heads, _ = call.x.shape
    cut, made = call.cut, [call.empty(batch, heads, length) for _ in range(3)]
    with torch.cuda.device_of(call.x):
        call.run_deltas(made)
        if cut.segment > _LONG:
            passed = call.segment_states(call.x, call.B, made, backward=False)
        else:
            passed = native.states(call.inputs, made, cut.segment, cut.slots)
        return native.outputs(call.inputs, made, passed, cut.segment, gate)


def _forward(call: _Call) -> tuple[Tensor, Tensor]:
    x, B, C = call.x, call.B, call.C
    batch, length, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = call.empty(call.cut.sequences, heads, width, B.shape[3])
    made = [call.empty(batch, heads, length) for _ in range(3)]
    with torch.cuda.device_of(x):
        call.run_deltas(made)
        local, kept = call.segment_states(x, B, made, backward=False)
        unit, strides = _in_units(x, B, C)
        kernels.outputs[call.grid](
            x, B, C, *call.optional(call.D, call.inputs.valid, call.initial, call.cut.table),
            *made, local, kept, y, final, *call.sizes, *strides, *call.valid_strides,
            HAS_D=call.D is not None, HAS_INITIAL=call.initial is not None,
            EXACT=x.dtype == torch.float32, WHOLE=call.whole,
            **call.tiles(unit), STAGES=1 if x.dtype == torch.float32 else 2, num_warps=4,
        )  # fmt: skip
    return y, final


def _backward(call: _Call, dy: Tensor, dfinal: Tensor | None) -> dict[str, Tensor]:
    x, B, C, cut = call.x, call.B, call.C, call.cut
    batch, length, heads, width = x.shape
    dy = dy.contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    made = [call.empty(batch, heads, length) for _ in range(3)]
    dinitial = call.empty(cut.sequences, heads, width, B.shape[3])
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddelta = torch.empty(call.delta.shape, dtype=call.delta.dtype, device=x.device)
    by_chunk = call.empty(2, batch, call.chunks, heads).zero_().unbind()
    with torch.cuda.device_of(x):
        call.run_deltas(made)
        chunked, before, behind, last = _Chunked.of(call, made), call.initial, dfinal, dinitial
        if cut.slots > 1 or cut.table is not None:
            before, behind = _edges(call, made, dy, dfinal, dinitial)
            last = None
        before, across, low, _ = chunked.states(x, dy, B, C, before)
        behind, stayed, _, passed = chunked.states(dy, x, C, B, behind, (before, low), last)
        dC = chunked.projections(dy, x, B, before, 1)
        dB = chunked.projections(x, dy, C, behind, -1)
        *left, dD = chunked.inputs(dy, behind, across, stayed, passed, dx)
        call.run_deltas((made[0], *left), (ddelta, *by_chunk))
    dA, dbias = (t.sum((0, 1)) for t in by_chunk)
    return {
        "x": dx, "delta": ddelta, "A": dA, "B": dB, "C": dC, "D": dD, "bias": dbias,
        "initial": dinitial,
    }  # fmt: skip


def _edges(
    call: _Call, made: Sequence[Tensor], dy: Tensor, dfinal: Tensor | None, dinitial: Tensor
) -> tuple[Tensor, Tensor]:
    """The state in front of each segment, and its gradient behind it; fills `dinitial`."""
    before, kept = call.segment_states(call.x, call.B, made, backward=False)
    behind, _ = call.segment_states(dy, call.C, made, backward=True)
    _pass(call, before, kept, call.initial, torch.empty_like(dinitial), backward=False)
    _pass(call, behind, kept, dfinal, dinitial, backward=True)
    return before, behind


@dataclass(frozen=True)
class _Chunked:
    """A backward whose chunks are each worked on alone, and its kernels' settings.

    Attributes:
        call: the scan.
        made: Δ and the sums of logarithms of decays.
        tile: channels and states of a tile.
        narrow: states of a tile where states are walked.
        blocks: tiles along the channels of a head.
        splits: tiles along its states.
    """

    call: _Call
    made: Sequence[Tensor]
    tile: tuple[int, int]
    narrow: int
    blocks: int
    splits: int

    @staticmethod
    def of(call: _Call, made: Sequence[Tensor]) -> _Chunked:
        width, states = call.x.shape[3], call.B.shape[3]
        if call.x.is_cuda:
            BP, BN, narrow = 64, 64 if states <= 64 else 128, 64
        else:
            BP, BN = call.width_tile, min(32, call.states_tile)
            narrow = BN if call.states_tile == BN else 16
        return _Chunked(call, made, (BP, BN), narrow, _parts(width, BP), _parts(states, BN))

    def settings(self, unit: int) -> dict[str, Any]:
        BP, BN = self.tile
        width, states = self.call.x.shape[3], self.call.B.shape[3]
        tiles = self.call.tiles(unit)
        return tiles | {
            "BP": BP, "BN": BN, "NS": self.padded, "num_warps": 4,
            "WHOLE": width % BP == 0 and states % BN == 0,
            "STAGES": 1 if tiles["WIDE"] else 2,
        }  # fmt: skip

    @property
    def padded(self) -> int:
        """States, as many as whole tiles hold."""
        return self.splits * self.tile[1]

    @property
    def spots(self) -> tuple[int, int]:
        """Chunks of all rows, and heads."""
        return self.call.x.shape[0] * self.call.chunks, self.call.x.shape[2]

    def states(
        self, u: Tensor, v: Tensor, keys: Tensor, mates: Tensor, edges: Tensor | None,
        chunks: tuple[Tensor, Tensor] | None = None, last: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The state in front of each chunk, what is read of it, and the lower half of its bits.

        With the states and these halves, backward: its gradient behind each chunk, what is added
        to it, and what passes a chunk; where a row is one segment, the gradient in front of all of
        it is `last`.
        """
        call, cut = self.call, self.call.cut
        batch, length, heads, _ = u.shape
        backward = chunks is not None
        narrow = self.padded // self.narrow
        tiles = math.prod(self.spots) * self.blocks
        dtype = torch.float32 if call.tiles(1)["WIDE"] else torch.bfloat16
        states = torch.empty(tiles * self.tile[0] * self.padded, dtype=dtype, device=u.device)
        low = states
        if chunks is None and dtype == torch.bfloat16:
            low = torch.empty_like(states, dtype=torch.int16)
        before, low = chunks or (states, low)
        met = call.empty(narrow * self.blocks, batch, heads, length)
        passed = call.empty(tiles * narrow)
        unit, strides = _in_units(u, v, keys, mates)
        grid = (heads * self.blocks * narrow, cut.slots, batch)
        gradients.chunk_states[grid](
            u, v, keys, mates, *call.optional(call.inputs.valid, cut.table), *self.made,
            *call.optional(edges), before, states, low, met, passed, *call.optional(last),
            *call.sizes, *strides, *call.valid_strides,
            EDGES=edges is not None, LAST=last is not None, BACKWARD=backward,
            **(self.settings(unit) | {"BN": self.narrow}),
        )  # fmt: skip
        return states, met, low, passed

    def projections(self, u: Tensor, v: Tensor, keys: Tensor, states: Tensor, sign: int) -> Tensor:
        """The gradient of C, or with sign -1 of B."""
        call = self.call
        batch, _, heads, _ = u.shape
        groups = keys.shape[2]
        share = heads // groups
        wanted = 3 * _processors(u.device) // (batch * call.chunks * groups * self.splits)
        parts = next(n for n in range(1, share + 1) if share % n == 0 and n >= min(share, wanted))
        dtype = keys.dtype if parts == 1 else torch.float32
        found = torch.empty(parts, *keys.shape, dtype=dtype, device=u.device)
        unit, strides = _in_units(u, v, keys)
        gradients.projections[(call.chunks, groups * parts * self.splits, batch)](
            u, v, keys, *call.optional(call.inputs.valid, call.cut.table), *self.made,
            states, found, sign, *call.sizes, share // parts, *strides, *call.valid_strides,
            **self.settings(unit),
        )  # fmt: skip
        return found[0] if parts == 1 else found.sum(0).to(keys.dtype)

    def inputs(
        self, dy: Tensor, behind: Tensor, across: Tensor, stayed: Tensor, passed: Tensor, dx: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fill dx; of each token and head, what the gradients of Δ are made from; and dD."""
        call, x = self.call, self.call.x
        batch, length, heads, _ = x.shape
        groups = call.B.shape[2]
        share = heads // groups
        wanted = 6 * _processors(x.device) // (batch * call.chunks * groups * self.blocks)
        parts = next(n for n in range(1, share + 1) if share % n == 0 and n >= min(share, wanted))
        direct, through = call.empty(2, self.blocks, batch, heads, length).unbind()
        dD = call.empty(*self.spots, self.blocks).zero_()
        unit, strides = _in_units(x, call.B, call.C, dy)
        gradients.inputs_and_decays[(call.chunks, groups * parts * self.blocks, batch)](
            x, call.B, call.C, dy, *call.optional(call.D, call.inputs.valid, call.cut.table),
            *self.made, behind, across, stayed, passed, dx, direct, through, dD,
            *call.sizes, share // parts, *strides, *call.valid_strides,
            HAS_D=call.D is not None, PARTS=self.padded // self.narrow, **self.settings(unit),
        )  # fmt: skip
        return direct, through, dD.sum((0, 2))


def _pass(
    call: _Call, local: Tensor, kept: Tensor, edge: Tensor | None, last: Tensor, backward: bool
) -> None:
    """Make of what each segment adds the state in front of it, or the gradient behind it."""
    sequences, heads, width, states = last.shape
    size, block = width * states, 512
    kernels.pass_states[(_parts(size, block), heads, sequences)](
        local, kept, *call.optional(edge), last, *call.optional(call.cut.first),
        call.cut.slots, heads, size, HAS_EDGE=edge is not None,
        VARLEN=call.cut.first is not None, BACKWARD=backward, BLOCK=block,
    )  # fmt: skip


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, bias: Tensor | None, initial: Tensor | None,
        inputs: SSDInputs, plan: LayerPlan,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tensors = {"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D}
        inputs = inputs.replace(**tensors, delta_bias=bias, initial_state=initial)
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            saved = (x, delta, A, B, C, D, bias, initial, inputs.valid, inputs.cu_seqlens)
            ctx.save_for_backward(*saved)
            ctx.plan = plan
            ctx.options = (inputs.delta_softplus, inputs.delta_limit)
        y, final, _ = _run(inputs, plan)
        return y, final

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, delta, A, B, C, D, bias, initial, valid, cu_seqlens = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        softplus, limit = ctx.options
        inputs = SSDInputs(x, delta, A, B, C, D, bias, softplus, limit, initial, valid, cu_seqlens)
        found = _backward(_Call.of(inputs, ctx.plan), dy, dfinal)
        wanted = {
            "x": x,
            "delta": delta,
            "A": A,
            "B": B,
            "C": C,
            "D": D,
            "bias": bias,
            "initial": initial,
        }
        found = {n: None if t is None else found[n].to(t.dtype) for n, t in wanted.items()}
        return (*found.values(), None, None)


def ssd(inputs: SSDInputs, plan: LayerPlan | None = None) -> tuple[Tensor, Tensor]:
    """The scan of Mamba-2 with the signature and the semantics of the reference, differentiable.

    Args:
        inputs: what the scan reads, in float32, bfloat16 or float16.
        plan: what a method asks of this layer, or None.

    Returns:
        y in the dtype of x, and the final state in float32.
    """
    plan = plan or LayerPlan()
    leaves = (
        inputs.x, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.delta_bias,
        inputs.initial_state,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
        return _SSD.apply(*leaves, inputs, plan)
    y, final, _ = _run(inputs, plan)
    return y, final


def gates(inputs: SSDInputs, z: Tensor, gain: Tensor) -> bool:
    """Whether `gated_ssd` can run these."""
    return native.supports(inputs, native.Gate(z, gain))


def gated_ssd(
    inputs: SSDInputs, z: Tensor, gain: Tensor, plan: LayerPlan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan and what its output passes through; the same contract as the reference.

    Args:
        inputs: what the scan reads, such that `gates` is true.
        z: (B, L, H, P) the gate before its silu.
        gain: (H · P,).
        plan: what a method asks of this layer, or None.

    Returns:
        y · silu(z) · gain, the final state, and sums of squares of y · silu(z) (B, L, parts).
    """
    y, final, squares = _run(inputs, plan or LayerPlan(), native.Gate(z, gain))
    assert squares is not None
    return y, final, squares


_MOST_SEGMENTS = 64
_LONG = 4096  # tokens of a segment, above which Triton's states take less time than the native ones
# Products of float32 tiles from six of bfloat16: as exact as float32; three of tf32 are not.
_EXACT = "bf16x6"
