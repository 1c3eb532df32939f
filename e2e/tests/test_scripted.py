"""A server that answers by a script, on a clock that only the script moves: every figure has one right value.

Sessions of two turns against two servers' worth of timing, written down by hand. Nothing here waits or reads a clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from blackwell_kernels.e2e import metrics, prometheus, stream

BEGIN = 100.0


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def chunk(**data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode()


def answer(clock: Clock, delays: list[float | tuple[float, int]], *, usage: int | None = None) -> Iterator[bytes]:
    """An SSE stream: each entry is a wait and then a chunk of one token, or (wait, tokens)."""
    n = 0
    for delay in delays:
        wait, tokens = delay if isinstance(delay, tuple) else (delay, 1)
        clock.now += wait
        n += tokens
        yield chunk(choices=[{"text": "x", "token_ids": list(range(tokens))}])
        yield b""
    yield chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": n if usage is None else usage})
    yield b"data: [DONE]"


def play(session: int, turn: int, at: float, delays: list[Any], *, late: float = 0.0, **given: Any) -> dict[str, Any]:
    """The record of a request that was due at BEGIN + at and sent `late` after that."""
    clock = Clock()
    clock.now = BEGIN + at + late
    about = {"prompt_tokens": 1000, "reusable_tokens": 600, "turns": 2, "first_turn": 0, "expected_tokens": 0}
    row: dict[str, Any] = {"kind": "request", "id": f"{session}.{turn}", "session": session, "turn": turn, **about}
    row |= {"scheduled": BEGIN + at, "sent": clock.now, "tokens": [], "usage": None, "aborted": False, "error": None}
    kept: list[dict[str, Any]] = []
    abort_after = given.pop("abort_after", None)
    lines = answer(clock, delays, usage=given.pop("usage", None))
    stream.collect(lines, row, clock=clock, keep=kept.append, abort_after=abort_after)
    row["expected_tokens"] = given.pop("expected", len(row["tokens"]))
    row["error"] = None if row["aborted"] else stream.wrong_length(row)
    return {**row, "end": clock.now, "kept": kept, **given}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [
        play(0, 0, 0.0, [0.5, 0.02, 0.04]),  # TTFT .5, ITL .02 .04, E2E .56
        play(0, 1, 2.0, [0.3, 0.03, 0.03], late=0.1),  # queued .1 in the client: TTFT .4, E2E .46
        play(1, 0, 1.0, [2.5, 0.01]),  # TTFT 2.5: misses 2 s
        play(1, 1, 5.0, [0.2, 0.1, 0.1]),  # mean ITL .1: misses 50 ms
        play(2, 0, 4.0, [(0.25, 3), (0.06, 1)]),  # three tokens in one chunk: ITL 0 0 .06
    ]


def test_latencies(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows)
    ttft, e2e = [0.5, 0.4, 2.5, 0.2, 0.25], [0.56, 0.46, 2.51, 0.4, 0.31]
    itl = [0.02, 0.04, 0.03, 0.03, 0.01, 0.1, 0.1, 0, 0, 0.06]
    tpot = [0.03, 0.03, 0.01, 0.1, 0.02]
    for name, values in (("ttft_s", ttft), ("e2e_s", e2e), ("itl_s", itl), ("tpot_s", tpot)):
        assert found[name]["n"] == len(values)
        assert found[name]["mean"] == pytest.approx(np.mean(values), abs=1e-6), name
        assert found[name]["max"] == pytest.approx(max(values), abs=1e-6)
        for p in (50, 90, 95, 99):
            assert found[name][f"p{p}"] == pytest.approx(np.percentile(values, p), abs=1e-6), (name, p)
        assert found[name]["p99.9"] is None
    assert found["late_s"]["max"] == pytest.approx(0.1)
    # what the server itself can see starts when the request is sent
    assert found["as_the_server_sees"]["ttft_mean_s"] == pytest.approx(np.mean([0.5, 0.3, 2.5, 0.2, 0.25]))
    assert found["as_the_server_sees"]["e2e_mean_s"] == pytest.approx(np.mean([0.56, 0.36, 2.51, 0.4, 0.31]))
    assert found["as_the_server_sees"]["itl_mean_s"] == pytest.approx(np.mean(itl), abs=1e-6)


def test_throughput_in_the_measured_window(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows, window=(BEGIN + 1.0, BEGIN + 5.0), gpus=2)
    # tokens: turn 0/1 three, 1/0 two, 2/0 four; those of 0/0 came before, those of 1/1 after
    assert found["output_tokens"] == 9
    assert found["output_tokens_per_s"] == pytest.approx(9 / 4)
    assert found["output_tokens_per_s_per_gpu"] == pytest.approx(9 / 8)
    assert found["total_tokens_per_s"] == pytest.approx((9 + 3 * 1000) / 4)
    assert found["requests"] == 3, "scheduled in the window"
    assert found["reusable_prompt_share"] == pytest.approx(0.6)


def test_goodput_under_an_slo(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows)
    assert found["turn_goodput"] == pytest.approx(3 / 5)
    assert found["session_goodput"] == pytest.approx(2 / 3)
    strict = metrics.summarise(rows, slo=metrics.Slo(ttft_s=0.45, itl_s=0.025))
    assert strict["turn_goodput"] == pytest.approx(1 / 5)
    lenient = metrics.summarise(rows, slo=metrics.Slo(ttft_s=3, itl_s=1))
    assert lenient["turn_goodput"] == lenient["session_goodput"] == 1


def test_failed_and_cut_off_turns_under_an_slo() -> None:
    cut = {"kind": metrics.CUT_OFF, "message": ""}
    waited = play(3, 0, 0.0, [0.1], end=BEGIN + 2.5, error=cut, tokens=[])  # no token for longer than the SLO: missed
    young = play(4, 0, 9.0, [0.1], end=BEGIN + 9.5, error=cut, tokens=[])  # cut off before it could miss: not judged
    wrong = play(5, 0, 0.0, [0.1, 0.01], expected=3)
    good = play(6, 0, 0.0, [0.1, 0.01])
    found = metrics.summarise([waited, young, wrong, good])
    assert wrong["error"] == {"kind": "wrong length", "message": "asked for 3 tokens, got 2"}
    assert found["turn_goodput"] == pytest.approx(1 / 3)
    assert (found["unfinished"], found["errors"]) == (2, {"wrong length": 1})


def test_session_completion(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows)["session_completion_s"]
    # sessions 0 and 1 ran to their last turn: 2.46 and 4.4; session 2 did not
    assert found["n"] == 2
    assert (found["p50"], found["max"]) == (pytest.approx((2.46 + 4.4) / 2), pytest.approx(4.4))
    # a sub-agent's turns are part of its session, and neither begin nor end it
    agent = play(0, 1, 2.2, [0.1, 0.1], agent="0/1.0")
    assert metrics.summarise([*rows, agent])["session_completion_s"] == found
    assert metrics.summarise([*rows, agent])["sessions"] == 3


def test_dropped_requests_are_neither_errors_nor_answers() -> None:
    dropped = play(0, 0, 0.0, [0.5, 0.01, 0.01, 5.0], abort_after=2)
    assert dropped["tokens"] == [BEGIN + 0.5, BEGIN + 0.51]
    found = metrics.summarise([dropped, play(1, 0, 0.0, [0.5, 0.01])])
    assert (found["aborted"], found["completed"], found["errors"]) == (1, 1, {})
    assert (found["ttft_s"]["n"], found["e2e_s"]["n"], found["turn_goodput"]) == (2, 1, 1.0)


def test_token_times_are_kept_while_the_answer_goes_on() -> None:
    slow = play(0, 0, 0.0, [0.5, 0.4, 0.3, 0.9, 0.2, 0.1])
    assert [row["tokens"] for row in slow["kept"]] == [
        [BEGIN + 0.5, pytest.approx(BEGIN + 0.9), pytest.approx(BEGIN + 1.2)],
        [pytest.approx(BEGIN + 2.1), pytest.approx(BEGIN + 2.3)],
    ]
    assert slow["kept"][0]["scheduled"] == BEGIN, "enough to know whose they are"


def test_streams_that_go_wrong() -> None:
    row: dict[str, Any] = {"id": "x", "sent": 0.0, "tokens": [], "usage": None, "aborted": False}
    with pytest.raises(stream.Refused, match="too long") as refused:
        stream.collect([chunk(error={"message": "too long"})], row, clock=Clock(), keep=lambda _: None)
    assert refused.value.kind == "error in the stream"
    for line in (b"data: {", chunk(nothing=1), b"data: 3"):
        with pytest.raises((ValueError, KeyError, TypeError)):
            stream.collect([line], row, clock=Clock(), keep=lambda _: None)


def test_the_servers_clock_against_ours(rows: list[dict[str, Any]]) -> None:
    ours = metrics.summarise(rows)["as_the_server_sees"]
    ttft = [0.5, 0.3, 2.5, 0.2, 0.25]

    def page(count: int, seconds: float, made: int) -> str:
        name = "vllm:time_to_first_token_seconds"
        return f'{name}_sum{{a="b"}} {seconds}\n{name}_count{{a="b"}} {count}\nvllm:generation_tokens_total {made}\n'

    right = prometheus.server_side(page(10, 7.0, 50), page(15, 7.0 + sum(ttft) - 0.01, 65))
    assert right["ttft_mean_s"] == pytest.approx(np.mean(ttft) - 0.002)
    assert [(r["figure"], r["agrees"]) for r in prometheus.cross_check(right, ours)] == [
        ("ttft_mean_s", True),
        ("output_tokens", True),
    ]
    slower = prometheus.server_side(page(0, 0.0, 0), page(5, sum(ttft) * 1.2, 15))
    assert not prometheus.cross_check(slower, ours)[0]["agrees"], "the server cannot have waited longer than we did"
    fewer = prometheus.server_side(page(0, 0.0, 0), page(5, sum(ttft), 14))
    assert not prometheus.cross_check(fewer, ours)[1]["agrees"], "tokens that the server never made"


@pytest.mark.parametrize(("cpu", "late", "saturated"), [(0.5, 0.01, 0), (0.9, 0.01, 1), (0.5, 0.2, 1), (0.9, 0.2, 2)])
def test_a_saturated_client_is_told_by_its_cpu_and_its_lateness(cpu: float, late: float, saturated: int) -> None:
    rows = [play(i, 0, float(i), [0.1, 0.01], late=late) for i in range(10)]
    busy = [{"kind": "client", "time": BEGIN + i, "worker": i % 2, "cpu": cpu if i % 2 else 0.1} for i in range(10)]
    found = metrics.summarise(rows + busy)
    assert len(found["client_why"]) == saturated
    assert found["client_saturated"] == bool(saturated)
    assert found["client_cpu"] == pytest.approx(cpu), "of the busiest process"


def test_what_was_asked_and_what_ran(rows: list[dict[str, Any]]) -> None:
    found = metrics.summarise(rows, window=(BEGIN + 0.6, BEGIN + 4.1))["traffic"]
    assert found["prompt_tokens"]["n"] == 3, "scheduled in the window"
    assert (found["prompt_tokens"]["p50"], found["fresh_tokens"]["p50"]) == (1000, 400)
    assert found["answer_tokens"]["max"] == 4
    # at .6 session 0 thinks between its turns; at 4.1 it is over, 1 thinks and 2, which never ends, is answered
    assert (found["sessions_at"], found["requests_at"]) == ([1, 2], [0, 1])
    nothing = metrics.summarise([])["traffic"]
    assert (nothing["sessions_at"], nothing["requests_at"]) == ([0, 0], [0, 0])


def test_a_request_without_an_end_is_told_from_one_that_the_end_of_the_load_cut_off() -> None:
    cut = {"kind": metrics.CUT_OFF, "message": ""}
    young = play(0, 0, 0.0, [0.1, 0.2], end=BEGIN + metrics.STUCK_S - 1, error=cut)
    old = play(1, 0, 0.0, [0.1, 0.2], end=BEGIN + metrics.STUCK_S + 1, error=cut)
    slow = play(2, 0, 0.0, [0.1, metrics.STUCK_S])
    found = metrics.summarise([young, old, slow])
    assert (found["unfinished"], found["stuck"]) == (2, 1)
