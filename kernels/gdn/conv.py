"""The causal convolution inside prefill's preparation: four taps and silu over ragged sequences, the last three tokens
kept for the next call.

    out[t] = silu(sum_j w[:, j] x[t - 3 + j] + bias), x before a sequence = its slot's history or zero
x, out [T, C] bf16 | weight [C, 4] | conv_state [slots, 3 or more, C]. Bound: bytes of x and out.

A program takes BT tokens of one sequence and a tile of channels, and holds the last three tokens as it goes down, with
the next four on their way: each is loaded once. Only the program at a sequence's start touches the history.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import l2_normalise_rows


@triton.jit
def _past_rows(p_x, stride, mask, HELD: tl.constexpr):
    """The three rows from p_x on as HELD, zero outside the mask."""
    b_0 = tl.load(p_x, mask=mask, other=0).to(HELD)
    b_1 = tl.load(p_x + stride, mask=mask, other=0).to(HELD)
    b_2 = tl.load(p_x + 2 * stride, mask=mask, other=0).to(HELD)
    return b_0, b_1, b_2


@triton.jit
def _four_rows(p_x, stride, mask, i, end):
    """Rows i to i + 3 from p_x on, zero from row `end` and outside the mask."""
    p_x += i * stride
    b_0 = tl.load(p_x, mask=mask & (i < end), other=0)
    b_1 = tl.load(p_x + stride, mask=mask & (i + 1 < end), other=0)
    b_2 = tl.load(p_x + 2 * stride, mask=mask & (i + 2 < end), other=0)
    b_3 = tl.load(p_x + 3 * stride, mask=mask & (i + 3 < end), other=0)
    return b_0, b_1, b_2, b_3


@triton.jit
def _taps(weight_ptr, stride_weight, o_c, mask, PACKED: tl.constexpr):
    """The four weights of channels o_c, oldest token's first, fp32. PACKED: four bf16 side by side."""
    if PACKED:
        b_w = tl.load(weight_ptr.to(tl.pointer_type(tl.uint64)) + o_c, mask=mask, other=0)
        b_low, b_high = b_w.to(tl.uint32), (b_w >> 32).to(tl.uint32)
        b_w0, b_w1 = (b_low << 16).to(tl.float32, bitcast=True), (b_low & 0xFFFF0000).to(tl.float32, bitcast=True)
        b_w2, b_w3 = (b_high << 16).to(tl.float32, bitcast=True), (b_high & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        p_w = weight_ptr + o_c * stride_weight
        b_w0 = tl.load(p_w, mask=mask, other=0).to(tl.float32)
        b_w1 = tl.load(p_w + 1, mask=mask, other=0).to(tl.float32)
        b_w2 = tl.load(p_w + 2, mask=mask, other=0).to(tl.float32)
        b_w3 = tl.load(p_w + 3, mask=mask, other=0).to(tl.float32)
    return b_w0, b_w1, b_w2, b_w3


@triton.jit
def _finish(b_y, b_bias, p_out, mask, HAS_BIAS: tl.constexpr, NORM: tl.constexpr):
    """Bias, silu as x / (1 + 2^(-x / ln 2)), and for NORM each row of the tile over its length."""
    if HAS_BIAS:
        b_y += b_bias
    b_y = b_y / (1.0 + tl.exp2(b_y * -1.4426950408889634))
    if NORM:
        b_y = l2_normalise_rows(b_y)
    tl.store(p_out, b_y.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def convolve(
    p_x, weight_ptr, bias_ptr, p_state, p_out, stride_x, stride_weight, stride_row, stride_channel, stride_out, o_c,
    mask, left, starts, i_slot, has_initial, BT: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Channels o_c, a tile of any shape, of up to BT tokens of a sequence that has `left` of them.

    p_x: channel 0 of the first token; p_out: where that token's tile goes; p_state: the sequence's slot. starts: these
    are the sequence's first tokens.
    """
    # the last three tokens wait as they are stored, in half the registers where that is bf16
    HELD: tl.constexpr = p_state.dtype.element_ty
    end = tl.minimum(left, BT)
    known = starts & (i_slot > 0) & has_initial
    p_history = p_state + o_c * stride_channel
    p_x += o_c
    b_n0, b_n1, b_n2, b_n3 = _four_rows(p_x, stride_x, mask, 0, end)
    # later chunks find their past in x, the first one in the slot
    b_l0, b_l1, b_l2 = _past_rows(p_x - 3 * stride_x, stride_x, mask & (starts == 0), HELD)
    if known:
        b_l0, b_l1, b_l2 = _past_rows(p_history, stride_row, mask, HELD)
    b_w0, b_w1, b_w2, b_w3 = _taps(weight_ptr, stride_weight, o_c, mask, PACKED)
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = tl.load(bias_ptr + o_c, mask=mask, other=0).to(tl.float32)
    for i in range(0, end, 4):
        b_0, b_1, b_2 = b_l0.to(tl.float32), b_l1.to(tl.float32), b_l2.to(tl.float32)
        b_3, b_4 = b_n0.to(tl.float32), b_n1.to(tl.float32)
        b_5, b_6 = b_n2.to(tl.float32), b_n3.to(tl.float32)
        b_l0, b_l1, b_l2 = b_n1.to(HELD), b_n2.to(HELD), b_n3.to(HELD)
        b_n0, b_n1, b_n2, b_n3 = _four_rows(p_x, stride_x, mask, i + 4, end)
        p_row = p_out + i * stride_out
        b_y = b_w0 * b_0 + b_w1 * b_1 + b_w2 * b_2 + b_w3 * b_3
        _finish(b_y, b_bias, p_row, mask, HAS_BIAS, NORM)
        b_y = b_w0 * b_1 + b_w1 * b_2 + b_w2 * b_3 + b_w3 * b_4
        _finish(b_y, b_bias, p_row + stride_out, mask & (i + 1 < end), HAS_BIAS, NORM)
        b_y = b_w0 * b_2 + b_w1 * b_3 + b_w2 * b_4 + b_w3 * b_5
        _finish(b_y, b_bias, p_row + 2 * stride_out, mask & (i + 2 < end), HAS_BIAS, NORM)
        b_y = b_w0 * b_3 + b_w1 * b_4 + b_w2 * b_5 + b_w3 * b_6
        _finish(b_y, b_bias, p_row + 3 * stride_out, mask & (i + 3 < end), HAS_BIAS, NORM)

    if starts & (i_slot > 0):
        # here `left` is the sequence's length: row j becomes entry left + j of (history, tokens)
        _, b_l1, b_l2 = _past_rows(p_history, stride_row, mask & known, HELD)
        # a channel is read by several threads: all must have read before one writes
        tl.debug_barrier()
        for j in tl.static_range(3):
            i_t = left - 3 + j
            b_last = tl.load(p_x + tl.maximum(i_t, 0) * stride_x, mask=mask, other=0).to(HELD)
            b_last = tl.where(i_t >= 0, b_last, tl.where(i_t == -1, b_l2, b_l1))
            tl.store(p_history + j * stride_row, b_last, mask=mask)
