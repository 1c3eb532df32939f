"""Runs a job in a worker process and survives what it measures.

An implementation that hangs, crashes, breaks the CUDA context or exhausts memory costs its own entry: the worker is
killed with its process group, the entry says what happened, and a new worker repeats that case without it. Ours and
its peers stay in one process and take turns there, so ratios stay fair.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from blackwell_kernels.errors import BlackwellKernelsError
from blackwell_kernels.microbench.worker import Job, Message, not_begun

QUIET_S = 600.0  # FlashInfer compiles some kernels at first use, for minutes
MAX_LOSSES = 2  # of one implementation on one definition, then it is left out of the definition's other cases
_POLL_S = 0.5
_END_S = 10.0


class WorkerError(BlackwellKernelsError, RuntimeError):
    """The worker cannot even start."""


def run(job: Job, *, quiet_s: float = QUIET_S, memory_bytes: int | None = None) -> Iterator[Message]:
    """The worker's `head`, `row` and `failed` messages, each case once, in order.

    quiet_s: a worker that says nothing for so long hangs. memory_bytes: host memory its process group may hold,
    90 % of what this machine lets us have by default.

    Raises: WorkerError when a worker ends before it measured anything and without a culprit.
    """
    limit = memory_bytes or int(0.9 * _machine_bytes())
    pending, losses = list(job.cases), Counter[tuple[str, str]]()
    while pending:
        if job.head is not None and job.late():  # a worker needs seconds to find that out
            yield from not_begun(pending)
            return
        worker = _Worker(job.model_copy(update={"cases": pending}), quiet_s, limit)
        told = 0
        for message in worker.messages():
            if "head" in message:
                if job.head is None:
                    yield message
                job = job.model_copy(update={"head": message["head"]})
            else:
                told += 1
                yield message
        pending = pending[told:]
        if not pending:
            return
        definition, case = pending[0]
        culprit, why = worker.culprit, worker.why
        if not worker.started:
            raise WorkerError(f"the measuring process ended at its start: {why}")
        if not culprit or any(entry[:3] == (definition, case, culprit) for entry in job.skip):
            yield {"failed": [case, why]}
            pending = pending[1:]
            continue
        losses[definition, culprit] += 1
        skip = [*job.skip, (definition, case, culprit, why)]
        if losses[definition, culprit] >= MAX_LOSSES:
            skip.append((definition, "*", culprit, f"left out after {MAX_LOSSES} cases that ended the process: {why}"))
        job = job.model_copy(update={"skip": skip})


class _Worker:
    """One process. After `messages` is exhausted, `culprit` and `why` say who ended it early and how."""

    def __init__(self, job: Job, quiet_s: float, memory_bytes: int) -> None:
        self.job, self.quiet_s, self.memory_bytes = job, quiet_s, memory_bytes
        self.started = False
        self.culprit, self.why = "", ""
        self._phase = "start"

    def messages(self) -> Iterator[Message]:
        """Its messages but for steps and losses, which are noted here."""
        reader, writer = os.pipe()
        with tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as told, open(reader, "rb") as heard:
            told.write(self.job.model_dump_json().encode())
            told.seek(0)
            command = [sys.executable, "-m", "blackwell_kernels.microbench.worker", str(writer), str(os.getpid())]
            child = subprocess.Popen(
                command, stdin=told, stdout=log, stderr=log, pass_fds=(writer,), start_new_session=True
            )
            os.close(writer)
            try:
                yield from self._listen(child, heard)
            finally:
                _kill(child)
            self.why += _last_line(log) if self.why.startswith("it ended") else ""

    def _listen(self, child: subprocess.Popen[bytes], heard: IO[bytes]) -> Iterator[Message]:
        buffer, last = b"", time.monotonic()
        while True:
            if select.select([heard], [], [], _POLL_S)[0]:
                received = os.read(heard.fileno(), 1 << 16)
                if not received:
                    self._ended(child)
                    return
                last, buffer = time.monotonic(), buffer + received
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    if self._noted(message):
                        continue
                    yield message
                    last = time.monotonic()  # the reader's own time does not count
            elif child.poll() is not None:  # something it started holds the pipe open
                self._ended(child)
                return
            allowed = self.quiet_s if self.started else max(self.quiet_s, QUIET_S)  # imports are nobody's fault
            if time.monotonic() - last > allowed:
                self.why = f"killed: no end after {allowed:.0f} s ({self._phase})"
                return
            held = _group_bytes(child.pid)
            if held > self.memory_bytes:
                self.why = f"killed: {held >> 20:,} MiB of memory, allowed {self.memory_bytes >> 20:,} ({self._phase})"
                return

    def _noted(self, message: Message) -> bool:
        if "step" in message:
            _, self.culprit, self._phase = message["step"]
        elif "lost" in message:
            self.culprit, self.why = message["lost"]
        else:
            self.started |= "head" in message
            # between rows nobody runs
            self.culprit, self._phase = "", "between cases"
            return False
        return True

    def _ended(self, child: subprocess.Popen[bytes]) -> None:
        if self.why:
            return
        try:
            status = child.wait(_END_S)
        except subprocess.TimeoutExpired:
            status = 0
        if status < 0:
            # 9 that we did not send is the kernel's, for want of memory
            name = signal.Signals(-status).name + (", as when memory is exhausted" if status == -9 else "")
            self.why = f"it ended the process by {name} ({self._phase})"
        else:
            self.why = f"it ended the process with status {status} ({self._phase})"


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_line(log: Any) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
    lines = log.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1].strip()[:300]}" if lines else ""


def _group_bytes(group: int) -> int:
    """Resident bytes of all processes of a process group; 0 where /proc does not tell."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the fields after the command's name, which may hold spaces and parentheses
            fields = stat.read_text().rpartition(")")[2].split()
            total += int(fields[21]) if int(fields[2]) == group else 0
        except (OSError, IndexError, ValueError):
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def _machine_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return total
