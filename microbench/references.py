"""The `run` function of every definition: the kernels' references behind the definition's own argument list.

`bundle.py` turns one of these, with everything it uses from `kernels/*/reference.py`, into the self-contained text a
FlashInfer-Bench definition carries. Nothing else may be used here: torch, references, literals.
"""

from __future__ import annotations

import torch

from blackwell_kernels.dsa.reference import (
    contest_sparse_attention,
    contest_topk_indexer,
    gather_indexer_k,
    indexer_k_insert,
    indexer_logits_paged,
    indexer_logits_ragged,
    kv_insert,
    sparse_mla,
    topk,
)
from blackwell_kernels.gdn.reference import (
    contest_decode,
    contest_prefill,
    gdn_causal_conv,
    gdn_decode,
    gdn_prefill,
    gdn_prepare,
)
from blackwell_kernels.moe.reference import moe_fp8_block_scale, moe_grouped_topk, moe_softmax_topk


def run_moe_contest(
    routing_logits,
    routing_bias,
    hidden_states,
    hidden_states_scale,
    gemm1_weights,
    gemm1_weights_scale,
    gemm2_weights,
    gemm2_weights_scale,
    local_expert_offset,
    routed_scaling_factor,
):
    weights, ids = moe_grouped_topk(routing_logits, routing_bias, 8, 8, 4, True, float(routed_scaling_factor))
    return moe_fp8_block_scale(
        hidden_states,
        hidden_states_scale.t().contiguous(),
        gemm1_weights,
        gemm1_weights_scale,
        gemm2_weights,
        gemm2_weights_scale,
        weights,
        ids - int(local_expert_offset),
        gate_first=False,
        requantize_intermediate=False,
    ).to(torch.bfloat16)


def run_moe_fp8_block(hidden_states, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids):
    output = moe_fp8_block_scale(hidden_states, None, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids)
    return output.to(torch.bfloat16)


def run_moe_fp8_block_ep(hidden_states, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map):
    output = moe_fp8_block_scale(hidden_states, None, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map)
    return output.to(torch.bfloat16)


def run_moe_routing_grouped(router_logits, bias, n_group, topk_group, renormalize, routed_scaling_factor):
    return moe_grouped_topk(
        router_logits, bias, 8, int(n_group), int(topk_group), bool(renormalize), float(routed_scaling_factor)
    )


def run_moe_routing_softmax(router_logits, renormalize):
    return moe_softmax_topk(router_logits, 10, bool(renormalize))


def run_dsa_contest_topk(q_index_fp8, k_index_cache_fp8, weights, seq_lens, block_table):
    return contest_topk_indexer(q_index_fp8, k_index_cache_fp8, weights, seq_lens, block_table, 2048)


def run_dsa_contest_attention(q_nope, q_pe, ckv_cache, kpe_cache, sparse_indices, sm_scale):
    return contest_sparse_attention(q_nope, q_pe, ckv_cache, kpe_cache, sparse_indices, sm_scale)


def run_dsa_logits_paged(q, k_cache, weights, context_lens, block_table):
    pages, page = block_table.shape[1], k_cache.shape[1]
    logits = indexer_logits_paged(q, k_cache, weights, context_lens, block_table, pages * page)
    return logits.to(torch.float32).view(-1, pages, page)


def run_dsa_logits_ragged(q, k, k_scale, weights, row_starts, row_ends):
    return indexer_logits_ragged(q, k, k_scale, weights, row_starts, row_ends).to(torch.float32)


def run_dsa_topk(logits, row_starts, row_ends):
    return topk(logits, row_starts, row_ends, 2048)


def run_dsa_pair_decode(q, k_cache, weights, context_lens, block_table):
    columns = block_table.shape[1] * k_cache.shape[1]
    logits = indexer_logits_paged(q, k_cache, weights, context_lens, block_table, columns)
    return topk(logits, torch.zeros_like(context_lens), context_lens, 2048)


def run_dsa_pair_prefill(q, k, k_scale, weights, row_starts, row_ends):
    logits = indexer_logits_ragged(q, k, k_scale, weights, row_starts, row_ends)
    return topk(logits, row_starts, row_ends, 2048)


def run_dsa_sparse_mla(q, kv_cache, indices, req_id, block_table, sm_scale):
    if kv_cache.dtype == torch.int8:  # the byte layout; definitions have no uint8
        kv_cache = kv_cache.view(torch.uint8)
    out, lse = sparse_mla(q, kv_cache, indices, req_id, block_table, float(sm_scale))
    return out.to(torch.bfloat16), lse.to(torch.float32)


def run_dsa_step(q_index, k_index, slot_mapping, k_cache, weights, context_lens, block_table, q, kv_cache, sm_scale):
    k_cache = indexer_k_insert(k_index, k_cache.view(torch.uint8), slot_mapping)
    columns = block_table.shape[1] * k_cache.shape[1]
    logits = indexer_logits_paged(q_index, k_cache, weights, context_lens, block_table, columns)
    indices = topk(logits, torch.zeros_like(context_lens), context_lens, 2048)
    requests = torch.arange(len(context_lens), device=q.device)
    return sparse_mla(q, kv_cache, indices, requests, block_table, float(sm_scale))[0].to(torch.bfloat16)


def run_dsa_gather_indexer_k(k_cache, block_table, cu_seqlens, k, k_scale):
    return gather_indexer_k(k_cache.view(torch.uint8), block_table, cu_seqlens)


def run_dsa_kv_insert(kv_c, k_pe, kv_cache, slot_mapping):
    return kv_insert(kv_c, k_pe, kv_cache, slot_mapping)


def run_gdn_prefill_raw_qk(q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, scale):
    arguments = (q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, float(scale))
    out, new_state = gdn_prefill(*arguments, use_qk_l2norm=True)
    return out.to(torch.bfloat16), new_state.to(state.dtype)


def run_gdn_contest_decode(q, k, v, state, A_log, a, dt_bias, b, scale):
    return contest_decode(q, k, v, state, A_log, a, dt_bias, b, float(scale))


def run_gdn_contest_prefill(q, k, v, state, A_log, a, dt_bias, b, cu_seqlens, scale):
    return contest_prefill(q, k, v, state, A_log, a, dt_bias, b, cu_seqlens, float(scale))


def run_gdn_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, scale):
    out, new_state, _ = gdn_decode(mixed_qkv, a, b, A_log, dt_bias, state, state_indices, float(scale))
    return out.to(torch.bfloat16), new_state.to(state.dtype)


def run_gdn_prefill(q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, scale):
    out, new_state = gdn_prefill(q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, float(scale))
    return out.to(torch.bfloat16), new_state.to(state.dtype)


def run_gdn_core_decode(mixed_qkv, a, b, A_log, dt_bias, conv_state, conv_weight, state, state_indices, scale):
    out, new_state, new_conv_state = gdn_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        state_indices,
        float(scale),
        conv_state=conv_state,
        conv_weight=conv_weight,
    )
    return out.to(torch.bfloat16), new_state.to(state.dtype), new_conv_state.to(conv_state.dtype)


def run_gdn_core_drafts(
    mixed_qkv,
    a,
    b,
    A_log,
    dt_bias,
    conv_state,
    conv_weight,
    state,
    state_indices,
    cu_seqlens,
    num_accepted_tokens,
    scale,
):
    out, new_state, new_conv_state = gdn_decode(
        mixed_qkv,
        a,
        b,
        A_log,
        dt_bias,
        state,
        state_indices,
        float(scale),
        conv_state=conv_state,
        conv_weight=conv_weight,
        cu_seqlens=cu_seqlens,
        num_accepted_tokens=num_accepted_tokens,
    )
    return out.to(torch.bfloat16), new_state.to(state.dtype), new_conv_state.to(conv_state.dtype)


def run_gdn_core_prefill(
    mixed_qkv,
    a,
    b,
    A_log,
    dt_bias,
    conv_state,
    conv_weight,
    state,
    state_indices,
    has_initial_state,
    cu_seqlens,
    scale,
):
    num_v_heads, head_v_dim, head_k_dim = state.shape[1:]
    num_k_heads = (mixed_qkv.shape[1] - num_v_heads * head_v_dim) // (2 * head_k_dim)
    mixed_qkv, new_conv_state = gdn_causal_conv(
        mixed_qkv, conv_weight, None, conv_state, state_indices, has_initial_state, cu_seqlens
    )
    q, k, v, g, beta = gdn_prepare(mixed_qkv, a, b, A_log, dt_bias, num_k_heads, head_k_dim)
    out, new_state = gdn_prefill(q, k, v, g, beta, state, state_indices, has_initial_state, cu_seqlens, float(scale))
    return out.to(torch.bfloat16), new_state.to(state.dtype), new_conv_state.to(conv_state.dtype)
