"""DeepSeek sparse attention on a CPU: metadata from vLLM's common metadata, selection against a dense formulation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
dsa_cpu: Any = pytest.importorskip("blackwell_kernels.model_patches.dsa_cpu")

from blackwell_kernels.dsa import reference  # noqa: E402

PAGE, HEADS, K = 16, 4, 24


def common(query_lens: list[int], seq_lens: list[int], padding: int = 0) -> SimpleNamespace:
    """vLLM's common metadata of a batch, decodes first; slots are request r's own pages, in order."""
    r = torch.Generator().manual_seed(1)
    pages = -(-max(seq_lens) // PAGE)
    table = (torch.randperm(64, generator=r)[: len(seq_lens) * pages] + 1).to(torch.int32).view(-1, pages)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    slots = [
        int(row[p // PAGE]) * PAGE + p % PAGE
        for row, n, new in zip(table, seq_lens, query_lens, strict=True)
        for p in range(n - new, n)
    ]
    return SimpleNamespace(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_reqs=len(seq_lens),
        num_actual_tokens=sum(query_lens),
        max_query_len=max(query_lens),
        max_seq_len=max(seq_lens),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots + [-1] * padding),
        is_prefilling=None,
    )


def build(batch: SimpleNamespace) -> Any:
    builder = dsa_cpu.DsaCpuMetadataBuilder.__new__(dsa_cpu.DsaCpuMetadataBuilder)
    return builder.build(0, batch)


BATCHES = {
    "decode": ([1, 1, 1], [40, 1, 90]),
    "prefill": ([30, 5], [30, 60]),
    "mixed": ([1, 1, 20, 7], [50, 80, 20, 66]),
}


@pytest.mark.parametrize(("query_lens", "seq_lens"), BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("rows_bytes", [64 << 20, 4 * 7 * 100])
def test_selection_equals_a_dense_one(
    query_lens: list[int], seq_lens: list[int], rows_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsa_cpu, "_ROWS_BYTES", rows_bytes)
    batch = common(query_lens, seq_lens, padding=3)
    m = build(batch)
    r = torch.Generator().manual_seed(2)
    keys = [torch.randn(n, 128, generator=r).to(torch.bfloat16) for n in seq_lens]
    cache = torch.zeros(65, PAGE, 132, dtype=torch.uint8)
    for row, k, new in zip(batch.block_table_tensor, keys, query_lens, strict=True):
        position = torch.arange(len(k) - new)
        slots = row[position // PAGE].long() * PAGE + position % PAGE
        cache = reference.indexer_k_insert(k[: len(k) - new], cache, slots)
    tokens = sum(query_lens)
    q = reference.to_e4m3(torch.randn(tokens, HEADS, 128, generator=r))
    weights = torch.rand(tokens, HEADS, generator=r)
    fresh = torch.cat([k[len(k) - new :] for k, new in zip(keys, query_lens, strict=True)])
    indices = torch.full((tokens, K), 99, dtype=torch.int32)
    dsa_cpu.select(q, fresh, weights, cache, m, indices)

    t = 0
    for k, new in zip(keys, query_lens, strict=True):
        values, scale = reference.indexer_k_quantize(k)
        for position in range(len(k) - new, len(k)):
            scores = torch.relu(q[t].double() @ values[: position + 1].double().T)
            scores = (weights[t].double() @ scores) * scale[: position + 1].double()
            best = scores.topk(min(K, position + 1)).indices
            assert sorted(indices[t].tolist()) == sorted([*best.tolist(), *[-1] * (K - len(best))])
            t += 1


def test_metadata_of_a_mixed_batch() -> None:
    m = build(common([1, 3, 2], [9, 5, 2]))
    assert (m.num_decodes, m.num_prefills, m.num_decode_tokens) == (1, 2, 1)
    assert m.req_id_per_token.tolist() == [0, 1, 1, 1, 2, 2]
    assert m.prefill_cu_seq_lens.tolist() == [0, 5, 7]
    assert m.row_starts.tolist() == [0, 0, 0, 5, 5]
    assert m.row_ends.tolist() == [3, 4, 5, 6, 7]
    tensors = (m.req_id_per_token, m.block_table, m.seq_lens, m.row_starts, m.row_ends, m.prefill_cu_seq_lens)
    assert {x.dtype for x in tensors} == {torch.int32}


def test_queries_are_quantised_as_on_a_gpu() -> None:
    stock = SimpleNamespace(per_token_group_quant_fp8=lambda *_, **__: pytest.fail("this needs a GPU"))
    module = SimpleNamespace(
        __name__="model", DeepseekV32IndexerCache=type("Cache", (), {}), per_token_group_quant_fp8=stock
    )
    dsa_cpu.patch_model(module)
    q, scale = module.per_token_group_quant_fp8(
        torch.tensor([[1.0, -3.0] * 64]), 128, column_major_scales=False, use_ue8m0=True
    )
    assert scale.tolist() == [[2.0**-7]], "3 / 448 rounded up to a power of two"
    assert q[0, :2].float().tolist() == [128.0, -384.0]
    assert module.DeepseekV32IndexerCache().get_attn_backend() is dsa_cpu.IndexerBackend
