"""Order of float32 as integers; a histogram of 2048 bins and a list in shared memory, for the row top-k.

Triton's own histogram is a ballot per bit and bin, some hundred instructions for 32 keys. Here a key is one atomic
addition in shared memory: an array declared in PTX at the scope of the kernel (so `declare` stands once in a kernel,
outside any branch or loop), beside the memory that Triton manages. An element must belong to one thread: tensors have
at least as many as the program has threads. Scalar arguments of inline PTX make each thread execute it once. Without
SHARED (interpreted), the histogram is a value.

| bytes of the array | |
|---|---|
| 0 | 2048 counts |
| 8192 | list of FEW ranked keys, zeros behind the last |
| 9216 | its length, or places reserved elsewhere; up to here cleared with the counts |
| 9232 | bin that `cut_bins` found, keys needed of it, keys in it |
| 9248 | key that `nth` found |
| 9264 | counts of up to 32 warps |

A program that has a row alone keeps the bitmap of what it takes in an array of its own (`declare_marks`): a row takes
2,048 marks whatever its length, and atomics on global memory are some 44 a nanosecond for the whole chip. It gathers
the output where the counts were, so that it is stored by whole lines.
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
LAST = tl.constexpr(2**26 - 1)
GROUPS = tl.constexpr(64)  # of 32 bins; their counts follow those of the bins in memory
COUNTS = tl.constexpr(2048 + 64)
FEW = tl.constexpr(128)  # keys that are ordered by comparing all with all

_DECLARE = tl.constexpr(".shared .align 16 .b32 topk_bins[2348]; mov.u32 $0, $1;")
_PLACE = "{ .reg .pred p; .reg .b32 a; mov.u32 a, topk_bins; "
_CLEAR = tl.constexpr("""{ .reg .pred p; .reg .b32 a, b, e, n; mov.u32 a, topk_bins; add.u32 e, a, 9232;
mov.u32 b, %tid.x; mad.lo.u32 a, b, 16, a; mov.u32 b, 0; mov.u32 n, %ntid.x; shl.b32 n, n, 4;
NEXT: setp.ge.u32 p, a, e; @p bra DONE; st.shared.v4.b32 [a], {b, b, b, b}; add.u32 a, a, n; bra NEXT;
DONE: mov.u32 $0, $1; }""")
_ADD = tl.constexpr(
    _PLACE + "mad.lo.u32 a, $1, 4, a; setp.ne.b32 p, $2, 0; @p red.shared.add.u32 [a], 1; mov.u32 $0, 0; }"
)
# words of the bitmap in shared memory. Arguments: number of a word or a position, valid
_WORD = "{ .reg .pred p; .reg .b32 a, b, n; mov.u32 a, topk_marks; setp.ne.b32 p, $2, 0; "
_UNMARK = tl.constexpr(_WORD + "mad.lo.u32 a, $1, 4, a; mov.u32 b, 0; @p st.shared.b32 [a], b; mov.u32 $0, 0; }")
_MARKED = tl.constexpr(_WORD + "mad.lo.u32 a, $1, 4, a; mov.u32 b, 0; @p ld.shared.b32 b, [a]; mov.u32 $0, b; }")
_MARK = tl.constexpr(
    _WORD + "shr.u32 b, $1, 5; mad.lo.u32 a, b, 4, a; and.b32 n, $1, 31; mov.u32 b, 1; shl.b32 b, b, n;"
    " @p red.shared.or.b32 [a], b; mov.u32 $0, 0; }"
)
# arguments: word, where its first bit goes, what that stands for, indices
_WRITE = tl.constexpr("""{ .reg .pred p; .reg .b32 w, b; .reg .b64 g; mov.b32 w, $1; mad.wide.s32 g, $2, 4, $4;
NEXT: setp.eq.b32 p, w, 0; @p bra DONE; brev.b32 b, w; clz.b32 b, b; add.u32 b, b, $3; st.global.b32 [g], b;
add.s64 g, g, 4; add.u32 b, w, -1; and.b32 w, w, b; bra NEXT;
DONE: mov.u32 $0, 0; }""")
# the same into the counts' array, and what is there into indices (arguments: those, how many)
_GATHER = tl.constexpr("""{ .reg .pred p; .reg .b32 w, b, g; mov.b32 w, $1; mov.u32 g, topk_bins;
mad.lo.u32 g, $2, 4, g;
NEXT: setp.eq.b32 p, w, 0; @p bra DONE; brev.b32 b, w; clz.b32 b, b; add.u32 b, b, $3; st.shared.b32 [g], b;
add.u32 g, g, 4; add.u32 b, w, -1; and.b32 w, w, b; bra NEXT;
DONE: mov.u32 $0, 0; }""")
_STORE = tl.constexpr("""{ .reg .pred p; .reg .b32 a, b, n, t; .reg .b64 g; mov.u32 t, %tid.x; mov.u32 n, %ntid.x;
NEXT: setp.ge.s32 p, t, $2; @p bra DONE; mov.u32 a, topk_bins; mad.lo.u32 a, t, 4, a; ld.shared.b32 b, [a];
mad.wide.s32 g, t, 4, $1; st.global.b32 [g], b; add.u32 t, t, n; bra NEXT;
DONE: mov.u32 $0, 0; }""")

# a thread compares its keys with all: that of which need - 1 are larger is it
_NTH = tl.constexpr("""{ .reg .pred p; .reg .b32 a, b, e, t, r, m; .reg .b64 v, w, x, y, z; bar.sync 0;
mov.u32 a, topk_bins; ld.shared.b32 m, [a+9216]; mad.lo.u32 e, m, 8, a; mov.u32 t, %tid.x;
KEY: setp.ge.u32 p, t, m; @p bra DONE;
mad.lo.u32 b, t, 8, a; ld.shared.b64 v, [b+8192]; mov.u32 r, 1; mov.u32 b, a;
OTHER: ld.shared.v2.b64 {w, x}, [b+8192]; ld.shared.v2.b64 {y, z}, [b+8208];
setp.gt.u64 p, w, v; @p add.u32 r, r, 1; setp.gt.u64 p, x, v; @p add.u32 r, r, 1;
setp.gt.u64 p, y, v; @p add.u32 r, r, 1; setp.gt.u64 p, z, v; @p add.u32 r, r, 1;
add.u32 b, b, 32; setp.lt.u32 p, b, e; @p bra OTHER;
setp.eq.u32 p, r, $2; @p st.shared.b64 [a+9248], v; mov.u32 b, %ntid.x; add.u32 t, t, b; bra KEY;
DONE: bar.sync 0; ld.shared.v2.b32 {$1, $0}, [a+9248]; xor.b32 $0, $0, -2147483648; not.b32 $1, $1; }""")


@triton.constexpr_function
def _marks_of(words):
    """PTX of `declare_marks`."""
    return f".shared .align 16 .b32 topk_marks[{int(words)}]; mov.u32 $0, $1;"


@triton.constexpr_function
def _collect_of(here):
    """PTX of `collected`. Arguments: valid, key, position, lowest and highest key of the bin, bitmap, list, its first
    place, its places."""
    where = "mov.u32 d, topk_marks; mad.lo.u32 d, a, 4, d;" if here else "mad.wide.u32 g, a, 4, $6;"
    mark = "red.shared.or.b32 [d], b;" if here else "red.relaxed.gpu.global.or.b32 [g], b;"
    lines = [
        "{ .reg .pred p; .reg .b32 a, b, d; .reg .b64 g, h;",
        "setp.ne.b32 p, $1, 0; setp.ge.and.u32 p, $2, $4, p; @!p bra DONE; setp.gt.u32 p, $2, $5; @p bra ABOVE;",
        "mov.u32 a, topk_bins; atom.shared.add.u32 b, [a+9216], 1; add.u32 b, b, $8;",
        "setp.ge.s32 p, b, $9; @p bra DONE;",
        "mad.wide.s32 g, b, 4, $7; mad.wide.s32 h, $9, 4, g; st.global.b32 [g], $2; st.global.b32 [h], $3; bra DONE;",
        f"ABOVE: shr.u32 a, $3, 5; {where} and.b32 a, $3, 31; mov.u32 b, 1; shl.b32 b, b, a; {mark}",
        "DONE: mov.u32 $0, 0; }",
    ]
    return "\n".join(lines)


@triton.constexpr_function
def _append_of(each):
    """PTX that appends wanted ones of a thread's `each` (wanted, signed key, position) to the list, as key above
    complement of the position: one addition for all of a thread."""
    each = int(each)
    lines = ["{ .reg .pred p; .reg .b32 a, b, s, k, n; .reg .b64 r; mov.u32 s, 0;"]
    lines += [f"add.u32 s, s, ${each + i};" for i in range(each)]
    lines += ["setp.eq.u32 p, s, 0; @p bra DONE; mov.u32 a, topk_bins;"]
    lines += ["atom.shared.add.u32 b, [a+9216], s; mad.lo.u32 b, b, 8, a;"]
    for i in range(each):
        lines += [
            f"setp.ne.b32 p, ${each + i}, 0; xor.b32 k, ${2 * each + i}, -2147483648; not.b32 n, ${3 * each + i};"
        ]
        lines += ["mov.b64 r, {n, k}; @p st.shared.b64 [b+8192], r; @p add.u32 b, b, 8;"]
    return "\n".join([*lines, "DONE:", *(f"mov.u32 ${i}, 0;" for i in range(each)), "}"])


@triton.constexpr_function
def _put_of(each):
    """PTX that writes the wanted ones of a thread's `each` (wanted, number, address of all), threads in their order."""
    each = int(each)
    lines = ["{ .reg .pred p; .reg .b32 t, l, w, a, b, s, x, u; .reg .b64 g; mov.u32 s, 0;"]
    lines += [f"add.u32 s, s, ${each + i};" for i in range(each)]
    lines += ["mov.u32 t, %tid.x; and.b32 l, t, 31; shr.u32 w, t, 5; mov.u32 a, topk_bins; mov.u32 x, s;"]
    lines += [f"shfl.sync.up.b32 u|p, x, {1 << i}, 0, -1; @p add.u32 x, x, u;" for i in range(5)]
    lines += ["setp.eq.u32 p, l, 31; mad.lo.u32 b, w, 4, a; @p st.shared.b32 [b+9264], x; bar.sync 0;"]
    lines += ["setp.lt.u32 p, l, w; mad.lo.u32 b, l, 4, a; mov.u32 u, 0; @p ld.shared.b32 u, [b+9264];"]
    lines += ["redux.sync.add.s32 u, u, -1; add.u32 x, x, u; sub.u32 x, x, s;"]
    for i in range(each):
        lines += [f"setp.ne.b32 p, ${each + i}, 0; mad.wide.s32 g, x, 4, ${3 * each};"]
        lines += [f"@p st.global.b32 [g], ${2 * each + i}; add.u32 x, x, ${each + i};"]
    return "\n".join([*lines, *(f"mov.u32 ${i}, 0;" for i in range(each)), "}"])


@triton.constexpr_function
def registers(outputs, *inputs):
    """Constraints of `outputs` 32-bit results and as many of each input."""
    return ",".join(["=r"] * int(outputs) + [kind for kind in inputs for _ in range(int(outputs))])


@triton.constexpr_function
def _cut_of(warps):
    """PTX of `cut_bins`: a thread sums neighbouring bins, a warp its threads; the thread that has the bin says so."""
    warps = int(warps)
    each = BINS.value // (32 * warps)
    step = min(each, 4)
    bins = [f"c{i}" for i in range(each)]
    lines = [
        "{ .reg .pred p; .reg .b32 t, l, w, a, b, s, x, u, " + ", ".join(bins) + ";",
        "mov.u32 t, %tid.x; and.b32 l, t, 31; shr.u32 w, t, 5; mov.u32 a, topk_bins;",
        f"mul.lo.u32 t, t, {each}; mad.lo.u32 b, t, 4, a; mov.u32 s, 0;",
        *(f"ld.shared.v{step}.b32 {{{', '.join(bins[i : i + step])}}}, [b+{4 * i}];" for i in range(0, each, step)),
        *(f"add.u32 s, s, {c};" for c in bins),
        "mov.u32 x, s;",
        *(f"shfl.sync.up.b32 u|p, x, {d}, 0, -1; @p add.u32 x, x, u;" for d in (1, 2, 4, 8, 16)),
        "setp.eq.u32 p, l, 31; mad.lo.u32 b, w, 4, a; @p st.shared.b32 [b+9264], x; bar.sync 0;",
        "setp.lt.u32 p, l, w; mad.lo.u32 b, l, 4, a; mov.u32 u, 0; @p ld.shared.b32 u, [b+9264];",
        # what this thread needs: less what warps, and lanes, before it have
        "redux.sync.add.s32 u, u, -1; sub.u32 x, s, x; sub.u32 x, x, u; add.u32 x, x, $3;",
        *(
            f"setp.gt.s32 p, x, 0; setp.le.and.s32 p, x, {c}, p; add.u32 u, t, {i};"
            f" @p st.shared.v4.b32 [a+9232], {{u, x, {c}, {c}}}; sub.u32 x, x, {c};"
            for i, c in enumerate(bins)
        ),
        "bar.sync 0; ld.shared.v4.b32 {$0, $1, $2, u}, [a+9232]; }",
    ]
    return "\n".join(lines)


@triton.constexpr_function
def _save_of(warps):
    """PTX of `save`: a thread stores neighbouring bins; those of a group lie in one warp, which sums them."""
    each = BINS.value // (32 * int(warps))
    step, lanes = min(each, 4), BINS.value // GROUPS.value // each
    bins = [f"c{i}" for i in range(each)]
    parts = [(i, ", ".join(bins[i : i + step])) for i in range(0, each, step)]
    lines = [
        "{ .reg .pred p; .reg .b32 t, a, s, u, " + ", ".join(bins) + "; .reg .b64 g;",
        f"mov.u32 t, %tid.x; mov.u32 a, topk_bins; mad.lo.u32 a, t, {4 * each}, a; mad.wide.u32 g, t, {4 * each}, $1;",
        *(f"ld.shared.v{step}.b32 {{{some}}}, [a+{4 * i}];" for i, some in parts),
        *(f"st.global.v{step}.b32 [g+{4 * i}], {{{some}}};" for i, some in parts),
        "mov.u32 s, 0;",
        *(f"add.u32 s, s, {c};" for c in bins),
        *(f"shfl.sync.bfly.b32 u, s, {1 << i}, 31, -1; add.u32 s, s, u;" for i in range(lanes.bit_length() - 1)),
        f"and.b32 u, t, {lanes - 1}; setp.eq.u32 p, u, 0; div.u32 u, t, {lanes}; mad.wide.u32 g, u, 4, $1;",
        f"@p st.global.b32 [g+{4 * BINS.value}], s; mov.u32 $0, 0; }}",
    ]
    return "\n".join(lines)


@triton.constexpr_function
def _choose_of(splits):
    """PTX of `choose`: each warp does it, a lane two groups, then a bin, so that none waits for another."""
    splits, stride = int(splits), 4 * COUNTS.value
    scan = [
        "mov.u32 x, c;",
        *(f"shfl.sync.up.b32 u|p, x, {d}, 0, -1; @p add.u32 x, x, u;" for d in (1, 2, 4, 8, 16)),
        # what is needed from this lane on; the lane that has it
        "sub.u32 x, c, x; add.u32 x, x, n; setp.gt.s32 p, x, 0; setp.le.and.s32 p, x, c, p;",
        "vote.sync.ballot.b32 m, p, -1; brev.b32 m, m; clz.b32 m, m;",
    ]
    lines = [
        "{ .reg .pred p; .reg .b32 l, a, b, c, d, u, x, m, n; .reg .b64 g;",
        "mov.u32 l, %tid.x; and.b32 l, l, 31; mov.u32 n, $6; mad.wide.u32 g, l, 8, $4; mov.u32 a, 0; mov.u32 c, 0;",
        *(
            f"ld.global.v2.b32 {{u, x}}, [g+{i * stride + 4 * BINS.value}]; add.u32 a, a, u; add.u32 c, c, x;"
            for i in range(splits)
        ),
        "add.u32 c, c, a;",
        *scan,
        # the first or the second group of that lane
        "setp.gt.s32 p, x, a; shl.b32 b, l, 1; @p add.u32 b, b, 1; @p sub.u32 x, x, a;",
        "shfl.sync.idx.b32 b, b, m, 31, -1; shfl.sync.idx.b32 n, x, m, 31, -1;",
        "shl.b32 b, b, 5; add.u32 b, b, l; mad.wide.u32 g, b, 4, $4; mov.u32 c, 0; mov.u32 d, 0;",
        *(
            f"ld.global.b32 u, [g+{i * stride}]; add.u32 c, c, u; setp.gt.s32 p, $5, {i}; @p add.u32 d, d, u;"
            for i in range(splits)
        ),
        *scan,
        "shfl.sync.idx.b32 $0, b, m, 31, -1; shfl.sync.idx.b32 $1, x, m, 31, -1;",
        "shfl.sync.idx.b32 $2, c, m, 31, -1; shfl.sync.idx.b32 $3, d, m, 31, -1; }",
    ]
    return "\n".join(lines)


@triton.jit
def ordered_key(x):
    """uint32 whose unsigned order is the numeric order of float32 x; NaN counts as -inf, -0 equals +0."""
    bits = (tl.maximum(x, -float("inf")) + 0.0).to(tl.int32, bitcast=True)  # the larger of NaN and a number is that
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def signed_key(x):
    """`ordered_key` as int32 of the same order: more than -2**31."""
    bits = (tl.maximum(x, -float("inf")) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unsigned(v):
    """`ordered_key` of a signed key."""
    return (v ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def signed(key):
    """The signed key of an `ordered_key`."""
    return key.to(tl.int32, bitcast=True) ^ -0x80000000


@triton.jit
def bin_of_key(v):
    """`bin_of` a signed key; the last of -2**31."""
    step = v >> _IN_BIN
    sign = step >> 31
    return ~(tl.minimum(tl.maximum((step ^ sign) - _FIRST_STEP, 0), BINS // 2 - 1) ^ sign) + BINS // 2


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
    return (key.to(tl.int64) << POSITION) | (position ^ LAST)


@triton.jit
def parts(rank):
    """(signed key, position) of a rank."""
    return signed((rank >> POSITION).to(tl.uint32)), ((rank & LAST) ^ LAST).to(tl.int32)


@triton.jit
def declare(SHARED: tl.constexpr):
    if SHARED:
        tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def declare_marks(HERE: tl.constexpr):
    """A bitmap of HERE words for this program, where `declare` stands. 0: it is in global memory."""
    if HERE:
        asm: tl.constexpr = _marks_of(HERE)
        tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def no_marks(p_marks, o, valid, HERE: tl.constexpr):
    """Clear words o of the bitmap."""
    if HERE:
        tl.inline_asm_elementwise(_UNMARK, "=r,r,r", [o, valid.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(p_marks + o, tl.zeros(o.shape, tl.int32), mask=valid)


@triton.jit
def marked(p_marks, o, valid, HERE: tl.constexpr):
    """Words o of the bitmap, uint32, which other threads and programs wrote."""
    if HERE:
        word = tl.inline_asm_elementwise(
            _MARKED, "=r,r,r", [o, valid.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        word = tl.load(p_marks + o, mask=valid, other=0, cache_modifier=".cg")
    return word.to(tl.uint32, bitcast=True)


@triton.jit
def no_counts(SHARED: tl.constexpr):
    """An empty histogram, and no places reserved; whatever used them before must have ended in a barrier."""
    if SHARED:
        tl.inline_asm_elementwise(_CLEAR, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
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
def save(p_counts, histogram, SHARED: tl.constexpr):
    """Store the histogram: counts of bins, then of groups."""
    if SHARED:
        tl.debug_barrier()
        asm: tl.constexpr = _save_of(tl.extra.cuda.num_warps())
        tl.inline_asm_elementwise(asm, "=r,l", [p_counts.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(p_counts + tl.arange(0, BINS), histogram)
        groups = tl.sum(tl.reshape(histogram, (GROUPS, BINS // GROUPS)), 1)
        tl.store(p_counts + BINS + tl.arange(0, GROUPS), groups)


@triton.jit
def choose(p_counts, split, need, SPLITS: tl.constexpr, SHARED: tl.constexpr):
    """(bin of the need-th largest key, how many of its keys are needed, how many it holds, how many in splits before)
    of the histograms that `save` stored for SPLITS programs.

    First the group of bins, then the bin: all bins of many splits would be the larger part of what the kernel reads.
    """
    need += tl.zeros((), tl.int32)
    if SHARED:
        asm: tl.constexpr = _choose_of(SPLITS)
        types: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        place, need, held, before = tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,l,r,r", [p_counts.to(tl.int64), split, need], types, is_pure=False, pack=1
        )
    else:
        o, bins = tl.arange(0, SPLITS)[:, None], tl.arange(0, BINS // GROUPS)
        groups = tl.load(p_counts + o * COUNTS + BINS + tl.arange(0, GROUPS)[None, :])
        group, need, _ = cut(tl.sum(groups, 0), need, GROUPS)
        counts = tl.load(p_counts + o * COUNTS + group * (BINS // GROUPS) + bins[None, :])
        place, need, held = cut(tl.sum(counts, 0), need, BINS // GROUPS)
        before = tl.sum(tl.sum(tl.where((o < split) & (bins[None, :] == place), counts, 0), 1), 0)
        place += group * (BINS // GROUPS)
    return place, need, held, before


@triton.jit
def mark(p_marks, position, mask, HERE: tl.constexpr):
    """Set the bits of positions."""
    if HERE:
        tl.inline_asm_elementwise(_MARK, "=r,r,r", [position, mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.atomic_or(p_marks + (position >> 5), 1 << (position & 31), mask=mask, sem="relaxed")


@triton.jit
def collected(
    p_marks, p_list, before, taken, key, position, valid, low, high, LISTED: tl.constexpr, HERE: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Mark the positions of keys above `high`; list those from `low` on with their keys, in any order if SHARED, as
    far as the list reaches. Returns how many those are, 0 if SHARED: few keys are either, so one branch is all that
    most take."""
    if SHARED:
        arguments = [
            valid.to(tl.int32), key, position, low, high, p_marks.to(tl.int64), p_list.to(tl.int64), before, LISTED,
        ]  # fmt: skip
        asm: tl.constexpr = _collect_of(HERE)
        tl.inline_asm_elementwise(asm, "=r,r,r,r,r,r,l,l,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        mark(p_marks, position, valid & (key > high), HERE)
        match = (valid & (key >= low) & (key <= high)).to(tl.int32)
        place = before + taken + tl.cumsum(match, 0) - match
        fits = (match != 0) & (place < LISTED)
        tl.store(p_list + place, key.to(tl.int32, bitcast=True), mask=fits)
        tl.store(p_list + LISTED + place, position, mask=fits)
        taken += tl.sum(match)
    return taken


@triton.jit
def written(p_indices, place, word, position, GATHER: tl.constexpr, SHARED: tl.constexpr):
    """Write where the bits of uint32 words stand, ascending: `position` and on, from `place` on. GATHER: where the
    counts were, for `stored`."""
    if GATHER:
        arguments = [word, place, position]
        tl.inline_asm_elementwise(_GATHER, "=r,r,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)
    elif SHARED:
        arguments = [word, place, position, p_indices.to(tl.int64)]
        tl.inline_asm_elementwise(_WRITE, "=r,r,r,r,l", arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        for i in range(32):
            is_set = (word >> i) & 1
            tl.store(p_indices + place, position + i, mask=is_set != 0)
            place += is_set.to(tl.int32)


@triton.jit
def stored(p_indices, K: tl.constexpr, GATHER: tl.constexpr):
    """Store the K numbers that `written` gathered."""
    if GATHER:
        tl.debug_barrier()
        arguments = [p_indices.to(tl.int64), tl.zeros((), tl.int32) + K]
        tl.inline_asm_elementwise(_STORE, "=r,l,r", arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def cut(counts, need, N: tl.constexpr = BINS):
    """(bin of the need-th largest key, how many of its keys are needed, how many it holds); N counts."""
    upto = tl.cumsum(counts, 0)
    before = upto - counts
    found = (tl.arange(0, N).to(tl.int64) << (2 * POSITION)) | ((need - before).to(tl.int64) << POSITION) | counts
    # one bin is it; one reduction for the three numbers
    found = tl.sum(tl.where((before < need) & (upto >= need), found, 0))
    need = ((found >> POSITION) & LAST).to(tl.int32)
    return (found >> (2 * POSITION)).to(tl.int32), need, (found & LAST).to(tl.int32)


@triton.jit
def cut_bins(histogram, need, SHARED: tl.constexpr):
    """`cut` of the histogram: (bin of the need-th largest key, how many of its keys are needed, how many it holds)."""
    if SHARED:
        tl.debug_barrier()
        asm: tl.constexpr = _cut_of(tl.extra.cuda.num_warps())
        types: tl.constexpr = (tl.int32, tl.int32, tl.int32)
        need += tl.zeros((), tl.int32)
        place, need, held = tl.inline_asm_elementwise(asm, "=r,=r,=r,r", [need], types, is_pure=False, pack=1)
    else:
        place, need, held = cut(histogram, need)
    return place, need, held


@triton.jit
def nth(v, position, wanted, need, SHARED: tl.constexpr):
    """(v, position) of the need-th largest of the wanted (at most FEW) by (v, lower position first), where the list was
    empty. v: signed keys."""
    if SHARED:
        EACH: tl.constexpr = v.numel // tl.extra.cuda.num_threads()
        append: tl.constexpr = _append_of(EACH)
        kinds: tl.constexpr = registers(EACH, "r", "r", "r")
        arguments = [wanted.to(tl.int32), v, position]
        tl.inline_asm_elementwise(append, kinds, arguments, dtype=tl.int32, is_pure=False, pack=EACH)
        types: tl.constexpr = (tl.int32, tl.int32)
        least, last = tl.inline_asm_elementwise(_NTH, "=r,=r,r", [need], types, is_pure=False, pack=1)
    else:
        ranks = ranked(unsigned(v), position)
        found = tl.zeros((), tl.int64)
        for i in range(32 + POSITION):
            larger = found | (tl.full((), 1, tl.int64) << (31 + POSITION - i))
            enough = tl.sum((wanted & (ranks >= larger)).to(tl.int32)) >= need
            found = tl.where(enough, larger, found)
        least, last = parts(found)
    return least, last


@triton.jit
def put(p_indices, number, wanted, SHARED: tl.constexpr, CTAS: tl.constexpr = 1):
    """Write the wanted numbers one behind the other, in an order that shapes, layout and warps alone decide; each of
    CTAS programs that share the tensor its own."""
    if SHARED:
        EACH: tl.constexpr = number.numel // (tl.extra.cuda.num_threads() * CTAS)
        asm: tl.constexpr = _put_of(EACH)
        kinds: tl.constexpr = registers(EACH, "r", "r", "l")
        arguments = [wanted.to(tl.int32), number, p_indices.to(tl.int64)]
        tl.inline_asm_elementwise(asm, kinds, arguments, dtype=tl.int32, is_pure=False, pack=EACH)
    else:
        tl.store(p_indices + tl.cumsum(wanted.to(tl.int32), 0) - 1, number, mask=wanted)
