"""Error measures whose tolerances are derived, not picked: the reference in float64 says what is right, the same
computation in the working precision says how wrong a good implementation may be. NaN never passes.
"""

from __future__ import annotations

import torch


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """‖out − reference‖ / ‖reference‖ over all finite reference elements; infinite where `out` has a NaN.

    0 when both are zero. Infinities of the reference are left out: `assert_within_budget` demands them exactly.
    """
    out, reference = _pair(out, reference)
    finite = reference.isfinite()
    error, scale = (out - reference)[finite].norm().item(), reference[finite].norm().item()
    if error == 0.0:
        return 0.0
    # not `error / scale` alone: NaN compares false with every bound, so it must not come out of here
    return error / scale if scale > 0.0 and error == error else float("inf")


def fp8_similarity(out: torch.Tensor, reference: torch.Tensor) -> float:
    """2⟨x, y⟩ / (⟨x, x⟩ + ⟨y, y⟩): 1 for equal tensors, less for noise and for a wrong scale; −inf with a NaN."""
    out, reference = _pair(out, reference)
    power = (out.square() + reference.square()).sum().item()
    if power == 0.0:
        return 1.0
    similarity = 2.0 * (out * reference).sum().item() / power
    return similarity if similarity == similarity else float("-inf")


def assert_fp8_similar(out: torch.Tensor, reference: torch.Tensor, limit: float = 1e-3) -> None:
    """Assert 1 − `fp8_similarity` ≤ limit: the bound for results that went through FP8 on the way."""
    difference = 1.0 - fp8_similarity(out, reference)
    assert difference <= limit, f"1 - similarity is {difference:.3e}, over the limit {limit:.1e}"


def assert_within_budget(
    out: torch.Tensor, reference: torch.Tensor, working: torch.Tensor, *, factor: float = 4.0
) -> None:
    """Assert that no element of `out` is further from `reference` than its budget.

    reference: the float64 result. working: the same computation in the working precision (any dtype). Its largest
    error, relative to |element| + rms of the element's row (last dimension), times `factor`, plus one rounding to
    `out`'s dtype, is every element's budget: rows of different magnitude are held to the same relative standard, and
    a row whose reference is zero must be zero. Infinities must be reproduced exactly; NaN fails.
    """
    dtype = out.dtype
    out, reference = _pair(out, reference)
    working, _ = _pair(working, reference)
    if reference.isnan().any() or (working.isfinite() != reference.isfinite()).any():
        raise ValueError("reference has NaN, or working is not finite where the reference is: fix the test's oracles")
    finite = reference.isfinite()
    known = torch.where(finite, reference, 0.0)
    row = known.square().mean(dim=-1, keepdim=True).sqrt() if known.dim() else known.abs()
    scale = known.abs() + row
    unit = (
        torch.where(finite & (scale > 0), (working - reference).abs() / scale, 0.0).max().item() if out.numel() else 0
    )
    info = torch.finfo(dtype) if dtype.is_floating_point else None
    rounding = info.eps * known.abs() + info.tiny * info.eps if info else torch.zeros_like(known)
    # zero rows have a zero budget: nothing in them was rounded
    budget = torch.where(scale > 0, factor * unit * scale + rounding, 0.0)
    passes = torch.where(finite, (out - reference).abs() <= budget, out == reference)
    if not passes.all():
        raise AssertionError(_explain(out, reference, budget, passes, unit, factor))


def assert_close_to_reference(
    out: torch.Tensor, reference: torch.Tensor, working: torch.Tensor, *, factor: float = 4.0, norm_factor: float = 2.0
) -> None:
    """`assert_within_budget`, and the whole tensor's relative error at most `norm_factor` times that of `working`.

    The second bound sees a small error spread over all elements, which a bound on the worst element lets through.
    """
    assert_within_budget(out, reference, working, factor=factor)
    eps = torch.finfo(out.dtype).eps if out.dtype.is_floating_point else 0.0
    error, allowed = relative_error(out, reference), norm_factor * relative_error(working, reference) + eps / 2
    assert error <= allowed, f"relative error {error:.3e} over {allowed:.3e}, {norm_factor} times that of working"


def _pair(x: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert x.shape == reference.shape, f"shape {list(x.shape)}, reference {list(reference.shape)}"
    return x.detach().cpu().double(), reference.detach().cpu().double()


def _explain(
    out: torch.Tensor,
    reference: torch.Tensor,
    budget: torch.Tensor,
    passes: torch.Tensor,
    unit: float,
    factor: float,
) -> str:
    excess = torch.where(passes, -1.0, (out - reference).abs() / budget.clamp(min=torch.finfo(torch.float64).tiny))
    worst = excess.nan_to_num(nan=torch.inf).flatten().argmax()
    place = [int(i) for i in torch.unravel_index(worst, out.shape)]
    o, r, b = (x.flatten()[worst].item() for x in (out, reference, budget))
    return (
        f"{int((~passes).sum())} of {out.numel()} elements over budget, {int(out.isnan().sum())} NaN; "
        f"worst at {place}: {o:.6g}, reference {r:.6g}, error {abs(o - r):.3e}, budget {b:.3e} "
        f"(working precision errs by {unit:.3e} of the row's scale, factor {factor})"
    )
