"""Plugin over stock, on records whose ratio is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blackwell_kernels.e2e import metrics, ratios

from .test_metrics import request


def records(seed: int, slower: float = 1.0, sessions: int = 60, ttft: float = 0.1) -> list[dict[str, Any]]:
    """Sessions of 20 turns; every time of one arm is `slower` times that of the other, for the same seed."""
    made = []
    for session in range(sessions):
        rng = np.random.default_rng([seed, session])
        pace = rng.gamma(20, 0.001)
        for turn in range(20):
            at = 1000.0 + session + turn * 0.01
            first = at + ttft * slower * rng.gamma(5, 0.2)
            tokens = first + np.concatenate([[0.0], np.cumsum(rng.gamma(9, pace / 9, 12) * slower)])
            made.append(request(session, turn, at, tokens.tolist()))
    return made


def runs(slower: float, **given: Any) -> dict[int, metrics.Run]:
    return {number: metrics.Run(records(0, slower, **given), window=(1000.0, 1070.0)) for number in (0, 1)}


def test_a_plugin_that_takes_nine_tenths_of_the_time() -> None:
    found = ratios.compare(runs(1.0), runs(0.9))
    for key in ("ttft_p50", "ttft_p95", "itl_p50", "itl_p99", "tpot_p50", "e2e_p50"):
        row = found[key]
        assert row["ratio"] == pytest.approx(0.9, abs=1e-6), key
        assert row["interval"] == (pytest.approx(0.9, abs=1e-6), pytest.approx(0.9, abs=1e-6)), "paired: no spread"
        assert row["verdict"] == "gain"
        low, high = row["stock_interval"]
        assert low < row["stock"] < high
    assert found["output_tokens_per_s"]["ratio"] == pytest.approx(1.0)
    assert found["output_tokens_per_s"]["verdict"] == "no difference"
    assert found["itl_p99.9"]["stock"] == pytest.approx(
        np.percentile(np.concatenate([run.itl.values for run in runs(1.0).values()]), 99.9)
    )
    assert found["itl_p99.9"]["stock_n"] == 2 * 60 * 20 * 12
    assert found["ttft_p99"]["verdict"] == "gain"


def test_a_slower_plugin_and_one_that_is_the_same() -> None:
    slower, same = ratios.compare(runs(1.0), runs(1.3)), ratios.compare(runs(1.0), runs(1.0))
    assert slower["itl_p99"]["verdict"] == "loss"
    assert slower["ttft_p50"]["verdict"] == "loss"
    assert {row["verdict"] for row in same.values()} <= {"no difference", "n too small"}
    assert same["itl_p50"]["noise"] == [1.0, 1.0]


def test_goodput_is_better_when_higher() -> None:
    # with a TTFT around 1.8 s the slower arm misses the SLO of 2 s more often
    found = ratios.compare(runs(1.2, ttft=1.8), runs(1.0, ttft=1.8))
    assert found["turn_goodput"]["ratio"] > 1.05
    assert found["turn_goodput"]["verdict"] == "gain"


def test_independent_noise_is_no_difference() -> None:
    one = {n: metrics.Run(records(n), window=(1000.0, 1070.0)) for n in (0, 1)}
    other = {n: metrics.Run(records(n + 10), window=(1000.0, 1070.0)) for n in (0, 1)}
    found = ratios.compare(one, other)
    for key in ("ttft_p50", "itl_p50", "tpot_p50"):
        low, high = found[key]["interval"]
        assert low < 1 < high, key
        assert found[key]["verdict"] == "no difference"


def test_few_values_get_no_verdict() -> None:
    few = {0: metrics.Run(records(0, sessions=3), window=(1000.0, 1070.0))}
    fewer = {0: metrics.Run(records(0, 0.5, sessions=3), window=(1000.0, 1070.0))}
    found = ratios.compare(few, fewer)
    assert found["ttft_p99"]["verdict"] == "n too small"
    assert found["output_tokens_per_s"]["verdict"] == "n too small"
    assert found["ttft_p99"]["ratio"] == pytest.approx(0.5)


def test_only_runs_of_both_arms_count() -> None:
    whole = runs(1.0)
    found = ratios.compare({0: whole[0], 1: whole[1]}, {1: whole[1]})
    assert found["ttft_p50"]["by_run"] == [1.0]
    assert ratios.compare({0: whole[0]}, {1: whole[1]}) == {}
