"""Servers start, fail and end as they should, and leave nobody behind. The server is a stand-in."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from blackwell_kernels.e2e import processes
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.server import HOST, Server, free_port, port_in_use
from blackwell_kernels.errors import ServerError


def quiet() -> Steps:
    return Steps(Console(file=io.StringIO()))


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody reaped does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], object], seconds: float = 180.0) -> bool:
    """Whether it comes true; the limit ends what hangs, however slow a loaded machine is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_ready_then_stopped(fake: list[str], tmp_path: Path) -> None:
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        assert "vllm:generation_tokens_total" in server.metrics()
        assert server.process is not None
        pid = server.process.pid
    assert not alive(pid)
    assert not port_in_use(server.port)
    command = (tmp_path / "server.log").read_text()
    assert "'--plugin', 'blackwell_kernels'" in command
    assert f"'--host', '{HOST}'" in command
    server.stop()  # again: nothing to do


def test_port_in_use_says_so_and_starts_nothing(fake: list[str], tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        server = Server(tmp_path, tmp_path, port=other.getsockname()[1], command=fake)
        with pytest.raises(ServerError, match=r"port \d+ on 127.0.0.1 is in use by another program: .*--port"):
            server.start()
        assert server.process is None


def test_a_server_that_cannot_start_shows_its_last_words(fake: list[str], tmp_path: Path) -> None:
    with (
        Server(tmp_path, tmp_path, command=fake, env={"FAKE_START": "fail"}) as server,
        pytest.raises(
            ServerError, match=r"(?s)exit code 7: RuntimeError: the reason why it cannot start\n.*server\.log"
        ),
    ):
        server.wait_ready(quiet())


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot start /no/such/vllm"):
        Server(tmp_path, tmp_path, command=["/no/such/vllm"]).start()


def test_a_killed_server_is_noticed(fake: list[str], tmp_path: Path) -> None:
    with Server(tmp_path, tmp_path, command=fake) as server:
        server.wait_ready(quiet())
        assert server.process is not None
        server.process.kill()
        server.process.wait()
        with pytest.raises(ServerError, match=r"killed by SIGKILL"):
            server.check()
        assert not server.healthy()
        with pytest.raises(ServerError, match="cannot read"):
            server.metrics()


def test_time_is_up(fake: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('still loading', flush=True); time.sleep(60)"]
    with (
        Server(tmp_path, tmp_path, command=command) as server,
        pytest.raises(ServerError, match=r"(?s)not ready after 1 s.*still loading"),
    ):
        server.wait_ready(quiet(), timeout=1.0)


def test_children_that_ignore_sigterm_are_ended_too(fake: list[str], tmp_path: Path) -> None:
    child = tmp_path / "child"
    with Server(tmp_path, tmp_path, command=fake, env={"FAKE_CHILD": str(child)}) as server:
        server.wait_ready(quiet())
        pid = int(child.read_text())
        assert alive(pid)
    assert eventually(lambda: not alive(pid))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_us_ends_the_server(fake: list[str], tmp_path: Path, end: signal.Signals) -> None:
    port = free_port()
    code = f"""
import signal
import time
from pathlib import Path
from blackwell_kernels.e2e import processes
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.processes import signals_stop
from blackwell_kernels.e2e.server import Server
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs deaf to Ctrl-C
with signals_stop(), Server(Path("x"), Path({str(tmp_path)!r}), port={port}, command={fake!r}) as server:
    server.wait_ready(Steps())
    Path({str(tmp_path)!r}, "pid").write_text(str(server.process.pid))
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as parent:
        pid_file = tmp_path / "pid"
        assert eventually(lambda: pid_file.exists() and bool(pid_file.read_text()))
        pid = int(pid_file.read_text())
        assert alive(pid)
        os.kill(parent.pid, end)
        parent.wait(180)
    assert eventually(lambda: not alive(pid))
    assert eventually(lambda: not port_in_use(port))


def test_a_signal_in_a_finaliser_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lambda raised: lost.append(raised.exc_type))

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    server = Server(Path("x"), Path("x"))
    with processes.signals_stop():
        Finalised()
        assert lost == [KeyboardInterrupt]  # Python dropped it
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            server.check()
    with pytest.raises(ServerError, match="not started"):
        server.check()


def test_survivors_are_the_processes_of_a_group_that_run(fake: list[str], tmp_path: Path) -> None:
    child = tmp_path / "child"
    with Server(tmp_path, tmp_path, command=fake, env={"FAKE_CHILD": str(child)}) as server:
        server.wait_ready(quiet())
        assert server.process is not None
        group = server.process.pid
        found = processes.survivors(group)
        assert len(found) == 2
        assert any(f"({child.read_text()})" in one for one in found)
    assert eventually(lambda: processes.survivors(group) == [])


def test_what_vllm_says_of_memory_is_read_from_its_log(tmp_path: Path) -> None:
    server = Server(tmp_path, tmp_path)
    assert server.memory_told() == {}
    server.log.write_text(
        "INFO Model loading took 75.21 GiB memory and 12.3 seconds\n"
        "INFO Graph capturing finished in 9 secs, took 0.55 GiB\nINFO Graph capturing finished in 11 secs, took 2.5 GiB"
    )
    assert server.memory_told() == {"weights": 75.21, "graphs": 2.5}
