"""Replayed launches on a GPU: values, streams, graphs. What they hand to the driver is tests/test_launch.py's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl

from blackwell_kernels import env
from blackwell_kernels.common import launch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _by_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(env.REPLAY.name, raising=False)
    launch._triton.cache_clear()
    yield
    launch._triton.cache_clear()


@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o, tl.load(x_ptr + o, mask=o < n) + 1.0, mask=o < n)


@launch.replayed
def add_two(x: torch.Tensor, y: torch.Tensor) -> None:
    """In two steps, through a workspace."""
    between = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    n = x.numel()
    for source, target in ((x, between), (between, y)):
        add_kernel[(triton.cdiv(n, 128),)](source, target, n, BLOCK=128)


@pytest.mark.parametrize("n", [1, 100, 1 << 20])
def test_new_tensors_of_a_known_layout(device: torch.device, n: int) -> None:
    if launch._triton() is None:
        pytest.skip("this Triton's launches are not kept")
    for i in range(5):
        x, y = torch.full((n,), float(i), device=device), torch.empty(n, device=device)
        with torch.cuda.stream(torch.cuda.Stream(device) if i % 2 else torch.cuda.current_stream(device)):
            torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
            add_two(x, y)
            torch.cuda.current_stream(device).synchronize()
        assert torch.equal(y, x + 2)
    assert any(layout.launches for known in launch._kept for layout in known.values())


@pytest.mark.parametrize("met", [0, 1, 3])
def test_a_graph_of_replayed_launches(device: torch.device, met: int) -> None:
    """met: how often the layout is met before the capture, which holds what is left of first calls and recordings."""
    x, y = torch.zeros(1000, device=device), torch.empty(1000, device=device)
    add_two(x.view(10, 100), y.view(10, 100))  # compiled before the capture, and another layout
    for _ in range(met):
        add_two(x, y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add_two(x, y)
        add_two(y, x)
        add_two(x, y)
    for i in range(3):
        graph.replay()
        assert torch.equal(x, torch.full_like(x, 4.0 * (i + 1)))
        assert torch.equal(y, x + 2)
    add_two(y, x)  # not captured
    assert torch.equal(x, y + 2)
