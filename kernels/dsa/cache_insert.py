"""Writing and gathering the two caches: quantise-and-insert kernels and the page gather.

| kernel | reads | writes |
|---|---|---|
| indexer_k_insert | k [T, 128] | planar index page: 64 x 128 e4m3, then 64 f32 scales (power of two) |
| gather_indexer_k | index pages of B sequences | k [N, 128] e4m3, k_scale [N] f32 |
| kv_insert | kv_c [T, 512], k_pe [T, 64] | bf16 entry, or 512 e4m3, 4 f32 scales, 64 bf16 |

Slots < 0 are padding and write nothing; slots behind the cache write nothing either, since a kernel cannot raise.
All are bound by bytes. Rounding is bit for bit vLLM's: IEEE division, nearest even, saturation at 448.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.layout import LATENT, ROPE, indexer_cache_views, kv_cache_views


@triton.jit
def power_of_two_at_least(x):
    """Smallest power of two >= x, for positive normal float32 x: a non-zero mantissa carries into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & -0x800000).to(tl.float32, bitcast=True)


@triton.jit
def indexer_k_insert_kernel(
    k_ptr,
    values_ptr,
    scales_ptr,
    slots_ptr,
    tokens,
    n_slots,
    stride_k,
    stride_values_block,
    stride_scales_block,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    DIM: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, DIM)
    slot = tl.load(slots_ptr + t, mask=t < tokens, other=-1).to(tl.int64)
    # padding's rows too: they would wait for the slots first
    p_k = k_ptr + t.to(tl.int64)[:, None] * stride_k + o_d[None, :]
    k = tl.load(p_k, mask=(t < tokens)[:, None], other=0.0).to(tl.float32)
    write = (slot >= 0) & (slot < n_slots)
    slot = tl.where(write, slot, 0)
    amax = tl.maximum(tl.max(tl.abs(k), 1), 1e-4)
    scale = power_of_two_at_least(tl.div_rn(amax, 448.0))
    p_values = values_ptr + slot // PAGE * stride_values_block + slot % PAGE * DIM
    quantised = tl.div_rn(k, tl.broadcast_to(scale[:, None], BLOCK_T, DIM)).to(values_ptr.dtype.element_ty)
    tl.store(p_values[:, None] + o_d[None, :], quantised, mask=write[:, None])
    tl.store(scales_ptr + slot // PAGE * stride_scales_block + slot % PAGE, scale, mask=write)


@triton.jit
def gather_indexer_k_kernel(
    values_ptr,
    scales_ptr,
    block_table_ptr,
    cu_seq_lens_ptr,
    k_ptr,
    k_scale_ptr,
    batch,
    tokens,
    table_pages,
    blocks,
    stride_values_block,
    stride_scales_block,
    stride_table,
    stride_k,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_B: tl.constexpr,
    DIM: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, DIM)
    # the sequence of a token is the number of sequences that end at or before it
    seq = tl.zeros((BLOCK_T,), tl.int32)
    for b in range(0, batch, BLOCK_B):
        o_b = b + tl.arange(0, BLOCK_B)
        end = tl.load(cu_seq_lens_ptr + 1 + o_b, mask=o_b < batch, other=2147483647)
        seq += tl.sum((end[None, :] <= t[:, None]).to(tl.int32), 1)
    covered = (t < tokens) & (seq < batch)
    seq = tl.where(covered, seq, 0)
    position = t - tl.load(cu_seq_lens_ptr + seq)
    exists = covered & (position >= 0) & (position // PAGE < table_pages)
    p_table = block_table_ptr + seq.to(tl.int64) * stride_table + position // PAGE
    block = tl.load(p_table, mask=exists, other=-1)
    exists &= (block >= 0) & (block < blocks)
    block = tl.where(exists, block, 0).to(tl.int64)
    offset = tl.where(exists, position % PAGE, 0)
    p_values = values_ptr + block * stride_values_block + offset * DIM
    values = tl.load(p_values[:, None] + o_d[None, :], mask=exists[:, None], other=0)
    scale = tl.load(scales_ptr + block * stride_scales_block + offset, mask=exists, other=0.0)
    tl.store(k_ptr + t.to(tl.int64)[:, None] * stride_k + o_d[None, :], values, mask=covered[:, None])
    tl.store(k_scale_ptr + t, scale, mask=covered)


@triton.jit
def kv_insert_kernel(
    kv_c_ptr,
    k_pe_ptr,
    latent_ptr,
    scale_ptr,  # None for a bf16 cache
    rope_ptr,
    slots_ptr,
    n_slots,
    stride_kv_c,
    stride_k_pe,
    stride_latent_block,
    stride_latent_token,
    stride_scale_block,
    stride_scale_token,
    stride_rope_block,
    stride_rope_token,
    POWER_OF_TWO: tl.constexpr,
    PAGE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + t).to(tl.int64)
    if (slot >= 0) & (slot < n_slots):
        block, token = slot // PAGE, slot % PAGE
        o_g, o_c, o_r = tl.arange(0, LATENT // 128), tl.arange(0, 128), tl.arange(0, ROPE)
        o_gc = o_g[:, None] * 128 + o_c[None, :]
        latent = tl.load(kv_c_ptr + t * stride_kv_c + o_gc)
        p_latent = latent_ptr + block * stride_latent_block + token * stride_latent_token + o_gc
        if scale_ptr is None:
            tl.store(p_latent, latent.to(latent_ptr.dtype.element_ty))
        else:
            latent = latent.to(tl.float32)
            scale = tl.div_rn(tl.max(tl.abs(latent), 1), 448.0)
            if POWER_OF_TWO:
                scale = power_of_two_at_least(tl.maximum(scale, 1e-4))
            else:
                scale = tl.maximum(scale, 1.1754943508222875e-38)
            quantised = tl.div_rn(latent, tl.broadcast_to(scale[:, None], LATENT // 128, 128))
            tl.store(p_latent, quantised.to(latent_ptr.dtype.element_ty))
            tl.store(scale_ptr + block * stride_scale_block + token * stride_scale_token + o_g, scale)
        rope = tl.load(k_pe_ptr + t * stride_k_pe + o_r)
        p_rope = rope_ptr + block * stride_rope_block + token * stride_rope_token + o_r
        tl.store(p_rope, rope.to(rope_ptr.dtype.element_ty))


def launch_indexer_k_insert(k: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Launch over at least one token; arguments as checked by op.py."""
    values, scales = indexer_cache_views(k_cache)
    blocks, page, _ = k_cache.shape
    block_t = 16
    indexer_k_insert_kernel[(triton.cdiv(k.shape[0], block_t),)](
        k, values, scales, slot_mapping, k.shape[0], blocks * page, k.stride(0), values.stride(0), scales.stride(0),
        PAGE=page, BLOCK_T=block_t, DIM=k.shape[1], num_warps=4,
    )  # fmt: skip


def launch_gather_indexer_k(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
) -> None:
    """Launch over at least one token and one sequence; arguments as checked by op.py."""
    values, scales = indexer_cache_views(k_cache)
    blocks, page, _ = k_cache.shape
    tokens, dim = k.shape
    batch, table_pages = block_table.shape
    block_t = 64
    gather_indexer_k_kernel[(triton.cdiv(tokens, block_t),)](
        values.view(torch.uint8), scales, block_table, cu_seq_lens, k.view(torch.uint8), k_scale,
        batch, tokens, table_pages, blocks, values.stride(0), scales.stride(0), block_table.stride(0), k.stride(0),
        PAGE=page, BLOCK_T=block_t, BLOCK_B=min(128, triton.next_power_of_2(batch)), DIM=dim, num_warps=4,
    )  # fmt: skip


def launch_kv_insert(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, power_of_two_scale: bool
) -> None:
    """Launch over at least one token; arguments as checked by op.py."""
    latent, scales, rope = kv_cache_views(kv_cache)
    blocks, page, _ = kv_cache.shape
    kv_insert_kernel[(slot_mapping.shape[0],)](
        kv_c, k_pe, latent, scales, rope, slot_mapping, blocks * page, kv_c.stride(0), k_pe.stride(0),
        latent.stride(0), latent.stride(1),
        0 if scales is None else scales.stride(0), 0 if scales is None else scales.stride(1),
        rope.stride(0), rope.stride(1),
        POWER_OF_TWO=power_of_two_scale, PAGE=page, LATENT=LATENT, ROPE=ROPE, num_warps=4,
    )  # fmt: skip
