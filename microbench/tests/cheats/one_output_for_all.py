"""Returns the same memory each time: nobody else's output survives the next call."""

import torch

_out = {}


def solve(router_logits, renormalize):
    weights, ids = router_logits.float().softmax(-1).topk(10)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


def run(router_logits, renormalize):
    rows = len(router_logits)
    if rows not in _out:
        _out[rows] = torch.empty(rows, 10), torch.empty(rows, 10, dtype=torch.int32)
    for buffer, made in zip(_out[rows], solve(router_logits, renormalize), strict=True):
        buffer.copy_(made)
    return _out[rows]
