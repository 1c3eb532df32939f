"""Before the experts: quantise the activations and sort (token, pick) pairs by expert. See align_kernels.py."""

from __future__ import annotations

import torch

_ONE_LAUNCH = 4096  # up to so many pairs, one program counts them all in less time than more launches take
_PLACED_TOGETHER = 8  # pairs a program of that launch compares with all
_CHUNK = 128  # pairs a program of the sort counts and places; ranking them takes _CHUNK^2 comparisons
_SCANNED_CHUNKS = 1024  # whose counts a program of the sort holds in registers
_SCANNED = 8  # experts a program of the sort scans: a sector of 32 bytes of each chunk's counts

Sort = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # sorted_pairs, pair_row, tiles of align_kernels.py


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _histogram(experts: int) -> int:
    """Bins of a histogram of experts: a power of two, and at least one for each thread of a warp."""
    return max(32, next_power_of_2(experts))


def max_tiles(pairs: int, experts: int, block_t: int) -> int:
    """Most tiles of `block_t` rows that `pairs` rows in `experts` runs can need: a host-side bound for the grid.

    One row in each of min(pairs, experts) experts opens a tile; each `block_t` rows more open another.
    """
    return min(pairs, experts + max(pairs - experts, 0) // block_t)


def even_tiles(pairs: int, experts: int, every: int, block_t: int) -> int:
    """Tiles of `experts` of `every` experts that share `pairs` evenly. A grid for so many has few programs without one:
    each of them costs a multiprocessor its start, half a microsecond, and `max_tiles` has thousands where experts are
    large or elsewhere.
    """
    return experts * cdiv(cdiv(pairs, every), block_t)


def prepare(
    x: torch.Tensor,
    a_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
    block_t: int,
    tiles: int,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor, Sort]:
    """(x in e4m3 [T, H], its scales [T, H/128] f32, the pairs' order): x quantised where there is no a_scale yet."""
    if topk_ids.numel() <= _ONE_LAUNCH:
        return prepare_in_one_launch(x, a_scale, topk_ids, expert_map, experts, block_t, tiles, pdl)
    if a_scale is None:
        x, a_scale = quantize(x)
    return x, a_scale, sort_pairs(topk_ids, expert_map, experts, block_t, tiles)


def prepare_in_one_launch(
    x: torch.Tensor,
    a_scale: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    experts: int,
    block_t: int,
    tiles: int,
    pdl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Sort]:
    """`quantize` where there is no a_scale, and `sort_pairs`, in one launch; for few pairs."""
    from blackwell_kernels.moe.align_kernels import prepare_kernel

    tokens, hidden = x.shape
    q, scale, sort = x, a_scale, _empty_sort(topk_ids, tiles)
    block_g = min(16, next_power_of_2(hidden // 128))
    pairs = topk_ids.numel()
    grid = 1 + cdiv(pairs, _PLACED_TOGETHER)
    if scale is None:
        q, scale = _empty_quantized(x)
        grid += tokens * cdiv(hidden // 128, block_g)
    prepare_kernel[(grid,)](
        topk_ids,
        expert_map,
        *sort,
        x if a_scale is None else None,
        q,
        scale,
        pairs,
        tiles,
        experts,
        0 if expert_map is None else expert_map.numel(),
        x.stride(0),
        scale.stride(0),
        hidden,
        BLOCK_P=_PLACED_TOGETHER,
        PAIRS=next(size for size in (256, 1024, _ONE_LAUNCH) if pairs <= size),
        CHUNK=256 if pairs <= 256 else 512,
        BLOCK_E=_histogram(experts),
        BLOCK_T=block_t,
        BLOCK_G=block_g,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    return q, scale, sort


def _empty_quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, hidden = x.shape
    q = torch.empty(tokens, hidden, dtype=torch.float8_e4m3fn, device=x.device)
    return q, torch.empty(tokens, hidden // 128, dtype=torch.float32, device=x.device)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [T, H] -> e4m3 [T, H] and power-of-two scales [T, H/128] f32."""
    from blackwell_kernels.moe.gemm_kernels import quantize_kernel

    tokens, hidden = x.shape
    q, scale = _empty_quantized(x)
    block_g = min(16, next_power_of_2(hidden // 128))
    grid = (tokens, cdiv(hidden // 128, block_g))
    quantize_kernel[grid](x, q, scale, x.stride(0), scale.stride(0), hidden, BLOCK_G=block_g, num_warps=4)
    return q, scale


def _empty_sort(topk_ids: torch.Tensor, tiles: int) -> Sort:
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=topk_ids.device)

    return empty(topk_ids.numel()), empty(topk_ids.numel()), empty(tiles, 3)


def sort_pairs(topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int, block_t: int, tiles: int) -> Sort:
    """(sorted_pairs [T * K], pair_row [T * K], tiles [tiles, 3]) i32, see align_kernels.py."""
    from blackwell_kernels.moe import align_kernels as kernels

    pairs, device, block_e = topk_ids.numel(), topk_ids.device, _histogram(experts)
    sorted_pairs, pair_row, tile_table = sort = _empty_sort(topk_ids, tiles)
    chunk = min(_CHUNK, max(32, next_power_of_2(pairs)))
    chunks = cdiv(pairs, chunk)
    map_size = 0 if expert_map is None else expert_map.numel()
    counts = torch.empty(chunks, block_e, dtype=torch.int32, device=device)
    totals = torch.empty(block_e, dtype=torch.int32, device=device)
    shared = {"CHUNK": chunk, "BLOCK_E": block_e, "num_warps": 4}
    kernels.count_kernel[(chunks,)](topk_ids, expert_map, counts, pairs, experts, map_size, **shared)
    kernels.scan_kernel[(block_e // _SCANNED,)](
        counts,
        totals,
        chunks,
        BLOCK_C=max(32, min(next_power_of_2(chunks), _SCANNED_CHUNKS)),
        EXPERTS=_SCANNED,
        BLOCK_E=block_e,
        num_warps=8,
    )
    kernels.place_kernel[(1 + chunks,)](
        topk_ids,
        expert_map,
        counts,
        totals,
        sorted_pairs,
        pair_row,
        tile_table,
        pairs,
        tiles,
        experts,
        map_size,
        BLOCK_T=block_t,
        **shared,
    )
    return sort
