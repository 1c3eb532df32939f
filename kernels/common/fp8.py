"""FP8 (e4m3) block-scaled layouts in plain torch, for references, CPU implementations, generators, checkpoint makers.

Activations carry one fp32 scale per 1x128 group of the last dimension, weights one per 128x128 block. A value is
`q * scale`. Dynamic scales may be rounded up to a power of two (UE8M0), which is what vLLM does to activations on
SM90 and SM100. Rounding rules are those of vLLM's `per_token_group_quant_8bit`: `scale = max(amax, 1e-10) / 448`,
and for UE8M0 the smallest power of two not below `max(scale, 1e-10)`.
"""

from __future__ import annotations

import torch

from blackwell_kernels.common.checks import describe, require

GROUP = 128
FP8_DTYPE = torch.float8_e4m3fn
FP8_MAX = 448.0
EPS = 1e-10


def round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Smallest power of two >= each positive normal fp32 value, exactly; inf and NaN stay. [...] f32 -> [...] f32."""
    bits = scale.view(torch.int32)
    rounded = ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)  # a non-zero mantissa carries into the exponent
    return torch.where(scale.isfinite(), rounded, scale)


def _scale_from_amax(amax: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    scale = amax.float().clamp_min(EPS) / FP8_MAX
    return round_up_to_power_of_two(scale.clamp_min(EPS)) if ue8m0 else scale


def _widen(q: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """q.to(dtype). On a CPU torch converts element by element; a table of all 256 values is five times faster."""
    if q.device.type != "cpu" or dtype != torch.float32:
        return q.to(dtype)
    values = torch.arange(256, dtype=torch.uint8).view(FP8_DTYPE).to(dtype)
    return values.index_select(0, q.reshape(-1).view(torch.uint8).int()).view(q.shape)


def quantize_groups(x: torch.Tensor, *, ue8m0: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise 1x128 groups of the last dimension.

    x [..., N] of any float dtype, N % 128 == 0 -> (q [..., N] e4m3, scale [..., N/128] f32). A group holding inf or
    NaN dequantises to NaN. Raises UnsupportedInputError on other N.
    """
    require(x.shape[-1] % GROUP == 0, "quantize_groups", f"x = {describe(x)}", "last dimension % 128 == 0", "pad x")
    groups = x.float().unflatten(-1, (-1, GROUP))
    scale = _scale_from_amax(groups.abs().amax(-1), ue8m0)
    q = (groups / scale.unsqueeze(-1)).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return q.flatten(-2), scale


def dequantize_groups(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """q [..., N] e4m3 and scale [..., N/128] f32 -> [..., N] of `dtype`, multiplied in `dtype`."""
    groups = _widen(q, dtype).unflatten(-1, (-1, GROUP))
    return (groups * scale.to(dtype).unsqueeze(-1)).flatten(-2)


def quantize_blocks(w: torch.Tensor, *, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise 128x128 blocks of the last two dimensions, as FP8 checkpoints store them (`weight_scale_inv`).

    w [..., N, K] of any float dtype -> (q [..., N, K] e4m3, scale [..., ceil(N/128), ceil(K/128)] f32); edge blocks
    may be smaller than 128.
    """
    n, k = w.shape[-2:]
    padded = torch.nn.functional.pad(w.float(), (0, -k % GROUP, 0, -n % GROUP))
    blocks = padded.unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, GROUP))  # [..., N/128, 128, K/128, 128]
    scale = _scale_from_amax(blocks.abs().amax((-3, -1)), ue8m0)
    q = (blocks / scale[..., :, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8_DTYPE)
    return q.flatten(-2).flatten(-3, -2)[..., :n, :k].contiguous(), scale


def dequantize_blocks(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """q [..., N, K] e4m3 and scale [..., ceil(N/128), ceil(K/128)] f32 -> [..., N, K] of `dtype`, multiplied in it."""
    n, k = q.shape[-2:]
    require(
        scale.shape[-2:] == (-(-n // GROUP), -(-k // GROUP)),
        "dequantize_blocks",
        f"q = {describe(q)}, scale = {describe(scale)}",
        "one scale per 128x128 block of q",
        "pass the scale that belongs to q",
    )
    if n % GROUP or k % GROUP:
        rows = torch.arange(n, device=q.device) // GROUP
        cols = torch.arange(k, device=q.device) // GROUP
        return _widen(q, dtype) * scale.to(dtype)[..., rows[:, None], cols]
    blocks = _widen(q, dtype).unflatten(-1, (-1, GROUP)).unflatten(-3, (-1, GROUP))
    return (blocks * scale.to(dtype)[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
