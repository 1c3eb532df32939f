"""One load point: a rate, one server, one stretch of traffic; measured, stored whole, and read back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blackwell_kernels.e2e import load, metrics, prometheus, watch
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.report import read_json, write_atomic
from blackwell_kernels.e2e.server import Server
from blackwell_kernels.e2e.sessions import Scenario
from blackwell_kernels.errors import BlackwellKernelsError

DONE = "point.json"
# what vLLM's own monitor writes when Triton compiles while requests wait (0.24: vllm/triton_utils/jit_monitor.py)
JIT_LINE = re.compile(r"Triton .*JIT compilation during inference: ([\w<>]+)|Triton autotuning for function (\w+)")
SILENT_S = 5.0  # of a load process, which writes a row every second
_MONITOR = "JIT monitor activated"


@dataclass(frozen=True)
class Setup:
    """How every load point is measured: seconds that count after `ramp_s` that do not, then up to `drain_s` to end."""

    seconds: float
    ramp_s: float
    drain_s: float
    users: int
    processes: int = 1
    gpus: int = 1
    source: Path | None = None
    slo: metrics.Slo = field(default_factory=metrics.Slo)


def measure(
    server: Server, scenario: Scenario, folder: Path, setup: Setup, steps: Steps, about: dict[str, Any]
) -> dict[str, Any]:
    """Play `scenario` against `server`; everything raw goes to `folder`, the result to its point.json.

    Raises ServerError when the server dies: what was recorded until then stays in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before, logged = server.metrics(), _size(server.log)
    (folder / "before.prom").write_text(before)
    gpu, why_no_gpu = watch.gpu_reader(server.env.get("CUDA_VISIBLE_DEVICES"))
    readers = [watch.server_reader(server.metrics), *([gpu] if gpu else [])]
    if server.process is not None:
        readers.append(watch.memory_reader(server.process.pid))
    plan = load.Plan(setup.users, setup.ramp_s + setup.seconds, setup.processes, setup.drain_s, setup.source)
    with watch.Watch(folder / "series.jsonl", readers):
        load.run(server, scenario, folder, plan, steps)
    after = server.metrics()
    (folder / "after.prom").write_text(after)
    with server.log.open("rb") as file:
        file.seek(logged)
        new = file.read().decode(errors="replace")
    watched = _MONITOR in server.log.read_text(errors="replace")
    extra = {
        "scenario": scenario.to_dict(),
        "jit_vllm": [a or b for a, b in JIT_LINE.findall(new)] if watched else "not measured: this vLLM has no monitor",
        "gpu": why_no_gpu,
    }
    found = {**about, **evaluate(folder, setup, extra)}
    write_atomic(folder / DONE, json.dumps(found, indent=1))
    return found


def evaluate(folder: Path, setup: Setup, extra: dict[str, Any]) -> dict[str, Any]:
    """The figures of a load point from its raw files."""
    rows, complaints = load.read(folder)
    start = next((row for row in rows if row["kind"] == "start"), None)
    if start is None:
        raise BlackwellKernelsError(f"{folder} has no records: the load generator never started; see its locust.log")
    window = (start["started"] + setup.ramp_s, start["started"] + setup.ramp_s + setup.seconds)
    summary = metrics.summarise(rows, slo=setup.slo, window=window, gpus=setup.gpus)
    before, after = ((folder / name).read_text() for name in ("before.prom", "after.prom"))
    server = prometheus.server_side(before, after)
    sampled, torn = metrics.read_records([folder / "series.jsonl"])
    ours = summary["as_the_server_sees"]
    # what the server made for answers that we dropped or that the end of the load cut off
    missing = [r for r in rows if r["kind"] == "request" and (r["error"] or r.get("aborted"))]
    ours["tokens_not_awaited"] = sum(r["expected_tokens"] - len(r["tokens"]) for r in missing)
    return {
        "window": list(window),
        "seconds": setup.seconds,
        "summary": summary,
        "server": server,
        "cross_check": prometheus.cross_check(server, ours),
        "series": watch.summarise(sampled, window, extra["gpu"]),
        "jit_ours": server["jit_now"],
        "jit_vllm": extra["jit_vllm"],
        "source": start.get("source") or {},
        "scenario": extra["scenario"],
        "invalid": [
            *summary["client_why"],
            *gone(rows, window[1]),
            *([] if summary["requests"] else ["no request fell into the window"]),
        ],
        "complaints": complaints + torn,
    }


def gone(rows: list[dict[str, Any]], until: float) -> list[str]:
    """Load processes that gave no sign of life in the last seconds before `until`: their sessions are missing."""
    seen: dict[int, float] = {}
    for row in rows:
        if row["kind"] in ("start", "client"):
            seen[row["worker"]] = max(seen.get(row["worker"], 0.0), row["time"])
    return [f"load process {n} was gone {until - t:.0f} s early" for n, t in seen.items() if t < until - SILENT_S]


def runs(folder: Path, point: dict[str, Any], slo: metrics.Slo) -> metrics.Run:
    """The records behind a stored load point."""
    rows, _ = load.read(folder)
    return metrics.Run(rows, slo=slo, window=tuple(point["window"]))


def short(setup: Setup, seconds: float) -> Setup:
    """The same, for a look that is not kept: warm-up, search."""
    return replace(setup, seconds=seconds, ramp_s=min(setup.ramp_s, seconds / 4), drain_s=min(setup.drain_s, 5.0))


def stored(folder: Path) -> dict[str, Any] | None:
    """A finished load point, or None when it was never finished."""
    try:
        return read_json(folder / DONE)
    except FileNotFoundError:
        return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
