"""Sparse MLA: attention of every query over its own list of cache entries, split over the list and merged.

    s[h, j] = sm_scale * q[t, h] . kv[slot(indices[t, j])];  out[t, h] = sum_j softmax(s)[h, j] * kv[...][:512]

| tensor | shape | dtype |
|---|---|---|
| q | [T, H, 576] = 512 latent, 64 rope | bf16 |
| kv_cache | [blocks, page, 576], or `fp8_ds_mla` [blocks, page, 656], see layout.py | bf16, uint8 |
| indices | [T, K]: positions in request req_id[t], mapped through block_table here, or slots | i32 |
| out, lse | [T, H, 512], [T, H] (base 2) | bf16, f32 |

A program owns one query, at most 64 heads (64 x 512 float32 accumulators are what 512 TMEM columns or the register
file hold) and one stretch of the list. It maps its stretch at once, before the loop: the loop's loads then depend on
one number each, and the tile after the next is copied while this one is computed with. With several stretches a second
kernel merges their results in a fixed order. e4m3 entries are scaled and rounded to bf16, exactly so where scales are
powers of two, and meet the same MMAs.
Invalid entries are masked at the load: whatever their bytes hold (NaN too) is never multiplied.

64 heads are rows for one warpgroup, and of two Triton has each compute all scores of a tile, in narrow instructions,
when it sees their product reach another one. `divided` hides that behind branches which are always taken and which LLVM
removes: each warpgroup scores half of the entries. Such branches also hold the products together, so that the copy of
the next tile starts in front of them and two tiles on chip suffice.
Bounds: KV bytes at small T, bf16 MMA at large T.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import SparseMlaConfig
from blackwell_kernels.dsa.layout import LATENT, ROPE, kv_cache_views
from blackwell_kernels.dsa.sparse_mla_columns import sparse_mla_columns_kernel
from blackwell_kernels.dsa.sparse_mla_steps import UNIT, divided_softmax_step, map_entries, softmax_step, store_lse

MAPPED_TOGETHER = 2048  # entries of a list
MERGED_TOGETHER = 8192  # float32 that a program of the merge holds


@triton.jit
def load_latent(latent_ptr, scale_ptr, unit, valid, BLOCK_N: tl.constexpr, LATENT: tl.constexpr):
    """bf16 [BLOCK_N, LATENT] of the entries at multiples `unit` of 16 bytes."""
    if scale_ptr is None:
        p_latent = (latent_ptr + unit * (UNIT // 2))[:, None] + tl.arange(0, LATENT)[None, :]
        latent = tl.load(p_latent, mask=valid[:, None], other=0.0)
    else:
        GROUP: tl.constexpr = 128
        o_g, o_c = tl.arange(0, LATENT // GROUP), tl.arange(0, GROUP)
        p_latent = (latent_ptr + unit * UNIT)[:, None, None] + (o_g[:, None] * GROUP + o_c[None, :])[None, :, :]
        latent = tl.load(p_latent, mask=valid[:, None, None], other=0.0).to(tl.float32)
        scale = tl.load((scale_ptr + unit * (UNIT // 4))[:, None] + o_g[None, :], mask=valid[:, None], other=0.0)
        latent = tl.reshape((latent * scale[:, :, None]).to(tl.bfloat16), (BLOCK_N, LATENT))
    return latent


# requests and caches come and go, and slices of a step's tables start anywhere: specialising would compile anew
@triton.jit(do_not_specialize=["blocks", "requests"], do_not_specialize_on_alignment=["req_id_ptr", "block_table_ptr"])
def sparse_mla_kernel(
    q_ptr,
    latent_ptr,  # bf16 or e4m3, float32 and bf16 views of the same cache
    scale_ptr,  # None for a bf16 cache
    rope_ptr,
    indices_ptr,
    req_id_ptr,
    block_table_ptr,  # None: indices are slots
    places_ptr,  # [T, K] i32 or i64, scratch
    out_ptr,
    lse_ptr,
    heads,
    topk,
    stretch,  # entries of the list per program
    blocks,
    requests,
    table_pages,
    qk_scale,  # sm_scale * log2(e)
    stride_q_t,
    stride_q_h,
    stride_block,  # from one page to the next, in UNITs
    stride_indices,
    stride_table,
    stride_out_t,
    stride_out_h,
    stride_out_s,
    stride_lse_t,
    stride_lse_h,
    stride_lse_s,
    PAGE: tl.constexpr,
    ENTRY: tl.constexpr,  # UNITs in an entry
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    AHEAD: tl.constexpr = None,  # tiles on chip where warpgroups divide a tile's scores
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # the merge gets ready, and waits until this grid has ended
    if EARLY:
        tl.extra.cuda.gdc_wait()
    head_blocks = tl.cdiv(heads, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    i_split = tl.program_id(1)
    begin = i_split * stretch
    size = tl.minimum(stretch, topk - begin)
    req = 0
    if block_table_ptr is not None:
        req = tl.load(req_id_ptr + t)

    o_h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    o_n, o_c, o_r = tl.arange(0, BLOCK_N), tl.arange(0, LATENT), tl.arange(0, ROPE)
    in_heads = o_h < heads
    p_q = q_ptr + t * stride_q_t + o_h.to(tl.int64)[:, None] * stride_q_h
    q = tl.load(p_q + o_c[None, :], mask=in_heads[:, None], other=0.0)
    q_rope = tl.load(p_q + LATENT + o_r[None, :], mask=in_heads[:, None], other=0.0)
    p_places = places_ptr + t * topk + begin  # every block of heads writes the same
    used = map_entries(
        indices_ptr + t * stride_indices + begin, p_places, size, req, block_table_ptr, stride_table, requests,
        table_pages, blocks, stride_block, PAGE, ENTRY, TOGETHER, ONCE,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_H, LATENT), tl.float32)
    total = tl.zeros((BLOCK_H,) if AHEAD is None else (BLOCK_H, 2, 4), tl.float32)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    tl.debug_barrier()  # threads read places that others wrote
    # places are read one tile ahead: the loads of entries then follow no load that the pipeline would have to wait for
    place = tl.load(p_places + o_n, mask=o_n < size, other=-1)
    for i in tl.range(0, used, BLOCK_N, num_stages=AHEAD):
        valid = place >= 0
        unit = place.to(tl.int64)
        kv = load_latent(latent_ptr, scale_ptr, unit, valid, BLOCK_N, LATENT)
        k_rope = tl.load((rope_ptr + unit * (UNIT // 2))[:, None] + o_r[None, :], mask=valid[:, None], other=0.0)
        if AHEAD is None:
            s = tl.dot(q_rope, tl.trans(k_rope), tl.dot(q, tl.trans(kv)))
            p, decay, peak, total = softmax_step(s * qk_scale, valid, peak, total)
            acc = tl.dot(p.to(tl.bfloat16), kv, acc * decay[:, None])
        else:
            keys, keys_rope = tl.trans(kv), tl.trans(k_rope)
            if i < used:  # always; conditions differ lest they be merged
                s = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
                if used > 0:
                    s = tl.dot(q_rope, keys_rope)
                if used >= 1:
                    s = tl.dot(q, keys, s)
                p, decay, peak, total = divided_softmax_step(s * qk_scale, valid, peak, total, BLOCK_H, BLOCK_N)
                acc = tl.dot(p.to(tl.bfloat16), kv, acc * decay[:, None])
        following = i + BLOCK_N + o_n
        place = tl.load(p_places + following, mask=following < size, other=-1)

    if AHEAD is not None:
        total = tl.sum(tl.sum(total, 2), 1)
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    p_out = out_ptr + t * stride_out_t + o_h.to(tl.int64)[:, None] * stride_out_h + i_split * stride_out_s
    tl.store(p_out + o_c[None, :], out.to(out_ptr.dtype.element_ty), mask=in_heads[:, None])
    p_lse = lse_ptr + t * stride_lse_t + o_h * stride_lse_h + i_split * stride_lse_s
    store_lse(p_lse, peak, total, in_heads)


@triton.jit
def merge_kernel(
    part_ptr,  # [T, H, S, LATENT] f32 or bf16
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
    BLOCK_C: tl.constexpr,
    LATENT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T * H, LATENT / BLOCK_C): every load of a program is in flight at once."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_th = tl.program_id(0).to(tl.int64)
    t, h = i_th // heads, i_th % heads
    o_s, o_c = tl.arange(0, SPLITS), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = o_s < splits
    part_lse = tl.load(part_lse_ptr + i_th * splits + o_s, mask=exists, other=float("-inf"))
    p_part = part_ptr + (i_th * splits + o_s)[:, None] * LATENT + o_c[None, :]
    part = tl.load(p_part, mask=exists[:, None], other=0.0).to(tl.float32)
    peak = tl.max(part_lse)
    weight = tl.exp2(part_lse - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weight)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + t * stride_out_t + h * stride_out_h + o_c, out.to(out_ptr.dtype.element_ty))
    if lse_ptr is not None:
        store_lse(lse_ptr + t * stride_lse_t + h * stride_lse_h, peak, total, tl.program_id(1) == 0)


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
    blocks, page, width = kv_cache.shape
    stretch = triton.cdiv(triton.cdiv(topk, config.splits), config.block_n) * config.block_n
    splits = triton.cdiv(topk, stretch)
    pdl = config.pdl and splits > 1
    part, part_lse = out[:, :, None], None if lse is None else lse[:, :, None]
    if splits > 1:
        dtype = torch.bfloat16 if config.bf16_parts else torch.float32
        part = torch.empty(tokens, heads, splits, LATENT, dtype=dtype, device=q.device)
    if splits > 1 or part_lse is None:
        part_lse = torch.empty(tokens, heads, splits, dtype=torch.float32, device=q.device)
    requests, table_pages = (0, 0) if block_table is None else block_table.shape
    entry_bytes, unit = kv_cache.element_size(), UNIT.value
    stride_block = kv_cache.stride(0) * entry_bytes // unit
    place = torch.int32 if blocks * stride_block < 2**31 else torch.int64
    latent, scale, rope = kv_cache_views(kv_cache)
    together = min(MAPPED_TOGETHER, triton.next_power_of_2(stretch))
    options: dict[str, Any] = {}
    kernel = sparse_mla_kernel
    if config.by_columns:
        kernel = sparse_mla_columns_kernel
        latent = latent if scale is None else latent.view(torch.int16)
        options = {"PACKED": not triton.knobs.runtime.interpret}
    elif config.divided:
        options = {"AHEAD": config.num_stages}
    kernel[(tokens * triton.cdiv(heads, config.block_h), splits)](
        q, latent, scale, rope, indices, req_id, block_table,
        torch.empty(tokens, topk, dtype=place, device=q.device), part, part_lse,
        heads, topk, stretch, blocks, requests, table_pages, sm_scale * math.log2(math.e),
        q.stride(0), q.stride(1), stride_block,
        indices.stride(0), 0 if block_table is None else block_table.stride(0),
        *part.stride()[:3], *part_lse.stride(),
        PAGE=page, ENTRY=width * entry_bytes // unit, BLOCK_H=config.block_h, BLOCK_N=config.block_n,
        LATENT=LATENT, ROPE=ROPE, TOGETHER=together, ONCE=stretch <= together, PDL=pdl, EARLY=config.early, **options,
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.registers or None,
        launch_pdl=config.early,
    )  # fmt: skip
    if splits > 1:
        columns = min(LATENT, MERGED_TOGETHER // triton.next_power_of_2(splits))
        merge_kernel[(tokens * heads, LATENT // columns)](
            part, part_lse, out, lse, heads, splits, *out.stride()[:2], *((0, 0) if lse is None else lse.stride()),
            SPLITS=triton.next_power_of_2(splits), BLOCK_C=columns, LATENT=LATENT, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
