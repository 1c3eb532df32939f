"""Sparse MLA against float64 within the error its arithmetic allows; hostile indices; dead memory that is NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from blackwell_kernels.common.testing.generators import normal, seeded
from blackwell_kernels.common.testing.poison import Canaries
from blackwell_kernels.dsa import reference, testing
from blackwell_kernels.dsa.config import SparseMlaConfig, sparse_mla_case, sparse_mla_search_space

SMALL = SparseMlaConfig(block_h=16, block_n=16, splits=1, num_warps=4, num_stages=2)
SPLIT = dataclasses.replace(SMALL, splits=3)
COLUMNS = dataclasses.replace(SPLIT, by_columns=True)
ROUNDED = dataclasses.replace(SPLIT, bf16_parts=True)
DIVIDED = SparseMlaConfig(block_h=64, block_n=32, splits=2, num_warps=8, num_stages=2, divided=True)
SCALE = 576**-0.5


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def selections(tokens: int, k: int, lengths: list[int], req_id: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Distinct request-local positions, as many as there are, at the front; the rest -1."""
    indices = torch.full((tokens, k), -1, dtype=torch.int32)
    for t in range(tokens):
        chosen = torch.randperm(lengths[int(req_id[t])], generator=rng)[:k]
        indices[t, : len(chosen)] = chosen.to(torch.int32)
    return indices


def check(
    impl: Any,
    q: torch.Tensor,
    cache: torch.Tensor,
    indices: torch.Tensor,
    req_id: torch.Tensor | None,
    table: torch.Tensor | None,
    *,
    sm_scale: float = SCALE,
    config: SparseMlaConfig | None = SMALL,
    with_lse: bool = True,
) -> torch.Tensor:
    expected, expected_lse = reference.sparse_mla(q, cache, indices, req_id, table, sm_scale)
    out_bound, lse_bound = testing.attention_bounds(q, cache, indices, req_id, table, sm_scale)
    tokens, heads, _ = q.shape
    guard = Canaries(impl.device)
    out = guard.output((tokens, heads, 512), torch.bfloat16, strides=(heads * 520 + 64, 520, 1))
    lse = guard.output((tokens, heads), torch.float32, strides=(heads + 1, 1)) if with_lse else None
    inputs = [
        guard.input(q, strides=(heads * 576 + 64, 576, 1)),
        guard.input(cache, strides=cache.stride()),
        guard.input(indices, strides=(indices.shape[1] + 5, 1)),
        None if req_id is None else guard.input(req_id),
        None if table is None else guard.input(table, strides=(table.shape[1] + 2, 1)),
    ]
    impl.run("dsa_sparse_mla", *inputs, sm_scale, out, lse, config=config)
    testing.assert_bounded(out, expected, out_bound)
    if lse is not None:
        testing.assert_bounded(lse, expected_lse, lse_bound)
    guard.check()
    return out


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(
    "config", [SMALL, SPLIT, COLUMNS, ROUNDED, DIVIDED], ids=["one", "split", "columns", "rounded", "divided"]
)
def test_request_local_indices(impl: Any, fp8: bool, config: SparseMlaConfig):
    rng = seeded(1)
    lengths = [150, 1, 64]
    cache, table = testing.kv_cache(lengths, 64, fp8, rng)
    req_id = int32([0, 1, 2, 0, 2])
    indices = selections(5, 70, lengths, req_id, rng)
    check(impl, normal((5, 16, 576), rng), cache, indices, req_id, table, config=config)


@pytest.mark.parametrize("fp8", [False, True])
def test_slots(impl: Any, fp8: bool):
    rng = seeded(2)
    cache, table = testing.kv_cache([100], 64, fp8, rng)
    live = testing.live_slots([100], table, 64).to(torch.int32)
    indices = live[torch.randint(0, 100, (3, 40), generator=rng)]
    check(impl, normal((3, 8, 576), rng), cache, indices, None, None, with_lse=False)


@pytest.mark.parametrize("heads", [1, 8, 16, 24, 32, 64, 128])
def test_head_counts(impl: Any, heads: int):
    rng = seeded(3)
    cache, table = testing.kv_cache([50], 64, False, rng)
    req_id = int32([0])
    entries = SparseMlaConfig(block_h=min(64, max(16, heads & -heads)), block_n=32, splits=2)
    inputs = normal((1, heads, 576), rng), cache, selections(1, 64, [50], req_id, rng), req_id, table
    for config in (entries, COLUMNS, DIVIDED):
        check(impl, *inputs, config=config)


@pytest.mark.parametrize("heads", [16, 32, 64, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_shipped_configuration(impl: Any, heads: int, fp8: bool):
    rng = seeded(4)
    lengths = [90, 30]
    cache, table = testing.kv_cache(lengths, 64, fp8, rng)
    req_id = int32([1, 0])
    indices = selections(2, 256, lengths, req_id, rng)
    check(impl, normal((2, heads, 576), rng), cache, indices, req_id, table, config=None)


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "heads"), [(1, 16), (3, 64), (2, 128), (20, 16), (150, 16)])
@pytest.mark.parametrize("fp8", [False, True])
def test_shipped_configuration_with_lists_of_the_model(impl: Any, tokens: int, heads: int, fp8: bool):
    rng = seeded(17)
    lengths = [4100, 1900]
    cache, table = testing.kv_cache(lengths, 64, fp8, rng)
    req_id = (torch.arange(tokens) % 2).to(torch.int32)
    indices = selections(tokens, 2048, lengths, req_id, rng)
    check(impl, normal((tokens, heads, 576), rng), cache, indices, req_id, table, config=None)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 64])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_tuning_candidate_is_right(impl: Any, heads: int, fp8: bool):
    if impl.name == "cpu":
        pytest.skip("the Triton kernel's configurations are under test")
    rng = seeded(18)
    lengths = [2300, 700]
    cache, table = testing.kv_cache(lengths, 64, fp8, rng)
    req_id = int32([1, 0, 0])
    q, indices = normal((3, heads, 576), rng), selections(3, 2048, lengths, req_id, rng)
    space = sparse_mla_search_space(sparse_mla_case(heads, 2048, fp8), 3, impl.device)
    # one number of splits is as good as another here, and costs a compilation less
    for config in {dataclasses.replace(config, splits=12) for config in space}:
        check(impl, q, cache, indices, req_id, table, config=config)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("config", [SMALL, SPLIT, COLUMNS, DIVIDED], ids=["one", "split", "columns", "divided"])
def test_hostile_indices(impl: Any, fp8: bool, config: SparseMlaConfig):
    rng = seeded(5)
    lengths = [70, 64]
    cache, table = testing.kv_cache(lengths, 64, fp8, rng)
    columns = table.shape[1] * 64
    req_id = int32([0, 0, 1, 1, 0, 5, -1, 0])
    indices = torch.full((8, 50), -1, dtype=torch.int32)
    indices[0, ::3] = torch.arange(17, dtype=torch.int32)  # holes anywhere
    indices[1] = -(2**31)
    indices[1, 49] = 69  # only the very last entry
    indices[2, :4] = int32([columns, columns + 63, 2**31 - 1, 63])
    indices[3, 20:40] = 7  # one entry many times
    indices[4] = int32([*range(50)])
    indices[5:7, :10] = 3  # unknown requests: nothing
    indices[7, :5] = int32([-5, -(2**31), 2**31 - 64, 12, -1])
    out = check(impl, normal((8, 16, 576), rng), cache, indices, req_id, table, config=config)
    assert (out[5:7] == 0).all()


def test_unknown_requests_select_nothing(impl: Any):
    rng = seeded(16)
    cache, table = testing.kv_cache([64], 64, False, rng)
    # rows around the table name live pages, too: reading them would show
    rows = impl.to(table[:, :1].repeat(9, 1))
    req_id = int32([2, -1, 0, 5, 2**31 - 1, -(2**31)])
    inputs = impl.to(normal((6, 16, 576), rng), cache, torch.arange(20, dtype=torch.int32).repeat(6, 1), req_id)
    out, lse = impl.to(torch.empty(6, 16, 512, dtype=torch.bfloat16), torch.empty(6, 16))
    impl.run("dsa_sparse_mla", *inputs, rows[2:4], SCALE, out, lse, config=SMALL)
    assert (out[[0, 1, 3, 4, 5]] == 0).all()
    assert (lse[[0, 1, 3, 4, 5]] == -torch.inf).all()
    assert lse[2].isfinite().all()


def test_pages_out_of_range_are_ignored(impl: Any):
    rng = seeded(6)
    cache, table = testing.kv_cache([64], 64, False, rng)
    table = torch.cat([table, int32([[cache.shape[0], -1, 2**31 - 1]])], 1)
    indices = torch.arange(0, 256, 3, dtype=torch.int32)[None]
    check(impl, normal((1, 16, 576), rng), cache, indices, int32([0]), table)
    slots = torch.cat([testing.live_slots([64], table, 64)[:5], torch.tensor([cache.shape[0] * 64, 2**31 - 1])])
    check(impl, normal((1, 16, 576), rng), cache, slots.to(torch.int32)[None], None, None)


@pytest.mark.parametrize("config", [SMALL, SPLIT, COLUMNS, DIVIDED], ids=["one", "split", "columns", "divided"])
def test_rows_without_any_entry(impl: Any, config: SparseMlaConfig):
    rng = seeded(7)
    cache, table = testing.kv_cache([10], 64, False, rng)
    indices = torch.full((3, 48), -1, dtype=torch.int32)
    indices[1, 40] = 9
    out = check(impl, normal((3, 16, 576), rng), cache, indices, int32([0, 0, 0]), table, config=config)
    assert (out[[0, 2]] == 0).all()
    assert (out[1] != 0).any()


def test_duplicate_pages(impl: Any):
    rng = seeded(8)
    cache, table = testing.kv_cache([64], 64, False, rng)
    table = table[:, :1].repeat(2, 3)
    indices = selections(2, 100, [192, 192], int32([0, 1]), rng)
    check(impl, normal((2, 16, 576), rng), cache, indices, int32([0, 1]), table)


@pytest.mark.parametrize(("page", "gap"), [(64, 576 * 2 * 3), (16, 0), (48, 64)])
@pytest.mark.parametrize("fp8", [False, True])
def test_page_sizes_and_gaps(impl: Any, fp8: bool, page: int, gap: int):
    rng = seeded(9)
    cache, table = testing.kv_cache([70], page, fp8, rng, gap=gap)
    q, indices = normal((1, 8, 576), rng), selections(1, 33, [70], int32([0]), rng)
    for config in (SMALL, COLUMNS, DIVIDED):
        check(impl, q, cache, indices, int32([0]), table, config=config)


@pytest.mark.parametrize("k", [1, 15, 16, 17, 63])
@pytest.mark.parametrize("splits", [1, 2, 7])
def test_list_lengths_and_splits(impl: Any, k: int, splits: int):
    rng = seeded(10)
    cache, table = testing.kv_cache([64], 64, False, rng)
    indices = selections(1, k, [64], int32([0]), rng)
    config = dataclasses.replace(SMALL, splits=splits)
    check(impl, normal((1, 4, 576), rng), cache, indices, int32([0]), table, config=config)


@pytest.mark.parametrize("fp8", [False, True])
def test_large_scores_of_either_sign(impl: Any, fp8: bool):
    rng = seeded(11)
    cache, table = testing.kv_cache([40], 64, fp8, rng, power_of_two_scale=False)
    q = normal((2, 16, 576), rng)
    indices = selections(2, 40, [40], int32([0, 0]), rng)
    for sm_scale in (2.0, -0.05, 0.0):
        for config in (SPLIT, COLUMNS, ROUNDED, DIVIDED):
            check(impl, q, cache, indices, int32([0, 0]), table, sm_scale=sm_scale, config=config)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_fp8_queries_and_scales_of_any_size(impl: Any, size: float):
    """The kernel whose warps divide columns computes with float16."""
    rng = seeded(19)
    cache, table = testing.kv_cache([48], 64, True, rng, power_of_two_scale=False)
    # groups of columns, heads and entries of very different sizes
    scales = cache[..., 512:528].view(torch.float32)
    scales[..., 1] *= size
    scales[:, ::2, 2] *= 2.0**-12
    q = normal((1, 16, 576), rng) * (2.0 ** torch.arange(-24, 24, 3))[:, None]
    q = (q * torch.where(torch.arange(576) // 128 == 1, 1 / size, 1.0)).bfloat16()
    indices = selections(1, 48, [48], int32([0]), rng)
    check(impl, q, cache, indices, int32([0]), table, sm_scale=2.0**-6, config=COLUMNS)


def test_splits_change_nothing_but_rounding(impl: Any):
    rng = seeded(12)
    cache, table = testing.kv_cache([128], 64, True, rng)
    q, indices = normal((2, 16, 576), rng), selections(2, 96, [128], int32([0, 0]), rng)
    for splits in (1, 2, 6):
        check(impl, q, cache, indices, int32([0, 0]), table, config=dataclasses.replace(SMALL, splits=splits))


def test_repeats_are_equal_bit_for_bit(impl: Any):
    rng = seeded(13)
    cache, table = testing.kv_cache([64], 64, False, rng)
    inputs = impl.to(
        normal((2, 16, 576), rng), cache, selections(2, 48, [64], int32([0, 0]), rng), int32([0, 0]), table
    )
    runs = []
    for _ in range(50 if impl.tensor_cores or impl.name == "cpu" else 2):
        out = impl.to(torch.empty(2, 16, 512, dtype=torch.bfloat16))
        impl.run("dsa_sparse_mla", *inputs, SCALE, out, None, config=SPLIT)
        runs.append(out.cpu())
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_no_tokens(impl: Any):
    cache = impl.to(testing.paged_bytes(1, 64, 656))
    q, indices, out = impl.to(
        torch.empty(0, 16, 576).bfloat16(), torch.empty(0, 8, dtype=torch.int32), torch.empty(0, 16, 512).bfloat16()
    )
    impl.run("dsa_sparse_mla", q, cache, indices, None, None, SCALE, out, None)


def test_selection_of_everything_is_dense_attention(impl: Any):
    rng = seeded(14)
    cache, table = testing.kv_cache([100], 64, False, rng)
    q = normal((1, 16, 576), rng)
    out = impl.to(torch.empty(1, 16, 512, dtype=torch.bfloat16))
    indices = torch.arange(100, dtype=torch.int32)[None]
    impl.run("dsa_sparse_mla", *impl.to(q, cache, indices, int32([0]), table), SCALE, out, None, config=SPLIT)
    position = torch.arange(100)
    kv = cache[table[0, position // 64].long(), position % 64].double().expand(16, -1, -1)
    dense = torch.nn.functional.scaled_dot_product_attention(q[0, :, None].double(), kv, kv[..., :512], scale=SCALE)
    bound, _ = testing.attention_bounds(q, cache, indices, int32([0]), table, SCALE)
    testing.assert_bounded(out, dense.transpose(0, 1), bound)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_cache_beyond_two_giga_elements(impl: Any, fp8: bool):
    if impl.name == "cpu":
        pytest.skip("the offsets of the Triton kernels are under test")
    rng = seeded(15)
    small, _ = testing.kv_cache([64], 64, fp8, rng)
    live = small[1:2] if not small[1].isnan().any() else small[2:3]
    width = small.shape[-1]
    blocks = 2**31 // (64 * width) + 2
    cache = (
        torch.full((blocks, 64, width), 0xFF, dtype=torch.uint8, device=impl.device)
        if fp8
        else torch.full((blocks, 64, width), torch.nan, dtype=torch.bfloat16, device=impl.device)
    )
    cache[-1] = live[0].to(impl.device)
    q, index = normal((1, 16, 576), rng), torch.arange(64, dtype=torch.int32)[None]
    out = torch.empty(1, 16, 512, dtype=torch.bfloat16, device=impl.device)
    impl.run("dsa_sparse_mla", impl.to(q), cache, impl.to(index + (blocks - 1) * 64), None, None, SCALE, out, None)
    expected, _ = reference.sparse_mla(q, live, index, None, None, SCALE)
    bound, _ = testing.attention_bounds(q, live, index, None, None, SCALE)
    testing.assert_bounded(out, expected, bound)
