"""Exact row top-k: sets of positions are compared, not only scores, since ties have one right answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from blackwell_kernels.common.testing.generators import seeded
from blackwell_kernels.common.testing.poison import Canaries
from blackwell_kernels.dsa import config as config_module
from blackwell_kernels.dsa import reference
from blackwell_kernels.dsa.config import TopkConfig
from blackwell_kernels.dsa.testing import same_selection

SMALL = TopkConfig(block=128, num_warps=4, held=1)
SPLIT = TopkConfig(block=64, splits=4, num_warps=2, held=1)
WHOLE = TopkConfig(block=1024, num_warps=2)  # all columns at once
SHORT = replace(SPLIT, held=16)  # the same of some rows
CLUSTER = TopkConfig(block=256, num_warps=2, held=4, cluster=2)  # a row is asked for ahead, held, or streamed
ALONE = replace(CLUSTER, block=64, held=2, cluster=1)
WAYS = (SMALL, SPLIT, WHOLE, SHORT, CLUSTER, ALONE)
MODEL_CLUSTERS = tuple(
    TopkConfig(block, 1, warps, early=True, cluster=programs)
    for block, warps, programs in ((16_384, 32, 8), (8192, 16, 16), (4096, 32, 2), (2048, 16, 1))
)
DRAWS = 104


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def check(
    impl: Any,
    logits: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    k: int,
    config: TopkConfig | None = SMALL,
) -> None:
    """With the configuration given, or with each way to do a row: by one or several programs, by one that holds it."""
    expected = reference.topk(logits, starts, ends, k)
    rows, columns = logits.shape
    for each in WAYS if config is SMALL and impl.name == "triton" else (config,):
        guard = Canaries(impl.device)
        moved = guard.input(logits, strides=(columns + 9, 1))
        indices = guard.output((rows, k), torch.int32, strides=(k + 3, 1))
        impl.run("dsa_topk", moved, guard.input(starts), guard.input(ends), indices, config=each)
        assert same_selection(indices, expected)
        guard.check()


def whole_rows(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = logits.shape
    return torch.zeros(rows, dtype=torch.int32), torch.full((rows,), columns, dtype=torch.int32)


def from_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def test_reference_agrees_with_an_order_of_integers():
    # an independent total order: sign-magnitude integers, zeros merged
    bits = torch.randint(-(2**31), 2**31, (4, 500), generator=seeded(0))
    logits = from_bits(bits)
    logits[logits.isnan()] = -0.0
    logits[:, ::7] = 0.0
    signed = logits.view(torch.int32).long()
    order = torch.where(signed < 0, -(signed & 0x7FFFFFFF), signed)
    for r in range(4):
        ranked = sorted((-score, column) for column, score in enumerate(order[r].tolist()))
        expected = sorted(column for _, column in ranked[:77])
        assert reference.topk(logits, *whole_rows(logits), 77)[r].tolist() == expected


@pytest.mark.parametrize("k", [1, 2, 64, 100])
def test_lengths_around_k(impl: Any, k: int):
    lengths = [0, 1, k - 1, k, k + 1, 2 * k, 127, 128, 129, 260]
    ends = int32([min(n, 260) for n in lengths])
    logits = torch.randn(len(lengths), 260, generator=seeded(k))
    check(impl, logits, torch.zeros_like(ends), ends, k)


def test_short_rows_are_the_identity_whatever_they_hold(impl: Any):
    logits = torch.full((3, 40), torch.nan)
    logits[1] = -torch.inf
    starts, ends = int32([0, 5, 39]), int32([40, 30, 40])
    indices = impl.to(torch.full((3, 64), 7, dtype=torch.int32))
    impl.run("dsa_topk", *impl.to(logits, starts, ends), indices, config=SMALL)
    for row, n in enumerate((40, 25, 1)):
        assert indices[row].tolist() == [*range(n), *[-1] * (64 - n)]


def test_columns_outside_the_range_are_no_candidates(impl: Any):
    rng = seeded(1)
    logits = torch.randn(6, 300, generator=rng)
    starts, ends = int32([0, 50, 199, 299, 300, 120]), int32([100, 300, 200, 300, 300, 60])
    column = torch.arange(300)
    outside = (column < starts[:, None]) | (column >= ends[:, None])
    for poison in (torch.nan, torch.inf):
        check(impl, logits.masked_fill(outside, poison), starts, ends, 30)


def test_ranges_are_clamped(impl: Any):
    logits = torch.randn(4, 200, generator=seeded(2))
    check(impl, logits, int32([-7, 0, -(2**31), 400]), int32([150, 2**31 - 1, -3, 500]), 20)


@pytest.mark.parametrize("block", range(DRAWS // 8))
def test_near_ties_and_equal_scores(impl: Any, block: int):
    rng = seeded(100 + block)
    rows, columns, k = 8, 600, 150
    kind = block % 4
    if kind == 0:  # few distinct values
        logits = torch.randint(0, 5, (rows, columns), generator=rng).float()
    elif kind == 1:  # neighbours in float32 around 1, both sides of the exponent's step
        logits = from_bits(0x3F800000 + torch.randint(-6, 7, (rows, columns), generator=rng))
    elif kind == 2:  # the K-th value many times, a few above
        logits = torch.where(
            torch.rand(rows, columns, generator=rng) < 0.1, torch.rand(rows, columns, generator=rng), -1.0
        )
    else:  # pairs of equal values
        logits = torch.randn(rows, columns // 2, generator=rng).repeat(1, 2)
    check(impl, logits, *whole_rows(logits), k)


def test_all_equal(impl: Any):
    for value in (0.0, -0.0, 3.5, -torch.inf, torch.inf):
        logits = torch.full((1, 400), value)
        check(impl, logits, *whole_rows(logits), 33)


def test_zeros_denormals_and_infinities(impl: Any):
    rng = seeded(3)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.17549435e-38, 3.4e38, -3.4e38, 1.0, -1.0])
    special = torch.cat([special, torch.tensor([torch.inf, -torch.inf])])
    logits = special[torch.randint(0, len(special), (6, 500), generator=rng)]
    for k in (1, 50, 300, 499):
        check(impl, logits, *whole_rows(logits), k)


def test_denormals_keep_their_order(impl: Any):
    logits = from_bits(torch.randperm(512, generator=seeded(4)))[None]
    check(impl, logits, *whole_rows(logits), 100)
    check(impl, -logits, *whole_rows(logits), 100)


def test_minus_zero_ties_with_zero(impl: Any):
    logits = torch.tensor([[-0.0, 0.0] * 100])
    indices = impl.to(torch.empty(1, 10, dtype=torch.int32))
    impl.run("dsa_topk", *impl.to(logits, *whole_rows(logits)), indices, config=SMALL)
    assert indices[0].tolist() == list(range(10))


def test_nan_counts_as_minus_infinity(impl: Any):
    logits = torch.randn(3, 300, generator=seeded(5))
    logits[0, ::2] = torch.nan
    logits[1] = torch.nan
    logits[2, ::3] = -torch.inf
    logits[2, 1::3] = from_bits(torch.tensor([-1]))  # a NaN with its sign bit set
    check(impl, logits, *whole_rows(logits), 200)


def test_random_bits(impl: Any):
    logits = from_bits(torch.randint(-(2**31), 2**31, (8, 700), generator=seeded(6)))
    check(impl, logits, *whole_rows(logits), 128)


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("block", [64, 1024])
def test_configurations(impl: Any, splits: int, block: int):
    logits = torch.randn(2, 900, generator=seeded(7))
    config = TopkConfig(block=block, splits=splits, num_warps=4, held=1)
    check(impl, logits, int32([0, 3]), int32([900, 777]), 256, config)


@pytest.fixture(params=[None, 64], ids=["listed", "overflow"])
def listed(request: pytest.FixtureRequest, impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of candidates as it ships, or one that overflows."""
    if request.param and impl.name == "cpu":
        pytest.skip("has no list")
    if request.param:
        from blackwell_kernels.dsa import topk

        monkeypatch.setattr(topk, "_LISTED", request.param)


def narrow(kind: str, rows: int, columns: int) -> torch.Tensor:
    """Scores of which a histogram says little."""
    rng = seeded(11)
    uniform = torch.rand(rows, columns, generator=rng)
    match kind:
        case "one bin":
            return uniform * 0.03 + 1.0
        case "one bin below zero":
            return -1.0 - uniform * 0.03
        case "neighbours":  # the last digit of the key decides
            return from_bits(0x40490000 + torch.randint(0, 200, (rows, columns), generator=rng))
        case "two values":
            return torch.where(uniform < 0.5, 0.5, -2.0)
        case "one value":
            return torch.full((rows, columns), 1.7)
        case "too large":  # for five bits of exponent
            return (uniform + 1.0) * 1e20
        case "too small":
            return (uniform - 0.5) * 1e-20
        case "too large below zero":
            return -(uniform + 1.0) * 1e20
        case "mostly -inf":
            return uniform.masked_fill(uniform < 0.9, -torch.inf)
        case "similar":
            return 3.0 + torch.randn(rows, columns, generator=rng) * 0.2
    raise AssertionError(kind)


KINDS = [
    "one bin", "one bin below zero", "neighbours", "two values", "one value", "too large", "too small",
    "too large below zero", "mostly -inf", "similar",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_distributions(impl: Any, listed: None, kind: str):
    logits = narrow(kind, 2, 700)
    # from the middle of a block of four columns, in the second row
    check(impl, logits, int32([0, 3]), int32([700, 698]), 150)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_distributions_of_the_model(impl: Any, listed: None, kind: str):
    logits = narrow(kind, 3, 65_536)
    for config in (None, TopkConfig(4096, 1, 32), TopkConfig(2048, 16, 8, pdl=True), *MODEL_CLUSTERS):
        check(impl, logits, int32([0, 5, 30_000]), int32([65_536, 65_533, 65_536]), 2048, config)
        check(impl, logits, int32([0, 5, 60_000]), int32([4096, 8192, 62_049]), 2048, config)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [4096, 8192, 16_384])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_distributions_of_rows_that_a_program_holds(impl: Any, kind: str, columns: int):
    logits = narrow(kind, 3, columns)
    starts, ends = int32([0, 5, 1001]), int32([columns, columns - 3, columns])
    for config in config_module.topk_search_space(config_module.topk_case(columns, 2048), 3):
        check(impl, logits, starts, ends, 2048, config)


@pytest.mark.parametrize(("splits", "cluster"), [(1, 0), (4, 0), (1, 4)])
def test_more_ties_than_the_list_holds(impl: Any, splits: int, cluster: int):
    config = TopkConfig(block=1024, splits=splits, num_warps=4, held=1, cluster=cluster)
    logits = torch.rand(3, 9000, generator=seeded(11)) * 0.03 + 1.0  # one bin
    logits[1] = 1.0
    logits[2, ::2] = 0.5
    check(impl, logits, *whole_rows(logits), 2048, config)


@pytest.mark.parametrize("columns", [64, 700, 704])
def test_rows_that_begin_on_16_bytes(impl: Any, columns: int):
    """As a model has them: no stride between rows, loads of four columns, bounds anywhere within them."""
    logits = torch.randn(6, columns, generator=seeded(12))
    starts, ends = int32([0, 1, 2, 3, 4, 7]), int32([columns - i for i in (0, 3, 1, 2, 0, 5)])
    outside = (torch.arange(columns) < starts[:, None]) | (torch.arange(columns) >= ends[:, None])
    for poison in (torch.nan, torch.inf):
        poisoned = logits.masked_fill(outside, poison)
        for config in WAYS:
            indices = impl.to(torch.full((6, 30), 7, dtype=torch.int32))
            impl.run("dsa_topk", *impl.to(poisoned, starts, ends), indices, config=config)
            assert same_selection(indices, reference.topk(poisoned, starts, ends, 30))


def test_shipped_configuration(impl: Any):
    logits = torch.randn(4, 9000, generator=seeded(8)) * torch.tensor([[1e-3], [1.0], [1e3], [1e30]])
    check(impl, logits, int32([0, 17, 0, 4000]), int32([9000, 9000, 2048, 9000]), 2048, None)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [None, 100], ids=["distinct", "near ties"])
def test_lengths_of_the_model(impl: Any, steps: int | None):
    ends = int32([0, 1, 2047, 2048, 2049, 4096, 4097, 8192, 8193, 65_535, 65_536, 65_537, 163_840])
    logits = torch.randn(len(ends), 163_840, generator=seeded(20))
    logits = logits if steps is None else (logits * steps).round() / steps
    logits.masked_fill_(torch.arange(163_840) >= ends[:, None], torch.nan)
    # the last of them is launched while the one before it runs
    several = TopkConfig(2048, 16, 8)
    for config in (None, TopkConfig(4096, 1, 16), several, replace(several, pdl=True), *MODEL_CLUSTERS):
        check(impl, logits, torch.zeros_like(ends), ends, 2048, config)


@pytest.mark.parametrize("config", WAYS, ids=["one", "several", "whole", "short", "cluster", "alone"])
def test_repeats_are_equal_bit_for_bit(impl: Any, config: TopkConfig):
    logits = torch.randint(0, 9, (2, 500), generator=seeded(9)).float()
    inputs = impl.to(logits, *whole_rows(logits))
    runs = []
    for _ in range(50 if impl.tensor_cores or impl.name == "cpu" else 3):
        indices = impl.to(torch.empty(2, 40, dtype=torch.int32))
        impl.run("dsa_topk", *inputs, indices, config=config)
        runs.append(indices.cpu())
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("shape", [(0, 10, 3), (2, 0, 3)])
def test_nothing_to_select_from(impl: Any, shape: tuple[int, int, int]):
    rows, columns, k = shape
    logits = torch.empty(rows, columns)
    indices = impl.to(torch.full((rows, k), 5, dtype=torch.int32))
    impl.run("dsa_topk", *impl.to(logits, *whole_rows(logits)), indices)
    assert (indices == -1).all()


@pytest.mark.gpu
def test_rows_beyond_two_giga_elements(impl: Any):
    if impl.name == "cpu":
        pytest.skip("the offsets of the Triton kernels are under test")
    logits = torch.zeros(2100, 1 << 20, device=impl.device)
    logits[-1, -5000:] = torch.rand(5000, generator=seeded(10)).to(impl.device)
    starts, ends = whole_rows(logits)
    starts += 1 << 19
    indices = torch.empty(2100, 2048, dtype=torch.int32, device=impl.device)
    impl.run("dsa_topk", logits, starts.to(impl.device), ends.to(impl.device), indices)
    expected = reference.topk(logits[-1:].cpu(), starts[-1:], ends[-1:], 2048)
    assert same_selection(indices[-1:], expected)
    assert (indices[:-1].cpu() == torch.arange(2048)).all()
