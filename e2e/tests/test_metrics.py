"""Figures from records, against numpy on what the records were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blackwell_kernels.e2e import metrics


def request(session: int, turn: int, scheduled: float, tokens: list[float], **changes: Any) -> dict[str, Any]:
    row = {
        "kind": "request",
        "session": session,
        "turn": turn,
        "scheduled": scheduled,
        "sent": scheduled + 0.001,
        "prompt_tokens": 100,
        "reusable_tokens": 60,
        "expected_tokens": len(tokens),
        "tokens": tokens,
        "end": tokens[-1] if tokens else scheduled + 1,
        "error": None,
    }
    return {**row, **changes}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made: list[dict[str, Any]] = [{"kind": "start", "time": 0.0}]
    for i in range(200):
        first = 10.0 + i * 0.1 + rng.gamma(2, 0.05)
        tokens = first + np.concatenate([[0.0], np.cumsum(rng.gamma(2, 0.01, rng.integers(1, 30)))])
        made.append(request(i // 10, i % 10, 10.0 + i * 0.1, tokens.tolist()))
    return made


def test_percentiles_are_numpys(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows)
    made = rows[1:]
    expected: dict[str, Any] = {
        "ttft_s": [r["tokens"][0] - r["scheduled"] for r in made],
        "itl_s": np.concatenate([np.diff(r["tokens"]) for r in made]),
        "tpot_s": [(r["tokens"][-1] - r["tokens"][0]) / (len(r["tokens"]) - 1) for r in made],
        "e2e_s": [r["end"] - r["scheduled"] for r in made],
    }
    for name, values in expected.items():
        assert found[name]["n"] == len(values)
        assert found[name]["mean"] == pytest.approx(np.mean(values))
        for p in (50, 90, 99):
            assert found[name][f"p{p}"] == pytest.approx(np.percentile(values, p)), (name, p)
        assert found[name]["max"] == pytest.approx(np.max(values))


def test_throughput_counts_every_token_over_the_whole_run(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows)
    n = sum(len(r["tokens"]) for r in rows[1:])
    seconds = max(r["end"] for r in rows[1:]) - 10.0
    assert found["output_tokens"] == n
    assert found["output_tokens_per_s"] == pytest.approx(n / seconds)
    assert found["reusable_prompt_share"] == pytest.approx(0.6)
    assert (found["requests"], found["completed"], found["sessions"]) == (200, 200, 20)
    assert found["turns_per_session"]["p50"] == 10


def test_errors_by_kind_and_what_was_cut_off_is_none() -> None:
    broken = {"kind": "broken stream", "message": "peer closed"}
    cut = {"kind": metrics.CUT_OFF, "message": ""}
    found = metrics.summarise(
        [
            request(0, 0, 1.0, [1.1, 1.2]),
            request(0, 1, 2.0, [2.5], error=broken),
            request(1, 0, 2.0, [], error=broken),
            request(2, 0, 3.0, [3.1, 3.2, 3.3], error=cut),
        ]
    )
    assert found["errors"] == {"broken stream": 2}
    assert found["error_examples"] == {"broken stream": "peer closed"}
    assert (found["completed"], found["unfinished"], found["output_tokens"]) == (1, 1, 6)
    assert found["e2e_s"]["n"] == found["tpot_s"]["n"] == 1  # answers that ended as they should
    assert found["ttft_s"]["n"] == 3  # first tokens that came


def test_a_late_client_is_called_saturated() -> None:
    prompt = [request(0, i, float(i), [i + 0.5]) for i in range(10)]
    late = [request(0, i, float(i), [i + 0.5], sent=i + 0.3) for i in range(10)]
    assert not metrics.summarise(prompt)["client_saturated"]
    assert metrics.summarise(late)["client_saturated"]


def test_a_run_with_nothing_in_it_has_figures_too() -> None:
    found = metrics.summarise([])
    assert found["ttft_s"] == {
        "n": 0,
        "mean": None,
        **dict.fromkeys(("p50", "p90", "p95", "p99", "p99.9", "max")),
    }
    assert found["output_tokens_per_s"] is None
    json.dumps(found, allow_nan=False)


def test_a_torn_line_is_named_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(request(0, 0, 1.0, [1.5])) + '\n{"kind": "requ')
    rows, complaints = metrics.read_records([path])
    assert len(rows) == 1
    assert complaints == ["records.jsonl:2 is no record and was left out"]


def test_server_side_figures_are_differences_between_pages() -> None:
    page = (
        "# HELP x y\n"
        'vllm:generation_tokens_total{{engine="0"}} {0}\nvllm:generation_tokens_total{{engine="1"}} 5\n'
        "vllm:prefix_cache_queries_total {1}\nvllm:prefix_cache_hits_total {2}\n"
        'blackwell_kernels_op_info{{op="moe",impl="cpu",arch="say \\"x\\""}} 1.0\n'
        'blackwell_kernels_fallback_total{{op="moe",reason="a, b"}} {3}\n'
    )
    found = metrics.server_side(page.format(10, 100, 0, 0), page.format(1e2, 300, 50, 2))
    assert found["generation_tokens"] == 90
    assert found["prefix_hit_share"] == 0.25
    assert found["ops"] == [{"op": "moe", "impl": "cpu", "arch": 'say \\"x\\"'}]
    assert found["fallbacks"] == [{"op": "moe", "reason": "a, b", "count": 2}]
