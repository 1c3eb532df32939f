"""The experts by block-scaled tensor cores, interpreted: all but the instruction itself, which is spelled out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blackwell_kernels.common.testing.compare import assert_fp8_similar, assert_within_budget
from blackwell_kernels.errors import UnsupportedInputError
from blackwell_kernels.moe import mxfp8, reference
from blackwell_kernels.moe.inputs import MoeInputs, make_inputs

NOT_BLACKWELL = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 10

pytestmark = [
    pytest.mark.usefixtures("poisoned_workspaces"),
    pytest.mark.skipif(NOT_BLACKWELL, reason="block-scaled tensor cores are Blackwell's"),
]


def powers_of_two(inputs: MoeInputs) -> MoeInputs:
    """The same weights with scales rounded up to powers of two, of exponents that differ from block to block."""
    rng = torch.Generator().manual_seed(7)

    def rounded(scale: torch.Tensor) -> torch.Tensor:
        return torch.exp2(scale.log2().ceil() + torch.randint(-2, 3, scale.shape, generator=rng))

    return replace(inputs, w13_scale=rounded(inputs.w13_scale), w2_scale=rounded(inputs.w2_scale))


def run(inputs: MoeInputs, device: torch.device, **options: int) -> torch.Tensor:
    x, no_scale, *rest = inputs.to(device).args()
    assert no_scale is None
    out = torch.full(x.shape, torch.nan, dtype=torch.bfloat16, device=device)
    mxfp8.moe_mxfp8(x, *rest, out, **options)
    return out.cpu()


def check(inputs: MoeInputs, dense, device: torch.device, **options: int) -> None:
    out, want = run(inputs, device, **options), reference.moe_fp8_block_scale(*inputs.args())
    bf16 = torch.bfloat16
    assert_within_budget(out, want, dense(inputs, product=bf16, activation=bf16, pick=bf16))
    assert_fp8_similar(out, want)


@pytest.mark.parametrize(("tokens", "block_t"), [(1, 16), (17, 16), (40, 32), (70, 64), (140, 128)])
def test_tokens(device, dense, tokens, block_t):
    check(powers_of_two(make_inputs(tokens, 256, 128, 4, 2)), dense, device, block_t=block_t)


@pytest.mark.parametrize(("hidden", "inter"), [(128, 128), (384, 256), (128, 384)])
def test_shapes(device, dense, hidden, inter):
    check(powers_of_two(make_inputs(5, hidden, inter, 3, 2)), dense, device)


def test_experts_elsewhere_and_uneven_routing(device, dense):
    inputs = powers_of_two(make_inputs(24, 256, 128, 8, 2, zipf=1.5))
    local = {name: getattr(inputs, name)[:4] for name in ("w13", "w13_scale", "w2", "w2_scale")}
    mapping = torch.tensor([-1, 2, -1, 0, 3, -1, 1, -1], dtype=torch.int32)
    check(replace(inputs, expert_map=mapping, **local), dense, device)


def test_a_scale_that_is_no_power_of_two_counts_as_the_one_below(device):
    """What the documentation says of unchecked weights: they are not refused."""
    inputs = powers_of_two(make_inputs(3, 128, 128, 2, 2))
    larger = replace(inputs, w13_scale=inputs.w13_scale * 1.5)
    assert torch.equal(run(larger, device), run(inputs, device))


def test_other_tiles_are_refused(device):
    with pytest.raises(UnsupportedInputError, match="block_t = 48"):
        run(make_inputs(3, 128, 128, 2, 2), device, block_t=48)


def test_no_tokens(device):
    assert run(make_inputs(0, 128, 128, 2, 2), device).shape == (0, 128)
