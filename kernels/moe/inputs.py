"""Seeded MoE inputs with sane values, for tests and benchmarks: unit activations and results, positive scales."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from blackwell_kernels.common.fp8 import quantize_blocks, quantize_groups


@dataclass(frozen=True)
class MoeInputs:
    """Positional arguments of moe_fp8_block_scale but `out`, in its order."""

    hidden_states: torch.Tensor
    a_scale: torch.Tensor | None
    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    expert_map: torch.Tensor | None = None

    def args(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device | str) -> MoeInputs:
        moved = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(self, **{name: x.to(device) for name, x in moved.items()})


def make_inputs(
    tokens: int,
    hidden: int,
    inter: int,
    experts: int,
    topk: int,
    *,
    seed: int = 0,
    zipf: float = 0.0,
    quantized: bool = False,
) -> MoeInputs:
    """Random inputs on the CPU.

    zipf: expert e is chosen with probability proportional to (e + 1)^-zipf; 0 is even, 2 leaves many experts empty.
    quantized: hidden_states e4m3 with a_scale, else bf16 with None. A token's experts are distinct.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=rng).to(torch.bfloat16)
    hidden_states, a_scale = quantize_groups(x) if quantized else (x, None)
    # W2 is larger by the inverse rms of silu(gate) * up, so that an expert maps unit rows to unit rows
    w13 = [quantize_blocks(torch.randn(2 * inter, hidden, generator=rng) / hidden**0.5) for _ in range(experts)]
    w2 = [quantize_blocks(torch.randn(hidden, inter, generator=rng) * 1.7 / inter**0.5) for _ in range(experts)]
    popularity = (torch.arange(experts) + 1.0) ** -zipf
    ids = torch.multinomial(popularity.expand(tokens, -1), topk, generator=rng) if tokens else torch.empty(0, topk)
    weights = torch.rand(tokens, topk, generator=rng) + 0.1
    return MoeInputs(
        hidden_states,
        a_scale,
        torch.stack([q for q, _ in w13]),
        torch.stack([scale for _, scale in w13]),
        torch.stack([q for q, _ in w2]),
        torch.stack([scale for _, scale in w2]),
        weights / weights.sum(-1, keepdim=True),
        ids.to(torch.int32),
    )
