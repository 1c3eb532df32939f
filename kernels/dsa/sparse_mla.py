"""Sparse MLA: attention of every query over its own list of cache entries, split over the list and merged.

    s[h, j] = sm_scale * q[t, h] . kv[slot(indices[t, j])];  out[t, h] = sum_j softmax(s)[h, j] * kv[...][:512]

| tensor | shape | dtype |
|---|---|---|
| q | [T, H, 576] = 512 latent, 64 rope | bf16 |
| kv_cache | [blocks, page, 576], or `fp8_ds_mla` [blocks, page, 656] = 512 e4m3, 4 f32 scales, 64 bf16 | bf16, u8 |
| indices | [T, K]: positions in request req_id[t] (mapped through block_table here), or slots | i32 |
| out, lse | [T, H, 512], [T, H] (base 2) | bf16, f32 |

A program owns one query, up to 64 heads (so that 64 x 512 float32 accumulators fit 512 TMEM columns or the register
file) and one stretch of the list; trailing padding of a stretch costs nothing. FP8 entries are rounded to bf16 after
scaling. With several stretches a second kernel merges the partial results in a fixed order. Invalid entries are masked
at the load: whatever their bytes hold (NaN too) is never multiplied. Bounds: KV bytes at small T, bf16 MMA at large T.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import SparseMlaConfig
from blackwell_kernels.dsa.layout import LATENT, ROPE, kv_cache_views


@triton.jit
def cache_position(index, req, table_ptr, stride_table, requests, table_pages, blocks, PAGE: tl.constexpr):
    """(valid, block, offset) of an index vector; block is int64 and both are 0 where invalid."""
    valid = index >= 0
    index = tl.maximum(index, 0)
    block = index // PAGE
    if table_ptr is not None:
        valid &= (block < table_pages) & (req >= 0) & (req < requests)
        block = tl.load(table_ptr + req.to(tl.int64) * stride_table + block, mask=valid, other=-1)
    valid &= (block >= 0) & (block < blocks)
    return valid, tl.where(valid, block, 0).to(tl.int64), tl.where(valid, index % PAGE, 0)


@triton.jit
def sparse_mla_kernel(
    q_ptr,
    latent_ptr,  # bf16 or e4m3 view of the cache
    scale_ptr,  # float32 view of the scales; None for a bf16 cache
    rope_ptr,  # bf16 view of the rope part
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
    head_blocks = tl.cdiv(heads, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    i_split = tl.program_id(1)
    o_h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    o_n, o_c, o_r = tl.arange(0, BLOCK_N), tl.arange(0, LATENT), tl.arange(0, ROPE)
    in_heads = o_h < heads
    p_q = q_ptr + t * stride_q_t + o_h.to(tl.int64)[:, None] * stride_q_h
    q = tl.load(p_q + o_c[None, :], mask=in_heads[:, None], other=0.0)
    q_rope = tl.load(p_q + LATENT + o_r[None, :], mask=in_heads[:, None], other=0.0)
    req = 0
    if block_table_ptr is not None:
        req = tl.load(req_id_ptr + t)

    # entries of this stretch, up to the last one that is not padding
    begin = i_split * stretch
    size = tl.minimum(stretch, topk - begin)
    p_indices = indices_ptr + t * stride_indices + begin
    o_s = tl.arange(0, STRETCH)
    used = tl.max(tl.where(tl.load(p_indices + o_s, mask=o_s < size, other=-1) >= 0, o_s + 1, 0))

    acc = tl.zeros((BLOCK_H, LATENT), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for i in range(0, used, BLOCK_N):
        index = tl.load(p_indices + i + o_n, mask=i + o_n < size, other=-1)
        valid, block, token = cache_position(
            index, req, block_table_ptr, stride_table, requests, table_pages, blocks, PAGE
        )
        p_latent = latent_ptr + block * stride_latent_block + token * stride_latent_token
        if scale_ptr is None:
            kv = tl.load(p_latent[:, None] + o_c[None, :], mask=valid[:, None], other=0.0)
        else:
            o_g = tl.arange(0, LATENT // 128)
            o_gc = o_g[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
            fp8 = tl.load(p_latent[:, None, None] + o_gc, mask=valid[:, None, None], other=0.0)
            p_scale = scale_ptr + block * stride_scale_block + token * stride_scale_token
            scale = tl.load(p_scale[:, None] + o_g[None, :], mask=valid[:, None], other=0.0)
            kv = (fp8.to(tl.float32) * scale[:, :, None]).to(tl.bfloat16).reshape(BLOCK_N, LATENT)
        p_rope = rope_ptr + block * stride_rope_block + token * stride_rope_token
        k_rope = tl.load(p_rope[:, None] + o_r[None, :], mask=valid[:, None], other=0.0)

        s = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q, tl.trans(kv))) * qk_scale
        s = tl.where(valid[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        # nothing valid yet: any finite reference keeps exp2 at 0 instead of NaN
        reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - reference[:, None])
        decay = tl.exp2(peak - reference)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(kv.dtype), kv, acc * decay[:, None])
        peak = new_peak

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    out = acc / total[:, None]
    p_out = out_ptr + t * stride_out_t + o_h.to(tl.int64)[:, None] * stride_out_h + i_split * stride_out_s
    tl.store(p_out + o_c[None, :], out.to(out_ptr.dtype.element_ty), mask=in_heads[:, None])
    if lse_ptr is not None:
        lse = tl.where(some, peak + tl.log2(total), float("-inf"))
        tl.store(lse_ptr + t * stride_lse_t + o_h * stride_lse_h + i_split * stride_lse_s, lse, mask=in_heads)


@triton.jit
def merge_kernel(
    part_ptr,  # [T, H, S, LATENT] f32
    part_lse_ptr,  # [T, H, S] f32
    out_ptr,
    lse_ptr,  # may be None
    heads,
    splits,
    stride_out_t,
    stride_out_h,
    stride_lse_t,
    stride_lse_h,
    SPLITS: tl.constexpr,
    LATENT: tl.constexpr,
):
    i_th = tl.program_id(0).to(tl.int64)
    t, h = i_th // heads, i_th % heads
    o_s, o_c = tl.arange(0, SPLITS), tl.arange(0, LATENT)
    part_lse = tl.load(part_lse_ptr + i_th * splits + o_s, mask=o_s < splits, other=float("-inf"))
    peak = tl.max(part_lse)
    some = peak > float("-inf")
    reference = tl.where(some, peak, 0.0)
    total = tl.where(some, tl.sum(tl.exp2(part_lse - reference)), 1.0)
    acc = tl.zeros((LATENT,), tl.float32)
    for i in range(splits):
        weight = tl.exp2(tl.load(part_lse_ptr + i_th * splits + i) - reference)
        acc += weight * tl.load(part_ptr + (i_th * splits + i) * LATENT + o_c)
    out = acc / total
    tl.store(out_ptr + t * stride_out_t + h * stride_out_h + o_c, out.to(out_ptr.dtype.element_ty))
    if lse_ptr is not None:
        lse = tl.where(some, reference + tl.log2(total), float("-inf"))
        tl.store(lse_ptr + t * stride_lse_t + h * stride_lse_h, lse)


def launch(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    config: SparseMlaConfig,
) -> None:
    """Launch over at least one token; arguments as checked by op.py."""
    tokens, heads, _ = q.shape
    topk = indices.shape[1]
    blocks, page, _ = kv_cache.shape
    latent, scales, rope = kv_cache_views(kv_cache)
    stretch = triton.cdiv(triton.cdiv(topk, config.splits), config.block_n) * config.block_n
    splits = triton.cdiv(topk, stretch)
    if splits == 1:
        part, part_lse = out, lse
        part_strides = (*out.stride()[:2], 0)
        lse_strides = (0, 0, 0) if lse is None else (*lse.stride(), 0)
    else:
        part = torch.empty(tokens, heads, splits, LATENT, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(tokens, heads, splits, dtype=torch.float32, device=q.device)
        part_strides, lse_strides = part.stride()[:3], part_lse.stride()
    requests, table_pages, stride_table = (0, 0, 0)
    if block_table is not None:
        requests, table_pages, stride_table = (*block_table.shape, block_table.stride(0))
    sparse_mla_kernel[(tokens * triton.cdiv(heads, config.block_h), splits)](
        q, latent, scales, rope, indices, req_id, block_table, part, part_lse,
        heads, topk, stretch, blocks, requests, table_pages, sm_scale * math.log2(math.e),
        q.stride(0), q.stride(1), latent.stride(0), latent.stride(1),
        0 if scales is None else scales.stride(0), 0 if scales is None else scales.stride(1),
        rope.stride(0), rope.stride(1), indices.stride(0), stride_table, *part_strides, *lse_strides,
        PAGE=page, BLOCK_H=config.block_h, BLOCK_N=config.block_n, STRETCH=triton.next_power_of_2(stretch),
        LATENT=LATENT, ROPE=ROPE, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(tokens * heads,)](
            part, part_lse, out, lse, heads, splits, *out.stride()[:2], *((0, 0) if lse is None else lse.stride()),
            SPLITS=triton.next_power_of_2(splits), LATENT=LATENT, num_warps=4,
        )  # fmt: skip
