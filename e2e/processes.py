"""Child processes that never outlive us: own session, ended as a group, and by the kernel if we are killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

STOP_S = 20.0  # for an orderly end, before SIGKILL
GROUP_S = 3.0  # for the rest of the group, after its leader ended


def spawn(command: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command as the leader of a new session, output into `log`. Raises OSError when it cannot run."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def end(process: subprocess.Popen[bytes], stop_s: float = STOP_S) -> None:
    """End a spawned process and all of its group; returns when none is left, never raises."""
    group = process.pid  # the leader of its session
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(stop_s)
    deadline = time.monotonic() + GROUP_S
    while group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def group_alive(group: int) -> bool:
    """Whether any process of the group exists."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def survivors(group: int) -> list[str]:
    """Names and ids of the group's processes that still run; one that ended and that nobody reaped does not."""
    import psutil

    found = []
    for process in psutil.process_iter(["name", "status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(f"{process.info['name']} ({process.pid})")
    return found


def how_it_ended(code: int) -> str:
    """An exit code in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def tail(path: Path, lines: int, size: int = 65536) -> str:
    """The last lines of a log, or nothing when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


_stopped_by: list[str] = []


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise a KeyboardInterrupt that names them, so that every `with` gets to clean up.

    A SIGINT that is ignored (by a shell's background job) stays so. Loops that wait call `raise_if_stopped`.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _stopped_by.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        raise_if_stopped()

    taken = [signal.SIGTERM, signal.SIGHUP]
    taken += [signal.SIGINT] if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN else []
    before = {number: signal.signal(number, interrupt) for number in taken}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _stopped_by.clear()


def raise_if_stopped() -> None:
    """Raise again what a signal raised: Python drops an exception out of a fork's callback or a finaliser."""
    if _stopped_by and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt(_stopped_by[0])


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
