"""The scan of Mamba-2 on a GPU, in Triton.

A sequence is cut into segments, so many that every multiprocessor has some; one program walks a
segment of one head in chunks and keeps the float32 state in registers. So the state in front of
every segment has to be known beforehand: a first kernel finds what each segment adds to the state,
the second adds that up in front of its own. Neither chunk states nor the products of C and B ever
go through memory.

What is rounded to the inputs' dtype: in y, each factor once, as y itself is; in states, nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from widefield.ops.ssd._triton import LEAST, LOG2E, log_decay, product, softplus
from widefield.plan import LayerPlan, SSDInputs

CHUNK = 64


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


@triton.jit
def _deltas(
    delta_ptr, A_ptr, bias_ptr, scale_ptr, floor_ptr, decay_ptr, valid_ptr, table_ptr,
    effective_ptr, sums_ptr, rests_ptr,
    length, segment, slots, heads, sdb, sdl, sdh, svb, svl,
    scale_row, floor_row, decay_row, low, high,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, SCALE: tl.constexpr,
    FLOOR: tl.constexpr, DECAY: tl.constexpr, VALID: tl.constexpr, VARLEN: tl.constexpr,
    Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Δ as the scan uses it, and the sums of the logarithms of decays since a chunk's start."""
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
    if DECAY:
        rate *= tl.load(decay_ptr + sequence * decay_row + head, mask=there, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + head, mask=there, other=0.0).to(tl.float32)[None, :]
    delta = raw
    if SOFTPLUS:
        delta = softplus(delta)
    if LIMIT:
        delta = tl.where(delta < low, low, delta)
        delta = tl.where(delta > high, high, delta)
    if SCALE:
        delta *= tl.load(scale_ptr + sequence * scale_row + head, mask=there, other=0.0)[None, :]
    if FLOOR:
        floor = tl.load(floor_ptr + sequence * floor_row + head, mask=there, other=0.0)
        delta = tl.where(delta < floor[None, :], 0.0, delta)
    open = inside
    if VALID:
        ok = tl.load(valid_ptr + row * svb + (begin + t) * svl, mask=t < count, other=0)
        open = inside & (ok != 0)[:, None]
    delta = tl.where(open, delta, 0.0)
    coarse, fine = log_decay(delta, (rate * LOG2E)[None, :])
    coarse, fine = tl.cumsum(coarse, axis=0), tl.cumsum(fine, axis=0)
    sums = coarse + fine
    out = (row * heads + head)[None, :] * length + at
    tl.store(effective_ptr + out, delta, mask=inside)
    tl.store(sums_ptr + out, sums, mask=inside)
    tl.store(rests_ptr + out, (coarse - sums) + fine, mask=inside)


@triton.jit
def _segment_states(
    x_ptr, B_ptr, valid_ptr, table_ptr, effective_ptr, sums_ptr, rests_ptr, local_ptr, kept_ptr,
    length, segment, slots, heads, width, states, share,
    sxb, sxl, sxh, sBb, sBl, sBg, svb, svl,
    VALID: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state of a head, and how much of what was before it leaves.

    From the last chunk to the first: what no float32 can tell from 0 at the segment's end is not
    added up, but not-a-number in it is found.
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
        back = first + tl.arange(0, 256)
        end = tl.minimum((chunks - back) * Q, count)
        log = tl.load(sums_ptr + tokens + end - 1, mask=back < chunks, other=0.0)
        since = behind + tl.cumsum(log) - log
        lost = (since < LEAST) | (back >= chunks)
        alive = tl.maximum(alive, tl.max(tl.where(lost, 0, back + 1)))
        behind += tl.sum(log)

    i = tl.arange(0, Q)
    xp = x_ptr + row * sxb + head * sxh + (begin + i)[:, None] * sxl + p[None, :]
    bp = B_ptr + row * sBb + (head // share) * sBg + (begin + i)[:, None] * sBl + n[None, :]
    vp = valid_ptr + row * svb + (begin + i) * svl
    nan_x = tl.zeros((Q, BP), tl.float32)
    nan_b = tl.zeros((Q, BN), tl.float32)
    for start in tl.range(0, (chunks - alive) * Q, Q, num_stages=3):
        ok = start + i < count
        if VALID:
            ok = ok & (tl.load(vp + tl.cast(start, tl.int64) * svl, mask=ok, other=0) != 0)
        x = tl.load(
            xp + tl.cast(start, tl.int64) * sxl, mask=ok[:, None] & (p < width)[None, :], other=0.0
        )
        b = tl.load(
            bp + tl.cast(start, tl.int64) * sBl, mask=ok[:, None] & (n < states)[None, :], other=0.0
        )
        nan_x += x.to(tl.float32) * 0.0
        nan_b += b.to(tl.float32) * 0.0
    poison = tl.sum(nan_x) + tl.sum(nan_b)

    from_end = (chunks - 1) * Q
    state = tl.zeros((BP, BN), tl.float32)
    since = 0.0
    for back in tl.range(0, alive, num_stages=STAGES):
        start = from_end - back * Q
        far = tl.cast(start, tl.int64)
        t = start + i
        inside = t < count
        x = tl.load(xp + far * sxl, mask=inside[:, None] & (p < width)[None, :], other=0.0)
        b = tl.load(bp + far * sBl, mask=inside[:, None] & (n < states)[None, :], other=0.0)
        delta = tl.load(effective_ptr + tokens + t, mask=inside, other=0.0)
        sums = tl.load(sums_ptr + tokens + t, mask=inside, other=0.0)
        rests = tl.load(rests_ptr + tokens + t, mask=inside, other=0.0)
        end = tl.minimum(start + Q, count) - 1
        total = tl.load(sums_ptr + tokens + end)
        rest = tl.load(rests_ptr + tokens + end)
        if VALID:
            ok = tl.load(vp + far * svl, mask=inside, other=0) != 0
            x = tl.where(ok[:, None], x, 0.0)
            b = tl.where(ok[:, None], b, 0.0)
        if WIDE:
            x = x.to(tl.float32)
            b = b.to(tl.float32)
        weight = delta * tl.exp2((total - sums) + (rest - rests) + since)
        written = tl.trans(x).to(tl.float32) * weight[None, :]
        state = product(written, b, state, PRECISE)
        since += total + rest
    state += poison
    at = (place * heads + head) * width * states
    tl.store(
        local_ptr + at + p[:, None].to(tl.int64) * states + n[None, :], state,
        mask=(p < width)[:, None] & (n < states)[None, :],
    )  # fmt: skip
    tl.store(kept_ptr + place * heads + head, tl.exp2(behind))


@triton.jit
def _outputs(
    x_ptr, B_ptr, C_ptr, D_ptr, valid_ptr, initial_ptr, table_ptr,
    effective_ptr, sums_ptr, rests_ptr, local_ptr, kept_ptr, y_ptr, final_ptr,
    length, segment, slots, heads, width, states, share,
    sxb, sxl, sxh, sBb, sBl, sBg, sCb, sCl, sCg, svb, svl,
    HAS_D: tl.constexpr, HAS_INITIAL: tl.constexpr, VALID: tl.constexpr, VARLEN: tl.constexpr,
    WIDE: tl.constexpr, EXACT: tl.constexpr, ROUGH: tl.constexpr,
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
    xp = x_ptr + row * sxb + head * sxh + (begin + i)[:, None] * sxl + p[None, :]
    bp = B_ptr + row * sBb + (head // share) * sBg + (begin + i)[:, None] * sBl + n[None, :]
    cp = C_ptr + row * sCb + (head // share) * sCg + (begin + i)[:, None] * sCl + n[None, :]
    vp = valid_ptr + row * svb + (begin + i) * svl
    yp = y_ptr + ((row * length + begin + i) * heads + head)[:, None] * width + p[None, :]
    for start in tl.range(0, count, Q, num_stages=STAGES):
        t = start + i
        inside = t < count
        far = tl.cast(start, tl.int64)
        x = tl.load(xp + far * sxl, mask=inside[:, None] & (p < width)[None, :], other=0.0)
        b = tl.load(bp + far * sBl, mask=inside[:, None] & (n < states)[None, :], other=0.0)
        c = tl.load(cp + far * sCl, mask=inside[:, None] & (n < states)[None, :], other=0.0)
        delta = tl.load(effective_ptr + tokens + t, mask=inside, other=0.0)
        sums = tl.load(sums_ptr + tokens + t, mask=inside, other=0.0)
        end = tl.minimum(start + Q, count) - 1
        total = tl.load(sums_ptr + tokens + end)
        if VALID:
            ok = tl.load(vp + far * svl, mask=inside, other=0) != 0
            x = tl.where(ok[:, None], x, 0.0)
            b = tl.where(ok[:, None], b, 0.0)
            c = tl.where(ok[:, None], c, 0.0)
        if WIDE:
            x = x.to(tl.float32)
            b = b.to(tl.float32)
            c = c.to(tl.float32)

        # Transposed, tokens that are read by tokens that read: the state is then a left factor.
        weight = tl.dot(b, tl.trans(c), input_precision=ROUGH)
        # The product with 0 has the layout of the other products: nothing moves between lanes.
        log = (weight * 0.0 + sums[None, :]) - sums[:, None]
        if EXACT:
            rests = tl.load(rests_ptr + tokens + t, mask=inside, other=0.0)
            log = (log + rests[None, :]) - rests[:, None]
        weight = weight * tl.exp2(log) * delta[:, None]
        weight = tl.where(i[:, None] <= i[None, :], weight, 0.0)
        y = tl.dot(state.to(c.dtype), tl.trans(c), input_precision=ROUGH)
        y = y * tl.exp2(sums)[None, :]
        y = tl.dot(tl.trans(x), weight.to(x.dtype), y, input_precision=ROUGH)
        turned = tl.trans(x).to(tl.float32)
        y += turned * skip
        if VALID:
            y = tl.where(ok[None, :], y, 0.0)
        tl.store(
            yp + far * heads * width, tl.trans(y.to(y_ptr.dtype.element_ty)),
            mask=inside[:, None] & (p < width)[None, :],
        )  # fmt: skip

        ahead = total - sums
        if EXACT:
            ahead += tl.load(rests_ptr + tokens + end) - rests
        written = turned * (delta * tl.exp2(ahead))[None, :]
        state = state * tl.exp2(total)
        state = tl.dot(written.to(b.dtype), b, state, input_precision=ROUGH)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How sequences are cut into segments.

    Attributes:
        segment: tokens of one.
        slots: segments of a row; where sequences lie side by side, at least as many as there are.
        sequences: the first dimension of states.
        table: (slots + 1, 4) sequence, begin, end and number within the sequence of each segment,
            sequence -1 where there is none; None where rows are sequences.
    """

    segment: int
    slots: int
    sequences: int
    table: Tensor | None


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: so that short sequences have several segments, too
    return torch.cuda.get_device_properties(device).multi_processor_count


def _cut(inputs: SSDInputs, programs: int, chunk: int = CHUNK) -> _Cut:
    """Segments for about two programs a multiprocessor, where a segment needs so many."""
    batch, length = inputs.x.shape[:2]
    wanted = 2 * _processors(inputs.x.device) // programs
    slots = max(1, min(wanted, _MOST_SEGMENTS, length // (2 * chunk)))
    segment = max(chunk, chunk * -(-length // (chunk * slots)))
    if inputs.cu_seqlens is None:
        return _Cut(segment, max(1, -(-length // segment)), batch, None)
    sequences = inputs.cu_seqlens.shape[0] - 1
    slots = length // segment + sequences
    return _Cut(segment, slots, sequences, _table(inputs.cu_seqlens.long(), segment, slots))


def _table(starts: Tensor, segment: int, slots: int) -> Tensor:
    """The table of `_Cut`, made without waiting for the device; no sequence is without segment."""
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
    return torch.stack([torch.where(used, sequence, -1), begin, end, number], dim=1).contiguous()


def _dense(tensor: Tensor) -> Tensor:
    """The kernels walk the last dimension with stride 1; anything else is copied once."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _per_row(values: Tensor | None) -> tuple[Tensor | None, int]:
    """Plan values (H,) or (B, H) as float32, and the stride from row to row."""
    if values is None:
        return None, 0
    values = values.float().contiguous()
    return values, 0 if values.ndim == 1 else values.shape[1]


def forward(inputs: SSDInputs, plan: LayerPlan | None = None) -> tuple[Tensor, Tensor]:
    plan = plan or LayerPlan()
    x, B, C = (_dense(t) for t in (inputs.x, inputs.B, inputs.C))
    delta, valid = inputs.delta, inputs.valid
    A = inputs.A.float().contiguous()
    D, bias = (None if t is None else t.contiguous() for t in (inputs.D, inputs.delta_bias))
    initial = None if inputs.initial_state is None else inputs.initial_state.float().contiguous()
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    floor, floor_row = _per_row(plan.delta_floor)
    scale, scale_row = _per_row(plan.delta_scale)
    decay, decay_row = _per_row(plan.decay_scale)
    BP = min(64, max(16, triton.next_power_of_2(width)))
    BN = max(16, triton.next_power_of_2(states))
    blocks = triton.cdiv(width, BP)
    cut = _cut(inputs, batch * heads * blocks)
    y = torch.empty(batch, length, heads, width, dtype=x.dtype, device=x.device)
    final = torch.empty(cut.sequences, heads, width, states, dtype=torch.float32, device=x.device)
    local = final.new_empty(batch, cut.slots, heads, width, states)
    kept = final.new_empty(batch, cut.slots, heads)
    common = {"VARLEN": cut.table is not None, "VALID": valid is not None, "Q": CHUNK}
    tiles = {"WIDE": x.dtype != torch.bfloat16 or not x.is_cuda, "BP": BP, "BN": BN, **common}
    rough = "tf32x3" if x.dtype == torch.float32 else "tf32"
    # Absent inputs are passed as x: their flag keeps the kernel from reading them.
    D_, bias_, scale_, floor_, decay_, valid_, initial_, table_ = (
        x if t is None else t for t in (D, bias, scale, floor, decay, valid, initial, cut.table)
    )
    valid_strides = (0, 0) if valid is None else valid.stride()
    at = (length, cut.segment, cut.slots, heads)
    sizes = (*at, width, states, heads // groups)
    made = final.new_empty(3, batch, heads, length).unbind()
    grid = (heads * blocks, cut.slots, batch)
    few = min(16, triton.next_power_of_2(heads))
    with torch.cuda.device_of(x):
        _deltas[(cut.slots * (cut.segment // CHUNK), triton.cdiv(heads, few), batch)](
            delta, A, bias_, scale_, floor_, decay_, valid_, table_, *made,
            *at, *delta.stride(), *valid_strides, scale_row, floor_row, decay_row,
            *inputs.delta_limit, HAS_BIAS=bias is not None, SOFTPLUS=inputs.delta_softplus,
            LIMIT=inputs.delta_limit != (0.0, math.inf), SCALE=scale is not None,
            FLOOR=floor is not None, DECAY=decay is not None, HEADS=few, **common,
        )  # fmt: skip
        _segment_states[grid](
            x, B, valid_, table_, *made, local, kept,
            *sizes, *x.stride()[:3], *B.stride()[:3], *valid_strides,
            PRECISE="tf32x3", **tiles, **SETTINGS["states"],
        )  # fmt: skip
        _outputs[grid](
            x, B, C, D_, valid_, initial_, table_, *made, local, kept, y, final,
            *sizes, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *valid_strides,
            HAS_D=D is not None, HAS_INITIAL=initial is not None,
            EXACT=x.dtype == torch.float32, ROUGH=rough, **tiles, **SETTINGS["outputs"],
        )  # fmt: skip
    return y, final


_MOST_SEGMENTS = 64
SETTINGS = {
    "states": {"STAGES": 2, "num_warps": 4},
    "outputs": {"STAGES": 2, "num_warps": 4},
}
