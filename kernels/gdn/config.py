"""Launch configurations: a row of the tuned table for this GPU and case where there is one, else the heuristic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import TableError

Case = dict[str, bool | int | float | str]
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class DecodeConfig:
    """block_v: state rows a program holds at a time. splits: programs that share the rows of one query/key head of one
    sequence (1 when the convolution is fused)."""

    block_v: int
    splits: int
    num_warps: int


@dataclass(frozen=True)
class PrefillConfig:
    """block_v: value channels a program of the walk takes; walk_stages: chunks whose loads are under way at once."""

    chunk_warps: int
    block_v: int
    walk_warps: int
    walk_stages: int


@dataclass(frozen=True)
class PrepareConfig:
    """block_t: tokens a program takes."""

    block_t: int
    num_warps: int


@dataclass(frozen=True)
class ConvConfig:
    """block_t, block_c: tokens and channels a program takes."""

    block_t: int
    block_c: int
    num_warps: int


def case_of(
    num_k_heads: int, num_v_heads: int, head_size: int, state_dtype: torch.dtype, **more: bool | int | str
) -> Case:
    """The axes, tokens aside, by which tables of this family are keyed; gdn_decode adds fused_conv and multi_token."""
    return {
        "num_k_heads": num_k_heads,
        "num_v_heads": num_v_heads,
        "head_size": head_size,
        "state_dtype": str(state_dtype).removeprefix("torch."),
        **more,
    }


def decode_config(case: Case, tokens: int, head_v_dim: int, device: torch.device) -> DecodeConfig:
    """Configuration of gdn_decode; tokens: rows of mixed_qkv."""
    tuned = _tuned("gdn_decode", DecodeConfig, case, tokens, device)
    if tuned is not None:
        return tuned
    num_k_heads, num_v_heads = int(case["num_k_heads"]), int(case["num_v_heads"])
    if case["fused_conv"]:
        # as many rows at once as registers hold; with few programs, twice the threads to fetch them
        wide = not case["multi_token"] and case["state_dtype"] == "bfloat16"
        few = not case["multi_token"] and tokens * num_k_heads < arch.current_arch(device).sms
        return DecodeConfig(block_v=min(64 if wide else 32, head_v_dim), splits=1, num_warps=8 if few else 4)
    block_v = min(32, head_v_dim)
    return DecodeConfig(block_v=block_v, splits=num_v_heads // num_k_heads * head_v_dim // block_v, num_warps=4)


def prefill_config(case: Case, tokens: int, num_seqs: int, head_v_dim: int, device: torch.device) -> PrefillConfig:
    """Configuration of gdn_prefill."""
    tuned = _tuned("gdn_prefill", PrefillConfig, case, tokens, device)
    if tuned is not None:
        return tuned
    chip = arch.current_arch(device)
    block_v = min(64, head_v_dim)
    # one program a multiprocessor has the shared memory for a deeper pipeline, and nobody to hide its latency behind
    few = num_seqs * int(case["num_v_heads"]) * (head_v_dim // block_v) <= chip.sms
    return PrefillConfig(
        chunk_warps=4, block_v=block_v, walk_warps=8 if chip.sm >= 100 else 4, walk_stages=3 if few else 2
    )


def prefill_search_space(case: Case, tokens: int, num_seqs: int, head_v_dim: int) -> list[PrefillConfig]:
    """Configurations of gdn_prefill worth timing for a case; some may not fit every chip."""
    walks = [(64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 8, 2), (64, 8, 3), (128, 8, 2), (128, 8, 3), (32, 4, 3)]
    return [
        PrefillConfig(chunk_warps, block_v, walk_warps, walk_stages)
        for block_v, walk_warps, walk_stages in walks
        if head_v_dim % block_v == 0
        for chunk_warps in (4, 8)
    ]


def prepare_config() -> PrepareConfig:
    """Configuration of gdn_prepare and of the normalisation inside gdn_prefill."""
    return PrepareConfig(block_t=16, num_warps=4)


def conv_config() -> ConvConfig:
    """Configuration of gdn_causal_conv."""
    return ConvConfig(block_t=16, block_c=256, num_warps=4)


def _tuned(op: str, kind: type[_Config], case: Case, tokens: int, device: torch.device) -> _Config | None:
    gpu = arch.current_gpu(device)
    table = None if gpu is None else tables.load("gdn", op, gpu)
    row = None if table is None else table.lookup(case, tokens)
    return None if gpu is None or row is None or not row.config else from_row(op, kind, row.config, gpu)


def from_row(op: str, kind: type[_Config], config: Mapping[str, Any], gpu: str) -> _Config:
    """A table row's config as `kind`. Raises: TableError when its fields are not those of `kind`."""
    try:
        return kind(**config)
    except TypeError as error:
        fix = f"run `blackwell-kernels bench --op {op} --write-dispatch` again"
        raise TableError(f"{tables.path_of('gdn', op, gpu)}: config {dict(config)}: {error}; {fix}") from None
