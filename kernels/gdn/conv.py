"""Prefill's causal convolution: four taps and silu over ragged sequences, the last three tokens kept for the next call.

    out[t] = silu(sum_j w[:, j] x[t - 3 + j] + bias), x before a sequence = its slot's history or zero
x, out [T, C] bf16 | weight [C, 4] | conv_state [slots, 3 or more, C]. Bound: bytes of x and out.

A program takes BT tokens of one sequence and BC channels, and holds the last three tokens as it goes down: each is
loaded once. Only the program at a sequence's start touches the history.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import chunk_of_program


@triton.jit
def _past_rows(p_x, stride, mask):
    """The three rows from p_x on, fp32, zero outside the mask."""
    b_0 = tl.load(p_x, mask=mask, other=0).to(tl.float32)
    b_1 = tl.load(p_x + stride, mask=mask, other=0).to(tl.float32)
    b_2 = tl.load(p_x + 2 * stride, mask=mask, other=0).to(tl.float32)
    return b_0, b_1, b_2


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
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < C
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    p_history = conv_state_ptr + i_slot * stride_slot + o_c * stride_channel
    starts = i_c == 0
    known = starts & (i_slot > 0) & (tl.load(has_initial_ptr + i_n) != 0)

    # later chunks find their past in x, the first one in the slot
    p_x = x_ptr + first * stride_x + o_c
    b_0, b_1, b_2 = _past_rows(p_x - 3 * stride_x, stride_x, m_c & (i_c > 0))
    if known:
        b_0, b_1, b_2 = _past_rows(p_history, stride_row, m_c)
    p_w = weight_ptr + o_c * stride_weight
    b_w0 = tl.load(p_w, mask=m_c, other=0).to(tl.float32)
    b_w1 = tl.load(p_w + 1, mask=m_c, other=0).to(tl.float32)
    b_w2 = tl.load(p_w + 2, mask=m_c, other=0).to(tl.float32)
    b_w3 = tl.load(p_w + 3, mask=m_c, other=0).to(tl.float32)
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0).to(tl.float32)
    p_out = out_ptr + first * stride_out + o_c
    for i in tl.static_range(BT):
        m = m_c & (i < left)
        b_3 = tl.load(p_x + i * stride_x, mask=m, other=0).to(tl.float32)
        b_y = b_w0 * b_0 + b_w1 * b_1 + b_w2 * b_2 + b_w3 * b_3
        if HAS_BIAS:
            b_y += b_bias
        tl.store(p_out + i * stride_out, (b_y * tl.sigmoid(b_y)).to(out_ptr.dtype.element_ty), mask=m)
        b_0, b_1, b_2 = b_1, b_2, b_3

    if starts & (i_slot > 0):
        # here `left` is the sequence's length: row j becomes entry left + j of (history, tokens)
        b_0, b_1, b_2 = _past_rows(p_history, stride_row, m_c & known)
        # a channel is read by several threads: all must have read before one writes
        tl.debug_barrier()
        for j in tl.static_range(3):
            i_t = left - 3 + j
            b_last = tl.load(p_x + tl.maximum(i_t, 0) * stride_x, mask=m_c, other=0).to(tl.float32)
            b_last = tl.where(i_t >= 0, b_last, tl.where(i_t == -1, b_2, b_1))
            tl.store(p_history + j * stride_row, b_last.to(conv_state_ptr.dtype.element_ty), mask=m_c)
