"""The gradients of Mamba-2's scan, in Triton: of every chunk by itself, once its states are known.

The state in front of every chunk and the gradient of the state behind it go through memory, rounded
to bfloat16 where the inputs are: good enough for gradients that are rounded, too. What float32
gradients are made of is found where the states still are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from widefield.ops.ssd._triton import _bounds, _kernel


@triton.jit
def _thirds(a):
    """A float32 tile as the sum of three of bfloat16, to its last place."""
    # By bits: conversions one by one take as long as the rest of a kernel.
    high = (a.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = a - high
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def _wide_times(a, b, acc, PRECISE: tl.constexpr):
    """`acc` + a·b of a float32 a, in three parts where b is narrower."""
    if b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision=PRECISE)
    else:
        high, middle, low = _thirds(a)
        acc = tl.dot(low, b, acc)
        acc = tl.dot(middle, b, acc)
        acc = tl.dot(high, b, acc)
    return acc


@triton.jit
def _tokens(pointer, stride, ok, i, across, size, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """A tile of tokens `i`: 0 where they are not `ok`, and in columns from `size` on."""
    mask = ok[:, None]
    if not WHOLE:
        mask = mask & (across < size)[None, :]
    tile = tl.load(pointer + (i[:, None] * stride + across[None, :]), mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _left(log, rest):
    """What a logarithm in two numbers leaves; their sum would be the first of them."""
    left = tl.exp2(log)
    return tl.fma(left, rest * 0.6931471805599453, left)


@triton.jit
def _sums(sums_ptr, rests_ptr, tokens, t, inside, end):
    """Logarithms of decays since the chunk's start, and of all of it; each in two numbers."""
    total = tl.load(sums_ptr + tokens + end)
    rest = tl.load(rests_ptr + tokens + end)
    sums = tl.load(sums_ptr + tokens + t, mask=inside, other=total)
    rests = tl.load(rests_ptr + tokens + t, mask=inside, other=rest)
    return sums, rests, total, rest


@_kernel
def chunk_states(
    u_ptr, v_ptr, keys_ptr, mates_ptr, valid_ptr, table_ptr, effective_ptr, sums_ptr, rests_ptr,
    edges_ptr, before_ptr, states_ptr, low_ptr, met_ptr, passed_ptr, last_ptr,
    length, segment, slots, heads, width, states, share,
    sub, sul, suh, swb, swl, swh, skb, skl, skg, smb, sml, smg, svb, svl,
    VALID: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    EDGES: tl.constexpr, LAST: tl.constexpr, BACKWARD: tl.constexpr, UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state in front of each chunk of a segment, from that in front of the segment.

    With x for u and B for keys. Rounded to bfloat16, it goes with the lower half of its bits, from
    which the rest can be told. Also what C, the mates, read of it, times dy, which is v: how y
    changes with what is from before the chunk, for each token. Backward, with dy, x, C and B, from
    the last chunk to the first: the gradient of the state behind each chunk, how it changes with
    what each token adds, Δ left out, and with what passes the whole chunk.
    """
    blocks, splits = tl.cdiv(width, BP), NS // BN
    piece = tl.program_id(0) % (blocks * splits)
    head = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    block, split = piece // splits, piece % splits
    p = block * BP + tl.arange(0, BP)
    n = split * BN + tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(2).to(tl.int64)
    group = head // share
    sequence, begin, count, _, _, place = _bounds(
        table_ptr, row, tl.program_id(1), slots, length, segment, VARLEN
    )
    if sequence < 0:
        return
    at = (place * heads + head) * width * states
    within = (p < width)[:, None] & (n < states)[None, :]
    state = tl.zeros((BP, BN), tl.float32)
    if EDGES:
        state = tl.load(edges_ptr + at + p[:, None] * states + n[None, :], mask=within, other=0.0)
    i = tl.arange(0, Q)
    inner = tl.arange(0, BP)[:, None] * NS + n[None, :]
    tokens = (row * heads + head) * length + begin
    up = u_ptr + row * (sub * UNIT) + head * (suh * UNIT) + begin * (sul * UNIT)
    wp = v_ptr + row * (swb * UNIT) + head * (swh * UNIT) + begin * (swl * UNIT)
    kp = keys_ptr + row * (skb * UNIT) + group * (skg * UNIT) + begin * (skl * UNIT)
    mp = mates_ptr + row * (smb * UNIT) + group * (smg * UNIT) + begin * (sml * UNIT)
    vp = valid_ptr + row * svb + begin * svl
    partial = met_ptr + (split * blocks + block) * rows * heads * length + tokens
    chunks = tl.cdiv(count, Q)
    for number in tl.range(0, chunks, num_stages=STAGES):
        chunk = chunks - 1 - number if BACKWARD else number
        start = chunk * Q
        far = tl.cast(start, tl.int64)
        t = start + i
        inside = t < count
        ok = inside
        if VALID:
            ok = tl.load(vp + (far + i) * svl, mask=inside, other=0) != 0
        u = _tokens(up + far * (sul * UNIT), sul * UNIT, ok, i, p, width, WHOLE, WIDE)
        v = _tokens(wp + far * (swl * UNIT), swl * UNIT, ok, i, p, width, WHOLE, WIDE)
        keys = _tokens(kp + far * (skl * UNIT), skl * UNIT, ok, i, n, states, WHOLE, WIDE)
        mates = _tokens(mp + far * (sml * UNIT), sml * UNIT, ok, i, n, states, WHOLE, WIDE)
        end = tl.minimum(start + Q, count) - 1
        sums, rests, total, rest = _sums(sums_ptr, rests_ptr, tokens, t, inside, end)
        whole = _left(total, rest)
        since, until = _left(sums, rests), _left(total - sums, rest - rests)
        spot = ((place * (segment // Q) + chunk) * heads + head) * blocks + block
        tile = spot * (BP * NS)
        if WIDE:
            tl.store(states_ptr + tile + inner, state)
            read = tl.dot(mates, tl.trans(state), input_precision=PRECISE)
        else:
            bits = state.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
            tl.store(states_ptr + tile + inner, rounded)
            if not BACKWARD:
                tl.store(low_ptr + tile + inner, bits.to(tl.int16))
            high, middle, low = _thirds(state)
            read = tl.dot(mates, tl.trans(low))
            read = tl.dot(mates, tl.trans(middle), read)
            read = tl.dot(mates, tl.trans(high), read)
        met = tl.sum(read * v.to(tl.float32), axis=1)
        if BACKWARD:
            before = tl.load(before_ptr + tile + inner)
            if not WIDE:
                low = tl.load(low_ptr + tile + inner).to(tl.int32)
                bits = (before.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low
                before = bits.to(tl.float32, bitcast=True)
            passed = tl.sum(tl.sum(before * state, axis=1), axis=0) * whole
            tl.store(passed_ptr + spot * splits + split, passed)
            met *= until
            weight = tl.where(inside, since, 0.0)
        else:
            met *= since
            weight = until * tl.load(effective_ptr + tokens + t, mask=inside, other=0.0)
        tl.store(partial + t, met, mask=inside)
        written = tl.trans(u).to(tl.float32) * weight[None, :]
        state = _wide_times(written, keys, state * whole, PRECISE)
    if LAST:
        tl.store(last_ptr + at + p[:, None] * states + n[None, :], state, mask=within)


@_kernel
def projections(
    u_ptr, v_ptr, keys_ptr, valid_ptr, table_ptr, effective_ptr, sums_ptr, rests_ptr,
    states_ptr, out_ptr,
    sign, length, segment, slots, heads, width, states, share, several,
    sub, sul, suh, swb, swl, swh, skb, skl, skg, svb, svl,
    VALID: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
    UNIT: tl.constexpr, WHOLE: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of C in a chunk: from the state in front of it, and from B within.

    Rows are tokens that read, with dy for u, x for v, B for keys. With sign -1 that of B: rows are
    tokens that are read, with x, dy, C and the gradient of the state behind it.
    """
    blocks, splits = tl.cdiv(width, BP), NS // BN
    parts = share // several
    steps = segment // Q
    split = tl.program_id(1) % splits
    part = (tl.program_id(1) // splits) % parts
    group = (tl.program_id(1) // (splits * parts)).to(tl.int64)
    n = split * BN + tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(2).to(tl.int64)
    slot, chunk = tl.program_id(0) // steps, tl.program_id(0) % steps
    sequence, begin, count, _, _, place = _bounds(
        table_ptr, row, slot, slots, length, segment, VARLEN
    )
    if (sequence < 0) | (chunk * Q >= count):
        return
    i = tl.arange(0, Q)
    inside = chunk * Q + i < count
    first = begin + chunk * Q
    last = tl.minimum(chunk * Q + Q, count) - 1 - chunk * Q
    ok = inside
    if VALID:
        ok = tl.load(valid_ptr + row * svb + (first + i) * svl, mask=inside, other=0) != 0
    kp = keys_ptr + row * (skb * UNIT) + group * (skg * UNIT) + first * (skl * UNIT)
    keys = _tokens(kp, skl * UNIT, ok, i, n, states, WHOLE, WIDE)
    up = u_ptr + row * (sub * UNIT) + first * (sul * UNIT)
    wp = v_ptr + row * (swb * UNIT) + first * (swl * UNIT)
    inner = tl.arange(0, BP)[:, None] * NS + n[None, :]
    spots = (place * steps + chunk) * heads
    order = i * sign
    turned = sign < 0
    acc = tl.zeros((Q, BN), tl.float32)
    for item in tl.range(0, several * blocks, num_stages=STAGES):
        head = group * share + part * several + item // blocks
        block = item % blocks
        p = block * BP + tl.arange(0, BP)
        tokens = (row * heads + head) * length + first
        u = _tokens(up + head * (suh * UNIT), sul * UNIT, ok, i, p, width, WHOLE, WIDE)
        v = _tokens(wp + head * (swh * UNIT), swl * UNIT, ok, i, p, width, WHOLE, WIDE)
        delta = tl.load(effective_ptr + tokens + i, mask=inside, other=0.0)
        sums, rests, total, rest = _sums(sums_ptr, rests_ptr, tokens, i, inside, last)
        tile = ((spots + head) * blocks + block) * (BP * NS)
        state = tl.load(states_ptr + tile + inner)
        read = tl.dot(u, state, input_precision=PRECISE)
        scale = tl.where(turned, delta, 1.0)
        log, rest = tl.where(turned, total - sums, sums), tl.where(turned, rest - rests, rests)
        acc += read * (_left(log, rest) * scale)[:, None]
        pairs = tl.dot(u, tl.trans(v), input_precision=PRECISE)
        log = (pairs * 0.0 + (sums * sign)[:, None]) - (sums * sign)[None, :]
        if WIDE:
            log = (log + (rests * sign)[:, None]) - (rests * sign)[None, :]
        weight = pairs * scale[:, None] * tl.where(turned, 1.0, delta)[None, :]
        weight = tl.where(order[:, None] >= order[None, :], weight * tl.exp2(log), 0.0)
        acc = tl.dot(weight.to(keys.dtype), keys, acc, input_precision=PRECISE)
    groups = heads // share
    spot = (((part * rows + row) * length + first) * groups + group) * states
    mask = inside[:, None]
    if not WHOLE:
        mask = mask & (n < states)[None, :]
    tl.store(
        out_ptr + spot + i[:, None] * (groups * states) + n[None, :],
        acc.to(out_ptr.dtype.element_ty), mask=mask,
    )  # fmt: skip


@_kernel
def inputs_and_decays(
    x_ptr, B_ptr, C_ptr, dy_ptr, D_ptr, valid_ptr, table_ptr,
    effective_ptr, sums_ptr, rests_ptr, ahead_ptr, across_ptr, stayed_ptr, passed_ptr,
    dx_ptr, direct_ptr, through_ptr, dD_ptr,
    length, segment, slots, heads, width, states, share, several,
    sxb, sxl, sxh, sBb, sBl, sBg, sCb, sCl, sCg, syb, syl, syh, svb, svl,
    HAS_D: tl.constexpr, VALID: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr,
    PRECISE: tl.constexpr, UNIT: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr,
    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, NS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradients of x, of Δ as a factor and of each token's decay, in a chunk of some heads.

    Rows are tokens that are read, columns tokens that read.
    """
    blocks = tl.cdiv(width, BP)
    parts = share // several
    steps = segment // Q
    block = tl.program_id(1) % blocks
    part = (tl.program_id(1) // blocks) % parts
    group = (tl.program_id(1) // (blocks * parts)).to(tl.int64)
    p = block * BP + tl.arange(0, BP)
    row = tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(2).to(tl.int64)
    slot, chunk = tl.program_id(0) // steps, tl.program_id(0) % steps
    sequence, begin, count, _, _, place = _bounds(
        table_ptr, row, slot, slots, length, segment, VARLEN
    )
    if (sequence < 0) | (chunk * Q >= count):
        return
    i = tl.arange(0, Q)
    inside = chunk * Q + i < count
    first = begin + chunk * Q
    last = tl.minimum(chunk * Q + Q, count) - 1 - chunk * Q
    ok = inside
    if VALID:
        ok = tl.load(valid_ptr + row * svb + (first + i) * svl, mask=inside, other=0) != 0
    bp = B_ptr + row * (sBb * UNIT) + group * (sBg * UNIT) + first * (sBl * UNIT)
    cp = C_ptr + row * (sCb * UNIT) + group * (sCg * UNIT) + first * (sCl * UNIT)
    n = tl.arange(0, BN)
    b = _tokens(bp, sBl * UNIT, ok, i, n, states, WHOLE, WIDE)
    c = _tokens(cp, sCl * UNIT, ok, i, n, states, WHOLE, WIDE)
    products = tl.dot(b, tl.trans(c), input_precision=PRECISE)
    for split in tl.static_range(1, NS // BN):
        part_b = _tokens(bp, sBl * UNIT, ok, i, split * BN + n, states, WHOLE, WIDE)
        part_c = _tokens(cp, sCl * UNIT, ok, i, split * BN + n, states, WHOLE, WIDE)
        products = tl.dot(part_b, tl.trans(part_c), products, input_precision=PRECISE)
    xp = x_ptr + row * (sxb * UNIT) + first * (sxl * UNIT)
    yp = dy_ptr + row * (syb * UNIT) + first * (syl * UNIT)
    spots = (place * steps + chunk) * heads
    inner = tl.arange(0, BP)[:, None] * NS + tl.arange(0, BN)[None, :]
    until_read = i[:, None] >= i[None, :]
    # The interpreter has no products of bfloat16, which can hold 0 and 1 as well as float32.
    until_read = until_read.to(tl.float32 if PRECISE == "ieee" else tl.bfloat16)
    partial = (block * rows * heads * length).to(tl.int64)
    for number in tl.range(0, several, num_stages=STAGES):
        head = group * share + part * several + number
        tokens = (row * heads + head) * length + first
        x = _tokens(xp + head * (sxh * UNIT), sxl * UNIT, ok, i, p, width, WHOLE, WIDE)
        dy = _tokens(yp + head * (syh * UNIT), syl * UNIT, ok, i, p, width, WHOLE, WIDE)
        delta = tl.load(effective_ptr + tokens + i, mask=inside, other=0.0)
        sums, rests, total, rest = _sums(sums_ptr, rests_ptr, tokens, i, inside, last)
        spot = (spots + head) * blocks + block
        into = tl.zeros((Q, BP), tl.float32)
        for split in tl.static_range(NS // BN):
            part_b = b
            if split > 0:
                part_b = _tokens(bp, sBl * UNIT, ok, i, split * BN + n, states, WHOLE, WIDE)
            ahead = tl.load(ahead_ptr + spot * (BP * NS) + split * BN + inner)
            into = tl.dot(part_b, tl.trans(ahead), into, input_precision=PRECISE)
        into *= _left(total - sums, rest - rests)[:, None]
        passed = 0.0
        across = tl.zeros((Q,), tl.float32)
        stayed = tl.zeros((Q,), tl.float32)
        for split in tl.static_range(PARTS):
            passed += tl.load(passed_ptr + spot * PARTS + split)
            of = ((split * blocks + block) * rows * heads * length).to(tl.int64) + tokens + i
            across += tl.load(across_ptr + of, mask=inside, other=0.0)
            stayed += tl.load(stayed_ptr + of, mask=inside, other=0.0)
        pairs = tl.dot(x, tl.trans(dy), input_precision=PRECISE)
        log = (pairs * 0.0 + sums[None, :]) - sums[:, None]
        log = (log + rests[None, :]) - rests[:, None]
        weight = tl.where(i[:, None] <= i[None, :], products * tl.exp2(log), 0.0)
        into = tl.dot(weight.to(x.dtype), dy, into, input_precision=PRECISE)
        both = weight * pairs
        dx = into * delta[:, None]
        if HAS_D:
            dx += dy.to(tl.float32) * tl.load(D_ptr + head).to(tl.float32)
            own = tl.sum(tl.where(i[:, None] == i[None, :], pairs, 0.0), axis=1)
            tl.store(dD_ptr + spot, tl.sum(own))
        mask = inside[:, None]
        if not WHOLE:
            mask = mask & (p < width)[None, :]
        tl.store(
            dx_ptr + ((row * length + first) * heads + head) * width
            + (i[:, None] * (heads * width) + p[None, :]),
            dx.to(dx_ptr.dtype.element_ty), mask=mask,
        )  # fmt: skip
        tl.store(direct_ptr + partial + tokens + i, stayed + tl.sum(both, axis=1), mask=inside)
        # How y changes with the logarithm of a token's decay: by what comes from before it and is
        # read at it or later; from and in this chunk, or others.
        left = tl.zeros((Q, Q), tl.float32) + (stayed * delta)[:, None]
        both = _wide_times(both * delta[:, None], until_read, left, PRECISE)
        through = tl.sum(tl.where(i[:, None] < i[None, :], both, 0.0), axis=0)
        through += tl.cumsum(across, reverse=True) + passed
        tl.store(through_ptr + partial + tokens + i, through, mask=inside)
