"""One `vllm serve` on loopback: started, awaited, watched, and always stopped with everything it started.

    with signals_stop(), Server(checkpoint, folder) as server:
        server.wait_ready(steps)
        ... server.base_url ...; server.check()

The server leads its own session and process group, so a Ctrl-C in the terminal reaches only us and we stop it in
order; if this process is killed outright, the kernel ends the server too (PR_SET_PDEATHSIG), and its engine with it.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from blackwell_kernels.e2e import processes
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.errors import ServerError

HOST = "127.0.0.1"
LOG_LINES = 15
SERVED_NAME = "tiny"

# the console script's first line names one interpreter; the module runs with this one
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")

COMMON_ENV = {
    "VLLM_HOST_IP": HOST,
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # compilations, memory and failures are read from its log
    "VLLM_LOGGING_LEVEL": "INFO",
    # its HTTP server closes what is idle for 5 s: a request that is sent just then is lost
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}
CUDA_ENV = {
    # each of these replaces minutes of nvcc at start-up by a kernel that is there
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # what vLLM gives its workers where it starts several; a single one's torch would keep a thread on every core
    "OMP_NUM_THREADS": "1",
}


_ERROR = re.compile(r"(?:\(.*\] )?([\w.]*(?:Error|Exception): .+)")


def free_port() -> int:
    """A TCP port on loopback that is free and stays so until it is bound, seconds later: below those that Linux gives
    to connections, of which a load makes many."""
    while port_in_use(port := random.randrange(20000, 30000)):
        pass
    return port


def port_in_use(port: int) -> bool:
    """Whether something listens on (or holds) the loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


_MEMORY = {"weights": "Model loading took", "graphs": r"Graph capturing finished in \d+ secs, took"}


class Server:
    """A server process and its log. `folder` receives server.log and status/<pid>.json.

    `args` go to `vllm serve` after ours; `env` overrides what is taken from ours, which `inherit` chooses by name;
    `command` replaces `vllm` (tests). Nothing starts before `start()` or `with`.
    """

    def __init__(
        self,
        checkpoint: Path,
        folder: Path,
        *,
        plugin: str | None = "blackwell_kernels",
        port: int | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cuda: bool = False,
        inherit: Callable[[str], bool] = lambda _: True,
        command: Sequence[str] = VLLM,
    ) -> None:
        self.port = free_port() if port is None else port
        self.log = folder / "server.log"
        self.status_dir = folder / "status"
        self.base_url = f"http://{HOST}:{self.port}"
        self.command = [*command, "serve", str(checkpoint), "--served-model-name", SERVED_NAME]
        self.command += ["--host", HOST, "--port", str(self.port)]
        self.command += [*args, *(("--plugin", plugin) if plugin else ())]
        self.env = {name: value for name, value in os.environ.items() if inherit(name)}
        self.env |= COMMON_ENV | (CUDA_ENV if cuda else CPU_ENV)
        if plugin:
            self.env["BLACKWELL_KERNELS_STATUS_DIR"] = str(self.status_dir.absolute())
        self.env.update(env or {})
        self.process: subprocess.Popen[bytes] | None = None

    def memory_told(self) -> dict[str, float]:
        """GiB that vLLM says in its log its weights and its CUDA graphs took, of one rank; what it did not say is left
        out."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        found = {what: re.findall(rf"{said} ([\d.]+) GiB", text) for what, said in _MEMORY.items()}
        return {what: float(values[-1]) for what, values in found.items() if values}

    def start(self) -> None:
        """Start the process. Raises ServerError when the port is taken or the command cannot run."""
        if port_in_use(self.port):
            raise ServerError(
                f"port {self.port} on {HOST} is in use by another program: stop it, or choose another with --port"
            )
        self.status_dir.mkdir(parents=True, exist_ok=True)
        for old in self.status_dir.glob("*.json"):
            old.unlink()
        try:
            self.process = processes.spawn(self.command, self.log, self.env)
        except OSError as error:
            raise ServerError(f"cannot start {self.command[0]}: {error}") from error
        atexit.register(self.stop)

    def wait_ready(self, steps: Steps, timeout: float = 900.0) -> float:
        """Wait until /health answers; seconds it took. Raises ServerError when the process ends or time is up."""
        start = time.monotonic()
        with steps.waiting("starting vLLM") as wait:
            while True:
                self.check()
                if self.healthy():
                    return time.monotonic() - start
                if time.monotonic() - start > timeout:
                    raise ServerError(
                        f"vLLM was not ready after {timeout:.0f} s; the end of {self.log}:\n{self.tail()}"
                    )
                wait.update(_brief(self.tail(1)))
                time.sleep(0.25)

    def healthy(self) -> bool:
        """Whether /health answers 200 now."""
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def check(self) -> None:
        """Raise ServerError, with the end of the log, if the process is gone; KeyboardInterrupt if we are to stop."""
        processes.raise_if_stopped()
        if self.process is None:
            raise ServerError("the server was not started")
        code = self.process.poll()
        if code is not None:
            raise ServerError(f"vLLM {processes.how_it_ended(code)}{self.last_words()}")

    def metrics(self) -> str:
        """The text of /metrics. Raises ServerError when it cannot be read."""
        try:
            with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=10) as reply:
                return reply.read().decode()
        except (urllib.error.URLError, OSError) as error:
            raise ServerError(f"cannot read {self.base_url}/metrics: {error}") from error

    def tail(self, lines: int = LOG_LINES) -> str:
        """The last lines of the log."""
        return processes.tail(self.log, lines)

    def last_words(self) -> str:
        """The first error in the log, and its last lines.

        A worker's error is followed by those of every process that waited for it: the first one is the cause.
        """
        lines = processes.tail(self.log, 100000, size=1 << 24).splitlines()
        cause = next((match[1] for line in lines if (match := _ERROR.match(line))), None)
        return (f": {cause}" if cause else "") + f"\nThe end of {self.log}:\n{self.tail()}"

    def stop(self) -> None:
        """End the server and every process of its group; safe to call again, never raises."""
        process, self.process = self.process, None
        atexit.unregister(self.stop)
        if process is not None:
            processes.end(process)  # vLLM's front end stops its engine in order

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def _brief(line: str) -> str:
    # vLLM's prefix "(EngineCore pid=1) INFO 11-22 10:40:00 [file.py:1] " says nothing to someone who waits
    return line.rsplit("] ", 1)[-1].strip()[:100]
