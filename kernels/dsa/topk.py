"""Exact row top-k by radix selection: no sort, no host synchronisation, row lengths read on the device.

| tensor | shape | dtype |
|---|---|---|
| logits | [R, C], row stride free | f32 |
| row_starts, row_ends | [R] | i32 |
| indices | [R, K], row stride free | i32, relative to the row start, ascending, -1 padded |

float32 maps to a uint32 key whose unsigned order is numeric order (+0 and -0 map to one key, NaN to -inf's).

 count    how many keys fall into each of 256 bins: sign, five bits of exponent, two of mantissa
 collect  the keys of the bin that holds the K-th largest one, some per cent of the row, into a list
 select   the K-th largest key from that list, digit by digit; then write positions in column order, so that ties go to
          the lowest one and the output is deterministic. A list that overflows is replaced by the row itself.

One program does all three for its row, or `splits` programs share a row and each stage is a launch, which with `pdl`
gets ready while the one before it runs. Bounds: reads of the logits, three times, from L2 after the first. Rows of at
most K columns are not read at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import TopkConfig

BINS = tl.constexpr(256)
LISTED = tl.constexpr(4096)  # keys that the list of a row holds
# exponent and mantissa bits of 2**-15: below it, and from 2**17 on, one bin takes all
_FIRST_STEP = tl.constexpr(112 * 4)


@triton.jit
def ordered_key(x):
    """uint32 whose unsigned order is the numeric order of float32 x; NaN counts as -inf, -0 equals +0."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    bits = tl.where(magnitude == 0, 0, bits)
    bits = tl.where(magnitude > 0x7F800000, -0x00800000, bits)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _bin(key):
    """0 to 255, in the order of keys."""
    positive = (key >> 31) != 0
    magnitude = tl.where(positive, key, ~key) & 0x7FFFFFFF
    step = tl.minimum(tl.maximum((magnitude >> 21).to(tl.int32) - _FIRST_STEP, 0), 127)
    return tl.where(positive, 128 + step, 127 - step)


@triton.jit
def _row(starts_ptr, ends_ptr, columns, row):
    """First column and number of columns."""
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), columns)
    return start, tl.maximum(tl.minimum(tl.load(ends_ptr + row), columns) - start, 0)


@triton.jit
def _identity(p_indices, n, K: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    for i in range(0, K, BLOCK):
        tl.store(p_indices + i + o, tl.where(i + o < n, i + o, -1), mask=i + o < K)


@triton.jit
def _keys(p_logits, o, end):
    return ordered_key(tl.load(p_logits + o, mask=o < end, other=0.0))


@triton.jit
def _count(p_logits, begin, end, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    histogram = tl.zeros((BINS,), tl.int32)
    for i in range(begin, end, BLOCK):
        histogram += tl.histogram(_bin(_keys(p_logits, i + o, end)), BINS, mask=i + o < end)
    return histogram


@triton.jit
def _cut(histogram, need):
    """(bin of the need-th largest key, how many of its keys are needed, how many it holds)."""
    bins = tl.arange(0, BINS)
    at_least = tl.cumsum(histogram, 0, reverse=True)
    chosen = tl.sum((at_least >= need).to(tl.int32)) - 1
    held = tl.sum(tl.where(bins == chosen, histogram, 0))
    return chosen, need - (tl.sum(tl.where(bins == chosen, at_least, 0)) - held), held


@triton.jit
def _collect(p_logits, p_keys, p_positions, begin, end, chosen, before, BLOCK: tl.constexpr):
    """List keys and positions of the chosen bin, in column order, from place `before` on."""
    o = tl.arange(0, BLOCK)
    before += tl.zeros((), tl.int32)  # a constant cannot be carried through a loop
    for i in range(begin, end, BLOCK):
        key = _keys(p_logits, i + o, end)
        match = ((i + o < end) & (_bin(key) == chosen)).to(tl.int32)
        place = before + tl.cumsum(match, 0) - match
        fits = (match != 0) & (place < LISTED)
        tl.store(p_keys + place, key.to(tl.int32, bitcast=True), mask=fits)
        tl.store(p_positions + place, i + o, mask=fits)
        before += tl.sum(match)


@triton.jit
def _candidates(p_logits, p_keys, p_positions, o, n, held, chosen):
    """(key, position, is one) of places o of the list, or, where that overflowed, of columns o of the row."""
    if held <= LISTED:
        valid = o < held
        key = tl.load(p_keys + o, mask=valid, other=0).to(tl.uint32, bitcast=True)
        position = tl.load(p_positions + o, mask=valid, other=0)
    else:
        key = _keys(p_logits, o, n)
        valid = (o < n) & (_bin(key) == chosen)
        position = o
    return key, position, valid


@triton.jit
def _kth_key(p_logits, p_keys, p_positions, n, held, chosen, need, BLOCK: tl.constexpr):
    """(key, shift, need): candidates whose key >> shift is larger are taken, and the first `need` that are equal."""
    o = tl.arange(0, BLOCK)
    places = tl.where(held <= LISTED, held, n)
    # all keys of an inner bin share their first 11 bits
    inner = (held <= LISTED) & (chosen != 0) & (chosen != 127) & (chosen != 128) & (chosen != 255)
    known = tl.where(inner, 0xFFE00000, 0).to(tl.uint32)
    kth = tl.load(p_keys, mask=inner, other=0).to(tl.uint32, bitcast=True) & known
    left = tl.where(inner, 21, 32)
    ties = held
    while (left > 0) & (ties > need):
        left = tl.maximum(left - 8, 0)  # the last digit takes some known bits along
        histogram = tl.zeros((BINS,), tl.int32)
        for i in range(0, places, BLOCK):
            key, _, valid = _candidates(p_logits, p_keys, p_positions, i + o, n, held, chosen)
            match = valid & (((key ^ kth) & known) == 0)
            histogram += tl.histogram(((key >> left) & 255).to(tl.int32), BINS, mask=match)
        digit, need, ties = _cut(histogram, need)
        kth = (kth & ~(tl.full((), 255, tl.uint32) << left)) | (digit.to(tl.uint32) << left)
        known = tl.full((), 0xFFFFFFFF, tl.uint32) << left
    return kth, tl.minimum(left, 31), need


@triton.jit
def _write(
    p_logits, p_indices, begin, end, chosen, kth, shift, need, above, equal, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the positions taken from columns [begin, end); `above` and `equal`: keys before them of either kind."""
    o = tl.arange(0, BLOCK)
    above += tl.zeros((), tl.int32)
    equal += tl.zeros((), tl.int32)
    for i in range(begin, end, BLOCK):
        valid = i + o < end
        key = _keys(p_logits, i + o, end)
        place = _bin(key)
        candidate = valid & (place == chosen)
        is_above = ((valid & (place > chosen)) | (candidate & ((key >> shift) > (kth >> shift)))).to(tl.int32)
        is_equal = (candidate & ((key >> shift) == (kth >> shift))).to(tl.int32)
        above_before = above + tl.cumsum(is_above, 0) - is_above
        equal_before = equal + tl.cumsum(is_equal, 0) - is_equal
        take = (is_above != 0) | ((is_equal != 0) & (equal_before < need))
        tl.store(p_indices + above_before + tl.minimum(equal_before, need), i + o, mask=take)
        above += tl.sum(is_above)
        equal += tl.sum(is_equal)


# columns follow the step, and ranges are slices that start anywhere: specialising on them would compile anew
_VARYING, _UNALIGNED = ["columns"], ["starts_ptr", "ends_ptr"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, lists_ptr, columns, stride_logits, stride_indices,
    K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows). lists: 2 x LISTED int32 a row."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    p_logits, p_indices = logits_ptr + row * stride_logits + start, indices_ptr + row * stride_indices
    if n <= K:
        _identity(p_indices, n, K, BLOCK)
    else:
        p_keys = lists_ptr + row * (2 * LISTED)
        chosen, need, held = _cut(_count(p_logits, 0, n, BLOCK), K)
        _collect(p_logits, p_keys, p_keys + LISTED, 0, n, chosen, 0, BLOCK)
        tl.debug_barrier()  # other threads read what this one listed
        kth, shift, need = _kth_key(p_logits, p_keys, p_keys + LISTED, n, held, chosen, need, BLOCK)
        _write(p_logits, p_indices, 0, n, chosen, kth, shift, need, 0, 0, BLOCK)


@triton.jit
def _segment(n, SPLITS: tl.constexpr):
    """Columns [begin, end) of this program."""
    size = tl.cdiv(n, SPLITS)
    begin = tl.minimum(tl.program_id(1) * size, n)
    return begin, tl.minimum(begin + size, n)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_count_kernel(
    logits_ptr, starts_ptr, ends_ptr, counts_ptr, columns, stride_logits,
    K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, SPLITS). counts [rows, SPLITS, BINS] int32; left as they are for rows of at most K columns."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    if n > K:
        begin, end = _segment(n, SPLITS)
        histogram = _count(logits_ptr + row * stride_logits + start, begin, end, BLOCK)
        tl.store(counts_ptr + (row * SPLITS + tl.program_id(1)) * BINS + tl.arange(0, BINS), histogram)


@triton.jit
def _counts(counts_ptr, row, SPLITS: tl.constexpr):
    """[SPLITS, BINS], and which of its rows lie before this program's."""
    o_s = tl.arange(0, SPLITS)
    counts = tl.load(counts_ptr + (row * SPLITS + o_s[:, None]) * BINS + tl.arange(0, BINS)[None, :])
    return counts, (o_s < tl.program_id(1))[:, None]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_collect_kernel(
    logits_ptr, starts_ptr, ends_ptr, counts_ptr, lists_ptr, columns, stride_logits,
    K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, SPLITS). lists: 2 x LISTED int32 a row."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    if n > K:
        counts, earlier = _counts(counts_ptr, row, SPLITS)
        chosen, _, _ = _cut(tl.sum(counts, 0), K)
        is_chosen = (tl.arange(0, BINS) == chosen)[None, :]
        before = tl.sum(tl.sum(tl.where(earlier & is_chosen, counts, 0), 1), 0)
        begin, end = _segment(n, SPLITS)
        p_keys = lists_ptr + row * (2 * LISTED)
        p_logits = logits_ptr + row * stride_logits + start
        _collect(p_logits, p_keys, p_keys + LISTED, begin, end, chosen, before, BLOCK)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_select_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, counts_ptr, lists_ptr, columns, stride_logits, stride_indices,
    K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, SPLITS). Every program finds the K-th key for itself, and writes what its columns give."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    p_logits, p_indices = logits_ptr + row * stride_logits + start, indices_ptr + row * stride_indices
    if n <= K:
        if tl.program_id(1) == 0:
            _identity(p_indices, n, K, BLOCK)
    else:
        counts, earlier = _counts(counts_ptr, row, SPLITS)
        chosen, need, held = _cut(tl.sum(counts, 0), K)
        is_higher = (tl.arange(0, BINS) > chosen)[None, :]
        above = tl.sum(tl.sum(tl.where(earlier & is_higher, counts, 0), 1), 0)
        begin, end = _segment(n, SPLITS)
        p_keys = lists_ptr + row * (2 * LISTED)
        kth, shift, need = _kth_key(p_logits, p_keys, p_keys + LISTED, n, held, chosen, need, BLOCK)
        equal = 0
        o = tl.arange(0, BLOCK)
        for i in range(0, tl.where(held <= LISTED, held, n), BLOCK):
            key, position, valid = _candidates(p_logits, p_keys, p_keys + LISTED, i + o, n, held, chosen)
            valid &= position < begin
            above += tl.sum((valid & ((key >> shift) > (kth >> shift))).to(tl.int32))
            equal += tl.sum((valid & ((key >> shift) == (kth >> shift))).to(tl.int32))
        _write(p_logits, p_indices, begin, end, chosen, kth, shift, need, above, equal, BLOCK)


def launch(
    logits: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    indices: torch.Tensor,
    config: TopkConfig,
) -> None:
    """Launch over at least one row; arguments as checked by op.py."""
    rows, columns, k = logits.shape[0], logits.shape[1], indices.shape[1]
    lists = torch.empty(rows, 2, LISTED.value, dtype=torch.int32, device=logits.device)
    ranges = (logits, row_starts, row_ends)
    constants = {"K": k, "BLOCK": config.block, "num_warps": config.num_warps}
    if config.splits == 1:
        topk_kernel[(rows,)](
            *ranges, indices, lists, columns, logits.stride(0), indices.stride(0), EARLY=config.early,
            launch_pdl=config.early, **constants,
        )  # fmt: skip
        return
    grid, constants = (rows, config.splits), {**constants, "SPLITS": config.splits, "PDL": config.pdl}
    following = {**constants, "launch_pdl": config.pdl}
    counts = torch.empty(rows, config.splits, BINS.value, dtype=torch.int32, device=logits.device)
    topk_count_kernel[grid](
        *ranges, counts, columns, logits.stride(0), EARLY=config.early, launch_pdl=config.early, **constants
    )
    topk_collect_kernel[grid](*ranges, counts, lists, columns, logits.stride(0), **following)
    topk_select_kernel[grid](*ranges, indices, counts, lists, columns, logits.stride(0), indices.stride(0), **following)
