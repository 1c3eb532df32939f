"""Our operators behind the definitions' argument lists. Each `bind_*` returns what is timed: one call, all outputs.

Layout changes that a contest layout forces on us are inside the call, so they are paid for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]
Call = Callable[[], tuple[torch.Tensor, ...]]
SHARED = "__shared__"  # key of the dictionary in which `bind` keeps what all input sets of a case share


def _ops(family: str) -> Any:
    import importlib

    importlib.import_module(f"blackwell_kernels.{family}")  # registers the operators
    return torch.ops.blackwell_kernels


def _bytes(cache: torch.Tensor) -> torch.Tensor:
    return cache.view(torch.uint8) if cache.dtype == torch.int8 else cache


def moe_contest(x: Inputs) -> Call:
    """Grouped routing, then the local experts, whose map is made once, as a served layer has it.

    The block-major activation scales are read as they are by few tokens, and transposed in the call for many.
    """
    ops = _ops("moe")
    (tokens, experts), device = x["routing_logits"].shape, x["routing_logits"].device
    offset, factor, local = int(x["local_expert_offset"]), float(x["routed_scaling_factor"]), len(x["gemm1_weights"])
    expert_map = torch.full((experts,), -1, dtype=torch.int32, device=device)
    expert_map[offset : offset + local] = torch.arange(local, dtype=torch.int32, device=device)

    def call() -> tuple[torch.Tensor, ...]:
        weights, ids = _routing_outputs(x["routing_logits"], 8)
        out = torch.empty(x["hidden_states"].shape, dtype=torch.bfloat16, device=device)
        ops.moe_grouped_topk(x["routing_logits"], x["routing_bias"], 8, 4, True, factor, weights, ids)
        scale = x["hidden_states_scale"].t()
        ops.moe_fp8_block_scale(
            x["hidden_states"],
            scale if tokens <= 512 else scale.contiguous(),
            x["gemm1_weights"],
            x["gemm1_weights_scale"],
            x["gemm2_weights"],
            x["gemm2_weights_scale"],
            weights,
            ids,
            expert_map,
            out,
            gate_first=False,
        )
        return (out,)

    return call


def moe_fp8_block(x: Inputs) -> Call:
    """Experts from bfloat16 activations; `expert_map` where the definition has one."""
    ops = _ops("moe")

    def call() -> tuple[torch.Tensor, ...]:
        out = torch.empty_like(x["hidden_states"])
        ops.moe_fp8_block_scale(
            x["hidden_states"],
            None,
            x["w13"],
            x["w13_scale"],
            x["w2"],
            x["w2_scale"],
            x["topk_weights"],
            x["topk_ids"],
            x.get("expert_map"),
            out,
        )
        return (out,)

    return call


def _routing_outputs(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape, device = (logits.shape[0], top_k), logits.device
    return torch.empty(shape, dtype=torch.float32, device=device), torch.empty(shape, dtype=torch.int32, device=device)


def moe_routing_grouped(x: Inputs) -> Call:
    """DeepSeek's grouped router."""
    ops = _ops("moe")
    n_group, topk_group, factor = int(x["n_group"]), int(x["topk_group"]), float(x["routed_scaling_factor"])

    def call() -> tuple[torch.Tensor, ...]:
        weights, ids = _routing_outputs(x["router_logits"], 8)
        ops.moe_grouped_topk(
            x["router_logits"], x["bias"], n_group, topk_group, bool(x["renormalize"]), factor, weights, ids
        )
        return weights, ids

    return call


def moe_routing_softmax(x: Inputs) -> Call:
    """Softmax router."""
    ops = _ops("moe")

    def call() -> tuple[torch.Tensor, ...]:
        weights, ids = _routing_outputs(x["router_logits"], 10)
        ops.moe_softmax_topk(x["router_logits"], bool(x["renormalize"]), weights, ids)
        return weights, ids

    return call


def dsa_logits_paged(x: Inputs) -> Call:
    """Paged indexer logits."""
    ops, cache = _ops("dsa"), _bytes(x["k_cache"])
    rows, pages, page = x["weights"].shape[0], x["block_table"].shape[1], cache.shape[1]

    def call() -> tuple[torch.Tensor, ...]:
        logits = torch.empty(rows, pages * page, dtype=torch.float32, device=cache.device)
        inputs = x["q"], cache, x["weights"], x["context_lens"], x["block_table"]
        ops.dsa_indexer_logits_paged(*inputs, logits, clean=False)  # as vLLM asks for them
        return (logits.view(rows, pages, page),)

    return call


def dsa_logits_ragged(x: Inputs) -> Call:
    """Ragged indexer logits."""
    ops = _ops("dsa")

    def call() -> tuple[torch.Tensor, ...]:
        logits = torch.empty(x["q"].shape[0], x["k"].shape[0], dtype=torch.float32, device=x["q"].device)
        ops.dsa_indexer_logits_ragged(
            x["q"], x["k"], x["k_scale"], x["weights"], x["row_starts"], x["row_ends"], logits, clean=False
        )
        return (logits,)

    return call


def dsa_topk(x: Inputs) -> Call:
    """Top-2048 of rows."""
    ops = _ops("dsa")

    def call() -> tuple[torch.Tensor, ...]:
        indices = torch.empty(x["logits"].shape[0], 2048, dtype=torch.int32, device=x["logits"].device)
        ops.dsa_topk(x["logits"], x["row_starts"], x["row_ends"], indices)
        return (indices,)

    return call


def dsa_pair_decode(x: Inputs) -> Call:
    """Paged logits and top-k as a decode step runs them: rows that are selected whole are not scored."""
    ops = _ops("dsa")
    cache, table, lens = _bytes(x["k_cache"]), x["block_table"], x["context_lens"]
    rows, columns, starts = table.shape[0], table.shape[1] * cache.shape[1], torch.zeros_like(lens)

    def call() -> tuple[torch.Tensor, ...]:
        logits = torch.empty(rows, columns, dtype=torch.float32, device=cache.device)
        indices = torch.empty(rows, 2048, dtype=torch.int32, device=cache.device)
        ops.dsa_indexer_logits_paged(x["q"], cache, x["weights"], lens, table, logits, clean=False, topk=2048)
        ops.dsa_topk(logits, starts, lens, indices)
        return (indices,)

    return call


def dsa_pair_prefill(x: Inputs) -> Call:
    """Ragged logits and top-k of a chunk."""
    ops, logits_of = _ops("dsa"), dsa_logits_ragged(x)

    def call() -> tuple[torch.Tensor, ...]:
        (logits,) = logits_of()
        indices = torch.empty(logits.shape[0], 2048, dtype=torch.int32, device=logits.device)
        ops.dsa_topk(logits, x["row_starts"], x["row_ends"], indices)
        return (indices,)

    return call


def dsa_contest_topk(x: Inputs) -> Call:
    """Logits, top-k, and the translation to physical slots that only the contest asks for."""
    cache, table = x["k_index_cache_fp8"].squeeze(2), x["block_table"]
    page = cache.shape[1]
    names = {"q": x["q_index_fp8"].unsqueeze(1), "k_cache": cache, "context_lens": x["seq_lens"]}
    select = dsa_pair_decode({**x, **names})

    def call() -> tuple[torch.Tensor, ...]:
        (indices,) = select()
        local = indices.clamp(min=0)
        slots = table.gather(1, (local // page).long()) * page + local % page
        return (torch.where(indices < 0, indices, slots),)

    return call


def dsa_sparse_mla(x: Inputs) -> Call:
    """Sparse MLA over a paged cache, either format."""
    ops, cache = _ops("dsa"), _bytes(x["kv_cache"])
    tokens, heads = x["q"].shape[:2]

    def call() -> tuple[torch.Tensor, ...]:
        out = torch.empty(tokens, heads, 512, dtype=torch.bfloat16, device=cache.device)
        lse = torch.empty(tokens, heads, dtype=torch.float32, device=cache.device)
        scale = float(x["sm_scale"])
        ops.dsa_sparse_mla(x["q"], cache, x["indices"], x["req_id"], x["block_table"], scale, out, lse)
        return out, lse

    return call


def dsa_contest_attention(x: Inputs) -> Call:
    """The contest splits latent and rope caches; the selected entries are gathered into one cache in the call."""
    ops = _ops("dsa")
    indices, device = x["sparse_indices"], x["q_nope"].device
    tokens, top_k = indices.shape
    ckv, kpe = x["ckv_cache"].flatten(0, 1), x["kpe_cache"].flatten(0, 1)
    own = torch.arange(tokens * top_k, dtype=torch.int32, device=device).view(tokens, top_k)

    def call() -> tuple[torch.Tensor, ...]:
        chosen = indices.clamp(min=0).flatten()
        cache = torch.cat([ckv[chosen], kpe[chosen]], -1).view(-1, 64, 576)
        q = torch.cat([x["q_nope"], x["q_pe"]], -1)
        out = torch.empty_like(x["q_nope"])
        lse = torch.empty(out.shape[:2], dtype=torch.float32, device=device)
        slots = torch.where(indices < 0, -1, own)
        ops.dsa_sparse_mla(q, cache, slots, None, None, float(x["sm_scale"]), out, lse)
        return out, lse

    return call


def dsa_step(x: Inputs) -> Call:
    """Insertion of index keys, logits, top-k and attention of one decode step, as the plugin runs them."""
    ops = _ops("dsa")
    cache, table, lens, q = _bytes(x["k_cache"]), x["block_table"], x["context_lens"], x["q"]
    rows, columns, device = q.shape[0], table.shape[1] * cache.shape[1], q.device
    starts, requests = torch.zeros_like(lens), torch.arange(rows, dtype=torch.int32, device=device)

    def call() -> tuple[torch.Tensor, ...]:
        logits = torch.empty(rows, columns, dtype=torch.float32, device=device)
        indices = torch.empty(rows, 2048, dtype=torch.int32, device=device)
        out = torch.empty(rows, q.shape[1], 512, dtype=torch.bfloat16, device=device)
        ops.dsa_indexer_k_insert(x["k_index"], cache, x["slot_mapping"])
        ops.dsa_indexer_logits_paged(x["q_index"], cache, x["weights"], lens, table, logits, clean=False, topk=2048)
        ops.dsa_topk(logits, starts, lens, indices)
        ops.dsa_sparse_mla(q, x["kv_cache"], indices, requests, table, float(x["sm_scale"]), out, None)
        return (out,)

    return call


def dsa_gather_indexer_k(x: Inputs) -> Call:
    """Cached index keys into contiguous buffers."""
    ops, cache = _ops("dsa"), _bytes(x["k_cache"])

    def call() -> tuple[torch.Tensor, ...]:
        ops.dsa_gather_indexer_k(cache, x["block_table"], x["cu_seqlens"], x["k"], x["k_scale"])
        return x["k"], x["k_scale"]

    return call


def dsa_kv_insert(x: Inputs) -> Call:
    """New latent entries into a paged cache."""
    ops = _ops("dsa")

    def call() -> tuple[torch.Tensor, ...]:
        ops.dsa_kv_insert(x["kv_c"], x["k_pe"], x["kv_cache"], x["slot_mapping"])
        return (x["kv_cache"],)

    return call


def gdn_decode(x: Inputs) -> Call:
    """Packed decode; with `conv_state` among the inputs the convolution's update is fused in, with
    `num_accepted_tokens` the tokens are speculative windows."""
    ops, state = _ops("gdn"), x["state"]
    conv = {name: x[name] for name in ("conv_state", "conv_weight") if name in x}
    drafts = {name: x[name] for name in ("cu_seqlens", "num_accepted_tokens") if name in x}

    def call() -> tuple[torch.Tensor, ...]:
        out = torch.empty(
            x["mixed_qkv"].shape[0], *state.shape[1:3], dtype=torch.bfloat16, device=x["mixed_qkv"].device
        )
        ops.gdn_decode(
            x["mixed_qkv"],
            x["a"],
            x["b"],
            x["A_log"],
            x["dt_bias"],
            state,
            x["state_indices"],
            out,
            scale=float(x["scale"]),
            **conv,
            **drafts,
        )
        return (out, state, conv["conv_state"]) if conv else (out, state)

    return call


def gdn_contest_decode(x: Inputs) -> Call:
    """The contest wants a new state tensor and has no padding slot: the state is copied into a pool in the call."""
    ops, state, batch = _ops("gdn"), x["state"], x["q"].shape[0]
    slots = torch.arange(1, batch + 1, dtype=torch.int32, device=state.device)

    def call() -> tuple[torch.Tensor, ...]:
        pool = torch.empty(batch + 1, *state.shape[1:], dtype=state.dtype, device=state.device)
        pool[1:].copy_(state)
        mixed_qkv = torch.cat([x[name].flatten(1) for name in ("q", "k", "v")], -1)
        out = torch.empty(batch, *x["v"].shape[2:], dtype=torch.bfloat16, device=state.device)
        ops.gdn_decode(
            mixed_qkv,
            x["a"].squeeze(1),
            x["b"].squeeze(1),
            x["A_log"],
            x["dt_bias"],
            pool,
            slots,
            out,
            scale=float(x["scale"]),
            use_qk_l2norm=False,
        )
        return out.unsqueeze(1), pool[1:]

    return call


def gdn_prefill_raw_qk(x: Inputs) -> Call:
    """Prefill over a state pool that normalises q and k itself."""
    return gdn_prefill(x, use_qk_l2norm=True)


def gdn_prefill(x: Inputs, use_qk_l2norm: bool = False) -> Call:
    """Prefill over a state pool."""
    ops = _ops("gdn")

    def call() -> tuple[torch.Tensor, ...]:
        out = torch.empty_like(x["v"])
        ops.gdn_prefill(
            x["q"],
            x["k"],
            x["v"],
            x["g"],
            x["beta"],
            x["state"],
            x["state_indices"],
            x["has_initial_state"],
            x["cu_seqlens"],
            out,
            scale=float(x["scale"]),
            use_qk_l2norm=use_qk_l2norm,
        )
        return out, x["state"]

    return call


def _prepared(
    ops: Any, mixed_qkv: torch.Tensor, x: Inputs, heads: int, l2norm: bool, **conv: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    tokens, v_heads, device = mixed_qkv.shape[0], x["A_log"].shape[0], mixed_qkv.device
    q = torch.empty(tokens, heads, 128, dtype=torch.bfloat16, device=device)
    k, v = torch.empty_like(q), torch.empty(tokens, v_heads, 128, dtype=torch.bfloat16, device=device)
    g = torch.empty(tokens, v_heads, dtype=torch.float32, device=device)
    beta = torch.empty_like(g)
    gates = (x["a"], x["b"], x["A_log"], x["dt_bias"])
    ops.gdn_prepare(mixed_qkv, *gates, q, k, v, g, beta, use_qk_l2norm=l2norm, **conv)
    return q, k, v, g, beta


def gdn_contest_prefill(x: Inputs) -> Call:
    """Gates and the copy of the state into a pool are in the call."""
    ops, state = _ops("gdn"), x["state"]
    count, device = state.shape[0], state.device
    slots = torch.arange(1, count + 1, dtype=torch.int32, device=device)
    loaded = torch.ones(count, dtype=torch.bool, device=device)
    offsets = x["cu_seqlens"].to(torch.int32)

    def call() -> tuple[torch.Tensor, ...]:
        pool = torch.empty(count + 1, *state.shape[1:], dtype=state.dtype, device=device)
        pool[1:].copy_(state)
        mixed_qkv = torch.cat([x[name].flatten(1) for name in ("q", "k", "v")], -1)
        q, k, v, g, beta = _prepared(ops, mixed_qkv, x, x["q"].shape[1], False)
        out = torch.empty_like(v)
        ops.gdn_prefill(q, k, v, g, beta, pool, slots, loaded, offsets, out, scale=float(x["scale"]))
        return out, pool[1:]

    return call


def gdn_core_prefill(x: Inputs) -> Call:
    """Convolution, gates and prefill, as the plugin runs them."""
    ops, state, mixed_qkv = _ops("gdn"), x["state"], x["mixed_qkv"]
    heads = (mixed_qkv.shape[1] - state.shape[1] * 128) // 256
    names = ("conv_state", "conv_weight", "state_indices", "has_initial_state", "cu_seqlens")

    def call() -> tuple[torch.Tensor, ...]:
        slots, loaded, offsets = x["state_indices"], x["has_initial_state"], x["cu_seqlens"]
        q, k, v, g, beta = _prepared(ops, mixed_qkv, x, heads, True, **{name: x[name] for name in names})
        out = torch.empty_like(v)
        ops.gdn_prefill(q, k, v, g, beta, state, slots, loaded, offsets, out, scale=float(x["scale"]))
        return out, state, x["conv_state"]

    return call
