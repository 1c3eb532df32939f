"""FP8 block linear layers on a CPU without AMX.

Why: vLLM's CPU kernel for FP8 weights in 128x128 blocks asks for AMX tiles, although its operator `fp8_scaled_mm_cpu`
runs on any AVX-512 machine: the gate is policy.
How: a subclass without the gate goes to the front of the CPU's list of kernels where the gate closes; where the
operator itself is missing, a kernel that expands the weights in torch.
Upstream: "requires AMX tile support" in model_executor/kernels/linear/scaled_mm/cpu.py, 0.32 and 0.33.
Remove when: vLLM lifts the gate.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from blackwell_kernels.model_patches import contracts

OP = "moe"  # goes on and off with the experts: neither is of use without the other
MODULE = "vllm.model_executor.kernels.linear"


def extend_kernels(module: ModuleType) -> None:
    """Put ours in front of the CPU's list."""
    from vllm.platforms import PlatformEnum, current_platform

    if not current_platform.is_cpu() or torch.cpu._is_amx_tile_supported():
        return
    contracts.demand(OP, module, f"{MODULE}.scaled_mm.cpu")
    kernels = module._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if not any(issubclass(kernel, Served) for kernel in kernels):
        kernels[:0] = kernel_classes()


class Served:
    """Marks our kernels."""


def kernel_classes() -> list[Any]:
    """Ours, best first: vLLM takes the first that says it can."""
    from vllm import _custom_ops as ops
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    from blackwell_kernels.common.fp8 import dequantize_blocks

    class UngatedCpuKernel(CPUFp8BlockScaledMMKernel, Served):
        """vLLM's own: bf16 activations, weights expanded on the fly."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return bool(ops._supports_cpu_fp8_w8a16), "vLLM was built without fp8_scaled_mm_cpu"

    class TorchCpuKernel(Fp8BlockScaledMMLinearKernel, Served):
        """Expands the whole weight for each call: slow, for machines that have nothing better."""

        apply_input_quant = False

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            group = config.weight_quant_key.scale.group_shape
            return (group.row, group.col) == (128, 128), f"weight blocks of {group}, not 128x128"

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            """The checkpoint's layout is the one used."""

        def apply_block_scaled_mm(
            self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor
        ) -> torch.Tensor:
            return torch.nn.functional.linear(A, dequantize_blocks(B, Bs).to(A.dtype))

    return [UngatedCpuKernel, TorchCpuKernel]
