"""FP8 block-scaled experts: our class in the slot of vLLM's backend that leaves the weights as the checkpoint has them.

Why: vLLM chooses its FP8 experts from a fixed list, with no way to add to it, and on a CPU it has none without AMX.
How: two functions of the FP8 oracle are wrapped. `backend_to_kernel_cls(TRITON)` names our class first;
`_get_priority_backends` moves TRITON to the front where stock would have chosen another backend, but only if our class
supports the layer and serves every number of tokens there: our hand-over goes to TritonExperts, which is stock's choice
only where TRITON comes first anyway. The GPU class subclasses TritonExperts and dispatches per number of tokens.
Upstream: "TODO(rob) ... register MoE backends by OOT plugins" in oracle/fp8.py; vllm PR #53897 would add it, #54294,
#46901 and #43461 move the oracle into classes.
Remove when: vLLM has a registry for MoE backends.
"""

from __future__ import annotations

from functools import cache, wraps
from typing import Any

import torch

from blackwell_kernels import status
from blackwell_kernels.model_patches import context, contracts
from blackwell_kernels.select import Policy, policy

OP = "moe"
_LAYERS = "vllm.model_executor.layers.fused_moe"
_MODULAR = f"{_LAYERS}.modular_kernel"
_TRITON = f"{_LAYERS}.experts.triton_moe"

# why a layer whose choice went through the oracle is served as it is, by the identity of its FusedMoEConfig
_decided: dict[int, Policy] = {}


def wrap_oracle(oracle: Any) -> None:
    """Add our class to vLLM's choice."""
    if hasattr(oracle.backend_to_kernel_cls, "stock"):
        return
    contracts.demand(OP, oracle)
    stock_classes, stock_order = oracle.backend_to_kernel_cls, oracle._get_priority_backends
    triton = oracle.Fp8MoeBackend.TRITON

    @wraps(stock_classes)
    def backend_to_kernel_cls(backend: Any) -> list[type]:
        return [experts_class(), *stock_classes(backend)] if backend is triton else stock_classes(backend)

    @wraps(stock_order)
    def _get_priority_backends(moe_config: Any, weight_key: Any, activation_key: Any) -> list[Any]:
        order = stock_order(moe_config, weight_key, activation_key)
        chosen = decide(moe_config, weight_key, activation_key)
        if order and triton in order and order[0] is not triton:
            if chosen.impl in ("triton", "cpu"):
                order.insert(0, order.pop(order.index(triton)))
            elif chosen.impl == "mixed":
                chosen = Policy("stock", f"{order[0].value} is stock's choice and faster for some numbers of tokens")
        _decided[id(moe_config)] = chosen
        return order

    backend_to_kernel_cls.stock = stock_classes  # type: ignore[attr-defined]
    _get_priority_backends.stock = stock_order  # type: ignore[attr-defined]
    oracle.backend_to_kernel_cls = backend_to_kernel_cls
    oracle._get_priority_backends = _get_priority_backends


def decide(moe_config: Any, weight_key: Any, activation_key: Any) -> Policy:
    """The policy for a layer, or stock with the reason why our class does not support it."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk

    cls = experts_class()
    standard = mk.FusedMoEActivationFormat.Standard
    supported, reason = cls.is_supported_config(cls, moe_config, weight_key, activation_key, standard)
    if not supported:
        status.fallback(OP, str(reason))
        return Policy("stock", str(reason))
    return _policy(moe_config)


def _policy(c: Any) -> Policy:
    from vllm.platforms import current_platform

    from blackwell_kernels.moe import case_of

    case = case_of(
        c.hidden_dim, c.intermediate_size_per_partition, c.num_experts, c.num_local_experts, c.experts_per_token
    )
    return policy(OP, case, current_platform.device_type)


def report(layer: str, moe_config: Any, quant_method: Any) -> None:
    """State which implementation serves a layer, once vLLM has chosen its experts' class."""
    chosen = _decided.get(id(moe_config))
    if chosen is None:
        reason = f"the experts are not FP8 in 128x128 blocks ({type(quant_method).__name__})"
        status.fallback(OP, reason)
        chosen = Policy("stock", reason)
    elif chosen.impl != "stock" and not issubclass(getattr(quant_method, "experts_cls", None) or object, Served):
        backend = getattr(getattr(quant_method, "fp8_backend", None), "value", "another backend")
        reason = f"vLLM was told to use {backend}: leave --moe-backend and VLLM_*DEEP_GEMM unset, or choose triton"
        status.fallback(OP, reason)
        chosen = Policy("stock", reason)
    status.record_layer(OP, layer, chosen.impl, chosen.reason)


class Served:
    """Marks our experts' classes."""


@cache
def experts_class() -> Any:
    """Our class for this platform."""
    from vllm.platforms import current_platform

    contracts.demand(OP, _MODULAR)
    if current_platform.is_cpu():
        return _cpu_class()
    contracts.demand(OP, _TRITON)
    return _gpu_class()


def _unsupported(c: Any, weight_key: Any, activation_key: Any) -> str | None:
    """Why neither class serves a layer with this FusedMoEConfig and these quantisation keys, or None."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8Dynamic128Sym, kFp8Static128BlockSym

    inter = c.intermediate_size_per_partition
    if (weight_key, activation_key) != (kFp8Static128BlockSym, kFp8Dynamic128Sym):
        return f"quantisation {weight_key} x {activation_key}, not FP8 in 128x128 blocks with dynamic 1x128 activations"
    if c.hidden_dim % 128 or inter % 128:
        return f"hidden size {c.hidden_dim} or intermediate size {inter} per rank is no multiple of 128"
    if c.activation != MoEActivation.SILU or c.swiglu_limit is not None or c.has_bias:
        return "only SwiGLU without limit and bias is supported"
    if c.is_lora_enabled:
        return "LoRA is not supported"
    if c.in_dtype != torch.bfloat16:
        return f"activations are {c.in_dtype}, not bfloat16"
    if c.moe_parallel_config.use_all2all_kernels:
        return "all-to-all dispatch (data-parallel attention) is not supported"
    return None


def _is_supported_config(cls: Any, base: Any, *config: Any) -> tuple[bool, str | None]:
    moe_config, weight_key, activation_key, _ = config
    reason = _unsupported(moe_config, weight_key, activation_key)
    if reason is not None:
        return False, reason
    return base.is_supported_config(cls, *config)


def _gpu_class() -> type:
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.platforms import current_platform

    class BlackwellFp8Experts(TritonExperts, Served):
        """Quantised inputs as TritonExperts takes them, so that each call can go either way."""

        def __init__(self, moe_config: Any, quant_config: Any, **kwargs: Any) -> None:
            super().__init__(moe_config, quant_config, **kwargs)
            self.bk_policy = _policy(moe_config)

        @staticmethod
        def is_supported_config(cls: Any, *config: Any) -> tuple[bool, str | None]:
            return _is_supported_config(cls, TritonExperts, *config)

        @staticmethod
        def _supports_current_device() -> bool:
            return current_platform.is_cuda() and current_platform.has_device_capability(90)

        @staticmethod
        def _supports_batch_invariance() -> bool:
            return False

        @property
        def expects_unquantized_inputs(self) -> bool:
            return False

        def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            tokens = hidden_states.shape[0]
            ours = self.bk_policy.use_ours(tokens)
            context.count(OP, context.name_of(self.moe_config), "triton" if ours else "stock", tokens)
            if not ours:
                return super().apply(output, hidden_states, *args, **kwargs)
            return _apply(self, output, hidden_states, *args, **kwargs)

    return BlackwellFp8Experts


def _cpu_class() -> type:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP

    class BlackwellCpuFp8Experts(mk.FusedMoEExpertsModular, Served):
        """bfloat16 inputs: our operator quantises them."""

        @staticmethod
        def activation_format() -> Any:
            return mk.FusedMoEActivationFormat.Standard

        @staticmethod
        def is_supported_config(cls: Any, *config: Any) -> tuple[bool, str | None]:
            return _is_supported_config(cls, mk.FusedMoEExpertsModular, *config)

        @staticmethod
        def _supports_current_device() -> bool:
            return True

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return False

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            return True

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return True

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            return True

        @property
        def expects_unquantized_inputs(self) -> bool:
            return True

        def finalize_weight_and_reduce_impl(self) -> Any:
            return TopKWeightAndReduceNoOP()

        def workspace_shapes(self, M: int, N: int, K: int, *args: Any, **kwargs: Any) -> tuple[tuple[int, ...], ...]:
            return (0,), (0,), (M, K)

        def apply(self, output: torch.Tensor, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            context.count(OP, context.name_of(self.moe_config), "cpu", hidden_states.shape[0])
            return _apply(self, output, hidden_states, *args, **kwargs)

    return BlackwellCpuFp8Experts


def _apply(
    experts: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Any = None,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    a1q_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    workspace13: torch.Tensor | None = None,
    workspace2: torch.Tensor | None = None,
    expert_tokens_meta: Any = None,
    apply_router_weight_on_input: bool = False,
) -> None:
    """output [M, H] bf16 = the weighted sum of each token's experts; the parameters are vLLM's."""
    torch.ops.blackwell_kernels.moe_fp8_block_scale(
        hidden_states,
        a1q_scale,
        w1,
        experts.w1_scale,
        w2,
        experts.w2_scale,
        topk_weights,
        topk_ids,
        expert_map,
        output,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )
