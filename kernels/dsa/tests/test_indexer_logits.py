"""Indexer logits, paged and ragged, against float64 within the error their arithmetic allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blackwell_kernels.common.testing.compare import assert_fp8_similar
from blackwell_kernels.common.testing.generators import seeded
from blackwell_kernels.common.testing.poison import Canaries
from blackwell_kernels.dsa import reference, testing
from blackwell_kernels.dsa.config import LogitsConfig
from blackwell_kernels.errors import UnsupportedInputError

SMALL = LogitsConfig(block_n=64, group=4)
PAIRS = LogitsConfig(block_n=64, group=4, pages=2, programs=1)


def gathered(cache: torch.Tensor, table: torch.Tensor, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.gather_indexer_k(cache, table[row : row + 1], torch.tensor([0, length]))


def check(impl: Any, logits: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    testing.assert_bounded(logits, expected, bound)
    finite = expected.isfinite()
    assert_fp8_similar(logits.cpu()[finite], expected[finite])


def run_paged(
    impl: Any,
    lens: torch.Tensor,
    next_n: int,
    heads: int,
    columns: int,
    seed: int,
    *,
    page: int = 64,
    gap: int = 0,
    config: LogitsConfig | None = SMALL,
) -> None:
    rng = seeded(seed)
    batch = lens.shape[0]
    rows = reference.paged_row_lengths(lens, next_n).view(batch, next_n)
    longest = rows.amax(1).tolist()
    cache, table = testing.index_cache(longest, page, rng, gap, spare_columns=1)
    q = testing.fp8_queries((batch, next_n, heads, 128), rng)
    weights = torch.randn(batch * next_n, heads, generator=rng)
    expected = reference.indexer_logits_paged(q, cache, weights, lens, table, columns)
    bound = testing.paged_logits_bound(q, cache, weights, lens, table, columns, impl.tensor_cores)
    guard = Canaries(impl.device)
    logits = guard.output((batch * next_n, columns), torch.float32, strides=(columns + 3, 1))
    inputs = [guard.input(x, strides=x.stride()) for x in (q, cache, weights, lens, table)]
    impl.run("dsa_indexer_logits_paged", *inputs, logits, config=config)
    check(impl, logits, expected, bound)
    guard.check()


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("lens", [[1], [0], [64, 65, 63, 128], [0, 200, 1, 0], [129, 7]])
@pytest.mark.parametrize("heads", [4, 64])
def test_paged_lengths(impl: Any, lens: list[int], heads: int):
    run_paged(impl, int32(lens), 1, heads, 200, 1)


@pytest.mark.parametrize("lens", [[1, 64], [65, 128], [129, 200], [450, 0, 320]])
@pytest.mark.parametrize("page", [64, 48])
def test_paged_two_pages_at_a_time(impl: Any, lens: list[int], page: int):
    run_paged(impl, int32(lens), 1, 8, 460, 23, page=page, gap=12, config=PAIRS)


@pytest.mark.parametrize("next_n", [2, 3, 4])
def test_paged_several_queries_end_at_the_context_length(impl: Any, next_n: int):
    run_paged(impl, int32([130, 64, next_n, 1, 0]), next_n, 8, 192, 2)


def test_paged_lengths_per_row(impl: Any):
    run_paged(impl, int32([[5, 130], [64, 64], [0, 1], [100, 3]]), 2, 8, 192, 3)


def test_paged_lengths_as_vllm_passes_them_for_one_query(impl: Any):
    run_paged(impl, int32([[70], [3]]), 1, 8, 128, 4)


def test_paged_lengths_in_a_column_of_a_wider_buffer(impl: Any):
    run_paged(impl, int32([[70, 9], [3, 9], [0, 9]])[:, 0], 2, 8, 128, 16)


@pytest.mark.parametrize(("page", "gap"), [(64, 256), (16, 0), (48, 4)])
def test_paged_page_sizes_and_gaps(impl: Any, page: int, gap: int):
    run_paged(impl, int32([97, 33]), 1, 4, 150, 5, page=page, gap=gap)


@pytest.mark.parametrize("heads", [1, 3, 16, 33, 128])
def test_paged_head_counts(impl: Any, heads: int):
    run_paged(impl, int32([70]), 1, heads, 70, 6)


def test_paged_shipped_configuration(impl: Any):
    run_paged(impl, int32([300, 129]), 2, 64, 512, 7, config=None)


def test_paged_pages_and_lengths_out_of_range(impl: Any):
    cache, table = testing.index_cache([64], 64, seeded(8))
    table = torch.cat([table, int32([[77, -3]])], 1)
    q, weights = testing.fp8_queries((1, 1, 4, 128), seeded(9)), torch.ones(1, 4)
    logits = impl.to(torch.empty(1, 256))
    inputs = impl.to(q, cache, weights, int32([192]), table)
    if impl.name == "cpu":
        with pytest.raises(UnsupportedInputError, match="pages in"):
            impl.run("dsa_indexer_logits_paged", *inputs, logits)
        with pytest.raises(UnsupportedInputError, match="length 300"):
            impl.run("dsa_indexer_logits_paged", *inputs[:3], impl.to(int32([300])), inputs[4], logits)
        return
    for length in (192, 300, 2**31 - 1):
        logits.fill_(torch.nan)
        impl.run("dsa_indexer_logits_paged", *inputs[:3], impl.to(int32([length])), inputs[4], logits, config=SMALL)
        assert logits[0, :64].isfinite().all()
        assert (logits[0, 64:] == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("next_n", [1, 2])
def test_paged_lengths_of_the_model(impl: Any, next_n: int):
    run_paged(impl, int32([0, 2047, 163_840, 1, 2049, 65_535, 65_537]), next_n, 64, 163_840, 20, config=None)


@pytest.mark.gpu
def test_paged_cache_beyond_two_giga_bytes(impl: Any):
    if impl.name == "cpu":
        pytest.skip("the offsets of the Triton kernel are under test")
    small, table = testing.index_cache([64], 64, seeded(21))
    blocks = 2**31 // (64 * 132) + 2
    cache = torch.full((blocks, 64, 132), 0xFF, dtype=torch.uint8, device=impl.device)
    cache[-1] = small[table[0, 0]].to(impl.device)
    q, weights, lens = testing.fp8_queries((1, 1, 64, 128), seeded(22)), torch.ones(1, 64), int32([64])
    logits = torch.empty(1, 64, device=impl.device)
    moved = impl.to(q, weights, lens, int32([[blocks - 1]]))
    impl.run("dsa_indexer_logits_paged", moved[0], cache, *moved[1:], logits)
    k, scale = gathered(small, table, 0, 64)
    expected = reference.indexer_logits_paged(q, small, weights, lens, table, 64)
    check(impl, logits, expected, testing.logits_bound(q[0], k, scale, weights, impl.tensor_cores))


@pytest.mark.parametrize("next_n", [1, 2])
def test_paged_rows_that_need_no_scores(impl: Any, next_n: int):
    rng, columns, topk = seeded(18), 300, 96
    lens = int32([96, 97, 0, 250, 64])
    cache, table = testing.index_cache(lens.tolist(), 64, rng)
    q = testing.fp8_queries((5, next_n, 8, 128), rng)
    weights = torch.randn(5 * next_n, 8, generator=rng)
    expected = reference.indexer_logits_paged(q, cache, weights, lens, table, columns)
    logits = impl.to(torch.full((5 * next_n, columns), 7.0))
    inputs = impl.to(q, cache, weights, lens, table)
    impl.run("dsa_indexer_logits_paged", *inputs, logits, config=SMALL, clean=False, topk=topk)
    seen = reference.paged_row_lengths(lens, next_n).flatten()
    for row in range(5 * next_n):
        n = int(seen[row])
        k, scale = gathered(cache, table, row // next_n, n)
        if n > topk:
            query, weight = q[row // next_n, row % next_n][None], weights[row][None]
            bound = testing.logits_bound(query, k, scale, weight, impl.tensor_cores)
            testing.assert_bounded(logits[row : row + 1, :n], expected[row : row + 1, :n], bound)
        # what is beyond may hold anything but a score that somebody could take for one
        rest = logits[row, n if n > topk else columns :].cpu()
        assert ((rest == 7.0) | (rest == -torch.inf)).all()


def run_ragged(
    impl: Any,
    starts: torch.Tensor,
    ends: torch.Tensor,
    n_keys: int,
    heads: int,
    seed: int,
    *,
    config: LogitsConfig | None = SMALL,
) -> None:
    rng = seeded(seed)
    rows = starts.shape[0]
    q, k = testing.fp8_queries((rows, heads, 128), rng), testing.fp8_queries((n_keys, 128), rng)
    scale = torch.exp2(torch.randint(-3, 3, (n_keys,), generator=rng).float())
    # keys that no row sees are left over from another step
    column = torch.arange(n_keys)
    seen = (column >= starts[:, None]) & (column < ends[:, None])
    dead = ~seen.any(0)
    k.view(torch.uint8)[dead] = 0xFF
    scale[dead] = torch.nan
    weights = torch.randn(rows, heads, generator=rng)
    expected = reference.indexer_logits_ragged(q, k, scale, weights, starts, ends)
    bound = testing.logits_bound(q, k, scale, weights, impl.tensor_cores)
    guard = Canaries(impl.device)
    logits = guard.output((rows, n_keys), torch.float32, strides=(n_keys + 5, 1))
    moved_q = guard.input(q, strides=(heads * 128 + 256, 128, 1))
    inputs = [guard.input(x) for x in (k, scale, weights, starts, ends)]
    impl.run("dsa_indexer_logits_ragged", moved_q, *inputs, logits, config=config)
    check(impl, logits, expected, bound)
    guard.check()


def test_ragged_causal_requests(impl: Any):
    # three requests of 40, 1 and 90 keys whose last 20, 1 and 33 tokens are queries
    first: list[int] = []
    ends: list[int] = []
    for start, keys, queries in ((0, 40, 20), (40, 1, 1), (41, 90, 33)):
        first += [start] * queries
        ends += range(start + keys - queries + 1, start + keys + 1)
    run_ragged(impl, int32(first), int32(ends), 131, 8, 10)


def test_ragged_odd_ranges(impl: Any):
    starts = int32([0, 5, 50, 99, 100, 0, 64, 63, 0])
    ends = int32([100, 5, 40, 100, 100, 0, 128, 65, 1])
    run_ragged(impl, starts, ends, 100, 4, 11)


def test_ragged_bounds_are_clamped(impl: Any):
    run_ragged(impl, int32([-5, 90, -(2**31)]), int32([10, 2**31 - 1, 2**31 - 1]), 100, 4, 12)


@pytest.mark.parametrize(("rows", "keys", "heads"), [(1, 1, 64), (33, 257, 64), (65, 130, 3)])
def test_ragged_shipped_configuration(impl: Any, rows: int, keys: int, heads: int):
    rng = seeded(13)
    starts = torch.randint(0, keys, (rows,), generator=rng).to(torch.int32)
    ends = starts + torch.randint(0, keys + 1, (rows,), generator=rng).to(torch.int32)
    run_ragged(impl, starts, ends.clamp(max=keys), keys, heads, 14, config=None)


def test_ragged_without_cleaning_leaves_nothing_but_scores(impl: Any):
    rng = seeded(19)
    q, k = testing.fp8_queries((9, 4, 128), rng), testing.fp8_queries((300, 128), rng)
    scale, weights = torch.ones(300), torch.randn(9, 4, generator=rng)
    starts, ends = int32([0] * 4 + [130] * 5), int32([*range(60, 64), *range(260, 265)])
    expected = reference.indexer_logits_ragged(q, k, scale, weights, starts, ends)
    logits = impl.to(torch.full((9, 300), 7.0))
    inputs = impl.to(q, k, scale, weights, starts, ends)
    impl.run("dsa_indexer_logits_ragged", *inputs, logits, config=SMALL, clean=False)
    outside = expected == -torch.inf
    logits = logits.cpu()
    assert ((logits[outside] == 7.0) | (logits[outside] == -torch.inf)).all()
    bound = testing.logits_bound(q, k, scale, weights, impl.tensor_cores)
    testing.assert_bounded(logits[~outside], expected[~outside], bound[~outside])


def test_nothing_to_do(impl: Any):
    q, k = torch.empty(0, 4, 128, dtype=torch.float8_e4m3fn), torch.empty(3, 128, dtype=torch.float8_e4m3fn)
    none = torch.empty(0, dtype=torch.int32)
    inputs = impl.to(q, k, torch.empty(3), torch.empty(0, 4), none, none)
    impl.run("dsa_indexer_logits_ragged", *inputs, impl.to(torch.empty(0, 3)))
    cache = impl.to(testing.paged_bytes(1, 64, 132))
    empty_table = impl.to(torch.empty(2, 0, dtype=torch.int32))
    logits = impl.to(torch.full((2, 5), torch.nan))
    queries = impl.to(testing.fp8_queries((2, 1, 4, 128), seeded(15)))
    lens, weights = impl.to(int32([0, 0]), torch.ones(2, 4))
    impl.run("dsa_indexer_logits_paged", queries, cache, weights, lens, empty_table, logits)
    assert (logits == -torch.inf).all()


@pytest.mark.gpu
def test_logits_beyond_two_giga_elements(impl: Any):
    if impl.name == "cpu":
        pytest.skip("the offsets of the Triton kernels are under test")
    rows, keys = 2100, 1 << 20
    assert rows * keys > 2**31
    k = testing.fp8_queries((keys, 128), seeded(16))
    q, weights = testing.fp8_queries((rows, 1, 128), seeded(17)), torch.ones(rows, 1)
    scale, ends = torch.ones(keys), torch.full((rows,), 8, dtype=torch.int32)
    ends[-1] = keys
    starts = torch.zeros_like(ends)
    starts[-1] = keys - 100
    logits = torch.full((rows, keys), torch.nan, device=impl.device)
    impl.run("dsa_indexer_logits_ragged", *impl.to(q, k, scale, weights, starts, ends), logits)
    expected = reference.indexer_logits_ragged(q[-1:], k[-100:], scale[-100:], weights[-1:], starts[:1], int32([100]))
    bound = testing.logits_bound(q[-1:], k[-100:], scale[-100:], weights[-1:], True)
    testing.assert_bounded(logits[-1:, -100:], expected, bound)
    assert (logits[-1, :-100] == -torch.inf).all()
    assert not logits.isnan().any()
