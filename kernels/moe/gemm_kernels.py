"""The experts: quantise activations, W13 with SwiGLU and requantisation, W2, weighted combine.

    q, s   = quantise(x)                                             (bf16 input only)
    h      = silu(gate) * up,  [gate; up] = W13_e x_t                for each sorted row r = (t, k), e its expert
    hq, hs = quantise(h)                                             in the same kernel's epilogue
    part_r = W2_e h_r                                                bf16
    out_t  = sum over k of topk_weights[t, k] * part[pair_row[t, k]] fp32

| tensor    | shape                  | dtype | scale                                                 |
|-----------|------------------------|-------|-------------------------------------------------------|
| x         | [T, H]                 | e4m3  | f32, one per 1x128, any strides                       |
| w13       | [E, 2I, H]             | e4m3  | f32 [E, 2I/128, H/128], gate rows first or second     |
| h         | [T * K, I] sorted rows | e4m3  | f32 [T * K, I/128], powers of two                     |
| w2        | [E, H, I]              | e4m3  | f32 [E, H/128, I/128]                                 |
| part      | [T * K, H] sorted rows | bf16  |                                                       |

Up to 32 tokens a tile, weight rows are the MMA's M (128) and tokens its N: few tokens pad little and still use wgmma
and tcgen05. From 64 on tokens are M: there a thread holds whole rows and so needs few of the tokens' scales. Each
product over 128 of the inner dimension is scaled and added in fp32 outside the tensor core. The grid is the largest
number of tiles that T, K and E allow; programs beyond the last tile leave at once, so nothing is read back by the host.
Rows beyond an expert's last are computed on another row's data and never stored.
With PDL a kernel is launched when the last programs of the one before it run, and waits for its end before it reads
what that one writes. Until then the down kernel asks L2 for its first weights; the tiles, which it reads for that, are
complete: the kernel before it waited for them.
Bound: weight bytes of the active experts for few tokens, FP8 tensor throughput for many. MEASURED.md has shares of it.
"""

import triton
import triton.language as tl


@triton.jit
def _ue8m0(amax):
    """(scale, 1 / scale): the smallest power of two >= max(amax / 448, 1e-10), exactly; NaN where amax is not finite.

    448 is 1.75 * 2^8, so the exponent is amax's less 8, one more where amax's mantissa exceeds 1.75.
    """
    bits = amax.to(tl.int32, bitcast=True)
    exponent = tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 94)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(bits < 0x7F800000, scale, float("nan")), inverse


@triton.jit
def quantize_groups(x_ptr, q_ptr, scale_ptr, stride_x, stride_scale, hidden, i_t, i_g, BLOCK_G: tl.constexpr):
    """The i_g-th BLOCK_G groups of row i_t: bf16 -> e4m3 and f32 scales."""
    i_t = i_t.to(tl.int64)
    o_g = i_g * BLOCK_G + tl.arange(0, BLOCK_G)
    o_h = o_g[:, None] * 128 + tl.arange(0, 128)[None, :]
    present = o_g < hidden // 128
    x = tl.load(x_ptr + i_t * stride_x + o_h, mask=present[:, None], other=0.0).to(tl.float32)
    scale, inverse = _ue8m0(tl.max(tl.abs(x), axis=1))
    tl.store(q_ptr + i_t * hidden + o_h, (x * inverse[:, None]).to(tl.float8e4nv), mask=present[:, None])
    tl.store(scale_ptr + i_t * stride_scale + o_g, scale, mask=present)


@triton.jit
def quantize_kernel(x_ptr, q_ptr, scale_ptr, stride_x, stride_scale, hidden, BLOCK_G: tl.constexpr):
    """bf16 [T, H] -> e4m3 [T, H] and f32 [T, H/128]; grid (T, ceil(H / 128 / BLOCK_G))."""
    quantize_groups(
        x_ptr, q_ptr, scale_ptr, stride_x, stride_scale, hidden, tl.program_id(0), tl.program_id(1), BLOCK_G
    )


@triton.jit
def prefetch(pointers):
    """Ask L2 for the line that each pointer is in."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def _load_tile(tiles_ptr, i_tile):
    """(expert, first row, end of the expert's rows) of a tile, see align_kernels.py; expert -1 beyond the last tile."""
    p_tile = tiles_ptr + i_tile * 3
    return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)


@triton.jit
def _scaled_dot(acc, x, w, scale, BLOCK_T: tl.constexpr):
    """acc + scale * x w^T for x [BLOCK_T, 128], w [128, 128], scale [BLOCK_T]; acc is transposed for small tiles."""
    if BLOCK_T <= 32:
        acc += tl.dot(w, tl.trans(x)) * scale[None, :]
    else:
        acc += tl.dot(x, tl.trans(w)) * scale[:, None]
    return acc


@triton.jit
def _zeros(BLOCK_T: tl.constexpr):
    if BLOCK_T <= 32:
        acc = tl.zeros([128, BLOCK_T], tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, 128], tl.float32)
    return acc


@triton.jit
def _rows_first(acc, BLOCK_T: tl.constexpr):
    if BLOCK_T <= 32:
        acc = tl.trans(acc)
    return acc


@triton.jit
def gate_up_kernel(
    x_ptr,
    x_scale_ptr,
    w13_ptr,
    w13_scale_ptr,
    h_ptr,
    h_scale_ptr,
    sorted_pairs_ptr,
    tiles_ptr,
    stride_x,
    stride_xs_t,
    stride_xs_g,
    hidden,
    inter,
    K,
    GATE_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUB_TILES: tl.constexpr,
    X_IN_REGISTERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * SUB_TILES * I/128): 128 columns of h for BLOCK_T rows, so a program owns whole 1x128 groups.

    Two accumulators of 128 rows spill, so a tile of 128 may be taken in SUB_TILES programs of 64.
    X_IN_REGISTERS: x is given as uint8. Triton leaves in shared memory what it loads for tl.dot as it is; what it has
    to reinterpret it reads into registers, once for both products.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_blocks = inter // 128
    i_n = tl.program_id(0) % n_blocks
    i_tile = tl.program_id(0) // n_blocks
    i_e, row, row_end = _load_tile(tiles_ptr, i_tile // SUB_TILES)
    row += i_tile % SUB_TILES * BLOCK_T
    if (i_e < 0) | (row >= row_end):
        return
    o_r = row + tl.arange(0, BLOCK_T)
    o_n = tl.arange(0, 128)
    o_k = tl.arange(0, 128)
    i_t = (tl.load(sorted_pairs_ptr + o_r, mask=o_r < row_end, other=0) // K).to(tl.int64)

    i_gate = i_n if GATE_FIRST else i_n + n_blocks
    i_up = i_n + n_blocks if GATE_FIRST else i_n
    groups = hidden // 128
    # 64-bit arithmetic on scalars only: a 128-row block of weights fits 32-bit offsets
    expert_row = i_e.to(tl.int64) * 2 * n_blocks
    gate_ptr = w13_ptr + (expert_row + i_gate) * 128 * hidden
    up_ptr = w13_ptr + (expert_row + i_up) * 128 * hidden
    gate_scale_ptr = w13_scale_ptr + (expert_row + i_gate) * groups
    up_scale_ptr = w13_scale_ptr + (expert_row + i_up) * groups
    o_w = o_n[:, None] * hidden + o_k[None, :]
    p_x = x_ptr + i_t[:, None] * stride_x + o_k[None, :]
    p_x_scale = x_scale_ptr + i_t * stride_xs_t

    gate = _zeros(BLOCK_T)
    up = _zeros(BLOCK_T)
    # Triton pipelines what feeds tl.dot, not the scales: they are read one step ahead here
    x_scale, gate_scale, up_scale = tl.load(p_x_scale), tl.load(gate_scale_ptr), tl.load(up_scale_ptr)
    for g in range(groups):
        ahead = tl.minimum(g + 1, groups - 1)
        x_scale_ahead = tl.load(p_x_scale + ahead * stride_xs_g)
        gate_scale_ahead, up_scale_ahead = tl.load(gate_scale_ptr + ahead), tl.load(up_scale_ptr + ahead)
        x = tl.load(p_x + g * 128)
        if X_IN_REGISTERS:
            x = x.to(tl.float8e4nv, bitcast=True)
        gate = _scaled_dot(gate, x, tl.load(gate_ptr + g * 128 + o_w), x_scale * gate_scale, BLOCK_T)
        up = _scaled_dot(up, x, tl.load(up_ptr + g * 128 + o_w), x_scale * up_scale, BLOCK_T)
        x_scale, gate_scale, up_scale = x_scale_ahead, gate_scale_ahead, up_scale_ahead

    h = _rows_first(gate / (1.0 + tl.exp(-gate)) * up, BLOCK_T)
    scale, inverse = _ue8m0(tl.max(tl.abs(h), axis=1))
    q = (h * inverse[:, None]).to(tl.float8e4nv)
    o_r = o_r.to(tl.int64)
    tl.store(h_ptr + o_r[:, None] * inter + i_n * 128 + o_n[None, :], q, mask=(o_r < row_end)[:, None])
    tl.store(h_scale_ptr + o_r * n_blocks + i_n, scale, mask=o_r < row_end)


@triton.jit
def down_kernel(
    h_ptr,
    h_scale_ptr,
    w2_ptr,
    w2_scale_ptr,
    part_ptr,
    tiles_ptr,
    hidden,
    inter,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * H/128): 128 columns of part for BLOCK_T sorted rows."""
    n_blocks = hidden // 128
    i_n = tl.program_id(0) % n_blocks
    i_e, row, row_end = _load_tile(tiles_ptr, tl.program_id(0) // n_blocks)
    groups = inter // 128
    o_n = tl.arange(0, 128)
    o_k = tl.arange(0, 128)
    weight_row = i_e.to(tl.int64) * n_blocks + i_n
    w_ptr = w2_ptr + weight_row * 128 * inter
    w_scale_ptr = w2_scale_ptr + weight_row * groups
    o_w = o_n[:, None] * inter + o_k[None, :]
    if PDL:
        if i_e >= 0:
            for g in range(0, tl.minimum(groups, 2)):
                prefetch(w_ptr + g * 128 + o_n * inter)
        # programs without a tile wait as well: the kernel's end has to mean the end of those before it
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if i_e < 0:
        return
    o_r = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
    present = o_r < row_end
    # rows beyond the end may lie beyond the buffer: read the tile's first row instead
    i_r = tl.where(present, o_r, row)
    p_h = h_ptr + i_r[:, None] * inter + o_k[None, :]
    p_h_scale = h_scale_ptr + i_r * groups

    acc = _zeros(BLOCK_T)
    h_scale, w_scale = tl.load(p_h_scale), tl.load(w_scale_ptr)
    for g in range(groups):
        ahead = tl.minimum(g + 1, groups - 1)
        h_scale_ahead, w_scale_ahead = tl.load(p_h_scale + ahead), tl.load(w_scale_ptr + ahead)
        acc = _scaled_dot(acc, tl.load(p_h + g * 128), tl.load(w_ptr + g * 128 + o_w), h_scale * w_scale, BLOCK_T)
        h_scale, w_scale = h_scale_ahead, w_scale_ahead
    p_part = part_ptr + o_r[:, None] * hidden + i_n * 128 + o_n[None, :]
    tl.store(p_part, _rows_first(acc, BLOCK_T).to(part_ptr.dtype.element_ty), mask=present[:, None])


@triton.jit
def combine_kernel(
    part_ptr,
    weights_ptr,  # None: unweighted
    pair_row_ptr,
    out_ptr,
    stride_out,
    hidden,
    K,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, ceil(H / BLOCK_H)). A token without a pair here gets zeros. All picks' rows are read at once."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_k = tl.arange(0, BLOCK_K)
    row = tl.load(pair_row_ptr + i_t * K + o_k, mask=o_k < K, other=-1).to(tl.int64)
    here = row >= 0
    p_part = part_ptr + row[:, None] * hidden + o_h[None, :]
    part = tl.load(p_part, mask=here[:, None] & (o_h < hidden)[None, :], other=0.0).to(tl.float32)
    if weights_ptr is not None:
        # an absent pick's weight may be anything, NaN included
        weights = tl.load(weights_ptr + i_t * K + o_k, mask=o_k < K, other=0.0)
        part *= tl.where(here, weights, 0.0)[:, None]
    out = tl.sum(part, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + i_t * stride_out + o_h, out, mask=o_h < hidden)
