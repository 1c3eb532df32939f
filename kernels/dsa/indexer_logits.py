"""Indexer logits on FP8 tensor cores: against contiguous keys (ragged: prefill), or pages of the cache (paged: decode).

    logits[m, n] = k_scale[n] * sum_h w[m, h] * relu(q[m, h] . k[n])        -inf outside row m's range, if asked for

| tensor | shape | dtype |
|---|---|---|
| q | [rows, H, 128] | e4m3 |
| k | [N, 128] (ragged) or pages of `PAGE` keys (paged) | e4m3 |
| k_scale | [N], or behind the keys of a page | f32 |
| weights | [rows, H] | f32 |
| logits | [rows, columns] | f32 |

Keys are the MMA's M so that one row of the accumulator belongs to one key and the sum over heads stays in few threads.
Ragged: a program keeps `BLOCK_N` keys and streams the query rows of its group past them; FP8 MMA bounds it.
Paged: a program keeps the queries of a sequence and streams its share of the pages past them, several of them in
flight; bytes of K bound it. The grid depends on neither lengths nor columns, so that rows which need no scores cost
no more than finding that out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blackwell_kernels.common import arch
from blackwell_kernels.dsa.config import LogitsConfig
from blackwell_kernels.dsa.layout import indexer_cache_views

CLEANED = tl.constexpr(1024)  # columns at a time


# rows and columns follow the step, and ranges are slices that start anywhere: specialising would compile anew
@triton.jit(do_not_specialize=["rows", "columns"], do_not_specialize_on_alignment=["starts_ptr", "ends_ptr"])
def indexer_logits_ragged_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    weights_ptr,
    starts_ptr,
    ends_ptr,
    logits_ptr,
    rows,
    heads,
    columns,
    stride_q_row,
    stride_q_head,
    stride_k,
    stride_w,
    stride_logits,
    CLEAN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
):
    tiles = tl.cdiv(columns, BLOCK_N)
    row0 = (tl.program_id(0) // tiles).to(tl.int64) * GROUP
    i_tile = tl.program_id(0) % tiles
    group_rows = tl.minimum(GROUP, rows - row0).to(tl.int32)

    # the keys that any row of the group may see
    o_m = tl.arange(0, GROUP)
    in_group = o_m < group_rows
    last = tl.minimum(tl.max(tl.load(ends_ptr + row0 + o_m, mask=in_group, other=0)), columns)
    first = tl.maximum(tl.min(tl.load(starts_ptr + row0 + o_m, mask=in_group, other=2147483647)), 0)

    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, DIM)
    p_logits = logits_ptr + row0 * stride_logits + o_n
    if (i_tile * BLOCK_N < last) & ((i_tile + 1) * BLOCK_N > first):
        # keys behind the last one are read from the last one's place: unused bytes may hold anything
        key = tl.minimum(o_n, last - 1)
        k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_k + o_d[None, :])
        k_scale = tl.load(k_scale_ptr + key)
        o_h = tl.arange(0, BLOCK_H)
        head = tl.minimum(o_h, heads - 1)
        for i in range(group_rows):
            row = row0 + i
            # [DIM, BLOCK_H]: the transposed view costs nothing, both operands stay K-major in shared memory
            q = tl.load(q_ptr + row * stride_q_row + head[None, :] * stride_q_head + o_d[:, None])
            w = tl.load(weights_ptr + row * stride_w + o_h, mask=o_h < heads, other=0.0)
            # asked for before the product, so that they arrive meanwhile
            start, end = tl.load(starts_ptr + row), tl.minimum(tl.load(ends_ptr + row), last)
            s = tl.sum(tl.maximum(tl.dot(k, q), 0.0) * w[None, :], 1) * k_scale
            seen = (o_n >= start) & (o_n < end)
            tl.store(p_logits + i * stride_logits, tl.where(seen, s, float("-inf")), mask=o_n < columns)
    elif CLEAN:
        nothing = tl.full((BLOCK_N,), float("-inf"), tl.float32)
        for i in range(group_rows):
            tl.store(p_logits + i * stride_logits, nothing, mask=o_n < columns)


@triton.jit
def _page(p_table, i, last, blocks, PAGE: tl.constexpr):
    """(place of the i-th page of a sequence with `last` keys, 0 if there is none; whether there is one)."""
    page = tl.load(p_table + i, mask=i * PAGE < last, other=-1)
    known = (page >= 0) & (page < blocks)
    return tl.where(known, page, 0).to(tl.int64), known


@triton.jit
def _places(first, first_known, second, second_known, o_n, TILE: tl.constexpr, PAGES: tl.constexpr):
    """(page, whether it is one) of every key of a tile; `TILE` places a page."""
    page, known = first + tl.zeros_like(o_n), first_known & (o_n >= 0)
    if PAGES == 2:
        page, known = tl.where(o_n < TILE, first, second), tl.where(o_n < TILE, first_known, second_known)
    return page, known


@triton.jit(do_not_specialize=["blocks"])
def indexer_logits_paged_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    weights_ptr,
    lens_ptr,
    block_table_ptr,
    logits_ptr,
    next_n,
    heads,
    columns,
    table_pages,
    blocks,
    unscored,  # rows of at most so many keys get no logits
    stride_q_row,
    stride_q_head,
    stride_k,  # from one page to the next
    stride_page_scale,
    stride_w,
    stride_lens,
    stride_table,
    stride_logits,
    CLEAN: tl.constexpr,
    LENS_PER_ROW: tl.constexpr,
    PAGE: tl.constexpr,
    PAGES: tl.constexpr,  # at a time: 1 or 2
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (sequences * ceil(next_n / GROUP), shares of a sequence's pages)."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    groups = tl.cdiv(next_n, GROUP)
    b = (tl.program_id(0) // groups).to(tl.int64)
    n = tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    in_group = n < next_n
    if LENS_PER_ROW:
        lens = tl.load(lens_ptr + b * stride_lens + n, mask=in_group, other=0)
    else:
        lens = tl.where(in_group, tl.load(lens_ptr + b * stride_lens) - next_n + 1 + n, 0)
    lens = tl.minimum(lens, tl.minimum(columns, table_pages * PAGE))
    last = tl.max(lens)
    if last <= unscored:
        last = 0
    pages = tl.cdiv(last, PAGE)
    share = tl.cdiv(tl.cdiv(pages, tl.num_programs(1)), PAGES) * PAGES
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, pages)

    # query rows of the group, one after another, are the MMA's N
    o_q, o_d, o_n = tl.arange(0, GROUP * BLOCK_H), tl.arange(0, DIM), tl.arange(0, BLOCK_N)
    q_n, head = tl.program_id(0) % groups * GROUP + o_q // BLOCK_H, o_q % BLOCK_H
    q_row = b * next_n + q_n
    exists = (q_n < next_n) & (head < heads)
    p_q = q_ptr + q_row * stride_q_row + head * stride_q_head
    q = tl.load(p_q[:, None] + o_d[None, :], mask=exists[:, None], other=0.0)
    w = tl.load(weights_ptr + q_row * stride_w + head, mask=exists, other=0.0)
    if CLEAN:
        nothing = tl.full((CLEANED,), float("-inf"), tl.float32)
        wiped = tl.cdiv(columns - pages * PAGE, tl.num_programs(1))
        first = pages * PAGE + tl.program_id(1) * wiped
        for g in tl.static_range(GROUP):
            row = b * next_n + tl.program_id(0) % groups * GROUP + g
            for i in range(first, tl.minimum(first + wiped, columns), CLEANED):
                column = i + tl.arange(0, CLEANED)
                mask = (column < tl.minimum(first + wiped, columns)) & (row < (b + 1) * next_n)
                tl.store(logits_ptr + row * stride_logits + column, nothing, mask=mask)
    if begin >= end:
        return
    p_table = block_table_ptr + b * stride_table
    p_logits = logits_ptr + (b * next_n + n)[None, :] * stride_logits

    # numbers and scales of pages are read one tile ahead: the loads of keys then follow no load the pipeline would wait
    # for, and scales, which the pipeline leaves alone since no MMA takes them, have an iteration's time to arrive. That
    # is a memory latency an iteration: two pages at a time halve it
    TILE: tl.constexpr = BLOCK_N // PAGES
    o_page = o_n % TILE
    in_page = o_page < PAGE
    first, first_known = _page(p_table, begin, last, blocks, PAGE)
    second, second_known = _page(p_table, begin + PAGES - 1, last, blocks, PAGE)
    page, known = _places(first, first_known, second, second_known, o_n, TILE, PAGES)
    k_scale = tl.load(k_scale_ptr + page * stride_page_scale + o_page, mask=known & in_page, other=0.0)
    for i in range(begin, end, PAGES):
        page, known = _places(first, first_known, second, second_known, o_n, TILE, PAGES)
        first, first_known = _page(p_table, i + PAGES, last, blocks, PAGE)
        second, second_known = _page(p_table, i + 2 * PAGES - 1, last, blocks, PAGE)
        following, follows = _places(first, first_known, second, second_known, o_n, TILE, PAGES)
        p_scale = k_scale_ptr + following * stride_page_scale + o_page
        next_scale = tl.load(p_scale, mask=follows & in_page, other=0.0)
        key = (i + o_n // TILE) * PAGE + o_page
        # bytes that belong to no key may hold anything
        read = known & in_page & (key < last)
        k = tl.load((k_ptr + page * stride_k + o_page * DIM)[:, None] + o_d[None, :], mask=read[:, None], other=0.0)
        weighted = tl.maximum(tl.dot(k, tl.trans(q)), 0.0) * w[None, :]
        s = tl.sum(tl.reshape(weighted, (BLOCK_N, GROUP, BLOCK_H)), 2) * k_scale[:, None]
        s = tl.where(known[:, None] & (key[:, None] < lens[None, :]), s, float("-inf"))
        fits = in_group[None, :] & in_page[:, None] & (key < columns)[:, None]
        tl.store(p_logits + key[:, None], s, mask=fits)
        k_scale = next_scale


def launch_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    logits: torch.Tensor,
    clean: bool,
    config: LogitsConfig,
) -> None:
    """Launch over contiguous keys; arguments as checked by op.py, at least one row and one key."""
    rows, heads, dim = q.shape
    columns = logits.shape[1]
    grid = (triton.cdiv(rows, config.group) * triton.cdiv(columns, config.block_n),)
    indexer_logits_ragged_kernel[grid](
        q, k, k_scale, weights, row_starts, row_ends, logits, rows, heads, columns,
        q.stride(0), q.stride(1), k.stride(0), weights.stride(0), logits.stride(0),
        CLEAN=clean, GROUP=config.group, BLOCK_N=config.block_n, BLOCK_H=max(16, triton.next_power_of_2(heads)),
        DIM=dim, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launch_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
    clean: bool,
    unscored: int,
    config: LogitsConfig,
) -> None:
    """Launch over cache pages; arguments as checked by op.py, at least one sequence and one page."""
    batch, next_n, heads, dim = q.shape
    blocks, page, _ = k_cache.shape
    keys, scales = indexer_cache_views(k_cache)
    block_h = max(16, triton.next_power_of_2(heads))
    # two rows of 64 heads are as many accumulators as leave room for other programs
    group = min(triton.next_power_of_2(next_n), max(1, 128 // block_h))
    pages = config.pages if group * block_h <= 64 else 1
    sequences = batch * triton.cdiv(next_n, group)
    shares = max(1, config.programs * arch.current_arch(q.device).sms // sequences)
    indexer_logits_paged_kernel[(sequences, shares)](
        q, keys, scales, weights, context_lens, block_table, logits,
        next_n, heads, logits.shape[1], block_table.shape[1], blocks, unscored,
        q.stride(1), q.stride(2), keys.stride(0), scales.stride(0), weights.stride(0),
        context_lens.stride(0), block_table.stride(0), logits.stride(0),
        CLEAN=clean, LENS_PER_ROW=context_lens.dim() == 2, PAGE=page, GROUP=group,
        PAGES=pages, BLOCK_N=pages * triton.next_power_of_2(page), BLOCK_H=block_h, DIM=dim,
        EARLY=config.early,
        num_warps=config.num_warps, num_stages=config.num_stages, launch_pdl=config.early,
    )  # fmt: skip
