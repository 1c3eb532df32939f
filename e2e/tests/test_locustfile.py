"""The Locust file on its own: without the project installed, against a server it knows nothing about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from blackwell_kernels.e2e import cli, load, metrics
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


def test_unknown_settings_end_the_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(load.LOCUSTFILE), "--host", "http://127.0.0.1:9", "--headless"]
    command += ["--run-time", "1s", "--set", "speed=3", "--records", str(tmp_path / "r.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "unknown scenario settings speed" in done.stderr + done.stdout
    assert not (tmp_path / "r.jsonl").exists()
