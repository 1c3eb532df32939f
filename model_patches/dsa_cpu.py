"""DeepSeek sparse attention on a CPU: indexer layer, cache back ends, metadata and sparse MLA, all by our operators.

Why: vLLM's CPU platform refuses sparse attention, and its indexer's metadata builder is made of GPU kernels.
How: one metadata builder serves the indexer's cache and the latent cache; decodes go through the paged operators and
prefills through the ragged ones, as on a GPU. indexer.py and sparse_mla.py put these classes in vLLM's way. Names that
the model file imported for GPUs (the queries' quantisation, the cache's backend) are replaced when it is imported.
Upstream: "Sparse Attention is not supported on CPU." in platforms/cpu.py, 0.24 to 0.33.
Remove when: vLLM serves DeepSeek-V3.2 on CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.sparse_mla_attention import SharedTopkIndicesBuffer
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from blackwell_kernels import dsa, status  # noqa: F401  dsa registers the operators
from blackwell_kernels.common.fp8 import quantize_groups
from blackwell_kernels.model_patches import context, contracts, sparse_mla
from blackwell_kernels.model_patches.indexer import LOGITS, TOPK
from blackwell_kernels.select import policy

_ROWS_BYTES = 64 << 20  # logits of a prefill are made for so many rows at a time

contracts.demand(
    (LOGITS, TOPK, sparse_mla.OP),
    "vllm.v1.attention.backend",
    "vllm.v1.attention.backends.utils",
    "vllm.v1.attention.backends.mla.indexer",
    "vllm.model_executor.layers.attention.sparse_mla_attention",
)


@dataclass
class DsaCpuMetadata(AttentionMetadata):
    """One batch, decodes first. Index tensors are int32.

    slot_mapping [T]; block_table [R, P]; seq_lens [R]; req_id_per_token [T]. Of the prefills alone: their sequences'
    running lengths prefill_cu_seq_lens [prefills + 1], and per token the range of gathered keys that it sees,
    row_starts and row_ends [T - num_decode_tokens].
    """

    num_actual_tokens: int
    num_reqs: int
    num_decodes: int
    num_prefills: int
    num_decode_tokens: int
    max_query_len: int
    max_seq_len: int
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    req_id_per_token: torch.Tensor
    prefill_cu_seq_lens: torch.Tensor
    row_starts: torch.Tensor
    row_ends: torch.Tensor
    prefill: None = None  # vLLM asks for a dense prefill's metadata here: there is none


class DsaCpuMetadataBuilder(AttentionMetadataBuilder[DsaCpuMetadata]):
    """From vLLM's common metadata."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_reorder_batch_threshold(1)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> DsaCpuMetadata:
        m = common_attn_metadata
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(m, decode_threshold=1)
        tokens, requests = m.num_actual_tokens, m.num_reqs
        starts = m.query_start_loc_cpu[: requests + 1].to(torch.int32)
        query_lens, seq_lens = starts.diff(), m.seq_lens[:requests].to(torch.int32)
        req_id = torch.repeat_interleave(torch.arange(requests, dtype=torch.int32), query_lens)
        # what precedes each prefill's keys among the gathered ones, and how far its tokens see
        cu_seq_lens = torch.nn.functional.pad(seq_lens[decodes:].cumsum(0), (1, 0)).to(torch.int32)
        position = torch.arange(tokens, dtype=torch.int32) - (starts[:-1] - (seq_lens - query_lens))[req_id]
        row_starts = cu_seq_lens[req_id[decode_tokens:] - decodes]
        return DsaCpuMetadata(
            num_actual_tokens=tokens,
            num_reqs=requests,
            num_decodes=decodes,
            num_prefills=prefills,
            num_decode_tokens=decode_tokens,
            max_query_len=m.max_query_len,
            max_seq_len=m.max_seq_len,
            query_start_loc=m.query_start_loc,
            slot_mapping=m.slot_mapping[:tokens],
            block_table=m.block_table_tensor[:requests].to(torch.int32),
            seq_lens=seq_lens,
            req_id_per_token=req_id,
            prefill_cu_seq_lens=cu_seq_lens,
            row_starts=row_starts,
            row_ends=row_starts + position[decode_tokens:] + 1,
        )


class _Paged:
    """What both back ends have in common: pages of a multiple of 16 tokens, our metadata."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @staticmethod
    def get_builder_cls() -> Any:
        return DsaCpuMetadataBuilder


class IndexerBackend(_Paged, DeepseekV32IndexerBackend):
    """The indexer's K cache, [blocks, page, 132] uint8, planar."""

    @staticmethod
    def get_name() -> str:
        return "BLACKWELL_KERNELS_DSA_INDEXER_CPU"


class SparseMLABackend(_Paged, AttentionBackend):
    """The latent cache, [blocks, page, 576] bf16."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return "BLACKWELL_KERNELS_MLA_SPARSE_CPU"

    @staticmethod
    def get_impl_cls() -> Any:
        return SparseMLAImpl

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True


class SparseMLAImpl(MLAAttentionImpl[DsaCpuMetadata], SharedTopkIndicesBuffer):
    """Every token, prefill or decode, attends to the entries that the indexer selected."""

    is_sparse = True
    dcp_world_size = 1

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: Any,
        sliding_window: Any,
        kv_cache_dtype: str,
        logits_soft_cap: Any,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        topk_indices_buffer: torch.Tensor | None = None,
        indexer: Any = None,
        **mla: Any,
    ) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.kv_cache_dtype, self.kv_lora_rank = float(scale), kv_cache_dtype, mla["kv_lora_rank"]
        self.init_topk_indices_buffer(indexer, topk_indices_buffer)
        chosen = sparse_mla.choose(self)
        status.record_layer(sparse_mla.OP, sparse_mla.layer_of(indexer, self), chosen.impl, chosen.reason)

    def record_logical_topk_ready(self) -> None:
        """Nothing waits for the indexer on another stream."""

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
        **kwargs: Any,
    ) -> None:
        if kv_cache.numel() == 0:
            return
        slots = slot_mapping.flatten()
        tokens = slots.numel()
        torch.ops.blackwell_kernels.dsa_kv_insert(kv_c_normed[:tokens], k_pe.squeeze(1)[:tokens], kv_cache, slots)

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: torch.Tensor, attn_metadata: DsaCpuMetadata, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out = sparse_mla.attend(self, q, kv_c_and_k_pe_cache, attn_metadata)
        context.count(sparse_mla.OP, layer.layer_name, "cpu", out.shape[0])
        return out, None


def indexer_class(base: type) -> type:
    """vLLM's indexer layer with our operators as its CPU path."""

    class BlackwellCpuSparseAttnIndexer(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for op in (LOGITS, TOPK):
                chosen = policy(op, {}, "cpu")
                status.record_layer(op, self.k_cache.prefix, chosen.impl, chosen.reason)

        def forward_cpu(
            self, hidden_states: torch.Tensor, q_quant: torch.Tensor, k: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            """q_quant [T, H, 128] e4m3, k [T, 128], weights [T, H] with the queries' scale folded in."""
            batch = context.step_metadata()
            if batch is not None:
                layer = self.k_cache.prefix
                m: DsaCpuMetadata = batch[layer]
                n = m.num_actual_tokens
                select(q_quant[:n], k[:n], weights[:n], self.k_cache.kv_cache, m, self.topk_indices_buffer[:n])
                for op in (LOGITS, TOPK):
                    context.count(op, layer, "cpu", n)
            return self.topk_indices_buffer

        forward_native = forward_cpu

    return BlackwellCpuSparseAttnIndexer


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    k_cache: torch.Tensor,
    m: DsaCpuMetadata,
    indices: torch.Tensor,
) -> None:
    """Insert k [T, 128] and write each token's best positions to indices [T, K], request-local and -1 padded."""
    ops, n = torch.ops.blackwell_kernels, m.num_decode_tokens
    ops.dsa_indexer_k_insert(k, k_cache, m.slot_mapping)
    if n:
        lens = m.seq_lens[:n]
        logits = torch.empty(n, m.max_seq_len)
        ops.dsa_indexer_logits_paged(q[:n, None], k_cache, weights[:n], lens, m.block_table[:n], logits)
        ops.dsa_topk(logits, torch.zeros_like(lens), lens, indices[:n])
    if m.num_prefills == 0:
        return
    keys = int(m.prefill_cu_seq_lens[-1])
    values, scale = torch.empty(keys, k.shape[-1], dtype=q.dtype), torch.empty(keys)
    ops.dsa_gather_indexer_k(k_cache, m.block_table[m.num_decodes :], m.prefill_cu_seq_lens, values, scale)
    rows = max(1, _ROWS_BYTES // (4 * keys))
    for first in range(0, q.shape[0] - n, rows):
        here = slice(first, first + rows)
        starts, ends = m.row_starts[here], m.row_ends[here]
        part = slice(n + first, n + first + starts.numel())
        logits = torch.empty(starts.numel(), keys)
        ops.dsa_indexer_logits_ragged(q[part], values, scale, weights[part], starts, ends, logits)
        ops.dsa_topk(logits, starts, ends, indices[part])


def patch_model(module: Any) -> None:
    """Replace what the model file `deepseek_v2` imported for GPUs."""
    contracts.demand((LOGITS, TOPK), module)
    module.DeepseekV32IndexerCache.get_attn_backend = lambda self: IndexerBackend
    stock = module.per_token_group_quant_fp8

    def per_token_group_quant_fp8(x: torch.Tensor, group_size: int, *args: Any, **kwargs: Any) -> Any:
        if x.device.type != "cpu" or group_size != 128:
            return stock(x, group_size, *args, **kwargs)
        return quantize_groups(x, ue8m0=bool(kwargs.get("use_ue8m0")))

    module.per_token_group_quant_fp8 = per_token_group_quant_fp8
