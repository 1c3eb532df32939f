"""What is sampled beside a load: the server's queue and cache, its memory, the GPUs; a row a second, as it happens."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blackwell_kernels.e2e import prometheus
from blackwell_kernels.e2e.records import RecordFile

GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_cache": "vllm:kv_cache_usage_perc",
    "generated": "vllm:generation_tokens_total",
}
SUMMARISED = (
    *("running", "waiting", "kv_cache", "rss", "own_memory", "mapped_files", "host_cpu"),
    *("gpu_memory", "gpu_power"),
)
Reader = Callable[[], Mapping[str, Any]]


def server_reader(page: Callable[[], str]) -> Reader:
    """Queue, cache use and tokens so far from a /metrics page."""

    def read() -> Mapping[str, Any]:
        samples = prometheus.parse_prometheus(page())
        return {key: prometheus.gauge(samples, name) for key, name in GAUGES.items()}

    return read


def memory_reader(pid: int) -> Reader:
    """Bytes of a process and all its children, and the share of the host's CPUs that is busy, with anything.

    `rss`, all that is resident, is `own_memory` (heaps, caches, shared memory: what they filled themselves) and pages
    of files, which the host drops and reads again as it likes; `mapped_files` are the files' sizes, which bound those.
    `processes` has own memory and pages of files of each.
    """
    import psutil

    root = psutil.Process(pid)
    psutil.cpu_percent()  # the first call only starts the clock

    def read() -> Mapping[str, Any]:
        found = {"rss": 0, "own_memory": 0, "mapped_files": 0}
        each = {}
        for process in [root, *root.children(recursive=True)]:
            try:
                own, files = _resident(process.pid)
                mapped, name = _mapped(process.pid), f"{process.name()} ({process.pid})"
            except (psutil.Error, OSError):  # ended between the two calls
                continue
            each[name] = [own, files]
            found["rss"] += own + files
            found["own_memory"] += own
            found["mapped_files"] += mapped
        return {**found, "processes": each, "host_cpu": psutil.cpu_percent() / 100}

    return read


def _resident(pid: int) -> tuple[int, int]:
    """Resident bytes of a process: its own, and pages of files. Source: proc_pid_status(5)."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    total, files = (int(lines.get(name, "0").split()[0]) << 10 for name in ("VmRSS", "RssFile"))
    return total - files, files


def _mapped(pid: int) -> int:
    """Bytes of files that a process has mapped; devices and shared memory are none. Source: proc_pid_maps(5)."""
    rows = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    ends = [row[0].split("-") for row in rows if row[4] != "0" and not row[-1].startswith("/dev/")]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ends)


def gpu_reader(visible: str | None = None) -> tuple[Reader | None, str]:
    """(reader, "") of memory in use (bytes) and power (W, or None where it is not told), or (None, why there is none).

    Over the GPUs whose indices a server's CUDA_VISIBLE_DEVICES lists; over all of them when it lists none.
    """
    listed = [int(i) for i in (visible or "").split(",") if i.strip().isdigit()]
    try:
        import pynvml
    except ImportError:
        return _smi_reader(listed)
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in listed or range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return None, f"not measured: {error}"
    if not handles:
        return None, "not measured: no NVIDIA GPU"

    def read() -> Mapping[str, Any]:
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles]
        try:
            power = sum(pynvml.nvmlDeviceGetPowerUsage(handle) / 1000 for handle in handles)
        except pynvml.NVMLError:  # a part of a GPU
            power = None
        return {"gpu_memory": sum(memory), "gpu_power": power}

    return read, ""


def gpu_memory_gib(visible: str | None = None) -> float | None:
    """GiB in use on the GPUs that `gpu_reader` reads, now; None where nothing tells."""
    reader, _ = gpu_reader(visible)
    try:
        return None if reader is None else round(reader()["gpu_memory"] / 2**30, 2)
    except Exception:  # as in `Watch`: a look that fails ends no measurement
        return None


def _smi_reader(listed: Sequence[int]) -> tuple[Reader | None, str]:
    """The same from nvidia-smi, a process a look, where its library's Python package is not installed."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None, "not measured: neither nvidia-ml-py nor nvidia-smi is installed"
    command = [smi, "--query-gpu=memory.used,power.draw", "--format=csv,noheader,nounits"]
    command += [f"--id={','.join(map(str, listed))}"] if listed else []

    def read() -> Mapping[str, Any]:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20)
        if told.returncode:
            raise RuntimeError(f"nvidia-smi: {(told.stderr or told.stdout).strip()}")
        cells = [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines()]
        power = sum(float(draw) for _, draw in cells) if all(draw[:1].isdigit() for _, draw in cells) else None
        return {"gpu_memory": sum(int(used) << 20 for used, _ in cells), "gpu_power": power}

    try:
        read()
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        return None, f"not measured: {error}"
    return read, ""


class Watch:
    """Samples readers into a JSONL file from a thread until it is left.

        with Watch(path, [server_reader(...), ...]): ...

    A reader that fails leaves its columns out of that row and its reason in it: a server that is too busy to answer
    is part of what happened.
    """

    def __init__(
        self, path: Path, readers: Iterable[Reader], every_s: float = 1.0, clock: Callable[[], float] = time.time
    ) -> None:
        self.readers, self.every_s, self.clock = list(readers), every_s, clock
        self.file = RecordFile(path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="watch")

    def sample(self) -> dict[str, Any]:
        """Read everything once and keep it."""
        row: dict[str, Any] = {"kind": "watch", "time": self.clock()}
        for reader in self.readers:
            try:
                row |= reader()
            except Exception as error:
                row["missed"] = f"{row.get('missed', '')} {type(error).__name__}: {error}".strip()[:300]
        self.file.write(row)
        return row

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self.every_s)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(15.0)
        self.file.close()


def series(rows: Iterable[Mapping[str, Any]], key: str, window: tuple[float, float] | None = None) -> np.ndarray:
    """[n, 2]: time and value of one column, in a window."""
    found = [
        (row["time"], row[key])
        for row in rows
        if row.get(key) is not None and (window is None or window[0] <= row["time"] <= window[1])
    ]
    return np.array(found, dtype=float).reshape(-1, 2)


def summarise(rows: Sequence[Mapping[str, Any]], window: tuple[float, float] | None, gpu: str = "") -> dict[str, Any]:
    """Mean and max of each column; for the GPU's, why not when it was not measured."""
    found: dict[str, Any] = {}
    for key in SUMMARISED:
        values = series(rows, key, window)[:, 1]
        missing = gpu if key.startswith("gpu") and gpu else "not measured: no sample"
        found[key] = {"mean": float(values.mean()), "max": float(values.max())} if values.size else missing
    found["missed"] = sum("missed" in row for row in rows)
    return found


def flatness(points: np.ndarray) -> dict[str, float] | None:
    """How far a series drifts: its robust (Theil-Sen) slope over its length, relative to its median.

    None with fewer than eight points. Source: Sen, JASA 63 (1968).
    """
    if len(points) < 8:
        return None
    if len(points) > 400:
        points = points[np.linspace(0, len(points) - 1, 400).astype(int)]
    t, y = points[:, 0], points[:, 1]
    i, j = np.triu_indices(len(t), 1)
    apart = t[j] > t[i]
    slope = float(np.median((y[j] - y[i])[apart] / (t[j] - t[i])[apart]))
    middle = float(np.median(y))
    return {
        "per_hour": slope * 3600,
        "drift": slope * float(t[-1] - t[0]) / middle if middle else 0.0,
        "first": float(y[0]),
        "last": float(y[-1]),
    }
