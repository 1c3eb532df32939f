"""The demo's whole chain with a stand-in for vLLM: complete, failing, cut short; always a report, never an orphan."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from blackwell_kernels.e2e import demo, probe, sessions
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import free_port, port_in_use

from .test_server import alive, eventually

ROW = {"n": 10, "mean": 0.01, "p99": 0.1, "max": 0.2, "noise": 0.01}
EXACT = {
    "against": "a stand-in",
    "rows": [{"prompt": 9, "generated": 1, **ROW}],
    "phases": {name: {**ROW, "ratio": 1.0} for name in ("prefill", "decode")},
    "overall": ROW,
    "factor": 1.8,
    "passed": True,
    "seconds": {"the server": 0.5},
}


@pytest.fixture(autouse=True)
def known_exactness(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """The stand-in's log-probabilities are nobody's model."""
    monkeypatch.setattr(probe, "check", lambda *_, **__: EXACT)
    monkeypatch.setattr(probe.References, "_load", lambda *_: [])
    traffic = sessions.named("demo", sessions_per_s=10.0, gap_cap_s=0.0, output_scale=0.02)
    monkeypatch.setattr(demo, "scenario", lambda *_: traffic)


def run(fake: list[str], out: Path, **changes: Any) -> tuple[int, dict[str, Any], str]:
    """(exit code, result.json, what was printed) of a demo."""
    printed = io.StringIO()
    settings = {"seconds": 3.0, "out": out, "users": 4, "server_command": fake, "command": "test", **changes}
    code = demo.run(demo.Options(**settings), Steps(Console(file=printed)), Console(file=printed, width=120))
    return code, json.loads((out / "result.json").read_text()), printed.getvalue()


class Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        names = {"src", "href", "data", "srcset", "poster", "action"}
        self.fetched += [f"{tag} {k}={v}" for k, v in attrs if k in names and not (v or "").startswith("#")]
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.fetched.append(tag)


def test_complete(fake: list[str], tmp_path: Path) -> None:
    code, result, printed = run(fake, tmp_path)
    assert code == demo.OK, printed
    assert result["state"] == "complete"
    assert result["load"]["completed"] > 3
    assert result["load"]["errors"] == {}
    assert result["server"]["generation_tokens"] >= result["load"]["output_tokens"] > 0
    assert [row["op"] for row in result["activation"]] == ["moe", "moe_routing", "gdn_decode", "gdn_prefill"]
    assert "output tokens/s" in printed
    assert "gdn_decode" in printed
    assert "next: blackwell-kernels e2e demo --model deepseek-v3.2" in printed
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    requests = [row for row in records if row["kind"] == "request" and row["error"] is None]
    assert {row["turn"] for row in requests} > {0, 1}, "sessions of several turns"
    # every token has its time, in order, and none came faster than the stand-in makes them
    for row in requests:
        assert len(row["tokens"]) == row["expected_tokens"]
        assert row["tokens"] == sorted(row["tokens"])
        assert row["end"] - row["sent"] >= 0.005 * row["expected_tokens"]


def test_what_compiles_late_is_met_before_what_is_measured(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WARMED", ("cpu",))
    monkeypatch.setenv("FAKE_JIT_AFTER", "3")
    code, result, printed = run(fake, tmp_path)
    assert code == demo.OK, printed
    assert result["warm_up"]["compiled"] == ["_late_kernel"]
    assert "compiled 1 kernels (_late_kernel)." in printed
    assert result["server"]["jit_now"] == 0
    assert "while measured requests waited" not in printed


def test_report_is_one_file_that_fetches_nothing(fake: list[str], tmp_path: Path) -> None:
    _, result, _ = run(fake, tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Outside()
    page.feed(html)
    assert page.fetched == []
    assert page.scripts >= 4, "plotly and three plots"
    assert "@import" not in html.split("<body>")[0]
    assert result["title"] in html
    for text in ("gdn_decode", "told so", "TTFT", "Timeline", "vllm"):
        assert text in html
    markdown = (tmp_path / "report.md").read_text()
    assert "| gdn_decode | cpu | 2 | 1,234 | told so |" in markdown


def test_a_server_that_dies_leaves_results_and_a_clear_error(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_DIE_AFTER", "4")
    code, result, printed = run(fake, tmp_path, seconds=30.0)
    assert code == demo.ENVIRONMENT
    assert "killed by SIGKILL" in result["state"]
    assert "fake server dies as told" in result["state"]
    assert result["load"]["completed"] >= 1
    html = (tmp_path / "report.html").read_text()
    assert "this run ended early: vLLM was killed by SIGKILL" in html
    assert "fake server dies as told" in html
    assert "next: blackwell-kernels doctor" in printed


def test_a_server_that_never_starts_is_reported_too(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_START", "fail")
    code, result, _ = run(fake, tmp_path)
    assert code == demo.ENVIRONMENT
    assert "the reason why it cannot start" in result["state"]
    assert result["load"]["requests"] == 0
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("told", "kind"),
    [("FAKE_SHORT", "wrong length"), ("FAKE_REFUSE", "HTTP 400"), ("FAKE_HANG_UP", "connection")],
)
def test_wrong_answers_fail_the_demo(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, kind: str
) -> None:
    monkeypatch.setenv(told, "1")
    code, result, printed = run(fake, tmp_path)
    assert code == demo.FAILED
    assert list(result["load"]["errors"]) == [kind]
    assert f"FAILED answers: 0 of {result['load']['requests']}" in printed


def test_operators_left_to_stock_fail_the_demo(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the stand-in reports Qwen3-Next's operators whatever it serves
    code, result, printed = run(fake, tmp_path, model="deepseek")
    assert code == demo.FAILED
    assert "not served by ours: dsa_indexer, dsa_sparse_mla, dsa_topk" in printed
    assert [c["passed"] for c in result["checks"]] == [True, True, False]


def test_ctrl_c_stops_everything_and_reports(fake: list[str], tmp_path: Path) -> None:
    port, child = free_port(), tmp_path / "child"
    code = f"""
import signal
import sys
from pathlib import Path
from blackwell_kernels.e2e import demo, probe
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to Ctrl-C
probe.check = lambda *_, **__: {EXACT!r}
probe.References._load = lambda *_: []
sys.exit(demo.run(demo.Options(seconds=60, out=Path({str(tmp_path)!r}), port={port}, server_command={fake!r})))
"""
    env = {**os.environ, "FAKE_CHILD": str(child)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL) as process:
        records = tmp_path / "records.jsonl"
        assert eventually(lambda: records.exists() and records.read_text().count("\n") > 3)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(180) == demo.INTERRUPTED
    assert eventually(lambda: not alive(int(child.read_text())))
    assert not port_in_use(port)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["state"] == "stopped by Ctrl-C."
    assert result["load"]["completed"] >= 1


def test_json_is_all_that_is_printed(fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_START", "fail")
    printed = io.StringIO()
    options = demo.Options(out=tmp_path, server_command=fake, as_json=True)
    code = demo.run(options, Steps(Console(file=io.StringIO())), Console(file=printed))
    assert code == demo.ENVIRONMENT
    assert json.loads(printed.getvalue()) == json.loads((tmp_path / "result.json").read_text())
