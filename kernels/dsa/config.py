"""Launch configurations of the family: a measured table where there is one, else a heuristic written down here.

Table rows (`configs/<gpu>/<op>.json`) are keyed by the `case` dictionaries below and the number of rows or tokens; the
same rows carry the dispatch decision. A case never contains a value that is only known on the device, so choosing is
pure host work and safe under CUDA graph capture.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from blackwell_kernels.common import arch, tables

MAX_SPLITS = 64
# (fp8, block_h) -> (block_n, num_stages): the widest tiles that spill nothing on sm_90a and sm_100a, Triton 3.6.0
_SPARSE_MLA_TILES = {
    (False, 16): (64, 2),
    (False, 32): (64, 2),
    (False, 64): (32, 2),
    (True, 16): (32, 2),
    (True, 32): (16, 2),
    (True, 64): (16, 1),
}


@dataclass(frozen=True)
class LogitsConfig:
    """Tile of the indexer logits kernel: `block_n` keys stay, `group` query rows stream past (ragged form only)."""

    block_n: int = 128
    group: int = 32
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class TopkConfig:
    """One program a row: `block` columns at a time, `radix_bits` of the key decided per pass (must divide 32)."""

    block: int = 4096
    radix_bits: int = 8
    num_warps: int = 16


@dataclass(frozen=True)
class SparseMlaConfig:
    """`block_h` heads and `block_n` cache entries a tile; the selected entries are divided over `splits` programs."""

    block_h: int = 64
    block_n: int = 32
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 2


def logits_case(mode: str, heads: int, next_n: int) -> dict[str, Any]:
    """Table axes of the indexer logits; `mode` is paged or ragged, `next_n` 0 in ragged rows."""
    return {"mode": mode, "heads": heads, "next_n": next_n}


def topk_case(columns: int, k: int) -> dict[str, Any]:
    """Table axes of the row top-k; columns are rounded up to a power of two so that neighbours share a row."""
    return {"columns": _power_of_two(columns), "k": k}


def sparse_mla_case(heads: int, topk: int, fp8: bool) -> dict[str, Any]:
    """Table axes of sparse MLA."""
    return {"heads": heads, "topk": topk, "kv": "fp8_ds_mla" if fp8 else "bf16"}


def logits_config(mode: str, heads: int, next_n: int, rows: int, device: torch.device) -> LogitsConfig:
    """Configuration for `rows` query rows."""
    tuned = _tuned("dsa_indexer", device, rows, **logits_case(mode, heads, next_n))
    return LogitsConfig(**tuned) if tuned else LogitsConfig()


def topk_config(columns: int, k: int, rows: int, device: torch.device) -> TopkConfig:
    """Configuration for `rows` rows of at most `columns` candidates."""
    tuned = _tuned("dsa_topk", device, rows, **topk_case(columns, k))
    if tuned:
        return TopkConfig(**tuned)
    block = min(4096, max(256, _power_of_two(columns)))
    return TopkConfig(block=block, num_warps=max(4, block // 256))


def sparse_mla_config(heads: int, topk: int, fp8: bool, tokens: int, device: torch.device) -> SparseMlaConfig:
    """Configuration for `tokens` queries of `heads` heads and `topk` selected entries."""
    tuned = _tuned("dsa_sparse_mla", device, tokens, **sparse_mla_case(heads, topk, fp8))
    if tuned:
        return SparseMlaConfig(**tuned)
    block_h = min(64, max(16, _power_of_two(heads)))
    block_n, num_stages = _SPARSE_MLA_TILES[fp8, block_h]
    # flash decoding: enough programs for one wave, each with at least two tiles of work
    programs = tokens * -(-heads // block_h)
    splits = max(1, min(arch.current_arch(device).sms // programs, topk // (2 * block_n), MAX_SPLITS))
    return SparseMlaConfig(block_h=block_h, block_n=block_n, splits=splits, num_warps=8, num_stages=num_stages)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tuned(op: str, device: torch.device, tokens: int, **case: Any) -> dict[str, Any] | None:
    """The measured configuration of this device, or None."""
    gpu = arch.current_gpu(device)
    return None if gpu is None else _from_table(op, gpu, tokens, **case)


@functools.lru_cache(maxsize=4096)
def _from_table(op: str, gpu: str, tokens: int, **case: Any) -> dict[str, Any] | None:
    table = tables.load("dsa", op, gpu)
    row = table.lookup(case, tokens) if table else None
    return row.config if row else None
