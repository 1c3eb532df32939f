"""Writes into its input, which the next implementation reads."""

import torch


def solve(router_logits, renormalize):
    weights, ids = router_logits.float().softmax(-1).topk(10)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


def run(router_logits, renormalize):
    out = solve(router_logits, renormalize)
    router_logits[-1].fill_(0.0)
    return out
