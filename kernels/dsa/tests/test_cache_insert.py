"""Inserting into both caches and gathering from the indexer's: bit for bit the reference's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blackwell_kernels.common.testing.generators import cu_seqlens, normal, seeded
from blackwell_kernels.common.testing.poison import Canaries
from blackwell_kernels.dsa import reference, testing
from blackwell_kernels.errors import UnsupportedInputError

FP8 = torch.float8_e4m3fn


def slots_with_padding(tokens: int, capacity: int, seed: int) -> torch.Tensor:
    """Distinct slots; some tokens are padding."""
    slots = torch.randperm(capacity, generator=seeded(seed))[:tokens]
    slots[1::5] = -1
    return slots


def extreme_rows(tokens: int, width: int, seed: int) -> torch.Tensor:
    """Rows of very different magnitude: zero, denormal, at and beside scale boundaries, the largest finite value."""
    x = normal((tokens, width), seeded(seed), torch.float32)
    for row, magnitude in enumerate([0.0, 1e-39, 1e-6, 1e-4, 448.0, 450.0, 1.0, 1e4, 3.3e38]):
        x[row] = x[row].sign() * magnitude
    return x.to(torch.bfloat16)


@pytest.mark.parametrize(("page", "gap"), [(64, 0), (64, 128), (16, 4), (48, 0)])
@pytest.mark.parametrize("slot_dtype", [torch.int64, torch.int32])
def test_indexer_insert_bit_exact(impl: Any, page: int, gap: int, slot_dtype: torch.dtype):
    k = extreme_rows(37, 128, 1)
    slots = slots_with_padding(37, 3 * page, 2).to(slot_dtype)
    cache = testing.paged_bytes(3, page, 132, gap)
    expected = reference.indexer_k_insert(k, cache, slots)
    guard = Canaries(impl.device)
    moved = guard.inout(cache, strides=cache.stride())
    impl.run("dsa_indexer_k_insert", guard.input(k, strides=(200, 1)), moved, guard.input(slots))
    # the whole cache: slots that were not written keep their bytes
    assert torch.equal(moved.cpu(), expected)
    guard.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_indexer_insert_other_float_types(impl: Any, dtype: torch.dtype):
    k, slots = normal((5, 128), seeded(3), dtype), torch.arange(5)
    cache = testing.paged_bytes(1, 64, 132)
    expected = reference.indexer_k_insert(k, cache, slots)
    moved = impl.to(cache.clone())
    impl.run("dsa_indexer_k_insert", impl.to(k), moved, impl.to(slots))
    assert torch.equal(moved.cpu(), expected)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("page", "gap"), [(64, 0), (64, 576 * 4), (16, 32)])
def test_kv_insert_bit_exact(impl: Any, fp8: bool, page: int, gap: int):
    kv_c, k_pe = extreme_rows(37, 512, 4), normal((37, 64), seeded(5))
    slots = slots_with_padding(37, 3 * page, 6)
    cache = testing.paged_bytes(3, page, 656 if fp8 else 1152, gap)
    cache = cache if fp8 else cache.view(torch.bfloat16)
    for power_of_two_scale in (True, False) if fp8 else (True,):
        expected = reference.kv_insert(kv_c, k_pe, cache, slots, power_of_two_scale)
        guard = Canaries(impl.device)
        moved = guard.inout(cache, strides=cache.stride())
        rows = guard.input(kv_c, strides=(700, 1)), guard.input(k_pe, strides=(80, 1))
        impl.run("dsa_kv_insert", *rows, moved, guard.input(slots), power_of_two_scale=power_of_two_scale)
        assert torch.equal(moved.cpu().contiguous().view(torch.uint8), expected.view(torch.uint8))
        guard.check()


@pytest.mark.parametrize("op", ["dsa_indexer_k_insert", "dsa_kv_insert"])
def test_slots_behind_the_cache(impl: Any, op: str):
    index = op == "dsa_indexer_k_insert"
    cache = impl.to(testing.paged_bytes(2, 64, 132 if index else 656))
    before = cache.clone()
    slots = impl.to(torch.tensor([128, 2**31 + 5, -1, -(2**31)]))
    rows = (
        [impl.to(normal((4, 128), seeded(7)))]
        if index
        else impl.to(normal((4, 512), seeded(7)), normal((4, 64), seeded(8)))
    )
    if impl.name == "cpu":
        with pytest.raises(UnsupportedInputError, match=r"slot 2147483653; supported: slots below 128"):
            impl.run(op, *rows, cache, slots)
    else:
        impl.run(op, *rows, cache, slots)
    assert torch.equal(cache, before)


def test_no_tokens(impl: Any):
    cache = impl.to(testing.paged_bytes(1, 64, 132))
    before = cache.clone()
    empty = impl.to(torch.empty(0, 128, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int64))
    impl.run("dsa_indexer_k_insert", empty[0], cache, empty[1])
    kv = impl.to(testing.paged_bytes(1, 64, 656))
    latent, rope = impl.to(torch.empty(0, 512).bfloat16(), torch.empty(0, 64).bfloat16())
    impl.run("dsa_kv_insert", latent, rope, kv, empty[1])
    assert torch.equal(cache, before)
    assert (kv == 0xFF).all()


@pytest.mark.parametrize(
    ("lengths", "page", "gap"),
    [([1], 64, 0), ([64, 65, 63], 64, 64), ([0, 130, 0, 0, 5, 0], 64, 0), ([17, 16, 15], 16, 0), ([0], 64, 0)],
)
def test_gather_bit_exact(impl: Any, lengths: list[int], page: int, gap: int):
    cache, table = testing.index_cache(lengths, page, seeded(9), gap, spare_columns=2)
    cu, total = cu_seqlens(lengths), sum(lengths)
    expected_k, expected_scale = reference.gather_indexer_k(cache, table, cu)
    guard = Canaries(impl.device)
    k = guard.output((total + 7, 128), FP8, strides=(144, 1))
    scale = guard.output((total + 7,), torch.float32)
    inputs = guard.input(cache, strides=cache.stride()), guard.input(table), guard.input(cu)
    impl.run("dsa_gather_indexer_k", *inputs, k, scale)
    assert torch.equal(k[:total].cpu().view(torch.uint8), expected_k.view(torch.uint8))
    assert torch.equal(scale[:total].cpu(), expected_scale)
    # the workspace is larger than the tokens of this step: its end stays as it was
    assert k[total:].float().isnan().all()
    assert scale[total:].isnan().all()
    guard.check()


def test_gather_through_a_shared_page(impl: Any):
    cache, table = testing.index_cache([128], 64, seeded(10))
    table = table[0, torch.tensor([[0, 1], [0, 0]])]
    cu = cu_seqlens([128, 100])
    expected_k, expected_scale = reference.gather_indexer_k(cache, table, cu)
    k, scale = impl.to(torch.empty(228, 128, dtype=FP8), torch.empty(228))
    impl.run("dsa_gather_indexer_k", *impl.to(cache, table, cu), k, scale)
    assert torch.equal(k.cpu().view(torch.uint8), expected_k.view(torch.uint8))
    assert torch.equal(scale.cpu(), expected_scale)


def test_gather_of_pages_outside_the_cache(impl: Any):
    cache, table = testing.index_cache([64], 64, seeded(11))
    table = torch.cat([table, torch.tensor([[99, -1]], dtype=torch.int32)], 1)
    k, scale = impl.to(torch.empty(150, 128, dtype=FP8), torch.empty(150))
    inputs = impl.to(cache, table, cu_seqlens([150]))
    if impl.name == "cpu":
        with pytest.raises(UnsupportedInputError, match=r"block_table row 0 = \[\d, 99, -1\]"):
            impl.run("dsa_gather_indexer_k", *inputs, k, scale)
    else:
        impl.run("dsa_gather_indexer_k", *inputs, k, scale)
        expected, _ = reference.gather_indexer_k(cache, table, cu_seqlens([64]))
        assert torch.equal(k[:64].cpu().view(torch.uint8), expected.view(torch.uint8))
        assert (k[64:].float() == 0).all()
        assert (scale[64:] == 0).all()


def test_round_trip_through_the_indexer_cache(impl: Any):
    keys, slots = normal((100, 128), seeded(12)), torch.arange(100)
    cache = impl.to(testing.paged_bytes(2, 64, 132))
    impl.run("dsa_indexer_k_insert", impl.to(keys), cache, impl.to(slots))
    k, scale = impl.to(torch.empty(100, 128, dtype=FP8), torch.empty(100))
    table = impl.to(torch.tensor([[0, 1]], dtype=torch.int32))
    impl.run("dsa_gather_indexer_k", cache, table, impl.to(cu_seqlens([100])), k, scale)
    values, scales = reference.indexer_k_quantize(keys)
    assert torch.equal(k.cpu().view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(scale.cpu(), scales)


@pytest.mark.gpu
def test_indexer_insert_beyond_two_gibibytes(impl: Any):
    if impl.name == "cpu":
        pytest.skip("the offsets of the Triton kernels are under test")
    blocks = 2**31 // (64 * 132) + 2
    cache = torch.zeros(blocks, 64, 132, dtype=torch.uint8, device=impl.device)
    k = normal((2, 128), seeded(13))
    slots = torch.tensor([blocks * 64 - 1, 5])
    impl.run("dsa_indexer_k_insert", impl.to(k), cache, impl.to(slots))
    table = torch.tensor([[0, blocks - 1]], dtype=torch.int32)
    gathered, scale = impl.to(torch.empty(128, 128, dtype=FP8), torch.empty(128))
    impl.run("dsa_gather_indexer_k", cache, *impl.to(table, cu_seqlens([128])), gathered, scale)
    values, scales = reference.indexer_k_quantize(k)
    assert torch.equal(gathered[[127, 5]].cpu().view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(scale[[127, 5]].cpu(), scales)
    assert int(cache.count_nonzero()) == int(values.float().count_nonzero()) + int(
        scales.view(torch.uint8).count_nonzero()
    )
