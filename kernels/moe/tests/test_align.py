"""The device-side sort of pairs by expert, against Python lists; and the host's bound on tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blackwell_kernels.common.testing.poison import poison_
from blackwell_kernels.moe import align

ON_GPU = torch.cuda.is_available()


def expected_sort(ids, expert_map, experts, block_t):
    local = []
    for e in ids.flatten().tolist():
        if expert_map is not None:
            e = expert_map[e] if 0 <= e < len(expert_map) else -1
        local.append(e if 0 <= e < experts else None)
    runs = [[p for p, e in enumerate(local) if e == expert] for expert in range(experts)]
    order = [p for run in runs for p in run]
    tiles = []
    for e, run in enumerate(runs):
        start = sum(map(len, runs[:e]))
        tiles += [[e, row, start + len(run)] for row in range(start, start + len(run), block_t)]
    row = [order.index(p) if e is not None else -1 for p, e in enumerate(local)]
    return order, row, tiles


def sort_in_one_launch(ids, expert_map, experts, block_t, tiles):
    """The sort of `prepare_in_one_launch`, beside activations that are quantised."""
    x = torch.randn(len(ids), 384, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).to(ids.device)
    q, scale, sort = align.prepare_in_one_launch(x, None, ids, expert_map, experts, block_t, tiles)
    wanted_q, wanted_scale = align.quantize(x)
    assert torch.equal(q.view(torch.uint8), wanted_q.view(torch.uint8))
    assert torch.equal(scale, wanted_scale)
    return sort


def check_sort(device, ids, expert_map, experts, block_t):
    moved_map = None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32, device=device)
    bound = align.max_tiles(ids.numel(), experts, block_t)
    order, row, tiles = expected_sort(ids, expert_map, experts, block_t)
    for sort in (align.sort_pairs, sort_in_one_launch):
        result = sort(ids.to(device), moved_map, experts, block_t, bound)
        sorted_pairs, pair_row, found = (x.tolist() for x in result)
        assert sorted_pairs[: len(order)] == order
        assert pair_row == row
        assert found[: len(tiles)] == tiles
        assert len(found) == bound
        assert {tile[0] for tile in found[len(tiles) :]} <= {-1}


@pytest.mark.parametrize("tokens", [1, 8, 31, 32, 33, 300])  # x 4 picks: a chunk is 128 pairs
@pytest.mark.parametrize("experts", [1, 7, 8])
def test_sort(device, poisoned_workspaces, tokens, experts):
    ids = torch.randint(0, experts, (tokens, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check_sort(device, ids, None, experts, 16)


def test_many_chunks(device, poisoned_workspaces, monkeypatch):
    """More chunks than the scan takes at a time."""
    monkeypatch.setattr(align, "_SCANNED_CHUNKS", 64)
    experts = 1000
    tokens = 40_000 if ON_GPU else 2_600
    ids = torch.randint(0, experts, (tokens, 8), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    bound = align.max_tiles(ids.numel(), experts, 32)
    sorted_pairs, pair_row, tiles = (x.cpu() for x in align.sort_pairs(ids.to(device), None, experts, 32, bound))
    assert torch.equal(sorted_pairs.long(), ids.flatten().argsort(stable=True))
    assert torch.equal(pair_row[sorted_pairs.long()].long(), torch.arange(ids.numel()))
    counts = torch.bincount(ids.flatten(), minlength=experts)
    each = (counts + 31) // 32
    assert torch.equal(tiles[: each.sum(), 0].long(), torch.arange(experts).repeat_interleave(each))
    assert torch.equal(tiles[: each.sum(), 2].long(), counts.cumsum(0).repeat_interleave(each))
    assert (tiles[each.sum() :, 0] == -1).all()


def test_ids_outside_and_experts_elsewhere_have_no_row(device, poisoned_workspaces):
    big = 2**31 - 1
    ids = torch.tensor([[0, -1, 5], [6, 5, 99], [big, -big - 1, 3], [2, 2, 2]], dtype=torch.int32)
    check_sort(device, ids, None, 6, 16)
    check_sort(device, ids, [1, -1, 0, -1, 5, 2, -7], 3, 16)
    check_sort(device, ids, [-1] * 6, 3, 16)
    check_sort(device, torch.full((5, 2), -1, dtype=torch.int32), None, 4, 16)


@settings(max_examples=300 if ON_GPU else 25)
@given(
    tokens=st.integers(1, 60),
    topk=st.integers(1, 5),
    experts=st.integers(1, 40),
    mapped=st.booleans(),
    block_t=st.sampled_from([16, 64]),
    seed=st.integers(0, 2**31),
)
def test_fuzz(device, tokens, topk, experts, mapped, block_t, seed):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, experts + 3, (tokens, topk), generator=rng, dtype=torch.int32)
    expert_map = torch.randint(-1, experts, (experts + 2,), generator=rng).tolist() if mapped else None
    check_sort(device, ids, expert_map, experts, block_t)


@settings(max_examples=500)
@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=12),
    none=st.integers(0, 50),
    block_t=st.sampled_from([16, 32, 64, 128]),
)
def test_the_bound_on_tiles_holds(counts, none, block_t):
    tiles = sum(-(-n // block_t) for n in counts)
    assert tiles <= align.max_tiles(sum(counts) + none, len(counts), block_t)


@pytest.mark.parametrize("pairs", [0, 1, 5, 8, 9, 24, 25, 100])
def test_the_bound_on_tiles_is_reached(pairs):
    """One pair in every expert, the rest in one of them."""
    counts = [1 if e < pairs else 0 for e in range(8)]
    counts[0] += max(pairs - 8, 0)
    assert sum(-(-n // 16) for n in counts) == align.max_tiles(pairs, 8, 16)


def test_poison_reaches_the_workspaces(poisoned_workspaces):
    assert torch.empty(2).isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == poison_(torch.zeros(2, dtype=torch.int32)).tolist()
