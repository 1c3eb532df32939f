"""Seeded inputs with sane values, shared by the families' tests: unit q and k, positive scales, valid block tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def seeded(seed: int) -> torch.Generator:
    """A CPU generator: the same values on every device (move the tensors, not the generator)."""
    return torch.Generator().manual_seed(seed)


def normal(shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(tuple(shape), generator=rng).to(dtype)


def unit_rows(shape: Sequence[int], rng: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows (last dimension) of Euclidean length 1 before rounding: q and k of a delta rule, which else explodes."""
    return torch.nn.functional.normalize(torch.randn(tuple(shape), generator=rng), dim=-1).to(dtype)


def fp8_blocks(
    rows: int, columns: int, rng: torch.Generator, *, block: int = 128, amplitude: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block-quantised weight: e4m3 [rows, columns] and float32 scales [ceil(rows/block), ceil(columns/block)].

    Dequantised values are normal with standard deviation `amplitude`; scales are max|block| / 448, so positive.
    """
    x = amplitude * torch.randn(rows, columns, generator=rng)
    down, across = -(-rows // block), -(-columns // block)
    padded = torch.nn.functional.pad(x, (0, across * block - columns, 0, down * block - rows))
    scale = padded.view(down, block, across, block).abs().amax((1, 3)).clamp(min=1e-12) / E4M3_MAX
    expanded = scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (x / expanded).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def fp8_rows(
    shape: Sequence[int], rng: torch.Generator, *, group: int = 128, amplitude: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised activations: e4m3 [..., H] and float32 power-of-two scales [..., H / group]."""
    x = amplitude * torch.randn(tuple(shape), generator=rng)
    groups = x.unflatten(-1, (-1, group))
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1).clamp(min=1e-12) / E4M3_MAX)))
    return (groups / scale[..., None]).flatten(-2).to(torch.float8_e4m3fn), scale


def cu_seqlens(lengths: Sequence[int]) -> torch.Tensor:
    """int32 [len(lengths) + 1] offsets of packed sequences."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def block_table(
    lengths: Sequence[int], page: int, rng: torch.Generator, *, spare_pages: int = 1, spare_columns: int = 0
) -> tuple[torch.Tensor, int]:
    """int32 [B, P] physical pages and the number of pages of the cache.

    Pages are distinct and shuffled; page 0 and `spare_pages` others belong to nobody; unused entries are -1.
    """
    needed = [-(-n // page) for n in lengths]
    pages = 1 + sum(needed) + spare_pages
    order = (1 + torch.randperm(pages - 1, generator=rng)).to(torch.int32)
    table = torch.full((len(lengths), max([1, *needed]) + spare_columns), -1, dtype=torch.int32)
    start = 0
    for row, count in enumerate(needed):
        table[row, :count] = order[start : start + count]
        start += count
    return table, pages


def slots(table: torch.Tensor, row: int, positions: torch.Tensor, page: int) -> torch.Tensor:
    """int64 physical slots (page * page size + offset) of token positions of request `row`."""
    return table[row, positions // page].long() * page + positions % page


def routing(
    tokens: int, experts: int, top_k: int, rng: torch.Generator, *, skew: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 weights [T, K], positive with sum 1, and distinct int32 ids [T, K].

    skew 0 loads experts evenly; the larger it is, the more tokens crowd on the first experts and the more stay empty.
    """
    popularity = torch.exp(-skew * torch.arange(experts) / experts)
    ids = torch.multinomial(popularity.expand(tokens, -1), top_k, generator=rng) if tokens else torch.empty(0, top_k)
    weights = torch.rand(tokens, top_k, generator=rng) + 0.1
    return weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)
