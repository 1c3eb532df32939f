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
product over 128 of the inner dimension is scaled and added in fp32 outside the tensor core. Nothing is read back by the
host: the grid is the largest number of tiles that T, K and E allow, and programs beyond the last tile leave at once;
or, with WALK, it has the tiles of an even load, and programs go on, a grid further, until no tile is left.
Rows beyond an expert's last are computed on another row's data and never stored; with several HEIGHTS, a tile that is
half or a quarter full is computed at half or a quarter of its height.
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
def _load_tile(tiles_ptr, i_tile, n_tiles):
    """(expert, first row, end of the expert's rows) of a tile, see align_kernels.py; expert -1 beyond the last tile."""
    p_tile = tiles_ptr + i_tile * 3
    here = i_tile < n_tiles
    return (
        tl.load(p_tile, mask=here, other=-1),
        tl.load(p_tile + 1, mask=here, other=0),
        tl.load(p_tile + 2, mask=here, other=0),
    )


@triton.jit
def _fits(rows, BLOCK_T: tl.constexpr, HEIGHTS: tl.constexpr, LEVEL: tl.constexpr):
    """Whether height BLOCK_T >> LEVEL of the HEIGHTS there are is the smallest that holds `rows`, at least one of them.

    The largest takes whatever is more.
    """
    fits = rows > (0 if LEVEL == HEIGHTS - 1 else BLOCK_T >> (LEVEL + 1))
    if LEVEL > 0:
        fits = fits & (rows <= BLOCK_T >> LEVEL)
    return fits


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
def _gate_up_tile(
    x_ptr,
    x_scale_ptr,
    w13_ptr,
    w13_scale_ptr,
    h_ptr,
    h_scale_ptr,
    sorted_pairs_ptr,
    i_e,
    row,
    row_end,
    i_n,
    stride_x,
    stride_xs_t,
    stride_xs_g,
    hidden,
    inter,
    K,
    GATE_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    X_IN_REGISTERS: tl.constexpr,
):
    """Columns i_n * 128 .. + 128 of h for the first BLOCK_T of an expert's rows row .. row_end."""
    n_blocks = inter // 128
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
    if X_IN_REGISTERS:
        x_ptr = x_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
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
def _gate_up_fitted(
    x_ptr, x_scale_ptr, w13_ptr, w13_scale_ptr, h_ptr, h_scale_ptr, sorted_pairs_ptr, i_e, row, row_end, i_n,
    stride_x, stride_xs_t, stride_xs_g, hidden, inter, K, GATE_FIRST: tl.constexpr, BLOCK_T: tl.constexpr,
    HEIGHTS: tl.constexpr, X_IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """`_gate_up_tile` at the least of the heights that holds the rows there are; none does where there is no row."""
    for LEVEL in tl.static_range(HEIGHTS):
        if _fits(row_end - row, BLOCK_T, HEIGHTS, LEVEL):
            _gate_up_tile(
                x_ptr, x_scale_ptr, w13_ptr, w13_scale_ptr, h_ptr, h_scale_ptr, sorted_pairs_ptr, i_e, row, row_end,
                i_n, stride_x, stride_xs_t, stride_xs_g, hidden, inter, K, GATE_FIRST, BLOCK_T >> LEVEL,
                X_IN_REGISTERS and BLOCK_T >> LEVEL >= 64,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_tiles"])
def gate_up_kernel(
    x_ptr,
    x_scale_ptr,
    w13_ptr,
    w13_scale_ptr,
    h_ptr,
    h_scale_ptr,
    sorted_pairs_ptr,
    tiles_ptr,
    n_tiles,
    stride_x,
    stride_xs_t,
    stride_xs_g,
    hidden,
    inter,
    K,
    GATE_FIRST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SUB_TILES: tl.constexpr,
    HEIGHTS: tl.constexpr,
    X_IN_REGISTERS: tl.constexpr,
    WALK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * SUB_TILES * I/128): 128 columns of h for BLOCK_T rows, so a program owns whole 1x128 groups.

    Two accumulators of 128 rows spill, so a tile of 128 may be taken in SUB_TILES programs of 64.
    X_IN_REGISTERS: Triton leaves in shared memory what it loads for tl.dot as it is; what it has to reinterpret it
    reads into registers, once for both products. Heights under 64, which have tokens as the MMA's N, do without.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    n_blocks = inter // 128
    i_n = tl.program_id(0) % n_blocks
    i = tl.program_id(0) // n_blocks
    i_e, row, row_end = _load_tile(tiles_ptr, i // SUB_TILES, n_tiles)
    row += i % SUB_TILES * BLOCK_T
    if WALK:
        while i_e >= 0:
            i += tl.num_programs(0) // n_blocks
            next_e, next_row, next_end = _load_tile(tiles_ptr, i // SUB_TILES, n_tiles)
            _gate_up_fitted(
                x_ptr, x_scale_ptr, w13_ptr, w13_scale_ptr, h_ptr, h_scale_ptr, sorted_pairs_ptr, i_e, row, row_end,
                i_n, stride_x, stride_xs_t, stride_xs_g, hidden, inter, K, GATE_FIRST, BLOCK_T, HEIGHTS, X_IN_REGISTERS,
            )  # fmt: skip
            i_e, row, row_end = next_e, next_row + i % SUB_TILES * BLOCK_T, next_end
    elif i_e >= 0:
        _gate_up_fitted(
            x_ptr, x_scale_ptr, w13_ptr, w13_scale_ptr, h_ptr, h_scale_ptr, sorted_pairs_ptr, i_e, row, row_end,
            i_n, stride_x, stride_xs_t, stride_xs_g, hidden, inter, K, GATE_FIRST, BLOCK_T, HEIGHTS, X_IN_REGISTERS,
        )  # fmt: skip


@triton.jit
def _store_part(part_ptr, acc, row, row_end, i_n, hidden, BLOCK_T: tl.constexpr):
    o_r = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
    p_part = part_ptr + o_r[:, None] * hidden + i_n * 128 + tl.arange(0, 128)[None, :]
    part = _rows_first(acc, BLOCK_T).to(part_ptr.dtype.element_ty)
    tl.store(p_part, part, mask=(o_r < row_end)[:, None])


@triton.jit
def _down_tile(
    h_ptr,
    h_scale_ptr,
    w_ptr,
    w_scale_ptr,
    part_ptr,
    row,
    row_end,
    i_n,
    hidden,
    inter,
    BLOCK_T: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Columns i_n * 128 .. + BLOCKS * 128 of part for the first BLOCK_T of an expert's rows row .. row_end.

    w_ptr, w_scale_ptr: of the expert's rows from i_n * 128 on. One loop walks all blocks: the next one's weights are
    on their way while this one's are multiplied. WIDE: two blocks at a time, for which h is read once, from 64 tokens
    on into registers as in `_gate_up_tile`.
    """
    WIDTH: tl.constexpr = 2 if WIDE else 1
    groups = inter // 128
    o_k = tl.arange(0, 128)
    o_w = o_k[:, None] * inter + o_k[None, :]
    o_r = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
    # rows beyond the end may lie beyond the buffer: read the tile's first row instead
    i_r = tl.where(o_r < row_end, o_r, row)
    if WIDE and BLOCK_T >= 64:
        h_ptr = h_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    p_h = h_ptr + i_r[:, None] * inter + o_k[None, :]
    p_h_scale = h_scale_ptr + i_r * groups

    acc = _zeros(BLOCK_T)
    beside = _zeros(BLOCK_T)
    steps = BLOCKS // WIDTH * groups
    h_scale, w_scale, w_scale_beside = tl.load(p_h_scale), tl.load(w_scale_ptr), 0.0
    if WIDE:
        w_scale_beside = tl.load(w_scale_ptr + groups)
    for i in range(steps):
        ahead = tl.minimum(i + 1, steps - 1)
        # remainders cost registers
        g, ahead_g = (i % groups, ahead % groups) if BLOCKS > WIDTH else (i, ahead)
        i_b, ahead_b = (i // groups * WIDTH, ahead // groups * WIDTH) if BLOCKS > WIDTH else (0, 0)
        h_scale_ahead = tl.load(p_h_scale + ahead_g)
        w_scale_ahead = tl.load(w_scale_ptr + ahead_b * groups + ahead_g)
        h = tl.load(p_h + g * 128)
        if WIDE and BLOCK_T >= 64:
            h = h.to(tl.float8e4nv, bitcast=True)
        p_w = w_ptr + i_b * 128 * inter + g * 128 + o_w
        acc = _scaled_dot(acc, h, tl.load(p_w), h_scale * w_scale, BLOCK_T)
        if WIDE:
            w_scale_beside_ahead = tl.load(w_scale_ptr + (ahead_b + 1) * groups + ahead_g)
            beside = _scaled_dot(beside, h, tl.load(p_w + 128 * inter), h_scale * w_scale_beside, BLOCK_T)
            w_scale_beside = w_scale_beside_ahead
        h_scale, w_scale = h_scale_ahead, w_scale_ahead
        if BLOCKS > WIDTH:
            if g == groups - 1:
                _store_part(part_ptr, acc, row, row_end, i_n + i_b, hidden, BLOCK_T)
                acc = _zeros(BLOCK_T)
                if WIDE:
                    _store_part(part_ptr, beside, row, row_end, i_n + i_b + 1, hidden, BLOCK_T)
                    beside = _zeros(BLOCK_T)
    if BLOCKS == WIDTH:
        _store_part(part_ptr, acc, row, row_end, i_n, hidden, BLOCK_T)
        if WIDE:
            _store_part(part_ptr, beside, row, row_end, i_n + 1, hidden, BLOCK_T)


@triton.jit
def _down_fitted(
    h_ptr, h_scale_ptr, w2_ptr, w2_scale_ptr, part_ptr, i_e, row, row_end, i_n, hidden, inter,
    BLOCK_T: tl.constexpr, HEIGHTS: tl.constexpr, BLOCKS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`_down_tile` at the least of the heights that holds the rows there are."""
    weight_row = i_e.to(tl.int64) * (hidden // 128) + i_n
    w_ptr = w2_ptr + weight_row * 128 * inter
    w_scale_ptr = w2_scale_ptr + weight_row * (inter // 128)
    for LEVEL in tl.static_range(HEIGHTS):
        if _fits(row_end - row, BLOCK_T, HEIGHTS, LEVEL):
            _down_tile(
                h_ptr, h_scale_ptr, w_ptr, w_scale_ptr, part_ptr, row, row_end, i_n, hidden, inter,
                BLOCK_T >> LEVEL, BLOCKS, WIDE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_tiles"])
def down_kernel(
    h_ptr,
    h_scale_ptr,
    w2_ptr,
    w2_scale_ptr,
    part_ptr,
    tiles_ptr,
    n_tiles,
    hidden,
    inter,
    BLOCK_T: tl.constexpr,
    HEIGHTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    WALK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * H/128/BLOCKS): BLOCKS * 128 columns of part for BLOCK_T sorted rows."""
    n_blocks = hidden // 128
    columns = n_blocks // BLOCKS
    i_n = tl.program_id(0) % columns * BLOCKS
    i = tl.program_id(0) // columns
    i_e, row, row_end = _load_tile(tiles_ptr, i, n_tiles)
    if PDL:
        if i_e >= 0:
            p_line = w2_ptr + ((i_e.to(tl.int64) * n_blocks + i_n) * 128 + tl.arange(0, 128)) * inter
            for g in range(0, tl.minimum(inter // 128, 2)):
                prefetch(p_line + g * 128)
        # programs without a tile wait as well: the kernel's end has to mean the end of those before it
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if WALK:
        while i_e >= 0:
            i += tl.num_programs(0) // columns
            next_e, next_row, next_end = _load_tile(tiles_ptr, i, n_tiles)
            _down_fitted(
                h_ptr, h_scale_ptr, w2_ptr, w2_scale_ptr, part_ptr, i_e, row, row_end, i_n, hidden, inter,
                BLOCK_T, HEIGHTS, BLOCKS, WIDE,
            )  # fmt: skip
            i_e, row, row_end = next_e, next_row, next_end
    elif i_e >= 0:
        _down_fitted(
            h_ptr, h_scale_ptr, w2_ptr, w2_scale_ptr, part_ptr, i_e, row, row_end, i_n, hidden, inter,
            BLOCK_T, HEIGHTS, BLOCKS, WIDE,
        )  # fmt: skip


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
    SPARSE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, ceil(H / BLOCK_H)). A token without a pair here gets zeros.

    All picks' rows are read at once. SPARSE, where most picks are on other ranks: one after the other, and nothing is
    spent on an absent one.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    if SPARSE:
        out = tl.zeros([BLOCK_H], tl.float32)
        for i_k in range(K):
            row = tl.load(pair_row_ptr + i_t * K + i_k).to(tl.int64)
            if row >= 0:
                part = tl.load(part_ptr + row * hidden + o_h, mask=o_h < hidden, other=0.0).to(tl.float32)
                if weights_ptr is not None:
                    part *= tl.load(weights_ptr + i_t * K + i_k)
                out += part
    else:
        o_k = tl.arange(0, BLOCK_K)
        row = tl.load(pair_row_ptr + i_t * K + o_k, mask=o_k < K, other=-1).to(tl.int64)
        here = row >= 0
        p_part = part_ptr + row[:, None] * hidden + o_h[None, :]
        part = tl.load(p_part, mask=here[:, None] & (o_h < hidden)[None, :], other=0.0).to(tl.float32)
        if weights_ptr is not None:
            # an absent pick's weight may be anything, NaN included
            weights = tl.load(weights_ptr + i_t * K + o_k, mask=o_k < K, other=0.0)
            part *= tl.where(here, weights, 0.0)[:, None]
        out = tl.sum(part, axis=0)
    tl.store(out_ptr + i_t * stride_out + o_h, out.to(out_ptr.dtype.element_ty), mask=o_h < hidden)
