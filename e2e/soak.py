"""Hours of mixed traffic: long and short, in bursts, with dropped and malformed requests. Is anything creeping up?

One server. Traffic as the scenario `soak` makes it, malformed requests beside it. At the end the run is cut into
windows: memory and the p99 of each window must not drift, no request may fail, every malformed one must be refused,
and nothing may be left running.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from blackwell_kernels.e2e import demo, faults, load, metrics, points, processes, report, serving, warm_up, watch
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.processes import signals_stop
from blackwell_kernels.e2e.sessions import MIXED, Scenario
from blackwell_kernels.errors import BlackwellKernelsError, ServerError

P99_DRIFT = 0.05
MEMORY_DRIFT = 0.02
MEMORY_FROM_S = 600.0  # caches and pools fill in the first minutes; what is judged lasts as long at least
# pages of files are the host's to drop and to read again: files must not become more, which bounds their pages
MEMORY = {
    "own_memory": "own memory is flat",
    "mapped_files": "mapped files are flat",
    "gpu_memory": "gpu memory is flat",
}
WINDOWS = 12
ENDING_S = 20.0  # the kernel takes a while over a killed process that holds a GPU's memory
FEWEST = 1000  # values of a window for its p99 to be more than its largest ones


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    serving: serving.Serving
    scenario: Scenario
    setup: points.Setup
    out: Path
    arm: str = "plugin"
    faults_every_s: float = 30.0
    port: int | None = None
    as_json: bool = False
    command: str = field(default_factory=lambda: shlex.join(["blackwell-kernels", *sys.argv[1:]]))


def run(options: Options, steps: Steps | None = None, console: Console | None = None) -> int:
    """The whole soak; returns the exit code. However it ends, what was measured is reported."""
    steps, console = steps or Steps(), console or Console()
    folder = _fresh(options.out)
    state, code = "complete", demo.OK
    left: list[str] = []
    server = None
    try:
        with signals_stop():
            checkpoint = options.serving.folder(steps)
            server = options.serving.server(options.arm, folder, checkpoint, options.scenario, options.port)
            with server:
                server.wait_ready(steps, 3600.0)
                assert server.process is not None
                group = server.process.pid
                context = faults.longest(server.base_url, options.scenario.max_context)
                bodies = faults.malformed(options.scenario.vocab, context)
                longest = min(options.scenario.max_context, warm_up.LONGEST)
                demo.while_serving(server, partial(warm_up.run, server, options.scenario.vocab, longest, steps))
                with faults.Heckler(server.base_url, folder / "faults.jsonl", bodies, options.faults_every_s):
                    points.measure(
                        server, options.scenario, folder / "traffic", options.setup, steps, {"arm": options.arm}
                    )
            left = still_running(group)
    except KeyboardInterrupt as stop:
        state, code = f"stopped by {stop}.", demo.INTERRUPTED
    except ServerError as error:
        state, code = str(error), demo.ENVIRONMENT
    except (BlackwellKernelsError, OSError) as error:
        state, code = str(error), demo.FAILED
    try:
        result = evaluate(options, state, left)
        paths = report.kept(lambda: _write(result, folder), folder)
    except BlackwellKernelsError as error:
        console.print(f"error: {state}\nerror: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return demo.FAILED
    if code == demo.OK and any(check["passed"] is False for check in result["checks"]):
        code = demo.FAILED
    if options.as_json:
        console.file.write(paths["json"].read_text() + "\n")
        return code
    report.show(tables(result), [], notes(result), console)
    if state != "complete":
        console.print(f"error: {state}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {paths['html']}", highlight=False, soft_wrap=True)
    console.print(f"next: blackwell-kernels {'e2e compare ' + options.serving.model if code == demo.OK else 'doctor'}")
    return code


def still_running(group: int) -> list[str]:
    """What is left of a stopped server's processes, `ENDING_S` after it at the latest."""
    until = time.monotonic() + ENDING_S
    while (found := processes.survivors(group)) and time.monotonic() < until:
        time.sleep(0.2)
    return found


def evaluate(options: Options, state: str, left: list[str]) -> dict[str, Any]:
    """Windows, drifts and checks from the raw files of a soak that may have been cut short."""
    from blackwell_kernels import status

    folder = options.out / "traffic"
    rows, complaints = load.read(folder)
    sampled, torn = metrics.read_records([p for p in [folder / "series.jsonl"] if p.exists()])
    refused, torn_faults = metrics.read_records([p for p in [options.out / "faults.jsonl"] if p.exists()])
    start = next((row for row in rows if row["kind"] == "start"), None)
    begin = (start["started"] if start else 0.0) + options.setup.ramp_s
    last = max((row["end"] for row in rows if row["kind"] == "request" and row["end"]), default=begin)
    window = (begin, min(last, begin + options.setup.seconds)) if last > begin else None
    summary = metrics.summarise(rows, slo=options.setup.slo, window=window, gpus=options.setup.gpus)
    windows = _windows(rows, sampled, window, options.setup.slo) if window else []
    result = {
        **report.blank(f"Soak: {options.serving.model}, {options.arm}", options.command),
        "state": state,
        "versions": demo.versions(),
        "machine": demo.machine(options.serving.backend),
        "backend": options.serving.backend,
        "scenario": options.scenario.to_dict(),
        "serving": options.serving.to_dict(),
        "load": summary,
        "windows": windows,
        "series": watch.summarise(sampled, window, watch.gpu_reader()[1]),
        "memory": _memory(sampled, window),
        "processes": _by_process(sampled, window),
        "drift": {key: _drift(windows, key) for key in ("ttft_p99", "itl_p99")},
        "faults": _by_fault(refused),
        "point": points.stored(folder),
        "activation": status.activation_rows(status.read_all(options.out / "status")),
        "complaints": complaints + torn + torn_faults,
    }
    result["checks"] = checks(result, left)
    return result


def _windows(
    rows: list[dict[str, Any]], sampled: list[dict[str, Any]], window: tuple[float, float], slo: metrics.Slo
) -> list[dict[str, Any]]:
    edges = np.linspace(*window, WINDOWS + 1)
    found = []
    for begin, end in pairwise(edges):
        run = metrics.Run(rows, slo=slo, window=(float(begin), float(end)))
        ttft, itl = run.sample("ttft"), run.sample("itl")
        row: dict[str, Any] = {"begin": float(begin - edges[0]), "end": float(end - edges[0])}
        row |= {"requests": len(run.table), "tokens_per_s": run.throughput().value()}
        for name, sample in (("ttft", ttft), ("itl", itl)):
            row[f"{name}_n"] = int(sample.values.size)
            row[f"{name}_p99"] = sample.percentile(99) if sample.values.size else None
        busy = watch.series(sampled, "host_cpu", (float(begin), float(end)))[:, 1]
        row["host_cpu"] = float(busy.mean()) if busy.size else None
        found.append(row)
    return found


def _memory(sampled: list[dict[str, Any]], window: tuple[float, float] | None) -> dict[str, dict[str, float] | None]:
    """Drift of what must be flat, and of all that is resident, once the first minutes are over."""
    settled = window and (window[0] + MEMORY_FROM_S, window[1])
    return {key: watch.flatness(watch.series(sampled, key, settled)) for key in (*MEMORY, "rss")}


def _by_process(sampled: list[dict[str, Any]], window: tuple[float, float] | None) -> dict[str, dict[str, list[int]]]:
    """Own memory and pages of files of each process: at the start, after the first minutes, at the end."""
    if window is None:
        return {}
    times = [window[0], min(window[0] + MEMORY_FROM_S, window[1]), window[1]]
    rows = [row for row in sampled if row.get("processes")]
    seen = [min(rows, key=lambda row: abs(row["time"] - at))["processes"] for at in times] if rows else []
    names = sorted({name for one in seen for name in one})
    return {
        name: {kind: [one.get(name, (0, 0))[i] for one in seen] for i, kind in enumerate(("own", "files"))}
        for name in names
    }


def _drift(windows: list[dict[str, Any]], key: str) -> dict[str, Any] | str:
    """Change over the run as a share of the median window, or why it cannot be told."""
    n = min((row[key.replace("p99", "n")] for row in windows), default=0)
    if n < FEWEST:
        return f"n too small: {n} values in a window, {FEWEST} are needed"
    points_ = np.array([[(row["begin"] + row["end"]) / 2, row[key]] for row in windows])
    return watch.flatness(points_) or "too few windows"


def _by_fault(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        one = found.setdefault(row["fault"], {"sent": 0, "refused": 0, "statuses": [], "detail": ""})
        one["sent"] += 1
        one["refused"] += row["passed"]
        one["statuses"] = sorted({*one["statuses"], str(row["status"])})
        if not row["passed"]:
            one["detail"] = f"{row['status']}: {row['detail'][:120]}"
    return found


def checks(result: dict[str, Any], left: list[str]) -> list[dict[str, Any]]:
    """What a soak must show."""
    made = []

    def check(name: str, passed: bool, detail: str) -> None:
        made.append({"name": name, "passed": bool(passed), "detail": detail})

    def unjudged(name: str, why: str) -> None:
        made.append({"name": name, "passed": None, "detail": why})

    load_, errors = result["load"], sum(result["load"]["errors"].values())
    check("ran to its end", result["state"] == "complete", result["state"].splitlines()[0])
    check("load generator kept up", not load_["client_why"], "; ".join(load_["client_why"]) or "all the time")
    done = f"{load_['completed']} complete, {load_['aborted']} dropped by us, {errors} errors"
    stuck = load_.get("stuck", 0)  # results of before do not count them
    done += f", {stuck} without an end after {metrics.STUCK_S:.0f} s" if stuck else ""
    check("answers", load_["completed"] and not errors and not stuck, done)
    wrong = [f"{name} ({one['detail']})" for name, one in result["faults"].items() if one["refused"] < one["sent"]]
    sent = sum(one["sent"] for one in result["faults"].values())
    check(
        "malformed requests refused", sent and not wrong, "; ".join(wrong) or f"{sent} of {len(result['faults'])} kinds"
    )
    seconds = result["load"]["seconds"] or 0.0
    for key, name in MEMORY.items():
        found = result["memory"][key]
        if isinstance(result["series"][key], str):
            unjudged(name, result["series"][key])
        elif found is None or seconds < 2 * MEMORY_FROM_S:
            unjudged(name, f"{seconds:.0f} s are too short, {2 * MEMORY_FROM_S:.0f} s needed")
        else:
            check(name, found["drift"] <= MEMORY_DRIFT, f"{found['drift']:+.1%} (at most {MEMORY_DRIFT:.0%})")
    for key, found in result["drift"].items():
        if isinstance(found, str):
            unjudged(f"{key} does not drift", found)
        else:
            check(
                f"{key} does not drift", found["drift"] <= P99_DRIFT, f"{found['drift']:+.1%} (at most {P99_DRIFT:.0%})"
            )
    if point := result["point"]:
        made_now = point["jit_ours"]
        check("no compilation under load", not made_now, f"{made_now:.0f} kernels of ours")
    check("nothing left running", not left, ", ".join(left) or "all ended")
    return made


def tables(result: dict[str, Any]) -> report.Tables:
    """Title, head and rows of every table that has something in it."""
    windows = [
        [
            *(f"{row['begin']:.0f}-{row['end']:.0f}", str(row["requests"]), report.number(row["tokens_per_s"])),
            *(report.ms(row["ttft_p99"]), str(row["ttft_n"]), report.ms(row["itl_p99"]), str(row["itl_n"])),
            report.percent(row["host_cpu"]),
        ]
        for row in result["windows"]
    ]
    wrong = [
        [name, str(one["sent"]), str(one["refused"]), ", ".join(one["statuses"])]
        for name, one in result["faults"].items()
    ]
    memory = [
        [name, *(f"{of[i] / 2**20:.0f}" for of in (one["own"], one["files"]) for i in range(3))]
        for name, one in result.get("processes", {}).items()
    ]
    made: report.Tables = {
        "checks": (
            "Checks",
            ["", "what", "found"],
            [[report.MARKS[c["passed"]], c["name"], c["detail"]] for c in result["checks"]],
        ),
        "windows": (
            "Windows",
            ["s", "requests", "tokens/s", "TTFT p99, ms", "n", "ITL p99, ms", "n", "host CPUs busy"],
            windows,
        ),
        "memory": (
            f"Resident memory, MiB: at the start, after {MEMORY_FROM_S:.0f} s, at the end",
            ["process", "own", "", "", "pages of files", "", ""],
            memory,
        ),
        "faults": ("Malformed requests", ["what", "sent", "refused", "HTTP"], wrong),
        "errors": ("Errors", ["kind", "count", "example"], report.error_rows(result)),
    }
    return {name: table for name, table in made.items() if table[2]}


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know."""
    found = [] if result["state"] == "complete" else [f"Ended early: {result['state'].splitlines()[0]}"]
    if result["backend"] == "cpu":
        found.append("A tiny model on a CPU: leaks of the plugin and of the chain show, GPU memory does not.")
        busy = result["series"].get("host_cpu")
        if isinstance(busy, dict):
            found.append(
                f"The host's CPUs were busy {busy['mean']:.0%} of the time, with this and with all else on them: the "
                "tail follows that too."
            )
    return found + result["complaints"]


def _write(result: dict[str, Any], folder: Path) -> dict[str, Path]:
    paths = {"json": folder / "result.json", "markdown": folder / "report.md", "html": folder / "report.html"}
    about: tuple[report.Tables, list[tuple[str, str]], list[str]] = (tables(result), [], notes(result))
    details = {key: result[key] for key in ("versions", "machine", "scenario", "serving")}
    report.write_atomic(paths["json"], json.dumps(result, indent=1))
    report.write_atomic(paths["markdown"], report.markdown_page(result, *about))
    rows, _ = load.read(folder / "traffic")
    report.write_atomic(paths["html"], report.html_page(result, *about, report.figures(rows), details))
    return paths


def _fresh(out: Path) -> Path:
    """An empty place for the traffic; results of an earlier soak are moved aside, not lost."""
    out.mkdir(parents=True, exist_ok=True)
    if (out / "traffic").exists():
        aside = next(p for i in range(10000) if not (p := out / f"before-{i}").exists())
        aside.mkdir()
        for name in ("traffic", "faults.jsonl", "result.json", "report.md", "report.html", "server.log", "status"):
            if (out / name).exists():
                (out / name).rename(aside / name)
    return out


def fitted(served: serving.Serving, rate: float, settings: dict[str, Any], seed: int) -> Scenario:
    """The soak's traffic, of the size that the served model takes."""
    base = serving.traffic(served, None, {}, seed)
    return Scenario.from_dict(
        {**replace(base, sessions_per_s=rate).to_dict(), **MIXED, "join_midway": True, **settings}
    )
