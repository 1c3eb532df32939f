"""Fixtures of the Gated Delta Net tests; `device` comes from kernels/conftest.py."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.gdn.oracles import Implementation


@pytest.fixture(scope="session", params=["cpu", "triton"])
def implementation(request: pytest.FixtureRequest, device: torch.device) -> Implementation:
    """ "cpu": the batched torch one; "triton": compiled on a GPU, interpreted elsewhere."""
    return Implementation(request.param, device)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)
