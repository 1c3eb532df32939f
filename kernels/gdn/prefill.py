"""Chunked prefill in three launches. G: running sum of g in a chunk of 64 tokens; D_ij = exp(G_i - G_j), j <= i:

 chunks  (I + tril(beta_i D_ij k_i.k_j, -1))^-1 =: X;   w = X (beta exp(G) k),  u = X (beta v)     every chunk at once
 states  h_c <- S;   v' = u - w S^T;   S <- exp(G_last) S + (exp(G_last - G) v')^T k                chunk after chunk
 outputs o = scale (exp(G) q h_c^T + tril(D q k^T) v')                                             every chunk at once

q, k [T, H, K] | v, out [T, HV, V] bf16 | g, beta [T, HV] f32 | state [slots, HV, V, K] bf16 or f32
workspaces: G [T, HV] f32, w [T, HV, K] and u (then v') [T, HV, V] bf16, h [T // 64 + sequences, HV, V, K] bf16

Dots take bf16 operands and accumulate in fp32; X is computed in fp32 by substitution (its powers series cancels badly
for repeated keys), S lives in fp32. The grids depend on T and the number of sequences only: no copy of cu_seqlens to
the host. Bound: bytes for many sequences, the walk over the chunks for few.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import MIN_LOG_DECAY, chunk_of_program

CHUNK = tl.constexpr(64)


@triton.jit
def _take(b_x, INDEX: tl.constexpr, AXIS: tl.constexpr):
    """b_x[:, INDEX] or b_x[INDEX] of a tensor [P, 2, M, M] or [2, M, M]."""
    o = tl.arange(0, 2)
    if AXIS == 1:
        b_mask = (o == INDEX)[None, :, None, None]
    else:
        b_mask = (o == INDEX)[:, None, None]
    return tl.sum(tl.where(b_mask, b_x, 0.0), AXIS)


@triton.jit
def _stack_blocks(b_11, b_21, b_22, M: tl.constexpr):
    """[[b_11, 0], [b_21, b_22]] of [2, M, M] blocks -> [2, 2 M, 2 M]."""
    b_top = tl.reshape(tl.permute(tl.join(b_11, tl.zeros_like(b_11)), (0, 1, 3, 2)), (2, M, 2 * M))
    b_low = tl.reshape(tl.permute(tl.join(b_21, b_22), (0, 1, 3, 2)), (2, M, 2 * M))
    return tl.reshape(tl.permute(tl.join(b_top, b_low), (0, 3, 1, 2)), (2, 2 * M, 2 * M))


@triton.jit
def invert_unit_lower(b_a):
    """(I + b_a)^-1 in fp32, b_a [64, 64] strictly lower triangular: 16 x 16 blocks by substitution, then merged."""
    o_b, o = tl.arange(0, 4), tl.arange(0, 16)
    b_a4 = tl.reshape(b_a, (4, 16, 4, 16))
    m_diagonal = (o_b[:, None] == o_b[None, :])[:, None, :, None]
    b_d = tl.sum(tl.where(m_diagonal, b_a4, 0.0), 2)
    b_x = tl.zeros([4, 16, 16], tl.float32) + (o[:, None] == o[None, :]).to(tl.float32)[None, :, :]
    for j in range(0, 15):
        b_column = tl.sum(tl.where((o == j)[None, None, :], b_d, 0.0), 2)
        b_row = tl.sum(tl.where((o == j)[None, :, None], b_x, 0.0), 1)
        b_x -= b_column[:, :, None] * b_row[:, None, :]

    # [[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]: 16 -> 32 for both halves, then 32 -> 64
    m_below = ((o_b[:, None] == o_b[None, :] + 1) & (o_b[:, None] % 2 == 1))[:, None, :, None]
    b_below = tl.sum(tl.reshape(tl.sum(tl.where(m_below, b_a4, 0.0), 2), (2, 2, 16, 16)), 1)
    b_pairs = tl.reshape(b_x, (2, 2, 16, 16))
    b_p, b_q = _take(b_pairs, 0, 1), _take(b_pairs, 1, 1)
    b_y = -tl.dot(b_q, tl.dot(b_below, b_p, input_precision="ieee"), input_precision="ieee")
    b_halves = _stack_blocks(b_p, b_y, b_q, 16)

    o_2 = tl.arange(0, 2)
    m_below = ((o_2[:, None] == 1) & (o_2[None, :] == 0))[:, None, :, None]
    b_below = tl.sum(tl.sum(tl.where(m_below, tl.reshape(b_a, (2, 32, 2, 32)), 0.0), 2), 0)
    b_p, b_q = _take(b_halves, 0, 0), _take(b_halves, 1, 0)
    b_y = -tl.dot(b_q, tl.dot(b_below, b_p, input_precision="ieee"), input_precision="ieee")
    b_top = tl.reshape(tl.permute(tl.join(b_p, tl.zeros_like(b_p)), (0, 2, 1)), (32, 64))
    b_low = tl.reshape(tl.permute(tl.join(b_y, b_q), (0, 2, 1)), (32, 64))
    return tl.reshape(tl.permute(tl.join(b_top, b_low), (2, 0, 1)), (64, 64))


# slices of these start anywhere and counts vary: specialising on them would compile anew in mid-service
@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["g_ptr", "beta_ptr", "cu_seqlens_ptr"])
def gdn_prefill_chunks_kernel(
    k_ptr, v_ptr, g_ptr, beta_ptr, cu_seqlens_ptr, G_ptr, w_ptr, u_ptr,
    stride_k, stride_k_head, stride_v, stride_v_head, stride_g, stride_beta, num_seqs,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Grid: (T // 64 + sequences, HV)."""
    _, _, first, left = chunk_of_program(cu_seqlens_ptr, tl.program_id(0), num_seqs, CHUNK)
    if left <= 0:
        return
    i_hv = tl.program_id(1)
    i_h = i_hv // (HV // H)
    o_t, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, K), tl.arange(0, V)
    m_t = o_t < left
    o_row = (first + o_t).to(tl.int64)

    b_g = tl.load(g_ptr + o_row * stride_g + i_hv, mask=m_t, other=0)
    b_G = tl.cumsum(tl.where(b_g < MIN_LOG_DECAY, MIN_LOG_DECAY, b_g), 0)
    tl.store(G_ptr + o_row * HV + i_hv, b_G, mask=m_t)
    b_beta = tl.load(beta_ptr + o_row * stride_beta + i_hv, mask=m_t, other=0)

    p_k = k_ptr + o_row[:, None] * stride_k + i_h * stride_k_head + o_k[None, :]
    b_k = tl.load(p_k, mask=m_t[:, None], other=0)
    m_lower = o_t[:, None] > o_t[None, :]
    b_decay = tl.exp(tl.where(m_lower, b_G[:, None] - b_G[None, :], 0.0))
    b_a = tl.where(m_lower, tl.dot(b_k, tl.trans(b_k)) * b_decay * b_beta[:, None], 0.0)
    b_x = invert_unit_lower(b_a) * b_beta[None, :]

    # the factors of k and v go into X, so that k and v enter the dots unrounded
    b_v = tl.load(v_ptr + o_row[:, None] * stride_v + i_hv * stride_v_head + o_v[None, :], mask=m_t[:, None], other=0)
    b_u = tl.dot(b_x.to(b_v.dtype), b_v)
    p_u = u_ptr + (o_row[:, None] * HV + i_hv) * V + o_v[None, :]
    tl.store(p_u, b_u.to(u_ptr.dtype.element_ty), mask=m_t[:, None])
    # read again rather than held through the inversion, where registers are short
    b_k = tl.load(p_k, mask=m_t[:, None], other=0)
    b_w = tl.dot((b_x * tl.exp(b_G)[None, :]).to(b_k.dtype), b_k)
    p_w = w_ptr + (o_row[:, None] * HV + i_hv) * K + o_k[None, :]
    tl.store(p_w, b_w.to(w_ptr.dtype.element_ty), mask=m_t[:, None])


@triton.jit(
    do_not_specialize=["stride_indices"],
    do_not_specialize_on_alignment=["indices_ptr", "has_initial_ptr", "cu_seqlens_ptr"],
)
def gdn_prefill_states_kernel(
    k_ptr, G_ptr, w_ptr, u_ptr, h_ptr, state_ptr, indices_ptr, has_initial_ptr, cu_seqlens_ptr,
    stride_k, stride_k_head, stride_state, stride_indices,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences x HV, V / BV). Leaves v' where u was."""
    i_n, i_hv = (tl.program_id(0) // HV).to(tl.int64), tl.program_id(0) % HV
    i_h = i_hv // (HV // H)
    bos = tl.load(cu_seqlens_ptr + i_n).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + i_n + 1).to(tl.int64) - bos
    if length <= 0:
        return
    o_t, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, K), tl.program_id(1) * BV + tl.arange(0, BV)
    # S is held as [K, BV], which is how both dots want it
    o_s = i_hv * (V * K) + o_v[None, :] * K + o_k[:, None]
    i_slot = tl.load(indices_ptr + i_n * stride_indices).to(tl.int64)
    b_s = tl.zeros([K, BV], tl.float32)
    if (i_slot > 0) & (tl.load(has_initial_ptr + i_n) != 0):
        b_s += tl.load(state_ptr + i_slot * stride_state + o_s).to(tl.float32)

    p_h = h_ptr + ((bos - tl.load(cu_seqlens_ptr).to(tl.int64)) // CHUNK + i_n) * (HV * V * K) + o_s
    for i_t in tl.range(0, length, CHUNK, num_stages=STAGES):
        tl.store(p_h, b_s.to(h_ptr.dtype.element_ty))
        p_h += HV * V * K
        m_t = i_t + o_t < length
        o_row = bos + i_t + o_t
        b_w = tl.load(w_ptr + (o_row[:, None] * HV + i_hv) * K + o_k[None, :], mask=m_t[:, None], other=0)
        p_u = u_ptr + (o_row[:, None] * HV + i_hv) * V + o_v[None, :]
        b_u = tl.load(p_u, mask=m_t[:, None], other=0).to(tl.float32)
        b_u -= tl.dot(b_w, b_s.to(b_w.dtype))
        tl.store(p_u, b_u.to(u_ptr.dtype.element_ty), mask=m_t[:, None])

        i_last = tl.minimum(i_t + CHUNK, length) - 1
        G_last = tl.load(G_ptr + (bos + i_last) * HV + i_hv)
        b_G = tl.load(G_ptr + o_row * HV + i_hv, mask=m_t, other=0)
        b_u *= tl.where(m_t, tl.exp(G_last - b_G), 0.0)[:, None]
        p_k = k_ptr + o_row[None, :] * stride_k + i_h * stride_k_head + o_k[:, None]
        b_k = tl.load(p_k, mask=m_t[None, :], other=0)
        b_s = b_s * tl.exp(G_last) + tl.dot(b_k, b_u.to(b_k.dtype))
    if i_slot > 0:
        tl.store(state_ptr + i_slot * stride_state + o_s, b_s.to(state_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["cu_seqlens_ptr"])
def gdn_prefill_outputs_kernel(
    q_ptr, k_ptr, G_ptr, u_ptr, h_ptr, cu_seqlens_ptr, out_ptr, scale,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_out, stride_out_head, num_seqs,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid: (T // 64 + sequences, HV, V / BV)."""
    _, _, first, left = chunk_of_program(cu_seqlens_ptr, tl.program_id(0), num_seqs, CHUNK)
    if left <= 0:
        return
    i_hv = tl.program_id(1)
    i_h = i_hv // (HV // H)
    o_t, o_k, o_v = tl.arange(0, CHUNK), tl.arange(0, K), tl.program_id(2) * BV + tl.arange(0, BV)
    m_t = o_t < left
    o_row = (first + o_t).to(tl.int64)
    b_q = tl.load(q_ptr + o_row[:, None] * stride_q + i_h * stride_q_head + o_k[None, :], mask=m_t[:, None], other=0)
    p_k = k_ptr + o_row[None, :] * stride_k + i_h * stride_k_head + o_k[:, None]
    b_k = tl.load(p_k, mask=m_t[None, :], other=0)
    b_G = tl.load(G_ptr + o_row * HV + i_hv, mask=m_t, other=0)
    # chunk c of sequence n has row (cu[n] - cu[0]) // 64 + n + c of h, which is this program's own number
    o_h = (tl.program_id(0).to(tl.int64) * HV + i_hv) * (V * K)
    b_h = tl.load(h_ptr + o_h + o_v[None, :] * K + o_k[:, None])
    b_o = tl.dot(b_q, b_h.to(b_q.dtype)) * tl.exp(b_G)[:, None]
    m_causal = (o_t[:, None] >= o_t[None, :]) & m_t[:, None]
    b_decay = tl.exp(tl.where(m_causal, b_G[:, None] - b_G[None, :], 0.0))
    b_a = tl.where(m_causal, tl.dot(b_q, b_k) * b_decay, 0.0)
    b_u = tl.load(u_ptr + (o_row[:, None] * HV + i_hv) * V + o_v[None, :], mask=m_t[:, None], other=0)
    b_o += tl.dot(b_a.to(b_u.dtype), b_u)
    p_out = out_ptr + o_row[:, None] * stride_out + i_hv * stride_out_head + o_v[None, :]
    tl.store(p_out, (b_o * scale).to(out_ptr.dtype.element_ty), mask=m_t[:, None])
