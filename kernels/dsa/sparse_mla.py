"""Sparse MLA: attention of every query over its own list of cache entries, split over the list and merged.

    s[h, j] = sm_scale * q[t, h] . kv[slot(indices[t, j])];  out[t, h] = sum_j softmax(s)[h, j] * kv[...][:512]

| tensor | shape | dtype |
|---|---|---|
| q | [T, H, 576] = 512 latent, 64 rope | bf16 |
| kv_cache | [blocks, page, 576]; the `fp8_ds_mla` format has its own kernel in sparse_mla_fp8.py | bf16 |
| indices | [T, K]: positions in request req_id[t], mapped through block_table here, or slots | i32 |
| out, lse | [T, H, 512], [T, H] (base 2) | bf16, f32 |

A program owns one query, at most 64 heads (64 x 512 float32 accumulators are what 512 TMEM columns or the register
file hold) and one stretch of the list. With several stretches a second kernel merges their results in a fixed order.
Invalid entries are masked at the load: whatever their bytes hold (NaN too) is never multiplied.
Bounds: KV bytes at small T, bf16 MMA at large T.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import SparseMlaConfig
from blackwell_kernels.dsa.layout import LATENT, ROPE, kv_cache_views
from blackwell_kernels.dsa.sparse_mla_fp8 import sparse_mla_fp8_kernel
from blackwell_kernels.dsa.sparse_mla_parts import cache_position, softmax_step, store_lse, used_entries


@triton.jit
def sparse_mla_kernel(
    q_ptr,
    kv_ptr,
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
    stride_kv_block,
    stride_kv_token,
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

    begin = i_split * stretch
    size = tl.minimum(stretch, topk - begin)
    p_indices = indices_ptr + t * stride_indices + begin
    acc = tl.zeros((BLOCK_H, LATENT), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    for i in range(0, used_entries(p_indices, size, STRETCH), BLOCK_N):
        index = tl.load(p_indices + i + o_n, mask=i + o_n < size, other=-1)
        valid, block, token = cache_position(
            index, req, block_table_ptr, stride_table, requests, table_pages, blocks, PAGE
        )
        p_kv = (kv_ptr + block * stride_kv_block + token * stride_kv_token)[:, None]
        kv = tl.load(p_kv + o_c[None, :], mask=valid[:, None], other=0.0)
        k_rope = tl.load(p_kv + LATENT + o_r[None, :], mask=valid[:, None], other=0.0)
        s = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q, tl.trans(kv)))
        p, decay, peak, total = softmax_step(s * qk_scale, valid, peak, total)
        acc = tl.dot(p.to(kv.dtype), kv, acc * decay[:, None])

    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    p_out = out_ptr + t * stride_out_t + o_h.to(tl.int64)[:, None] * stride_out_h + i_split * stride_out_s
    tl.store(p_out + o_c[None, :], out.to(out_ptr.dtype.element_ty), mask=in_heads[:, None])
    if lse_ptr is not None:
        p_lse = lse_ptr + t * stride_lse_t + o_h * stride_lse_h + i_split * stride_lse_s
        store_lse(p_lse, peak, total, in_heads)


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
    reference = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(part_lse - reference))
    acc = tl.zeros((LATENT,), tl.float32)
    for i in range(splits):
        weight = tl.exp2(tl.load(part_lse_ptr + i_th * splits + i) - reference)
        acc += weight * tl.load(part_ptr + (i_th * splits + i) * LATENT + o_c)
    out = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + t * stride_out_t + h * stride_out_h + o_c, out.to(out_ptr.dtype.element_ty))
    if lse_ptr is not None:
        store_lse(lse_ptr + t * stride_lse_t + h * stride_lse_h, peak, total, True)


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
    """Launch over at least one token, either cache format; arguments as checked by op.py."""
    tokens, heads, _ = q.shape
    topk = indices.shape[1]
    blocks, page, _ = kv_cache.shape
    stretch = triton.cdiv(triton.cdiv(topk, config.splits), config.block_n) * config.block_n
    splits = triton.cdiv(topk, stretch)
    part, part_lse = out[:, :, None], None if lse is None else lse[:, :, None]
    if splits > 1:
        part = torch.empty(tokens, heads, splits, LATENT, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(tokens, heads, splits, dtype=torch.float32, device=q.device)
    requests, table_pages = (0, 0) if block_table is None else block_table.shape
    latent, scales, rope = kv_cache_views(kv_cache)
    cache = (kv_cache,) if scales is None else (latent, scales, rope)
    kernel = sparse_mla_kernel if scales is None else sparse_mla_fp8_kernel
    kernel[(tokens * triton.cdiv(heads, config.block_h), splits)](
        q, *cache, indices, req_id, block_table, part, part_lse,
        heads, topk, stretch, blocks, requests, table_pages, sm_scale * math.log2(math.e),
        q.stride(0), q.stride(1), *(stride for view in cache for stride in view.stride()[:2]),
        indices.stride(0), 0 if block_table is None else block_table.stride(0),
        *part.stride()[:3], *((0, 0, 0) if part_lse is None else part_lse.stride()),
        PAGE=page, BLOCK_H=config.block_h, BLOCK_N=config.block_n, STRETCH=triton.next_power_of_2(stretch),
        LATENT=LATENT, ROPE=ROPE, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(tokens * heads,)](
            part, part_lse, out, lse, heads, splits, *out.stride()[:2], *((0, 0) if lse is None else lse.stride()),
            SPLITS=triton.next_power_of_2(splits), LATENT=LATENT, num_warps=4,
        )  # fmt: skip
