"""The family in vectorised torch, fast enough to serve with: loops over sequences or chunks, never over tokens.

Float32 arithmetic; layouts, paddings and selection rules are those of reference.py. Arguments as checked by op.py.
Where a kernel could only ignore it, a value that cannot be right (a slot or page outside the cache, a length beyond
the block table) raises here.
"""

from __future__ import annotations

import itertools
import math

import torch

from blackwell_kernels.common.checks import require
from blackwell_kernels.common.fp8 import FP8_DTYPE, FP8_MAX, round_up_to_power_of_two
from blackwell_kernels.dsa.layout import KV_DIM, LATENT, LATENT_GROUP, indexer_cache_views, kv_cache_views

CHUNK_ELEMENTS = 1 << 24  # bounds the temporaries of one step (64 MiB of float32)


def _quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)


def _written_slots(
    op: str, slot_mapping: torch.Tensor, cache: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, blocks, offsets) of the slots that are not padding."""
    blocks, page = cache.shape[:2]
    tokens = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[tokens].long()
    largest = int(slots.max()) if slots.numel() else -1
    asked, allowed = f"slot {largest}", f"slots below {blocks * page} (or negative: padding)"
    require(largest < blocks * page, op, asked, allowed, "check slot_mapping against the cache")
    return tokens, slots // page, slots % page


def _pages(op: str, block_table: torch.Tensor, row: int, length: int, blocks: int, page: int) -> torch.Tensor:
    """The physical pages that hold the first `length` tokens of a sequence."""
    used = -(-length // page)
    limit = f"{block_table.shape[1] * page} tokens in block_table"
    require(used <= block_table.shape[1], op, f"length {length} in row {row}", limit, "pass a wider block_table")
    pages = block_table[row, :used].long()
    ok = used == 0 or (int(pages.min()) >= 0 and int(pages.max()) < blocks)
    require(ok, op, f"block_table row {row} = {pages.tolist()[:8]}", f"pages in [0, {blocks})", "check block_table")
    return pages


def indexer_k_insert(k: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    tokens, blocks, offsets = _written_slots("dsa_indexer_k_insert", slot_mapping, k_cache)
    values, scales = indexer_cache_views(k_cache)
    x = k[tokens].float()
    scale = round_up_to_power_of_two(x.abs().amax(-1).clamp(min=1e-4) / FP8_MAX)
    values.view(torch.uint8)[blocks, offsets] = _quantise(x, scale).view(torch.uint8)
    scales[blocks, offsets] = scale


def gather_indexer_k(
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
) -> None:
    values, scales = indexer_cache_views(k_cache)
    ends = cu_seq_lens.tolist()
    total = f"{ends[-1]} tokens in cu_seq_lens"
    require(ends[-1] <= k.shape[0], "dsa_gather_indexer_k", total, f"at most {k.shape[0]}", "pass larger outputs")
    for row, (start, end) in enumerate(itertools.pairwise(ends)):
        length = end - start
        pages = _pages("dsa_gather_indexer_k", block_table, row, length, *k_cache.shape[:2])
        k.view(torch.uint8)[start:end] = values.view(torch.uint8)[pages].flatten(0, 1)[:length]
        k_scale[start:end] = scales[pages].flatten()[:length]


def _logits(q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q [M, H, D] float32, k [N, D] float32, k_scale [N], weights [M, H] -> [M, N]."""
    scores = (q.flatten(0, 1) @ k.T).relu_().view(*q.shape[:2], -1)
    return torch.bmm(weights[:, None], scores)[:, 0] * k_scale


def indexer_logits_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    op = "dsa_indexer_logits_paged"
    batch, next_n = q.shape[:2]
    values, scales = indexer_cache_views(k_cache)
    if context_lens.dim() == 1:
        context_lens = context_lens[:, None] + torch.arange(1 - next_n, 1, dtype=context_lens.dtype)
    longest = int(context_lens.max())
    columns = logits.shape[1]
    require(longest <= columns, op, f"context length {longest}", f"at most {columns} columns", "pass wider logits")
    logits.fill_(-torch.inf)
    weights = weights.view(batch, next_n, -1).float()
    for b, lengths in enumerate(context_lens.tolist()):
        length = max(*lengths, 0)
        pages = _pages(op, block_table, b, length, *k_cache.shape[:2])
        if length:
            k = values.view(torch.uint8)[pages].flatten(0, 1)[:length].view(FP8_DTYPE).float()
            row = _logits(q[b].float(), k, scales[pages].flatten()[:length], weights[b])
            beyond = torch.arange(length) >= context_lens[b, :, None]
            logits[b * next_n : (b + 1) * next_n, :length] = row.masked_fill_(beyond, -torch.inf)


def indexer_logits_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    rows, heads, _ = q.shape
    column = torch.arange(k.shape[0])
    step = max(1, CHUNK_ELEMENTS // (heads * max(k.shape[0], 1)))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        # only the keys that some row of the chunk sees
        low, high = max(int(row_starts[part].min()), 0), min(int(row_ends[part].max()), k.shape[0])
        logits[part].fill_(-torch.inf)
        if low < high:
            keys = k[low:high].float()
            seen = (column[low:high] >= row_starts[part, None]) & (column[low:high] < row_ends[part, None])
            scores = _logits(q[part].float(), keys, k_scale[low:high], weights[part].float())
            logits[part, low:high] = scores.masked_fill_(~seen, -torch.inf)


def topk(logits: torch.Tensor, row_starts: torch.Tensor, row_ends: torch.Tensor, indices: torch.Tensor) -> None:
    rows, columns = logits.shape
    k = indices.shape[1]
    column = torch.arange(columns)
    step = max(1, CHUNK_ELEMENTS // (4 * max(columns, 1)))
    kept = min(k, columns)
    indices[:, kept:] = -1
    for first in range(0, rows, step):
        part = slice(first, first + step)
        scores = logits[part].contiguous()
        bits = scores.view(torch.int32)
        bits = bits.masked_fill(scores == 0, 0).masked_fill(scores.isnan(), -0x00800000)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # signed order is numeric order
        # one key a column, no two alike: the score, then the lower column
        keys = (order.long() << 32) + (0x7FFFFFFF - column)
        start = row_starts[part, None].clamp(0, columns)
        outside = (column < start) | (column >= row_ends[part, None])
        keys.masked_fill_(outside, torch.iinfo(torch.int64).min)
        best = keys.topk(kept, sorted=False)
        position = (best.indices - start).masked_fill_(best.values == torch.iinfo(torch.int64).min, columns)
        position = position.sort().values
        indices[part, :kept] = position.masked_fill_(position == columns, -1).to(torch.int32)


def kv_insert(
    kv_c: torch.Tensor, k_pe: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor, power_of_two: bool
) -> None:
    tokens, blocks, offsets = _written_slots("dsa_kv_insert", slot_mapping, kv_cache)
    latent, scales, rope = kv_cache_views(kv_cache)
    rope[blocks, offsets] = k_pe[tokens].to(rope.dtype)
    if scales is None:
        latent[blocks, offsets] = kv_c[tokens].to(latent.dtype)
        return
    groups = kv_c[tokens].float().unflatten(-1, (-1, LATENT_GROUP))
    scale = groups.abs().amax(-1) / FP8_MAX
    if power_of_two:
        scale = round_up_to_power_of_two(scale.clamp(min=1e-4))
    else:
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    latent.view(torch.uint8)[blocks, offsets] = _quantise(groups, scale).flatten(1).view(torch.uint8)
    scales[blocks, offsets] = scale


def _values(entries: torch.Tensor) -> torch.Tensor:
    """Cache entries [..., 576] bf16 or [..., 656] uint8 as float32 [..., 576]."""
    latent, scales, rope = kv_cache_views(entries)
    if scales is None:
        return entries.float()
    groups = latent.float().unflatten(-1, (-1, LATENT_GROUP)) * scales[..., None]
    return torch.cat([groups.flatten(-2), rope.float()], -1)


def sparse_mla(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    block_table: torch.Tensor | None,
    sm_scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    blocks, page = kv_cache.shape[:2]
    step = max(1, CHUNK_ELEMENTS // (indices.shape[1] * KV_DIM))
    for first in range(0, q.shape[0], step):
        part = slice(first, first + step)
        # trailing padding is dropped: short contexts do not pay for the full list
        used = (indices[part] >= 0).any(0).nonzero()
        index = indices[part, : int(used[-1]) + 1 if used.numel() else 1].long()
        valid = index >= 0
        block = index // page
        if req_id is not None and block_table is not None:
            requests, table_pages = block_table.shape
            req = req_id[part, None].long()
            valid &= (block < table_pages) & (req >= 0) & (req < requests)
            req, block = req.expand_as(index).where(valid, 0), block.where(valid, 0)
            block = block_table[req, block].long() if block_table.numel() else block
        valid &= (block >= 0) & (block < blocks)
        entries = kv_cache[block.where(valid, 0), (index % page).where(valid, 0)]
        if not valid.all():
            # an entry of zero bytes is 0 in either format; what lies in unselected slots may be NaN
            entries.masked_fill_(~valid[..., None], 0)
        kv = _values(entries)
        scores = torch.bmm(q[part].float(), kv.mT).mul_(sm_scale).masked_fill_(~valid[:, None], -torch.inf)
        none = ~valid.any(1)
        if lse is not None:
            lse[part] = torch.logsumexp(scores, -1) / math.log(2.0)
        p = scores.softmax(-1).masked_fill_(none[:, None, None], 0.0)
        out[part] = torch.bmm(p, kv[..., :LATENT]).to(out.dtype)
