"""Shapes that ship, for the ahead-of-time gate: both models whole, under tensor and under expert parallelism.

Meta tensors: nothing is computed, and no memory is needed for full-size weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from blackwell_kernels.common import tables
from blackwell_kernels.common.arch import ARCHS
from blackwell_kernels.common.testing.gates import AotCase
from blackwell_kernels.moe import mxfp8, op
from blackwell_kernels.moe.config import OP, MoeConfig

FP8, BF16, F32, I32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _experts(
    tokens: int, hidden: int, inter: int, experts: int, topk: int, *, all_experts: int | None = None, fp8: bool = False,
    config: MoeConfig | None = None,
) -> Callable[[], None]:  # fmt: skip
    def run() -> None:
        inputs = (
            _empty(tokens, hidden, dtype=FP8 if fp8 else BF16),
            _empty(tokens, hidden // 128, dtype=F32) if fp8 else None,
            _empty(experts, 2 * inter, hidden, dtype=FP8),
            _empty(experts, 2 * inter // 128, hidden // 128, dtype=F32),
            _empty(experts, hidden, inter, dtype=FP8),
            _empty(experts, hidden // 128, inter // 128, dtype=F32),
            _empty(tokens, topk, dtype=F32),
            _empty(tokens, topk, dtype=I32),
            None if all_experts is None else _empty(all_experts, dtype=I32),
            _empty(tokens, hidden, dtype=BF16),
        )
        # without a configuration the heuristic's: what tables hold are cases of their own
        with tables.override(OP, {}):
            op.moe_fp8_block_scale_triton(*inputs, config=config)

    return run


def _tuned_cases() -> Iterator[AotCase]:
    """What the shipped tables hold, each for its chip."""
    for gpu, chip in ARCHS.items():
        table = tables.load("moe", OP, gpu)
        for row in () if table is None else table.rows:
            if row.config:
                hidden, inter, every, local, topk = (int(row.case[name]) for name in _AXES)
                config = MoeConfig(**row.config)  # type: ignore[arg-type]
                run = _experts(row.tokens, hidden, inter, local, topk, all_experts=every, config=config)
                label = " ".join(f"{name}={value}" for name, value in row.case.items())
                mma = "none" if config.direct else _GEMMS
                spills = _SPILLS if (config.gate_up_t, config.gate_up_warps) == (128, 8) else {}
                spills = _SPILLS_WIDE if config.down_wide else spills
                yield AotCase(f"{gpu} {label} T={row.tokens}", run, mma=mma, spill_allowance=spills, archs=(chip.sm,))


def _grouped_topk(logits: torch.dtype, bias: torch.dtype) -> Callable[[], None]:
    def run() -> None:
        outputs = _empty(32, 8, dtype=F32), _empty(32, 8, dtype=I32)
        op.moe_grouped_topk_triton(_empty(32, 256, dtype=logits), _empty(256, dtype=bias), 8, 4, True, 2.5, *outputs)

    return run


def _softmax_topk() -> None:
    outputs = _empty(32, 10, dtype=F32), _empty(32, 10, dtype=I32)
    op.moe_softmax_topk_triton(_empty(32, 512, dtype=BF16), True, *outputs)


def _mxfp8(block_t: int) -> Callable[[], None]:
    def run() -> None:
        tokens, hidden, inter, experts = 64, 7168, 2048, 32
        mxfp8.moe_mxfp8(
            _empty(tokens, hidden, dtype=BF16),
            _empty(experts, 2 * inter, hidden, dtype=FP8),
            _empty(experts, 2 * inter // 128, hidden // 128, dtype=F32),
            _empty(experts, hidden, inter, dtype=FP8),
            _empty(experts, hidden // 128, inter // 128, dtype=F32),
            _empty(tokens, 8, dtype=F32),
            _empty(tokens, 8, dtype=I32),
            _empty(256, dtype=I32),
            _empty(tokens, hidden, dtype=BF16),
            block_t=block_t,
        )

    return run


_AXES = ("hidden", "inter", "experts", "local_experts", "topk")
# two accumulators of a 128-token tile and a product are 192 of a thread's 255 registers
_SPILLS = {"gate_up_kernel": 88}
_SPILLS_WIDE = _SPILLS | {"down_kernel": 40}  # the down kernel with two blocks at a time has as many
_GEMMS = {"gate_up_kernel": "fp8", "down_kernel": "fp8"}
_BLOCK_SCALED = {"mxfp8_gate_up_kernel": "mxfp8", "mxfp8_down_kernel": "mxfp8"}
_TWO_HEIGHTS = MoeConfig(128, 128, 8, 4, 8, 4, x_in_registers=True, fit=64, down_blocks=2, down_wide=True, walk=True)
_SPILLS_90 = {f"{kernel}@90": size for kernel, size in _SPILLS_WIDE.items()}  # what the heuristic takes there

# tokens per expert choose the tile: each model appears with few, some and many
CASES = [
    AotCase("grouped_topk f32", _grouped_topk(F32, F32)),
    AotCase("grouped_topk bf16", _grouped_topk(BF16, BF16)),
    AotCase("softmax_topk", _softmax_topk),
    AotCase("deepseek T=1", _experts(1, 7168, 2048, 256, 8)),
    AotCase("deepseek EP8 T=8 fp8", _experts(8, 7168, 2048, 32, 8, all_experts=256, fp8=True)),
    AotCase("deepseek T=64", _experts(64, 7168, 2048, 256, 8), mma=_GEMMS),
    AotCase("deepseek T=8192", _experts(8192, 7168, 2048, 256, 8), mma=_GEMMS, spill_allowance=_SPILLS_90),
    AotCase("deepseek TP4 T=1024", _experts(1024, 7168, 512, 256, 8), mma=_GEMMS),
    AotCase("deepseek TP8 T=2048 fp8", _experts(2048, 7168, 256, 256, 8, fp8=True), mma=_GEMMS),
    AotCase("deepseek EP8 T=1024", _experts(1024, 7168, 2048, 32, 8, all_experts=256), mma=_GEMMS),
    AotCase("deepseek EP8 T=64", _experts(64, 7168, 2048, 32, 8, all_experts=256), mma=_GEMMS),
    AotCase(
        "deepseek EP8 T=14107 fp8",
        _experts(14107, 7168, 2048, 32, 8, all_experts=256, fp8=True),
        mma=_GEMMS,
        spill_allowance=_SPILLS_90,
    ),
    AotCase("qwen3next T=1", _experts(1, 2048, 512, 512, 10)),
    AotCase("qwen3next TP4 T=8", _experts(8, 2048, 128, 512, 10)),
    AotCase(
        "direct pdl",
        _experts(4, 2048, 512, 512, 10, config=MoeConfig(16, 16, 4, 1, 2, 4, True, 32, 8)),
    ),
    AotCase("qwen3next T=32", _experts(32, 2048, 512, 512, 10), mma=_GEMMS),
    AotCase("qwen3next T=256", _experts(256, 2048, 512, 512, 10), mma=_GEMMS),
    AotCase("qwen3next T=2048", _experts(2048, 2048, 512, 512, 10), mma=_GEMMS),
    AotCase("qwen3next T=8192", _experts(8192, 2048, 512, 512, 10), mma=_GEMMS, spill_allowance=_SPILLS_90),
    AotCase("qwen3next TP4 T=64", _experts(64, 2048, 128, 512, 10), mma=_GEMMS),
    AotCase("pdl", _experts(4, 2048, 512, 512, 10, config=MoeConfig(16, 16, 4, 3, 4, 3, pdl=True)), mma=_GEMMS),
    # sm_100 keeps a tile of 16 warps off its tensor cores
    AotCase(
        "tile 128",
        _experts(8192, 2048, 512, 512, 10, config=MoeConfig(128, 128, 16, 3, 16, 4)),
        mma=_GEMMS,
        archs=(90,),
    ),
    AotCase(
        "tile 128 of 8 warps",
        _experts(8192, 2048, 512, 512, 10, config=MoeConfig(128, 128, 8, 4, 8, 4)),
        mma=_GEMMS,
        spill_allowance=_SPILLS,
        archs=(90,),
    ),
    AotCase(
        "tile 128 of 8 warps, x in registers",
        _experts(8192, 2048, 512, 512, 10, config=MoeConfig(128, 128, 8, 3, 8, 4, x_in_registers=True)),
        mma=_GEMMS,
        spill_allowance=_SPILLS,
        archs=(90,),
    ),
    AotCase(
        "tile 128 at two heights",
        _experts(8192, 2048, 512, 512, 10, config=_TWO_HEIGHTS),
        mma=_GEMMS,
        spill_allowance=_SPILLS_WIDE,
        archs=(90,),
    ),
    AotCase(
        "tile 128 in halves at their heights, walking on",
        _experts(8192, 2048, 512, 512, 10, config=MoeConfig(128, 64, 8, 4, 8, 4, fit=16, walk=True)),
        mma=_GEMMS,
        archs=(90,),
    ),
    AotCase(
        "tile 64 at three heights",
        _experts(1024, 2048, 512, 512, 10, config=MoeConfig(64, 64, 8, 4, 8, 3, fit=16)),
        mma=_GEMMS,
    ),
    AotCase(
        "four blocks a program",
        _experts(256, 2048, 512, 512, 10, config=MoeConfig(16, 16, 4, 5, 4, 3, down_blocks=4)),
        mma=_GEMMS,
    ),
    *(AotCase(f"mxfp8, tile {t}", _mxfp8(t), mma=_BLOCK_SCALED, archs=(100,)) for t in (16, 32, 64, 128)),
    *_tuned_cases(),
]
