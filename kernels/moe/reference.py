"""What the MoE operators compute, in plain torch at high precision. Frozen: the kernels are tested against this file.

FlashInfer-Bench definitions embed this file's text, so it imports nothing but torch. Routing is defined in float32
(ties are ties of float32 scores); the experts are evaluated in float64 by default.

Sources: DeepSeek-V3 technical report, section 2.1.2 (sigmoid scores, group-limited top-k) and 3.3 (1x128 and 128x128
scales); vLLM's grouped_topk, topk_softmax and fused_experts for rounding, epsilons and layouts.
"""

from __future__ import annotations

import torch


def moe_grouped_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    n_group: int,
    topk_group: int,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3 routing.

    router_logits [T, E], bias [E] or None -> (topk_weights [T, topk] f32, topk_ids [T, topk] i32), best first.
    Experts are chosen by sigmoid + bias among the `topk_group` groups whose two best experts sum highest; the weights
    are the sigmoids without bias. The lower index wins a tie. A NaN score is never preferred and weighs 0.
    """
    tokens, experts = router_logits.shape
    scores = router_logits.float().sigmoid()
    biased = scores if bias is None else scores + bias.float()
    biased = torch.where(biased.isnan(), float("-inf"), biased)
    scores = torch.where(scores.isnan(), 0.0, scores)

    group_scores = biased.view(tokens, n_group, experts // n_group).topk(2, dim=-1).values.sum(-1)
    groups = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, groups, False)
    dropped = dropped.repeat_interleave(experts // n_group, dim=1)

    # a stable sort by score, then one by "dropped": an expert of a kept group always precedes one of a dropped group
    order = biased.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(1, dropped.gather(1, order).to(torch.int8).sort(dim=-1, stable=True).indices)
    ids = order[:, :topk]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.to(torch.int32)


def moe_softmax_topk(
    router_logits: torch.Tensor, topk: int, renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the `topk` largest, best first; the lower index wins a tie.

    router_logits [T, E] -> (topk_weights [T, topk] f32, topk_ids [T, topk] i32). A row whose softmax is undefined
    (a NaN or +inf logit, or nothing but -inf) gives ids 0..topk-1 with weights 0.
    """
    logits = router_logits.float()
    top = logits.amax(-1, keepdim=True)  # NaN if any logit is
    logits = torch.where(top.isfinite(), logits, 0.0)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = torch.where(top.isfinite(), logits.softmax(-1), 0.0).gather(1, ids)
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return weights, ids.to(torch.int32)


def quantize_1x128(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, N] -> (e4m3 [T, N], power-of-two scale [T, N/128] f32), as vLLM quantises activations."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = (groups.abs().amax(-1) / 448.0).clamp_min(1e-10)
    mantissa, exponent = torch.frexp(scale)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    scale = torch.where(scale.isfinite(), power, scale)
    q = (groups / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return q.flatten(-2), scale


def moe_fp8_block_scale(
    hidden_states: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *,
    gate_first: bool = True,
    apply_router_weight_on_input: bool = False,
    requantize_intermediate: bool = True,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """y = sum_k weight_k * W2 (silu(gate) * up) with [gate; up] = W13 x, every operand e4m3 times its block scale.

    hidden_states [T, H] bf16 with a_scale None (quantised here) or e4m3 with a_scale [T, H/128]; w13 [E, 2I, H] e4m3,
    w13_scale [E, 2I/128, H/128]; w2 [E, H, I] e4m3, w2_scale [E, H/128, I/128]; topk_weights, topk_ids [T, K];
    expert_map [E_global] (-1: not here) or None -> [T, H] of `dtype`.
    gate_first False: the second half of W13's rows is the gate. apply_router_weight_on_input: the caller has already
    weighted the input, so nothing is weighted here. requantize_intermediate False: W2's input stays in `dtype`.
    """
    if a_scale is None:
        hidden_states, a_scale = quantize_1x128(hidden_states)
    x = hidden_states.to(dtype) * a_scale.to(dtype).repeat_interleave(128, dim=1)
    experts, hidden, inter = w2.shape
    local_ids = topk_ids.long()
    if expert_map is not None:
        known = (local_ids >= 0) & (local_ids < expert_map.numel())
        local_ids = torch.where(known, expert_map.long()[torch.where(known, local_ids, 0)], -1)

    y = torch.zeros(x.shape[0], hidden, dtype=dtype, device=x.device)
    for expert in range(experts):
        token, pick = (local_ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        w13_e = w13[expert].to(dtype) * w13_scale[expert].to(dtype).repeat_interleave(128, 0).repeat_interleave(128, 1)
        w2_e = w2[expert].to(dtype) * w2_scale[expert].to(dtype).repeat_interleave(128, 0).repeat_interleave(128, 1)
        first, second = (x[token] @ w13_e.T).split(inter, dim=1)
        gate, up = (first, second) if gate_first else (second, first)
        h = torch.nn.functional.silu(gate) * up
        if requantize_intermediate:
            q, scale = quantize_1x128(h)
            h = q.to(dtype) * scale.to(dtype).repeat_interleave(128, dim=1)
        weighted = h @ w2_e.T
        if not apply_router_weight_on_input:
            weighted = weighted * topk_weights[token, pick].to(dtype).unsqueeze(1)
        y.index_add_(0, token, weighted)
    return y
