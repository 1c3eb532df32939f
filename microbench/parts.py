"""Operators that the plugin has and does not call on a GPU: there stock vLLM fills and gathers the caches, and
`gdn_prepare` normalises. They are measured so that every kernel that ships is.
"""

from __future__ import annotations

from blackwell_kernels.microbench.spec import STATE_BF16, Rule, Spec

_COPY = Rule(dissimilarity=1e-12, atol=0.0, rtol=0.0)
_STATE = "bfloat16[num_slots, num_v_heads, head_size, head_size]"

PARTS: tuple[Spec, ...] = (
    Spec(
        name="dsa_gather_indexer_k",
        op="dsa_parts",
        description="Cached indexer keys of all sequences, one after another, and their scales, into given buffers.",
        constants={"index_head_dim": 128, "page_size": 64, "head_dim_with_scale": 132},
        inputs={
            "k_cache": "int8[num_pages, page_size, head_dim_with_scale]",
            "block_table": "int32[batch_size, max_num_pages]",
            "cu_seqlens": "int32[len_cu_seqlens]",
            "k": "float8_e4m3fn[num_keys, index_head_dim]",
            "k_scale": "float32[num_keys]",
        },
        outputs={"new_k": "float8_e4m3fn[num_keys, index_head_dim]", "new_k_scale": "float32[num_keys]"},
        reference="dsa_gather_indexer_k",
        rules={"new_k": _COPY, "new_k_scale": _COPY},
        mutates={"new_k": "k", "new_k_scale": "k_scale"},
        constraints=("len_cu_seqlens == batch_size + 1",),
        tags=("model:deepseek-v3.2", "stage:prefill"),
        tokens="num_keys",
    ),
    Spec(
        name="dsa_kv_insert_bf16",
        op="dsa_parts",
        description="Latent and rope parts of new tokens into their slots of a paged bfloat16 cache.",
        constants={"latent_dim": 512, "rope_dim": 64, "head_dim": 576, "page_size": 64},
        inputs={
            "kv_c": "bfloat16[num_tokens, latent_dim]",
            "k_pe": "bfloat16[num_tokens, rope_dim]",
            "kv_cache": "bfloat16[num_pages, page_size, head_dim]",
            "slot_mapping": "int64[num_tokens]",
        },
        outputs={"new_kv_cache": "bfloat16[num_pages, page_size, head_dim]"},
        reference="dsa_kv_insert",
        rules={"new_kv_cache": _COPY},
        mutates={"new_kv_cache": "kv_cache"},
        tags=("model:deepseek-v3.2",),
    ),
    Spec(
        name="gdn_prefill_raw_qk",
        op="gdn_parts",
        description="Gated Delta Net over packed sequences as in gdn_prefill_state_bf16, with q and k that are "
        "L2-normalised inside.",
        constants={"head_size": 128},
        inputs={
            "q": "bfloat16[total_seq_len, num_q_heads, head_size]",
            "k": "bfloat16[total_seq_len, num_q_heads, head_size]",
            "v": "bfloat16[total_seq_len, num_v_heads, head_size]",
            "g": "float32[total_seq_len, num_v_heads]",
            "beta": "float32[total_seq_len, num_v_heads]",
            "state": _STATE,
            "state_indices": "int32[num_seqs]",
            "has_initial_state": "bool[num_seqs]",
            "cu_seqlens": "int32[len_cu_seqlens]",
            "scale": "float32",
        },
        outputs={"output": "bfloat16[total_seq_len, num_v_heads, head_size]", "new_state": _STATE},
        reference="gdn_prefill_raw_qk",
        rules={"output": STATE_BF16, "new_state": STATE_BF16},
        mutates={"new_state": "state"},
        constraints=("len_cu_seqlens == num_seqs + 1",),
        tags=("model:qwen3-next", "stage:prefill"),
        tokens="total_seq_len",
    ),
)
