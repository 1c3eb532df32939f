"""What a comparison says of its traffic and its back ends."""

from __future__ import annotations

from typing import Any

import pytest

from blackwell_kernels.e2e import conditions


def point(arm: str, rate: float, sessions: list[int]) -> dict[str, Any]:
    tokens = {"n": 3, "p50": 5000.4, "p90": 16000.0}
    seen = {"prompt_tokens": tokens, "fresh_tokens": tokens, "answer_tokens": {"n": 0, "p50": None, "p90": None}}
    asked = {**seen, "sessions_at": sessions, "requests_at": [1, 2]}
    return {"arm": arm, "run": 0, "rate": rate, "summary": {"requests": 3, "traffic": asked}}


def test_what_was_asked_is_shown_for_every_load_point_that_has_it() -> None:
    before = {"arm": "stock", "run": 0, "rate": 9.0, "summary": {"requests": 3}}
    _, head, rows = conditions.traffic({"points": [before, point("stock", 2.0, [16, 105])]})
    assert rows == [["2", "0", "stock", "3", "5,000", "16,000", "5,000", "16,000", "–", "–", "16 → 105", "1 → 2"]]
    assert len(head) == len(rows[0])


def test_sessions_that_outlast_the_load_are_said() -> None:
    steady = point("stock", 1.0, [20, 26])
    assert conditions.unsteady({"points": [steady, {"summary": {}}]}) == []
    (said,) = conditions.unsteady({"points": [steady, point("plugin", 2.0, [12, 45]), point("stock", 5.0, [16, 105])]})
    assert "in 2 of 3, at most 16 at the begin and 105 at the end (stock, 5 sessions/s)" in said


@pytest.mark.parametrize(
    ("model", "backend", "args", "only", "said"),
    [
        ("qwen3-next", "cuda", "", {}, ["GDN"]),
        ("qwen3-next", "cuda", "--gdn-prefill-backend triton", {}, ["GDN"]),
        ("qwen3-next", "cuda", "--gdn-prefill-backend=flashinfer", {}, []),
        ("qwen3-next", "cuda", "", {"stock": "--gdn-prefill-backend flashinfer"}, []),
        ("qwen3-next", "cpu", "", {}, []),
        ("deepseek-v3.2", "cuda", "--x 1 --linear-backend cutlass", {}, ["by cutlass in both"]),
    ],
)
def test_back_ends_that_were_asked_for_are_said(
    model: str, backend: str, args: str, only: dict[str, str], said: list[str]
) -> None:
    found = conditions.back_ends({"model": model, "backend": backend, "args": args, "only": only})
    assert len(found) == len(said)
    assert all(text in line for text, line in zip(said, found, strict=True))
