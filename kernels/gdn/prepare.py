"""Between prefill's convolution and its recurrence: split the packed channels, L2-normalise q and k, compute the gates.

    g = -exp(A_log) softplus(a + dt_bias);   beta = sigmoid(b)
mixed_qkv [T, 2 H K + HV V] bf16 | a, b [T, HV] -> q, k [T, H, K], v [T, HV, V] bf16, g, beta [T, HV] f32. Bound: bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.gdn.primitives import softplus


@triton.jit
def _l2_normalise_rows(b_x):
    b_x = b_x.to(tl.float32)
    return b_x * (1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) + 1e-6))[:, None]


# a and b may be slices that start anywhere: specialising on that would compile anew in mid-service
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["a_ptr", "b_ptr"])
def gdn_prepare_kernel(
    mixed_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr,
    stride_mixed, stride_a, stride_b, stride_q, stride_k, stride_v, stride_g, stride_beta, tokens,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, L2NORM: tl.constexpr,
):  # fmt: skip
    """Grid: (ceil(T / BT), H + HV): program i < H of a row takes query and key head i, the others a value head."""
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < tokens
    p_x = mixed_ptr + o_t[:, None] * stride_mixed
    i_head = tl.program_id(1)
    if i_head < H:
        o_k = i_head * K + tl.arange(0, K)[None, :]
        b_q = tl.load(p_x + o_k, mask=m_t[:, None], other=0)
        b_k = tl.load(p_x + H * K + o_k, mask=m_t[:, None], other=0)
        if L2NORM:
            b_q = _l2_normalise_rows(b_q).to(q_ptr.dtype.element_ty)
            b_k = _l2_normalise_rows(b_k).to(k_ptr.dtype.element_ty)
        tl.store(q_ptr + o_t[:, None] * stride_q + o_k, b_q, mask=m_t[:, None])
        tl.store(k_ptr + o_t[:, None] * stride_k + o_k, b_k, mask=m_t[:, None])
    else:
        i_hv = i_head - H
        o_v = i_hv * V + tl.arange(0, V)[None, :]
        b_v = tl.load(p_x + 2 * H * K + o_v, mask=m_t[:, None], other=0)
        tl.store(v_ptr + o_t[:, None] * stride_v + o_v, b_v, mask=m_t[:, None])
        x = tl.load(a_ptr + o_t * stride_a + i_hv, mask=m_t, other=0).to(tl.float32)
        x += tl.load(dt_bias_ptr + i_hv).to(tl.float32)
        b_g = -tl.exp(tl.load(A_log_ptr + i_hv).to(tl.float32)) * softplus(x)
        b_beta = tl.sigmoid(tl.load(b_ptr + o_t * stride_b + i_hv, mask=m_t, other=0).to(tl.float32))
        tl.store(g_ptr + o_t * stride_g + i_hv, b_g, mask=m_t)
        tl.store(beta_ptr + o_t * stride_beta + i_hv, b_beta, mask=m_t)


@triton.jit(do_not_specialize=["rows"])
def l2_normalise_kernel(
    x_ptr, out_ptr, stride_token, stride_head, rows, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """x [T, H, K] -> out [T, H, K] contiguous, each row normalised. Grid: (ceil(T H / BT),)."""
    o_r = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_r, o_k = (o_r < rows)[:, None], tl.arange(0, K)[None, :]
    p_x = x_ptr + (o_r // H * stride_token + o_r % H * stride_head)[:, None] + o_k
    b_x = _l2_normalise_rows(tl.load(p_x, mask=m_r, other=0))
    tl.store(out_ptr + o_r[:, None] * K + o_k, b_x.to(out_ptr.dtype.element_ty), mask=m_r)
