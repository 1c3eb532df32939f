"""The bound of indexer logits against Hopper's arithmetic, computed bit by bit, and against kernels that are wrong."""

from __future__ import annotations

import pytest
import torch

from blackwell_kernels.common.testing.generators import seeded
from blackwell_kernels.dsa import reference, testing

HEADS, KEYS = 64, 2048


def cut(x: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """x without what is 13 bits behind the first bit of `largest`."""
    last = torch.ldexp(torch.ones_like(largest), torch.frexp(largest.abs().clamp(min=1e-300)).exponent - 14)
    return torch.trunc(x / last) * last


def hopper(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [H, 128] . k [N, 128] as an FP8 MMA of depth 32 adds it up: float64 [H, N]."""
    total = torch.zeros(q.shape[0], k.shape[0], dtype=torch.float64)
    for some, others in zip(q.double().split(32, -1), k.double().split(32, -1), strict=True):
        addends = torch.cat([some[:, None] * others[None], total[..., None]], -1)
        added = cut(addends, addends.abs().amax(-1, keepdim=True)).sum(-1)
        total = cut(added, added)
    return total


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, ...]:
    """q [1, H, 128], k [N, 128], k_scale, weights [1, H], logits [N] in float64, bound [N] of eight million logits."""
    rng = seeded(31)
    q, k = testing.fp8_queries((1, HEADS, 128), rng), testing.fp8_queries((KEYS, 128), rng)
    scale, weights = torch.rand(KEYS, generator=rng), torch.randn(1, HEADS, generator=rng)
    every = torch.zeros(1, dtype=torch.int32), torch.full((1,), KEYS, dtype=torch.int32)
    expected = reference.indexer_logits_ragged(q, k, scale, weights, *every)
    return q, k, scale, weights, expected, testing.logits_bound(q, k, scale, weights, True, 8_000_000)


def scored(products: torch.Tensor, scale: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights.double() @ products.relu()) * scale.double()


def test_hoppers_arithmetic_stays_within_the_bound(case: tuple[torch.Tensor, ...]):
    q, k, scale, weights, expected, bound = case
    logits = scored(hopper(q[0], k), scale, weights)
    testing.assert_bounded(logits, expected, bound)
    # not by never rounding at all: this is what was measured on the chip
    share = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 1e-4 < share < 3e-4


def test_the_bound_is_no_licence(case: tuple[torch.Tensor, ...]):
    _, _, _, _, expected, bound = case
    assert (bound / expected.square().mean().sqrt()).mean() < 0.02


@pytest.mark.parametrize(
    "wrong", ["a head is left out", "a component is left out", "no relu", "the scale of the next key"]
)
def test_wrong_kernels_leave_the_bound(case: tuple[torch.Tensor, ...], wrong: str):
    q, k, scale, weights, expected, bound = case
    products = q[0].double() @ k.double().T
    if wrong == "a head is left out":
        products[-1] = 0.0
    elif wrong == "a component is left out":
        products -= q[0, :, -1:].double() * k[:, -1].double()
    logits = scored(products, scale, weights)
    if wrong == "no relu":
        logits = (weights.double() @ products) * scale.double()
    elif wrong == "the scale of the next key":
        logits = scored(products, scale.roll(1), weights)
    with pytest.raises(AssertionError, match="out of bounds"):
        testing.assert_bounded(logits, expected, bound)
