"""Decode under CUDA graphs: one capture at fixed shapes, then replays with other contents, lengths and selections."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.testing.generators import normal, seeded
from blackwell_kernels.dsa import op, testing
from blackwell_kernels.dsa.config import SparseMlaConfig, TopkConfig

pytestmark = pytest.mark.gpu

REPLAYS, BATCH, HEADS, MAX_LEN, TOPK = 100, 4, 16, 4096, 2048


class Step:
    """Indexer and attention of one layer at decode: static buffers, whose contents change between replays."""

    def __init__(self, device: torch.device, fp8: bool, lean: bool) -> None:
        """lean: no logits that nobody needs, and launches that get ready while the ones before them run."""
        self.scored = {"clean": False, "topk": TOPK} if lean else {}
        shared = {"cluster": 4, "early": True} if fp8 else {"splits": 4, "pdl": True}
        self.topk = TopkConfig(block=1024, num_warps=4, **shared) if lean else None
        block_h = 64 if fp8 else 16
        self.mla = SparseMlaConfig(block_h=block_h, block_n=32, splits=16, num_warps=8, pdl=True) if lean else None
        rng = seeded(1)
        # one seed, one block table: the same pages are alive in both caches
        index_cache, table = testing.index_cache([64] * BATCH, 64, seeded(2))
        kv_cache, kv_table = testing.kv_cache([64] * BATCH, 64, fp8, seeded(2))
        assert torch.equal(table, kv_table)
        self.index_cache, self.kv_cache = index_cache.to(device), kv_cache.to(device)
        self.live = table[:, 0].tolist()
        self.table = torch.full((BATCH, MAX_LEN // 64), self.live[0], dtype=torch.int32, device=device)
        self.lens = torch.full((BATCH,), MAX_LEN, dtype=torch.int32, device=device)
        self.starts = torch.zeros(BATCH, dtype=torch.int32, device=device)
        self.req_id = torch.arange(BATCH, dtype=torch.int32, device=device)
        self.q_index = testing.fp8_queries((BATCH, 1, 64, 128), rng).to(device)
        self.weights = torch.rand(BATCH, 64, generator=rng).to(device)
        self.q = normal((BATCH, HEADS, 576), rng).to(device)
        self.k = normal((BATCH, 128), rng).to(device)
        self.slots = torch.full((BATCH,), -1, dtype=torch.int64, device=device)
        self.logits = torch.empty(BATCH, MAX_LEN, device=device)
        self.indices = torch.empty(BATCH, TOPK, dtype=torch.int32, device=device)
        self.out = torch.empty(BATCH, HEADS, 512, dtype=torch.bfloat16, device=device)
        self.lse = torch.empty(BATCH, HEADS, device=device)

    def run(self) -> None:
        op.dsa_indexer_k_insert_triton(self.k, self.index_cache, self.slots)
        op.dsa_indexer_logits_paged_triton(
            self.q_index, self.index_cache, self.weights, self.lens, self.table, self.logits, **self.scored
        )
        op.dsa_topk_triton(self.logits, self.starts, self.lens, self.indices, config=self.topk)
        attended = self.q, self.kv_cache, self.indices, self.req_id, self.table
        op.dsa_sparse_mla_triton(*attended, 0.1, self.out, self.lse, config=self.mla)

    def change(self, seed: int) -> None:
        rng = seeded(seed)
        lens = torch.randint(0, MAX_LEN + 1, (BATCH,), generator=rng)
        lens[seed % BATCH] = 0  # a padding row
        self.lens.copy_(lens)
        live = torch.tensor(self.live, dtype=torch.int32)
        self.table.copy_(live[torch.randint(0, len(live), self.table.shape, generator=rng)])
        self.q.copy_(normal(self.q.shape, rng))
        self.q_index.view(torch.uint8).copy_(testing.fp8_queries(self.q_index.shape, rng).view(torch.uint8))
        self.k.copy_(normal(self.k.shape, rng))
        self.slots.copy_(torch.tensor([self.live[0] * 64 + seed % 64, -1, -1, -1]))

    def results(self) -> list[torch.Tensor]:
        return [x.clone() for x in (self.index_cache, self.logits, self.indices, self.out, self.lse)]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_replays_equal_eager_launches(device: torch.device, fp8: bool, lean: bool):
    step = Step(device, fp8, lean)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step.run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    for seed in range(REPLAYS):
        step.change(seed)
        step.logits.fill_(torch.nan)
        step.indices.fill_(-7)
        graph.replay()
        replayed = step.results()
        step.run()
        for ours, eager in zip(replayed, step.results(), strict=True):
            same = ours.contiguous().view(torch.uint8) == eager.contiguous().view(torch.uint8)
            assert same.all()
        assert not replayed[3].isnan().any()
