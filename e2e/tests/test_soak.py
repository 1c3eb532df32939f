"""A short soak of a stand-in: mixed traffic, malformed requests; and checks that can fail."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blackwell_kernels.e2e import demo, faults, load, metrics, points, serving, soak, warm_up, watch
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import Server

from .test_metrics import request
from .test_server import quiet


def run(fake: list[str], out: Path, **env: str) -> tuple[int, dict[str, Any], str]:
    served = serving.Serving.choose("qwen3-next", backend="cpu", quant="fp8", command=fake, env={"plugin": env})
    traffic = soak.fitted(served, 4.0, {"gap_cap_s": 0.1, "output_scale": 0.05, "abort_share": 0.3}, 0)
    setup = points.Setup(seconds=4.0, ramp_s=0.5, drain_s=1.0, users=16)
    printed = io.StringIO()
    chosen = soak.Options(served, traffic, setup, out, faults_every_s=0.5, command="test")
    code = soak.run(chosen, Steps(Console(file=printed)), Console(file=printed, width=140))
    return code, json.loads((out / "result.json").read_text()), printed.getvalue()


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """How busy this machine is with other things is not under test."""
    monkeypatch.setattr("blackwell_kernels.e2e.metrics.LATE_S", 60.0)
    monkeypatch.setattr("blackwell_kernels.e2e.metrics.CPU_SHARE", 60.0)


def test_mixed_traffic_and_malformed_requests(fake: list[str], tmp_path: Path, steady: None) -> None:
    code, result, printed = run(fake, tmp_path)
    assert code == demo.OK, printed
    found = {check["name"]: check["passed"] for check in result["checks"]}
    assert found["answers"]
    assert found["malformed requests refused"]
    assert found["nothing left running"]
    assert found["own memory is flat"] is None, "four seconds say nothing about memory"
    server = next(iter(result["processes"].values()))
    assert len(server["own"]) == len(server["files"]) == 3
    assert "pages of files" in printed
    assert set(result["faults"]) == set(faults.malformed(1024, 1000))
    assert result["load"]["aborted"] > 0
    rows, _ = load.read(tmp_path / "traffic")
    assert any(row["agent"] for row in rows if row["kind"] == "request") or result["load"]["requests"] < 30
    assert len(result["windows"]) == soak.WINDOWS
    assert sum(row["requests"] for row in result["windows"]) == result["load"]["requests"]
    assert "Malformed requests" in (tmp_path / "report.html").read_text()

    again, _, _ = run(fake, tmp_path)
    assert again == demo.OK
    assert (tmp_path / "before-0" / "result.json").exists(), "an earlier soak is kept"


LEAKS = """
import runpy, sys, threading, time

kept = []

def leak():
    while True:
        kept.append(bytes([1]) * (1 << 20))
        time.sleep(0.02)

threading.Thread(target=leak, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_server_that_leaks_is_caught(
    fake: list[str], tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak, "MEMORY_FROM_S", 1.0)
    monkeypatch.setattr(watch, "Watch", partial(watch.Watch, every_s=0.1))
    code, result, printed = run([fake[0], "-c", LEAKS, *fake[1:]], tmp_path)
    found = {check["name"]: check["passed"] for check in result["checks"]}
    assert code == demo.FAILED, printed
    assert found["own memory is flat"] is False
    assert [name for name, passed in found.items() if passed is False] == ["own memory is flat"]


def test_memory_may_grow_in_the_first_minutes_and_pages_of_files_may_come_back() -> None:
    def drifting(key: str, late: float) -> set[str]:
        rows = [{"time": float(t), **dict.fromkeys((*soak.MEMORY, "rss"), 1e9)} for t in range(1200)]
        for row in rows:
            row[key] *= 1 + 0.1 * min(row["time"], 600.0) / 600 + late * max(row["time"] - 600.0, 0.0) / 600
        found = soak._memory(rows, (0.0, 1200.0))
        return {name for name, one in found.items() if name in soak.MEMORY and one and one["drift"] > soak.MEMORY_DRIFT}

    assert drifting("own_memory", 0.0) == set()
    assert drifting("own_memory", 0.03) == {"own_memory"}
    assert drifting("mapped_files", 0.03) == {"mapped_files"}, "which bounds what pages of files can hide"
    assert drifting("rss", 0.03) == set()


def test_a_worker_that_dies_ends_it_with_what_was_measured(fake: list[str], tmp_path: Path, steady: None) -> None:
    warm_up_ = warm_up.REQUESTS * warm_up.FEWEST_ROUNDS
    code, result, printed = run(fake, tmp_path, FAKE_DIE_AFTER=str(warm_up_ + 9))
    assert code == demo.ENVIRONMENT
    assert "killed by SIGKILL" in result["state"]
    assert not next(c for c in result["checks"] if c["name"] == "ran to its end")["passed"]
    assert "error: vLLM was killed by SIGKILL" in printed
    rows, _ = load.read(tmp_path / "traffic")
    assert sum(row["kind"] == "request" for row in rows) >= 5


def test_what_is_compiled_for_the_first_requests_is_not_compiled_under_load(
    fake: list[str], tmp_path: Path, steady: None
) -> None:
    code, result, printed = run(fake, tmp_path, FAKE_JIT_AFTER="5")
    assert code == demo.OK, printed
    assert next(c for c in result["checks"] if c["name"] == "no compilation under load")["passed"]


def test_a_server_that_dies_in_the_warm_up_is_named(fake: list[str], tmp_path: Path, steady: None) -> None:
    code, result, _ = run(fake, tmp_path, FAKE_DIE_AFTER="5")
    assert code == demo.ENVIRONMENT
    assert "killed by SIGKILL" in result["state"]


def test_a_request_without_an_end_is_a_failure() -> None:
    load_ = {"errors": {}, "client_why": [], "completed": 9, "aborted": 1, "seconds": 10.0}
    rest: dict[str, Any] = {"state": "complete", "faults": {}, "drift": {}, "point": None}
    rest |= {"memory": dict.fromkeys(soak.MEMORY), "series": {key: {} for key in soak.MEMORY}}
    for stuck, passed in ((0, True), (1, False)):
        found = {c["name"]: c for c in soak.checks({"load": {**load_, "stuck": stuck}, **rest}, [])}
        assert found["answers"]["passed"] is passed
        assert ("1 without an end after 120 s" in found["answers"]["detail"]) is bool(stuck)


def test_what_ends_a_moment_after_the_server_is_not_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([["EngineCore (7)"], ["EngineCore (7)"], []])
    monkeypatch.setattr(soak.processes, "survivors", lambda group: next(seen))
    assert soak.still_running(1) == []
    monkeypatch.setattr(soak, "ENDING_S", 0.0)
    monkeypatch.setattr(soak.processes, "survivors", lambda group: ["EngineCore (7)"])
    assert soak.still_running(1) == ["EngineCore (7)"]


def test_malformed_requests_by_themselves(fake: list[str], tmp_path: Path) -> None:
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        assert faults.longest(server.base_url, 5) == 1000
        heckler = faults.Heckler(server.base_url, tmp_path / "faults.jsonl", faults.malformed(1024, 1000), 1.0)
        rows = heckler.round()
        assert [row["status"] for row in rows] == [400] * 7
        fine = faults.send(server.base_url, "fine", b'{"model": "tiny", "prompt": [3], "max_tokens": 1}')
        assert (fine["status"], fine["passed"]) == (200, False), "an answer is no refusal"
    gone = faults.send(server.base_url, "no JSON", b"{")
    assert (gone["status"], gone["passed"]) == (None, False)


def test_a_tail_that_creeps_up_is_found() -> None:
    def rows(growth: float) -> list[dict[str, Any]]:
        made = []
        for i in range(14_400):
            at = i * 0.25
            ttft = 0.1 * (1 + growth * at / 3600) * (1 + i % 100 / 100)
            made.append(request(i, 0, at, [at + ttft, at + ttft + 0.01]))
        return made

    for growth, drifts in ((0.0, False), (0.5, True)):
        windows = soak._windows(rows(growth), [], (0.0, 3600.0), metrics.Slo())
        found = soak._drift(windows, "ttft_p99")
        assert isinstance(found, dict)
        assert (found["drift"] > soak.P99_DRIFT) == drifts
    assert "n too small" in str(
        soak._drift(soak._windows(rows(0.0)[:400], [], (0.0, 100.0), metrics.Slo()), "ttft_p99")
    )
