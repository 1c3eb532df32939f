"""Percentiles, intervals and verdicts, against numpy and against what is true by construction."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from blackwell_kernels.e2e import stats


def test_p999_only_from_ten_thousand_values() -> None:
    few, many = stats.distribution(np.arange(9_999.0)), stats.distribution(np.arange(10_000.0))
    assert few["p99.9"] is None
    assert few["p99"] == pytest.approx(np.percentile(np.arange(9_999.0), 99))
    assert many["p99.9"] == pytest.approx(np.percentile(np.arange(10_000.0), 99.9))
    assert np.isnan(stats.Sample.of(np.arange(9_999.0), np.zeros(9_999)).percentile(99.9))


@pytest.mark.parametrize("p", [50, 90, 99])
def test_a_weighted_percentile_is_that_of_repeated_values(p: float) -> None:
    rng = np.random.default_rng(0)
    values, owners = rng.gamma(2, 1, 500), rng.integers(0, 20, 500)
    weights = rng.integers(0, 4, 20).astype(float)
    sample = stats.Sample.of(values, owners)
    expected = np.percentile(np.repeat(values, weights[owners].astype(int)), p)
    assert sample.percentile(p, weights) == pytest.approx(expected)
    assert sample.percentile(p) == pytest.approx(np.percentile(values, p))
    assert np.isnan(sample.percentile(p, np.zeros(20)))


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(60):
        # requests of one session are alike: an interval that ignored that would cover far less
        values = (rng.normal(10, 1, 40)[:, None] + rng.normal(0, 0.1, (40, 25))).ravel()
        sample = stats.Sample.of(values, np.repeat(np.arange(40), 25))
        found = stats.interval(partial(sample.percentile, 50), np.zeros(40), size=40_000, seed=trial)
        assert found is not None
        hits += found[0] <= 10 <= found[1]
    assert hits >= 50


def test_requests_of_one_session_move_together() -> None:
    together = stats.interval(stats.Share(np.array([500.0, 1500.0]), np.array([500.0, 500.0])).value, np.zeros(2))
    assert together == (1.0, 3.0)  # with two sessions nothing is known beyond their range
    assert stats.interval(lambda _: 1.0, np.zeros(1)) is None


def test_runs_are_drawn_too() -> None:
    # two runs that differ by their machine: sessions alone would give an interval of no width
    share = stats.Share(np.array([1.0] * 10 + [2.0] * 10), np.ones(20))
    runs, sessions = np.repeat([0, 1], 10), np.tile(np.arange(10), 2)
    assert stats.interval(share.value, runs, sessions=sessions) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("between", "by_run", "noise", "lower", "expected"),
    [
        ((0.8, 0.9), [0.85, 0.86], [1.02], True, "gain"),
        ((0.8, 0.9), [0.85, 0.86], [1.02], False, "loss"),
        ((1.1, 1.2), [1.15, 1.12], [0.99], True, "loss"),
        ((1.1, 1.2), [1.15, 1.12], [0.99], False, "gain"),
        ((0.9, 1.1), [0.97, 1.03], [1.0], True, "no difference"),
        ((1.1, 1.2), [1.3, 0.99], [1.0], True, "no difference"),  # one run says otherwise
        ((1.1, 1.2), [1.15, 1.12], [1.3], True, "no difference"),  # stock differs from itself by more
        ((1.002, 1.004), [1.003, 1.003], [], True, "no difference"),  # less than a hundredth
        ((1.1, 1.2), [1.15], [], True, "loss"),
        (None, [1.0], [], True, "unknown"),
    ],
)
def test_verdicts(
    between: tuple[float, float] | None, by_run: list[float], noise: list[float], lower: bool, expected: str
) -> None:
    assert stats.verdict(between, by_run, noise, lower_is_better=lower) == expected


def test_how_many_values_a_verdict_takes() -> None:
    assert stats.enough(1000, 99)
    assert not stats.enough(999, 99)
    assert stats.enough(10_000, 99.9)
    assert stats.enough(20, 50)
    assert not stats.enough(9, None)
