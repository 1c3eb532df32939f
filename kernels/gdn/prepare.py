"""Between a layer's projections and its recurrence: convolution, split, L2 norm of q and k, gates.

    g = -exp(A_log) softplus(a + dt_bias);   beta = sigmoid(b)
mixed_qkv [T, 2 H K + HV V] bf16 | a, b [T, HV] -> q, k [T, H, K], v [T, HV, V] bf16, g, beta [T, HV] f32. Bound: bytes.

In one launch, so that the convolution's output, as large as its input, is neither written nor read: a program's tile of
channels is whole heads. Without a convolution the same, token by token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.conv import convolve
from blackwell_kernels.gdn.primitives import chunk_of_program, l2_normalise_rows, softplus


@triton.jit
def _store_gates(
    a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, g_ptr, beta_ptr, stride_a, stride_b, stride_g, stride_beta, first, o_t, o_hv,
    mask,
):  # fmt: skip
    """Tokens first + o_t and value heads o_hv, where mask."""
    b_a = tl.load(a_ptr + first * stride_a + o_t * stride_a + o_hv, mask=mask, other=0).to(tl.float32)
    b_b = tl.load(b_ptr + first * stride_b + o_t * stride_b + o_hv, mask=mask, other=0).to(tl.float32)
    b_log, b_bias = tl.load(A_log_ptr + o_hv, mask=mask, other=0), tl.load(dt_bias_ptr + o_hv, mask=mask, other=0)
    b_g = -tl.exp(b_log.to(tl.float32)) * softplus(b_a + b_bias.to(tl.float32))
    tl.store(g_ptr + first * stride_g + o_t * stride_g + o_hv, b_g, mask=mask)
    tl.store(beta_ptr + first * stride_beta + o_t * stride_beta + o_hv, tl.sigmoid(b_b), mask=mask)


# a, b and the index tensors may be slices that start anywhere: specialising on that would compile anew in mid-service
@triton.jit(
    do_not_specialize=["stride_indices", "num_seqs"],
    do_not_specialize_on_alignment=["a_ptr", "b_ptr", "indices_ptr", "has_initial_ptr", "cu_seqlens_ptr"],
)
def gdn_conv_prepare_kernel(
    mixed_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, weight_ptr, bias_ptr,
    conv_state_ptr, indices_ptr, has_initial_ptr, cu_seqlens_ptr, stride_mixed, stride_a, stride_b, stride_q, stride_k,
    stride_v, stride_g, stride_beta, stride_weight, stride_slot, stride_row, stride_channel, stride_indices, num_seqs,
    H: tl.constexpr, HV: tl.constexpr, GATES: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (T // BT + sequences) x blocks: of BC channels, query, key and value heads', then one for all gates. Those
    of the same tokens are side by side: what is open of the memory's pages is used up.

    GATES: HV rounded up to a power of two.
    """
    KEY_BLOCKS: tl.constexpr = (H * K + BC - 1) // BC
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (HV * V + BC - 1) // BC + 1
    i_n, i_c, first, left = chunk_of_program(cu_seqlens_ptr, tl.program_id(0) // BLOCKS, num_seqs, BT)
    if left <= 0:
        return
    i_block = tl.program_id(0) % BLOCKS
    if i_block == BLOCKS - 1:
        o_t, o_gate = tl.arange(0, BT)[:, None], tl.arange(0, GATES)[None, :]
        _store_gates(
            a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, g_ptr, beta_ptr, stride_a, stride_b, stride_g, stride_beta,
            first, o_t, o_gate, (o_t < left) & (o_gate < HV),
        )  # fmt: skip
        return
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    has_initial = tl.load(has_initial_ptr + i_n) != 0
    p_x, p_state = mixed_ptr + first * stride_mixed, conv_state_ptr + i_slot * stride_slot
    # what a branch on a run-time value binds has names of its own: one name cannot have two shapes after it
    if i_block < 2 * KEY_BLOCKS:
        o_h = i_block % KEY_BLOCKS * (BC // K) + tl.arange(0, BC // K)[:, None]
        o_key = o_h * K + tl.arange(0, K)[None, :]
        p_out, stride_out = q_ptr, stride_q
        if i_block >= KEY_BLOCKS:
            p_out, stride_out = k_ptr, stride_k
        convolve(
            p_x, weight_ptr, bias_ptr, p_state, p_out + first * stride_out + o_key, stride_mixed, stride_weight,
            stride_row, stride_channel, stride_out, i_block // KEY_BLOCKS * (H * K) + o_key,
            tl.broadcast_to(o_h < H, o_key.shape), left, i_c == 0, i_slot, has_initial, BT, HAS_BIAS, PACKED, L2NORM,
        )  # fmt: skip
    else:
        o_hv = (i_block - 2 * KEY_BLOCKS) * (BC // V) + tl.arange(0, BC // V)[:, None]
        o_v = o_hv * V + tl.arange(0, V)[None, :]
        convolve(
            p_x, weight_ptr, bias_ptr, p_state, v_ptr + first * stride_v + o_v, stride_mixed, stride_weight,
            stride_row, stride_channel, stride_v, 2 * H * K + o_v, tl.broadcast_to(o_hv < HV, o_v.shape),
            left, i_c == 0, i_slot, has_initial, BT, HAS_BIAS, PACKED, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["a_ptr", "b_ptr"])
def gdn_prepare_kernel(
    mixed_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr,
    stride_mixed, stride_a, stride_b, stride_q, stride_k, stride_v, stride_g, stride_beta, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BT), H + HV): program i < H of a row takes query and key head i, the others a value head."""
    first, o_t = tl.program_id(0).to(tl.int64) * BT, tl.arange(0, BT)
    m_t = o_t < tokens - first
    o_row = first + o_t[:, None]
    p_x = mixed_ptr + o_row * stride_mixed
    i_head = tl.program_id(1)
    if i_head < H:
        o_k = i_head * K + tl.arange(0, K)[None, :]
        b_q = tl.load(p_x + o_k, mask=m_t[:, None], other=0)
        b_k = tl.load(p_x + H * K + o_k, mask=m_t[:, None], other=0)
        if L2NORM:
            b_q = l2_normalise_rows(b_q).to(q_ptr.dtype.element_ty)
            b_k = l2_normalise_rows(b_k).to(k_ptr.dtype.element_ty)
        tl.store(q_ptr + o_row * stride_q + o_k, b_q, mask=m_t[:, None])
        tl.store(k_ptr + o_row * stride_k + o_k, b_k, mask=m_t[:, None])
    else:
        i_hv = i_head - H
        o_v = i_hv * V + tl.arange(0, V)[None, :]
        b_v = tl.load(p_x + 2 * H * K + o_v, mask=m_t[:, None], other=0)
        tl.store(v_ptr + o_row * stride_v + o_v, b_v, mask=m_t[:, None])
        _store_gates(
            a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, g_ptr, beta_ptr, stride_a, stride_b, stride_g, stride_beta,
            first, o_t, i_hv + tl.zeros_like(o_t), m_t,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def l2_normalise_kernel(
    x_ptr, out_ptr, stride_token, stride_head, rows, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """x [T, H, K] -> out [T, H, K] contiguous, each row normalised. Grid: (ceil(T H / BT),)."""
    o_r = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_r, o_k = (o_r < rows)[:, None], tl.arange(0, K)[None, :]
    p_x = x_ptr + (o_r // H * stride_token + o_r % H * stride_head)[:, None] + o_k
    b_x = l2_normalise_rows(tl.load(p_x, mask=m_r, other=0))
    tl.store(out_ptr + o_r[:, None] * K + o_k, b_x.to(out_ptr.dtype.element_ty), mask=m_r)
