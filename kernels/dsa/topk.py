"""Exact row top-k by radix selection: no sort, no host synchronisation, row lengths read on the device.

| tensor | shape | dtype |
|---|---|---|
| logits | [R, C], row stride free | f32 |
| row_starts, row_ends | [R] | i32 |
| indices | [R, K], row stride free | i32, relative to the row start, ascending, -1 padded |

float32 maps to uint32 so that unsigned order is numeric order (+0 and -0 map to one key, NaN to -inf's key). One
program a row finds the K-th largest key digit by digit, from the top: a histogram of the digit over the columns that
still match tells in which bin the K-th one lies. It stops as soon as a bin is taken whole, usually before the last
digit. A last pass writes positions in column order, so ties go to the lowest one and the output is deterministic.
Bounds: reads of the logits, once per pass, from L2 after the first. Rows of at most K columns are not read at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import TopkConfig


@triton.jit
def ordered_key(x):
    """uint32 whose unsigned order is the numeric order of float32 x; NaN counts as -inf, -0 equals +0."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    bits = tl.where(magnitude > 0x7F800000, -0x00800000, bits)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def topk_kernel(
    logits_ptr,
    starts_ptr,
    ends_ptr,
    indices_ptr,
    columns,
    stride_logits,
    stride_indices,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), columns)
    n = tl.maximum(tl.minimum(tl.load(ends_ptr + row), columns) - start, 0)
    p_logits = logits_ptr + row * stride_logits + start
    p_indices = indices_ptr + row * stride_indices
    o = tl.arange(0, BLOCK)

    if n <= K:
        for i in range(0, K, BLOCK):
            tl.store(p_indices + i + o, tl.where(i + o < n, i + o, -1), mask=i + o < K)
    else:
        bins = tl.arange(0, 1 << BITS)
        shift = 32
        prefix = tl.full((), 0, tl.uint32)  # the digits of the K-th largest key found so far
        need = tl.full((), K, tl.int32)  # how many keys with this prefix are still to be taken
        ties = n  # how many there are
        while (shift > 0) & (ties > need):
            shift -= BITS
            histogram = tl.zeros((1 << BITS,), tl.int32)
            for i in range(0, n, BLOCK):
                key = ordered_key(tl.load(p_logits + i + o, mask=i + o < n, other=0.0)) >> shift
                matches = (i + o < n) & ((key >> BITS) == prefix)
                histogram += tl.histogram((key & ((1 << BITS) - 1)).to(tl.int32), 1 << BITS, mask=matches)
            at_least = tl.cumsum(histogram, 0, reverse=True)
            digit = tl.sum((at_least >= need).to(tl.int32)) - 1
            ties = tl.sum(tl.where(bins == digit, histogram, 0))
            need -= tl.sum(tl.where(bins == digit, at_least, 0)) - ties
            prefix = (prefix << BITS) | digit.to(tl.uint32)

        above, equal = 0, 0
        for i in range(0, n, BLOCK):
            valid = i + o < n
            key = ordered_key(tl.load(p_logits + i + o, mask=valid, other=0.0)) >> shift
            is_above = (valid & (key > prefix)).to(tl.int32)
            is_equal = (valid & (key == prefix)).to(tl.int32)
            above_before = above + tl.cumsum(is_above, 0) - is_above
            equal_before = equal + tl.cumsum(is_equal, 0) - is_equal
            take = (is_above != 0) | ((is_equal != 0) & (equal_before < need))
            tl.store(p_indices + above_before + tl.minimum(equal_before, need), i + o, mask=take)
            above += tl.sum(is_above)
            equal += tl.sum(is_equal)


def launch(
    logits: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    indices: torch.Tensor,
    config: TopkConfig,
) -> None:
    """Launch over at least one row; arguments as checked by op.py."""
    topk_kernel[(logits.shape[0],)](
        logits, row_starts, row_ends, indices, logits.shape[1], logits.stride(0), indices.stride(0),
        K=indices.shape[1], BITS=config.radix_bits, BLOCK=config.block, num_warps=config.num_warps,
    )  # fmt: skip
