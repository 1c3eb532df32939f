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

DEFAULT_SMS = 132  # used where there is no GPU: interpreter and ahead-of-time compilation


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


@functools.lru_cache(maxsize=1024)
def logits_config(mode: str, heads: int, next_n: int, rows: int, device: torch.device) -> LogitsConfig:
    """Configuration for `rows` query rows."""
    tuned = _tuned("dsa_indexer", logits_case(mode, heads, next_n), rows, device)
    return LogitsConfig(**tuned) if tuned else LogitsConfig()


@functools.lru_cache(maxsize=1024)
def topk_config(columns: int, k: int, rows: int, device: torch.device) -> TopkConfig:
    """Configuration for `rows` rows of at most `columns` candidates."""
    tuned = _tuned("dsa_topk", topk_case(columns, k), rows, device)
    if tuned:
        return TopkConfig(**tuned)
    block = min(4096, max(256, _power_of_two(columns)))
    return TopkConfig(block=block, num_warps=max(4, block // 256))


@functools.lru_cache(maxsize=1024)
def sparse_mla_config(heads: int, topk: int, fp8: bool, tokens: int, device: torch.device) -> SparseMlaConfig:
    """Configuration for `tokens` queries of `heads` heads and `topk` selected entries."""
    tuned = _tuned("dsa_sparse_mla", sparse_mla_case(heads, topk, fp8), tokens, device)
    if tuned:
        return SparseMlaConfig(**tuned)
    block_h = min(64, max(16, _power_of_two(heads)))
    block_n, num_warps = (32, 8) if block_h == 64 else (64, 4)
    # flash decoding: enough programs for one wave, each with at least two tiles of work
    programs = tokens * -(-heads // block_h)
    splits = max(1, min(_sms(device) // max(programs, 1), topk // (2 * block_n), 64))
    return SparseMlaConfig(block_h=block_h, block_n=block_n, splits=splits, num_warps=num_warps)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else DEFAULT_SMS


def _tuned(op: str, case: dict[str, Any], tokens: int, device: torch.device) -> dict[str, Any] | None:
    """The measured configuration of this GPU, or None."""
    if device.type != "cuda":
        return None
    from blackwell_kernels.common import arch, tables

    table = tables.load("dsa", op, arch.gpu_slug(torch.cuda.get_device_name(device)))
    row = table.lookup(case, tokens) if table else None
    return row.config if row else None
