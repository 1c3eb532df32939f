"""Exact row top-k by radix selection: no sort, no host synchronisation, row lengths read on the device.

| tensor | shape | dtype |
|---|---|---|
| logits | [R, C], row stride free, C < 2**26 | f32 |
| row_starts, row_ends | [R] | i32 |
| indices | [R, K], row stride free | i32, relative to the row start, -1 padded; in an order that repeats |

float32 maps to a uint32 key whose unsigned order is numeric order (+0 and -0 map to one key, NaN to -inf's).

 count    how many keys fall into each of 2048 bins: sign, five bits of exponent, five of mantissa
 collect  keys above the bin that holds the K-th largest one are marked in a bitmap of the row; those of the bin, a few
          hundred, are listed
 finish   the K-th largest of the list by (key, lower position first), eleven bits at a time, marks the rest; then the
          bitmap is written as positions, so that the output is ascending whatever the order that atomics had. A list
          that overflows is replaced by the row itself.

A row that fits a program's registers is counted there, cut to the last few keys, and written by a scan: no list, no
bitmap. So is one that fits the registers of a cluster of programs, or is streamed past them: topk_cluster.py. Else, of
a longer row, one program does all three, with the bitmap and the output in shared memory until they are whole. Or
`splits` programs share a row in two launches, count and collect, of which with `pdl` the second gets ready while the
first runs; the last of a row's programs to have collected finishes, so that none waits for another. Bounds: reads of
the logits, twice, from L2 after the first; behind them the latency of some fifteen steps of a program. Rows of at most
K columns are not read at all.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blackwell_kernels.dsa.config import MANY_ROWS, TopkConfig
from blackwell_kernels.dsa.topk_cluster import loaded, topk_cluster_kernel
from blackwell_kernels.dsa.topk_histogram import (
    BINS,
    COUNTS,
    DIGIT,
    FEW,
    LAST,
    POSITION,
    bin_of,
    bin_of_key,
    bounds_of,
    choose,
    collected,
    counted,
    cut_bins,
    declare,
    declare_marks,
    mark,
    marked,
    no_counts,
    no_marks,
    nth,
    ordered_key,
    parts,
    put,
    ranked,
    save,
    signed,
    signed_key,
    stored,
    unsigned,
    written,
)

# keys that the list of a row holds: four times what scores of similar size put into a bin, half of it in prefill
_LISTED = 8192
# words of a bitmap that shared memory has room for beside the counts: 262,144 columns
MOST_HERE = 8192


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
def _first(begin, ALIGNED: tl.constexpr):
    """Where blocks of a range of columns begin: on 16 bytes if the rows do."""
    if ALIGNED:
        begin = begin // 4 * 4
    return begin


@triton.jit
def _count(p_row, x, begin, end, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr):
    """Histogram of columns [begin, end), of which x is the first block."""
    histogram = no_counts(SHARED)
    for i in range(_first(begin, ALIGNED), end, BLOCK):
        ahead = loaded(p_row, i + BLOCK, end, BLOCK, ALIGNED)  # arrives meanwhile
        o = i + tl.arange(0, BLOCK)
        histogram = counted(histogram, bin_of(x), (o >= begin) & (o < end), SHARED)
        x = ahead
    return histogram


@triton.jit
def _collect(
    p_row, x, p_marks, p_list, start, begin, end, chosen, before,
    LISTED: tl.constexpr, BLOCK: tl.constexpr, HERE: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Mark what lies above the chosen bin; list keys and positions of the bin from place `before` on."""
    low, high, _ = bounds_of(chosen)
    before += tl.zeros((), tl.int32)
    taken = tl.zeros((), tl.int32)
    for i in range(_first(begin, ALIGNED), end, BLOCK):
        ahead = loaded(p_row, i + BLOCK, end, BLOCK, ALIGNED)
        o = i + tl.arange(0, BLOCK)
        valid = (o >= begin) & (o < end)
        key = ordered_key(x)
        taken = collected(p_marks, p_list, before, taken, key, o - start, valid, low, high, LISTED, HERE, SHARED)
        x = ahead


@triton.jit
def _listed(p_list, i, held, LISTED: tl.constexpr, THREADS: tl.constexpr):
    """(ranked, position, is a candidate) of a place a thread of the list, which other programs wrote."""
    o = i + tl.arange(0, THREADS)
    valid = o < held
    key = tl.load(p_list + o, mask=valid, other=0).to(tl.uint32, bitcast=True)
    position = tl.load(p_list + LISTED + o, mask=valid, other=0)
    return ranked(key, position), position, valid


@triton.jit
def _unlisted(x, i, start, end, low, high, BLOCK: tl.constexpr):
    """The same of a block x of the row, where the list overflowed."""
    o = i + tl.arange(0, BLOCK)
    key = ordered_key(x)
    valid = (o >= start) & (o < end) & (key >= low) & (key <= high)
    return ranked(key, o - start), o - start, valid


@triton.jit
def _mark_many(
    p_row, p_marks, p_list, start, n, chosen, need, held, LISTED: tl.constexpr, THREADS: tl.constexpr,
    HERE: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """The same where a thread has several candidates, or the list overflowed."""
    COLUMNS: tl.constexpr = 4 * THREADS  # columns at a time where the list overflowed: 64-bit numbers take registers
    end = start + n
    low, high, left = bounds_of(chosen)
    kth = tl.where(left < 32, low, 0).to(tl.int64) << POSITION
    left += POSITION
    ties = held
    # candidates that share the bits of kth from `left` on are the ties; the larger ones are taken
    while (left > 0) & (ties > need):
        shift = tl.maximum(left - DIGIT, 0)  # the last digit takes some known bits along
        histogram = no_counts(SHARED)
        if held <= LISTED:
            for i in range(0, held, THREADS):
                key, _, valid = _listed(p_list, i, held, LISTED, THREADS)
                digit = ((~key >> shift) & (BINS - 1)).to(tl.int32)
                histogram = counted(histogram, digit, valid & ((key >> left) == (kth >> left)), SHARED)
        else:
            x = loaded(p_row, _first(start, ALIGNED), end, COLUMNS, ALIGNED)
            for i in range(_first(start, ALIGNED), end, COLUMNS):
                ahead = loaded(p_row, i + COLUMNS, end, COLUMNS, ALIGNED)
                key, _, valid = _unlisted(x, i, start, end, low, high, COLUMNS)
                x = ahead
                digit = ((~key >> shift) & (BINS - 1)).to(tl.int32)
                histogram = counted(histogram, digit, valid & ((key >> left) == (kth >> left)), SHARED)
        place, need, ties = cut_bins(histogram, need, SHARED)
        digits = tl.full((), BINS - 1, tl.int64) << shift
        kth = (kth & ~digits) | ((place ^ (BINS - 1)).to(tl.int64) << shift)
        left = shift
    if held <= LISTED:
        for i in range(0, held, THREADS):
            key, position, valid = _listed(p_list, i, held, LISTED, THREADS)
            mark(p_marks, position, valid & ((key >> left) >= (kth >> left)), HERE)
    else:
        x = loaded(p_row, _first(start, ALIGNED), end, COLUMNS, ALIGNED)
        for i in range(_first(start, ALIGNED), end, COLUMNS):
            ahead = loaded(p_row, i + COLUMNS, end, COLUMNS, ALIGNED)
            key, position, valid = _unlisted(x, i, start, end, low, high, COLUMNS)
            x = ahead
            mark(p_marks, position, valid & ((key >> left) >= (kth >> left)), HERE)


@triton.jit
def _finish(
    p_row, p_marks, p_list, p_indices, start, n, chosen, need, held, K: tl.constexpr, LISTED: tl.constexpr,
    THREADS: tl.constexpr, WORDS: tl.constexpr, HERE: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Mark the `need` largest of `held` candidates; write what is marked."""
    if held <= tl.minimum(THREADS, LISTED):
        o = tl.arange(0, THREADS)
        key = tl.load(p_list + o, mask=o < held, other=0).to(tl.uint32, bitcast=True)
        position = tl.load(p_list + LISTED + o, mask=o < held, other=0)
        no_counts(SHARED)
        mark(p_marks, position, _taken(signed(key), position, chosen, need, held, SHARED), HERE)
    else:
        _mark_many(p_row, p_marks, p_list, start, n, chosen, need, held, LISTED, THREADS, HERE, ALIGNED, SHARED)
    tl.debug_barrier()  # other threads read what this one marked
    words = tl.cdiv(n, 32)
    before = tl.zeros((), tl.int32)
    GATHER: tl.constexpr = HERE > 0 and K <= BINS
    for i in range(0, words, WORDS):
        o = i + tl.arange(0, WORDS)
        word = marked(p_marks, o, o < words, HERE)
        count = _ones(word)
        upto = before + tl.cumsum(count, 0)
        written(p_indices, upto - count, word, o * 32, GATHER, SHARED)
        if i + WORDS < words:
            before = tl.max(upto)
    stored(p_indices, K, GATHER)


@triton.jit
def _refined(v, position, low, high, left, need, held, SHARED: tl.constexpr):
    """`_least` where a bin holds many: an interval of ranks shrinks until it has no more than are needed, or few."""
    rank = ranked(unsigned(v), position)
    low = low.to(tl.int64) << POSITION
    high = ((high.to(tl.int64) + 1) << POSITION) - 1
    left += POSITION
    while (held > need) & (held > FEW):
        left = tl.maximum(left - DIGIT, 0)
        histogram = no_counts(SHARED)
        inside = (rank >= low) & (rank <= high)
        digit = tl.minimum(tl.maximum((high - rank) >> left, 0), BINS - 1).to(tl.int32)
        place, need, held = cut_bins(counted(histogram, digit, inside, SHARED), need, SHARED)
        high -= place.to(tl.int64) << left
        low = tl.maximum(low, high + 1 - (tl.full((), 1, tl.int64) << left))
    least, last = parts(low)
    if held > need:
        least, last = nth(v, position, (rank >= low) & (rank <= high), need, SHARED)
    return least, last


@triton.jit
def _taken(v, position, place, need, held, SHARED: tl.constexpr):
    """Whether signed keys v are among the `need` largest of their bin, which has `held`, or above it. -2**31 is none,
    and may be counted in the last bin. The list is empty."""
    low, high, left = bounds_of(place)
    low = tl.maximum(low, 1)
    least, last = signed(low), tl.zeros((), tl.int32) + LAST
    if held > need:
        if held <= FEW:
            least, last = nth(v, position, (v >= least) & (v <= signed(high)), need, SHARED)
        else:
            least, last = _refined(v, position, low, high, left, need, held, SHARED)
    return (v > least) | ((v == least) & (position <= last))


@triton.jit
def _held(x, o, histogram, p_indices, start, n, K: tl.constexpr, SHARED: tl.constexpr):
    """A row of more than K columns, of which a program holds columns o, x, and with them all n from start on. The
    histogram is empty."""
    position = o - start
    v = tl.where((position >= 0) & (position < n), signed_key(x), -0x80000000)
    histogram = counted(histogram, bin_of_key(v), tl.full(o.shape, 1, tl.int1), SHARED)
    place, need, held = cut_bins(histogram, K, SHARED)
    put(p_indices, position, _taken(v, position, place, need, held, SHARED), SHARED)


@triton.jit
def _is_short(start, end, SHORT: tl.constexpr, ALIGNED: tl.constexpr):
    return end - _first(start, ALIGNED) <= SHORT


@triton.jit
def _short(
    p_row, p_indices, start, end, K: tl.constexpr, SHORT: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr
):
    first = _first(start, ALIGNED)
    x = loaded(p_row, first, end, SHORT, ALIGNED)
    _held(x, first + tl.arange(0, SHORT), no_counts(SHARED), p_indices, start, end - start, K, SHARED)


@triton.jit
def _ones(word):
    """How many bits of uint32 are set."""
    word -= (word >> 1) & 0x55555555
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((((word + (word >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


# columns follow the step, and ranges are slices that start anywhere: specialising on them would compile anew
_VARYING, _UNALIGNED = ["columns"], ["starts_ptr", "ends_ptr"]


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, marks_ptr, lists_ptr, columns, stride_logits, stride_indices,
    K: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, WORDS: tl.constexpr,
    SHORT: tl.constexpr, HERE: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows). marks [rows, cdiv(columns, 32) + 1] int32, unless HERE words of shared memory are as many; lists
    [rows, 2, LISTED] int32; both uninitialised."""
    declare(SHARED)
    declare_marks(HERE)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    end = start + n
    p_row, p_indices = logits_ptr + row * stride_logits, indices_ptr + row * stride_indices
    if n <= K:
        _identity(p_indices, n, K, BLOCK)
    elif _is_short(start, end, SHORT, ALIGNED):
        _short(p_row, p_indices, start, end, K, SHORT, ALIGNED, SHARED)
    else:
        p_marks = marks_ptr + row * (tl.cdiv(columns, 32) + 1)
        p_list = lists_ptr + row * (2 * LISTED)
        x = loaded(p_row, _first(start, ALIGNED), end, BLOCK, ALIGNED)
        o = tl.arange(0, WORDS)
        for i in range(0, tl.cdiv(n, 32), WORDS):
            no_marks(p_marks, i + o, i + o < tl.cdiv(n, 32), HERE)
        histogram = _count(p_row, x, start, end, BLOCK, ALIGNED, SHARED)
        chosen, need, held = cut_bins(histogram, K, SHARED)
        _collect(p_row, x, p_marks, p_list, start, start, end, chosen, 0, LISTED, BLOCK, HERE, ALIGNED, SHARED)
        tl.debug_barrier()  # other threads read what this one listed
        _finish(
            p_row, p_marks, p_list, p_indices, start, n, chosen, need, held,
            K, LISTED, THREADS, WORDS, HERE, ALIGNED, SHARED,
        )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_held_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, columns, stride_logits, stride_indices,
    K: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows), of at most BLOCK columns: asked for whatever the bounds are, which arrive meanwhile."""
    declare(SHARED)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    p_row, p_indices = logits_ptr + row * stride_logits, indices_ptr + row * stride_indices
    x = loaded(p_row, 0, columns, BLOCK, ALIGNED)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    histogram = no_counts(SHARED)
    if n <= K:
        _identity(p_indices, n, K, BLOCK)
    else:
        _held(x, tl.arange(0, BLOCK), histogram, p_indices, start, n, K, SHARED)


@triton.jit
def _segment(start, n, SPLITS: tl.constexpr):
    """Columns [begin, end) of this program."""
    size = tl.cdiv(tl.cdiv(n, SPLITS), 32) * 32
    begin = tl.minimum(tl.program_id(1) * size, n)
    return start + begin, start + tl.minimum(begin + size, n)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_count_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, counts_ptr, marks_ptr, columns, stride_logits, stride_indices,
    K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr, SHORT: tl.constexpr,
    ALIGNED: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, SPLITS). counts [rows, SPLITS, COUNTS] int32. Marks,
    [rows, cdiv(columns, 32) + 1] int32, zeros from here, begin with a word that counts programs. Rows of at most K
    columns, and those that a program holds and does here, have neither."""
    declare(SHARED)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if PDL:  # behind the wait: what follows reads logits before it waits for this kernel
        tl.extra.cuda.gdc_launch_dependents()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    p_row, p_indices = logits_ptr + row * stride_logits, indices_ptr + row * stride_indices
    if (n <= K) | _is_short(start, start + n, SHORT, ALIGNED):
        if split == 0:
            if n <= K:
                _identity(p_indices, n, K, BLOCK)
            else:
                _short(p_row, p_indices, start, start + n, K, SHORT, ALIGNED, SHARED)
    else:
        begin, end = _segment(start, n, SPLITS)
        x = loaded(p_row, _first(begin, ALIGNED), end, BLOCK, ALIGNED)
        p_marks = marks_ptr + row * (tl.cdiv(columns, 32) + 1)
        o = tl.arange(0, WORDS)
        for i in range(split * WORDS, tl.cdiv(n, 32) + 1, SPLITS * WORDS):
            tl.store(p_marks + i + o, tl.zeros((WORDS,), tl.int32), mask=i + o < tl.cdiv(n, 32) + 1)
        histogram = _count(p_row, x, begin, end, BLOCK, ALIGNED, SHARED)
        save(counts_ptr + (row * SPLITS + split) * COUNTS, histogram, SHARED)


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def topk_collect_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, counts_ptr, marks_ptr, lists_ptr, columns, stride_logits,
    stride_indices, K: tl.constexpr, LISTED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    THREADS: tl.constexpr, WORDS: tl.constexpr, SHORT: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (rows, SPLITS). lists [rows, 2, LISTED] int32."""
    declare(SHARED)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, n = _row(starts_ptr, ends_ptr, columns, row)
    p_row, p_indices = logits_ptr + row * stride_logits, indices_ptr + row * stride_indices
    if (n <= K) | _is_short(start, start + n, SHORT, ALIGNED):
        if PDL:  # not to end before the kernel before, whose memory others may get then
            tl.extra.cuda.gdc_wait()
    else:
        begin, end = _segment(start, n, SPLITS)
        x = loaded(p_row, _first(begin, ALIGNED), end, BLOCK, ALIGNED)
        no_counts(SHARED)
        if PDL:
            tl.extra.cuda.gdc_wait()
        chosen, need, held, before = choose(counts_ptr + row * SPLITS * COUNTS, split, K, SPLITS, SHARED)
        p_marks = marks_ptr + row * (tl.cdiv(columns, 32) + 1)
        p_list = lists_ptr + row * (2 * LISTED)
        _collect(p_row, x, p_marks + 1, p_list, start, begin, end, chosen, before, LISTED, BLOCK, 0, ALIGNED, SHARED)
        tl.debug_barrier()  # all of this program's before it says so
        if tl.atomic_add(p_marks, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            _finish(
                p_row, p_marks + 1, p_list, p_indices, start, n, chosen, need, held,
                K, LISTED, THREADS, WORDS, 0, ALIGNED, SHARED,
            )  # fmt: skip


def launch(
    logits: torch.Tensor,
    row_starts: torch.Tensor,
    row_ends: torch.Tensor,
    indices: torch.Tensor,
    config: TopkConfig,
) -> None:
    """Launch over at least one row; arguments as checked by op.py."""
    (rows, columns), k = logits.shape, indices.shape[1]
    words, listed = triton.cdiv(columns, 32), _LISTED if rows <= MANY_ROWS else _LISTED // 2
    # an element belongs to one thread
    num_warps = min(config.num_warps, config.block // 32)
    threads = 32 * num_warps
    ranges, strides = (logits, row_starts, row_ends), (columns, logits.stride(0), indices.stride(0))
    constants = {
        "K": k,
        "BLOCK": config.block,
        "ALIGNED": logits.data_ptr() % 16 == 0 and logits.stride(0) % 4 == 0 and columns % 4 == 0,
        "SHARED": not triton.knobs.runtime.interpret,
        "num_warps": num_warps,
    }
    if config.cluster:
        together, many = threads * config.cluster, config.held > 8
        first = max(config.block, together)
        constants |= {"BLOCK": max(first, config.held * together), "STREAM": max(1, config.held // 2) * together}
        # of up to eight columns a thread a multiprocessor takes 1,024 threads, however they are divided
        topk_cluster_kernel[(rows,)](
            *ranges, indices, *strides, FIRST=first, CTAS=config.cluster, FITS=columns <= first, EARLY=config.early,
            launch_pdl=config.early, num_ctas=config.cluster, maxnreg=None if many else 64, **constants
        )  # fmt: skip
        return
    if columns <= config.block:
        topk_held_kernel[(rows,)](
            *ranges, indices, *strides, EARLY=config.early, launch_pdl=config.early, **constants
        )  # fmt: skip
        return
    alone = config.splits == 1 and constants["SHARED"] and words <= MOST_HERE
    marks = torch.empty(0 if alone else rows, words + 1, dtype=torch.int32, device=logits.device)
    lists = torch.empty(rows, 2, listed, dtype=torch.int32, device=logits.device)
    constants["WORDS"] = max(threads, min(8 * threads, triton.next_power_of_2(words)))
    constants["SHORT"] = config.held * threads
    collecting = {**constants, "LISTED": listed, "THREADS": threads}
    if config.splits == 1:
        here = triton.next_power_of_2(words) if alone else 0
        topk_kernel[(rows,)](
            *ranges, indices, marks, lists, *strides, HERE=here, EARLY=config.early, launch_pdl=config.early,
            **collecting
        )  # fmt: skip
        return
    grid, shared = (rows, config.splits), {"SPLITS": config.splits, "PDL": config.pdl}
    counts = torch.empty(rows, config.splits, COUNTS.value, dtype=torch.int32, device=logits.device)
    topk_count_kernel[grid](
        *ranges, indices, counts, marks, *strides, EARLY=config.early, launch_pdl=config.early, **shared, **constants
    )  # fmt: skip
    topk_collect_kernel[grid](
        *ranges, indices, counts, marks, lists, *strides, launch_pdl=config.pdl, **shared, **collecting
    )  # fmt: skip
