"""The Locust file on its own: without the project installed, against a server it knows nothing about."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from blackwell_kernels.e2e import cli, load, metrics, stream
from blackwell_kernels.e2e.server import Server, free_port

from .test_server import eventually, quiet

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


def requests(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["kind"] == "request" and row["error"] is None]


def play(fake: list[str], tmp_path: Path, enough: Callable[[list[dict[str, Any]]], object], *more: str) -> list[Any]:
    """All rows of a run of the Locust file against the stand-in, ended when there are enough, however long it takes."""

    def recorded() -> tuple[list[dict[str, Any]], list[str]]:
        return metrics.read_records(sorted(tmp_path.glob("records*.jsonl")))

    with Server(tmp_path, tmp_path, command=fake) as server, (tmp_path / "locust.log").open("wb") as log:
        server.wait_ready(quiet())
        command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", server.base_url, "--headless"]
        command += ["--users", "8", "--spawn-rate", "8", "--run-time", "600s", "--scenario", "demo"]
        command += ["--records", str(tmp_path / "records.jsonl"), "--set", "output_scale=0.02", *more]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            done = eventually(lambda: enough(recorded()[0]) or process.poll() is not None)
            process.terminate()
            code = process.wait(180)
    rows, complaints = recorded()
    assert (done, bool(enough(rows)), code, complaints) == (True, True, 0, []), (tmp_path / "locust.log").read_text()
    return rows


def test_headless_run_and_its_report(fake: list[str], tmp_path: Path) -> None:
    rows = play(fake, tmp_path, lambda rows: len(requests(rows)) > 2, "--set", "sessions_per_s=5.0")
    assert rows[0]["scenario"]["sessions_per_s"] == 5.0
    assert rows[-1]["kind"] == "stop"
    figures = metrics.summarise(rows)
    assert figures["completed"] > 2
    assert figures["errors"] == {}

    records = tmp_path / "records.jsonl"
    result = CliRunner().invoke(cli.app, ["report", str(records), "--out", str(tmp_path / "report"), "--json"])
    assert result.exit_code == 0, result.output
    load = json.loads(result.output)["load"]
    assert set(load.pop("figures")) == set(metrics.FIGURES)
    assert load == figures
    assert (tmp_path / "report" / "report.html").exists()


def test_processes_share_the_sessions_and_their_clock(fake: list[str], tmp_path: Path) -> None:
    def of_both(rows: list[dict[str, Any]]) -> bool:
        load_of = {row["worker"] for row in rows if row["kind"] == "client"}
        return len({row["id"][0] for row in requests(rows)}) == len(load_of) == 2

    more = ("--processes", "2", "--set", "sessions_per_s=6.0", "--set", "gap_cap_s=0.2")
    rows = play(fake, tmp_path, of_both, *more)
    assert {path.name for path in tmp_path.glob("records*.jsonl")} == {"records-0.jsonl", "records-1.jsonl"}
    starts = [row for row in rows if row["kind"] == "start"]
    assert {row["worker"] for row in starts} == {0, 1}
    assert starts[0]["started"] == starts[1]["started"]
    played = [(row["session"], row["turn"]) for row in requests(rows)]
    assert len(played) == len(set(played)), "no turn twice"
    by_process = [{row["session"] % 2 for row in requests(rows) if row["id"].startswith(f"{i}.")} for i in (0, 1)]
    assert by_process == [{0}, {1}]
    assert all(row["cpu"] >= 0 for row in rows if row["kind"] == "client")


def test_a_master_and_its_workers_as_on_several_hosts(fake: list[str], tmp_path: Path) -> None:
    port = str(free_port())
    meet = ["--master-host", "127.0.0.1", "--master-port", port]
    command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE)]
    with (tmp_path / "workers.log").open("wb") as log:
        workers = [subprocess.Popen([*command, "--worker", *meet], stdout=log, stderr=log) for _ in range(2)]
        try:
            more = ("--master", "--expect-workers", "2", "--master-bind-host", "127.0.0.1", "--master-bind-port", port)
            options = ("--set", "sessions_per_s=6.0", "--set", "gap_cap_s=0.2")
            rows = play(fake, tmp_path, lambda rows: len({r["id"][0] for r in requests(rows)}) == 2, *more, *options)
            assert [worker.wait(60) for worker in workers] == [0, 0], "they end with their master"
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    played = [(row["session"], row["turn"]) for row in requests(rows)]
    assert len(played) == len(set(played)), "no turn twice"
    assert {row["scenario"]["sessions_per_s"] for row in rows if row["kind"] == "start"} == {6.0}, (
        "the master's options"
    )


def test_the_web_ui_starts_and_stops_a_load(fake: list[str], tmp_path: Path) -> None:
    port, records = free_port(), tmp_path / "records.jsonl"
    page = f"http://127.0.0.1:{port}"

    def ask(path: str, **form: Any) -> str:
        data = urllib.parse.urlencode(form).encode() if form else None
        with urllib.request.urlopen(f"{page}/{path}", data, timeout=30) as reply:
            return reply.read().decode()

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return "Locust" in ask("")
        return False

    with Server(tmp_path, tmp_path, command=fake) as server, (tmp_path / "locust.log").open("wb") as log:
        server.wait_ready(quiet())
        command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", server.base_url]
        command += ["--web-host", "127.0.0.1", "--web-port", str(port), "--records", str(records)]
        command += ["--scenario", "demo", "--set", "output_scale=0.02", "--set", "sessions_per_s=5.0"]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            assert eventually(answers), (tmp_path / "locust.log").read_text()
            assert json.loads(ask("swarm", user_count=4, spawn_rate=4, host=server.base_url))["success"]
            assert eventually(lambda: records.exists() and len(requests(metrics.read_records([records])[0])) > 2)
            assert json.loads(ask("stop"))["success"]
            assert eventually(lambda: metrics.read_records([records])[0][-1]["kind"] == "stop")
            named = {row["name"] for row in json.loads(ask("stats/requests"))["stats"]}
            process.terminate()
            process.wait(60)
    assert named >= {"TTFT", "TPOT", "E2E"}


def waits(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(the parent's answer before, a sub-agent's request, the parent's next request) wherever there is all of it."""
    done = requests(rows)
    parents = {(row["session"], row["turn"]): row for row in done if row["agent"] is None}
    found = []
    for agent in (row for row in done if row["agent"] is not None):
        session, turn = str(agent["agent"]).split(".")[0].split("/")
        place = int(session), int(turn)
        if place in parents:
            assert agent["session"] == place[0]
            found.append((parents[place[0], place[1] - 1], agent, parents[place]))
    return found


def test_a_parent_waits_for_its_sub_agents(fake: list[str], tmp_path: Path) -> None:
    more = ("--set", "fanout_share=0.6", "--set", "gap_cap_s=0.1", "--set", "sessions_per_s=3.0")
    for before, agent, after in waits(play(fake, tmp_path, waits, *more)):
        assert before["end"] <= agent["sent"], "not before the parent's last answer"
        assert agent["end"] <= after["sent"], "the parent waits"


def test_recorded_sessions_and_dropped_requests(fake: list[str], tmp_path: Path) -> None:
    source = tmp_path / "s.jsonl"
    turns = [[float(i), 100 + 10 * i, 20, min(i, 1), 1, 0.1, 0.1] for i in range(4)]
    session = {"id": "s", "block": 64, "tools": 0, "system": 0, "turns": turns}
    source.write_text(json.dumps(session) + "\n")

    def first(rows: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
        mine = [row for row in requests(rows) if row["session"] == "s"]
        return [(row["turn"], row["prompt_tokens"], row["expected_tokens"]) for row in mine]

    def three(rows: list[dict[str, Any]]) -> bool:
        return len(first(rows)) == 4 and {row["session"] for row in requests(rows)} > {"s", "s#1"}

    scales = ("--set", "context_scale=1.0", "--set", "output_scale=1.0")
    rows = play(fake, tmp_path, three, "--source", str(source), "--set", "sessions_per_s=3.0", *scales)
    assert rows[0]["source"]["format"] == "re-encoded sessions"
    assert first(rows) == [(0, 100, 20), (1, 110, 20), (2, 120, 20), (3, 130, 20)]
    (tmp_path / "records.jsonl").unlink()
    rows = play(fake, tmp_path, requests, "--set", "abort_share=1.0", "--set", "output_scale=0.2")
    assert all(row["aborted"] and len(row["tokens"]) < row["expected_tokens"] for row in requests(rows))


def test_nothing_is_sent_after_the_time_for_sending(fake: list[str], tmp_path: Path) -> None:
    def later(rows: list[dict[str, Any]]) -> bool:
        """Answers there were, and a look at the clock well after the time for sending."""
        looks = [row["time"] for row in rows if row["kind"] == "client"]
        return bool(requests(rows)) and max(looks, default=0.0) > rows[0]["started"] + 4.0

    more = ("--send-for", "1.5", "--set", "sessions_per_s=8.0", "--set", "gap_cap_s=0.2")
    rows = play(fake, tmp_path, later, *more)
    started = rows[0]["started"]
    assert all(row["scheduled"] <= started + 1.5 for row in rows if row["kind"] == "request")
    # a busy host may need longer for the last answers
    errors = [row["error"] for row in rows if row["kind"] == "request" and row["error"]]
    assert all(error["kind"] == stream.CUT_OFF for error in errors)


def test_unknown_settings_end_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", "http://127.0.0.1:9", "--headless"]
    command += ["--run-time", "1s", "--set", "speed=3", "--records", str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unknown scenario settings speed" in done.stderr + done.stdout
    assert not (tmp_path / "r.jsonl").exists()
