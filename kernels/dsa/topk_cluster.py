"""Row top-k by a cluster: programs on neighbouring multiprocessors share a row, each other's counts and candidates.

| | |
|---|---|
| count | each program counts the keys of its columns, which it holds, into its own 2048 bins |
| cut | one warp of each reads the counts of all, groups of bins first, and finds the bin of the K-th |
| push | keys of that bin, some tens, are written to the list of every program; those above it to the output |
| rank | a warp compares one candidate of its program with all: the number of larger ones is its place, or says no |

One launch, two barriers of the cluster, no memory but the output. A bin with more keys than the list takes is counted
again, eleven bits at a time. A row longer than the programs hold is read twice, block by block. Which columns are
counted follows the row's own length, whatever the width of the buffer.

Interpreted, the cluster is one program and the list has no place, so that the bin is counted until it fits exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.dsa.topk_histogram import (
    BINS,
    DIGIT,
    POSITION,
    bin_of_key,
    bounds_of,
    counted,
    cut,
    no_counts,
    parts,
    put,
    ranked,
    registers,
    signed_key,
    unsigned,
)

LISTED = tl.constexpr(512)  # keys that the list has room for
_ALONE = tl.constexpr(128)  # keys that one program ranks in the time of counting once more
_NONE = tl.constexpr(-0x80000000)  # no column's key

# the array of topk_histogram, with other uses behind the counts. Bytes 8192: 64 sums of 32 bins; 9216: own candidates;
# 9232: bin, needed of it, in it, in it before this program; 9248: above it before this program; 9264: counts of up to
# 32 warps; 9392: the list
_DECLARE = tl.constexpr(".shared .align 16 .b32 topk_bins[3372]; mov.u32 $0, $1;")
_TOTAL = tl.constexpr("""{ .reg .pred p; .reg .b32 l, n, a; mov.u32 l, %tid.x; and.b32 l, l, 31; mov.u32 n, %ntid.x;
shr.u32 n, n, 5; setp.lt.u32 p, l, n; mov.u32 a, topk_bins; mad.lo.u32 a, l, 4, a; mov.u32 n, 0;
@p ld.shared.b32 n, [a+9264]; redux.sync.add.s32 $0, n, -1; mov.u32 l, $1; }""")
# arguments: where the largest candidate goes, in the list, needed of them, in the list before this program
_RANK = tl.constexpr("""{ .reg .pred p; .reg .b32 a, c, e, i, j, l, n, r, t, u, w; .reg .b64 g, k, o;
mov.u32 a, topk_bins; ld.shared.b32 c, [a+9216]; mov.u32 t, %tid.x; and.b32 l, t, 31; shr.u32 j, t, 5;
mov.u32 n, %ntid.x; shr.u32 n, n, 5;
KEY: setp.ge.u32 p, j, c; @p bra DONE;
add.u32 t, j, $4; mad.lo.u32 t, t, 8, a; ld.shared.b64 k, [t+9392]; mov.u32 i, l; mov.u32 e, 0; mov.u32 r, 0;
OTHER: mad.lo.u32 t, i, 8, a; mov.b64 o, 0; setp.lt.u32 p, i, $2; @p ld.shared.b64 o, [t+9392];
setp.gt.u64 p, o, k; @p add.u32 r, r, 1; add.u32 i, i, 32; add.u32 e, e, 32; setp.lt.u32 p, e, $2; @p bra OTHER;
redux.sync.add.s32 r, r, -1; setp.eq.u32 p, l, 0; setp.lt.and.u32 p, r, $3, p; mov.b64 {u, w}, k; not.b32 u, u;
mad.wide.u32 g, r, 4, $1; @p st.global.b32 [g], u; add.u32 j, j, n; bra KEY;
DONE: mov.u32 $0, 0; }""")


@triton.constexpr_function
def _remote(ctas, kind, to, where, i, offset):
    """PTX that loads `to` from program i's copy of the shared address in register `where`."""
    if ctas == 1:
        return f"ld.shared.{kind} {to}, [{where}+{offset}];"
    return f"mapa.shared::cluster.u32 y, {where}, {i}; ld.shared::cluster.{kind} {to}, [y+{offset}];"


@triton.constexpr_function
def _sums_of(warps):
    """PTX that sums groups of 32 bins, which lie in one warp."""
    each = BINS.value // (32 * int(warps))
    step, lanes = min(each, 4), 32 // each
    bins = [f"c{i}" for i in range(each)]
    some = [(i, ", ".join(bins[i : i + step])) for i in range(0, each, step)]
    lines = [
        "{ .reg .pred p; .reg .b32 t, a, b, s, u, " + ", ".join(bins) + "; bar.sync 0;",
        f"mov.u32 t, %tid.x; mov.u32 a, topk_bins; mad.lo.u32 b, t, {4 * each}, a; mov.u32 s, 0;",
        *(f"ld.shared.v{step}.b32 {{{group}}}, [b+{4 * i}];" for i, group in some),
        *(f"add.u32 s, s, {c};" for c in bins),
        *(f"shfl.sync.bfly.b32 u, s, {1 << i}, 31, -1; add.u32 s, s, u;" for i in range(lanes.bit_length() - 1)),
        f"and.b32 u, t, {lanes - 1}; setp.eq.u32 p, u, 0; shr.u32 u, t, {lanes.bit_length() - 1};",
        "mad.lo.u32 b, u, 4, a; @p st.shared.b32 [b+8192], s; mov.u32 $0, $1; }",
    ]
    return "\n".join(lines)


@triton.constexpr_function
def _choose_of(ctas):
    """PTX of `cut_cluster` behind the barrier: the first warp finds the group, then the bin, and tells the others."""
    ctas = int(ctas)
    scan = [
        "mov.u32 x, c;",
        *(f"shfl.sync.up.b32 u|p, x, {d}, 0, -1; @p add.u32 x, x, u;" for d in (1, 2, 4, 8, 16)),
        # what is needed from this lane on; the lane that has it
        "sub.u32 x, c, x; add.u32 x, x, n; setp.gt.s32 p, x, 0; setp.le.and.s32 p, x, c, p;",
        "vote.sync.ballot.b32 m, p, -1; brev.b32 m, m; clz.b32 m, m;",
    ]
    each = [f"v{i}" for i in range(2 * ctas)]
    lines = [
        f"{{ .reg .pred p, q; .reg .b32 l, a, b, c, d, e, f, h, m, n, r, u, x, y, {', '.join(each)};",
        "mov.u32 l, %tid.x; setp.ge.u32 q, l, 32; @q bra SHARE; mov.u32 n, $5; mov.u32 r, %cluster_ctarank;",
        # e and c count the lane's two groups, f and d those of programs before this one
        "mov.u32 a, topk_bins; mad.lo.u32 b, l, 8, a; mov.u32 c, 0; mov.u32 d, 0; mov.u32 e, 0; mov.u32 f, 0;",
        *(_remote(ctas, "v2.b32", f"{{v{2 * i}, v{2 * i + 1}}}", "b", i, 8192) for i in range(ctas)),
    ]
    for i in range(ctas):
        lines += [f"add.u32 e, e, v{2 * i}; add.u32 c, c, v{2 * i + 1}; setp.gt.u32 p, r, {i};"]
        lines += [f"@p add.u32 f, f, v{2 * i}; @p add.u32 d, d, v{2 * i + 1};"]
    lines += [
        "add.u32 c, c, e;",
        *scan,
        # the first or the second group of that lane
        "setp.gt.s32 p, x, e; shl.b32 b, l, 1; @p add.u32 b, b, 1; @p sub.u32 x, x, e;",
        # above it: all of the lanes before, of that lane nothing or its first group
        "selp.b32 h, f, 0, p; add.u32 d, d, f; setp.lt.u32 p, l, m; @p mov.u32 h, d;",
        "setp.gt.u32 p, l, m; @p mov.u32 h, 0; redux.sync.add.s32 f, h, -1;",
        "shfl.sync.idx.b32 b, b, m, 31, -1; shfl.sync.idx.b32 n, x, m, 31, -1;",
        "shl.b32 b, b, 5; add.u32 b, b, l; mad.lo.u32 e, b, 4, a; mov.u32 c, 0; mov.u32 d, 0;",
        *(_remote(ctas, "b32", f"v{i}", "e", i, 0) for i in range(ctas)),
        *(f"add.u32 c, c, v{i}; setp.gt.u32 p, r, {i}; @p add.u32 d, d, v{i};" for i in range(ctas)),
    ]
    lines += [
        *scan,
        "setp.lt.u32 p, l, m; selp.b32 h, d, 0, p; redux.sync.add.s32 h, h, -1; add.u32 f, f, h;",
        "setp.eq.u32 p, l, m; @p st.shared.v4.b32 [a+9232], {b, x, c, d}; @p st.shared.b32 [a+9248], f;",
        "SHARE: bar.sync 0; mov.u32 a, topk_bins;",
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [a+9232]; ld.shared.b32 $4, [a+9248]; }",
    ]
    return "\n".join(lines)


@triton.constexpr_function
def _push_of(each, ctas):
    """PTX that writes the wanted ones of a thread's `each` (wanted, signed key, position) to all lists, as key above
    complement of the position, from the place on that follows: one addition for all of a thread."""
    each, ctas = int(each), int(ctas)
    lines = ["{ .reg .pred p; .reg .b32 a, b, s, k, n, y; .reg .b64 r; mov.u32 s, 0;"]
    lines += [f"add.u32 s, s, ${each + i};" for i in range(each)]
    lines += ["setp.eq.u32 p, s, 0; @p bra DONE; mov.u32 a, topk_bins;"]
    lines += [f"atom.shared.add.u32 b, [a+9216], s; add.u32 b, b, ${4 * each}; mad.lo.u32 b, b, 8, a;"]
    for i in range(each):
        lines += [f"setp.eq.u32 p, ${each + i}, 0; @p bra NEXT{i};"]
        lines += [f"xor.b32 k, ${2 * each + i}, -2147483648; not.b32 n, ${3 * each + i}; mov.b64 r, {{n, k}};"]
        if ctas == 1:
            lines += ["st.shared.b64 [b+9392], r;"]
        for j in range(ctas if ctas > 1 else 0):
            lines += [f"mapa.shared::cluster.u32 y, b, {j}; st.shared::cluster.b64 [y+9392], r;"]
        lines += [f"add.u32 b, b, 8; NEXT{i}:"]
    return "\n".join([*lines, "DONE:", *(f"mov.u32 ${i}, 0;" for i in range(each)), "}"])


@triton.jit
def _arrive(CTAS: tl.constexpr, SHARED: tl.constexpr):
    """What this thread did so far may be seen by all of the cluster that wait."""
    if SHARED and CTAS > 1:
        asm: tl.constexpr = "barrier.cluster.arrive.release; mov.u32 $0, $1;"
        tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _wait(CTAS: tl.constexpr, SHARED: tl.constexpr):
    if CTAS == 1:
        tl.debug_barrier()
    elif SHARED:
        asm: tl.constexpr = "barrier.cluster.wait.acquire; mov.u32 $0, $1;"
        tl.inline_asm_elementwise(asm, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _cut_cluster(histogram, need, CTAS: tl.constexpr, SHARED: tl.constexpr):
    """(bin of the need-th largest key of the cluster, how many of its keys are needed, how many it holds, how many of
    those in programs before this one, how many keys above the bin in them)."""
    need += tl.zeros((), tl.int32)
    if SHARED:
        sums: tl.constexpr = _sums_of(tl.extra.cuda.num_warps())
        tl.inline_asm_elementwise(sums, "=r,r", [need], dtype=tl.int32, is_pure=False, pack=1)
        _arrive(CTAS, SHARED)
        _wait(CTAS, SHARED)
        asm: tl.constexpr = _choose_of(CTAS)
        types: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32, tl.int32)
        place, need, held, before, above = tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,=r,r", [need], types, is_pure=False, pack=1
        )
    else:
        before, above = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        place, need, held = cut(histogram, need)
    return place, need, held, before, above


@triton.jit
def _push(v, position, wanted, before, CTAS: tl.constexpr, SHARED: tl.constexpr):
    """List the wanted keys and positions in all programs, from place `before` on."""
    if SHARED:
        EACH: tl.constexpr = v.numel // (tl.extra.cuda.num_threads() * CTAS)
        asm: tl.constexpr = _push_of(EACH, CTAS)
        kinds: tl.constexpr = registers(EACH, "r", "r", "r", "r")
        arguments = [wanted.to(tl.int32), v, position, before]
        tl.inline_asm_elementwise(asm, kinds, arguments, dtype=tl.int32, is_pure=False, pack=EACH)


@triton.jit
def _rank(p_indices, held, need, before, SHARED: tl.constexpr):
    """Write the positions of the `need` largest of the list's `held` keys, each at its rank."""
    if SHARED:
        arguments = [p_indices.to(tl.int64), held, need, before]
        tl.inline_asm_elementwise(_RANK, "=r,l,r,r,r", arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _total(wanted, SHARED: tl.constexpr):
    """How many this program's last `put` wrote."""
    if SHARED:
        total = tl.inline_asm_elementwise(
            _TOTAL, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip
        tl.debug_barrier()  # the next one overwrites it
    else:
        total = tl.sum(wanted.to(tl.int32))
    return total


@triton.jit
def loaded(p_row, i, end, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns from i on. ALIGNED: up to three behind the end along with it, which the row has."""
    o = i + tl.arange(0, BLOCK)
    if ALIGNED:
        end = (end + 3) // 4 * 4
    return tl.load(p_row + o, mask=o < end, other=0.0)


@triton.jit
def _keys(x, i, start, n, BLOCK: tl.constexpr):
    """Signed keys of columns from i on, and positions in the row."""
    position = i - start + tl.arange(0, BLOCK)
    return tl.where((position >= 0) & (position < n), signed_key(x), _NONE), position


@triton.jit
def _recounted(histogram, v, position, least, most, left, SHARED: tl.constexpr):
    """Keys of the interval of ranks by their digit above `left` bits."""
    rank = ranked(unsigned(v), position)
    digit = tl.minimum(tl.maximum((most - rank) >> left, 0), BINS - 1).to(tl.int32)
    return counted(histogram, digit, (rank >= least) & (rank <= most), SHARED)


@triton.jit
def _streamed(
    p_row, first, start, n, least, most, left, AGAIN: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Counts of all columns from `first` on: by bin, or AGAIN as `_recounted`."""
    histogram, end = tl.zeros((BINS,), tl.int32), start + n
    x = loaded(p_row, first, end, BLOCK, ALIGNED)
    for i in range(first, end, BLOCK):
        ahead = loaded(p_row, i + BLOCK, end, BLOCK, ALIGNED)  # arrives meanwhile
        v, position = _keys(x, i, start, n, BLOCK)
        if AGAIN:
            histogram = _recounted(histogram, v, position, least, most, left, SHARED)
        else:
            histogram = counted(histogram, bin_of_key(v), v != _NONE, SHARED)
        x = ahead
    return histogram


@triton.jit
def _compared(v, position, lower, last, top, until):
    """Whether (v, lower position first) lies above `top`, and whether it is none of those but from `lower` on."""
    above = (v > top) | ((v == top) & (position < until))
    return above, ((v > lower) | ((v == lower) & (position <= last))) & ~above


@triton.jit
def _selected(
    p_row, x, first, p_indices, start, n, K: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
    CTAS: tl.constexpr, ALIGNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """A row of more than K columns: HELD, x from `first` on; or read twice, BLOCK at a time. The counts are empty."""
    MOST: tl.constexpr = min(LISTED, _ALONE * CTAS) if SHARED else 0
    end = start + n
    v, position = _keys(x, first, start, n, x.numel)
    if HELD:
        histogram = counted(tl.zeros((BINS,), tl.int32), bin_of_key(v), v != _NONE, SHARED)
    else:
        histogram = _streamed(p_row, first, start, n, 0, 0, 0, False, BLOCK, ALIGNED, SHARED)
    place, need, held, before, above = _cut_cluster(histogram, K, CTAS, SHARED)
    low, high, left = bounds_of(place)
    least = tl.maximum(low, 1).to(tl.int64) << POSITION
    most = ((high.to(tl.int64) + 1) << POSITION) - 1
    left += POSITION
    while (held > need) & (held > MOST):
        left = tl.maximum(left - DIGIT, 0)
        _arrive(CTAS, SHARED)  # nobody reads the counts any more
        _wait(CTAS, SHARED)
        histogram = no_counts(SHARED)
        if HELD:
            histogram = _recounted(histogram, v, position, least, most, left, SHARED)
        else:
            histogram = _streamed(p_row, first, start, n, least, most, left, True, BLOCK, ALIGNED, SHARED)
        place, need, held, before, more = _cut_cluster(histogram, need, CTAS, SHARED)
        above += more
        most -= place.to(tl.int64) << left
        least = tl.maximum(least, most + 1 - (tl.full((), 1, tl.int64) << left))
    lower, last = parts(least)
    top, until = parts(most)
    whole = held == need  # the interval is taken along with what lies above it
    top, until = tl.where(whole, lower, top), tl.where(whole, last + 1, until)
    above += tl.where(whole, before, 0)
    if HELD:
        taken, inside = _compared(v, position, lower, last, top, until)
        if not whole:
            _push(v, position, inside, before, CTAS, SHARED)
        _arrive(CTAS, SHARED)
        put(p_indices + above, position, taken, SHARED, CTAS)
    else:
        y = loaded(p_row, first, end, BLOCK, ALIGNED)
        for i in range(first, end, BLOCK):
            ahead = loaded(p_row, i + BLOCK, end, BLOCK, ALIGNED)
            u, at = _keys(y, i, start, n, BLOCK)
            taken, inside = _compared(u, at, lower, last, top, until)
            if not whole:
                _push(u, at, inside, before, CTAS, SHARED)
            put(p_indices + above, at, taken, SHARED, CTAS)
            above += _total(taken, SHARED)
            y = ahead
        _arrive(CTAS, SHARED)
    _wait(CTAS, SHARED)
    if not whole:
        _rank(p_indices + K - need, held, need, before, SHARED)


@triton.jit(do_not_specialize=["columns"], do_not_specialize_on_alignment=["starts_ptr", "ends_ptr"])
def topk_cluster_kernel(
    logits_ptr, starts_ptr, ends_ptr, indices_ptr, columns, stride_logits, stride_indices, K: tl.constexpr,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr, CTAS: tl.constexpr, ALIGNED: tl.constexpr,
    FITS: tl.constexpr, SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid: (rows), clusters of CTAS programs. The first FIRST columns are asked for whatever the bounds are, which
    arrive meanwhile; rows that end behind them are held if they have at most BLOCK, else STREAM columns at a time,
    while the next ones arrive. FITS: no row ends behind FIRST."""
    if SHARED:
        tl.inline_asm_elementwise(_DECLARE, "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=False, pack=1)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    p_row, p_indices = logits_ptr + row * stride_logits, indices_ptr + row * stride_indices
    x = loaded(p_row, 0, columns, FIRST, ALIGNED)
    start = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), columns)
    n = tl.maximum(tl.minimum(tl.load(ends_ptr + row), columns) - start, 0)
    no_counts(SHARED)
    if n <= K:
        o = tl.arange(0, FIRST)
        for i in range(0, K, FIRST):
            tl.store(p_indices + i + o, tl.where(i + o < n, i + o, -1), mask=i + o < K)
    elif FITS:  # noqa: SIM114 - known when compiled: the other branches then are not
        _selected(p_row, x, 0, p_indices, start, n, K, FIRST, True, CTAS, ALIGNED, SHARED)
    elif start + n <= FIRST:
        _selected(p_row, x, 0, p_indices, start, n, K, FIRST, True, CTAS, ALIGNED, SHARED)
    else:
        first, end = start, start + n
        if ALIGNED:
            first = start // 4 * 4
        if end - first <= BLOCK:
            y = loaded(p_row, first, end, BLOCK, ALIGNED)
            _selected(p_row, y, first, p_indices, start, n, K, BLOCK, True, CTAS, ALIGNED, SHARED)
        else:
            _selected(p_row, x, first, p_indices, start, n, K, STREAM, False, CTAS, ALIGNED, SHARED)
