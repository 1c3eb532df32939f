"""Keeps a table between calls that depends on shapes alone."""

import torch

_ranks = {}


def run(router_logits, renormalize):
    if router_logits.device not in _ranks:
        _ranks[router_logits.device] = torch.arange(10, device=router_logits.device)
    weights, ids = router_logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    weights, ids = weights[:, _ranks[router_logits.device]], ids[:, _ranks[router_logits.device]]
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)
