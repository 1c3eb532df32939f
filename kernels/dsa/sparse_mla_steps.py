"""What the sparse MLA kernels do alike: find the entries of a list, one step of the softmax, store its normaliser."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT = tl.constexpr(16)  # bytes: entries and pages start at multiples, so loads of 16 bytes need no run-time knowledge


@triton.jit
def _map_some(
    p_indices, p_places, o, size, req, table_ptr, stride_table, requests, table_pages, blocks, stride_block,
    PAGE: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    index = tl.load(p_indices + o, mask=o < size, other=-1)
    valid = index >= 0
    index = tl.maximum(index, 0)
    block = index // PAGE
    if table_ptr is not None:
        # an unknown request has no pages
        valid &= block < tl.where((req >= 0) & (req < requests), table_pages, 0)
        block = tl.load(table_ptr + req.to(tl.int64) * stride_table + block, mask=valid, other=-1)
    valid &= (block >= 0) & (block < blocks)
    place = block.to(p_places.dtype.element_ty) * stride_block + index % PAGE * ENTRY
    tl.store(p_places + o, tl.where(valid, place, -1), mask=o < size)
    return tl.max(tl.where(valid, o + 1, 0))


@triton.jit
def map_entries(
    p_indices, p_places, size, req, table_ptr, stride_table, requests, table_pages, blocks, stride_block,
    PAGE: tl.constexpr, ENTRY: tl.constexpr, TOGETHER: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Write where every entry of a stretch starts, in UNITs, -1 for invalid ones; return how many to look at: padding
    behind the last valid one costs nothing. ONCE: a stretch is at most TOGETHER entries; without a loop the loads of
    other things go on meanwhile."""
    o = tl.arange(0, TOGETHER)
    if ONCE:
        used = _map_some(
            p_indices, p_places, o, size, req, table_ptr, stride_table, requests, table_pages, blocks, stride_block,
            PAGE, ENTRY,
        )  # fmt: skip
    else:
        used = tl.zeros((), tl.int32)
        for i in range(0, size, TOGETHER):
            some = _map_some(
                p_indices, p_places, i + o, size, req, table_ptr, stride_table, requests, table_pages, blocks,
                stride_block, PAGE, ENTRY,
            )  # fmt: skip
            used = tl.maximum(used, some)
    return used


@triton.jit
def _probabilities(s, valid, peak):
    """(p, decay, peak) after one more tile of base-2 scores s [H, N]; invalid columns count nothing."""
    s = tl.where(valid[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1))
    # nothing valid yet: any finite reference keeps exp2 at 0 instead of NaN
    reference = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return tl.exp2(s - reference[:, None]), tl.exp2(peak - reference), new_peak


@triton.jit
def softmax_step(s, valid, peak, total):
    """(p, decay, peak, total [H]) after one more tile of base-2 scores s [H, N]; invalid columns count nothing."""
    p, decay, peak = _probabilities(s, valid, peak)
    return p, decay, peak, total * decay + tl.sum(p, 1)


@triton.jit
def divided_softmax_step(s, valid, peak, total, H: tl.constexpr, N: tl.constexpr):
    """softmax_step where two warpgroups divide the columns: of a row's sum each thread keeps its own part, total
    [H, 2, 4] by warpgroup and lane, so that nothing is exchanged until the end."""
    p, decay, peak = _probabilities(s, valid, peak)
    own = tl.sum(tl.sum(tl.reshape(p, (H, 2, N // 16, 4, 2)), 4), 2)
    return p, decay, peak, total * decay[:, None, None] + own


@triton.jit
def store_lse(p_lse, peak, total, mask):
    """Base-2 log-sum-exp; -inf where nothing was valid."""
    some = total > 0.0
    tl.store(p_lse, tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("-inf")), mask=mask)
