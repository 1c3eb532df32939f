"""Prefill's causal convolution: four taps and silu over ragged sequences, the last three tokens kept for the next call.

    out[t] = silu(sum_j w[:, j] x[t - 3 + j] + bias), x before a sequence = its slot's history or zero
x, out [T, C] bf16 | weight [C, 4] | conv_state [slots, 3 or more, C]. Bound: bytes of x and out.

A program takes BT tokens of one sequence and BC channels. Only the one at a sequence's start touches the history.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import chunk_of_program


# slices of the index tensors start anywhere: specialising on that would compile anew in mid-service
@triton.jit(
    do_not_specialize=["stride_indices", "num_seqs"],
    do_not_specialize_on_alignment=["indices_ptr", "has_initial_ptr", "cu_seqlens_ptr"],
)
def gdn_causal_conv_kernel(
    x_ptr, weight_ptr, bias_ptr, conv_state_ptr, indices_ptr, has_initial_ptr, cu_seqlens_ptr, out_ptr,
    stride_x, stride_weight, stride_slot, stride_row, stride_channel, stride_indices, stride_out, num_seqs,
    C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Grid: (T // BT + sequences, ceil(C / BC))."""
    i_n, i_c, first, left = chunk_of_program(cu_seqlens_ptr, tl.program_id(0), num_seqs, BT)
    if left <= 0:
        return
    o_t, o_c = tl.arange(0, BT), tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    p_history = conv_state_ptr + i_slot * stride_slot + o_c * stride_channel
    starts = i_c == 0
    known = starts & (i_slot > 0) & (tl.load(has_initial_ptr + i_n) != 0)

    b_y = tl.zeros([BT, BC], tl.float32)
    p_x = x_ptr + first * stride_x + o_c
    for j in tl.static_range(4):
        b_w = tl.load(weight_ptr + o_c * stride_weight + j, mask=m_c, other=0).to(tl.float32)
        o_tap = o_t + (j - 3)
        # later chunks find their past in x
        m_x = (o_tap < left) & (o_tap + i_c * BT >= 0)
        b_x = tl.load(p_x[None, :] + o_tap[:, None] * stride_x, mask=m_x[:, None] & m_c[None, :], other=0)
        b_y += b_w[None, :] * b_x.to(tl.float32)
    if known:
        for j in tl.static_range(3):
            b_w = tl.load(weight_ptr + o_c * stride_weight + j, mask=m_c, other=0).to(tl.float32)
            o_row = o_t + j
            m_h = (o_row < 3)[:, None] & m_c[None, :]
            b_h = tl.load(p_history[None, :] + o_row[:, None] * stride_row, mask=m_h, other=0)
            b_y += b_w[None, :] * b_h.to(tl.float32)
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_c, mask=m_c, other=0).to(tl.float32)[None, :]
    p_out = out_ptr + (first + o_t[:, None]) * stride_out + o_c[None, :]
    b_y = b_y * tl.sigmoid(b_y)
    tl.store(p_out, b_y.to(out_ptr.dtype.element_ty), mask=(o_t < left)[:, None] & m_c[None, :])

    if starts & (i_slot > 0):
        # here `left` is the sequence's length: row j becomes entry left + j of (history, tokens)
        b_1 = tl.where(known, tl.load(p_history + stride_row, mask=m_c, other=0).to(tl.float32), 0.0)
        b_2 = tl.where(known, tl.load(p_history + 2 * stride_row, mask=m_c, other=0).to(tl.float32), 0.0)
        # a channel is read by several threads: all must have read before one writes
        tl.debug_barrier()
        for j in tl.static_range(3):
            i_t = left - 3 + j
            b_last = tl.load(p_x + tl.maximum(i_t, 0) * stride_x, mask=m_c, other=0).to(tl.float32)
            b_last = tl.where(i_t >= 0, b_last, tl.where(i_t == -1, b_2, b_1))
            tl.store(p_history + j * stride_row, b_last.to(conv_state_ptr.dtype.element_ty), mask=m_c)
