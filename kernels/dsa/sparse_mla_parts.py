"""Pieces shared by the sparse MLA kernels of both cache formats: index mapping, running softmax, log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def used_entries(p_indices, size, STRETCH: tl.constexpr):
    """How many entries of a list to look at: up to the last one that is not negative, so padding costs nothing."""
    o_s = tl.arange(0, STRETCH)
    return tl.max(tl.where(tl.load(p_indices + o_s, mask=o_s < size, other=-1) >= 0, o_s + 1, 0))


@triton.jit
def cache_position(index, req, table_ptr, stride_table, requests, table_pages, blocks, PAGE: tl.constexpr):
    """(valid, block, offset) of an index vector; block is int64 and both are 0 where invalid."""
    valid = index >= 0
    index = tl.maximum(index, 0)
    block = index // PAGE
    if table_ptr is not None:
        # an unknown request has no pages
        valid &= block < tl.where((req >= 0) & (req < requests), table_pages, 0)
        block = tl.load(table_ptr + req.to(tl.int64) * stride_table + block, mask=valid, other=-1)
    valid &= (block >= 0) & (block < blocks)
    return valid, tl.where(valid, block, 0).to(tl.int64), tl.where(valid, index % PAGE, 0)


@triton.jit
def softmax_step(s, valid, peak, total):
    """(p, decay, peak, total) after one more tile of base-2 scores s [H, N]; invalid columns count nothing."""
    s = tl.where(valid[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    # nothing valid yet: any finite reference keeps exp2 at 0 instead of NaN
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - reference[:, None])
    decay = tl.exp2(peak - reference)
    return p, decay, new_peak, total * decay + tl.sum(p, 1)


@triton.jit
def store_lse(p_lse, peak, total, mask):
    """Base-2 log-sum-exp; -inf where nothing was valid."""
    some = total > 0.0
    tl.store(p_lse, tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=mask)
