"""FP8 block-scaled mixture of experts: both routings and the experts. Importing it registers the operators."""

from blackwell_kernels.moe.config import MoeConfig, case_of, select
from blackwell_kernels.moe.op import (
    moe_fp8_block_scale,
    moe_fp8_block_scale_triton,
    moe_grouped_topk,
    moe_grouped_topk_triton,
    moe_softmax_topk,
    moe_softmax_topk_triton,
)

__all__ = [
    "MoeConfig",
    "case_of",
    "moe_fp8_block_scale",
    "moe_fp8_block_scale_triton",
    "moe_grouped_topk",
    "moe_grouped_topk_triton",
    "moe_softmax_topk",
    "moe_softmax_topk_triton",
    "select",
]
