"""Launch configurations of the family: a measured table where there is one, else a heuristic written down here.

Table rows (`configs/<gpu>/<op>.json`) are keyed by the `case` dictionaries below and the number of rows or tokens; the
same rows carry the dispatch decision. A case never contains a value that is only known on the device, so choosing is
pure host work and safe under CUDA graph capture.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from blackwell_kernels.common import arch, tables

MAX_SPLITS = 64
MAX_TOPK_SPLITS = 32
# (fp8, block_h) -> (block_n, num_stages): the widest tiles that spill nothing on sm_90a and sm_100a, Triton 3.6.0
_SPARSE_MLA_TILES = {
    (False, 16): (64, 2),
    (False, 32): (64, 2),
    (False, 64): (32, 2),
    (True, 16): (32, 2),
    (True, 32): (16, 2),
    (True, 64): (16, 1),
}
# (fp8, block_h) -> (block_n, num_stages) that a tuner tries
_SEARCHED_TILES = {
    (False, 16): [(16, 3), (32, 2), (32, 3), (64, 1), (64, 2)],
    (False, 32): [(16, 3), (32, 2), (32, 3), (64, 1), (64, 2)],
    (False, 64): [(16, 2), (32, 1), (32, 2), (64, 1)],
    (True, 16): [(16, 2), (16, 3), (32, 1), (32, 2), (64, 1)],
    (True, 32): [(16, 1), (16, 2), (32, 1), (32, 2)],
    (True, 64): [(16, 1), (16, 2), (32, 1)],
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
    """`block` columns at a time; `splits` (a power of two) programs share a row, in three launches from two on."""

    block: int = 4096
    splits: int = 1
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
    # a row must be long enough to pay for three launches; lengths are not known here, columns bound them
    splits = max(1, min(MAX_TOPK_SPLITS, _power_of_two(arch.current_arch(device).sms // rows), columns // 4096))
    block = min(2048 if splits > 1 else 4096, max(256, _power_of_two(columns)))
    return TopkConfig(block=block, splits=1 << (splits.bit_length() - 1), num_warps=max(4, block // 256))


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


def logits_search_space(case: dict[str, Any], rows: int) -> list[LogitsConfig]:
    """What a tuner tries for `rows` query rows of a `logits_case`."""
    if case["mode"] == "paged":
        # a row or two a tile: there is no loop to pipeline
        return [LogitsConfig(block_n=n, num_warps=w) for n in (64, 128, 256) for w in (4, 8)]
    shapes = itertools.product((64, 128, 256), (8, 16, 32, 64), (4, 8), (2, 3, 4))
    return [LogitsConfig(n, group, w, s) for n, group, w, s in shapes if group <= max(rows, 8) and n >= 16 * w]


def topk_search_space(case: dict[str, Any], rows: int) -> list[TopkConfig]:
    """What a tuner tries for a `topk_case`; each thread holds 4 to 16 columns, each program at least 1,024."""
    shapes = itertools.product((1024, 2048, 4096), (1, 2, 4, 8, 16, 32), (4, 8, 16))
    fits = [
        (block, splits, warps)
        for block, splits, warps in shapes
        if block * splits <= case["columns"] and 4 <= block // (32 * warps) <= 16 and (splits == 1 or rows < 256)
    ]
    return [TopkConfig(*s) for s in fits] or [TopkConfig(block=case["columns"], num_warps=4)]


def sparse_mla_search_space(case: dict[str, Any], tokens: int, sms: int = 132) -> list[SparseMlaConfig]:
    """What a tuner tries for `tokens` queries of a `sparse_mla_case`: tiles that fit shared memory, and splits that
    give each of `sms` multiprocessors about one, two or four programs."""
    heads, topk, fp8 = int(case["heads"]), int(case["topk"]), case["kv"] == "fp8_ds_mla"
    found = []
    for block_h in (16, 32, 64):
        if block_h > max(16, _power_of_two(heads)):
            continue
        programs = tokens * -(-heads // block_h)
        for block_n, stages in _SEARCHED_TILES[fp8, block_h]:
            most = min(MAX_SPLITS, max(1, topk // block_n))
            splits = sorted({max(1, min(most, round(waves * sms / programs))) for waves in (0.5, 1, 2, 4)})
            for warps in (4, 8):
                found += [SparseMlaConfig(block_h, block_n, n, warps, stages) for n in splits]
    return found


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tuned(op: str, device: torch.device, tokens: int, **case: Any) -> dict[str, Any] | None:
    """The measured configuration of this device, or None."""
    gpu = arch.current_gpu(device)
    table = None if gpu is None else tables.load("dsa", op, gpu)
    row = None if table is None else table.lookup(case, tokens)
    return row.config if row else None
