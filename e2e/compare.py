"""Plugin against stock vLLM under agent sessions: tokens per second, the tail, and what the difference is worth.

Servers run one after the other, A B A B, each with the same arguments, seeds and traffic. Every load point is stored
when it is done, so a comparison that was stopped goes on where it was (same --out). A server that dies is started once
more, and the report says what was lost.

    OUT/compare.json            what is compared
    OUT/search.json             the search for the knee, unless --rates says where to measure
    OUT/run-0-stock/start-0/    a server's log, status files, probe answers
    OUT/run-0-stock/rate-0.5/   raw records, /metrics before, during and after, point.json
    OUT/result.json report.md report.html
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from blackwell_kernels.e2e import demo, knee, points, report, sources
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.processes import signals_stop
from blackwell_kernels.e2e.ratios import ARMS
from blackwell_kernels.e2e.report import write_atomic
from blackwell_kernels.e2e.server import Server
from blackwell_kernels.e2e.serving import Serving, answers
from blackwell_kernels.e2e.sessions import Scenario
from blackwell_kernels.errors import BlackwellKernelsError, ServerError

RESTARTS = 1  # of one server in one run
READY_S = 3600.0  # real models load and compile for long


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    serving: Serving
    scenario: Scenario
    setup: points.Setup
    out: Path
    rates: tuple[float, ...] = ()  # none: three up to the knee
    first_rate: float = 0.25
    warmup_s: float = 30.0
    repeats: int = 2
    port: int | None = None
    as_json: bool = False
    command: str = field(default_factory=lambda: shlex.join(["blackwell-kernels", *sys.argv[1:]]))

    def to_dict(self) -> dict[str, Any]:
        """What must stay the same for stored load points to be usable."""
        setup = {**asdict(self.setup), "slo": self.setup.slo.model_dump(), "source": str(self.setup.source or "")}
        traffic = {**self.scenario.to_dict(), "sessions_per_s": None}
        return {"serving": self.serving.to_dict(), "scenario": traffic, "setup": setup}


def run(options: Options, steps: Steps | None = None, console: Console | None = None) -> int:
    """The whole comparison; returns the exit code. A report is written from whatever was measured."""
    from blackwell_kernels.e2e import compare_report

    steps, console = steps or Steps(), console or Console()
    state, code = "complete", demo.OK
    try:
        prepare(options, steps)
    except (BlackwellKernelsError, OSError) as error:  # a report of what is there would be one of other settings
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return demo.FAILED
    try:
        with signals_stop():
            measure(options, steps)
    except KeyboardInterrupt as stop:
        state, code = f"stopped by {str(stop) or 'Ctrl-C'}; the same command goes on from here.", demo.INTERRUPTED
    except ServerError as error:
        state, code = str(error), demo.ENVIRONMENT
    except (BlackwellKernelsError, OSError) as error:
        state, code = str(error), demo.FAILED
    try:
        result = compare_report.collect(options, state)
        paths = report.kept(lambda: compare_report.write_all(result, options), options.out)
    except BlackwellKernelsError as error:
        console.print(f"error: {state}\nerror: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return demo.FAILED
    if code == demo.OK and any(check["passed"] is False for check in result["checks"]):
        code = demo.FAILED
    if options.as_json:
        console.file.write(paths["json"].read_text() + "\n")
        return code
    compare_report.terminal(result, console)
    console.print(f"report: {paths['html']}", highlight=False, soft_wrap=True)
    last = {demo.OK: "blackwell-kernels e2e soak", demo.INTERRUPTED: options.command}
    console.print(f"next: {last.get(code, 'blackwell-kernels doctor')}", highlight=False, soft_wrap=True)
    return code


def prepare(options: Options, steps: Steps) -> None:
    """Check what can be checked before a server starts. Raises BlackwellKernelsError."""
    out, wanted = options.out, options.to_dict()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "compare.json"
    if kept.exists():
        before = json.loads(kept.read_text())
        if before != wanted:
            other = sorted(key for key in wanted if before.get(key) != wanted[key])
            raise BlackwellKernelsError(
                f"{out} holds a comparison with other settings ({', '.join(other)}): give another --out, or remove it"
            )
        steps.say(f"going on with the comparison in {out}")
    if options.setup.source:  # a corrupt file is found before a server starts
        try:
            steps.say(f"source: {sources.load(options.setup.source, options.scenario).describe()}")
        except sources.SourceError as error:
            raise BlackwellKernelsError(str(error)) from error
    write_atomic(kept, json.dumps(wanted, indent=1))
    machine = {"versions": demo.versions(), "machine": demo.machine(options.serving.backend)}
    write_atomic(out / "machine.json", json.dumps(machine, indent=1))


def measure(options: Options, steps: Steps) -> None:
    """Everything that needs servers."""
    checkpoint = options.serving.folder(steps)
    for number in range(options.repeats):
        for arm in ARMS:
            Block(options, number, arm, checkpoint, steps).run()


def rates(options: Options) -> tuple[float, ...]:
    """The rates to measure at: given, or three up to the knee that was found; none while the search is not done."""
    if options.rates:
        return tuple(sorted(options.rates))
    path = options.out / "search.json"
    return tuple(json.loads(path.read_text())["rates"]) if path.exists() else ()


def seed(options: Options, rate: float, purpose: str = "measured") -> int:
    """Of the traffic of one load point: the same for both arms and in every run, so that runs of one arm differ by
    nothing but noise; another for every rate, so that no rate finds another's prompts in the cache."""
    return zlib.crc32(f"{options.scenario.seed}/{purpose}/{rate:g}".encode())


def point_folder(options: Options, number: int, arm: str, rate: float) -> Path:
    """Where a load point is stored."""
    return options.out / f"run-{number}-{arm}" / f"rate-{rate:g}"


class Block:
    """One run of one arm: a server, its warm-up and probes, and the load points that are still missing."""

    def __init__(self, options: Options, number: int, arm: str, checkpoint: Path, steps: Steps) -> None:
        self.options, self.number, self.arm, self.steps = options, number, arm, steps
        self.checkpoint, self.folder = checkpoint, options.out / f"run-{number}-{arm}"

    def missing(self) -> list[float]:
        """Rates without a finished load point."""
        found = rates(self.options)
        return [r for r in found if not points.stored(point_folder(self.options, self.number, self.arm, r))]

    def run(self) -> None:
        """Measure what is missing; a server that dies is started RESTARTS times more, then the rest is lost."""
        searching = not rates(self.options)
        if not searching and not self.missing():
            self.steps.say(f"run {self.number}, {self.arm}: already measured")
            return
        for attempt in range(RESTARTS + 1):
            try:
                self._serve(searching=not rates(self.options))
                return
            except ServerError as error:
                lost = [f"{rate:g}" for rate in self.missing()] or ["the search for the knee"]
                self._event(error, attempt, lost)
                if attempt == RESTARTS and (searching or not any(self._anything())):
                    raise
                self.steps.say(f"run {self.number}, {self.arm}: {str(error).splitlines()[0]}")

    def _anything(self) -> Iterator[bool]:
        yield from (True for _ in self.options.out.glob("run-*/rate-*/point.json"))

    def _event(self, error: ServerError, attempt: int, lost: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "run": self.number, "arm": self.arm}
        row |= {"attempt": attempt, "unfinished": lost, "error": str(error)}
        with (self.options.out / "losses.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _serve(self, *, searching: bool) -> None:
        o = self.options
        taken = sorted(self.folder.glob("start-*"), key=lambda p: int(p.name.split("-")[1]))
        home = self.folder / f"start-{int(taken[-1].name.split('-')[1]) + 1 if taken else 0}"
        server = o.serving.server(self.arm, home, self.checkpoint, o.scenario, o.port)
        self.steps.say(f"run {self.number} of {o.repeats}, {self.arm}: starting")
        with server:
            ready = server.wait_ready(self.steps, READY_S)
            self._keep(home / "start.json", {"ready_s": ready, "command": shlex.join(server.command)})
            found = demo.while_serving(server, lambda: answers(server, o.scenario.vocab, o.scenario.max_context))
            self._keep(home / "probe.json", {"answers": found})
            if searching:
                self._search(server, home)
            warm = points.short(o.setup, o.warmup_s)
            if o.warmup_s > 0:
                self._point(server, home / "warm-up", max(rates(o)), warm, seed(o, 0.0, "warm-up"), "warm-up")
            for rate in self.missing():
                self._point(
                    server,
                    point_folder(o, self.number, self.arm, rate),
                    rate,
                    o.setup,
                    seed(o, rate),
                    f"{rate:g} sessions/s",
                )
        self.steps.say(f"run {self.number}, {self.arm}: server stopped")

    def _point(self, server: Server, folder: Path, rate: float, setup: points.Setup, seed: int, what: str) -> Any:
        if folder.exists():  # an attempt that was cut short: its records stay, beside
            aside = next(
                p for i in range(10000) if not (p := folder.with_name(f"unfinished-{folder.name}-{i}")).exists()
            )
            shutil.move(folder, aside)
        self.steps.say(f"run {self.number}, {self.arm}: {what}")
        scenario = replace(self.options.scenario, sessions_per_s=rate, seed=seed)
        about = {"arm": self.arm, "run": self.number, "rate": rate, "seed": seed}
        return points.measure(server, scenario, folder, setup, self.steps, about)

    def _search(self, server: Server, home: Path) -> None:
        o = self.options
        setup = points.short(o.setup, max(10.0, o.setup.seconds / 2))

        def look(rate: float) -> knee.Reading:
            folder = home / f"search-{rate:g}"
            found = self._point(server, folder, rate, setup, seed(o, rate, "search"), f"search, {rate:g} sessions/s")
            if found["invalid"]:
                raise BlackwellKernelsError(f"search at {rate:g} sessions/s: {'; '.join(found['invalid'])}")
            summary = found["summary"]
            return knee.Reading(rate, summary["turn_goodput"], summary["output_tokens_per_s"])

        found = knee.search(look, o.first_rate)
        if found["knee"] is None:
            raise BlackwellKernelsError(
                f"no load point: {found['why']}; loosen --slo-ttft and --slo-itl, or give --rates"
            )
        found["rates"] = knee.below(found["knee"])
        self._keep(o.out / "search.json", found)
        self.steps.say(f"knee of {self.arm}: {found['knee']:g} sessions/s ({found['why']})")

    def _keep(self, path: Path, values: dict[str, Any]) -> None:
        write_atomic(path, json.dumps(values, indent=1))
