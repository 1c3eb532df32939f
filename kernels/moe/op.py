"""The MoE operators: validate, select a configuration, allocate workspaces, launch.

Importing this module registers torch.ops.blackwell_kernels.{moe_grouped_topk, moe_softmax_topk, moe_fp8_block_scale}.
"""

from __future__ import annotations

import math

import torch

from blackwell_kernels.common.checks import check_tensor, describe, once_per_layout, require
from blackwell_kernels.common.launch import replayed
from blackwell_kernels.common.library import register_op
from blackwell_kernels.moe import cpu
from blackwell_kernels.moe.align import cdiv, even_tiles, max_tiles, next_power_of_2, prepare
from blackwell_kernels.moe.config import MoeConfig, case_of, select

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MAX_EXPERTS = 1024
_MAX_TOPK = 64


# --- routing ---------------------------------------------------------------------------------------------------------


@once_per_layout
def _check_routing(op: str, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
    check_tensor(op, "router_logits", logits, shape=(None, None), dtype=_FLOATS)
    tokens, experts = logits.shape
    shape = (tokens, None)
    check_tensor(op, "topk_weights", weights, shape=shape, dtype=torch.float32, device=logits.device, contiguous=True)
    topk = weights.shape[1]
    check_tensor(op, "topk_ids", ids, shape=(tokens, topk), dtype=torch.int32, device=logits.device, contiguous=True)
    asked = f"{experts} experts (router_logits = {describe(logits)})"
    require(1 <= experts <= _MAX_EXPERTS, op, asked, f"1 to {_MAX_EXPERTS} experts", "use stock routing")
    asked = f"top-{topk} of {experts} experts"
    limit = min(experts, _MAX_TOPK)
    require(1 <= topk <= limit, op, asked, f"top-1 to top-{limit}", "allocate topk_weights and topk_ids [T, K] so")


@once_per_layout
def _check_grouped_topk(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    op = "moe_grouped_topk"
    _check_routing(op, router_logits, topk_weights, topk_ids)
    experts, topk = router_logits.shape[1], topk_ids.shape[1]
    if bias is not None:
        check_tensor(op, "bias", bias, shape=(experts,), dtype=_FLOATS, device=router_logits.device)
    grouped = n_group >= 1 and experts % n_group == 0 and experts // n_group >= 2
    asked = f"n_group = {n_group} for {experts} experts"
    require(grouped, op, asked, "n_group that divides the experts into groups of 2 or more", "fix n_group")
    asked = f"topk_group = {topk_group} of n_group = {n_group}"
    require(1 <= topk_group <= n_group, op, asked, f"1 to {n_group}", "fix topk_group")
    room = topk_group * (experts // n_group)
    asked = f"top-{topk} from {topk_group} groups of {experts // n_group} experts"
    require(topk <= room, op, asked, f"at most top-{room}", "keep more groups or choose fewer experts")


def moe_grouped_topk_cpu(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    routed_scaling_factor: float,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """`moe_grouped_topk_triton` on the CPU."""
    _check_grouped_topk(router_logits, bias, n_group, topk_group, topk_weights, topk_ids)
    topk = topk_ids.shape[1]
    results = cpu.grouped_topk(router_logits, bias, topk, n_group, topk_group, renormalize, routed_scaling_factor)
    topk_weights.copy_(results[0])
    topk_ids.copy_(results[1])


@replayed
def moe_grouped_topk_triton(
    router_logits: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    renormalize: bool,
    routed_scaling_factor: float,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> None:
    """DeepSeek-V3 routing: choose by sigmoid + bias within the best groups, weigh by the sigmoid.

    router_logits [T, E] bf16, f16 or f32 (row stride may exceed E), E <= 1024; bias [E] or None (zero; a group's score
    is the sum of its two best either way) -> topk_weights [T, K] f32 and topk_ids [T, K] i32, best first; K <= 64.
    Ties go to the lower index. NaN scores are never preferred and weigh 0, so ids are always distinct and in range.
    Raises: UnsupportedInputError. Source: DeepSeek-V3 technical report 2.1.2; vLLM's grouped_topk.
    """
    _check_grouped_topk(router_logits, bias, n_group, topk_group, topk_weights, topk_ids)
    tokens, experts = router_logits.shape
    topk = topk_ids.shape[1]
    if tokens == 0:
        return
    from blackwell_kernels.moe.routing_kernels import grouped_topk_kernel

    block_e = next_power_of_2(experts)
    grouped_topk_kernel[(tokens,)](
        router_logits,
        bias,
        topk_weights,
        topk_ids,
        router_logits.stride(0),
        routed_scaling_factor,
        E=experts,
        K=topk,
        N_GROUP=n_group,
        TOPK_GROUP=topk_group,
        RENORMALIZE=renormalize,
        BLOCK_E=block_e,
        BLOCK_G=next_power_of_2(n_group),
        BLOCK_M=next_power_of_2(experts // n_group),
        BLOCK_K=next_power_of_2(topk),
        num_warps=1 if block_e <= 512 else 4,
    )


def moe_softmax_topk_cpu(
    router_logits: torch.Tensor, renormalize: bool, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    """`moe_softmax_topk_triton` on the CPU."""
    _check_routing("moe_softmax_topk", router_logits, topk_weights, topk_ids)
    weights, ids = cpu.softmax_topk(router_logits, topk_ids.shape[1], renormalize)
    topk_weights.copy_(weights)
    topk_ids.copy_(ids)


@replayed
def moe_softmax_topk_triton(
    router_logits: torch.Tensor, renormalize: bool, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    """Softmax over all experts, the K largest, optionally renormalised over the K.

    router_logits [T, E] bf16, f16 or f32 (row stride may exceed E), E <= 1024 -> topk_weights [T, K] f32 and topk_ids
    [T, K] i32, best first; K <= 64. Ties go to the lower index. A row whose softmax is undefined (NaN, +inf, only
    -inf) gets ids 0..K-1 and weights 0.
    Raises: UnsupportedInputError. Source: vLLM's topk_softmax.
    """
    _check_routing("moe_softmax_topk", router_logits, topk_weights, topk_ids)
    tokens, experts = router_logits.shape
    topk = topk_ids.shape[1]
    if tokens == 0:
        return
    from blackwell_kernels.moe.routing_kernels import softmax_topk_kernel

    block_e = next_power_of_2(experts)
    softmax_topk_kernel[(tokens,)](
        router_logits,
        topk_weights,
        topk_ids,
        router_logits.stride(0),
        E=experts,
        K=topk,
        RENORMALIZE=renormalize,
        BLOCK_E=block_e,
        BLOCK_K=next_power_of_2(topk),
        num_warps=1 if block_e <= 512 else 4,
    )


# --- experts ---------------------------------------------------------------------------------------------------------


@once_per_layout
def _check_fp8_block_scale(
    hidden_states: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    op, device, fp8 = "moe_fp8_block_scale", hidden_states.device, torch.float8_e4m3fn
    quantized = a_scale is not None
    check_tensor(op, "w2", w2, shape=(None, None, None), dtype=fp8, device=device, contiguous=True)
    experts, hidden, inter = w2.shape
    asked = f"{experts} local experts of hidden {hidden}, intermediate {inter} (w2 = {describe(w2)})"
    fits = 1 <= experts <= _MAX_EXPERTS and hidden > 0 and inter > 0 and hidden % 128 == 0 and inter % 128 == 0
    supported = f"1 to {_MAX_EXPERTS} experts, hidden and intermediate (per rank) multiples of 128"
    require(fits, op, asked, supported, "choose a tensor-parallel size that keeps 128x128 blocks whole")
    check_tensor(op, "w13", w13, shape=(experts, 2 * inter, hidden), dtype=fp8, device=device, contiguous=True)
    for name, scale, shape in (
        ("w13_scale", w13_scale, (experts, 2 * inter // 128, hidden // 128)),
        ("w2_scale", w2_scale, (experts, hidden // 128, inter // 128)),
    ):
        check_tensor(op, name, scale, shape=shape, dtype=torch.float32, device=device, contiguous=True)

    want = fp8 if quantized else torch.bfloat16
    asked = f"hidden_states = {describe(hidden_states)} with a_scale = {describe(a_scale)}"
    fix = "quantise to float8_e4m3fn or pass a_scale=None" if quantized else "pass a_scale, or bfloat16 to quantise"
    require(hidden_states.dtype == want, op, asked, "bfloat16 without a_scale or float8_e4m3fn with it", fix)
    check_tensor(op, "hidden_states", hidden_states, shape=(None, hidden))
    tokens = hidden_states.shape[0]
    if a_scale is not None:
        groups = (tokens, hidden // 128)
        # any strides: the transpose of a [H/128, T] scale is fine
        check_tensor(
            op, "a_scale", a_scale, shape=groups, dtype=torch.float32, device=device, last_dim_contiguous=False
        )

    check_tensor(op, "topk_ids", topk_ids, shape=(tokens, None), dtype=torch.int32, device=device, contiguous=True)
    topk = topk_ids.shape[1]
    picks = (tokens, topk)
    check_tensor(op, "topk_weights", topk_weights, shape=picks, dtype=torch.float32, device=device, contiguous=True)
    require(1 <= topk <= _MAX_TOPK, op, f"top-{topk}", f"top-1 to top-{_MAX_TOPK}", "split the picks over calls")
    asked = f"{tokens} tokens x top-{topk}"
    require(tokens * topk < 2**31 - 2**16, op, asked, "fewer than 2^31 - 2^16 pairs", "split the batch")
    if expert_map is not None:
        check_tensor(op, "expert_map", expert_map, shape=(None,), dtype=torch.int32, device=device, contiguous=True)
    check_tensor(op, "out", out, shape=(tokens, hidden), dtype=torch.bfloat16, device=device)


def moe_fp8_block_scale_cpu(
    hidden_states: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    *,
    gate_first: bool = True,
    apply_router_weight_on_input: bool = False,
) -> None:
    """`moe_fp8_block_scale_triton` on the CPU, in float32 throughout."""
    _check_fp8_block_scale(
        hidden_states, a_scale, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map, out
    )
    weights = None if apply_router_weight_on_input else topk_weights
    cpu.fp8_block_scale(
        hidden_states, a_scale, w13, w13_scale, w2, w2_scale, weights, topk_ids, expert_map, out, gate_first
    )


@replayed
def moe_fp8_block_scale_triton(
    hidden_states: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    *,
    gate_first: bool = True,
    apply_router_weight_on_input: bool = False,
    config: MoeConfig | None = None,
) -> None:
    """out[t] = sum over k of topk_weights[t, k] * W2_e (silu(gate) * up), [gate; up] = W13_e x_t, e = expert of (t, k).

    hidden_states [T, H] bf16 (a_scale None: quantised here, 1x128, power-of-two scales) or e4m3 with a_scale [T, H/128]
    f32 of any strides; w13 [E, 2I, H], w2 [E, H, I] e4m3; w13_scale [E, 2I/128, H/128], w2_scale [E, H/128, I/128] f32;
    topk_weights f32 and topk_ids i32 [T, K], K <= 64; out [T, H] bf16. H and I are multiples of 128, E <= 1024.
    topk_ids are global where expert_map [E_global] i32 (-1: not on this rank) is given, else local. Ids outside and
    experts elsewhere contribute nothing; duplicates count as often as they occur.
    gate_first: W13's first I rows are the gate (vLLM); False: its last I rows (the contest's layout).
    apply_router_weight_on_input, as in vLLM: the caller has weighted the input already, the picks are summed plainly.
    config: tiles; None takes the tuned table's or the heuristic's.

    The intermediate is requantised to e4m3 per 1x128 with power-of-two scales; the weighted sum is fp32, and but for a
    few tokens (config.direct) each pick's result is rounded to bf16 before it. Deterministic; no host sync; safe under
    CUDA graph capture.
    Raises: UnsupportedInputError, TableError. Source: DeepSeek-V3 technical report 3.3; vLLM's fused_experts.
    """
    _check_fp8_block_scale(
        hidden_states, a_scale, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, expert_map, out
    )
    tokens, topk = topk_ids.shape
    experts, hidden, inter = w2.shape
    if tokens == 0:
        return
    if config is None:
        all_experts = experts if expert_map is None else expert_map.numel()
        config = select(case_of(hidden, inter, all_experts, experts, topk), tokens, out.device)
    run = _run_direct if config.direct else _run_sorted
    weights = None if apply_router_weight_on_input else topk_weights
    run(
        hidden_states, a_scale, w13, w13_scale, w2, w2_scale, weights, topk_ids, expert_map, out, gate_first, config
    )  # fmt: skip


def _run_direct(
    x: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    gate_first: bool,
    config: MoeConfig,
) -> None:
    """Two launches, see direct_kernels.py; weights None: unweighted."""
    from blackwell_kernels.moe import direct_kernels as kernels

    tokens, topk = topk_ids.shape
    experts, hidden, inter = w2.shape
    map_size = 0 if expert_map is None else expert_map.numel()
    h = torch.empty(tokens * topk, inter, dtype=torch.float32, device=out.device)
    kernels.direct_gate_up_kernel[(tokens * topk * (inter // config.gate_up_rows),)](
        x,
        a_scale,
        topk_ids,
        expert_map,
        w13,
        w13_scale,
        h,
        tokens * topk,
        experts,
        map_size,
        x.stride(0),
        0 if a_scale is None else a_scale.stride(0),
        0 if a_scale is None else a_scale.stride(1),
        hidden,
        inter,
        topk,
        GATE_FIRST=gate_first,
        ROWS=config.gate_up_rows,
        GROUPS=math.gcd(hidden // 128, kernels.GROUPS),
        STAGES=config.gate_up_stages,
        PDL=config.pdl,
        launch_pdl=config.pdl,
        num_warps=config.gate_up_warps,
    )
    kernels.direct_down_kernel[(tokens * (hidden // config.down_rows),)](
        h,
        topk_ids,
        expert_map,
        weights,
        w2,
        w2_scale,
        out,
        tokens,
        experts,
        map_size,
        out.stride(0),
        hidden,
        inter,
        topk,
        BLOCK_K=next_power_of_2(topk),
        ROWS=config.down_rows,
        GROUPS=math.gcd(inter // 128, kernels.GROUPS),
        STAGES=config.down_stages,
        PREFETCHED=kernels.PREFETCHED,
        PDL=config.pdl,
        launch_pdl=config.pdl,
        num_warps=config.down_warps,
    )


def _run_sorted(
    x: torch.Tensor,
    a_scale: torch.Tensor | None,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    out: torch.Tensor,
    gate_first: bool,
    config: MoeConfig,
) -> None:
    """Sort, quantise, two grouped matrix products, combine: see gemm_kernels.py; weights None: unweighted."""
    tokens, topk = topk_ids.shape
    experts, hidden, inter = w2.shape
    from blackwell_kernels.moe import gemm_kernels as kernels

    pairs = tokens * topk
    tiles = max_tiles(pairs, experts, config.block_t)
    every = experts if expert_map is None else expert_map.numel()
    at_once = min(tiles, even_tiles(pairs, experts, every, config.block_t)) if config.walk else tiles
    x, a_scale, sort = prepare(x, a_scale, topk_ids, expert_map, experts, config.block_t, tiles, config.pdl)
    sorted_pairs, pair_row, tile_table = sort
    h = torch.empty(pairs, inter, dtype=torch.float8_e4m3fn, device=out.device)
    h_scale = torch.empty(pairs, inter // 128, dtype=torch.float32, device=out.device)
    sub_tiles = config.block_t // config.gate_up_t
    kernels.gate_up_kernel[(at_once * sub_tiles * (inter // 128),)](
        x,
        a_scale,
        w13,
        w13_scale,
        h,
        h_scale,
        sorted_pairs,
        tile_table,
        tiles,
        x.stride(0),
        a_scale.stride(0),
        a_scale.stride(1),
        hidden,
        inter,
        topk,
        GATE_FIRST=gate_first,
        BLOCK_T=config.gate_up_t,
        SUB_TILES=sub_tiles,
        HEIGHTS=config.heights(config.gate_up_t),
        X_IN_REGISTERS=config.x_in_registers,
        WALK=config.walk,
        PDL=config.pdl,
        launch_pdl=config.pdl,
        num_warps=config.gate_up_warps,
        num_stages=config.gate_up_stages,
    )
    part = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=out.device)
    blocks = math.gcd(hidden // 128, config.down_blocks)
    kernels.down_kernel[(at_once * (hidden // 128 // blocks),)](
        h,
        h_scale,
        w2,
        w2_scale,
        part,
        tile_table,
        tiles,
        hidden,
        inter,
        BLOCK_T=config.block_t,
        HEIGHTS=config.heights(config.block_t),
        BLOCKS=blocks,
        WIDE=config.down_wide and blocks > 1,
        WALK=config.walk,
        PDL=config.pdl,
        launch_pdl=config.pdl,
        num_warps=config.down_warps,
        num_stages=config.down_stages,
    )
    block_k = next_power_of_2(topk)
    block_h = min(1024, next_power_of_2(hidden), 16384 // block_k)  # a program holds block_k x block_h numbers
    kernels.combine_kernel[(tokens, cdiv(hidden, block_h))](
        part,
        weights,
        pair_row,
        out,
        out.stride(0),
        hidden,
        topk,
        BLOCK_K=block_k,
        BLOCK_H=block_h,
        SPARSE=experts < every,
        PDL=config.pdl,
        launch_pdl=config.pdl,
        num_warps=4,
    )


moe_grouped_topk = register_op(
    "moe_grouped_topk(Tensor router_logits, Tensor? bias, int n_group, int topk_group, bool renormalize, "
    "float routed_scaling_factor, Tensor(a!) topk_weights, Tensor(b!) topk_ids) -> ()",
    cpu=moe_grouped_topk_cpu,
    cuda=moe_grouped_topk_triton,
)
moe_softmax_topk = register_op(
    "moe_softmax_topk(Tensor router_logits, bool renormalize, Tensor(a!) topk_weights, Tensor(b!) topk_ids) -> ()",
    cpu=moe_softmax_topk_cpu,
    cuda=moe_softmax_topk_triton,
)
moe_fp8_block_scale = register_op(
    "moe_fp8_block_scale(Tensor hidden_states, Tensor? a_scale, Tensor w13, Tensor w13_scale, Tensor w2, "
    "Tensor w2_scale, Tensor topk_weights, Tensor topk_ids, Tensor? expert_map, Tensor(a!) out, *, "
    "bool gate_first=True, bool apply_router_weight_on_input=False) -> ()",
    cpu=moe_fp8_block_scale_cpu,
    cuda=moe_fp8_block_scale_triton,
)
