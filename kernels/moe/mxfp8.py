"""The experts by Blackwell's block-scaled tensor cores. **Not run**: no chip here has them, and nothing calls this.

For weights whose 128 x 128 scales are powers of two (DeepSeek-V3.1's and V3.2's checkpoints), the scales that
activations get here are powers of two as well: then `tl.dot_scaled` takes both, and the tensor core adds all products
of a row up by itself, where gemm_kernels.py leaves it every 128 of them to scale and add in fp32. The sort, the
quantisation and the combination are those of op.py; tensors and scales are too, so nothing is packed anew.

What is known of it: it is compiled for sm_100a, whose gates require mxfp8 instructions, and its results are checked
under Triton's interpreter, where the instruction is spelled out in float32.
"""

from __future__ import annotations

import torch
import triton.language as tl

# not `triton.jit`: what stands for the measured kernels in the tables (`tables.kernels_of`) is not to depend on these
from triton import jit, knobs

from blackwell_kernels.common.checks import require
from blackwell_kernels.moe.align import cdiv, max_tiles, next_power_of_2, prepare
from blackwell_kernels.moe.gemm_kernels import _load_tile, _ue8m0, combine_kernel

_OP = "moe_mxfp8"


@jit
def _exponents(scale, ROWS: tl.constexpr):
    """UE8M0 of power-of-two scales [ROWS], once for each 32 of 128: uint8 [ROWS, 4]."""
    bytes_ = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    return tl.broadcast_to(bytes_[:, None], [ROWS, 4])


@jit
def _scaled(x, exponents, ROWS: tl.constexpr):
    """x [ROWS, 128] in float32, each 32 of a row times their power of two."""
    scale = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return tl.reshape(tl.reshape(x.to(tl.float32), [ROWS, 4, 32]) * scale[:, :, None], [ROWS, 128])


@jit
def _product(acc, w, w_scale, x, x_scale, BLOCK_T: tl.constexpr, SPELLED_OUT: tl.constexpr):
    """acc [128, BLOCK_T] + (w_scale w) (x_scale x)^T for w [128, 128], x [BLOCK_T, 128], x_scale [BLOCK_T]."""
    w_exponents, x_exponents = _exponents(tl.full([128], 1.0, tl.float32) * w_scale, 128), _exponents(x_scale, BLOCK_T)
    if SPELLED_OUT:
        x_scaled = tl.trans(_scaled(x, x_exponents, BLOCK_T))
        acc += tl.dot(_scaled(w, w_exponents, 128), x_scaled, input_precision="ieee")
    else:
        acc = tl.dot_scaled(w, w_exponents, "e4m3", tl.trans(x), x_exponents, "e4m3", acc=acc)
    return acc


@jit(do_not_specialize=["n_tiles"])
def mxfp8_gate_up_kernel(
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
    BLOCK_T: tl.constexpr,
    SPELLED_OUT: tl.constexpr,
):
    """Grid (tiles * I/128): 128 columns of h, requantised, for BLOCK_T sorted rows."""
    n_blocks = inter // 128
    i_n = tl.program_id(0) % n_blocks
    i_e, row, row_end = _load_tile(tiles_ptr, tl.program_id(0) // n_blocks, n_tiles)
    if i_e >= 0:
        o_r = row + tl.arange(0, BLOCK_T)
        o_n = tl.arange(0, 128)
        i_t = (tl.load(sorted_pairs_ptr + o_r, mask=o_r < row_end, other=0) // K).to(tl.int64)
        groups = hidden // 128
        gate_block = i_e.to(tl.int64) * 2 * n_blocks + i_n
        o_w = o_n[:, None] * hidden + o_n[None, :]
        p_gate = w13_ptr + gate_block * 128 * hidden + o_w
        p_gate_scale = w13_scale_ptr + gate_block * groups
        p_x = x_ptr + i_t[:, None] * stride_x + o_n[None, :]
        p_x_scale = x_scale_ptr + i_t * stride_xs_t
        # one after the other: Triton 3.6 fails where two products share an operand's scales
        gate = tl.zeros([128, BLOCK_T], tl.float32)
        for g in range(groups):
            x, x_scale = tl.load(p_x + g * 128), tl.load(p_x_scale + g * stride_xs_g)
            w, w_scale = tl.load(p_gate + g * 128), tl.load(p_gate_scale + g)
            gate = _product(gate, w, w_scale, x, x_scale, BLOCK_T, SPELLED_OUT)
        up = tl.zeros([128, BLOCK_T], tl.float32)
        for g in range(groups):
            x, x_scale = tl.load(p_x + g * 128), tl.load(p_x_scale + g * stride_xs_g)
            w, w_scale = tl.load(p_gate + inter * hidden + g * 128), tl.load(p_gate_scale + n_blocks * groups + g)
            up = _product(up, w, w_scale, x, x_scale, BLOCK_T, SPELLED_OUT)
        h = tl.trans(gate / (1.0 + tl.exp(-gate)) * up)
        scale, inverse = _ue8m0(tl.max(tl.abs(h), axis=1))
        q = (h * inverse[:, None]).to(tl.float8e4nv)
        o_r = o_r.to(tl.int64)
        tl.store(h_ptr + o_r[:, None] * inter + i_n * 128 + o_n[None, :], q, mask=(o_r < row_end)[:, None])
        tl.store(h_scale_ptr + o_r * n_blocks + i_n, scale, mask=o_r < row_end)


@jit(do_not_specialize=["n_tiles"])
def mxfp8_down_kernel(
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
    SPELLED_OUT: tl.constexpr,
):
    """Grid (tiles * H/128): 128 columns of part for BLOCK_T sorted rows."""
    n_blocks = hidden // 128
    i_n = tl.program_id(0) % n_blocks
    i_e, row, row_end = _load_tile(tiles_ptr, tl.program_id(0) // n_blocks, n_tiles)
    if i_e >= 0:
        o_r = (row + tl.arange(0, BLOCK_T)).to(tl.int64)
        i_r = tl.where(o_r < row_end, o_r, row)  # rows beyond the end may lie beyond the buffer
        o_n = tl.arange(0, 128)
        groups = inter // 128
        block = i_e.to(tl.int64) * n_blocks + i_n
        p_w = w2_ptr + block * 128 * inter + o_n[:, None] * inter + o_n[None, :]
        p_h = h_ptr + i_r[:, None] * inter + o_n[None, :]
        acc = tl.zeros([128, BLOCK_T], tl.float32)
        for g in range(groups):
            h, h_scale = tl.load(p_h + g * 128), tl.load(h_scale_ptr + i_r * groups + g)
            w_scale = tl.load(w2_scale_ptr + block * groups + g)
            acc = _product(acc, tl.load(p_w + g * 128), w_scale, h, h_scale, BLOCK_T, SPELLED_OUT)
        p_part = part_ptr + o_r[:, None] * hidden + i_n * 128 + o_n[None, :]
        tl.store(p_part, tl.trans(acc).to(part_ptr.dtype.element_ty), mask=(o_r < row_end)[:, None])


def moe_mxfp8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    *,
    block_t: int = 16,
    stages: int = 3,
) -> None:
    """`op.moe_fp8_block_scale_triton` of bf16 hidden_states, for weights whose scales are powers of two (unchecked: to
    look would be to wait for the GPU). **Not run** on a chip; nothing calls it.

    Shapes and dtypes as there; block_t: tokens a tile, 16 to 128; stages: of the loops' pipelines.
    Raises: UnsupportedInputError for other tiles.
    """
    tokens, topk = topk_ids.shape
    experts, hidden, inter = w2.shape
    require(block_t in (16, 32, 64, 128), _OP, f"block_t = {block_t}", "16, 32, 64, 128", "choose one of them")
    if tokens == 0:
        return
    pairs, spelled_out = tokens * topk, knobs.runtime.interpret
    tiles = max_tiles(pairs, experts, block_t)
    x, x_scale, sort = prepare(hidden_states, None, topk_ids, expert_map, experts, block_t, tiles, False)
    sorted_pairs, pair_row, tile_table = sort
    h = torch.empty(pairs, inter, dtype=torch.float8_e4m3fn, device=out.device)
    h_scale = torch.empty(pairs, inter // 128, dtype=torch.float32, device=out.device)
    warps = 4 if block_t <= 32 else 8  # four would spill
    options = {"BLOCK_T": block_t, "SPELLED_OUT": spelled_out, "num_warps": warps, "num_stages": stages}
    mxfp8_gate_up_kernel[(tiles * (inter // 128),)](
        x, x_scale, w13, w13_scale, h, h_scale, sorted_pairs, tile_table, tiles,
        x.stride(0), x_scale.stride(0), x_scale.stride(1), hidden, inter, topk, **options,
    )  # fmt: skip
    part = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=out.device)
    mxfp8_down_kernel[(tiles * (hidden // 128),)](
        h, h_scale, w2, w2_scale, part, tile_table, tiles, hidden, inter, **options
    )
    block_k = next_power_of_2(topk)
    block_h = min(1024, next_power_of_2(hidden), 16384 // block_k)
    combine_kernel[(tokens, cdiv(hidden, block_h))](
        part, topk_weights, pair_row, out, out.stride(0), hidden, topk, BLOCK_K=block_k, BLOCK_H=block_h,
        SPARSE=expert_map is not None, PDL=False, num_warps=4,
    )  # fmt: skip
