"""Every test of this family runs once per implementation: vectorised torch, and Triton (interpreted or compiled)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from blackwell_kernels.dsa import op, testing


@dataclass(frozen=True)
class Implementation:
    """Calls `<op>_cpu` or `<op>_triton`; `to` moves tensors to where it runs."""

    name: str
    device: torch.device

    @property
    def tensor_cores(self) -> bool:
        return self.device.type == "cuda"

    def to(self, *tensors: torch.Tensor | None) -> Any:
        moved = [None if x is None else testing.moved(x, self.device) for x in tensors]
        return moved[0] if len(moved) == 1 else moved

    def run(self, name: str, *args: Any, config: Any = None, **kwargs: Any) -> None:
        if config is not None and self.name == "triton":
            kwargs["config"] = config
        getattr(op, f"{name}_{self.name}")(*args, **kwargs)


@pytest.fixture(scope="session", params=["cpu", "triton"])
def impl(request: pytest.FixtureRequest, device: torch.device) -> Implementation:
    return Implementation(request.param, device if request.param == "triton" else torch.device("cpu"))
