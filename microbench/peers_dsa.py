"""Peers of the sparse-attention operators, called as vLLM 0.24 calls them. Per-step metadata that all layers share is
made in `bind`. Nothing here is imported before a peer runs.
"""

from __future__ import annotations

from typing import Any

import torch

from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench.ours import Call, Inputs

PAGE = 64
TOPK = 2048
WORKSPACE_BYTES = 1024 * 1024


def _pages(cache: torch.Tensor) -> torch.Tensor:
    """DeepGEMM's view of the indexer cache: uint8 [pages, 64, 1, 132]."""
    cache = cache.view(torch.uint8)
    return cache if cache.dim() == 4 else cache.unsqueeze(-2)


def _paged(q: torch.Tensor, cache: torch.Tensor, weights: torch.Tensor, lens: torch.Tensor, table: torch.Tensor) -> Any:
    """A call returning float32 [rows, pages * 64] (row stride may be larger), and the lengths per row."""
    from vllm.utils.deep_gemm import fp8_fp4_paged_mqa_logits, get_num_sms, get_paged_mqa_logits_metadata

    next_n, columns = q.shape[1], table.shape[1] * PAGE
    lens2 = (lens[:, None] - next_n + 1 + torch.arange(next_n, dtype=lens.dtype, device=lens.device)).contiguous()
    schedule = get_paged_mqa_logits_metadata(lens2, PAGE, get_num_sms())
    pages = _pages(cache)

    def logits() -> torch.Tensor:
        return fp8_fp4_paged_mqa_logits(
            (q, None), pages, weights, lens2, table, schedule, max_model_len=columns, clean_logits=False
        )

    return logits, lens2.flatten()


def logits_paged(x: Inputs) -> Call:
    """DeepGEMM's paged MQA logits."""
    logits, _ = _paged(x["q"], x["k_cache"], x["weights"], x["context_lens"], x["block_table"])
    return lambda: (logits(),)


def logits_ragged(x: Inputs) -> Call:
    """DeepGEMM's contiguous MQA logits."""
    from vllm.utils.deep_gemm import fp8_fp4_mqa_logits

    def call() -> tuple[torch.Tensor, ...]:
        keys = (x["k"], x["k_scale"])
        out = fp8_fp4_mqa_logits((x["q"], None), keys, x["weights"], x["row_starts"], x["row_ends"], clean_logits=False)
        return (out,)

    return call


def _insert(x: Inputs) -> Any:
    """A call that quantises the step's index keys into their cache."""
    from vllm._custom_ops import indexer_k_quant_and_cache

    cache = x["k_cache"].view(torch.uint8)
    return lambda: indexer_k_quant_and_cache(x["k_index"], cache, x["slot_mapping"], 128, "ue8m0")


def gather(x: Inputs) -> Call:
    """vLLM's gathering of index keys before a prefill."""
    from vllm._custom_ops import cp_gather_indexer_k_quant_cache

    cache, scales = x["k_cache"].view(torch.uint8), x["k_scale"].view(torch.uint8).view(-1, 4)

    def call() -> tuple[torch.Tensor, ...]:
        cp_gather_indexer_k_quant_cache(cache, x["k"], scales, x["block_table"], x["cu_seqlens"])
        return x["k"], x["k_scale"]

    return call


def kv_insert(x: Inputs) -> Call:
    """vLLM's insertion into a bfloat16 cache."""
    from vllm._custom_ops import concat_and_cache_mla

    unused = torch.ones((), device=x["kv_c"].device)

    def call() -> tuple[torch.Tensor, ...]:
        concat_and_cache_mla(x["kv_c"], x["k_pe"], x["kv_cache"], x["slot_mapping"], "auto", unused)
        return (x["kv_cache"],)

    return call


def _topk_ops() -> Any:
    import vllm._custom_ops  # noqa: F401  loads the extension

    return torch.ops._C


def _decode_topk(kernel: str, device: torch.device) -> Any:
    """`topk(logits, lens) -> indices` by one of vLLM's kernels that take a workspace."""
    function = getattr(_topk_ops(), kernel)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def topk(logits: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
        indices = torch.empty(logits.shape[0], TOPK, dtype=torch.int32, device=device)
        function(logits, lens, indices, workspace, TOPK, logits.shape[1])
        return indices

    return topk


def _stock_topk(rows: int, device: torch.device) -> Any:
    """The kernel vLLM's decode takes: cooperative up to 32 rows, persistent above."""
    return _decode_topk("cooperative_topk" if rows <= 32 else "persistent_topk", device)


def _prefill_topk() -> Any:
    """`topk(logits, starts, ends) -> indices` by the kernel of vLLM's prefill."""
    ops = _topk_ops()

    def topk(logits: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = logits.shape[0]
        indices = torch.empty(rows, TOPK, dtype=torch.int32, device=logits.device)
        ops.top_k_per_row_prefill(logits, starts, ends, indices, rows, logits.stride(0), logits.stride(1), TOPK)
        return indices

    return topk


def cooperative_topk(x: Inputs) -> Call:
    """vLLM's cooperative_topk."""
    topk = _decode_topk("cooperative_topk", x["logits"].device)
    return lambda: (topk(x["logits"], x["row_ends"]),)


def persistent_topk(x: Inputs) -> Call:
    """vLLM's persistent_topk."""
    topk = _decode_topk("persistent_topk", x["logits"].device)
    return lambda: (topk(x["logits"], x["row_ends"]),)


def topk_per_row_decode(x: Inputs) -> Call:
    """vLLM's top_k_per_row_decode."""
    ops, logits = _topk_ops(), x["logits"]
    rows = logits.shape[0]

    def call() -> tuple[torch.Tensor, ...]:
        indices = torch.empty(rows, TOPK, dtype=torch.int32, device=logits.device)
        ops.top_k_per_row_decode(logits, 1, x["row_ends"], indices, rows, logits.stride(0), logits.stride(1), TOPK)
        return (indices,)

    return call


def topk_per_row_prefill(x: Inputs) -> Call:
    """vLLM's top_k_per_row_prefill."""
    topk = _prefill_topk()
    return lambda: (topk(x["logits"], x["row_starts"], x["row_ends"]),)


def flashinfer_topk(x: Inputs) -> Call:
    """FlashInfer's top_k_ragged_transform with zero offsets.

    Raises: MissingRequirementError where FlashInfer would compile it first: more than a minute of nvcc, in which a
    benchmark looks hung.
    """
    from flashinfer import top_k_ragged_transform
    from flashinfer.jit.topk import gen_topk_module

    if not gen_topk_module().is_compiled:
        raise MissingRequirementError(
            "FlashInfer's top_k is not compiled; flashinfer-jit-cache has it compiled, or compile it with "
            "flashinfer.jit.topk.gen_topk_module().build_and_load()"
        )

    offsets = torch.zeros_like(x["row_ends"])
    return lambda: (top_k_ragged_transform(x["logits"], offsets, x["row_ends"], TOPK),)


def pair_decode(x: Inputs) -> Call:
    """DeepGEMM's paged logits and the top-k kernel of vLLM's decode."""
    logits, rows = _paged(x["q"], x["k_cache"], x["weights"], x["context_lens"], x["block_table"])
    topk = _stock_topk(len(rows), rows.device)
    return lambda: (topk(logits(), rows),)


def pair_prefill(x: Inputs) -> Call:
    """DeepGEMM's contiguous logits and the top-k kernel of vLLM's prefill."""
    logits_of, topk = logits_ragged(x), _prefill_topk()

    def call() -> tuple[torch.Tensor, ...]:
        (logits,) = logits_of()
        return (topk(logits, x["row_starts"], x["row_ends"]),)

    return call


def contest_topk(x: Inputs) -> Call:
    """DeepGEMM's logits, vLLM's top-k, then the translation to physical slots."""
    table = x["block_table"]
    names = {"q": x["q_index_fp8"].unsqueeze(1), "k_cache": x["k_index_cache_fp8"], "context_lens": x["seq_lens"]}
    select = pair_decode({**x, **names})

    def call() -> tuple[torch.Tensor, ...]:
        (indices,) = select()
        local = indices.clamp(min=0)
        slots = table.gather(1, (local // PAGE).long()) * PAGE + local % PAGE
        return (torch.where(indices < 0, indices, slots),)

    return call


def _padded_heads(q: torch.Tensor, multiple: int) -> torch.Tensor:
    """q [T, H, 576] with H brought to a multiple, as vLLM does before FlashMLA; part of what is timed."""
    tokens, heads, width = q.shape
    if heads % multiple == 0:
        return q
    padded = q.new_empty(tokens, -(-heads // multiple) * multiple, width)
    padded[:, :heads] = q
    return padded


def _to_slots(x: Inputs, counts: bool) -> Any:
    from vllm.v1.attention.backends.mla.sparse_utils import triton_convert_req_index_to_global_index

    def convert(indices: torch.Tensor) -> Any:
        return triton_convert_req_index_to_global_index(
            x["req_id"],
            x["block_table"],
            indices,
            BLOCK_SIZE=PAGE,
            NUM_TOPK_TOKENS=indices.shape[1],
            return_valid_counts=counts,
        )

    return convert


def _sparse_fwd(q: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, scale: float, counts: Any) -> torch.Tensor:
    from vllm.v1.attention.ops.flashmla import flash_mla_sparse_fwd

    # 64 heads a block on Hopper, 128 on Blackwell
    multiple = 128 if torch.cuda.get_device_capability(q.device)[0] >= 10 else 64
    out = flash_mla_sparse_fwd(
        _padded_heads(q, multiple), cache.view(-1, 1, 576), slots.unsqueeze(1), scale, topk_length=counts
    )[0]
    return out[:, : q.shape[1]]


def flash_mla_bf16(x: Inputs) -> Call:
    """FlashMLA's sparse prefill kernel on a bfloat16 cache, which is what vLLM uses for decode as well."""
    convert = _to_slots(x, counts=True)

    def call() -> tuple[Any, ...]:
        slots, counts = convert(x["indices"])
        # its log-sum-exp has another base and vLLM drops it
        return _sparse_fwd(x["q"], x["kv_cache"], slots, float(x["sm_scale"]), counts), None

    return call


def flash_mla_fp8(x: Inputs) -> Call:
    """FlashMLA's decode kernel on the fp8_ds_mla cache: one batch below 32 heads, else one sequence a token."""
    from vllm.v1.attention.ops.flashmla import flash_mla_with_kvcache, get_mla_metadata

    convert = _to_slots(x, counts=False)
    q, cache = x["q"], x["kv_cache"].view(torch.uint8).unsqueeze(-2)
    tokens, heads = q.shape[:2]
    mixed = heads < 32
    schedule, _ = get_mla_metadata()
    lens = torch.full((1 if mixed else tokens,), 1 << 20, dtype=torch.int32, device=q.device)
    table = torch.zeros(len(lens), 1, dtype=torch.int32, device=q.device)
    axis = 0 if mixed else 1

    def call() -> tuple[Any, ...]:
        out, _ = flash_mla_with_kvcache(
            q=_padded_heads(q, 64 if heads <= 64 else 128).unsqueeze(axis),
            k_cache=cache,
            block_table=table,
            head_dim_v=512,
            cache_seqlens=lens,
            tile_scheduler_metadata=schedule,
            is_fp8_kvcache=True,
            indices=convert(x["indices"]).unsqueeze(axis),
            softmax_scale=float(x["sm_scale"]),
        )
        return out.squeeze(axis)[:, :heads], None

    return call


def contest_attention(x: Inputs) -> Call:
    """FlashMLA needs latent and rope in one cache: the selected entries are gathered into one in the call."""
    indices = x["sparse_indices"]
    tokens, top_k = indices.shape
    ckv, kpe = x["ckv_cache"].flatten(0, 1), x["kpe_cache"].flatten(0, 1)
    own = torch.arange(tokens * top_k, dtype=torch.int32, device=indices.device).view(tokens, top_k)

    def call() -> tuple[Any, ...]:
        chosen = indices.clamp(min=0).flatten()
        cache = torch.cat([ckv[chosen], kpe[chosen]], -1)
        slots = torch.where(indices < 0, indices, own)
        q = torch.cat([x["q_nope"], x["q_pe"]], -1)
        return _sparse_fwd(q, cache, slots, float(x["sm_scale"]), None), None

    return call


def step(x: Inputs) -> Call:
    """vLLM's decode chain: insertion of index keys, DeepGEMM logits, top-k, index translation, FlashMLA."""
    logits, rows = _paged(x["q_index"], x["k_cache"], x["weights"], x["context_lens"], x["block_table"])
    insert, topk = _insert(x), _stock_topk(len(rows), rows.device)
    requests = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    convert = _to_slots({"req_id": requests, "block_table": x["block_table"]}, counts=True)

    def call() -> tuple[torch.Tensor, ...]:
        insert()
        slots, counts = convert(topk(logits(), rows))
        return (_sparse_fwd(x["q"], x["kv_cache"], slots, float(x["sm_scale"]), counts),)

    return call
