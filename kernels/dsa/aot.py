"""Shapes that ship, for the ahead-of-time gate: DeepSeek-V3.2 at tensor parallelism 1 to 8, decode and prefill.

Meta tensors: nothing is computed, and no memory is needed for full-size caches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from blackwell_kernels.common.testing.gates import AotCase
from blackwell_kernels.dsa import op
from blackwell_kernels.dsa.config import (
    LogitsConfig,
    SparseMlaConfig,
    TopkConfig,
    logits_case,
    logits_search_space,
    sparse_mla_case,
    sparse_mla_search_space,
    topk_case,
    topk_search_space,
)

BLOCKS, PAGE, TOPK, MAX_LEN = 4096, 64, 2048, 163_840
FP8, BF16, F32, I32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _indexer_cache() -> torch.Tensor:
    return _empty(BLOCKS, PAGE, 132, dtype=torch.uint8)


def _kv_cache(fp8: bool) -> torch.Tensor:
    return _empty(BLOCKS, PAGE, 656, dtype=torch.uint8) if fp8 else _empty(BLOCKS, PAGE, 576, dtype=BF16)


def _indexer_k_insert() -> None:
    op.dsa_indexer_k_insert_triton(_empty(64, 128, dtype=BF16), _indexer_cache(), _empty(64, dtype=torch.int64))


def _gather() -> None:
    outputs = _empty(8192, 128, dtype=FP8), _empty(8192, dtype=F32)
    table, cu = _empty(4, MAX_LEN // PAGE, dtype=I32), _empty(5, dtype=I32)
    op.dsa_gather_indexer_k_triton(_indexer_cache(), table, cu, *outputs)


def _logits_paged(next_n: int, lens_per_row: bool, config: LogitsConfig | None = None) -> Callable[[], None]:
    def run() -> None:
        batch = 32
        lens = _empty(batch, next_n, dtype=I32) if lens_per_row else _empty(batch, dtype=I32)
        op.dsa_indexer_logits_paged_triton(
            _empty(batch, next_n, 64, 128, dtype=FP8),
            _indexer_cache(),
            _empty(batch * next_n, 64, dtype=F32),
            lens,
            _empty(batch, MAX_LEN // PAGE, dtype=I32),
            _empty(batch * next_n, MAX_LEN, dtype=F32),
            config=config,
        )

    return run


def _logits_paged_space() -> None:
    """Every shape that the tuner may choose for one query a sequence."""
    for config in logits_search_space(logits_case("paged", 64, 1), 32):
        _logits_paged(1, lens_per_row=True, config=config)()


def _logits_ragged() -> None:
    rows, keys = 2048, 32_768
    op.dsa_indexer_logits_ragged_triton(
        _empty(rows, 64, 128, dtype=FP8),
        _empty(keys, 128, dtype=FP8),
        _empty(keys, dtype=F32),
        _empty(rows, 64, dtype=F32),
        _empty(rows, dtype=I32),
        _empty(rows, dtype=I32),
        _empty(rows, keys, dtype=F32),
    )


def _topk(rows: int, columns: int, config: TopkConfig | None = None) -> Callable[[], None]:
    def run() -> None:
        bounds = _empty(rows, dtype=I32), _empty(rows, dtype=I32)
        op.dsa_topk_triton(_empty(rows, columns, dtype=F32), *bounds, _empty(rows, TOPK, dtype=I32), config=config)

    return run


def _topk_space() -> None:
    """Every shape that the tuner may choose where a program holds a row."""
    for columns in (4096, 8192, 16_384):
        for config in topk_search_space(topk_case(columns, TOPK), 8):
            if config.block == columns:
                _topk(8, columns, config)()


def _topk_small() -> None:
    """Every shape that the tuner may choose for many rows, which keep nothing."""
    for columns in (8192, MAX_LEN):
        for config in topk_search_space(topk_case(columns, TOPK), 1024):
            if config.held == 2:
                _topk(1024, columns, config)()


def _topk_clusters() -> None:
    """Every shape that the tuner may choose where a cluster has a row: all of it held, or streamed."""
    for rows, columns in ((1, 8192), (1, MAX_LEN), (64, 8192), (64, MAX_LEN), (1024, 8192)):
        for config in topk_search_space(topk_case(columns, TOPK), rows):
            if config.cluster:
                _topk(rows, columns, config)()


def _sparse_mla(
    tokens: int,
    heads: int,
    fp8: bool,
    request_local: bool = True,
    with_lse: bool = False,
    config: SparseMlaConfig | None = None,
) -> Callable[[], None]:
    def run() -> None:
        op.dsa_sparse_mla_triton(
            _empty(tokens, heads, 576, dtype=BF16),
            _kv_cache(fp8),
            _empty(tokens, TOPK, dtype=I32),
            _empty(tokens, dtype=I32) if request_local else None,
            _empty(64, MAX_LEN // PAGE, dtype=I32) if request_local else None,
            0.1,
            _empty(tokens, heads, 512, dtype=BF16),
            _empty(tokens, heads, dtype=F32) if with_lse else None,
            config=config,
        )

    return run


def _kv_insert(fp8: bool, power_of_two: bool) -> Callable[[], None]:
    def run() -> None:
        op.dsa_kv_insert_triton(
            _empty(64, 512, dtype=BF16),
            _empty(64, 64, dtype=BF16),
            _kv_cache(fp8),
            _empty(64, dtype=torch.int64),
            power_of_two_scale=power_of_two,
        )

    return run


def _sparse_mla_case(tokens: int, heads: int, fp8: bool, slots: bool = False) -> AotCase:
    name = f"sparse_mla_t{tokens}_h{heads}_{'fp8' if fp8 else 'bf16'}{'_slots' if slots else ''}"
    # 16 heads, and on sm_100 32, are fewer rows than wgmma and tcgen05 have; fp8 there goes by what conversion costs
    hopper = "mma.sync" if heads <= 16 or tokens * heads <= 64 else "f16"
    blackwell = "f16" if heads >= 64 and not fp8 else "mma.sync"
    config = None
    if fp8 and heads <= 16:  # sm_90 has another kernel for them: below
        config = SparseMlaConfig(block_h=16, num_warps=8)
    run = _sparse_mla(tokens, heads, fp8, request_local=not slots, with_lse=slots, config=config)
    mma = {"sparse_mla_kernel@90": hopper, "sparse_mla_kernel@100": blackwell}
    return AotCase(name, run, mma=mma)


def _divided(fp8: bool) -> AotCase:
    """Every shape that the tuner may choose where warpgroups divide a tile's scores: were they not divided, the loop
    would have 943 instructions with bf16 and 1,312 with fp8."""

    def run() -> None:
        for config in sparse_mla_search_space(sparse_mla_case(64, TOPK, fp8), 8):
            if config.divided:
                _sparse_mla(8, 64, fp8, config=config)()

    name, limit = f"sparse_mla_t8_h64_{'fp8' if fp8 else 'bf16'}_divided", {"sparse_mla_kernel": 1100 if fp8 else 800}
    mma = {"sparse_mla_kernel": "f16"}
    # tiles of 32 with fp8: two numbers a thread, stored and loaded once, outside the loop
    spills = {"sparse_mla_kernel": 16} if fp8 else {}
    return AotCase(name, run, mma=mma, spill_allowance=spills, loop_limit=limit, archs=(90,))


def _by_columns(tokens: int) -> AotCase:
    """Every shape by columns that the tuner may choose: for few heads and fp8, or for a token of many heads."""

    def run() -> None:
        for heads, fp8, t in ((16, True, tokens), (64, False, 1), (64, True, 1)):
            for config in sparse_mla_search_space(sparse_mla_case(heads, TOPK, fp8), t):
                if config.by_columns:
                    _sparse_mla(t, heads, fp8, config=config)()

    return AotCase(f"sparse_mla_t{tokens}_columns", run, mma={"sparse_mla_columns_kernel": "mma.sync"})


def _registers() -> AotCase:
    """What the tuner may choose where programs share registers: a few are spilled."""

    def run() -> None:
        for config in sparse_mla_search_space(sparse_mla_case(16, TOPK, False), 4096):
            if not config.divided:  # which is what 32 heads have
                _sparse_mla(4096, 16, fp8=False, config=config)()

    mma = {"sparse_mla_kernel": "mma.sync"}
    return AotCase("sparse_mla_t4096_h16_bf16_space", run, mma=mma, spill_allowance={"sparse_mla_kernel": 64})


CASES = [
    AotCase("indexer_k_insert", _indexer_k_insert),
    AotCase("gather_indexer_k", _gather),
    AotCase("logits_paged_n1", _logits_paged(1, lens_per_row=True), mma="required"),
    AotCase("logits_paged_n2", _logits_paged(2, lens_per_row=False), mma="required"),
    AotCase("logits_paged_space", _logits_paged_space, mma="required"),
    AotCase("logits_ragged", _logits_ragged, mma="required"),
    AotCase("topk_decode", _topk(32, MAX_LEN)),
    # eight columns of one of 1,024 threads, which have 64 registers
    AotCase("topk_clusters", _topk_clusters, spill_allowance={"topk_cluster_kernel@100": 8}),
    # four numbers a thread, stored and loaded once, outside the loops: two programs share a multiprocessor's registers
    AotCase(
        "topk_splits",
        _topk(32, MAX_LEN, TopkConfig(4096, 8, 16, True, early=True)),
        spill_allowance={"topk_collect_kernel": 16},
    ),
    AotCase("topk_prefill", _topk(2048, 32_768)),
    AotCase("topk_prefill_few", _topk(200, MAX_LEN)),
    # eight words of the bitmap a thread, outside the loops over keys
    AotCase("topk_prefill_long", _topk(2048, MAX_LEN), spill_allowance={"topk_kernel@90": 8}),
    AotCase("topk_small_space", _topk_small, spill_allowance={"topk_kernel@90": 8}),
    AotCase("topk_short", _topk(8, 4096)),
    # 16 columns of one of 1,024 threads, which have 64 registers
    AotCase("topk_held_space", _topk_space, spill_allowance={"topk_held_kernel": 96}),
    AotCase("topk_any_stride", _topk(8, 4095)),
    *(_sparse_mla_case(t, heads, fp8) for heads in (16, 32, 64, 128) for fp8 in (False, True) for t in (8, 4096)),
    _sparse_mla_case(1, 64, fp8=False),
    *(_divided(fp8) for fp8 in (False, True)),
    _sparse_mla_case(8, 16, fp8=False, slots=True),
    *(_by_columns(t) for t in (8, 4096)),
    _registers(),
    AotCase("kv_insert_bf16", _kv_insert(fp8=False, power_of_two=True)),
    AotCase("kv_insert_fp8_exact", _kv_insert(fp8=True, power_of_two=False)),
    AotCase("kv_insert_fp8_power_of_two", _kv_insert(fp8=True, power_of_two=True)),
]
