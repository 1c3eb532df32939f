"""Rotary embedding of three-dimensional views on a CPU.

Why: vLLM's C++ `rotary_embedding` reads the number of heads from the last dimension and the token stride from the one
before, so it is wrong for the [T, H, D] views that MLA and the indexer pass; custom ops are on with `--enforce-eager`.
How: `RotaryEmbedding.forward_cpu` sends three-dimensional inputs to `forward_native`.
Upstream: present in 0.32 and 0.33, DeepSeek-V3 without sparse attention included.
Remove when: `forward_cpu` gives the same as `forward_native` for a [T, H, D] view.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

import torch

from blackwell_kernels.model_patches import contracts

OP = "dsa_indexer"  # goes on and off with it


def wrap_rotary(module: ModuleType) -> None:
    """Wrap `forward_cpu`."""
    from vllm.platforms import current_platform

    cls = module.RotaryEmbedding
    stock = cls.forward_cpu
    if not current_platform.is_cpu() or hasattr(stock, "stock"):
        return
    contracts.demand(OP, module)

    @wraps(stock)
    def forward_cpu(self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> Any:
        if query.dim() == 3 or (key is not None and key.dim() == 3):
            return self.forward_native(positions, query, key)
        return stock(self, positions, query, key)

    forward_cpu.stock = stock  # type: ignore[attr-defined]
    cls.forward_cpu = forward_cpu
