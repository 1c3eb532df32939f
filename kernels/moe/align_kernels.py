"""Sort (token, pick) pairs by expert on the device, without atomics between programs and without a host sync.

    pair p = t * K + k belongs to expert e(p) = expert_map[topk_ids[t, k]], or to none (-1, out of range)
    sorted_pairs lists the pairs of expert 0, then of expert 1, ... each in rising p; pair_row[p] is p's place, or -1

| tensor       | shape        | meaning                                                                         |
|--------------|--------------|---------------------------------------------------------------------------------|
| counts       | [chunks, BE] | pairs of each expert in a chunk; after the scan: in all earlier chunks          |
| totals       | [BE]         | pairs of each expert                                                            |
| tiles        | [tiles, 3]   | expert, first sorted row, end of the expert's rows; expert -1 beyond the last   |
| sorted_pairs | [T * K]      | pair of each sorted row; rows that no expert has are never written              |
| pair_row     | [T * K]      | sorted row of each pair, -1 where it has none                                   |

Many pairs are sorted by counting, in three launches: count per chunk, scan each expert's counts over the chunks, place.
Chunks are small: a pair's rank in its chunk takes a comparison with each other pair of it, and one chunk's latency is
all that a launch has to wait for. Few pairs take one launch (`prepare_kernel`), in which one program counts the experts
and describes the tiles, others place their pairs by comparing them with all, and others quantise the activations. The
order is the pairs' own, so the result is the same in every run. BE is a power of two >= E, and no larger: a histogram's
warps add up in shared memory with BE/32 atomic instructions that conflict BE/32-fold. A pair of no expert has E as its
expert and is not counted: under expert parallelism most pairs are such, and one counter would serialise them.
"""

import triton
import triton.language as tl

from blackwell_kernels.moe.gemm_kernels import quantize_groups


@triton.jit
def _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size):
    """Local expert of each pair; E where the pair is masked out, out of range, or not on this rank."""
    expert = tl.load(ids_ptr + o_p, mask=o_p < n_pairs, other=-1)
    if map_ptr is not None:
        known = (expert >= 0) & (expert < map_size)
        expert = tl.load(map_ptr + expert, mask=known, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E)


@triton.jit
def _no_tiles(tiles_ptr, first, n_tiles):
    """Mark tiles from `first` on as beyond the last."""
    for i in range(first, n_tiles, 256):
        o_tile = i + tl.arange(0, 256)
        tl.store(tiles_ptr + o_tile * 3, -1, mask=o_tile < n_tiles)


@triton.jit
def _describe_tiles(tiles_ptr, counts, n_tiles, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr):
    """Write the whole table from the experts' counts [BLOCK_E]; every expert's first, second, ... tile at a time."""
    o_e = tl.arange(0, BLOCK_E)
    tiles = (counts + BLOCK_T - 1) // BLOCK_T
    start = tl.cumsum(counts, axis=0) - counts
    p_tile = tiles_ptr + (tl.cumsum(tiles, axis=0) - tiles) * 3
    for i in range(0, tl.max(tiles, axis=0)):
        tl.store(p_tile + i * 3, o_e, mask=i < tiles)
        tl.store(p_tile + i * 3 + 1, start + i * BLOCK_T, mask=i < tiles)
        tl.store(p_tile + i * 3 + 2, start + counts, mask=i < tiles)
    _no_tiles(tiles_ptr, tl.sum(tiles, axis=0), n_tiles)


# counts follow the batch: specialising on their values would compile anew in mid-service
@triton.jit(do_not_specialize=["n_pairs", "n_tiles"])
def prepare_kernel(
    ids_ptr,
    map_ptr,
    sorted_pairs_ptr,
    pair_row_ptr,
    tiles_ptr,
    x_ptr,  # None: nothing to quantise
    q_ptr,
    scale_ptr,
    n_pairs,
    n_tiles,
    E,
    map_size,
    stride_x,
    stride_scale,
    hidden,
    BLOCK_P: tl.constexpr,
    PAIRS: tl.constexpr,  # power of two >= n_pairs
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (1 + ceil(T * K / BLOCK_P) + T * ceil(H / 128 / BLOCK_G)): a program for the tiles, programs that place
    BLOCK_P pairs each, programs that quantise.

    A pair's place is the number of smaller (expert, pair): comparing it with all pairs, CHUNK at a time, is cheaper
    than counting experts in every program.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0) - 1
    placing = tl.cdiv(n_pairs, BLOCK_P)
    if i_p < 0:
        experts = _load_experts(ids_ptr, map_ptr, tl.arange(0, PAIRS), n_pairs, E, map_size)
        counts = tl.histogram(experts, BLOCK_E, mask=experts < E)
        _describe_tiles(tiles_ptr, counts, n_tiles, BLOCK_E, BLOCK_T)
    elif i_p < placing:
        o_p = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
        expert = _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size)
        key = expert * PAIRS + o_p
        smaller = tl.zeros([BLOCK_P, CHUNK], tl.int32)
        for first in range(0, n_pairs, CHUNK):
            o_q = first + tl.arange(0, CHUNK)
            others = _load_experts(ids_ptr, map_ptr, o_q, n_pairs, E, map_size) * PAIRS + o_q
            smaller += (others[None, :] < key[:, None]).to(tl.int32)
        row = tl.sum(smaller, axis=1)
        placed = expert < E
        tl.store(sorted_pairs_ptr + row, o_p, mask=placed)
        tl.store(pair_row_ptr + o_p, tl.where(placed, row, -1), mask=o_p < n_pairs)
    elif x_ptr is not None:
        blocks = tl.cdiv(hidden // 128, BLOCK_G)
        i_x = i_p - placing
        quantize_groups(x_ptr, q_ptr, scale_ptr, stride_x, stride_scale, hidden, i_x // blocks, i_x % blocks, BLOCK_G)


@triton.jit(do_not_specialize=["n_pairs"])
def count_kernel(ids_ptr, map_ptr, counts_ptr, n_pairs, E, map_size, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    i_c = tl.program_id(0)
    o_p = i_c * CHUNK + tl.arange(0, CHUNK)
    expert = _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size)
    counts = tl.histogram(expert, BLOCK_E, mask=expert < E)
    tl.store(counts_ptr + i_c.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["n_chunks"])
def scan_kernel(counts_ptr, totals_ptr, n_chunks, BLOCK_C: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Exclusive scan of counts over chunks, in place; a program for each EXPERTS columns."""
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    o_e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], tl.int32)
    for c in range(0, n_chunks, BLOCK_C):
        p_counts = counts_ptr + (c + o_c)[:, None] * BLOCK_E + o_e[None, :]
        b_counts = tl.load(p_counts, mask=(c + o_c)[:, None] < n_chunks, other=0)
        before = tl.cumsum(b_counts, axis=0) - b_counts + total[None, :]
        tl.store(p_counts, before, mask=(c + o_c)[:, None] < n_chunks)
        total += tl.sum(b_counts, axis=0)
    tl.store(totals_ptr + o_e, total)


@triton.jit(do_not_specialize=["n_pairs", "n_tiles"])
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    totals_ptr,
    sorted_pairs_ptr,
    pair_row_ptr,
    tiles_ptr,
    n_pairs,
    n_tiles,
    E,
    map_size,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """A program for each chunk's pairs, and one more for the tiles."""
    i_c = tl.program_id(0) - 1
    totals = tl.load(totals_ptr + tl.arange(0, BLOCK_E))
    if i_c < 0:
        _describe_tiles(tiles_ptr, totals, n_tiles, BLOCK_E, BLOCK_T)
    else:
        o_i = tl.arange(0, CHUNK)
        o_p = i_c * CHUNK + o_i
        expert = _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size)
        placed = expert < E
        before = tl.load(counts_ptr + i_c.to(tl.int64) * BLOCK_E + expert, mask=placed, other=0)
        start = tl.gather(tl.cumsum(totals, axis=0) - totals, tl.where(placed, expert, 0), axis=0)
        # the others along the axis that lies within threads: summing across them would cost a shuffle a comparison
        earlier = (expert[:, None] == expert[None, :]) & (o_i[:, None] < o_i[None, :])
        row = start + before + tl.sum(earlier.to(tl.int32), axis=0)
        tl.store(sorted_pairs_ptr + row, o_p, mask=placed)
        tl.store(pair_row_ptr + o_p, tl.where(placed, row, -1), mask=o_p < n_pairs)
