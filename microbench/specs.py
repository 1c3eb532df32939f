"""All definitions: the contest's, and the models' own shapes in vLLM's layouts.

Every axis that tensor or expert parallelism divides is variable, so one definition serves all deployments.
"""

from __future__ import annotations

from dataclasses import replace

from blackwell_kernels.microbench.contest import CONTEST
from blackwell_kernels.microbench.parts import PARTS
from blackwell_kernels.microbench.spec import (
    FP8_CLOSE,
    LOGITS,
    LSE,
    ROUTING,
    SELECTION,
    STATE_BF16,
    STATE_F32,
    Rule,
    Spec,
)

_MOE_IN = {
    "hidden_states": "bfloat16[num_tokens, hidden_size]",
    "w13": "float8_e4m3fn[num_experts, gate_up_size, hidden_size]",
    "w13_scale": "float32[num_experts, num_gate_up_blocks, num_hidden_blocks]",
    "w2": "float8_e4m3fn[num_experts, hidden_size, intermediate_size]",
    "w2_scale": "float32[num_experts, num_hidden_blocks, num_intermediate_blocks]",
    "topk_weights": "float32[num_tokens, top_k]",
    "topk_ids": "int32[num_tokens, top_k]",
}
_MOE_CONSTRAINTS = (
    "gate_up_size == 2 * intermediate_size",
    "num_gate_up_blocks == 2 * num_intermediate_blocks",
    "hidden_size == 128 * num_hidden_blocks",
    "intermediate_size == 128 * num_intermediate_blocks",
)
_MOE_OUT = {"output": "bfloat16[num_tokens, hidden_size]"}
_LATENT = {"head_dim": 576, "latent_dim": 512, "page_size": 64}
_MLA_IN = {
    "q": "bfloat16[num_tokens, num_heads, head_dim]",
    "kv_cache": "bfloat16[num_pages, page_size, head_dim]",
    "indices": "int32[num_tokens, top_k]",
    "req_id": "int32[num_tokens]",
    "block_table": "int32[num_requests, max_num_pages]",
    "sm_scale": "float32",
}
_MLA_OUT = {"output": "bfloat16[num_tokens, num_heads, latent_dim]", "lse": "float32[num_tokens, num_heads]"}
_PAGED_IN = {
    "q": "float8_e4m3fn[batch_size, next_n, num_index_heads, index_head_dim]",
    "k_cache": "int8[num_pages, page_size, head_dim_with_scale]",
    "weights": "float32[num_rows, num_index_heads]",
    "context_lens": "int32[batch_size]",
    "block_table": "int32[batch_size, max_num_pages]",
}
_RAGGED_IN = {
    "q": "float8_e4m3fn[num_rows, num_index_heads, index_head_dim]",
    "k": "float8_e4m3fn[num_keys, index_head_dim]",
    "k_scale": "float32[num_keys]",
    "weights": "float32[num_rows, num_index_heads]",
    "row_starts": "int32[num_rows]",
    "row_ends": "int32[num_rows]",
}
_INDEXER = {"index_head_dim": 128, "page_size": 64, "head_dim_with_scale": 132}
_HEAD = {"head_size": 128}
_STATE = "[num_slots, num_v_heads, head_size, head_size]"
_DECODE_GATES = {
    "mixed_qkv": "bfloat16[batch_size, qkv_size]",
    "a": "bfloat16[batch_size, num_v_heads]",
    "b": "bfloat16[batch_size, num_v_heads]",
    "A_log": "float32[num_v_heads]",
    "dt_bias": "float32[num_v_heads]",
}
_PREFILL_GATES = {
    "mixed_qkv": "bfloat16[total_seq_len, qkv_size]",
    "a": "bfloat16[total_seq_len, num_v_heads]",
    "b": "bfloat16[total_seq_len, num_v_heads]",
    "A_log": "float32[num_v_heads]",
    "dt_bias": "float32[num_v_heads]",
}
_SLOTS = {"has_initial_state": "bool[num_seqs]", "cu_seqlens": "int32[len_cu_seqlens]"}
_CONV = {"conv_state": "bfloat16[num_slots, conv_history, qkv_size]", "conv_weight": "bfloat16[qkv_size, conv_width]"}
_CONV_OUT = {"new_conv_state": "bfloat16[num_slots, conv_history, qkv_size]"}
_DRAFT_CONV = {**_CONV, "conv_state": "bfloat16[num_slots, conv_rows, qkv_size]"}
_CONV_SIZE = {"conv_history": 3, "conv_width": 4}
_QKV = {
    "q": "bfloat16[total_seq_len, num_q_heads, head_size]",
    "k": "bfloat16[total_seq_len, num_q_heads, head_size]",
    "v": "bfloat16[total_seq_len, num_v_heads, head_size]",
}


def _moe() -> list[Spec]:
    experts = Spec(
        name="moe_fp8_block",
        op="moe",
        description="SwiGLU experts with 128x128 block-scaled e4m3 weights, gate rows first; activations are "
        "quantised 1x128 inside, before both matmuls.",
        inputs=_MOE_IN,
        outputs=_MOE_OUT,
        reference="moe_fp8_block",
        rules={"output": FP8_CLOSE},
        constraints=_MOE_CONSTRAINTS,
        rows="num_tokens",
    )
    return [
        experts,
        replace(
            experts,
            name="moe_fp8_block_ep",
            description=experts.description + " topk_ids are global; expert_map gives the local expert or -1.",
            inputs={**_MOE_IN, "expert_map": "int32[num_global_experts]"},
            reference="moe_fp8_block_ep",
        ),
        Spec(
            name="moe_routing_grouped_topk8",
            op="moe_routing",
            description="DeepSeek's router: sigmoid, groups scored by their two best biased scores, the best "
            "topk_group kept, weights from the unbiased scores.",
            constants={"top_k": 8},
            inputs={
                "router_logits": "float32[num_tokens, num_experts]",
                "bias": "float32[num_experts]",
                "n_group": "int32",
                "topk_group": "int32",
                "renormalize": "bool",
                "routed_scaling_factor": "float32",
            },
            outputs={"topk_weights": "float32[num_tokens, top_k]", "topk_ids": "int32[num_tokens, top_k]"},
            reference="moe_routing_grouped",
            rules={"topk_weights": ROUTING, "topk_ids": SELECTION},
            tags=("model:deepseek-v3.2",),
        ),
        Spec(
            name="moe_routing_softmax_topk10",
            op="moe_routing",
            description="Softmax router, optionally renormalised over the chosen experts.",
            constants={"top_k": 10},
            inputs={"router_logits": "bfloat16[num_tokens, num_experts]", "renormalize": "bool"},
            outputs={"topk_weights": "float32[num_tokens, top_k]", "topk_ids": "int32[num_tokens, top_k]"},
            reference="moe_routing_softmax",
            rules={"topk_weights": ROUTING, "topk_ids": SELECTION},
            tags=("model:qwen3-next",),
        ),
    ]


def _dsa() -> list[Spec]:
    mla = Spec(
        name="dsa_sparse_mla_bf16",
        op="dsa_sparse_mla",
        description="Attention over the selected entries of a paged latent KV cache; indices are request-local, -1 "
        "padded; log-sum-exp in base 2.",
        constants=_LATENT,
        inputs=_MLA_IN,
        outputs=_MLA_OUT,
        reference="dsa_sparse_mla",
        rules={"output": Rule(dissimilarity=1e-4, atol=1e-2, rtol=2e-2, matched=0.999), "lse": LSE},
        tags=("model:deepseek-v3.2",),
        rows="num_tokens",
    )
    return [
        Spec(
            name="dsa_indexer_logits_paged",
            op="dsa_indexer",
            description="Weighted ReLU scores of next_n queries a sequence against its paged e4m3 keys; query n of a "
            "sequence sees context_len - next_n + 1 + n keys; columns beyond are unspecified.",
            constants=_INDEXER,
            inputs=_PAGED_IN,
            outputs={"logits": "float32[num_rows, max_num_pages, page_size]"},
            reference="dsa_logits_paged",
            rules={"logits": LOGITS},
            constraints=("num_rows == batch_size * next_n",),
            tags=("model:deepseek-v3.2", "stage:decode"),
            tokens="num_rows",
        ),
        Spec(
            name="dsa_indexer_logits_ragged",
            op="dsa_indexer",
            description="Weighted ReLU scores against gathered e4m3 keys; row m sees keys [row_starts, row_ends), "
            "other columns are unspecified.",
            constants={"index_head_dim": 128},
            inputs=_RAGGED_IN,
            outputs={"logits": "float32[num_rows, num_keys]"},
            reference="dsa_logits_ragged",
            rules={"logits": LOGITS},
            tags=("model:deepseek-v3.2", "stage:prefill"),
            tokens="num_rows",
            rows="num_rows",
        ),
        Spec(
            name="dsa_topk2048",
            op="dsa_topk",
            description="The 2048 best columns of each row within [row_starts, row_ends), relative to the row's start, "
            "-1 padded, in any order.",
            constants={"top_k": 2048},
            inputs={
                "logits": "float32[num_rows, num_columns]",
                "row_starts": "int32[num_rows]",
                "row_ends": "int32[num_rows]",
            },
            outputs={"indices": "int32[num_rows, top_k]"},
            reference="dsa_topk",
            rules={"indices": replace(SELECTION, atol=0.0, rtol=0.0)},
            tags=("model:deepseek-v3.2",),
            tokens="num_rows",
        ),
        mla,
        replace(
            mla,
            name="dsa_sparse_mla_fp8",
            description=mla.description + " Cache entries are 656 bytes: 512 e4m3, 4 float32 scales, 64 bfloat16.",
            constants={**_LATENT, "entry_bytes": 656},
            inputs={**_MLA_IN, "kv_cache": "int8[num_pages, page_size, entry_bytes]"},
            rules={"output": FP8_CLOSE, "lse": Rule(atol=5e-3, rtol=5e-3)},
        ),
        Spec(
            name="dsa_pair_decode",
            op="dsa_pair",
            description="What a decode step of sparse attention selects: by paged indexer logits the best 2048 keys of "
            "each sequence, as positions in it, -1 padded, in any order.",
            constants={**_INDEXER, "next_n": 1, "top_k": 2048},
            inputs={k: v.replace("num_rows", "batch_size") for k, v in _PAGED_IN.items()},
            outputs={"indices": "int32[batch_size, top_k]"},
            reference="dsa_pair_decode",
            # scores are sums of FP8 products, rounded as such (see Rule)
            rules={"indices": replace(SELECTION, atol=1e-3)},
            tags=("model:deepseek-v3.2", "stage:decode"),
            tokens="batch_size",
        ),
        Spec(
            name="dsa_pair_prefill",
            op="dsa_pair",
            description="Indexer logits of a chunk's rows against gathered keys and the best 2048 of keys "
            "[row_starts, row_ends), relative to the row's start, -1 padded, in any order.",
            constants={"index_head_dim": 128, "top_k": 2048},
            inputs=_RAGGED_IN,
            outputs={"indices": "int32[num_rows, top_k]"},
            reference="dsa_pair_prefill",
            rules={"indices": replace(SELECTION, atol=1e-3)},
            tags=("model:deepseek-v3.2", "stage:prefill"),
            tokens="num_rows",
            rows="num_rows",
        ),
        Spec(
            name="dsa_step_decode",
            op="dsa_step",
            description="A decode step of sparse attention: index keys quantised into their cache (it holds them, so "
            "that a step may be repeated), paged indexer logits, the best 2048 keys, attention over them in a "
            "bfloat16 latent cache with the same block table.",
            constants={**_LATENT, **_INDEXER, "next_n": 1},
            inputs={
                "q_index": "float8_e4m3fn[batch_size, next_n, num_index_heads, index_head_dim]",
                "k_index": "bfloat16[batch_size, index_head_dim]",
                "slot_mapping": "int64[batch_size]",
                **{k: v.replace("num_rows", "batch_size") for k, v in _PAGED_IN.items() if k != "q"},
                "q": "bfloat16[batch_size, num_heads, head_dim]",
                "kv_cache": "bfloat16[num_pages, page_size, head_dim]",
                "sm_scale": "float32",
            },
            outputs={"output": "bfloat16[batch_size, num_heads, latent_dim]"},
            reference="dsa_step",
            rules={"output": Rule(dissimilarity=1e-3, atol=1e-2, rtol=5e-2, matched=0.99)},
            tags=("model:deepseek-v3.2", "stage:decode"),
            tokens="batch_size",
        ),
    ]


def _gdn() -> list[Spec]:
    decode = Spec(
        name="gdn_decode_state_bf16",
        op="gdn_decode",
        description="One Gated Delta Net step from packed q|k|v with L2-normalised q and k; the state pool may be "
        "updated in place; slot <= 0 is padding.",
        constants=_HEAD,
        inputs={
            **_DECODE_GATES,
            "state": "bfloat16" + _STATE,
            "state_indices": "int32[batch_size]",
            "scale": "float32",
        },
        outputs={"output": "bfloat16[batch_size, num_v_heads, head_size]", "new_state": "bfloat16" + _STATE},
        reference="gdn_decode",
        rules={"output": STATE_BF16, "new_state": STATE_BF16},
        mutates={"new_state": "state"},
        tags=("model:qwen3-next",),
        tokens="batch_size",
    )
    prefill = Spec(
        name="gdn_prefill_state_bf16",
        op="gdn_prefill",
        description="Gated Delta Net over packed sequences with prepared q, k, log decay g and beta; initial states "
        "are read from, final ones written to, slots of a pool that may be updated in place.",
        constants=_HEAD,
        inputs={
            **_QKV,
            "g": "float32[total_seq_len, num_v_heads]",
            "beta": "float32[total_seq_len, num_v_heads]",
            "state": "bfloat16" + _STATE,
            "state_indices": "int32[num_seqs]",
            **_SLOTS,
            "scale": "float32",
        },
        outputs={"output": "bfloat16[total_seq_len, num_v_heads, head_size]", "new_state": "bfloat16" + _STATE},
        reference="gdn_prefill",
        rules={"output": STATE_BF16, "new_state": STATE_BF16},
        mutates={"new_state": "state"},
        constraints=("len_cu_seqlens == num_seqs + 1",),
        tags=("model:qwen3-next",),
        tokens="total_seq_len",
    )
    core = Spec(
        name="gdn_core_decode",
        op="gdn_core",
        description="Causal-convolution update and Gated Delta Net step of a decode batch, both state pools may be "
        "updated in place.",
        constants={**_HEAD, **_CONV_SIZE},
        inputs={
            **_DECODE_GATES,
            **_CONV,
            "state": "bfloat16" + _STATE,
            "state_indices": "int32[batch_size]",
            "scale": "float32",
        },
        outputs={
            "output": "bfloat16[batch_size, num_v_heads, head_size]",
            "new_state": "bfloat16" + _STATE,
            **_CONV_OUT,
        },
        reference="gdn_core_decode",
        rules={"output": STATE_BF16, "new_state": STATE_BF16},
        mutates={"new_state": "state", "new_conv_state": "conv_state"},
        tags=("model:qwen3-next", "stage:decode"),
        tokens="batch_size",
    )
    return [
        *(_float32_state(spec) if f32 else spec for spec in (decode, prefill) for f32 in (False, True)),
        core,
        _float32_state(core),
        # a name of its own: its table's rows are apart from those of single tokens
        replace(
            core,
            name="drafts_gdn_core_bf16",
            description="Causal-convolution update and Gated Delta Net over a speculative window of num_steps tokens a "
            "sequence; the state after step t goes to slot state_indices[i, t], the initial one comes from column "
            "num_accepted_tokens[i] - 1, the convolution's history from row num_accepted_tokens[i] - 1 of the first "
            "slot; both pools may be updated in place.",
            constants={**_HEAD, "conv_width": 4},
            inputs={
                **{name: text.replace("batch_size", "num_tokens") for name, text in _DECODE_GATES.items()},
                **_DRAFT_CONV,
                "state": "bfloat16" + _STATE,
                "state_indices": "int32[batch_size, num_steps]",
                "cu_seqlens": "int32[len_cu_seqlens]",
                "num_accepted_tokens": "int32[batch_size]",
                "scale": "float32",
            },
            outputs={
                "output": "bfloat16[num_tokens, num_v_heads, head_size]",
                "new_state": "bfloat16" + _STATE,
                "new_conv_state": _DRAFT_CONV["conv_state"],
            },
            reference="gdn_core_drafts",
            constraints=(
                "num_tokens == batch_size * num_steps",
                "conv_rows == num_steps + 2",
                "len_cu_seqlens == batch_size + 1",
            ),
            tokens="num_tokens",
        ),
        Spec(
            name="gdn_core_prefill",
            op="gdn_core",
            description="Causal convolution, gates and Gated Delta Net of packed sequences, both state pools may be "
            "updated in place.",
            constants={**_HEAD, **_CONV_SIZE},
            inputs={
                **_PREFILL_GATES,
                **_CONV,
                "state": "bfloat16" + _STATE,
                "state_indices": "int32[num_seqs]",
                **_SLOTS,
                "scale": "float32",
            },
            outputs={
                "output": "bfloat16[total_seq_len, num_v_heads, head_size]",
                "new_state": "bfloat16" + _STATE,
                **_CONV_OUT,
            },
            reference="gdn_core_prefill",
            rules={"output": STATE_BF16, "new_state": STATE_BF16},
            mutates={"new_state": "state", "new_conv_state": "conv_state"},
            constraints=("len_cu_seqlens == num_seqs + 1",),
            tags=("model:qwen3-next", "stage:prefill"),
            tokens="total_seq_len",
        ),
    ]


def _float32_state(spec: Spec) -> Spec:
    def swap(tensors: dict[str, str]) -> dict[str, str]:
        return {name: "float32" + _STATE if tensor.endswith(_STATE) else tensor for name, tensor in tensors.items()}

    return replace(
        spec,
        name=spec.name.replace("bf16", "f32") if "bf16" in spec.name else f"{spec.name}_f32",
        inputs=swap(spec.inputs),
        outputs=swap(spec.outputs),
        rules={**spec.rules, "new_state": STATE_F32},
    )


SPECS: dict[str, Spec] = {spec.name: spec for spec in (*CONTEST, *_moe(), *_dsa(), *_gdn(), *PARTS)}
OPS = (
    "moe",
    "moe_routing",
    "dsa_indexer",
    "dsa_topk",
    "dsa_sparse_mla",
    "dsa_pair",
    "dsa_step",
    "gdn_decode",
    "gdn_prefill",
    "gdn_core",
    "dsa_parts",
    "gdn_parts",
)
