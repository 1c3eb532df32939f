"""Model configurations: DeepSeek-V3.2 and Qwen3-Next, tiny for a CPU, small for a GPU's demo, real for measurements.

Sources: the config.json files of deepseek-ai/DeepSeek-V3.2-Exp and Qwen/Qwen3-Next-80B-A3B-Instruct(-FP8). "real"
keeps every layer dimension and cuts only the depth; "tiny" keeps the structure (both layer kinds, both routings,
sparse attention that is sparse) at a size a laptop serves.
"""

from __future__ import annotations

from typing import Any

from blackwell_kernels.errors import BlackwellKernelsError

MODELS = ("qwen3-next", "deepseek-v3.2")
ALIASES = {
    "qwen": "qwen3-next",
    "qwen3next": "qwen3-next",
    "deepseek": "deepseek-v3.2",
    "deepseek-v32": "deepseek-v3.2",
}
SIZES = ("tiny", "small", "real")

# Operators of the plugin that each model runs, by the plugin's own names, and the batch phases each must appear in.
HOOK_OPS: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen3-next": {
        "moe": ("prefill", "decode", "mixed"),
        "moe_routing": ("prefill", "decode", "mixed"),
        "gdn_prefill": ("prefill", "mixed"),
        "gdn_decode": ("decode", "mixed"),
    },
    "deepseek-v3.2": {
        "moe": ("prefill", "decode", "mixed"),
        "moe_routing": ("prefill", "decode", "mixed"),
        "dsa_indexer": ("prefill", "decode", "mixed"),
        "dsa_topk": ("prefill", "decode", "mixed"),
        "dsa_sparse_mla": ("prefill", "decode", "mixed"),
    },
}

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",  # the name before transformers 5, which vLLM 0.24 may run with
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}

_QWEN: dict[str, dict[str, Any]] = {
    "real": {
        "vocab_size": 151936,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "pad_token_id": 151643,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 262144,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
    },
    "small": {
        **_TOKENS,
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 16384,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 32,
        "num_experts_per_tok": 4,
    },
    "tiny": {
        **_TOKENS,
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        # enough KV bytes a token that vLLM's unified page, sized by the recurrent state, is short: prefixes hit
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 4096,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}

_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}

_DEEPSEEK: dict[str, dict[str, Any]] = {
    "real": {
        "vocab_size": 129280,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "index_n_heads": 64,
        "index_topk": 2048,
        "max_position_embeddings": 163840,
        "rope_scaling": _YARN,
    },
    "small": {
        **_TOKENS,
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "q_lora_rank": 256,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "index_n_heads": 64,
        "index_topk": 2048,
        "max_position_embeddings": 16384,
        "rope_scaling": None,
    },
    "tiny": {
        **_TOKENS,
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 128,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "index_n_heads": 4,
        "index_topk": 64,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
    },
}


def canonical(model: str) -> str:
    """The full name of a model given by name or alias; raises for an unknown one."""
    name = ALIASES.get(model.lower(), model.lower())
    if name not in MODELS:
        known = ", ".join((*MODELS, *ALIASES))
        raise BlackwellKernelsError(f"unknown model {model!r}; supported: {known}; give one of these")
    return name


def hf_config(model: str, size: str = "tiny", quant: str = "fp8", layers: int | None = None) -> dict[str, Any]:
    """The config.json of one checkpoint, as transformers and vLLM read it.

    `layers` replaces the depth (Qwen3-Next: a multiple of 4; DeepSeek-V3.2: more than its dense layers).
    `quant` is "fp8" (e4m3, 128×128 blocks, dynamic 1×128 activations) or "bf16".
    """
    name = canonical(model)
    if size not in SIZES or quant not in ("fp8", "bf16"):
        raise BlackwellKernelsError(f"no {size!r} {quant!r} checkpoint; sizes: {', '.join(SIZES)}; quant: fp8, bf16")
    config = _qwen(size, layers) if name == "qwen3-next" else _deepseek(size, layers)
    if quant == "fp8":
        config["quantization_config"] = {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        }
        if name == "qwen3-next":
            config["quantization_config"]["modules_to_not_convert"] = _qwen_unquantised(config["num_hidden_layers"])
        else:
            config["quantization_config"]["scale_fmt"] = "ue8m0"
    return config


def _qwen(size: str, layers: int | None) -> dict[str, Any]:
    config = {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **_COMMON,
        **_QWEN[size],
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "rope_scaling": None,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "full_attention_interval": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    depth = layers or config["num_hidden_layers"]
    if depth % 4:
        raise BlackwellKernelsError(f"Qwen3-Next with {depth} layers: every fourth layer is full attention; use 4·n")
    config["num_hidden_layers"] = depth
    config["layer_types"] = (["linear_attention"] * 3 + ["full_attention"]) * (depth // 4)
    return config


def _qwen_unquantised(layers: int) -> list[str]:
    names = ["lm_head", "model.embed_tokens"]
    for i in range(layers):
        prefix = f"model.layers.{i}"
        if i % 4 != 3:
            names += [f"{prefix}.linear_attn.in_proj_ba", f"{prefix}.linear_attn.conv1d"]
        names += [f"{prefix}.mlp.gate", f"{prefix}.mlp.shared_expert_gate"]
    return [*names, "mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.shared_expert_gate"]


def _deepseek(size: str, layers: int | None) -> dict[str, Any]:
    config = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        **_COMMON,
        **_DEEPSEEK[size],
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_head_dim": 128,
        "rope_theta": 10000.0,
        "n_shared_experts": 1,
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "ep_size": 1,
        "num_nextn_predict_layers": 0,
    }
    depth = layers or config["num_hidden_layers"]
    if depth <= config["first_k_dense_replace"]:
        raise BlackwellKernelsError(
            f"DeepSeek-V3.2 with {depth} layers has no MoE layer: the first {config['first_k_dense_replace']} are dense"
        )
    config["num_hidden_layers"] = depth
    return config
