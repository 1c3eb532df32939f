"""Gathers what is known about cases from the compiler, the benchmark, CUPTI and Nsight Compute, each run once for all,
the last once a family.

A tool that fails costs its own rows, which then say why.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from blackwell_kernels.common import arch
from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing.statistics import Statistics
from blackwell_kernels.microbench import counters, precompile, results, supervise
from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.counters import Launch
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.profiling import Facts
from blackwell_kernels.microbench.results import Ceilings, Row
from blackwell_kernels.microbench.traces import Trace
from blackwell_kernels.microbench.worker import Job

_MACHINE = ("gpu", "driver", "torch", "triton")
Static = tuple[list[Statistics], str]
LATE = "--time-limit left no time for it"


def share(row: Row) -> float | None:
    """The floor over our time."""
    us = row.impls[OURS].us
    return None if us is None else row.floor_us / us


def compiled(case: Case, sm: int) -> Static:
    """(what the call's kernels compile to, or why there is nothing to tell)."""
    if sm not in aot.ARCHS:
        return [], f"there is no ahead-of-time target for sm{sm}"
    try:
        with aot.compile_only(sm) as launches:
            precompile.call(case)
    except Exception as error:
        return [], f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    distinct = {(one.kernel.hash, one.grid): one for one in launches}
    return [one.statistics() for one in distinct.values()], ""


def compile_all(cases: Sequence[Case], sm: int) -> list[Static]:
    """`compiled` of every case, on all cores; Triton's cache then holds what the GPU runs."""
    if len(cases) == 1:
        return [compiled(cases[0], sm)]
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(len(cases), precompile.default_jobs()), mp_context=context) as pool:
        pending = [pool.submit(compiled, case, sm) for case in cases]
        made: list[Static] = []
        for future in pending:
            try:
                made.append(future.result())
            except BrokenProcessPool:
                made.append(([], "the compiler's process died"))
        return made


def measure(
    cases: Sequence[Case], commit: str | None, quiet_s: float, until: float | None = None
) -> tuple[list[tuple[Row | None, str]], dict[str, Any]]:
    """(row, why there is none) of each case, and the head: measured now in a process of its own, ours alone."""
    made: list[tuple[Row | None, str]] = []
    head: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        keys = [(case.definition, case.name) for case in cases]
        job = Job(cases=keys, only=("nobody",), fib=False, commit=commit, root=Path(folder), until=until)
        try:
            for message in supervise.run(job, quiet_s=quiet_s):
                if "head" in message:
                    head = message["head"]
                elif "row" in message:
                    made.append((Row.model_validate(message["row"]), ""))
                else:
                    made.append((None, message["failed"][1]))
        except supervise.WorkerError as error:
            made += [(None, str(error))] * (len(cases) - len(made))
    return made, head


def trace_all(cases: Sequence[Case], limit_s: float) -> list[tuple[Trace | None, str]]:
    """(trace, why there is none) of each case, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "traces.jsonl"
        names = [part for case in cases for part in (case.definition, case.name)]
        command = [sys.executable, "-m", "blackwell_kernels.microbench.profile_target", str(out), *names]
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=limit_s)
            end = (done.stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            why = f"the traced process ended with status {done.returncode}: {end[:200]}"
        except subprocess.TimeoutExpired:
            why = f"no end of the traced process after {limit_s:.0f} s"
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    told = [json.loads(line) for line in lines]
    made = [(Trace.model_validate(one["trace"]) if "trace" in one else None, one.get("error", "")) for one in told]
    return [*made, *[(None, why)] * (len(cases) - len(made))]


def count_all(cases: Sequence[Case], deep: bool, left: Callable[[], float]) -> list[tuple[list[Launch], str]]:
    """(launches with counters, why there are none) of each case; one run a family, since ncu writes at its end alone.

    left: seconds that the next run may take; none without one.
    """
    made: dict[tuple[str, str], tuple[list[Launch], str]] = {}
    for mine in _families(cases):
        try:
            if left() < 1:
                raise ValueError(LATE)
            found = counters.collect([_key(case) for case in mine], deep=deep, limit_s=left())
            told = [(launches, "" if launches else "the call failed under ncu") for launches in found]
        except ValueError as error:
            told = [([], str(error))] * len(mine)
        made |= dict(zip(map(_key, mine), told, strict=True))
    return [made[_key(case)] for case in cases]


def _key(case: Case) -> tuple[str, str]:
    return case.definition, case.name


def _families(cases: Sequence[Case]) -> list[list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.spec.op.split("_")[0], []).append(case)
    return list(found.values())


def allowed(family: str) -> dict[str, int]:
    """Kernel -> bytes of stack that its ahead-of-time cases record as allowed."""
    found: dict[str, int] = {}
    for case in importlib.import_module(f"blackwell_kernels.{family}.aot").CASES:
        for name, size in case.spill_allowance.items():
            name = name.partition("@")[0]
            found[name] = max(found.get(name, 0), size)
    return found


def gather(
    cases: Sequence[Case],
    gpu: str,
    sm: int,
    *,
    root: Path,
    here: bool,
    deep: bool = False,
    commit: str | None = None,
    limit_s: float = counters.LIMIT_S,
    until: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[Facts]]:
    """Facts of each case, anew after each tool, so that what is cut off keeps what the tools before it found.

    here: whether the GPU is; else what the compiler says, and stored results of `gpu`. deep: also the instruction mix.
    commit: to record where there is no checkout. limit_s: what CUPTI's process, and ncu's, may take each, and for how
    long the measuring one may say nothing. until: when everything is to be over (seconds since the epoch); a tool that
    this leaves no second does not run. say: hears of each step.
    """

    def left() -> float:
        return limit_s if until is None else min(limit_s, until - time.time())

    stored = {op: _stored(gpu, op, root) for op in {case.spec.op for case in cases}}
    say(f"compiling {len(cases)} cases for sm_{sm}a")
    facts = [
        Facts(
            kernels=kernels,
            no_kernels=no_kernels,
            no_counters="ncu has not run yet" if here else "no GPU is here",
            no_trace="CUPTI has not run yet" if here else "no GPU is here",
            shares=_shares(stored[case.spec.op]),
            allowed=allowed(case.spec.op.split("_")[0]),
            fresh=here,
            sms=arch.current_arch().sms if here else arch.ARCHS[gpu].sms,
            graphed=case.graphed,
        )
        for case, (kernels, no_kernels) in zip(cases, compile_all(cases, sm), strict=True)
    ]
    if not here:
        yield [_with_row(known, *_row_of(case, stored[case.spec.op])) for known, case in zip(facts, cases, strict=True)]
        return
    say("measuring")
    measured, head = measure(cases, commit, limit_s, until)
    facts = [_with_row(known, row, why, head) for known, (row, why) in zip(facts, measured, strict=True)]
    yield facts
    say("tracing launches with CUPTI")
    traced = trace_all(cases, left()) if left() > 1 else [(None, LATE)] * len(cases)
    facts = [replace(known, trace=trace, no_trace=why) for known, (trace, why) in zip(facts, traced, strict=True)]
    yield facts
    say("reading counters with Nsight Compute")
    counted = count_all(cases, deep, left)
    yield [replace(known, launches=found, no_counters=why) for known, (found, why) in zip(facts, counted, strict=True)]


def _with_row(facts: Facts, row: Row | None, why: str, head: dict[str, Any]) -> Facts:
    ceilings = Ceilings.model_validate(head["ceilings"]) if head else None
    machine = {name: str(head[name]) for name in _MACHINE if name in head}
    return replace(facts, row=row, no_row=why, ceilings=ceilings, machine=machine)


def _row_of(case: Case, stored: results.Results | None) -> tuple[Row | None, str, dict[str, Any]]:
    rows = {(row.definition, row.case): row for row in stored.rows} if stored else {}
    row = rows.get((case.spec.name, case.name))
    if stored is None or row is None:
        return None, "no GPU is here, and no result of this case is stored", {}
    return row, "", stored.model_dump(by_alias=True)


def _shares(stored: results.Results | None) -> dict[str, float]:
    rows = stored.rows if stored else []
    return {f"{row.definition} {row.case}": found for row in rows if (found := share(row)) is not None}


def _stored(gpu: str, op: str, root: Path) -> results.Results | None:
    path = results.path_of(gpu, op, root)
    return results.load(path) if path.exists() else None
