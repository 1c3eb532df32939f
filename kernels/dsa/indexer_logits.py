"""Indexer logits on FP8 tensor cores, ragged (prefill) and paged (decode) in one kernel.

    logits[m, n] = k_scale[n] * sum_h w[m, h] * relu(q[m, h] . k[n])        -inf outside row m's range

| tensor | shape | dtype |
|---|---|---|
| q | [rows, H, 128] | e4m3 |
| k | [N, 128] (ragged) or pages of `PAGE` keys (paged) | e4m3 |
| k_scale | [N], or behind the keys of a page | f32 |
| weights | [rows, H] | f32 |
| logits | [rows, columns] | f32 |

Keys are the MMA's M so that one row of the accumulator belongs to one key and the sum over heads stays in few threads.
A program keeps `BLOCK_N` keys and streams the query rows of its group past them: a group is the `next_n` queries of
one sequence (paged) or `group` neighbouring rows (ragged). Bounds: bytes of K when paged, FP8 MMA when ragged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import LogitsConfig
from blackwell_kernels.dsa.layout import indexer_cache_views


@triton.jit
def indexer_logits_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    weights_ptr,
    starts_ptr,  # None: every row starts at 0
    ends_ptr,
    block_table_ptr,  # None: keys are contiguous
    logits_ptr,
    rows,
    group,
    heads,
    columns,
    n_keys,  # keys that exist: N, or pages of the block table times PAGE
    n_pages,
    stride_q_row,
    stride_q_head,
    stride_k,  # from one key (ragged) or one page (paged) to the next
    stride_page_scale,
    stride_w,
    stride_end,
    stride_table,
    stride_logits,
    PAGE: tl.constexpr,
    PER_ROW_END: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
):
    tiles = tl.cdiv(columns, BLOCK_N)
    i_group = (tl.program_id(0) // tiles).to(tl.int64)
    i_tile = tl.program_id(0) % tiles
    row0 = i_group * group
    group_rows = tl.minimum(group, rows - row0).to(tl.int32)
    limit = tl.minimum(columns, n_keys)

    # the keys that any row of the group may see
    o_m = tl.arange(0, GROUP)
    in_group = o_m < group_rows
    if PER_ROW_END:
        ends = tl.load(ends_ptr + i_group * stride_end + o_m, mask=in_group, other=0)
    else:
        ends = tl.load(ends_ptr + i_group * stride_end) - group + 1 + o_m
    last = tl.minimum(tl.max(tl.where(in_group, ends, 0)), limit)
    first = 0
    if starts_ptr is not None:
        first = tl.maximum(tl.min(tl.load(starts_ptr + row0 + o_m, mask=in_group, other=2147483647)), 0)

    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, DIM)
    p_logits = logits_ptr + row0 * stride_logits + o_n
    if (i_tile * BLOCK_N < last) & ((i_tile + 1) * BLOCK_N > first):
        # keys behind the last one are read from the last one's place: unused bytes may hold anything
        key = tl.minimum(o_n, last - 1)
        exists = o_n < last
        if block_table_ptr is None:
            k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_k + o_d[None, :])
            k_scale = tl.load(k_scale_ptr + key)
        else:
            page = tl.load(block_table_ptr + i_group * stride_table + key // PAGE)
            exists &= (page >= 0) & (page < n_pages)
            page = tl.where((page >= 0) & (page < n_pages), page, 0).to(tl.int64)
            k = tl.load(k_ptr + (page * stride_k + key % PAGE * DIM)[:, None] + o_d[None, :])
            k_scale = tl.load(k_scale_ptr + page * stride_page_scale + key % PAGE)

        o_h = tl.arange(0, BLOCK_H)
        head = tl.minimum(o_h, heads - 1)
        for i in range(group_rows):
            row = row0 + i
            # [DIM, BLOCK_H]: the transposed view costs nothing, both operands stay K-major in shared memory
            q = tl.load(q_ptr + row * stride_q_row + head[None, :] * stride_q_head + o_d[:, None])
            w = tl.load(weights_ptr + row * stride_w + o_h, mask=o_h < heads, other=0.0)
            scores = tl.dot(k, q)
            s = tl.sum(tl.maximum(scores, 0.0) * w[None, :], 1) * k_scale
            if PER_ROW_END:
                end = tl.load(ends_ptr + i_group * stride_end + i)
            else:
                end = tl.load(ends_ptr + i_group * stride_end) - group + 1 + i
            seen = exists & (o_n < end)
            if starts_ptr is not None:
                seen &= o_n >= tl.load(starts_ptr + row)
            tl.store(p_logits + i * stride_logits, tl.where(seen, s, float("-inf")), mask=o_n < columns)
    else:
        nothing = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for i in range(group_rows):
            tl.store(p_logits + i * stride_logits, nothing, mask=o_n < columns)


def launch_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    logits: torch.Tensor,
    config: LogitsConfig,
) -> None:
    """Launch over contiguous keys; arguments as checked by op.py, at least one row and one key."""
    rows, heads, dim = q.shape
    columns = logits.shape[1]
    grid = (triton.cdiv(rows, config.group) * triton.cdiv(columns, config.block_n),)
    indexer_logits_kernel[grid](
        q, k, k_scale, weights, row_starts, row_ends, None, logits,
        rows, config.group, heads, columns, k.shape[0], 0,
        q.stride(0), q.stride(1), k.stride(0), 0, weights.stride(0), config.group, 0, logits.stride(0),
        PAGE=1, PER_ROW_END=True, GROUP=triton.next_power_of_2(config.group), BLOCK_N=config.block_n,
        BLOCK_H=max(16, triton.next_power_of_2(heads)), DIM=dim,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launch_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    config: LogitsConfig,
) -> None:
    """Launch over cache pages; arguments as checked by op.py, at least one sequence and one page."""
    batch, next_n, heads, dim = q.shape
    blocks, page, _ = k_cache.shape
    columns = logits.shape[1]
    per_row = context_lens.dim() == 2
    keys, scales = indexer_cache_views(k_cache)
    grid = (batch * triton.cdiv(columns, config.block_n),)
    indexer_logits_kernel[grid](
        q, keys, scales, weights, None, context_lens, block_table, logits,
        batch * next_n, next_n, heads, columns, block_table.shape[1] * page, blocks,
        q.stride(1), q.stride(2), keys.stride(0), scales.stride(0), weights.stride(0),
        context_lens.stride(0), block_table.stride(0), logits.stride(0),
        PAGE=page, PER_ROW_END=per_row, GROUP=triton.next_power_of_2(next_n), BLOCK_N=config.block_n,
        BLOCK_H=max(16, triton.next_power_of_2(heads)), DIM=dim,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
