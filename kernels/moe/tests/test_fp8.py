"""FP8 layouts of common/fp8.py: rounding rules, shapes, edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blackwell_kernels.common import fp8
from blackwell_kernels.errors import UnsupportedInputError
from blackwell_kernels.moe import align


@settings(max_examples=300)
@given(st.floats(min_value=2**-126, max_value=2.0**126, width=32))
def test_rounding_up_gives_the_smallest_power_of_two_not_below(x):
    rounded = fp8.round_up_to_power_of_two(torch.tensor([x])).item()
    assert rounded >= x
    assert rounded / 2 < x
    assert math.frexp(rounded)[0] == 0.5


def test_powers_of_two_inf_and_nan_stay():
    exact = 2.0 ** torch.arange(-126, 127)
    assert torch.equal(fp8.round_up_to_power_of_two(exact), exact)
    odd = fp8.round_up_to_power_of_two(torch.tensor([math.inf, math.nan]))
    assert odd[0] == math.inf
    assert odd[1].isnan()


@pytest.mark.parametrize("exponent", [-20, -3, 0, 5])
def test_ue8m0_scale_steps_just_above_448(exponent):
    """448 * 2^n needs the scale 2^n; the next float32 needs 2^(n + 1), or it would overflow e4m3."""
    at = torch.full((1, 128), 448.0 * 2.0**exponent)
    above = torch.nextafter(at, torch.tensor(math.inf))
    assert fp8.quantize_groups(at)[1].item() == 2.0**exponent
    assert fp8.quantize_groups(above)[1].item() == 2.0 ** (exponent + 1)


def test_zero_groups_get_vllms_floor_and_dequantise_to_zero():
    q, scale = fp8.quantize_groups(torch.zeros(2, 256))
    assert torch.equal(scale, torch.full((2, 2), 2.0**-33))  # smallest power of two >= 1e-10
    assert torch.equal(fp8.dequantize_groups(q, scale), torch.zeros(2, 256))
    _, scale = fp8.quantize_groups(torch.zeros(1, 128), ue8m0=False)
    assert scale.item() == pytest.approx(1e-10 / 448, rel=1e-6)


@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128,), (3, 256), (2, 3, 384), (0, 128)])
def test_group_round_trip_errs_by_at_most_half_a_step(shape, dtype, ue8m0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, scale = fp8.quantize_groups(x, ue8m0=ue8m0)
    assert q.shape == x.shape
    assert q.dtype == torch.float8_e4m3fn
    assert scale.shape == (*shape[:-1], shape[-1] // 128)
    back = fp8.dequantize_groups(q, scale)
    # e4m3: 3 mantissa bits, steps of 2^-9 below 2^-6; the division before rounding may add half a float32 step
    step = torch.maximum(back.abs() * 2**-4, scale.repeat_interleave(128, -1) * 2**-10)
    assert ((back - x.float()).abs() <= step * (1 + 2**-20)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_with_a_non_finite_value_never_dequantises_to_finite_numbers_there(bad):
    x = torch.ones(2, 256)
    x[0, 5] = bad
    back = fp8.dequantize_groups(*fp8.quantize_groups(x))
    assert not back[0, 5].isfinite()
    assert torch.equal(back[1], x[1])
    assert torch.equal(back[0, 128:], x[0, 128:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_e4m3_value_dequantises_to_itself(dtype):
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    back = fp8.dequantize_groups(q, torch.ones(2), dtype)
    assert back.dtype == dtype
    torch.testing.assert_close(back, q.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert back.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    strided = fp8.dequantize_groups(q.view(2, 128).T.contiguous().T, torch.ones(2, 1), dtype)
    torch.testing.assert_close(strided.flatten(), q.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (3, 128, 256), (130, 200), (2, 1, 5)])
def test_block_round_trip(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    q, scale = fp8.quantize_blocks(w)
    assert q.shape == w.shape
    assert q.is_contiguous()
    assert scale.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    expanded = scale.repeat_interleave(128, -2)[..., : shape[-2], :].repeat_interleave(128, -1)[..., : shape[-1]]
    back = fp8.dequantize_blocks(q, scale)
    assert torch.equal(back, q.float() * expanded)
    assert ((back - w).abs() <= torch.maximum(back.abs() * 2**-4, expanded * 2**-10) * (1 + 2**-20)).all()
    # the largest element of the first block is the largest e4m3 value
    assert q[..., :128, :128].float().abs().amax().item() == 448


def edge_rows() -> torch.Tensor:
    """bf16 [40, 384]: noise over many magnitudes, zeros, and groups whose maximum sits at or next to 448 * 2^n."""
    x = torch.randn(40, 384, generator=torch.Generator().manual_seed(2)) * 2.0 ** torch.arange(-36, 4)[:, None]
    x[::5, :128] = 0
    x[1::5, 128:256] = x[1::5, 128:256].clamp(-1e-3, 1e-3)
    x[1::5, 128] = 448 * 2.0 ** torch.arange(-20, 12, 4)
    x[2::5, 128] = -450 * 2.0 ** torch.arange(-20, 12, 4)  # the next bf16 beyond 448
    return x.bfloat16()


def test_the_kernel_quantises_as_torch_does_bit_for_bit(device):
    pytest.importorskip("triton")
    x = edge_rows()
    q, scale = align.quantize(x.to(device))
    want_q, want_scale = fp8.quantize_groups(x)
    assert (want_scale == 2.0**-33).any()
    assert torch.equal(scale.cpu(), want_scale)
    assert torch.equal(q.cpu().view(torch.uint8), want_q.view(torch.uint8))


def test_wrong_shapes_raise():
    with pytest.raises(UnsupportedInputError, match="last dimension % 128"):
        fp8.quantize_groups(torch.zeros(2, 100))
    with pytest.raises(UnsupportedInputError, match="one scale per 128x128 block"):
        fp8.dequantize_blocks(torch.zeros(256, 128).to(torch.float8_e4m3fn), torch.ones(1, 1))
