"""Locust as a child process: started, watched beside the server, always ended; its records survive any end."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e import metrics, processes
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import Server, free_port
from blackwell_kernels.e2e.sessions import Scenario
from blackwell_kernels.e2e.stream import LEAD_S
from blackwell_kernels.errors import BlackwellKernelsError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
GRACE_S = 120.0  # beside the planned time: to start, and to end, on a host that is busy with other things


@dataclass(frozen=True)
class Plan:
    """How a load is driven. With a drain nothing is sent after `seconds`, and answers may take `drain_s` more."""

    users: int
    seconds: float
    processes: int = 1
    drain_s: float = 0.0
    source: Path | None = None


def locust_command(base_url: str, scenario: Scenario, records: Path, plan: Plan) -> list[str]:
    """The command line of a headless run."""
    settings = [f"--set={name}={json.dumps(value)}" for name, value in scenario.to_dict().items()]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--host", base_url, "--headless"]
    command += ["--users", str(plan.users), "--spawn-rate", str(plan.users)]
    whole = plan.seconds + (LEAD_S + plan.drain_s if plan.drain_s else 0.0)
    command += ["--run-time", f"{max(1, round(whole))}s"]
    if plan.drain_s:
        command += ["--send-for", str(plan.seconds)]
    if plan.processes > 1:
        # Locust's default port would be taken when two arms are loaded at once
        port = str(free_port())
        command += ["--processes", str(plan.processes), "--master-bind-port", port, "--master-port", port]
    if plan.source:
        command += ["--source", str(plan.source)]
    return [*command, "--only-summary", "--loglevel", "WARNING", "--records", str(records), *settings]


def run(server: Server, scenario: Scenario, folder: Path, plan: Plan, steps: Steps) -> None:
    """Drive `server`; records go to folder/records*.jsonl as requests end.

    Raises ServerError when the server dies meanwhile, BlackwellKernelsError when the load generator does.
    """
    records, log = folder / "records.jsonl", folder / "locust.log"
    process = processes.spawn(locust_command(server.base_url, scenario, records, plan), log, os.environ)
    start = time.monotonic()
    counter = _Counter(folder)
    seconds = LEAD_S + plan.seconds + plan.drain_s
    try:
        with steps.waiting(f"agent sessions for {seconds:.0f} s") as wait:
            while process.poll() is None:
                server.check()
                if time.monotonic() - start > seconds + GRACE_S:
                    raise BlackwellKernelsError(f"the load generator did not end by itself; see {log}")
                wait.update(counter.text())
                time.sleep(0.25)
    finally:
        processes.end(process, stop_s=5.0)
    time.sleep(0.5)  # a server that dies takes its streams down a moment before its process is gone
    server.check()
    # Locust ends with 1 when a request failed: those are in the records, with their reasons
    if process.returncode not in (0, 1) or not any(folder.glob("records*.jsonl")):
        how = processes.how_it_ended(process.returncode)
        raise BlackwellKernelsError(f"the load generator {how}; the end of {log}:\n{processes.tail(log, 25)}")


def read(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, complaints) of whatever was recorded in a folder."""
    return metrics.read_records(sorted(folder.glob("records*.jsonl")))


class _Counter:
    """Reads what was appended since the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.offsets = folder, dict[Path, int]()
        self.requests, self.tokens, self.failed = 0, 0, 0

    def text(self) -> str:
        for path in self.folder.glob("records*.jsonl"):
            with path.open("rb") as file:
                file.seek(self.offsets.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self.offsets[path] = self.offsets.get(path, 0) + len(whole)
            for line in whole.splitlines():
                row = json.loads(line)
                if row["kind"] == "request":
                    self.requests += 1
                    self.tokens += len(row["tokens"])
                    self.failed += row["error"] is not None
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.requests} requests, {self.tokens} tokens{failed}"
