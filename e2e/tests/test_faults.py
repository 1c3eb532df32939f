"""What goes wrong around a load: its generator killed, the disk full, Ctrl-C, a port taken. Nothing is lost or left."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from blackwell_kernels.e2e import compare, demo, load, points, processes, report, sessions
from blackwell_kernels.e2e.server import HOST, Server, free_port, port_in_use
from blackwell_kernels.errors import BlackwellKernelsError

from .test_compare import options, passed, run
from .test_compare import steady as steady
from .test_server import alive, eventually, quiet


def load_processes(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Grows by each load generator that is started from now on."""
    spawn, started = processes.spawn, []

    def remember(*args: Any) -> subprocess.Popen[bytes]:
        started.append(spawn(*args))
        return started[-1]

    monkeypatch.setattr(load.processes, "spawn", remember)
    return started


def test_a_load_generator_that_is_killed_leaves_its_records(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        started = load_processes(monkeypatch)

        def kill() -> None:
            eventually(lambda: sum(len(p.read_text()) for p in tmp_path.glob("records*.jsonl")) > 4000)
            started[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        traffic = sessions.named("demo", sessions_per_s=8.0, gap_cap_s=0.1)
        with pytest.raises(BlackwellKernelsError, match="the load generator was killed by SIGKILL; the end of"):
            load.run(server, traffic, tmp_path, load.Plan(users=8, seconds=120.0, processes=2), quiet())
        killer.join()
        assert server.healthy(), "a client that goes away does the server no harm"
    rows, _ = load.read(tmp_path)
    assert sum(row["kind"] == "request" for row in rows) > 3
    assert eventually(lambda: processes.survivors(started[0].pid) == []), "its processes went with it"


def test_a_load_process_that_is_killed_invalidates_the_point(
    fake: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = points.Setup(seconds=12.0, ramp_s=0.5, drain_s=0.5, users=8, processes=2)
    traffic = sessions.named("demo", sessions_per_s=8.0, gap_cap_s=0.1, output_scale=0.02)
    with Server(tmp_path, tmp_path / "server", command=fake) as server:
        server.wait_ready(quiet())
        started = load_processes(monkeypatch)

        def kill() -> None:
            eventually(lambda: len(list((tmp_path / "point").glob("records-*.jsonl"))) == 2)
            psutil.Process(started[0].pid).children()[0].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        found = points.measure(server, traffic, tmp_path / "point", setup, quiet(), {})
        killer.join()
    assert any("was gone" in why for why in found["invalid"]), found["invalid"]
    assert found["summary"]["completed"] > 0, "the other's answers are kept"
    assert processes.survivors(started[0].pid) == []


def test_a_process_that_writes_to_the_end_is_not_gone() -> None:
    rows = [{"kind": "start", "worker": n, "time": 100.0} for n in (0, 1, 2)]
    rows += [{"kind": "client", "worker": n, "time": 100.0 + t} for n in (0, 1) for t in range(30 - 20 * n)]
    assert points.gone(rows, 131.0) == ["load process 1 was gone 22 s early", "load process 2 was gone 31 s early"]


def test_ctrl_c_then_the_same_command_goes_on(fake: list[str], tmp_path: Path, steady: None) -> None:
    port, child = free_port(), tmp_path / "child"
    chosen = options(fake, tmp_path / "out", port=port)
    code = f"""
import signal
import sys
from pathlib import Path
from blackwell_kernels.e2e import compare, metrics, points, serving
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to Ctrl-C
metrics.LATE_S = metrics.CPU_SHARE = 60.0  # as `steady` here: how busy this machine is is not under test
served = serving.Serving.choose("qwen3-next", backend="cpu", command={fake!r}, env={{}})
traffic = serving.traffic(served, None, {{"gap_cap_s": 0.1, "output_scale": 0.02}}, 0)
setup = points.Setup(seconds=1.5, ramp_s=0.3, drain_s=0.7, users=8)
sys.exit(compare.run(compare.Options(served, traffic, setup, Path({str(tmp_path / "out")!r}), rates=(1.0, 2.0),
                                     warmup_s=0.0, repeats=1, port={port})))
"""
    env = {**os.environ, "FAKE_CHILD": str(child)}
    first = compare.point_folder(chosen, 0, "stock", 1.0) / "point.json"
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL) as process:
        assert eventually(first.exists)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(180) == demo.INTERRUPTED
    assert eventually(lambda: not alive(int(child.read_text())))
    assert not port_in_use(port)
    stopped = json.loads((tmp_path / "out" / "result.json").read_text())
    assert stopped["state"] == "stopped by Ctrl-C; the same command goes on from here."
    assert 1 <= len(stopped["points"]) < 4

    ended, result, printed = run(chosen)
    assert ended == demo.OK, printed
    assert "going on with the comparison" in printed
    assert result["points"][: len(stopped["points"])] == stopped["points"], "measured once"
    assert passed(result)["complete"]


def test_a_full_disk_says_where_the_records_are(tmp_path: Path) -> None:
    def write() -> dict[str, Path]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(BlackwellKernelsError, match=r"cannot write the report: .*No space left.*every record is in"):
        report.kept(write, tmp_path)


def test_what_a_full_disk_refused_leaves_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tempfile.NamedTemporaryFile

    def full(*arguments: Any, **more: Any) -> Any:
        def write(text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        file = made(*arguments, **more)
        file.write = write  # type: ignore[method-assign]
        return file

    report.write_atomic(tmp_path / "point.json", "{}")
    monkeypatch.setattr(report.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        report.write_atomic(tmp_path / "point.json", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["point.json"]
    assert (tmp_path / "point.json").read_text() == "{}"


def test_a_port_that_is_taken(fake: list[str], tmp_path: Path, steady: None) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        chosen = replace(options(fake, tmp_path), port=other.getsockname()[1])
        code, result, printed = run(chosen)
    assert code == demo.ENVIRONMENT
    assert "is in use by another program: stop it, or choose another with --port" in printed
    assert result["points"] == []
