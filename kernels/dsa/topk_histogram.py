"""Order of float32 as integers, and a histogram of 2048 bins in shared memory, for the row top-k.

Triton's own histogram is a ballot per bit and bin, some hundred instructions for 32 keys. Here a key is one atomic
addition in shared memory: an array declared in PTX at the scope of the kernel (so `declare` stands once in a kernel,
outside any branch or loop), beside the memory that Triton manages. An element must belong to one thread: tensors have
at least as many as the program has threads. Without SHARED (interpreted), the histogram is a value.
"""

from __future__ import annotations

import triton
import triton.language as tl

DIGIT = tl.constexpr(11)
BINS = tl.constexpr(2048)
# below 2**-15, and from 1.97 * 2**16 on, one bin takes all; 112 is the exponent of the former
_LEAST, _MOST = tl.constexpr(2.0**-15), tl.constexpr(63 * 2.0**11)
_FIRST_STEP = tl.constexpr(112 * 32)
_IN_BIN = tl.constexpr(18)  # bits of a key that its bin does not say
POSITION = tl.constexpr(26)  # bits of a position, so that rows have fewer than 2**26 columns
_LAST = tl.constexpr(2**26 - 1)

_DECLARE = tl.constexpr(".shared .align 16 .b32 topk_bins[2049]; mov.u32 $0, $1;")
_PLACE = "{ .reg .pred p; .reg .b32 a; mov.u32 a, topk_bins; "
_CLEAR = tl.constexpr(_PLACE + "mad.lo.u32 a, $1, 4, a; st.shared.b32 [a], 0; mov.u32 $0, 0; }")
_LOAD = tl.constexpr(_PLACE + "mad.lo.u32 a, $1, 4, a; ld.shared.b32 $0, [a]; }")
_ADD = tl.constexpr(
    _PLACE + "mad.lo.u32 a, $1, 4, a; setp.ne.b32 p, $2, 0; @p red.shared.add.u32 [a], 1; mov.u32 $0, 0; }"
)
# arguments: valid, key, position, lowest and highest key of the bin, bitmap, list, its first place, its places
_COLLECT = tl.constexpr("""{ .reg .pred p; .reg .b32 a, b; .reg .b64 g, h;
setp.ne.b32 p, $1, 0; setp.ge.and.u32 p, $2, $4, p; @!p bra DONE; setp.gt.u32 p, $2, $5; @p bra ABOVE;
mov.u32 a, topk_bins; atom.shared.add.u32 b, [a+8192], 1; add.u32 b, b, $8; setp.ge.s32 p, b, $9; @p bra DONE;
mad.wide.s32 g, b, 4, $7; mad.wide.s32 h, $9, 4, g; st.global.b32 [g], $2; st.global.b32 [h], $3; bra DONE;
ABOVE: shr.u32 a, $3, 5; mad.wide.u32 g, a, 4, $6; and.b32 a, $3, 31; mov.u32 b, 1; shl.b32 b, b, a;
red.relaxed.gpu.global.or.b32 [g], b;
DONE: mov.u32 $0, 0; }""")
# arguments: word, where its first bit goes, what that stands for, indices
_WRITE = tl.constexpr("""{ .reg .pred p; .reg .b32 w, b; .reg .b64 g; mov.b32 w, $1; mad.wide.s32 g, $2, 4, $4;
NEXT: setp.eq.b32 p, w, 0; @p bra DONE; brev.b32 b, w; clz.b32 b, b; add.u32 b, b, $3; st.global.b32 [g], b;
add.s64 g, g, 4; add.u32 b, w, -1; and.b32 w, w, b; bra NEXT;
DONE: mov.u32 $0, 0; }""")


@triton.jit
def ordered_key(x):
    """uint32 whose unsigned order is the numeric order of float32 x; NaN counts as -inf, -0 equals +0."""
    bits = (tl.maximum(x, -float("inf")) + 0.0).to(tl.int32, bitcast=True)  # the larger of NaN and a number is that
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def bin_of(x):
    """0 to BINS - 1, from the largest float32 down, in the order of `ordered_key`: sign, five bits of exponent, five of
    mantissa."""
    x = tl.maximum(x, -float("inf"))
    within = tl.minimum(tl.maximum(tl.abs(x), _LEAST), _MOST)
    step = (within.to(tl.int32, bitcast=True) >> _IN_BIN) - _FIRST_STEP
    return tl.where(x < 0, step, ~step) + BINS // 2


@triton.jit
def bounds_of(chosen):
    """Lowest and highest key of a bin, and how many low bits its keys do not share, 32 where those are not all."""
    half: tl.constexpr = BINS // 2
    magnitude = tl.where(chosen < half, chosen ^ (half - 1), chosen - half) + _FIRST_STEP
    top = tl.where(chosen < half, magnitude | 0x2000, ~magnitude & 0x1FFF)
    low = top.to(tl.uint32) << _IN_BIN
    high = low | 0x3FFFF
    # the outer bins of either sign take what lies beyond
    low = tl.where(chosen == half - 1, 0x80000000, tl.where(chosen == BINS - 1, 0, low)).to(tl.uint32)
    high = tl.where(chosen == 0, 0xFFFFFFFF, tl.where(chosen == half, 0x7FFFFFFF, high)).to(tl.uint32)
    outer = (chosen == 0) | (chosen == half - 1) | (chosen == half) | (chosen == BINS - 1)
    return low, high, tl.where(outer, 32, _IN_BIN)


@triton.jit
def ranked(key, position):
    """int64 whose order is that of (key, lower position first); no two of a row are equal."""
    return (key.to(tl.int64) << POSITION) | (position ^ _LAST)


@triton.jit
def declare(SHARED: tl.constexpr):
    if SHARED:
        tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def no_counts(SHARED: tl.constexpr):
    """An empty histogram, and no places reserved; whatever used them before must have ended in a barrier."""
    if SHARED:
        o = tl.arange(0, BINS)
        tl.inline_asm_elementwise(_CLEAR, "=r,r", [o], dtype=tl.int32, is_pure=False, pack=1)
        tl.inline_asm_elementwise(_CLEAR, "=r,r", [o + 1], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()
    return tl.zeros((BINS,), tl.int32)


@triton.jit
def counted(histogram, place, valid, SHARED: tl.constexpr):
    """The histogram with one more at each valid place."""
    if SHARED:
        arguments = [place, valid.to(tl.int32)]
        tl.inline_asm_elementwise(_ADD, "=r,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        histogram += tl.histogram(place, BINS, mask=valid)
    return histogram


@triton.jit
def counts_of(histogram, SHARED: tl.constexpr):
    """The histogram as int32 [BINS]."""
    if SHARED:
        tl.debug_barrier()
        o = tl.arange(0, BINS)
        histogram = tl.inline_asm_elementwise(_LOAD, "=r,r", [o], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()  # before they are cleared again
    return histogram


@triton.jit
def mark(p_marks, position, mask):
    """Set the bits of positions."""
    tl.atomic_or(p_marks + (position >> 5), 1 << (position & 31), mask=mask, sem="relaxed")


@triton.jit
def collected(
    p_marks, p_list, before, taken, key, position, valid, low, high, LISTED: tl.constexpr, SHARED: tl.constexpr
):
    """Mark the positions of keys above `high`; list those from `low` on with their keys, in any order if SHARED, as
    far as the list reaches. Returns how many those are, 0 if SHARED: few keys are either, so one branch is all that
    most take."""
    if SHARED:
        arguments = [
            valid.to(tl.int32), key, position, low, high, p_marks.to(tl.int64), p_list.to(tl.int64), before, LISTED,
        ]  # fmt: skip
        tl.inline_asm_elementwise(_COLLECT, "=r,r,r,r,r,r,l,l,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        mark(p_marks, position, valid & (key > high))
        match = (valid & (key >= low) & (key <= high)).to(tl.int32)
        place = before + taken + tl.cumsum(match, 0) - match
        fits = (match != 0) & (place < LISTED)
        tl.store(p_list + place, key.to(tl.int32, bitcast=True), mask=fits)
        tl.store(p_list + LISTED + place, position, mask=fits)
        taken += tl.sum(match)
    return taken


@triton.jit
def written(p_indices, place, word, position, SHARED: tl.constexpr):
    """Write where the bits of uint32 words stand, ascending: `position` and on, from `place` on."""
    if SHARED:
        arguments = [word, place, position, p_indices.to(tl.int64)]
        tl.inline_asm_elementwise(_WRITE, "=r,r,r,r,l", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        for i in range(32):
            is_set = (word >> i) & 1
            tl.store(p_indices + place, position + i, mask=is_set != 0)
            place += is_set.to(tl.int32)


@triton.jit
def cut(counts, need, N: tl.constexpr = BINS):
    """(bin of the need-th largest key, how many of its keys are needed, how many it holds); N counts."""
    upto = tl.cumsum(counts, 0)
    before = upto - counts
    found = (tl.arange(0, N).to(tl.int64) << (2 * POSITION)) | ((need - before).to(tl.int64) << POSITION) | counts
    # one bin is it; one reduction for the three numbers
    found = tl.sum(tl.where((before < need) & (upto >= need), found, 0))
    need = ((found >> POSITION) & _LAST).to(tl.int32)
    return (found >> (2 * POSITION)).to(tl.int32), need, (found & _LAST).to(tl.int32)
