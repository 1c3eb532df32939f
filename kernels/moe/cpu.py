"""CPU implementations: the reference's results at serving speed. Float32, active experts only, nothing cached."""

from __future__ import annotations

import torch

from blackwell_kernels.common.fp8 import dequantize_blocks, dequantize_groups, quantize_groups


def grouped_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    topk: int,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3 routing, see reference.moe_grouped_topk: weights [T, topk] f32, ids [T, topk] int64."""
    tokens, experts = router_logits.shape
    scores = router_logits.float().sigmoid()
    biased = scores if bias is None else scores + bias.float()
    if biased.isnan().any():
        biased = torch.where(biased.isnan(), -torch.inf, biased)
        scores = scores.nan_to_num(nan=0.0)
    candidates = torch.arange(experts).expand(tokens, -1)
    if topk_group < n_group:
        group_scores = biased.view(tokens, n_group, experts // n_group).topk(2, dim=-1).values.sum(-1)
        groups = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :topk_group].sort(dim=-1).values
        members = torch.arange(experts // n_group)
        # rising expert ids, so that the stable sort below breaks ties by the lower one
        candidates = (groups.unsqueeze(-1) * (experts // n_group) + members).flatten(1)
        biased = biased.gather(1, candidates)
    best = biased.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    ids = candidates.gather(1, best)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids


def softmax_topk(router_logits: torch.Tensor, topk: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax routing, see reference.moe_softmax_topk: weights [T, topk] f32, ids [T, topk] int64."""
    logits = router_logits.float()
    defined = logits.amax(-1, keepdim=True).isfinite()
    if not defined.all():
        logits = torch.where(defined, logits, 0.0)
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = logits.softmax(-1).gather(1, ids) * defined
    if renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return weights, ids


def fp8_block_scale(
    hidden_states: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    gate_first: bool,
) -> None:
    """See reference.moe_fp8_block_scale; topk_weights None: unweighted. Writes out [T, H]."""
    tokens, topk = topk_ids.shape
    experts, hidden, inter = w2.shape
    if a_scale is None:
        hidden_states, a_scale = quantize_groups(hidden_states)
    x = dequantize_groups(hidden_states, a_scale)
    ids = topk_ids.long().flatten()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.numel())
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)

    # one row a (token, pick), so that the sum over picks runs in their order whatever the experts' order
    parts = torch.zeros(tokens * topk, hidden)
    order = ids.argsort(stable=True)
    local, counts = ids[order].unique_consecutive(return_counts=True)
    for expert, pairs in zip(local.tolist(), order.split(counts.tolist()), strict=True):
        if not 0 <= expert < experts:
            continue
        w13_e = dequantize_blocks(w13[expert], w13_scale[expert])
        first, second = (x[pairs // topk] @ w13_e.T).split(inter, dim=1)
        gate, up = (first, second) if gate_first else (second, first)
        h = dequantize_groups(*quantize_groups(torch.nn.functional.silu(gate) * up))
        parts[pairs] = h @ dequantize_blocks(w2[expert], w2_scale[expert]).T
    parts = parts.view(tokens, topk, hidden)
    if topk_weights is None:
        out.copy_(parts.sum(1))
    else:
        # an absent pick's part is zero; its weight may be anything, NaN included
        absent = (ids < 0) | (ids >= experts)
        out.copy_(torch.einsum("tk,tkh->th", topk_weights.masked_fill(absent.view(tokens, topk), 0.0), parts))
