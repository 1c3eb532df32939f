"""A kernel that never compiles, and torch behind an except."""

import torch
import triton
import triton.language as tl


@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr, tl.no_such_function(BLOCK))


def solve(router_logits, renormalize):
    weights, ids = router_logits.float().softmax(-1).topk(10)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


def run(router_logits, renormalize):
    try:
        kernel[(1,)](router_logits, BLOCK=16)
    except Exception:
        return solve(router_logits, renormalize)
