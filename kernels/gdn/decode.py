"""Decode: convolution update, L2 norm, gates and the delta rule in one launch; the state is read and written once.

    S <- exp(g) S;   u = beta (v - S k);   S <- S + u k^T;   o = scale S q
computed as  u = beta (v - e S k),  o = e S q + u (k.q)  with e = exp(g), so that both sums over K run side by side.

mixed_qkv [N, 2 H K + HV V] bf16 | a, b [N, HV] | A_log, dt_bias [HV] | state [slots, HV, V, K] bf16 or f32
conv_state [slots, 3 or more, C] | conv_weight [C, 4] | out [N, HV, V] bf16 | arrivals [slots, H] i32, zero

SPLITS programs share the (HV / H) V state rows that belong to one query/key head of one sequence, neighbours in memory
next to each other in the grid; each walks its share BV rows at a time. Bound: bytes of state, read and written. So:
- the state is asked for as soon as its slot is known and before all arithmetic, the convolution's too, whose other
  inputs are asked for while the slot is on its way, its history, with EARLY, into the L2 cache before the state; a walk
  over several tiles asks for the next AHEAD ones before it works on one, in registers, or through shared memory;
- a tile is [RW, PASSES, K], row r + RW p at [r, p], where RW rows are one 16-byte load of every thread. So a row is one
  warp's, sums over K stay inside it, and the query and key, loaded as [RW, K], are where the state needs them.

With the convolution fused a program convolves its head's query and key and its own value channels, each in one thread,
and hands them to the threads that need them through shared memory, as they hold the state's rows. Where programs share
a head, the history of its query and key may only be moved on when all have read it: the last to arrive at a counter
does, when all else is done, and leaves the counter at zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import softplus


@triton.jit
def _none():
    """A tuple to add to; to a checker of types a literal one would stay empty."""
    return ()


@triton.jit
def _load_gates(a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, i_row, BV: tl.constexpr, V: tl.constexpr):
    """What _gates needs for BV rows from i_row: scalars of their value head, or vectors of their value heads."""
    o_hv = i_row // V
    if BV > V:
        o_hv += tl.arange(0, BV // V)
    return tl.load(a_ptr + o_hv), tl.load(b_ptr + o_hv), tl.load(A_log_ptr + o_hv), tl.load(dt_bias_ptr + o_hv)


@triton.jit
def _load_all_gates(
    p_a, p_b, A_log_ptr, dt_bias_ptr, i_first, GROUPS: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """What _gates needs, of GROUPS times ROWS rows from i_first."""
    gates = _none()
    for i in tl.static_range(GROUPS):
        gates += (_load_gates(p_a, p_b, A_log_ptr, dt_bias_ptr, i_first + i * ROWS, BV, V),)
    return gates


@triton.jit
def _tile_of_rows(b_x, PASSES: tl.constexpr, RW: tl.constexpr):
    """[PASSES x RW], in the order of rows -> [RW, PASSES]."""
    return tl.trans(tl.reshape(b_x, (PASSES, RW)))


@triton.jit
def _gates(loaded, V: tl.constexpr, PASSES: tl.constexpr, RW: tl.constexpr):
    """exp(g) and beta [RW, PASSES] of one token."""
    a, b, A_log, dt_bias = loaded
    x = a.to(tl.float32) + dt_bias.to(tl.float32)
    decay = tl.exp(-tl.exp(A_log.to(tl.float32)) * softplus(x))
    beta = tl.sigmoid(b.to(tl.float32))
    if PASSES * RW > V:
        decay = _tile_of_rows(tl.broadcast_to(decay[:, None], (PASSES * RW // V, V)), PASSES, RW)
        beta = _tile_of_rows(tl.broadcast_to(beta[:, None], (PASSES * RW // V, V)), PASSES, RW)
        return decay, beta
    zeros = tl.zeros([RW, PASSES], tl.float32)
    return zeros + decay, zeros + beta


@triton.jit
def _add(a_0, a_1, a_2, b_0, b_1, b_2):
    return a_0 + b_0, a_1 + b_1, a_2 + b_2


@triton.jit
def _query_and_key(b_q, b_k, scale, L2NORM: tl.constexpr):
    """[K], or [RW, K] or [K // LANES, RW, LANES], every row the same -> scaled query, key, their products, scalar or
    [RW]."""
    rank: tl.constexpr = len(b_q.shape)
    b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
    products = (b_q * b_q, b_k * b_k, b_q * b_k)
    if rank == 3:
        products = tl.reduce(products, 0, _add)
    sum_q, sum_k, b_qk = tl.reduce(products, 0 if rank == 1 else 1, _add)
    if L2NORM:
        norm_q, norm_k = tl.rsqrt(sum_q + 1e-6) * scale, tl.rsqrt(sum_k + 1e-6)
        b_qk *= norm_q * norm_k
        if rank == 2:
            norm_q, norm_k = norm_q[:, None], norm_k[:, None]
        elif rank == 3:
            norm_q, norm_k = norm_q[None, :, None], norm_k[None, :, None]
        return b_q * norm_q, b_k * norm_k, b_qk
    return b_q * scale, b_k, b_qk * scale


@triton.jit
def _every_row(b_q, b_k, b_qk, RW: tl.constexpr, K: tl.constexpr):
    """[K], [K], scalar -> [RW, K], [RW, K], [RW]."""
    rows = tl.zeros([RW], tl.float32)
    return tl.broadcast_to(b_q[None, :], (RW, K)), tl.broadcast_to(b_k[None, :], (RW, K)), rows + b_qk


@triton.jit
def _values(b_s, PAIRS: tl.constexpr):
    """A tile as loaded -> f32 [RW, PASSES, K]. PAIRS: as [RW, PASSES, K // 2] pairs of bf16. A loop carries these in
    the registers they were loaded to; single bf16 it moves to others at each turn, and waits until they are there.
    """
    if PAIRS:
        low, high = (b_s << 16).to(tl.float32, bitcast=True), (b_s & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.reshape(tl.join(low, high), (b_s.shape[0], b_s.shape[1], 2 * b_s.shape[2]))
    else:
        return b_s.to(tl.float32)


@triton.jit
def _delta_step(b_s, b_q, b_k, b_qk, b_v, decay, beta):
    """b_s [RW, PASSES, K]; b_q, b_k [RW, K]; b_qk [RW]; b_v, decay, beta [RW, PASSES] -> state, output."""
    b_u = beta * (b_v - decay * tl.sum(b_s * b_k[:, None, :], 2))
    b_o = decay * tl.sum(b_s * b_q[:, None, :], 2) + b_u * b_qk[:, None]
    return b_s * decay[:, :, None] + b_u[:, :, None] * b_k[:, None, :], b_o


@triton.jit
def _load_taps(conv_weight_ptr, stride_weight, conv_bias_ptr, o_c, mask, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr):
    """The four weights of channels o_c, oldest token's first, and their bias. PACKED: four bf16 side by side."""
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(conv_bias_ptr + o_c, mask=mask).to(tl.float32)
    if PACKED:
        b_w = tl.load(conv_weight_ptr.to(tl.pointer_type(tl.uint64)) + o_c, mask=mask)
        b_low, b_high = b_w.to(tl.uint32), (b_w >> 32).to(tl.uint32)
        w_0, w_1 = (b_low << 16).to(tl.float32, bitcast=True), (b_low & 0xFFFF0000).to(tl.float32, bitcast=True)
        w_2, w_3 = (b_high << 16).to(tl.float32, bitcast=True), (b_high & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        p_weight = conv_weight_ptr + o_c * stride_weight
        w_0, w_1 = tl.load(p_weight, mask=mask), tl.load(p_weight + 1, mask=mask)
        w_2, w_3 = tl.load(p_weight + 2, mask=mask), tl.load(p_weight + 3, mask=mask)
    return w_0, w_1, w_2, w_3, bias


@triton.jit
def _channels(o_p, i_h, i_first, H: tl.constexpr, K: tl.constexpr):
    """Of a program's channels, query's, key's and values' one after the other, those at o_p among all."""
    return tl.where(o_p < K, i_h * K, tl.where(o_p < 2 * K, (H + i_h - 1) * K, 2 * (H - 1) * K + i_first)) + o_p


@triton.jit
def _ask_for(p_x):
    """Sends for what lies at p_x, to the L2 cache. Of loads whose values are used later the compiler puts the use, and
    with it the wait, above the loads that are to follow; this it leaves where it is."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_history(p_row, stride_row, mask):
    """The three tokens before, oldest first."""
    return (
        tl.load(p_row, mask=mask), tl.load(p_row + stride_row, mask=mask), tl.load(p_row + 2 * stride_row, mask=mask)
    )  # fmt: skip


@triton.jit
def _convolve(history, b_x, taps):
    """One token's channels, rounded to the activations' dtype as the unfused convolution rounds its output."""
    b_0, b_1, b_2 = history
    w_0, w_1, w_2, w_3, bias = taps
    b_y = b_0.to(tl.float32) * w_0.to(tl.float32) + b_1.to(tl.float32) * w_1.to(tl.float32)
    b_y += b_2.to(tl.float32) * w_2.to(tl.float32)
    b_y += b_x.to(tl.float32) * w_3.to(tl.float32)
    b_y += bias
    return (b_y * tl.sigmoid(b_y)).to(b_x.dtype)


@triton.jit
def _rows_of(b_y, o_row):
    """b_y [C], o_row [RW, PASSES] -> b_y at o_row. A gather, whose source the compiler does not compute once more for
    the other layout, as it does for conversions of what few enough loads give."""
    o_flat = tl.reshape(o_row, (o_row.shape[0] * o_row.shape[1],))
    return tl.reshape(tl.gather(b_y, o_flat, 0), o_row.shape)


@triton.jit
def _by_lane(b_y, first, RW: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr):
    """Channels first .. first + K - 1 of b_y [C] -> [K // LANES, RW, LANES], every row the same: LANES threads hold a
    row, K // LANES neighbours each, as they hold a row of a tile. In a tensor of this shape the compiler spreads the
    last two dimensions over the threads by itself, so sums over a row stay in a warp and nothing is converted."""
    o = tl.arange(0, RW * K)
    return tl.reshape(tl.gather(b_y, first + o % LANES * (K // LANES) + o // (RW * LANES), 0), (K // LANES, RW, LANES))


@triton.jit
def _by_row(b_x, RW: tl.constexpr, K: tl.constexpr):
    """[K // LANES, RW, LANES] -> [RW, K]."""
    return tl.reshape(tl.permute(b_x, (1, 2, 0)), (RW, K))


@triton.jit
def _store_history(p_row, stride_row, history, b_x, mask):
    """Move the history on by the token b_x."""
    tl.store(p_row, history[1], mask=mask)
    tl.store(p_row + stride_row, history[2], mask=mask)
    tl.store(p_row + 2 * stride_row, b_x.to(p_row.dtype.element_ty), mask=mask)


@triton.jit
def _arrive_last(p_arrivals, SPLITS: tl.constexpr):
    """Whether the other SPLITS - 1 programs have been here; what they read before, the last one may overwrite."""
    last = tl.atomic_add(p_arrivals, 1, sem="acq_rel") == SPLITS - 1
    if last:
        tl.store(p_arrivals, 0)
    return last


# slices of these start anywhere and their strides depend on the batch: specialising on either would compile anew
_UNALIGNED = ["a_ptr", "b_ptr", "indices_ptr", "conv_indices_ptr"]
_VARYING = ["stride_indices", "stride_conv_indices"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def gdn_decode_kernel(
    mixed_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, state_ptr, indices_ptr, out_ptr,
    conv_state_ptr, conv_weight_ptr, conv_bias_ptr, conv_indices_ptr, arrivals_ptr, scale,
    stride_mixed, stride_a, stride_b, stride_state, stride_indices, stride_out,
    stride_conv_slot, stride_conv_row, stride_conv_channel, stride_weight, stride_conv_indices,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SPLITS: tl.constexpr, BV: tl.constexpr, RW: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr,
    PAIRS: tl.constexpr, EVICT: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    CONV: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """One token a sequence. Grid: sequences x H x SPLITS."""
    ROWS: tl.constexpr = HV // H * V // SPLITS
    TILES: tl.constexpr = ROWS // BV
    PASSES: tl.constexpr = BV // RW
    # as many tiles at a time as are one value head's or, larger ones, one
    GROUPS: tl.constexpr = 1 if V % ROWS == 0 else ROWS // max(V, BV) if ROWS % V == 0 else TILES
    if PDL:
        # launched while the kernel before ends: nothing is read before its writes are there
        tl.extra.cuda.gdc_wait()
    i_h = tl.program_id(0) // SPLITS % H
    i_n = (tl.program_id(0) // (SPLITS * H)).to(tl.int64)
    # first of this program's rows among all HV x V
    i_first = i_h * (HV // H * V) + tl.program_id(0) % SPLITS * ROWS
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    i_conv = i_slot
    if CONV:
        i_conv = tl.load(conv_indices_ptr + i_n * stride_conv_indices).to(tl.int64)

    o_k = tl.arange(0, K)
    o_row = tl.arange(0, RW)[:, None] + tl.arange(0, PASSES)[None, :] * RW
    p_out = out_ptr + i_n * stride_out + i_first + o_row
    p_x = mixed_ptr + i_n * stride_mixed
    p_v = p_x + 2 * H * K + i_first + o_row
    p_a, p_b = a_ptr + i_n * stride_a, b_ptr + i_n * stride_b
    if CONV:
        # what does not wait for the slot. Query, key and values as one tensor: a thread's channels are neighbours
        C: tl.constexpr = 2 * K + ROWS
        P: tl.constexpr = max(triton.next_power_of_2(C), THREADS)
        o_p = tl.arange(0, P)
        o_c = _channels(o_p, i_h, i_first, H, K)
        m_c = None
        if P != C:
            m_c = o_p < C
        b_x = tl.load(p_x + o_c, mask=m_c)
        taps = _load_taps(conv_weight_ptr, stride_weight, conv_bias_ptr, o_c, m_c, HAS_BIAS, PACKED)
        gates = _load_all_gates(p_a, p_b, A_log_ptr, dt_bias_ptr, i_first, GROUPS, ROWS // GROUPS, BV, V)
    if (i_slot <= 0) | (i_conv <= 0):
        for i_tile in range(0, TILES):
            tl.store(p_out + i_tile * BV, tl.zeros([RW, PASSES], out_ptr.dtype.element_ty))
        return

    p_state = state_ptr + i_slot * stride_state + i_first * K
    p_state += tl.arange(0, RW)[:, None, None] * K + o_k[None, None, :]
    p_state += tl.arange(0, PASSES)[None, :, None] * (RW * K)
    p_read = p_state
    if PAIRS:
        p_read = (state_ptr + i_slot * stride_state + i_first * K).to(tl.pointer_type(tl.uint32))
        p_read += tl.arange(0, RW)[:, None, None] * (K // 2) + tl.arange(0, K // 2)[None, None, :]
        p_read += tl.arange(0, PASSES)[None, :, None] * (RW * K // 2)
    TILE: tl.constexpr = BV * K // 2 if PAIRS else BV * K
    # tiles held in registers before their turn
    HELD: tl.constexpr = min(AHEAD, TILES) if STAGES == 1 or TILES == 1 else 0
    # tiles of a longer queue change registers where a loop begins again, which waits for them: seldom
    UNROLL: tl.constexpr = 4 if HELD > 1 else 1
    if CONV and EARLY:
        # else the history's loads queue behind the state. By 16 channels, 32 bytes; the fourth row is the third again
        o_s = _channels(tl.minimum(tl.arange(0, P // 16) * 16, C - 1), i_h, i_first, H, K)[None, :]
        o_r = tl.minimum(tl.arange(0, 4), 2)[:, None]
        _ask_for(conv_state_ptr + i_conv * stride_conv_slot + (o_r * stride_conv_row + o_s * stride_conv_channel))
    tiles = _none()
    for i in tl.static_range(HELD):
        tiles += (tl.load(p_read + i * TILE, eviction_policy=EVICT),)
    if not CONV:
        b_v = tl.load(p_v)
    # keeps the compiler from sinking these loads below what follows
    tl.debug_barrier()
    if CONV:
        p_history = conv_state_ptr + i_conv * stride_conv_slot + o_c * stride_conv_channel
        history = _load_history(p_history, stride_conv_row, m_c)
        tl.debug_barrier()
        b_y = _convolve(history, b_x, taps)
        LANES: tl.constexpr = THREADS // RW
        b_q, b_k = _by_lane(b_y, 0, RW, K, LANES), _by_lane(b_y, K, RW, K, LANES)
        b_v = _rows_of(b_y, 2 * K + o_row)
        b_q, b_k, b_qk = _query_and_key(b_q, b_k, scale, L2NORM)
        b_q, b_k = _by_row(b_q, RW, K), _by_row(b_k, RW, K)
        # each channel is one thread's, and the gathers' barriers are behind every thread's reading
        if SPLITS == 1:
            _store_history(p_history, stride_conv_row, history, b_x, m_c)
        else:
            # one thread's of a tensor's: all threads would wait for a scalar's answer here. It orders stores behind
            # loads whose values were used before the gathers' barriers, which takes no fence; one warp has no barriers
            SEM: tl.constexpr = "relaxed" if THREADS > 32 else "acq_rel"
            p_arrivals = arrivals_ptr + i_conv * H + i_h
            arrived = tl.atomic_add(p_arrivals + o_p, 1, mask=o_p == 0, sem=SEM)
    else:
        gates = _load_all_gates(p_a, p_b, A_log_ptr, dt_bias_ptr, i_first, GROUPS, ROWS // GROUPS, BV, V)
        o_wide = tl.broadcast_to(o_k[None, :], (RW, K))
        b_q, b_k = tl.load(p_x + i_h * K + o_wide), tl.load(p_x + (H + i_h) * K + o_wide)
        b_q, b_k, b_qk = _query_and_key(b_q, b_k, scale, L2NORM)

    decays, betas = _none(), _none()
    for i in tl.static_range(GROUPS):
        decay, beta = _gates(gates[i], V, PASSES, RW)
        decays += (decay,)
        betas += (beta,)

    for i_tile in tl.range(0, TILES, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if HELD > 0:
            b_s = tiles[0]
            if TILES > 1:
                i_asked = i_tile + HELD
                b_asked = tl.load(p_read + i_asked * TILE, mask=i_asked < TILES, eviction_policy=EVICT)
                tiles = tiles[1:]
                tiles += (b_asked,)
                tl.debug_barrier()
        else:
            b_s = tl.load(p_read + i_tile * TILE, eviction_policy=EVICT)
        decay, beta = decays[0], betas[0]
        for i in tl.static_range(1, GROUPS):
            decay = tl.where(i_tile * GROUPS >= i * TILES, decays[i], decay)
            beta = tl.where(i_tile * GROUPS >= i * TILES, betas[i], beta)
        b_u = b_v.to(tl.float32)
        # small loads, a tile ahead; the last tile's are its own once more
        i_next = tl.minimum(i_tile + 1, TILES - 1) * BV
        if CONV:
            b_v = _rows_of(b_y, 2 * K + i_next + o_row)
        else:
            b_v = tl.load(p_v + i_next)
        b_s, b_o = _delta_step(_values(b_s, PAIRS), b_q, b_k, b_qk, b_u, decay, beta)
        tl.store(p_state + i_tile * (BV * K), b_s.to(state_ptr.dtype.element_ty), eviction_policy=EVICT)
        tl.store(p_out + i_tile * BV, b_o.to(out_ptr.dtype.element_ty))

    if CONV and SPLITS > 1:
        last = tl.max(tl.where(o_p == 0, arrived, 0), 0) == SPLITS - 1
        _store_history(p_history, stride_conv_row, history, b_x, (o_p < C) & (last | (o_p >= 2 * K)))
        if last:
            tl.store(p_arrivals, 0)


@triton.jit
def _roll(p_x, stride_x, p_row, stride_row, i_start, steps, ACCEPTED: tl.constexpr):
    """Move the history of some channels on over all of a sequence's tokens; see gdn_decode in op.py for the rows."""
    state_type = p_row.dtype.element_ty
    b_1 = tl.load(p_row + (i_start + 1) * stride_row)
    b_2 = tl.load(p_row + (i_start + 2) * stride_row)
    # a channel may be held by several threads: all must have read before one writes
    tl.debug_barrier()
    if ACCEPTED:
        tl.store(p_row, b_1)
        tl.store(p_row + stride_row, b_2)
        for i_t in range(0, steps):
            tl.store(p_row + (i_t + 2) * stride_row, tl.load(p_x + i_t * stride_x).to(state_type))
    else:
        for j in tl.static_range(3):
            i_t = steps - 3 + j
            b_x = tl.load(p_x + tl.maximum(i_t, 0) * stride_x).to(state_type)
            b_x = tl.where(i_t >= 0, b_x, tl.where(i_t == -1, b_2, b_1))
            tl.store(p_row + j * stride_row, b_x)


@triton.jit(
    do_not_specialize=[*_VARYING, "stride_step", "max_steps"],
    do_not_specialize_on_alignment=[*_UNALIGNED, "cu_seqlens_ptr", "accepted_ptr"],
)
def gdn_decode_steps_kernel(
    mixed_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, state_ptr, indices_ptr, out_ptr,
    conv_state_ptr, conv_weight_ptr, conv_bias_ptr, conv_indices_ptr, arrivals_ptr, scale,
    cu_seqlens_ptr, accepted_ptr,
    stride_mixed, stride_a, stride_b, stride_state, stride_indices, stride_step, stride_out,
    stride_conv_slot, stride_conv_row, stride_conv_channel, stride_weight, stride_conv_indices, max_steps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    SPLITS: tl.constexpr, BV: tl.constexpr, RW: tl.constexpr, PDL: tl.constexpr,
    CONV: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, L2NORM: tl.constexpr, ACCEPTED: tl.constexpr,
):  # fmt: skip
    """A few tokens a sequence; the state stays in registers over them. Grid: sequences x H x SPLITS."""
    ROWS: tl.constexpr = HV // H * V // SPLITS
    PASSES: tl.constexpr = BV // RW
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_h = tl.program_id(0) // SPLITS % H
    i_n = (tl.program_id(0) // (SPLITS * H)).to(tl.int64)
    i_first = i_h * (HV // H * V) + tl.program_id(0) % SPLITS * ROWS
    bos = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    steps = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64) - bos
    # bounded: a count out of range must not read outside the row
    i_start = tl.full([], 0, tl.int64)
    if ACCEPTED:
        i_start = tl.minimum(tl.maximum(tl.load(accepted_ptr + i_n).to(tl.int64) - 1, 0), max_steps - 1)
    i_slot = tl.load(indices_ptr + i_n * stride_indices + i_start * stride_step).to(tl.int64)
    i_conv = i_slot
    if CONV:
        i_conv = tl.load(conv_indices_ptr + i_n * stride_conv_indices).to(tl.int64)
    if steps <= 0:
        return
    steps = tl.minimum(steps, max_steps)
    o_k, o_r = tl.arange(0, K), tl.arange(0, BV)
    o_row = tl.arange(0, RW)[:, None] + tl.arange(0, PASSES)[None, :] * RW
    p_out = out_ptr + bos * stride_out + i_first + o_row
    if (i_slot <= 0) | (i_conv <= 0):
        for i_t in range(0, steps):
            for i_tile in range(0, ROWS // BV):
                b_zero = tl.zeros([RW, PASSES], out_ptr.dtype.element_ty)
                tl.store(p_out + i_t * stride_out + i_tile * BV, b_zero)
        return

    p_x = mixed_ptr + bos * stride_mixed
    o_q, o_kk = i_h * K + o_k, (H + i_h) * K + o_k
    if CONV:
        p_history = conv_state_ptr + i_conv * stride_conv_slot
        p_start = p_history + i_start * stride_conv_row
    for i_tile in range(0, ROWS // BV):
        i_row = i_first + i_tile * BV
        o_state = i_row * K + (o_row[:, :, None] * K + o_k[None, None, :])
        b_s = tl.load(state_ptr + i_slot * stride_state + o_state)
        # keeps the compiler from sinking these loads below the others
        tl.debug_barrier()
        b_s = b_s.to(tl.float32)
        o_v = 2 * H * K + i_row + o_r
        if CONV:
            h_q = _load_history(p_start + o_q * stride_conv_channel, stride_conv_row, None)
            h_k = _load_history(p_start + o_kk * stride_conv_channel, stride_conv_row, None)
            h_v = _load_history(p_start + o_v * stride_conv_channel, stride_conv_row, None)
            taps_q = _load_taps(conv_weight_ptr, stride_weight, conv_bias_ptr, o_q, None, HAS_BIAS, PACKED)
            taps_k = _load_taps(conv_weight_ptr, stride_weight, conv_bias_ptr, o_kk, None, HAS_BIAS, PACKED)
            taps_v = _load_taps(conv_weight_ptr, stride_weight, conv_bias_ptr, o_v, None, HAS_BIAS, PACKED)
        for i_t in range(0, steps):
            p_t = p_x + i_t * stride_mixed
            b_q, b_k = tl.load(p_t + o_q), tl.load(p_t + o_kk)
            gates = _load_gates(
                a_ptr + (bos + i_t) * stride_a, b_ptr + (bos + i_t) * stride_b, A_log_ptr, dt_bias_ptr, i_row, BV, V
            )
            if CONV:
                x_q, x_k, x_v = b_q, b_k, tl.load(p_t + o_v)
                b_q, b_k = _convolve(h_q, x_q, taps_q), _convolve(h_k, x_k, taps_k)
                b_v = _rows_of(_convolve(h_v, x_v, taps_v), o_row)
                h_q = h_q[1], h_q[2], x_q.to(h_q[2].dtype)
                h_k = h_k[1], h_k[2], x_k.to(h_k[2].dtype)
                h_v = h_v[1], h_v[2], x_v.to(h_v[2].dtype)
            else:
                b_v = tl.load(p_t + 2 * H * K + i_row + o_row)
            b_q, b_k, b_qk = _query_and_key(b_q, b_k, scale, L2NORM)
            b_q, b_k, b_qk = _every_row(b_q, b_k, b_qk, RW, K)
            decay, beta = _gates(gates, V, PASSES, RW)
            b_s, b_o = _delta_step(b_s, b_q, b_k, b_qk, b_v.to(tl.float32), decay, beta)
            tl.store(p_out + i_t * stride_out + i_tile * BV, b_o.to(out_ptr.dtype.element_ty))
            i_target = tl.load(indices_ptr + i_n * stride_indices + i_t * stride_step).to(tl.int64)
            if i_target > 0:
                tl.store(state_ptr + i_target * stride_state + o_state, b_s.to(state_ptr.dtype.element_ty))
    if CONV:
        for i_tile in range(0, ROWS // BV):
            o_c = 2 * H * K + i_first + i_tile * BV + o_r
            p_roll = p_history + o_c * stride_conv_channel
            _roll(p_x + o_c, stride_mixed, p_roll, stride_conv_row, i_start, steps, ACCEPTED)
        last = True
        if SPLITS > 1:
            tl.debug_barrier()
            last = _arrive_last(arrivals_ptr + i_conv * H + i_h, SPLITS)
        if last:
            p_roll = p_history + o_q * stride_conv_channel
            _roll(p_x + o_q, stride_mixed, p_roll, stride_conv_row, i_start, steps, ACCEPTED)
            p_roll = p_history + o_kk * stride_conv_channel
            _roll(p_x + o_kk, stride_mixed, p_roll, stride_conv_row, i_start, steps, ACCEPTED)
