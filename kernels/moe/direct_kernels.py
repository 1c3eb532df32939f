"""The experts for a few tokens, in two launches: no sort, no tensor cores, every (token, pick) pair for itself.

    h_p   = silu(gate) * up,  [gate; up] = W13_e quantise(x_t)            for each pair p = (t, k), e its expert
    out_t = sum over k of topk_weights[t, k] * W2_e quantise(h_p)

| tensor | shape      | dtype                                                                        |
|--------|------------|------------------------------------------------------------------------------|
| x      | [T, H]     | bf16, quantised here, or e4m3 with f32 scales [T, H/128] of any strides      |
| h      | [T * K, I] | f32; rows of pairs that have no expert here are never written                |

A program owns ROWS rows of a weight matrix and walks along them, GROUPS groups of 128 at a time: e4m3 weights become
f32 and meet activations into which every scale (and the router's weight) is folded; products stay where they are and
are added across only at the end. In the down kernel that sum runs over all picks of the token, so it is the combine.
Neighbouring programs take the same rows for all pairs: what two tokens of an expert both read, L2 has the second time.
Weights are copied asynchronously, STAGES steps ahead. With PDL the down kernel is launched when the last programs of
gate_up run, and asks L2 for the weights of its first picks before it waits for them.
Bound: weight bytes of the active experts, and two launches.
"""

import triton
import triton.language as tl

from blackwell_kernels.moe.align_kernels import _load_experts
from blackwell_kernels.moe.gemm_kernels import _ue8m0, prefetch

PREFETCHED = 4  # picks of a token that a waiting program asks L2 for: 512 bytes a row, 32 KB of 16 rows
GROUPS = 4  # groups of 128 a step, at most: a warp reads 512 bytes of a row at once


@triton.jit
def _quantized(x):
    """(e4m3 values of x [GROUPS, 128] as f32, their scales [GROUPS])."""
    scale, inverse = _ue8m0(tl.max(tl.abs(x), axis=1))
    return (x * inverse[:, None]).to(tl.float8e4nv).to(tl.float32), scale


@triton.jit
def _multiply(acc, w, x, scale, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """acc [ROWS, GROUPS * 8] + w * (scale * x), each 16 columns added up, for w [ROWS, GROUPS * 128], x [GROUPS, 128].

    A thread holds 16 columns of a row: it adds them up by itself.
    """
    row = tl.reshape(x * scale[:, None], [GROUPS * 128])
    products = tl.reshape(w.to(tl.float32) * row[None, :], [ROWS, GROUPS * 8, 16])
    return acc + tl.sum(products, axis=2)


@triton.jit(do_not_specialize=["pairs"])
def direct_gate_up_kernel(
    x_ptr,
    x_scale_ptr,  # None: x is bf16
    ids_ptr,
    map_ptr,
    w13_ptr,
    w13_scale_ptr,
    h_ptr,
    pairs,
    E,
    map_size,
    stride_x,
    stride_xs_t,
    stride_xs_g,
    hidden,
    inter,
    K,
    GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T * K * I/ROWS): ROWS columns of h for one pair."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    i_p = tl.program_id(0) % pairs
    i_r = tl.program_id(0) // pairs * ROWS
    expert = _load_experts(ids_ptr, map_ptr, i_p, pairs, E, map_size)
    if expert == E:
        return
    i_t = (i_p // K).to(tl.int64)
    o_r = tl.arange(0, ROWS)
    o_k = tl.arange(0, GROUPS * 128)
    groups = hidden // 128
    first = expert.to(tl.int64) * 2 * inter + i_r
    gate_row = first if GATE_FIRST else first + inter
    up_row = first + inter if GATE_FIRST else first
    o_w = o_r[:, None] * hidden + o_k[None, :]
    p_gate = w13_ptr + gate_row * hidden + o_w
    p_up = w13_ptr + up_row * hidden + o_w
    o_g = tl.arange(0, GROUPS)
    p_gate_scale = w13_scale_ptr + gate_row // 128 * groups + o_g
    p_up_scale = w13_scale_ptr + up_row // 128 * groups + o_g
    p_x = x_ptr + i_t * stride_x + o_g[:, None] * 128 + tl.arange(0, 128)[None, :]

    gate = tl.zeros([ROWS, GROUPS * 8], tl.float32)
    up = tl.zeros([ROWS, GROUPS * 8], tl.float32)
    for g in tl.range(0, groups, GROUPS, num_stages=STAGES):
        w_gate = tl.load(p_gate + g * 128)
        w_up = tl.load(p_up + g * 128)
        x = tl.load(p_x + g * 128).to(tl.float32)
        if x_scale_ptr is None:
            x, x_scale = _quantized(x)
        else:
            x_scale = tl.load(x_scale_ptr + i_t * stride_xs_t + (g + o_g) * stride_xs_g)
        gate = _multiply(gate, w_gate, x, x_scale * tl.load(p_gate_scale + g), ROWS, GROUPS)
        up = _multiply(up, w_up, x, x_scale * tl.load(p_up_scale + g), ROWS, GROUPS)

    gate = tl.sum(gate, axis=1)
    h = gate / (1.0 + tl.exp(-gate)) * tl.sum(up, axis=1)
    tl.store(h_ptr + i_p.to(tl.int64) * inter + i_r + o_r, h)


@triton.jit(do_not_specialize=["tokens"])
def direct_down_kernel(
    h_ptr,
    ids_ptr,
    map_ptr,
    weights_ptr,  # None: unweighted
    w2_ptr,
    w2_scale_ptr,
    out_ptr,
    tokens,
    E,
    map_size,
    stride_out,
    hidden,
    inter,
    K,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCHED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T * H/ROWS): ROWS columns of out for one token. A token without a pair here gets zeros."""
    i_t = tl.program_id(0) % tokens
    i_r = tl.program_id(0) // tokens * ROWS
    o_r = tl.arange(0, ROWS)
    o_g = tl.arange(0, GROUPS)
    o_h = o_g[:, None] * 128 + tl.arange(0, 128)[None, :]
    o_w = o_r[:, None] * inter + tl.arange(0, GROUPS * 128)[None, :]
    groups = inter // 128
    steps = groups // GROUPS
    # under expert parallelism most picks are elsewhere: only those that are here are walked
    o_k = tl.arange(0, BLOCK_K)
    experts = _load_experts(ids_ptr, map_ptr, i_t * K + o_k, (i_t + 1) * K, E, map_size)
    place = tl.where(experts < E, tl.cumsum((experts < E).to(tl.int32), axis=0), 0) - 1
    picks = tl.max(place, axis=0) + 1
    if PDL:
        o_line = tl.arange(0, ROWS * 4)  # of each row 512 bytes, or as many as it has
        for i in range(0, tl.minimum(picks, PREFETCHED)):
            expert = tl.sum(tl.where(place == i, experts, 0), axis=0)
            p_row = w2_ptr + (expert.to(tl.int64) * hidden + i_r + o_line // 4) * inter
            prefetch(p_row + tl.minimum(o_line % 4, groups - 1) * 128)
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([ROWS, GROUPS * 8], tl.float32)
    for i in tl.range(0, picks * steps, num_stages=STAGES):
        taken = place == i // steps
        g = i % steps * GROUPS
        i_p = i_t * K + tl.sum(tl.where(taken, o_k, 0), axis=0)
        row = tl.sum(tl.where(taken, experts, 0), axis=0).to(tl.int64) * hidden + i_r
        w = tl.load(w2_ptr + row * inter + g * 128 + o_w)
        h, scale = _quantized(tl.load(h_ptr + i_p.to(tl.int64) * inter + g * 128 + o_h))
        scale *= tl.load(w2_scale_ptr + row // 128 * groups + g + o_g)
        if weights_ptr is not None:
            scale *= tl.load(weights_ptr + i_p)
        acc = _multiply(acc, w, h, scale, ROWS, GROUPS)
    out = tl.sum(acc, axis=1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_t.to(tl.int64) * stride_out + i_r + o_r, out)
