"""Which sequence a walk's programs take first."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from blackwell_kernels.gdn.prefill import longest_first  # noqa: E402


@triton.jit
def order_kernel(cu_seqlens_ptr, out_ptr, num_seqs):
    tl.store(out_ptr + tl.program_id(0), longest_first(cu_seqlens_ptr, tl.program_id(0), num_seqs))


@pytest.mark.parametrize("lengths", [[200, 700, 1500, 4000], [5, 5, 0, 70, 70, 1], [3], [64] * 16, list(range(32))])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_longest_comes_first(device: torch.device, lengths: list[int], dtype: torch.dtype) -> None:
    """Each once, equal ones in their order; the first token need not be number 0."""
    cu = torch.tensor([10, *lengths]).cumsum(0).to(device, dtype)
    order = torch.full((len(lengths),), -1, dtype=torch.int32, device=device)
    order_kernel[(len(lengths),)](cu, order, len(lengths))
    assert order.tolist() == sorted(range(len(lengths)), key=lambda i: -lengths[i])
