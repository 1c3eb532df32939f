"""Every test of this family runs once per implementation: vectorised torch, and Triton (interpreted or compiled)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from blackwell_kernels.dsa import op


@dataclass(frozen=True)
class Implementation:
    """Calls `<op>_cpu` or `<op>_triton`; `to` moves tensors to where it runs."""

    name: str
    device: torch.device

    @property
    def tensor_cores(self) -> bool:
        return self.device.type == "cuda"

    def to(self, *tensors: torch.Tensor | None) -> Any:
        moved = [None if x is None else _move(x, self.device) for x in tensors]
        return moved[0] if len(moved) == 1 else moved

    def run(self, name: str, *args: Any, config: Any = None, **kwargs: Any) -> None:
        if config is not None and self.name == "triton":
            kwargs["config"] = config
        getattr(op, f"{name}_{self.name}")(*args, **kwargs)


def _move(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Like Tensor.to, but strides stay: gaps between pages are part of a test."""
    if x.device == device:
        return x
    moved = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
    return moved.copy_(x)


@pytest.fixture(scope="session", params=["cpu", "triton"])
def impl(request: pytest.FixtureRequest, device: torch.device) -> Implementation:
    return Implementation(request.param, device if request.param == "triton" else torch.device("cpu"))
