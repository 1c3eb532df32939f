"""Our indexer kernels in vLLM's own indexer body, run from its released source over torch stand-ins."""

from __future__ import annotations

import inspect
import math
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blackwell_kernels import dsa as _operators  # noqa: F401  registers them
from blackwell_kernels import status
from blackwell_kernels.dsa import reference
from blackwell_kernels.model_patches import context, indexer
from blackwell_kernels.select import Policy

OURS, STOCK = Policy("triton", "ours"), Policy("stock", "stock")
PAGE, HEADS, K, COLUMNS, PAGES = 64, 4, 512, 640, 41
LAYER = "model.layers.0.self_attn.indexer.k_cache"


def topk_rows(logits: torch.Tensor, starts: Any, ends: Any, indices: torch.Tensor) -> None:
    indices.copy_(reference.topk(logits, starts, ends, indices.shape[1]))


class Kernels:
    """Stand-ins for vLLM's kernels, by the family's reference; `called` names those that ran."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def indexer_k_quant_and_cache(self, k, kv_cache, slot_mapping, quant_block_size, scale_fmt):
        kv_cache.copy_(reference.indexer_k_insert(k, kv_cache, slot_mapping))

    def cp_gather_indexer_k_quant_cache(self, kv_cache, k_quant, k_scale, block_table, cu_seq_lens):
        k, scale = reference.gather_indexer_k(kv_cache, block_table, cu_seq_lens)
        k_quant.copy_(k)
        k_scale.copy_(scale[:, None].contiguous().view(torch.uint8))

    def mqa_logits(self, q, kv, weights, cu_seqlen_ks, cu_seqlen_ke, clean_logits):
        self.called.append("ragged logits")
        assert q[1] is None
        return reference.indexer_logits_ragged(q[0], *kv, weights, cu_seqlen_ks, cu_seqlen_ke).float()

    def paged_mqa_logits(
        self, q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, clean_logits,
        indices=None,
    ):  # fmt: skip
        self.called.append("paged logits")
        cache = kv_cache.squeeze(2)
        return reference.indexer_logits_paged(q[0], cache, weights, context_lens, block_tables, max_model_len).float()

    def top_k_per_row_prefill(self, logits, ks, ke, raw_topk_indices, num_rows, stride0, stride1, topk_tokens):
        self.called.append("prefill top-k")
        assert (num_rows, stride0, stride1) == (logits.shape[0], *logits.stride())
        topk_rows(logits, ks, ke, raw_topk_indices)

    def top_k_per_row_decode(self, logits, next_n, seq_lens, raw_topk_indices, num_rows, s0, s1, topk_tokens):
        self.called.append("per-row decode top-k")
        topk_rows(logits, torch.zeros(num_rows), seq_lens.reshape(-1), raw_topk_indices)

    def kernel_topk(self, name: str) -> Any:
        def topk(logits, seq_lens, topk_indices, workspace, topk_tokens, max_seq_len):
            self.called.append(name)
            assert logits.stride(0) % 4 == 0
            topk_rows(logits, torch.zeros(logits.shape[0]), seq_lens.reshape(-1), topk_indices)

        return topk

    def get_indexer_topk(self, backend: str) -> Any:
        def topk(logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len):
            self.called.append("decode top-k")
            topk_rows(logits, torch.zeros(logits.shape[0]), seq_lens.reshape(-1), topk_indices)

        return topk


def body(sources: Path, version: str, extract: Any, kernels: Kernels, batch: dict[str, Any]) -> types.ModuleType:
    """vLLM's module with its body and nothing else of its own."""
    module: Any = types.ModuleType("vllm_indexer")
    platform = SimpleNamespace(
        fp8_dtype=lambda: torch.float8_e4m3fn,
        is_cuda=lambda: True,
        is_xpu=lambda: False,
        has_device_capability=lambda _: True,
    )
    forward = SimpleNamespace(attn_metadata=batch, cudagraph_runtime_mode="NONE")
    workspaces = SimpleNamespace(get_simultaneous=lambda *specs: [torch.empty(s, dtype=d) for s, d in specs])
    module.__dict__.update(
        torch=torch,
        ops=kernels,
        current_platform=platform,
        get_forward_context=lambda: forward,
        current_workspace_manager=lambda: workspaces,
        DeepseekV32IndexerMetadata=SimpleNamespace,
        RADIX_TOPK_WORKSPACE_SIZE=16,
        _resolve_layer_name=lambda name: name,
        fp8_fp4_mqa_logits=kernels.mqa_logits,
        fp8_fp4_paged_mqa_logits=kernels.paged_mqa_logits,
        pack_seq_triton=pack,
        unpack_seq_triton=lambda x, lens: torch.cat([rows[:n] for rows, n in zip(x, lens.tolist(), strict=True)]),
        CUDAGraphMode=SimpleNamespace(FULL="FULL"),
        PrefillRowShard=SimpleNamespace(from_metadata=lambda *_: None),
        maybe_gather_indexer_k=lambda k, slots, *_, **__: (k, slots),
        _merge_dcp_topk_global=lambda *_, **__: None,
    )
    if version != "0.24.0":
        module.get_indexer_topk = kernels.get_indexer_topk
    wanted = dict.fromkeys(["_gather_workspace_shapes", "kv_cache_as_quant_view", "sparse_attn_indexer"])
    path = sources / f"vllm-{version}" / "vllm/model_executor/layers/sparse_attn_indexer.py"
    extract(path, wanted, module.__dict__)
    return module


def pack(x: torch.Tensor, lens: torch.Tensor, pad_value: float = 0) -> torch.Tensor:
    out = torch.zeros(len(lens), int(lens.max()), *x.shape[1:], dtype=x.dtype)
    for i, rows in enumerate(x.split(lens.tolist())):
        out[i, : len(rows)] = rows
    return out


class Step:
    """A batch: decodes of given context lengths and queries each, then prefills (length with context, new tokens)."""

    def __init__(self, decodes: list[int], decode_queries: int, prefills: list[tuple[int, int]], seed: int = 0) -> None:
        r = torch.Generator().manual_seed(seed)
        queries = [decode_queries] * len(decodes) + [new for _, new in prefills]
        lengths = decodes + [length for length, _ in prefills]
        self.tokens = sum(queries)
        share = (PAGES - 1) // len(lengths)  # pages of each sequence, none shared
        tables = (torch.randperm(PAGES - 1, generator=r)[: share * len(lengths)] + 1).to(torch.int32).view(-1, share)
        self.cache = torch.zeros(PAGES, PAGE, 132, dtype=torch.uint8)
        for row, length in zip(tables, lengths, strict=True):
            position = torch.arange(length)
            slots = row[position // PAGE].long() * PAGE + position % PAGE
            self.cache = reference.indexer_k_insert(torch.randn(length, 128, generator=r).bfloat16(), self.cache, slots)
        slots = [
            int(row[p // PAGE]) * PAGE + p % PAGE
            for row, length, new in zip(tables, lengths, queries, strict=True)
            for p in range(length - new, length)
        ]
        self.q = reference.to_e4m3(torch.randn(self.tokens, HEADS, 128, generator=r))
        self.k = torch.randn(self.tokens, 128, generator=r).bfloat16()
        self.weights = torch.rand(self.tokens, HEADS, generator=r)
        self.metadata = SimpleNamespace(
            slot_mapping=torch.tensor(slots),
            num_decodes=len(decodes),
            num_decode_tokens=len(decodes) * decode_queries,
            num_prefills=len(prefills),
            max_seq_len=max(lengths),
            decode=self._decode(decodes, decode_queries, tables),
            prefill=SimpleNamespace(
                chunks=[self._chunk(decodes, decode_queries, prefills, tables)] if prefills else []
            ),
        )

    def _decode(self, decodes: list[int], queries: int, tables: torch.Tensor) -> SimpleNamespace:
        lens = torch.tensor(decodes, dtype=torch.int32)
        return SimpleNamespace(
            block_table=tables[: len(decodes)],
            seq_lens=lens[:, None] - queries + 1 + torch.arange(queries, dtype=torch.int32),
            decode_lens=torch.full_like(lens, queries),
            requires_padding=False,
            schedule_metadata=None,
            indices=None,
            global_seq_lens=None,
        )

    def _chunk(self, decodes: list[int], queries: int, prefills: list[tuple[int, int]], tables: Any) -> SimpleNamespace:
        cu = torch.tensor([0, *(n for n, _ in prefills)], dtype=torch.int32).cumsum(0).to(torch.int32)
        first = len(decodes) * queries
        starts = [int(cu[i]) for i, (_, new) in enumerate(prefills) for _ in range(new)]
        ends = [int(cu[i]) + n - new + 1 + j for i, (n, new) in enumerate(prefills) for j in range(new)]
        return SimpleNamespace(
            block_table=tables[len(decodes) :],
            cu_seqlen_ks=torch.tensor(starts, dtype=torch.int32),
            cu_seqlen_ke=torch.tensor(ends, dtype=torch.int32),
            cu_seq_lens=cu,
            local_cu_seq_lens=cu,
            total_seq_lens=int(cu[-1]),
            local_total_seq_lens=int(cu[-1]),
            max_local_total_seq_lens=int(cu[-1]),
            token_start=first,
            token_end=self.tokens,
            skip_kv_gather=False,
            pcp_deinterleave_idx=None,
        )

    def run(self, module: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The positions that the body selects, [T, K]."""
        batch[LAYER] = self.metadata
        cache, buffer = self.cache.clone(), torch.full((self.tokens + 3, K), 7, dtype=torch.int32)
        arguments: dict[str, Any] = {
            "hidden_states": torch.empty(self.tokens, 8),
            "k_cache_prefix": LAYER,
            "kv_cache": cache,
            "q_quant": self.q,
            "q_scale": None,
            "k": self.k,
            "weights": self.weights,
            "quant_block_size": 128,
            "scale_fmt": "ue8m0",
            "topk_tokens": K,
            "head_dim": 128,
            "max_model_len": COLUMNS,
            "total_seq_lens": 4096,
            "topk_indices_buffer": buffer,
            "skip_k_cache_insert": False,
            "use_pcp": False,
            "pcp_shard_decode_requests": False,
            "dense_mha_metadata_layer_name": "",
        }
        accepted = inspect.signature(module.sparse_attn_indexer).parameters
        module.sparse_attn_indexer(**{name: value for name, value in arguments.items() if name in accepted})
        assert (buffer[self.tokens :] == 7).all(), "rows behind the batch are not touched"
        return buffer[: self.tokens]


STEPS = {
    "decode": Step([600, 530, 70], 1, []),
    "two queries": Step([600, 75], 2, []),
    "prefill": Step([], 1, [(600, 9), (40, 40)]),
    "mixed": Step([600, 30], 1, [(620, 6), (520, 3)]),
    "many rows": Step([20 + i for i in range(9)], 4, []),
}


def selected(rows: torch.Tensor) -> list[list[int]]:
    return [sorted(row.tolist()) for row in rows]


def counted() -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for c in status.snapshot()["counts"]:
        assert c["layer"] == LAYER
        found[c["op"], c["impl"]] = found.get((c["op"], c["impl"]), 0) + c["tokens"]
    return found


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0"])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("logits", [OURS, STOCK], ids=["logits-ours", "logits-stock"])
@pytest.mark.parametrize("topk", [OURS, STOCK], ids=["topk-ours", "topk-stock"])
def test_each_part_by_its_policy(
    sources: Path, extract: Any, monkeypatch: pytest.MonkeyPatch, version: str, step: Step, logits: Policy, topk: Policy
) -> None:
    status.reset()
    batch: dict[str, Any] = {}
    plain, kernels = Kernels(), Kernels()
    for name in ("cooperative_topk", "persistent_topk"):
        monkeypatch.setattr(torch.ops._C, name, plain.kernel_topk(name), raising=False)
    expected = step.run(body(sources, version, extract, plain, batch), batch)

    for name in ("cooperative_topk", "persistent_topk"):
        monkeypatch.setattr(torch.ops._C, name, kernels.kernel_topk(name), raising=False)
    monkeypatch.setattr(context, "step_metadata", lambda: batch)
    monkeypatch.setattr(indexer, "_logits", lambda *_: logits)
    monkeypatch.setattr(indexer, "_topk", lambda *_: topk)
    module = body(sources, version, extract, kernels, batch)
    indexer.replace_gpu_kernels(module, [indexer.LOGITS, indexer.TOPK])
    assert selected(step.run(module, batch)) == selected(expected)

    decodes, prefills = step.metadata.num_decodes > 0, step.metadata.num_prefills > 0
    left = [
        name for name in plain.called if ("logits" in name and logits is STOCK) or ("top" in name and topk is STOCK)
    ]
    assert kernels.called == left, "what is ours never reaches stock, the rest always does"
    assert decodes or prefills
    assert counted() == {
        (indexer.LOGITS, logits.impl): step.tokens,
        (indexer.TOPK, topk.impl): step.tokens,
    }


@pytest.mark.parametrize("clean", [True, False])
def test_logits_are_cleaned_where_vllm_asks(monkeypatch: pytest.MonkeyPatch, clean: bool) -> None:
    monkeypatch.setattr(indexer, "_chosen", lambda *_: True)
    asked = []
    for name in ("ragged", "paged"):
        spy = lambda *_, clean, topk=0: asked.append(clean)  # noqa: E731
        monkeypatch.setattr(torch.ops.blackwell_kernels, f"dsa_indexer_logits_{name}", spy)
    q = (torch.zeros(2, 64, 128, dtype=torch.float8_e4m3fn), None)
    bounds, weights = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 64)
    keys = (torch.zeros(8, 128, dtype=torch.float8_e4m3fn), torch.zeros(8))
    indexer.ragged(unreachable)(q, keys, weights, bounds, bounds, clean_logits=clean)
    cache = torch.zeros(1, 64, 1, 132, dtype=torch.uint8)
    paged = indexer.paged(unreachable)
    paged((q[0].unsqueeze(1), None), cache, weights, bounds, torch.zeros(2, 1, dtype=torch.int32), bounds, 64, clean)
    assert asked == [clean, clean]


@pytest.mark.parametrize(("topk", "lengths", "unscored"), [(OURS, 2, 512), (STOCK, 2, 0), (OURS, 1, 0)])
def test_short_rows_are_not_scored_where_our_topk_follows(
    monkeypatch: pytest.MonkeyPatch, topk: Policy, lengths: int, unscored: int
) -> None:
    monkeypatch.setattr(indexer, "_chosen", lambda *_: True)
    monkeypatch.setattr(indexer, "_topk", lambda *_: topk)
    monkeypatch.setattr(indexer, "_decode_k", K)
    asked = []
    spy = lambda *_, clean, topk: asked.append(topk)  # noqa: E731
    monkeypatch.setattr(torch.ops.blackwell_kernels, "dsa_indexer_logits_paged", spy)
    q = (torch.zeros(1, 2, 64, 128, dtype=torch.float8_e4m3fn), None)
    cache, table = torch.zeros(1, 64, 1, 132, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.int32)
    bounds = torch.zeros(1, lengths, dtype=torch.int32)
    indexer.paged(unreachable)(q, cache, torch.zeros(2, 64), bounds, table, bounds, 64, clean_logits=False)
    assert asked == [unscored]


def test_a_decode_goes_by_rows_of_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more rows than a decode was measured with are ours, they are a prefill's."""
    asked = []

    def policy(op: str, case: dict[str, Any], device: torch.device, most: int | None = None) -> Policy:
        asked.append((op, most))
        return OURS if most is None else STOCK

    monkeypatch.setattr(indexer, "policy", policy)
    monkeypatch.setattr(indexer, "_policies", {})
    monkeypatch.setattr(indexer, "_decode_k", K)
    rows, columns = 100, 2 * K
    logits, ends = torch.randn(rows, columns), torch.full((rows,), columns, dtype=torch.int32)
    chosen, taken = torch.full((rows, K), -1, dtype=torch.int32), []
    indexer.prefill_topk(unreachable)(logits, torch.zeros_like(ends), ends, chosen)
    assert chosen.min() >= 0
    indexer.decode_topk_per_row(lambda *args: taken.append(args))(logits, 1, ends, chosen)
    assert len(taken) == 1
    assert indexer._unscored(rows, columns, ends) == 0, "stock's top-k reads every score"
    assert asked == [(indexer.TOPK, None), (indexer.TOPK, indexer.DECODE_ROWS)]


def unreachable(*_: Any, **__: Any) -> torch.Tensor:
    raise AssertionError("stock was called")


def test_mxfp4_queries_stay_with_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    wrapped = indexer.ragged(lambda *args, **kwargs: asked.append((args, kwargs)) or torch.empty(0))
    q = (torch.zeros(2, 4, 64, dtype=torch.int8), torch.zeros(2, 4, dtype=torch.int32))
    wrapped(q, (torch.zeros(8, 64), torch.zeros(8)), torch.zeros(2, 4), 0, 8, clean_logits=False)
    assert asked[0][1] == {"clean_logits": False}
    assert len(asked[0][0]) == 5


def test_an_explicit_topk_backend_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexer, "_topk", lambda *_: OURS)
    called = []
    get = indexer.decode_topk(lambda backend: lambda *args: called.append(backend))
    indices = torch.zeros(2, 4, dtype=torch.int32)
    arguments = (torch.rand(2, 9), torch.tensor([9, 3], dtype=torch.int32), 1, indices, 4, 9)
    get("persistent")(*arguments)
    assert called == ["persistent"]
    get("auto")(*arguments)
    assert called == ["persistent"]
    assert sorted(indices[1].tolist()) == [-1, 0, 1, 2]


def test_logits_rows_are_aligned_for_stocks_topk() -> None:
    logits = indexer.new_logits(3, 1000, torch.device("cpu"))
    assert logits.shape == (3, 1000)
    assert logits.stride() == (1024, 1)


def test_overlay_replaces_only_what_it_names() -> None:
    view = indexer.Overlay(math, sqrt=lambda x: "ours")
    assert view.sqrt(4) == "ours"
    assert view.floor(1.5) == 1
    assert math.sqrt(4) == 2
