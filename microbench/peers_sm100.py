"""Peers that exist on Blackwell alone, called as vLLM 0.24 calls them. They have not been run by us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from blackwell_kernels.microbench.ours import Call, Inputs
from blackwell_kernels.microbench.peers_dsa import _insert, _paged, _stock_topk, _to_slots

# of vllm/v1/attention/backends/mla/flashinfer_mla_sparse.py
_WORKSPACE_BYTES = 128 << 20


def _attention(x: Inputs) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """TRT-LLM's kernel behind FlashInfer: (slots [T, K], valid counts [T]) -> out [T, H, 512]."""
    from flashinfer.decode import trtllm_batch_decode_with_kv_cache_mla

    q, cache = x["q"], x["kv_cache"]
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)

    def attend(slots: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        out = trtllm_batch_decode_with_kv_cache_mla(
            query=q.unsqueeze(1),
            kv_cache=cache.unsqueeze(1),
            workspace_buffer=workspace,
            qk_nope_head_dim=128,
            kv_lora_rank=512,
            qk_rope_head_dim=64,
            block_tables=slots.unsqueeze(1),
            seq_lens=counts,
            max_seq_len=slots.shape[1],
            sparse_mla_top_k=slots.shape[1],
            bmm1_scale=float(x["sm_scale"]),
            bmm2_scale=1.0,
        )
        return out.view(-1, q.shape[1], 512)

    return attend


def sparse_mla(x: Inputs) -> Call:
    """FlashInfer's sparse MLA on a bfloat16 cache; the translation of indices is in the call, as in vLLM."""
    convert, attend = _to_slots(x, counts=True), _attention(x)

    def call() -> tuple[Any, ...]:
        return attend(*convert(x["indices"])), None

    return call


def step(x: Inputs) -> Call:
    """vLLM's decode chain where FlashInfer attends: insertion of index keys, DeepGEMM's logits, top-k, index
    translation, attention."""
    logits, rows = _paged(x["q_index"], x["k_cache"], x["weights"], x["context_lens"], x["block_table"])
    insert, topk = _insert(x), _stock_topk(len(rows), rows.device)
    requests = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    convert = _to_slots({"req_id": requests, "block_table": x["block_table"]}, counts=True)
    attend = _attention(x)

    def call() -> tuple[torch.Tensor, ...]:
        insert()
        return (attend(*convert(topk(logits(), rows))),)

    return call
