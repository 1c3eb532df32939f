"""Decode: convolution update, L2 norm, gates and the delta rule in one launch; the state is read and written once.

    S <- exp(g) S;   u = beta (v - S k);   S <- S + u k^T;   o = scale S q
computed as  u = beta (v - e S k),  o = e S q + u (k.q)  with e = exp(g), so that both sums over K run side by side.

mixed_qkv [N, 2 H K + HV V] bf16 | a, b [N, HV] | A_log, dt_bias [HV] | state [slots, HV, V, K] bf16 or f32
conv_state [slots, 3 or more, C] | conv_weight [C, 4] | out [N, HV, V] bf16

One program owns ROWS of the (HV / H) V state rows that belong to one query/key head of one sequence and walks them BV
at a time. With the convolution fused it owns all of them: the history of a query/key channel is then read and rolled by
one program only, so there is nothing to race with. Bound: bytes of state, read and written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import l2_normalise_row, softplus


@triton.jit
def _gates(p_a, p_b, p_A_log, p_dt_bias):
    """exp(g) and beta of one token and value head."""
    x = tl.load(p_a).to(tl.float32) + tl.load(p_dt_bias).to(tl.float32)
    g = -tl.exp(tl.load(p_A_log).to(tl.float32)) * softplus(x)
    return tl.exp(g), tl.sigmoid(tl.load(p_b).to(tl.float32))


@triton.jit
def _delta_step(b_s, b_q, b_k, b_v, decay, beta):
    b_u = beta * (b_v - decay * tl.sum(b_s * b_k[None, :], 1))
    b_o = decay * tl.sum(b_s * b_q[None, :], 1) + b_u * tl.sum(b_q * b_k, 0)
    return b_s * decay + b_u[:, None] * b_k[None, :], b_o


@triton.jit
def _convolve(b_0, b_1, b_2, b_x, o_c, conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS: tl.constexpr):
    """One token's channels o_c, rounded to the activations' dtype as the unfused convolution rounds its output."""
    p_weight = conv_weight_ptr + o_c * stride_weight
    b_y = b_0.to(tl.float32) * tl.load(p_weight).to(tl.float32)
    b_y += b_1.to(tl.float32) * tl.load(p_weight + 1).to(tl.float32)
    b_y += b_2.to(tl.float32) * tl.load(p_weight + 2).to(tl.float32)
    b_y += b_x.to(tl.float32) * tl.load(p_weight + 3).to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(conv_bias_ptr + o_c).to(tl.float32)
    return (b_y * tl.sigmoid(b_y)).to(b_x.dtype).to(tl.float32)


@triton.jit
def _convolve_and_roll(
    p_x, p_history, stride_row, stride_channel, o_c, conv_weight_ptr, stride_weight, conv_bias_ptr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A single token: convolve channels o_c and move their history on by one."""
    p_row = p_history + o_c * stride_channel
    b_0, b_1, b_2 = tl.load(p_row), tl.load(p_row + stride_row), tl.load(p_row + 2 * stride_row)
    b_x = tl.load(p_x + o_c)
    # a channel may be held by several threads: all must have read before one writes
    tl.debug_barrier()
    tl.store(p_row, b_1)
    tl.store(p_row + stride_row, b_2)
    tl.store(p_row + 2 * stride_row, b_x.to(p_row.dtype.element_ty))
    return _convolve(b_0, b_1, b_2, b_x, o_c, conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS)


# slices of these start anywhere and their strides depend on the batch: specialising on either would compile anew
_UNALIGNED = ["a_ptr", "b_ptr", "indices_ptr", "conv_indices_ptr"]
_VARYING = ["stride_indices", "stride_conv_indices"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def gdn_decode_kernel(
    mixed_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, state_ptr, indices_ptr, out_ptr,
    conv_state_ptr, conv_weight_ptr, conv_bias_ptr, conv_indices_ptr, scale,
    stride_mixed, stride_a, stride_b, stride_state, stride_indices, stride_out,
    stride_conv_slot, stride_conv_row, stride_conv_channel, stride_weight, stride_conv_indices,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
    CONV: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """One token a sequence. Grid: (sequences x H, (HV / H) V / ROWS)."""
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    # first of this program's rows among all HV x V
    i_first = i_h * (HV // H * V) + tl.program_id(1) * ROWS
    o_k, o_r = tl.arange(0, K), tl.arange(0, BV)
    p_out = out_ptr + i_n * stride_out + i_first + o_r
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    i_conv = i_slot
    if CONV:
        i_conv = tl.load(conv_indices_ptr + i_n * stride_conv_indices).to(tl.int64)
    if (i_slot <= 0) | (i_conv <= 0):
        for i_tile in range(0, ROWS // BV):
            tl.store(p_out + i_tile * BV, tl.zeros([BV], tl.float32).to(out_ptr.dtype.element_ty))
        return

    p_x = mixed_ptr + i_n * stride_mixed
    if CONV:
        p_history = conv_state_ptr + i_conv * stride_conv_slot
        b_q = _convolve_and_roll(
            p_x, p_history, stride_conv_row, stride_conv_channel, i_h * K + o_k,
            conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS,
        )  # fmt: skip
        b_k = _convolve_and_roll(
            p_x, p_history, stride_conv_row, stride_conv_channel, (H + i_h) * K + o_k,
            conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS,
        )  # fmt: skip
    else:
        b_q = tl.load(p_x + i_h * K + o_k).to(tl.float32)
        b_k = tl.load(p_x + (H + i_h) * K + o_k).to(tl.float32)
    if L2NORM:
        b_q, b_k = l2_normalise_row(b_q), l2_normalise_row(b_k)
    b_q *= scale

    for i_tile in range(0, ROWS // BV):
        i_row = i_first + i_tile * BV
        i_hv = i_row // V
        p_state = state_ptr + i_slot * stride_state + (i_row + o_r)[:, None] * K + o_k[None, :]
        b_s = tl.load(p_state).to(tl.float32)
        o_v = 2 * H * K + i_row + o_r
        if CONV:
            b_v = _convolve_and_roll(
                p_x, p_history, stride_conv_row, stride_conv_channel, o_v,
                conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS,
            )  # fmt: skip
        else:
            b_v = tl.load(p_x + o_v).to(tl.float32)
        decay, beta = _gates(
            a_ptr + i_n * stride_a + i_hv, b_ptr + i_n * stride_b + i_hv, A_log_ptr + i_hv, dt_bias_ptr + i_hv
        )
        b_s, b_o = _delta_step(b_s, b_q, b_k, b_v, decay, beta)
        tl.store(p_state, b_s.to(state_ptr.dtype.element_ty))
        tl.store(p_out + i_tile * BV, b_o.to(out_ptr.dtype.element_ty))


@triton.jit
def _history(p_row, stride_row):
    return (
        tl.load(p_row).to(tl.float32),
        tl.load(p_row + stride_row).to(tl.float32),
        tl.load(p_row + 2 * stride_row).to(tl.float32),
    )


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
    conv_state_ptr, conv_weight_ptr, conv_bias_ptr, conv_indices_ptr, scale, cu_seqlens_ptr, accepted_ptr,
    stride_mixed, stride_a, stride_b, stride_state, stride_indices, stride_step, stride_out,
    stride_conv_slot, stride_conv_row, stride_conv_channel, stride_weight, stride_conv_indices, max_steps,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
    CONV: tl.constexpr, HAS_BIAS: tl.constexpr, L2NORM: tl.constexpr, ACCEPTED: tl.constexpr,
):  # fmt: skip
    """A few tokens a sequence; the state stays in registers over them. Grid: (sequences x H, (HV / H) V / ROWS)."""
    i_n, i_h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    i_first = i_h * (HV // H * V) + tl.program_id(1) * ROWS
    o_k, o_r = tl.arange(0, K), tl.arange(0, BV)
    bos = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    steps = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64) - bos
    if steps <= 0:
        return
    # bounded: a count out of range must not read outside the row
    i_start = tl.full([], 0, tl.int64)
    if ACCEPTED:
        i_start = tl.minimum(tl.maximum(tl.load(accepted_ptr + i_n).to(tl.int64) - 1, 0), max_steps - 1)
    steps = tl.minimum(steps, max_steps)
    i_slot = tl.load(indices_ptr + i_n * stride_indices + i_start * stride_step).to(tl.int64)
    i_conv = i_slot
    if CONV:
        i_conv = tl.load(conv_indices_ptr + i_n * stride_conv_indices).to(tl.int64)
    p_out = out_ptr + bos * stride_out + i_first + o_r
    if (i_slot <= 0) | (i_conv <= 0):
        for i_t in range(0, steps):
            for i_tile in range(0, ROWS // BV):
                b_zero = tl.zeros([BV], tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(p_out + i_t * stride_out + i_tile * BV, b_zero)
        return

    p_x = mixed_ptr + bos * stride_mixed
    o_q, o_kk = i_h * K + o_k, (H + i_h) * K + o_k
    if CONV:
        p_history = conv_state_ptr + i_conv * stride_conv_slot
    for i_tile in range(0, ROWS // BV):
        i_row = i_first + i_tile * BV
        i_hv = i_row // V
        o_state = (i_row + o_r)[:, None] * K + o_k[None, :]
        b_s = tl.load(state_ptr + i_slot * stride_state + o_state).to(tl.float32)
        o_v = 2 * H * K + i_row + o_r
        if CONV:
            p_start = p_history + i_start * stride_conv_row
            b_q0, b_q1, b_q2 = _history(p_start + o_q * stride_conv_channel, stride_conv_row)
            b_k0, b_k1, b_k2 = _history(p_start + o_kk * stride_conv_channel, stride_conv_row)
            b_v0, b_v1, b_v2 = _history(p_start + o_v * stride_conv_channel, stride_conv_row)
        for i_t in range(0, steps):
            p_t = p_x + i_t * stride_mixed
            b_q, b_k, b_v = tl.load(p_t + o_q), tl.load(p_t + o_kk), tl.load(p_t + o_v)
            if CONV:
                b_q3, b_k3, b_v3 = b_q.to(tl.float32), b_k.to(tl.float32), b_v.to(tl.float32)
                b_q = _convolve(b_q0, b_q1, b_q2, b_q, o_q, conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS)
                b_k = _convolve(b_k0, b_k1, b_k2, b_k, o_kk, conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS)
                b_v = _convolve(b_v0, b_v1, b_v2, b_v, o_v, conv_weight_ptr, stride_weight, conv_bias_ptr, HAS_BIAS)
                b_q0, b_q1, b_q2 = b_q1, b_q2, b_q3
                b_k0, b_k1, b_k2 = b_k1, b_k2, b_k3
                b_v0, b_v1, b_v2 = b_v1, b_v2, b_v3
            b_q, b_k, b_v = b_q.to(tl.float32), b_k.to(tl.float32), b_v.to(tl.float32)
            if L2NORM:
                b_q, b_k = l2_normalise_row(b_q), l2_normalise_row(b_k)
            decay, beta = _gates(
                a_ptr + (bos + i_t) * stride_a + i_hv, b_ptr + (bos + i_t) * stride_b + i_hv,
                A_log_ptr + i_hv, dt_bias_ptr + i_hv,
            )  # fmt: skip
            b_s, b_o = _delta_step(b_s, b_q * scale, b_k, b_v, decay, beta)
            tl.store(p_out + i_t * stride_out + i_tile * BV, b_o.to(out_ptr.dtype.element_ty))
            i_target = tl.load(indices_ptr + i_n * stride_indices + i_t * stride_step).to(tl.int64)
            if i_target > 0:
                tl.store(state_ptr + i_target * stride_state + o_state, b_s.to(state_ptr.dtype.element_ty))
    if CONV:
        p_roll = p_history + o_q * stride_conv_channel
        _roll(p_x + o_q, stride_mixed, p_roll, stride_conv_row, i_start, steps, ACCEPTED)
        p_roll = p_history + o_kk * stride_conv_channel
        _roll(p_x + o_kk, stride_mixed, p_roll, stride_conv_row, i_start, steps, ACCEPTED)
        for i_tile in range(0, ROWS // BV):
            o_c = 2 * H * K + i_first + i_tile * BV + o_r
            p_roll_v = p_history + o_c * stride_conv_channel
            _roll(p_x + o_c, stride_mixed, p_roll_v, stride_conv_row, i_start, steps, ACCEPTED)
