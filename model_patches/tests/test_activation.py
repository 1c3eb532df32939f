"""Activation on the installed vLLM: off leaves everything alone, on patches each target once, loading is cheap."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from blackwell_kernels import model_patches

platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("what is patched is listed for vLLM's CPU build", allow_module_level=True)

# every attribute that a hook replaces, read before and after
PROBE = """
import importlib, json, os, sys
import torch
torch.cpu._is_amx_tile_supported = lambda: False  # with AMX vLLM's own FP8 layers serve, and their list is left alone
import vllm.platforms
TARGETS = {
    "vllm.model_executor.layers.fused_moe.oracle.fp8": ["backend_to_kernel_cls", "_get_priority_backends"],
    "vllm.model_executor.layers.fused_moe.runner.moe_runner": ["MoERunner.__init__"],
    "vllm.model_executor.layers.fused_moe.router.grouped_topk_router": ["GroupedTopKRouter._compute_routing"],
    "vllm.model_executor.layers.fused_moe.router.fused_topk_router": ["FusedTopKRouter._compute_routing"],
    "vllm.model_executor.layers.fused_moe.router.cpu_router": ["CPURouter._compute_routing"],
    "vllm.model_executor.layers.sparse_attn_indexer": ["fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "ops",
        "get_indexer_topk", "_resolve_layer_name", "op_registry_oot:SparseAttnIndexer"],
    "vllm.model_executor.models.deepseek_v2": ["per_token_group_quant_fp8", "DeepseekV32IndexerCache.get_attn_backend"],
    "vllm.v1.attention.backends.registry": ["_ATTN_OVERRIDES:FLASHMLA_SPARSE"],
    "vllm.platforms.cpu": ["CpuPlatform.get_attn_backend_cls", "CpuPlatform.check_and_update_config"],
    "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn": ["op_registry_oot:QwenGatedDeltaNetAttention"],
    "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention": ["cpu_gdn_attention_core"],
    "vllm.model_executor.kernels.linear": ["_POSSIBLE_FP8_BLOCK_KERNELS:CPU"],
    "vllm.model_executor.layers.rotary_embedding.base": ["RotaryEmbedding.forward_cpu"],
}
from blackwell_kernels import model_patches
assert set(TARGETS) == set(model_patches.TARGETS), "a target has no probe"
before = set(sys.modules)
model_patches.activate()
model_patches.activate()
late = sorted(m for m in set(sys.modules) - before if not m.startswith("blackwell_kernels"))

def read(module, name):
    from vllm.model_executor.custom_op import op_registry_oot
    table, _, key = name.partition(":")
    if table == "op_registry_oot":
        return getattr(op_registry_oot.get(key), "__module__", None)
    if table == "_ATTN_OVERRIDES":
        return module._ATTN_OVERRIDES.get(module.AttentionBackendEnum[key])
    if key:
        return [k.__module__ for k in getattr(module, table)[vllm.platforms.PlatformEnum[key]]]
    for part in name.split("."):
        module = getattr(module, part)
    function = getattr(module, "__func__", module)
    code = getattr(function, "__code__", None)
    # where the code is, or whose object it is: wraps() copies a function's module name
    return code.co_filename if code is not None else getattr(type(function), "__module__", None)

found = {}
for name, attributes in TARGETS.items():
    module = importlib.import_module(name)
    found.update({f"{name}:{attribute}": read(module, attribute) for attribute in attributes})
mine = sorted(k for k, v in found.items() if "blackwell_kernels" in json.dumps(v) or "model_patches" in json.dumps(v))
print("RESULT" + json.dumps({"ours": mine, "late": late, "all": sorted(found)}))
"""


def probe(disable: str) -> dict[str, list[str]]:
    """Attributes that are ours after activation, and what activation itself imported, in a fresh process."""
    environment = {**os.environ, "BLACKWELL_KERNELS_DISABLE": disable, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def names(found: dict[str, list[str]]) -> set[str]:
    return {name.split(":", 1)[1] for name in found["ours"]}


# what a GPU-only hook leaves alone on this machine
GPU_ONLY = {"fp8_fp4_mqa_logits", "fp8_fp4_paged_mqa_logits", "ops", "get_indexer_topk", "_resolve_layer_name"}
MOE = {"backend_to_kernel_cls", "_get_priority_backends", "_POSSIBLE_FP8_BLOCK_KERNELS:CPU"}
ROUTING = {f"{cls}._compute_routing" for cls in ("GroupedTopKRouter", "FusedTopKRouter", "CPURouter")}


def test_disable_all_leaves_every_attribute_alone() -> None:
    assert probe("all")["ours"] == []


def test_activation_patches_every_target_and_imports_none() -> None:
    found = probe("")
    assert found["late"] == []
    expected = {name.split(":", 1)[1] for name in found["all"]} - GPU_ONLY
    assert names(found) == expected


SPARSE_MLA = {
    "_ATTN_OVERRIDES:FLASHMLA_SPARSE",
    "CpuPlatform.get_attn_backend_cls",
    "CpuPlatform.check_and_update_config",
}
GDN = {"op_registry_oot:QwenGatedDeltaNetAttention", "cpu_gdn_attention_core"}
# the indexer's two operators serve together on a CPU, where stock has neither
INDEXER = {
    "op_registry_oot:SparseAttnIndexer",
    "per_token_group_quant_fp8",
    "DeepseekV32IndexerCache.get_attn_backend",
}


@pytest.mark.parametrize(
    ("disable", "gone"),
    [
        ("moe,gdn_decode,dsa_sparse_mla", MOE | SPARSE_MLA),
        ("moe_routing,gdn_decode,gdn_prefill,dsa_topk", ROUTING | GDN | INDEXER),
        ("moe,moe_routing", MOE | ROUTING | {"MoERunner.__init__"}),
    ],
)
def test_partial_disable(disable: str, gone: set[str]) -> None:
    found = probe(disable)
    expected = {name.split(":", 1)[1] for name in found["all"]} - GPU_ONLY - gone
    assert names(found) == expected


def test_expected_ops() -> None:
    assert model_patches.expected_ops(["Qwen3NextForCausalLM"]) == {"moe", "moe_routing", "gdn_decode", "gdn_prefill"}
    deepseek = {"moe", "moe_routing", "dsa_indexer", "dsa_topk", "dsa_sparse_mla"}
    assert model_patches.expected_ops(["DeepseekV32ForCausalLM"]) == deepseek
    assert model_patches.expected_ops(["LlamaForCausalLM"]) == frozenset()
