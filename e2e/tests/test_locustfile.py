"""The Locust file on its own: without the project installed, against a server it knows nothing about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from blackwell_kernels.e2e import cli, load, metrics, stream
from blackwell_kernels.e2e.server import Server

from .test_server import quiet

E2E = load.LOCUSTFILE.parent


def test_needs_nothing_of_the_project_but_the_file_beside_it() -> None:
    code = (
        "import sys; sys.modules['blackwell_kernels'] = None; sys.path.insert(0, sys.argv[1]); "
        "import locust, locustfile; "
        "assert locustfile.named.__module__ == 'sessions'; "
        "assert not [m for m in sys.modules if m in ('torch', 'vllm', 'triton')]"
    )
    done = subprocess.run([sys.executable, "-c", code, str(E2E)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_headless_run_and_its_report(fake: list[str], tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", server.base_url, "--headless"]
        command += ["--users", "3", "--spawn-rate", "3", "--run-time", "4s", "--records", str(records)]
        command += ["--scenario", "demo", "--set", "sessions_per_s=5.0", "--set", "output_scale=0.02"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, complaints = metrics.read_records([records])
    assert complaints == []
    assert rows[0]["scenario"]["sessions_per_s"] == 5.0
    assert rows[-1]["kind"] == "stop"
    figures = metrics.summarise(rows)
    assert figures["completed"] > 2
    assert figures["errors"] == {}

    result = CliRunner().invoke(cli.app, ["report", str(records), "--out", str(tmp_path / "report"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["load"] == figures
    assert (tmp_path / "report" / "report.html").exists()


def play(fake: list[str], tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    """All rows of a short run of the Locust file against the stand-in."""
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", server.base_url, "--headless"]
        command += ["--users", "8", "--spawn-rate", "8", "--run-time", "5s", "--scenario", "demo"]
        command += ["--records", str(tmp_path / "records.jsonl"), "--set", "output_scale=0.02", *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows, complaints = metrics.read_records(sorted(tmp_path.glob("records*.jsonl")))
    assert complaints == []
    return rows


def requests(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "request" and row["error"] is None]


def test_processes_share_the_sessions_and_their_clock(fake: list[str], tmp_path: Path) -> None:
    rows = play(fake, tmp_path, "--processes", "2", "--set", "sessions_per_s=6.0", "--set", "gap_cap_s=0.2")
    assert {path.name for path in tmp_path.glob("records*.jsonl")} == {"records-0.jsonl", "records-1.jsonl"}
    starts = [row for row in rows if row["kind"] == "start"]
    assert {row["worker"] for row in starts} == {0, 1}
    assert starts[0]["started"] == starts[1]["started"]
    played = [(row["session"], row["turn"]) for row in requests(rows)]
    assert len(played) == len(set(played)), "no turn twice"
    by_process = [{row["session"] % 2 for row in requests(rows) if row["id"].startswith(f"{i}.")} for i in (0, 1)]
    assert by_process == [{0}, {1}]
    assert {row["worker"] for row in rows if row["kind"] == "client"} == {0, 1}
    assert all(row["cpu"] >= 0 for row in rows if row["kind"] == "client")


def test_a_parent_waits_for_its_sub_agents(fake: list[str], tmp_path: Path) -> None:
    rows = play(fake, tmp_path, "--set", "fanout_share=0.6", "--set", "gap_cap_s=0.1", "--set", "sessions_per_s=3.0")
    done = requests(rows)
    agents = [row for row in done if row["agent"] is not None]
    assert agents
    waited = 0
    for row in done:
        if row["agent"] is not None or row["turn"] == 0:
            continue
        mine = [a for a in agents if str(a["agent"]).startswith(f"{row['session']}/{row['turn']}.")]
        before = next(
            r for r in done if (r["session"], r["turn"], r["agent"]) == (row["session"], row["turn"] - 1, None)
        )
        for agent in mine:
            waited += 1
            assert agent["session"] == row["session"]
            assert before["end"] <= agent["sent"], "not before the parent's last answer"
            assert agent["end"] <= row["sent"], "the parent waits"
    assert waited


def test_recorded_sessions_and_dropped_requests(fake: list[str], tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl"
    turns = [[float(i), 100 + 10 * i, 20, min(i, 1), 1, 0.1, 0.1] for i in range(4)]
    session = {"id": "s", "block": 64, "tools": 0, "system": 0, "turns": turns}
    source.write_text(json.dumps(session) + "\n")
    scales = ("--set", "context_scale=1.0", "--set", "output_scale=1.0")
    rows = play(fake, tmp_path, "--source", str(source), "--set", "sessions_per_s=3.0", *scales)
    assert rows[0]["source"]["format"] == "re-encoded sessions"
    first = [row for row in requests(rows) if row["session"] == "s"]
    assert [(row["turn"], row["prompt_tokens"], row["expected_tokens"]) for row in first] == [
        *((0, 100, 20), (1, 110, 20), (2, 120, 20), (3, 130, 20)),
    ]
    assert {row["session"] for row in requests(rows)} > {"s", "s#1"}
    (tmp_path / "records.jsonl").unlink()
    rows = play(fake, tmp_path, "--set", "abort_share=1.0", "--set", "output_scale=0.2")
    assert requests(rows)
    assert all(row["aborted"] and len(row["tokens"]) < row["expected_tokens"] for row in requests(rows))


def test_nothing_is_sent_after_the_time_for_sending(fake: list[str], tmp_path: Path) -> None:
    rows = play(fake, tmp_path, "--send-for", "1.5", "--set", "sessions_per_s=8.0", "--set", "gap_cap_s=0.2")
    started = rows[0]["started"]
    sent = [row["sent"] for row in rows if row["kind"] == "request"]
    assert sent
    assert all(row["scheduled"] <= started + 1.5 for row in rows if row["kind"] == "request")
    # a busy host may need longer for the last answers than the run lasts
    errors = [row["error"] for row in rows if row["kind"] == "request" and row["error"]]
    assert all(error["kind"] == stream.CUT_OFF for error in errors)


def test_unknown_settings_end_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", "http://127.0.0.1:9", "--headless"]
    command += ["--run-time", "1s", "--set", "speed=3", "--records", str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unknown scenario settings speed" in done.stderr + done.stdout
    assert not (tmp_path / "r.jsonl").exists()
