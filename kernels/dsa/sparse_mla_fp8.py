"""Sparse MLA over an `fp8_ds_mla` cache: 512 e4m3 in four groups of 128, a float32 scale each, then 64 bf16 rope.

The same attention, arguments and grid as sparse_mla.py. e4m3 is exact in bf16, so entries are only converted; a
group's scale goes on its share of the scores, and on the probabilities before they meet the group again. That is
fewer multiplications than scaling the entries, and no rounding of them. Groups are separate tiles: one group's worth
of converted values is live at a time, which is what keeps 64 heads in registers on sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.dsa.sparse_mla_parts import cache_position, softmax_step, store_lse, used_entries


@triton.jit
def store_group(p_out, acc, total, mask):
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(p_out, out.to(p_out.dtype.element_ty), mask=mask)


@triton.jit
def weigh(acc, p, scale, kv, decay):
    """One more tile of values in a group's accumulator."""
    return tl.dot((p * scale[None, :]).to(tl.bfloat16), kv, acc * decay[:, None])


@triton.jit
def sparse_mla_fp8_kernel(
    q_ptr,
    latent_ptr,  # e4m3, float32 and bf16 views of the same cache
    scale_ptr,
    rope_ptr,
    indices_ptr,
    req_id_ptr,
    block_table_ptr,  # None: indices are slots
    out_ptr,
    lse_ptr,  # may be None
    heads,
    topk,
    stretch,  # entries of the list per program
    blocks,
    requests,
    table_pages,
    qk_scale,  # sm_scale * log2(e)
    stride_q_t,
    stride_q_h,
    stride_latent_block,
    stride_latent_token,
    stride_scale_block,
    stride_scale_token,
    stride_rope_block,
    stride_rope_token,
    stride_indices,
    stride_table,
    stride_out_t,
    stride_out_h,
    stride_out_s,
    stride_lse_t,
    stride_lse_h,
    stride_lse_s,
    PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRETCH: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
):
    GROUP: tl.constexpr = LATENT // 4
    head_blocks = tl.cdiv(heads, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    i_split = tl.program_id(1)
    o_h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    o_n, o_c, o_r = tl.arange(0, BLOCK_N), tl.arange(0, GROUP), tl.arange(0, ROPE)
    in_heads = o_h[:, None] < heads
    p_q = q_ptr + t * stride_q_t + o_h.to(tl.int64)[:, None] * stride_q_h
    q0 = tl.load(p_q + o_c[None, :], mask=in_heads, other=0.0)
    q1 = tl.load(p_q + GROUP + o_c[None, :], mask=in_heads, other=0.0)
    q2 = tl.load(p_q + 2 * GROUP + o_c[None, :], mask=in_heads, other=0.0)
    q3 = tl.load(p_q + 3 * GROUP + o_c[None, :], mask=in_heads, other=0.0)
    q_rope = tl.load(p_q + LATENT + o_r[None, :], mask=in_heads, other=0.0)
    req = 0
    if block_table_ptr is not None:
        req = tl.load(req_id_ptr + t)

    begin = i_split * stretch
    size = tl.minimum(stretch, topk - begin)
    p_indices = indices_ptr + t * stride_indices + begin
    acc0 = tl.zeros((BLOCK_H, GROUP), tl.float32)
    acc1 = tl.zeros((BLOCK_H, GROUP), tl.float32)
    acc2 = tl.zeros((BLOCK_H, GROUP), tl.float32)
    acc3 = tl.zeros((BLOCK_H, GROUP), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for i in range(0, used_entries(p_indices, size, STRETCH), BLOCK_N):
        index = tl.load(p_indices + i + o_n, mask=i + o_n < size, other=-1)
        valid, block, token = cache_position(
            index, req, block_table_ptr, stride_table, requests, table_pages, blocks, PAGE
        )
        exists = valid[:, None]
        p_kv = (latent_ptr + block * stride_latent_block + token * stride_latent_token)[:, None] + o_c[None, :]
        p_rope = (rope_ptr + block * stride_rope_block + token * stride_rope_token)[:, None] + o_r[None, :]
        rope = tl.load(p_rope, mask=exists, other=0.0)
        kv0 = tl.load(p_kv, mask=exists, other=0.0).to(tl.bfloat16)
        kv1 = tl.load(p_kv + GROUP, mask=exists, other=0.0).to(tl.bfloat16)
        kv2 = tl.load(p_kv + 2 * GROUP, mask=exists, other=0.0).to(tl.bfloat16)
        kv3 = tl.load(p_kv + 3 * GROUP, mask=exists, other=0.0).to(tl.bfloat16)
        p_scale = scale_ptr + block * stride_scale_block + token * stride_scale_token
        scale0 = tl.load(p_scale, mask=valid, other=0.0)
        scale1 = tl.load(p_scale + 1, mask=valid, other=0.0)
        scale2 = tl.load(p_scale + 2, mask=valid, other=0.0)
        scale3 = tl.load(p_scale + 3, mask=valid, other=0.0)
        s = tl.dot(q_rope, tl.trans(rope))
        s += tl.dot(q0, tl.trans(kv0)) * scale0[None, :]
        s += tl.dot(q1, tl.trans(kv1)) * scale1[None, :]
        s += tl.dot(q2, tl.trans(kv2)) * scale2[None, :]
        s += tl.dot(q3, tl.trans(kv3)) * scale3[None, :]
        p, decay, peak, total = softmax_step(s * qk_scale, valid, peak, total)
        acc0 = weigh(acc0, p, scale0, kv0, decay)
        acc1 = weigh(acc1, p, scale1, kv1, decay)
        acc2 = weigh(acc2, p, scale2, kv2, decay)
        acc3 = weigh(acc3, p, scale3, kv3, decay)

    p_out = out_ptr + t * stride_out_t + i_split * stride_out_s
    p_out += o_h.to(tl.int64)[:, None] * stride_out_h + o_c[None, :]
    store_group(p_out, acc0, total, in_heads)
    store_group(p_out + GROUP, acc1, total, in_heads)
    store_group(p_out + 2 * GROUP, acc2, total, in_heads)
    store_group(p_out + 3 * GROUP, acc3, total, in_heads)
    if lse_ptr is not None:
        p_lse = lse_ptr + t * stride_lse_t + o_h * stride_lse_h + i_split * stride_lse_s
        store_lse(p_lse, peak, total, o_h < heads)
