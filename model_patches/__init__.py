"""Model patches: the hooks that let vLLM run our operators in DeepSeek-V3.2 and Qwen3-Next, one file a hook.

Each file's header says why, how, where upstream stands and when to remove it. `activate` imports nothing of vLLM: a
hook is set when vLLM imports what it hooks, and refuses with a ContractError if that is not what contracts.py expects.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import partial
from types import ModuleType

from blackwell_kernels import env
from blackwell_kernels.import_hooks import when_imported

_LAYERS = "vllm.model_executor.layers"
_ROUTER = f"{_LAYERS}.fused_moe.router"

# vLLM module -> file and function that patch it once it is imported, operators of which one must be switched on
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    f"{_LAYERS}.fused_moe.oracle.fp8": ("moe_experts.wrap_oracle", ("moe",)),
    f"{_LAYERS}.fused_moe.runner.moe_runner": ("moe_routing.wrap_runner", ("moe", "moe_routing")),
    f"{_ROUTER}.grouped_topk_router": ("moe_routing.wrap_router", ("moe_routing",)),
    f"{_ROUTER}.fused_topk_router": ("moe_routing.wrap_router", ("moe_routing",)),
    f"{_ROUTER}.cpu_router": ("moe_routing.wrap_router", ("moe_routing",)),
    f"{_LAYERS}.sparse_attn_indexer": ("indexer.replace_kernels", ("dsa_indexer", "dsa_topk")),
    "vllm.model_executor.models.deepseek_v2": ("indexer.patch_model_on_cpu", ("dsa_indexer", "dsa_topk")),
    "vllm.v1.attention.backends.registry": ("sparse_mla.override_backends", ("dsa_sparse_mla",)),
    "vllm.platforms.cpu": ("sparse_mla.serve_on_cpu", ("dsa_sparse_mla",)),
    f"{_LAYERS}.mamba.gdn.qwen_gdn_linear_attn": ("gdn.register_layer", ("gdn_decode", "gdn_prefill")),
    f"{_LAYERS}.mamba.ops.cpu.gdn_attention": ("gdn.replace_cpu_core", ("gdn_decode", "gdn_prefill")),
    "vllm.model_executor.kernels.linear": ("fp8_linear_cpu.extend_kernels", ("moe",)),
    f"{_LAYERS}.rotary_embedding.base": ("rope_cpu.wrap_rotary", ("dsa_indexer",)),
}
MODELS = ("deepseek_v32", "qwen3_next")

_activated = False


def activate() -> None:
    """Set the hooks of every operator that BLACKWELL_KERNELS_DISABLE does not name. Idempotent.

    A hook whose vLLM module is imported already is set now, the others when theirs is.
    Raises: ContractError, now or in vLLM's import statement, when this vLLM is not what a hook expects.
    """
    global _activated
    if _activated:
        return
    _activated = True
    disabled = env.DISABLE.get()
    for module, (patch, ops) in TARGETS.items():
        if not disabled.issuperset(ops):
            when_imported(module, partial(_patch, patch))


def _patch(patch: str, module: ModuleType) -> None:
    file, function = patch.split(".")
    getattr(_load(file), function)(module)


def expected_ops(architectures: Iterable[str]) -> frozenset[str]:
    """The hook operators that a model of these architectures should reach; empty for a model we do not know."""
    asked = set(architectures)
    models = [_load(name) for name in MODELS]
    return frozenset(op for model in models if asked & set(model.ARCHITECTURES) for op in model.OPS)


def _load(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
