"""The error measures must fail what is wrong: NaN, a few bad elements, a small error everywhere, a wrong scale."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.testing.compare import (
    assert_close_to_reference,
    assert_fp8_similar,
    assert_within_budget,
    fp8_similarity,
    relative_error,
)
from blackwell_kernels.common.testing.generators import seeded


@pytest.fixture
def product() -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 matrix product and the same one from bf16 operands, stored in bf16."""
    rng = seeded(0)
    a, b = torch.randn(64, 96, generator=rng).double(), torch.randn(96, 80, generator=rng).double()
    return a @ b, (a.bfloat16().float() @ b.bfloat16().float()).bfloat16()


def test_the_working_result_itself_passes(product):
    reference, working = product
    assert_close_to_reference(working, reference, working)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e3])
def test_one_bad_element_fails(product, value):
    reference, working = product
    out = working.clone()
    out[63, 79] = value
    with pytest.raises(AssertionError, match=r"1 of 5120 elements over budget.*\[63, 79\]"):
        assert_within_budget(out, reference, working)


def test_an_error_spread_thin_fails_the_norm_but_not_the_element_budget(product):
    reference, working = product
    out = (reference + 2.5 * reference.std() * relative_error(working, reference)).float()
    assert_within_budget(out, reference, working)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close_to_reference(out, reference, working)


def test_rows_are_held_to_their_own_scale(product):
    reference, working = product
    scale = torch.logspace(0, -6, 64, dtype=torch.float64)[:, None]
    reference, working = reference * scale, (working.double() * scale).float()
    out = working.clone()
    assert_within_budget(out, reference, working)
    out[63] += 1e-3 * out[0].abs().max()
    with pytest.raises(AssertionError, match="elements over budget"):
        assert_within_budget(out, reference, working)


def test_infinities_and_zero_rows_are_demanded_exactly():
    reference = torch.tensor([[1.0, -torch.inf], [0.0, 0.0]], dtype=torch.float64)
    assert_within_budget(reference.float(), reference, reference.float())
    for place, value in (((0, 1), -3e38), ((0, 1), torch.inf), ((1, 0), 1e-20), ((0, 0), torch.inf)):
        out = reference.float().clone()
        out[place] = value
        with pytest.raises(AssertionError, match="1 of 4"):
            assert_within_budget(out, reference, reference.float())


def test_broken_oracles_are_refused():
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="oracles"):
        assert_within_budget(x, x * torch.nan, x)
    with pytest.raises(ValueError, match="oracles"):
        assert_within_budget(x, x, x * torch.nan)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(x, x[:1], x)


def test_empty_tensors_pass():
    empty = torch.empty(0, 4)
    assert_close_to_reference(empty, empty.double(), empty)


def test_relative_error():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, torch.nan]), reference) == float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")


def test_fp8_similarity():
    x = torch.randn(4096, generator=seeded(1))
    assert fp8_similarity(x, x) == pytest.approx(1.0)
    assert_fp8_similar(x.to(torch.float8_e4m3fn).float(), x)
    # cosine similarity would not see a wrong scale
    for wrong in (1.1 * x, -x, torch.where(torch.arange(4096) == 7, torch.nan, x)):
        with pytest.raises(AssertionError, match="similarity"):
            assert_fp8_similar(wrong, x)
