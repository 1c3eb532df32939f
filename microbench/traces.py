"""What a call costs beside its kernels: CUPTI's record of launches and kernels, through torch.profiler.

Host time is taken without the profiler, which would add its own; kernels, gaps and the launch functions' durations come
from its trace: once for eager calls, once for replays of a CUDA graph of the same call.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from blackwell_kernels.microbench.timing import quantile

CALLS = 20
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cudaLaunchKernel", "cuLaunchKernel")


class Kernel(BaseModel):
    """One kernel of a call in its order; us: median over the calls. blocks, threads: of its grid and of a block."""

    model_config = ConfigDict(extra="forbid")

    name: str
    us: float
    blocks: int
    threads: int


class Trace(BaseModel):
    """One call. host_us: until it has returned, the GPU not waited for. launch_us: median of a launch function.

    gap_us, graph_gap_us: idle time of the GPU between two kernels of a call, median; None with a single kernel, the
    latter also where the call cannot be captured (`no_graph` says why).
    """

    model_config = ConfigDict(extra="forbid")

    kernels: list[Kernel]
    host_us: float
    launch_us: float | None = None
    gap_us: float | None = None
    graph_gap_us: float | None = None
    no_graph: str = ""

    @property
    def busy_us(self) -> float:
        """The kernels' time."""
        return sum(kernel.us for kernel in self.kernels)

    @property
    def overhead_us(self) -> float:
        """What an eager call takes beyond its kernels: nothing where the host keeps ahead of the GPU."""
        return max(0.0, self.host_us - self.busy_us)


def per_call(events: Iterable[dict[str, Any]], calls: int) -> list[list[dict[str, Any]]]:
    """What the GPU did in each of `calls` equal calls, in order of time.

    Raises: ValueError when the trace has no kernels, or none that divide evenly among the calls.
    """
    done = sorted((event for event in events if event.get("cat") in _DEVICE), key=lambda event: float(event["ts"]))
    if not done:
        raise ValueError("the trace has no kernels: CUPTI is not there, or another tool holds it")
    if len(done) % calls:
        raise ValueError(f"{len(done)} kernels in {calls} calls: a call does not always launch the same")
    size = len(done) // calls
    groups = [done[i : i + size] for i in range(0, len(done), size)]
    if any([event["name"] for event in group] != [event["name"] for event in groups[0]] for group in groups):
        raise ValueError("a call does not always launch the same kernels")
    return groups


def kernels(groups: Sequence[Sequence[dict[str, Any]]]) -> list[Kernel]:
    """The kernels of a call, each with its median duration."""
    return [
        Kernel(
            name=same[0]["name"],
            us=quantile([float(event["dur"]) for event in same], 0.5),
            blocks=_product(same[0].get("args", {}).get("grid")),
            threads=_product(same[0].get("args", {}).get("block")),
        )
        for same in zip(*groups, strict=True)
    ]


def _product(sizes: Sequence[int] | None) -> int:
    total = 1
    for size in sizes or ():
        total *= int(size)
    return total


def gap(groups: Sequence[Sequence[dict[str, Any]]]) -> float | None:
    """Median idle time between neighbouring kernels of a call in µs; kernels that overlap leave none."""
    found = [
        max(0.0, float(after["ts"]) - float(before["ts"]) - float(before["dur"]))
        for group in groups
        for before, after in pairwise(group)
    ]
    return quantile(found, 0.5) if found else None


def launch(events: Iterable[dict[str, Any]]) -> float | None:
    """Median duration of the launch function on the host in µs, the profiler's own cost included."""
    found = [
        float(event["dur"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and str(event.get("name")).startswith(_LAUNCH)
    ]
    return quantile(found, 0.5) if found else None


def warm_up() -> None:
    """Start and stop the profiler once: its first session in a process may miss what is launched at once."""
    import torch

    one = torch.zeros(1, device="cuda")
    _events(lambda: one.add_(1.0), 1)


def record(call: Callable[[], Any], calls: int = CALLS) -> Trace:
    """Trace a call that has run before; needs a CUDA device.

    Raises: ValueError saying why there is no trace.
    """
    import torch

    host_us = _host_us(call, calls)
    eager = _events(call, calls)
    groups = per_call(eager, calls)
    traced = Trace(kernels=kernels(groups), host_us=host_us, launch_us=launch(eager), gap_us=gap(groups))
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        graph.replay()
        inside = gap(per_call(_events(graph.replay, calls), calls))
        del kept
    except (RuntimeError, ValueError) as error:
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        return traced.model_copy(update={"no_graph": why})
    return traced.model_copy(update={"graph_gap_us": inside})


def _host_us(call: Callable[[], Any], calls: int) -> float:
    import torch

    taken = []
    for _ in range(calls):  # one by one: behind a full queue the host would wait for the GPU
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - started))
    torch.cuda.synchronize()
    return quantile(taken, 0.5)


def _events(call: Callable[[], Any], calls: int) -> list[dict[str, Any]]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
