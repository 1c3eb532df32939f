"""Sort (token, pick) pairs by expert on the device, without atomics between programs and without a host sync.

    pair p = t * K + k belongs to expert e(p) = expert_map[topk_ids[t, k]], or to none (-1, out of range)
    sorted_pairs lists the pairs of expert 0, then of expert 1, ... each in rising p; pair_row[p] is p's place, or -1

| tensor       | shape        | meaning                                                                   |
|--------------|--------------|---------------------------------------------------------------------------|
| counts       | [chunks, BE] | pairs of each expert in a chunk; after the scan: in all earlier chunks    |
| expert_start | [E + 1]      | first sorted row of each expert; the last entry is the number of rows     |
| tile_end     | [E]          | running number of BLOCK_T-row tiles up to and including each expert       |
| sorted_pairs | [T * K]      | pair of each sorted row; rows from expert_start[E] on are never written   |
| pair_row     | [T * K]      | sorted row of each pair, -1 where it has none                             |

A counting sort in three launches: count per chunk, scan over chunks and experts in one program, place. The order is
the pairs' own, so the result is the same in every run. BE is a power of two > E; bin E collects pairs of no expert.
"""

import triton
import triton.language as tl


@triton.jit
def _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size):
    """Local expert of each pair; E where the pair is masked out, out of range, or not on this rank."""
    expert = tl.load(ids_ptr + o_p, mask=o_p < n_pairs, other=-1)
    if map_ptr is not None:
        known = (expert >= 0) & (expert < map_size)
        expert = tl.load(map_ptr + expert, mask=known, other=-1)
    return tl.where((expert >= 0) & (expert < E), expert, E)


# counts follow the batch: specialising on their values would compile anew in mid-service
@triton.jit(do_not_specialize=["n_pairs"])
def count_kernel(ids_ptr, map_ptr, counts_ptr, n_pairs, E, map_size, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    i_c = tl.program_id(0)
    o_p = i_c * CHUNK + tl.arange(0, CHUNK)
    expert = _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size)
    counts = tl.histogram(expert, BLOCK_E)
    tl.store(counts_ptr + i_c.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E), counts)


@triton.jit(do_not_specialize=["n_chunks"])
def scan_kernel(
    counts_ptr,
    expert_start_ptr,
    tile_end_ptr,
    n_chunks,
    E,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: exclusive scan of counts over chunks (in place), then over experts."""
    o_c = tl.arange(0, BLOCK_C).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for c in range(0, n_chunks, BLOCK_C):
        p_counts = counts_ptr + (c + o_c)[:, None] * BLOCK_E + o_e[None, :]
        b_counts = tl.load(p_counts, mask=(c + o_c)[:, None] < n_chunks, other=0)
        before = tl.cumsum(b_counts, axis=0) - b_counts + total[None, :]
        tl.store(p_counts, before, mask=(c + o_c)[:, None] < n_chunks)
        total += tl.sum(b_counts, axis=0)
    total = tl.where(o_e < E, total, 0)
    # o_e == E stores the end of the last expert: its own total is zero
    tl.store(expert_start_ptr + o_e, tl.cumsum(total, axis=0) - total, mask=o_e <= E)
    tl.store(tile_end_ptr + o_e, tl.cumsum((total + BLOCK_T - 1) // BLOCK_T, axis=0), mask=o_e < E)


@triton.jit(do_not_specialize=["n_pairs"])
def place_kernel(
    ids_ptr,
    map_ptr,
    counts_ptr,
    expert_start_ptr,
    sorted_pairs_ptr,
    pair_row_ptr,
    n_pairs,
    E,
    map_size,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_c = tl.program_id(0)
    o_i = tl.arange(0, CHUNK)
    o_p = i_c * CHUNK + o_i
    expert = _load_experts(ids_ptr, map_ptr, o_p, n_pairs, E, map_size)
    before = tl.load(counts_ptr + i_c.to(tl.int64) * BLOCK_E + expert)
    # a pair's rank in its chunk is the number of pairs of the same expert before it; 32 at a time to save registers
    rank = tl.zeros([CHUNK], tl.int32)
    for first in range(0, CHUNK, 32):
        o_j = first + tl.arange(0, 32)
        peers = _load_experts(ids_ptr, map_ptr, i_c * CHUNK + o_j, n_pairs, E, map_size)
        earlier = (peers[None, :] == expert[:, None]) & (o_j[None, :] < o_i[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    placed = expert < E
    row = tl.load(expert_start_ptr + expert) + before + rank
    tl.store(sorted_pairs_ptr + row, o_p, mask=placed)
    tl.store(pair_row_ptr + o_p, tl.where(placed, row, -1), mask=o_p < n_pairs)
