"""What the search of vLLM's MoE configurations asks of vLLM itself: its kernel to compile, its tables' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from blackwell_kernels.common.testing.compile import compile_only
from blackwell_kernels.microbench import peers_moe

Config = dict[str, Any]


@dataclass(frozen=True)
class Chunk:
    """Configurations that one process compiles, for the sizes of one case."""

    axes: dict[str, Any]
    configs: tuple[Config, ...]


def compile_chunk(send: Any, chunk: Chunk, sm: int) -> None:
    """Fill Triton's cache with both products of each configuration; a failure shows again where it is timed."""
    import triton.language as tl
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel

    def empty(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    f32, i32 = torch.float32, torch.int32
    x = chunk.axes
    tokens, topk, experts, every = x["num_tokens"], x["top_k"], x["num_experts"], x.get("num_global_experts")
    unsorted = every is None and tokens * topk * 4 <= experts  # vLLM's own condition
    torch.set_num_threads(1)
    with compile_only(sm):
        for config in chunk.configs:
            m = config["BLOCK_SIZE_M"]
            ids = None if unsorted else empty(-(-(tokens * topk + (every or experts) * (m - 1)) // m) * m, dtype=i32)
            weights = empty(tokens, topk, dtype=f32)
            # a tensor where vLLM passes None would be a kernel of its own, which the search then never runs
            for rows, picks, n, k, weighted_by in (
                (tokens, topk, x["gate_up_size"], x["hidden_size"], None),
                (tokens * topk, 1, x["hidden_size"], x["intermediate_size"], weights),
            ):
                invoke_fused_moe_triton_kernel(
                    empty(rows, k), empty(experts, n, k), empty(tokens, topk, n, dtype=torch.bfloat16),
                    empty(rows, k // 128, dtype=f32), empty(experts, n // 128, k // 128, dtype=f32),
                    weighted_by, ids, empty(1, dtype=i32), empty(1, dtype=i32), weighted_by is not None, picks,
                    config, tl.bfloat16, True, False, False, False, False, peers_moe.BLOCK,
                )  # fmt: skip
    send.send(None)


def table_name(local_experts: int, inter: int) -> str:
    """The file that vLLM looks for in VLLM_TUNED_CONFIG_FOLDER."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    return get_config_file_name(local_experts, inter, "fp8_w8a8", peers_moe.BLOCK)
