"""Router kernels: logits [T, E] -> topk_weights [T, K] f32 and topk_ids [T, K] i32, one row a program.

    softmax: p = softmax(logits); the K largest; w = p_k (/ sum of the K)
    grouped: s = sigmoid(logits); the K largest s + bias within the best topk_group of n_group groups (a group's score
             is the sum of its two largest s + bias); w = s_k (/ (sum of the K + 1e-20)) * factor

| tensor        | shape  | dtype                                |
|---------------|--------|--------------------------------------|
| router_logits | [T, E] | bf16, f16 or f32, row stride >= E    |
| bias          | [E]    | bf16, f16 or f32                     |

Selection works on an order-preserving int32 image of the float32 score, so the lower index wins ties exactly and a
taken or absent entry has a key below that of -inf. Bound: launch and latency; bytes are negligible. A pick is the
largest key and then the lowest index that has it: a warp reduces an integer in one instruction, but (key, index) pairs,
as an argmax does, in ten shuffles one after the other. The weights are computed again from the chosen logits.
"""

import triton
import triton.language as tl

_ABSENT = tl.constexpr(-(2**31))
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _order_key(x):
    """int32 keys in the order of float32 x without NaN; -0 equals +0; all keys are above _ABSENT."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _choose(keys, o_e, o_k, K: tl.constexpr):
    """ids [BLOCK_K] of the K largest keys, best first, the lower index on ties; 0 beyond them."""
    ids = tl.zeros_like(o_k)
    for i_k in range(K):
        best = tl.min(tl.where(keys == tl.max(keys, axis=0), o_e, _NOWHERE), axis=0)
        keys = tl.where(o_e == best, _ABSENT, keys)
        ids = tl.where(o_k == i_k, best, ids)
    return ids


@triton.jit
def softmax_topk_kernel(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    stride_logits,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)
    present = o_e < E
    x = tl.load(logits_ptr + i_t * stride_logits + o_e, mask=present, other=float("-inf")).to(tl.float32)

    # a NaN or +inf logit, or nothing but -inf, leaves no softmax: ids 0..K-1 and weights 0, as vLLM answers
    nans = tl.sum((x != x).to(tl.int32), axis=0)
    top = tl.max(tl.where(x != x, float("-inf"), x), axis=0)
    defined = (nans == 0) & (top > float("-inf")) & (top < float("inf"))
    x = tl.where(defined & present, x, float("-inf"))
    top = tl.where(defined, top, 0.0)
    total = tl.maximum(tl.sum(tl.exp(x - top), axis=0), 1e-30)

    ids = _choose(tl.where(present, _order_key(x), _ABSENT), o_e, o_k, K)
    chosen = tl.load(logits_ptr + i_t * stride_logits + ids, mask=o_k < K, other=float("-inf")).to(tl.float32)
    weights = tl.exp(tl.where(defined, chosen, float("-inf")) - top) / total
    if RENORMALIZE:
        kept = tl.sum(weights, axis=0)
        weights = weights / tl.where(kept > 0, kept, 1.0)
    tl.store(ids_ptr + i_t * K + o_k, ids, mask=o_k < K)
    tl.store(weights_ptr + i_t * K + o_k, weights, mask=o_k < K)


@triton.jit
def _sigmoid_scores(p_logits, bias_ptr, experts, present):
    """(scores, scores + bias) of experts: NaN scores count as 0, NaN sums as -inf."""
    x = tl.load(p_logits + experts, mask=present, other=0.0).to(tl.float32)
    scores = 1.0 / (1.0 + tl.exp(-x))
    biased = scores
    if bias_ptr is not None:
        biased += tl.load(bias_ptr + experts, mask=present, other=0.0).to(tl.float32)
    return tl.where(scores == scores, scores, 0.0), tl.where(biased == biased, biased, float("-inf"))


@triton.jit
def grouped_topk_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    stride_logits,
    routed_scaling_factor,
    E: tl.constexpr,
    K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    MEMBERS: tl.constexpr = E // N_GROUP
    i_t = tl.program_id(0).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    o_k = tl.arange(0, BLOCK_K)
    p_logits = logits_ptr + i_t * stride_logits
    _, biased = _sigmoid_scores(p_logits, bias_ptr, o_e, o_e < E)
    keys = tl.where(o_e < E, _order_key(biased), _ABSENT)

    if TOPK_GROUP < N_GROUP:
        # loaded again as [groups, members]: reshaped to one axis, 3 groups of 10 gave absent experts on an H200
        o_g, o_m = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_M)
        present = (o_g[:, None] < N_GROUP) & (o_m[None, :] < MEMBERS)
        _, members = _sigmoid_scores(p_logits, bias_ptr, o_g[:, None] * MEMBERS + o_m[None, :], present)
        candidates = tl.where(present, members, float("-inf"))
        best = tl.argmax(tl.where(present, _order_key(members), _ABSENT), axis=1, tie_break_left=True)
        first = tl.max(candidates, axis=1)
        second = tl.max(tl.where(o_m[None, :] == best[:, None], float("-inf"), candidates), axis=1)
        group_keys = tl.where(o_g < N_GROUP, _order_key(first + second), _ABSENT)
        kept = tl.zeros([BLOCK_E], tl.int32)
        for _ in range(TOPK_GROUP):
            group = tl.argmax(group_keys, axis=0, tie_break_left=True)
            kept = tl.where(o_e // MEMBERS == group, 1, kept)
            group_keys = tl.where(o_g == group, _ABSENT, group_keys)
        keys = tl.where(kept > 0, keys, _ABSENT)

    ids = _choose(keys, o_e, o_k, K)
    weights, _ = _sigmoid_scores(p_logits, None, ids, o_k < K)
    weights = tl.where(o_k < K, weights, 0.0)
    if RENORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    tl.store(ids_ptr + i_t * K + o_k, ids, mask=o_k < K)
    tl.store(weights_ptr + i_t * K + o_k, weights * routed_scaling_factor, mask=o_k < K)
