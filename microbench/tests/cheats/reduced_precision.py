"""Computes in a type of half the width."""

import torch


def run(router_logits, renormalize):
    weights, ids = router_logits.bfloat16().softmax(-1).topk(10)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.float(), ids.to(torch.int32)
