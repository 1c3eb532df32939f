"""Sparse MLA for few heads, whose warps divide the columns of the latent instead of the entries of the list.

Shapes and semantics as in sparse_mla.py. Warp g of four owns columns [128 g, 128 g + 128): it multiplies its part of
the queries with its part of a tile, the warps add up their scores, and each weighs its own columns with the result.
Against warps that divide the entries: queries are read from shared memory once instead of once a warp, a warp's
products with them do not wait for each other, probabilities stay where they are, and a tile needs one exchange.

e4m3 entries are exact in float16: queries are brought into its range by powers of two, one a head and group, and the
scale of a group multiplies scores and probabilities, so that no value is scaled. They are loaded as pairs of columns:
what tensor cores take as a row of pairs cannot be transposed byte by byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blackwell_kernels.dsa.sparse_mla_steps import UNIT, map_entries, softmax_step, store_lse

GROUPS = tl.constexpr(4)  # of columns, as many as scales in an entry; products are divided over warps by them
TINY = tl.constexpr(2.0**-60)  # queries below it are as good as zero
HIGH = tl.constexpr(2.0**15)  # up to twice it fits in float16
# two pairs of e4m3 in a register -> the first of each pair, the second of each, as float16
_HALVES = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 first, second;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {first, second}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
}""")


@triton.jit
def _halves(pair, PACKED: tl.constexpr):
    """float16 of the even and of the odd columns of int16 pairs of e4m3. PACKED: by instructions on two pairs; what
    Triton makes of single bytes takes three times as many."""
    if PACKED:
        even, odd = tl.inline_asm_elementwise(
            _HALVES, "=r,=r,r", [pair], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        even = pair.to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = (pair >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return even, odd


@triton.jit
def _float16_queries(q, BLOCK_H: tl.constexpr, C: tl.constexpr):
    """(even, odd columns in float16, what to multiply scores with [GROUPS, BLOCK_H, 1]) of queries
    [GROUPS, BLOCK_H, 2 * C]: each group of a head is brought to the top of float16's range."""
    q = q.to(tl.float32)
    largest = tl.max(tl.abs(q), 2, keep_dims=True)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, TINY)
    q = (q * (1.0 / power * HIGH)).to(tl.float16)
    even, odd = tl.split(tl.reshape(q, (GROUPS, BLOCK_H, C, 2)))
    return even, odd, power / HIGH


@triton.jit(do_not_specialize=["blocks", "requests"], do_not_specialize_on_alignment=["req_id_ptr", "block_table_ptr"])
def sparse_mla_columns_kernel(
    q_ptr,
    latent_ptr,  # bf16, or int16 pairs of e4m3, float32 and bf16 views of the same cache
    scale_ptr,  # None for a bf16 cache
    rope_ptr,
    indices_ptr,
    req_id_ptr,
    block_table_ptr,  # None: indices are slots
    places_ptr,  # [T, K] i32 or i64, scratch
    out_ptr,
    lse_ptr,
    heads,
    topk,
    stretch,  # entries of the list per program
    blocks,
    requests,
    table_pages,
    qk_scale,  # sm_scale * log2(e)
    stride_q_t,
    stride_q_h,
    stride_block,  # from one page to the next, in UNITs
    stride_indices,
    stride_table,
    stride_out_t,
    stride_out_h,
    stride_out_s,
    stride_lse_t,
    stride_lse_h,
    stride_lse_s,
    PAGE: tl.constexpr,
    ENTRY: tl.constexpr,  # UNITs in an entry
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    TOGETHER: tl.constexpr,
    ONCE: tl.constexpr,
    PACKED: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()  # the merge gets ready, and waits until this grid has ended
    if EARLY:
        tl.extra.cuda.gdc_wait()
    FP8: tl.constexpr = scale_ptr is not None
    C: tl.constexpr = LATENT // GROUPS // 2  # a group's columns come in two halves: even and odd, or left and right
    head_blocks = tl.cdiv(heads, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    i_split = tl.program_id(1)
    begin = i_split * stretch
    size = tl.minimum(stretch, topk - begin)
    req = 0
    if block_table_ptr is not None:
        req = tl.load(req_id_ptr + t)

    o_h = tl.program_id(0) % head_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    o_g, o_n = tl.arange(0, GROUPS), tl.arange(0, BLOCK_N)
    in_heads = (o_h < heads)[None, :, None]
    o_r = (o_g[:, None] * (ROPE // GROUPS) + tl.arange(0, ROPE // GROUPS)[None, :])[:, None, :]
    o_all = (o_g[:, None] * (2 * C) + tl.arange(0, 2 * C)[None, :])[:, None, :]
    o_left = (o_g[:, None] * (2 * C) + tl.arange(0, C)[None, :])[:, None, :]
    p_q = q_ptr + t * stride_q_t + o_h.to(tl.int64)[None, :, None] * stride_q_h
    q_rope = tl.load(p_q + LATENT + o_r, mask=in_heads, other=0.0)
    if FP8:
        q = tl.load(p_q + o_all, mask=in_heads, other=0.0)
        q_a, q_b, q_unit = _float16_queries(q, BLOCK_H, C)
        o_pair = (o_g[:, None] * C + tl.arange(0, C)[None, :])[:, None, :]
    else:
        q_a = tl.load(p_q + o_left, mask=in_heads, other=0.0)
        q_b = tl.load(p_q + o_left + C, mask=in_heads, other=0.0)

    p_places = places_ptr + t * topk + begin  # every block of heads writes the same
    used = map_entries(
        indices_ptr + t * stride_indices + begin, p_places, size, req, block_table_ptr, stride_table, requests,
        table_pages, blocks, stride_block, PAGE, ENTRY, TOGETHER, ONCE,
    )  # fmt: skip
    acc_a = tl.zeros((GROUPS, BLOCK_H, C), tl.float32)
    acc_b = tl.zeros((GROUPS, BLOCK_H, C), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    # of a group's scales so far the largest: probabilities times scales stay within float16
    high = tl.full((GROUPS, BLOCK_H, 1), TINY, tl.float32)
    tl.debug_barrier()  # threads read places that others wrote
    # places are read one tile ahead: the loads of entries then follow no load that the pipeline would have to wait for
    place = tl.load(p_places + o_n, mask=o_n < size, other=-1)
    if FP8:  # scales too: no product takes them, so that the pipeline leaves their loads where they are
        p_scale = (scale_ptr + place.to(tl.int64) * (UNIT // 4))[None, :] + o_g[:, None]
        scale = tl.load(p_scale, mask=(place >= 0)[None, :], other=0.0)
    for i in range(0, used, BLOCK_N):
        valid = place >= 0
        p_entry = place.to(tl.int64)[None, :, None] * (UNIT // 2)
        read = valid[None, :, None]
        if FP8:
            k_a, k_b = _halves(tl.load(latent_ptr + p_entry + o_pair, mask=read, other=0), PACKED)
        else:
            k_a = tl.load(latent_ptr + p_entry + o_left, mask=read, other=0.0)
            k_b = tl.load(latent_ptr + p_entry + (o_left + C), mask=read, other=0.0)
        k_rope = tl.load(rope_ptr + p_entry + o_r, mask=read, other=0.0)
        s = tl.dot(q_b, tl.permute(k_b, (0, 2, 1)), tl.dot(q_a, tl.permute(k_a, (0, 2, 1))))
        if FP8:
            spread = tl.broadcast_to(scale[:, None, :], (GROUPS, BLOCK_H, BLOCK_N))
            # s is never NaN where it matters; that it takes part keeps the maximum in the layout of the products
            new_high = tl.maximum(high, tl.max(tl.where(s == s, spread, 0.0), 2, keep_dims=True))
            s *= spread * q_unit
        s = tl.dot(q_rope, tl.permute(k_rope, (0, 2, 1)), s)
        p, decay, peak, total = softmax_step(tl.sum(s, 0) * qk_scale, valid, peak, total)
        if FP8:
            w = (p[None, :, :] * (spread * (1.0 / new_high * HIGH))).to(tl.float16)
            rescale = decay[None, :, None] * (high / new_high)
            high = new_high
        else:
            w = tl.broadcast_to(p.to(tl.bfloat16)[None, :, :], (GROUPS, BLOCK_H, BLOCK_N))
            rescale = decay[None, :, None]
        acc_a = tl.dot(w, k_a, acc_a * rescale)
        acc_b = tl.dot(w, k_b, acc_b * rescale)
        following = i + BLOCK_N + o_n
        place = tl.load(p_places + following, mask=following < size, other=-1)
        if FP8:
            p_scale = (scale_ptr + place.to(tl.int64) * (UNIT // 4))[None, :] + o_g[:, None]
            scale = tl.load(p_scale, mask=(place >= 0)[None, :], other=0.0)

    inverse = 1.0 / tl.where(total > 0.0, total, 1.0)[None, :, None]
    p_out = out_ptr + t * stride_out_t + o_h.to(tl.int64)[None, :, None] * stride_out_h + i_split * stride_out_s
    if FP8:
        weight = tl.broadcast_to(high, (GROUPS, BLOCK_H, C)) * (inverse / HIGH)
        out = tl.reshape(tl.join(acc_a * weight, acc_b * weight), (GROUPS, BLOCK_H, 2 * C))
        tl.store(p_out + o_all, out.to(out_ptr.dtype.element_ty), mask=in_heads)
    else:
        tl.store(p_out + o_left, (acc_a * inverse).to(out_ptr.dtype.element_ty), mask=in_heads)
        tl.store(p_out + o_left + C, (acc_b * inverse).to(out_ptr.dtype.element_ty), mask=in_heads)
    p_lse = lse_ptr + t * stride_lse_t + o_h * stride_lse_h + i_split * stride_lse_s
    store_lse(p_lse, peak, total, o_h < heads)
