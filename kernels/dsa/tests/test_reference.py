"""The frozen references against independent formulations, and their text as a program of its own."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from blackwell_kernels.common.testing.generators import normal, seeded
from blackwell_kernels.dsa import reference, testing


def all_positive_bf16() -> torch.Tensor:
    return torch.arange(1, 0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_index_scale_is_vllms_formula_for_every_bf16_magnitude():
    amax = all_positive_bf16()
    keys = torch.zeros(len(amax), 128, dtype=torch.bfloat16)
    keys[:, 7] = -amax
    values, scale = reference.indexer_k_quantize(keys)
    # exp2(ceil(log2(max(amax, 1e-4) / 448))) with the division rounded to float32 and the logarithm exact
    quotient = (amax.float().clamp(min=1e-4) / 448.0).double()
    assert torch.equal(scale.double(), torch.exp2(torch.ceil(torch.log2(quotient))))
    assert torch.equal(values[:, 7].double(), (-amax.float() / scale).to(torch.float8_e4m3fn).double())


def test_power_of_two_at_least():
    x = torch.tensor([1.0, 1.0 + 2**-23, 2.0, 3.0, 2.0**-126, 0.75, 5e-4])
    assert reference.power_of_two_at_least(x).tolist() == [1.0, 2.0, 2.0, 4.0, 2.0**-126, 1.0, 2.0**-10]


@pytest.mark.parametrize("power_of_two_scale", [True, False])
def test_quantised_entries_come_back_within_half_a_step(power_of_two_scale: bool):
    kv_c = normal((32, 512), seeded(1))
    values, scales = reference.kv_quantize(kv_c, power_of_two_scale)
    back = values.double().unflatten(-1, (4, 128)) * scales.double()[..., None]
    x = kv_c.double().unflatten(-1, (4, 128))
    # e4m3 has 3 fraction bits and a smallest step of 2**-9
    allowed = torch.maximum(x.abs() * 2**-4, scales.double()[..., None] * 2**-10)
    assert ((back - x).abs() <= allowed * (1 + 1e-6)).all()
    assert (x.abs().amax(-1) <= 448 * scales.double() * (1 + 2**-23)).all()


def test_logits_against_one_einsum():
    rng = seeded(2)
    q, k = testing.fp8_queries((5, 3, 128), rng), testing.fp8_queries((40, 128), rng)
    weights, scale = torch.randn(5, 3, generator=rng), torch.rand(40, generator=rng)
    starts, ends = torch.tensor([0, 3, 10, 39, 7]), torch.tensor([40, 20, 10, 40, 100])
    logits = reference.indexer_logits_ragged(q, k, scale, weights, starts, ends)
    scores = torch.einsum("mhd,nd->mhn", q.double(), k.double()).clamp(min=0)
    dense = torch.einsum("mhn,mh,n->mn", scores, weights.double(), scale.double())
    column = torch.arange(40)
    outside = (column < starts[:, None]) | (column >= ends[:, None])
    torch.testing.assert_close(logits, dense.masked_fill(outside, -torch.inf), rtol=1e-12, atol=1e-9)


def test_paged_logits_are_ragged_logits_of_the_gathered_keys():
    rng = seeded(3)
    lengths = [70, 1, 130]
    cache, table = testing.index_cache(lengths, 64, rng)
    q, weights = testing.fp8_queries((3, 2, 4, 128), rng), torch.randn(6, 4, generator=rng)
    lens = torch.tensor(lengths, dtype=torch.int32)
    paged = reference.indexer_logits_paged(q, cache, weights, lens, table, 192)
    starts = torch.tensor([0, 70, 71])
    k, scale = reference.gather_indexer_k(cache, table, torch.tensor([0, 70, 71, 201]))
    for b, (start, length) in enumerate(zip(starts.tolist(), lengths, strict=True)):
        ends = torch.tensor([start + length - 1, start + length])
        rows = slice(2 * b, 2 * b + 2)
        ragged = reference.indexer_logits_ragged(q[b], k, scale, weights[rows], starts[b].expand(2), ends)
        torch.testing.assert_close(paged[rows, :length], ragged[:, start : start + length], rtol=1e-12, atol=1e-9)
        assert (paged[rows, length:] == -torch.inf).all()


def test_topk_scores_are_those_of_torch_topk():
    logits = torch.randn(6, 300, generator=seeded(4), dtype=torch.float64)
    starts, ends = torch.tensor([0, 5, 100, 0, 299, 50]), torch.tensor([300, 300, 120, 30, 300, 20])
    indices = reference.topk(logits, starts, ends, 30)
    for r, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        n = max(min(30, end - start), 0)
        chosen = logits[r, start:][indices[r, :n].long()]
        assert torch.equal(chosen.sort(descending=True).values, logits[r, start:end].topk(n).values if n else chosen)
        assert (indices[r, n:] == -1).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_sparse_attention_is_dense_attention_under_a_mask(fp8: bool):
    rng = seeded(5)
    lengths, heads, k = [150, 40], 3, 24
    cache, table = testing.kv_cache(lengths, 64, fp8, rng)
    q = normal((4, heads, 576), rng)
    req_id = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    indices = torch.stack([torch.randperm(lengths[r], generator=rng)[:k] for r in req_id.tolist()]).to(torch.int32)
    indices[2, 10:] = -1
    out, lse = reference.sparse_mla(q, cache, indices, req_id, table, 0.1)
    for t, r in enumerate(req_id.tolist()):
        position = torch.arange(lengths[r])
        kv = reference.kv_unpack(cache[table[r, position // 64].long(), position % 64])
        selected = torch.zeros(lengths[r], dtype=torch.bool)
        selected[indices[t][indices[t] >= 0].long()] = True
        dense = torch.nn.functional.scaled_dot_product_attention(
            q[t, :, None].double(),
            kv.expand(heads, -1, -1),
            kv[:, :512].expand(heads, -1, -1),
            selected[None],
            scale=0.1,
        )
        torch.testing.assert_close(out[t], dense[:, 0], rtol=1e-10, atol=1e-12)
        scores = (q[t].double() @ kv.T * 0.1)[:, selected]
        torch.testing.assert_close(lse[t], scores.exp().sum(-1).log2(), rtol=1e-10, atol=1e-12)


def test_repeated_index_counts_twice():
    cache, table = testing.kv_cache([64], 64, False, seeded(6))
    q, req = normal((1, 2, 576), seeded(7)), torch.zeros(1, dtype=torch.int32)
    once = reference.sparse_mla(q, cache, torch.tensor([[3]]), req, table, 0.1)
    twice = reference.sparse_mla(q, cache, torch.tensor([[3, 3]]), req, table, 0.1)
    torch.testing.assert_close(once[0], twice[0])
    torch.testing.assert_close(once[1] + 1.0, twice[1])


def test_text_of_the_reference_is_a_program():
    program: dict[str, object] = {}
    exec(compile(inspect.getsource(reference), "reference", "exec"), program)
    rng = seeded(8)
    lengths = [70, 3, 130]
    cache, table = testing.index_cache(lengths, 64, rng, spare_columns=1)
    q, weights = testing.fp8_queries((3, 64, 128), rng), torch.rand(3, 64, generator=rng)
    lens = torch.tensor(lengths, dtype=torch.int32)
    contest = program["contest_topk_indexer"]
    assert callable(contest)
    slots = contest(q, cache.view(torch.int8)[:, :, None], weights, lens, table.clamp(min=0), 32)
    logits = reference.indexer_logits_paged(q[:, None], cache, weights, lens, table, 256)
    local = reference.topk(logits, torch.zeros(3), lens, 32)
    for b in range(3):
        position = local[b][local[b] >= 0].long()
        expected = table[b, position // 64] * 64 + position % 64
        assert slots[b].tolist() == expected.tolist() + [-1] * (32 - len(expected))

    attend = program["contest_sparse_attention"]
    assert callable(attend)
    kv, kv_table = testing.kv_cache([256], 64, False, rng)
    q_mla = normal((3, 16, 576), rng)
    live = testing.live_slots([256], kv_table, 64).to(torch.int32)
    indices = live[torch.randint(0, 256, (3, 40), generator=rng)]
    indices[1] = -1
    out, lse = attend(q_mla[..., :512], q_mla[..., 512:], kv[..., :512], kv[..., 512:], indices, 0.1)
    wanted, wanted_lse = reference.sparse_mla(q_mla, kv, indices, None, None, 0.1)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, wanted.to(torch.bfloat16))
    assert torch.equal(lse, wanted_lse.float())
    assert math.isinf(lse[1, 0].item())
    assert (out[1] == 0).all()
