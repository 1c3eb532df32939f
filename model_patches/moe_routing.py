"""Routing: DeepSeek's grouped top-k and the softmax top-k by our operators, in the routers that vLLM serves with.

Why: vLLM's registered custom op for grouped top-k is dead code; the routers compute in place.
How: `_compute_routing` of each router class is wrapped; the experts' map, load balancing and dtype conversion stay with
vLLM's base class. `MoERunner.__init__` is wrapped to learn which layer a router and its experts belong to.
Upstream: the method is the same in 0.24, 0.32 and 0.33.
Remove when: vLLM's routers go through a registered operator.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

import torch

from blackwell_kernels import env, status
from blackwell_kernels.model_patches import context, contracts, moe_experts
from blackwell_kernels.select import Policy, policy

OP = "moe_routing"
ROUTERS = ("GroupedTopKRouter", "FusedTopKRouter", "CPURouter")  # the CPU's exists from 0.29 on


def wrap_runner(module: ModuleType) -> None:
    """Learn the layers' names, and report each layer; the experts' hook needs the names too."""
    cls = module.MoERunner
    stock = cls.__init__
    if hasattr(stock, "stock"):
        return
    contracts.demand(("moe", OP), module)

    @wraps(stock)
    def __init__(
        self: Any, layer_name: str, moe_config: Any, router: Any, routed_experts: Any, *args: Any, **kwargs: Any
    ) -> None:
        stock(self, layer_name, moe_config, router, routed_experts, *args, **kwargs)
        context.name(moe_config, layer_name)
        context.name(router, layer_name)
        off = env.DISABLE.get()
        if moe_experts.OP not in off:
            moe_experts.report(layer_name, moe_config, routed_experts.quant_method)
        if OP not in off and type(router).__name__ in ROUTERS:
            chosen = policy_of(router, moe_config.num_logical_experts)
            status.record_layer(OP, layer_name, chosen.impl, chosen.reason)

    __init__.stock = stock  # type: ignore[attr-defined]
    cls.__init__ = __init__


def wrap_router(module: ModuleType) -> None:
    """Route by our operators in the router class of this module."""
    cls = next(getattr(module, name) for name in ROUTERS if hasattr(module, name))
    stock = cls._compute_routing
    if hasattr(stock, "stock"):
        return
    contracts.demand(OP, module)

    @wraps(stock)
    def _compute_routing(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, experts = router_logits.shape
        chosen = policy_of(self, experts)
        ours = tokens > 0 and chosen.use_ours(tokens)
        impl = "stock" if not ours else "cpu" if chosen.impl == "cpu" else "triton"
        context.count(OP, context.name_of(self), impl, tokens)
        if not ours:
            return stock(self, hidden_states, router_logits, indices_type, **kwargs)
        return route(self, router_logits)

    _compute_routing.stock = stock  # type: ignore[attr-defined]
    cls._compute_routing = _compute_routing


def method(router: Any) -> str | None:
    """grouped, softmax, or None for a routing that our operators do not compute."""
    # the CPU's router serves every scheme, and says so in its attributes
    if getattr(router, "custom_routing_function", None) is not None:
        return None
    grouped = getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group"))
    if grouped:
        biased = router.scoring_func == "sigmoid" and router.e_score_correction_bias is not None
        return "grouped" if biased and getattr(router, "num_fused_shared_experts", 0) == 0 else None
    return "softmax" if router.scoring_func == "softmax" else None


def policy_of(router: Any, experts: int) -> Policy:
    """The policy of a router over `experts` experts, kept on it."""
    known = router.__dict__.setdefault("_bk_policies", {})
    if experts not in known:
        known[experts] = _policy(router, experts)
    return known[experts]


def _policy(router: Any, experts: int) -> Policy:
    from vllm.platforms import current_platform

    kind = method(router)
    groups = router.num_expert_group if kind == "grouped" else 1
    if kind is None:
        reason = f"{type(router).__name__} with {router.scoring_func} scores is not a routing that we compute"
    elif experts > 1024 or router.top_k > 64 or (kind == "grouped" and (experts % groups or experts < 2 * groups)):
        reason = f"top-{router.top_k} of {experts} experts in {groups} groups is not supported"
    else:
        from blackwell_kernels import moe  # noqa: F401  registers the operators

        return policy(OP, case(router, experts), current_platform.device_type)
    status.fallback(OP, reason)
    return Policy("stock", reason)


def case(router: Any, experts: int) -> dict[str, Any]:
    """The axes of the routing's tuned table."""
    return {"routing": method(router), "experts": experts, "topk": router.top_k}


def route(router: Any, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """router_logits [T, E] bf16 or f32 -> weights [T, K] f32 and ids [T, K] i32, as the router would choose them."""
    tokens = router_logits.shape[0]
    weights = torch.empty(tokens, router.top_k, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty(tokens, router.top_k, dtype=torch.int32, device=router_logits.device)
    if method(router) == "grouped":
        torch.ops.blackwell_kernels.moe_grouped_topk(
            router_logits,
            router.e_score_correction_bias,
            router.num_expert_group,
            router.topk_group,
            router.renormalize,
            router.routed_scaling_factor,
            weights,
            ids,
        )
    else:
        torch.ops.blackwell_kernels.moe_softmax_topk(router_logits, router.renormalize, weights, ids)
    padding = _padding(router, tokens)
    if padding is not None:
        weights.masked_fill_(padding, 0)
        ids.masked_fill_(padding, -1)
    return weights, ids


def _padding(router: Any, tokens: int) -> torch.Tensor | None:
    """[T, 1] mask of the rows that pad a CUDA graph's batch, where this vLLM (0.27 on) keeps them from the experts."""
    from vllm import envs
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not getattr(envs, "VLLM_MOE_SKIP_PADDING", False) or not getattr(router, "skip_padding", True):
        return None
    mask = getattr(get_forward_context(), "is_padding", None) if is_forward_context_available() else None
    return None if mask is None else mask[:tokens, None]
