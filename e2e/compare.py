"""Plugin against stock vLLM under agent sessions: tokens per second, the tail, and what the difference is worth.

Servers run one after the other, A B A B, or, on twice the GPUs that one needs, both at once and then swapped, each with
the same arguments, seeds and traffic. Every load point is stored when it is done, so a comparison that was stopped, by
its user or by its own time limit, goes on where it was (same --out). A server that dies is started once more, and the
report says what was lost.

    OUT/compare.json            what is compared
    OUT/search.json             the search for the knee, unless --rates says where to measure
    OUT/profile-stock.json      what a step's time goes to, taken before the first load point
    OUT/prediction.json         what follows from it and the kernels' measured ratios
    OUT/run-0-stock/start-0/    a server's log, status files, probe answers
    OUT/run-0-stock/rate-0.5/   raw records, /metrics before, during and after, point.json
    OUT/result.json report.md report.html
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from blackwell_kernels.e2e import alike, demo, kernel_time, knee, points, predict, report, sources, warm_up, watch
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.processes import raise_if_stopped, signals_stop
from blackwell_kernels.e2e.ratios import ARMS
from blackwell_kernels.e2e.report import read_json, write_atomic
from blackwell_kernels.e2e.server import Server
from blackwell_kernels.e2e.serving import Serving
from blackwell_kernels.e2e.sessions import Scenario
from blackwell_kernels.env import HOOK_OPS
from blackwell_kernels.errors import BlackwellKernelsError, ServerError

BEFORE = "held before the start"
RESTARTS = 1  # of one server in one run
READY_S = 3600.0  # real models load and compile for long
AFTER_S = 5.0  # of a load point: its end, its evaluation
END_S = 25.0  # of a comparison: its servers stop, its report is written (a second for every 400 requests, seen here)
MEASURED = Path("microbench/results")
# arguments of stock's that decide which measured peer it runs, if not the default
CHOSEN = {
    "gdn_prefill": (r"--gdn-prefill-backend[ =]triton", "vllm.fla_chunk"),
    "moe": (r"--moe-backend[ =]deep_gemm", "vllm.DeepGemmExperts"),
}


class TimeIsUp(BlackwellKernelsError):
    """The next thing would not end within the time limit."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    serving: Serving
    scenario: Scenario
    setup: points.Setup
    out: Path
    rates: tuple[float, ...] = ()  # none: up to the knee, found by search, and beyond
    first_rate: float = 0.25
    warmup_s: float = 30.0
    repeats: int = 2
    gpus: tuple[int, ...] = ()  # none: every server sees all
    profile: bool = False
    measured: Path = MEASURED  # kernels' results, for the prediction
    time_limit_s: float | None = None
    port: int | None = None
    as_json: bool = False
    command: str = field(default_factory=lambda: shlex.join(["blackwell-kernels", *sys.argv[1:]]))

    def __post_init__(self) -> None:
        if any(not 0 < rate < float("inf") for rate in self.rates):
            told = ", ".join(f"{rate:g}" for rate in self.rates)
            raise BlackwellKernelsError(f"--rates {told}: sessions per second are above 0, as in --rates 0.5,1,2")
        if self.gpus and len(self.gpus) not in (self.serving.tp, 2 * self.serving.tp):
            raise BlackwellKernelsError(
                f"{len(self.gpus)} GPUs for servers of {self.serving.tp}: give {self.serving.tp}, for one after the "
                f"other, or {2 * self.serving.tp}, for both at once"
            )

    @property
    def at_once(self) -> bool:
        """Whether both arms run at the same time, each on its own GPUs."""
        return len(self.gpus) == 2 * self.serving.tp

    def gpus_of(self, number: int, arm: str) -> tuple[int, ...]:
        """The GPUs of one run of one arm: swapped in every other run."""
        if not self.at_once:
            return self.gpus
        second = (ARMS.index(arm) + number) % 2
        return self.gpus[second * self.serving.tp : (second + 1) * self.serving.tp]

    def to_dict(self) -> dict[str, Any]:
        """What must stay the same for stored load points to be usable."""
        setup = {**asdict(self.setup), "slo": self.setup.slo.model_dump(), "source": str(self.setup.source or "")}
        traffic = {**self.scenario.to_dict(), "sessions_per_s": None}
        at_once = {"at_once": True} if self.at_once else {}
        return {"serving": self.serving.to_dict(), "scenario": traffic, "setup": setup, **at_once}


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
        state, code = f"stopped by {stop}; the same command goes on from here.", demo.INTERRUPTED
    except TimeIsUp as stop:
        state, code = f"{stop}; the same command goes on from here.", demo.INTERRUPTED
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
        before = read_json(kept)
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
    machine = {
        "versions": demo.versions(),
        "machine": demo.machine(options.serving.backend),
        "sources": demo.sources(),
    }
    _refuse_mixtures(options, machine)
    write_atomic(out / "machine.json", json.dumps(machine, indent=1))


def _refuse_mixtures(options: Options, now: dict[str, Any]) -> None:
    """Load points of other versions, code or GPUs do not go with new ones. Raises BlackwellKernelsError."""
    path = options.out / "machine.json"
    before = read_json(path) if path.exists() and list(options.out.glob(f"run-*/*/{points.DONE}")) else {}
    pairs = {
        "versions": (before.get("versions"), now["versions"]),
        "sources of the plugin": (before.get("sources"), now["sources"]),
        "GPU": (before.get("machine", {}).get("gpu"), now["machine"].get("gpu")),
    }
    if other := [what for what, (was, is_) in pairs.items() if was is not None and was != is_]:
        raise BlackwellKernelsError(
            f"{options.out} holds load points of other {', '.join(other)}: give another --out, or remove it"
        )


def measure(options: Options, steps: Steps) -> None:
    """Everything that needs servers."""
    clock = Clock(options.time_limit_s)
    checkpoint = options.serving.folder(steps)
    for number in range(options.repeats):
        blocks = [Block(options, number, arm, checkpoint, steps, clock) for arm in ARMS]
        if options.at_once:
            _together(blocks)
        else:
            for block in blocks:
                block.run()


class Clock:
    """What is left of the time limit."""

    def __init__(self, limit_s: float | None) -> None:
        self.limit_s, self.begun = limit_s, time.monotonic()

    def left(self) -> float:
        """Seconds; without a limit, many."""
        return READY_S if self.limit_s is None else self.limit_s - END_S - (time.monotonic() - self.begun)

    def need(self, seconds: float, what: str) -> None:
        """Raises TimeIsUp when something of so many seconds would end too late."""
        if self.limit_s is not None and self.left() < seconds:
            raise TimeIsUp(f"{what} would take {seconds:.0f} s of the {max(0.0, self.left()):.0f} s left")


def _together(blocks: list[Block]) -> None:
    """Run both arms at once. What ends one with an exception, or Ctrl-C, ends both; the first exception is raised."""
    for block, other in zip(blocks, reversed(blocks), strict=True):
        block.beside = other
    with ThreadPoolExecutor(len(blocks)) as pool:
        futures = [pool.submit(block.run) for block in blocks]
        try:
            running = set(futures)
            while running:
                done, running = wait(futures, timeout=0.5)
                raise_if_stopped()
                for future in done:
                    error = future.exception()
                    # one that ran out of time has no quarrel with the other: it may finish what it is doing
                    if error is not None and not isinstance(error, TimeIsUp):
                        raise error
        except BaseException:
            for block in blocks:
                block.cancel()
            raise
    for future in futures:
        future.result()


def rates(options: Options) -> tuple[float, ...]:
    """The rates to measure at: given, or those around the knee that was found; none while the search is not done."""
    if options.rates:
        return tuple(sorted(options.rates))
    path = options.out / "search.json"
    return tuple(read_json(path)["rates"]) if path.exists() else ()


def seed(options: Options, rate: float, purpose: str = "measured") -> int:
    """Of the traffic of one load point: the same for both arms and in every run, so that runs of one arm differ by
    nothing but noise; another for every rate, so that no rate finds another's prompts in the cache."""
    return zlib.crc32(f"{options.scenario.seed}/{purpose}/{rate:g}".encode())


def point_folder(options: Options, number: int, arm: str, rate: float) -> Path:
    """Where a load point is stored."""
    return options.out / f"run-{number}-{arm}" / f"rate-{rate:g}"


def served(options: Options) -> predict.Served:
    """What the kernels' results are looked up by."""
    s, machine = options.serving, read_json(options.out / "machine.json")["machine"]
    words = [word for given in (*s.args, *s.only.get("plugin", ())) for word in given.split("=", 1)]
    given = {name: value for name, value in pairwise(words) if name.startswith("--")}
    forced = s.env.get("plugin", {}).get("BLACKWELL_KERNELS_FORCE", "")
    stock = shlex.join([*s.arguments(options.scenario), *s.only.get("stock", ())])
    return predict.Served(
        gpu=machine.get("gpu", ""),
        model=s.model,
        tp=s.tp,
        ep=s.tp if "--enable-expert-parallel" in words else 1,
        kv_dtype="fp8" if "fp8" in given.get("--kv-cache-dtype", "") else "bfloat16",
        state_dtype=given.get("--mamba-ssm-cache-dtype", "bfloat16").replace("auto", "bfloat16"),
        tuned=predict.TABLES in s.env.get("stock", {}),
        chosen={op: peer for op, (argument, peer) in CHOSEN.items() if re.search(argument, stock)},
        forced=frozenset(HOOK_OPS if forced == "all" else forced.replace(" ", "").split(",")),
    )


class Block:
    """One run of one arm: a server, its warm-up and probes, and the load points that are still missing."""

    def __init__(self, options: Options, number: int, arm: str, checkpoint: Path, steps: Steps, clock: Clock) -> None:
        self.options, self.number, self.arm, self.clock = options, number, arm, clock
        self.steps = steps.beside(arm) if options.at_once else steps
        self.checkpoint, self.folder = checkpoint, options.out / f"run-{number}-{arm}"
        self.cancelled = threading.Event()
        self.server: Server | None = None
        self.profiled = False  # tried to: what a server died of is not tried again
        self.set_up = threading.Event()  # warm and profiled, or ended
        self.beside: Block | None = None  # the arm that runs at the same time

    def cancel(self) -> None:
        """End it from another thread: its server stops, and nothing is started again."""
        self.cancelled.set()
        if self.server is not None:
            self.server.stop()

    def missing(self) -> list[float]:
        """Rates without a finished load point."""
        found = rates(self.options)
        return [r for r in found if not points.stored(point_folder(self.options, self.number, self.arm, r))]

    def run(self) -> None:
        """Measure what is missing; a server that dies is started RESTARTS times more, then the rest is lost."""
        try:
            self._run()
        finally:
            self.set_up.set()

    def _run(self) -> None:
        searching = not rates(self.options)
        if not searching and not self.missing():
            self.steps.say(f"run {self.number}, {self.arm}: already measured")
            return
        for attempt in range(RESTARTS + 1):
            try:
                self._serve(searching=not rates(self.options))
                return
            except ServerError as error:
                if self.cancelled.is_set():
                    return
                if self.clock.left() <= 0:
                    raise TimeIsUp("the server was not ready in time") from error
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
        whole = self._ready_s() + o.warmup_s + self._point_s(o.setup)
        self.clock.need(whole, "one load point of a server that is not started yet")
        gpus, traces = o.gpus_of(self.number, self.arm), home / "traces" if self._wants_profile() else None
        port = o.port + ARMS.index(self.arm) if o.port and o.at_once else o.port
        self.server = server = o.serving.server(
            self.arm, home, self.checkpoint, o.scenario, port, gpus=gpus, traces=traces
        )
        self.steps.say(f"run {self.number} of {o.repeats}, {self.arm}: starting")
        before = watch.gpu_memory_gib(server.env.get("CUDA_VISIBLE_DEVICES"))  # another's: not the server's doing
        with server:
            if self.cancelled.is_set():  # while this server was being made
                raise ServerError("the other arm ended")
            ready = server.wait_ready(self.steps, min(READY_S, self.clock.left()))
            begun = {"ready_s": ready, "command": shlex.join(server.command), "gpus": list(gpus)}
            begun["memory_gib"] = server.memory_told() | ({} if before is None else {BEFORE: before})
            self._keep_memory(home, begun, "held when ready")
            scored = demo.while_serving(server, lambda: alike.score(server, o.scenario.vocab, o.scenario.max_context))
            self._keep(home / "probe.json", {"scores": scored})
            self._keep_memory(home, begun, "after the probes")
            if searching:
                self._rates(server, home)
            warm = points.short(o.setup, o.warmup_s)
            if o.warmup_s > 0 and o.serving.backend in demo.WARMED:
                self._keep(home / "warm-up.json", demo.while_serving(server, lambda: self._meet_sizes(server)))
            if o.warmup_s > 0:
                self._point(server, home / "warm-up", max(rates(o)), warm, seed(o, 0.0, "warm-up"), "warm-up")
                self._keep_memory(home, begun, "after the warm-up")
            if traces is not None:
                self._profile(server, traces)
            self.set_up.set()
            self._wait_for_the_other(server)
            for rate in self.missing():
                self.clock.need(self._point_s(o.setup), f"{rate:g} sessions/s")
                self._point(
                    server,
                    point_folder(o, self.number, self.arm, rate),
                    rate,
                    o.setup,
                    seed(o, rate),
                    f"{rate:g} sessions/s",
                )
        self.steps.say(f"run {self.number}, {self.arm}: server stopped")

    def _meet_sizes(self, server: Server) -> dict[str, Any]:
        """Let kernels of all sizes be compiled, which a few seconds of traffic would leave to the load points."""
        traffic, limit_s = self.options.scenario, min(warm_up.LIMIT_S, self.options.warmup_s)
        longest = min(traffic.max_context, warm_up.LONGEST)
        found = warm_up.run(server, traffic.vocab, longest, self.steps, limit_s=limit_s)
        self.steps.say(f"{found['requests']} requests of all sizes met {len(found['compiled'])} kernels to compile")
        return found

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

    def _ready_s(self) -> float:
        """What the arm's quickest start took until now; 0 before the first."""
        starts = [read_json(path) for path in self.options.out.glob(f"run-*-{self.arm}/start-*/start.json")]
        return min((start["ready_s"] for start in starts), default=0.0)

    def _point_s(self, setup: points.Setup) -> float:
        return setup.ramp_s + setup.seconds + setup.drain_s + AFTER_S

    def _wait_for_the_other(self, server: Server) -> None:
        """Load points begin together, so that what is predicted is written before any."""
        while self.beside is not None and not self.beside.set_up.is_set():
            server.check()
            self.clock.need(self._point_s(self.options.setup), "a load point")
            time.sleep(0.1)

    def _wants_profile(self) -> bool:
        done = self.profiled or (self.options.out / f"profile-{self.arm}.json").exists()
        return self.options.profile and not done

    def _profile(self, server: Server, traces: Path) -> None:
        """What the arm's steps are made of; after stock's, what the plugin should make of them."""
        o = self.options
        shapes, self.profiled = kernel_time.SHAPES[o.serving.backend], True
        self.steps.say(f"run {self.number}, {self.arm}: profiling {', '.join(shape.name for shape in shapes)}")
        try:
            found = demo.while_serving(server, lambda: kernel_time.capture(server, traces, o.scenario.vocab, shapes))
        except ServerError as error:
            server.check()  # a server that lives can still be measured
            self.steps.say(f"not profiled: {error}")
            return
        if self.arm == "stock":  # before the profile, whose file says that nothing of this is left to do
            self._keep(o.out / "prediction.json", predict.make(found, served(o), o.measured, o.scenario))
        self._keep(o.out / f"profile-{self.arm}.json", found)
        shutil.rmtree(traces)  # tens of megabytes, and all that is read of them is kept

    def _rates(self, server: Server, home: Path) -> None:
        """Search for the knee, or wait for the other arm that does."""
        if self.arm == "stock" or not self.options.at_once:
            return self._search(server, home)
        self.steps.say("waiting for stock's search")
        while not rates(self.options):
            server.check()
            self.clock.need(0.0, "the search")
            time.sleep(0.5)

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
        found["rates"] = knee.around(found["knee"])
        self._keep(o.out / "search.json", found)
        self.steps.say(f"knee of {self.arm}: {found['knee']:g} sessions/s ({found['why']})")

    def _keep_memory(self, home: Path, begun: dict[str, Any], when: str) -> None:
        """Note what the GPU holds: kernels and graphs show before any request, what requests leave behind after."""
        assert self.server is not None
        held = watch.gpu_memory_gib(self.server.env.get("CUDA_VISIBLE_DEVICES"))
        begun["memory_gib"] |= {} if held is None else {when: held}
        self._keep(home / "start.json", begun)

    def _keep(self, path: Path, values: dict[str, Any]) -> None:
        write_atomic(path, json.dumps(values, indent=1))
