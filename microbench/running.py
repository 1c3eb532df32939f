"""What `bench` does once its options are read: examines, measures, compares, checks, and tells about it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
import typer
from rich.console import Console

from blackwell_kernels.common import arch
from blackwell_kernels.microbench import cases as case_index
from blackwell_kernels.microbench import device, dispatch, regressions, report, results, supervise, worker
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.worker import Job

# into files and pipes tables are written whole
console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 220)
errors = Console(stderr=True, soft_wrap=True)


def usage(message: str) -> typer.Exit:
    """Told, exit code 2."""
    errors.print(f"error: {message}", highlight=False)
    return typer.Exit(2)


def check_files(theirs: tuple[Path, ...]) -> None:
    """Their files are read before anything runs, so that a mistake in one is told at once.

    Raises: SolutionError.
    """
    from blackwell_kernels.microbench import third_party

    for path in theirs:
        third_party.load(path)


def examine(job: Job, limit: float, as_json: bool) -> list[tuple[str, str, str, str]]:
    """Solutions that are not to be timed, as `Job.skip` has them; each solution in a process of its own."""
    caught, told = [], []
    for path in job.solutions:
        from blackwell_kernels.microbench import third_party

        name, definition = (found := third_party.load(path)).name, found.definition
        known = {(c.definition, c.name): c.spec.name for c in case_index.all_cases()}
        cases = [key for key in job.cases if definition in (key[0], known[key])]
        if not cases:
            raise usage(f"{path} is for {definition}, of which no case was chosen")
        factory = "blackwell_kernels.microbench.third_party:examination"
        task = job.model_copy(update={"solutions": (path,), "cases": cases, "factory": factory})
        for message in supervise.run(task, quiet_s=limit):
            if "head" in message:
                continue
            if "row" in message:
                verdict = message["row"]
            else:
                case, why = message["failed"]
                verdict = {"definition": definition, "case": case, "solution": name, "problems": [why]}
            told.append(verdict)
            errors.print(
                f"{'caught' if verdict['problems'] else 'honest'} {name} {verdict['definition']} {verdict['case']}"
                + "".join(f"\n  {problem}" for problem in verdict["problems"]),
                markup=False,
                highlight=False,
            )
            if verdict["problems"]:
                key = next(key for key in cases if key[1] == verdict["case"])
                caught.append((*key, name, "; ".join(verdict["problems"])))
    if as_json and not torch.cuda.is_available():
        print(json.dumps({"timing": "timing skipped: no CUDA device", "verdicts": told}, indent=1))
    return caught


def without_stored(job: Job, same_kernels: bool = False, gpu: str | None = None) -> Job:
    """The job without the cases that have a row, stored by this source, of what they launch now.

    same_kernels: any source will do, but what is asked for must be in the row, and so must the job's `peers`: a row in
    which one of them was not set up does not do. gpu: a folder of results; without one,
    that of the GPU that is here.
    """
    source, known = device.source_hash(), {(c.definition, c.name): c for c in case_index.all_cases()}
    # of this GPU alone: another's rows say nothing about it
    gpu = gpu or arch.gpu_slug(torch.cuda.get_device_name())

    def kept(row: results.Row) -> bool:
        ours = row.impls[OURS]
        complete = not job.fib or ours.us is None or ours.fib_us is not None
        complete = complete and all(row.impls[name].set_up for name in job.peers if name in row.impls)
        wanted = complete if same_kernels else row.source == source
        return wanted and dispatch.holds(row, gpu)

    asked = {(known[key].spec.name, key[1]) for key in job.cases}
    stored: set[tuple[str, str]] = set()
    for op in {known[key].spec.op for key in job.cases}:
        if (path := results.path_of(gpu, op, job.root)).exists():
            rows = [row for row in results.load(path).rows if (row.definition, row.case) in asked]
            stored |= {(row.definition, row.case) for row in rows if kept(row)}
    left = [key for key in job.cases if (known[key].spec.name, key[1]) not in stored]
    errors.print(f"{len(job.cases) - len(left)} of {len(job.cases)} cases are stored already", highlight=False)
    return job.model_copy(update={"cases": left})


def measure(
    heard: Iterable[worker.Message], job: Job, as_json: bool
) -> tuple[list[results.Row], list[results.Results], bool]:
    """(rows measured, results files written, whether a case has no row)."""
    rows: list[results.Row] = []
    failed: list[str] = []
    begun, spent = len(job.cases), Counter[str]()
    gpu, started = "", time.monotonic()
    for message in heard:
        if "head" in message:
            gpu = message["head"]["gpu"]
            continue
        if message.get("failed", [""])[-1] == worker.NOT_BEGUN:
            begun -= 1
            continue
        if "row" in message:
            rows.append(results.Row.model_validate(message["row"]))
            spent.update(message["seconds"])
            what = " | ".join(report.cells(rows[-1]))
        else:  # failed, or lost in this very process
            failed.append(": ".join(message["failed" if "failed" in message else "lost"]))
            what = failed[-1]
        done, seconds = len(rows) + len(failed), time.monotonic() - started
        left = seconds / done * (len(job.cases) - done)
        # to stderr, so that --json stays alone on stdout; a line each, so that logs stay readable
        told = f"[{done}/{len(job.cases)}, {seconds:.0f} s, about {left:.0f} s left] {what}"
        errors.print(told, markup=False, highlight=False)
    if not as_json:
        console.print(report.terminal(rows, gpu))
        console.print(report.terminal_scores(rows))
        for line in [*report.contest_lines(rows), *report.notes(rows)]:
            console.print(line, highlight=False, markup=False)
    for line in failed:
        errors.print(f"error: no row: {line}", markup=False, highlight=False)
    if spent and not as_json:
        told = ", ".join(f"{what} {seconds:.1f}" for what, seconds in spent.most_common(8))
        errors.print(f"seconds of {sum(spent.values()):.0f}: {told}", highlight=False, markup=False)
    if begun < len(job.cases):
        errors.print(f"{len(job.cases) - begun} of {len(job.cases)} cases {worker.NOT_BEGUN}", highlight=False)
    ops = dict.fromkeys(row.op for row in rows)
    stored = [results.load(results.path_of(arch.gpu_slug(gpu), op, job.root)) for op in ops]
    return rows, stored, bool(failed) or begun < len(job.cases)


def compare(now: dict[str, list[results.Row]], then: dict[str, list[results.Row]], as_json: bool) -> int:
    """Tell the changes of each GPU that both know, another one's times say nothing; the exit code."""
    out = errors if as_json else console
    found: list[regressions.Change] = []
    for gpu in now.keys() & then.keys():
        changes = regressions.compare(now[gpu], then[gpu])
        for change in changes:
            if change.verdict != "same":
                out.print(change.text(), markup=False, highlight=False)
        counts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(change.verdict for change in changes).items())
        machine = f"the machine runs peers at {regressions.drift(now[gpu], then[gpu]):.3f}x the time of then"
        out.print(f"compared: {counts or 'no case in common'}; {machine}", highlight=False)
        found += changes
    if not now.keys() & then.keys():
        known = [", ".join(sorted(rows)) or "no GPU" for rows in (now, then)]
        out.print(f"compared: nothing: these rows are of {known[0]}, those of {known[1]}", highlight=False)
    return 1 if regressions.failed(found) or not found else 0


def check_correctness(wanted: list[case_index.Case], as_json: bool, seed: int) -> int:
    """Without a GPU: every implementation that runs here against the reference; the exit code."""
    from rich.table import Table

    try:
        from blackwell_kernels.microbench import correctness
    except ModuleNotFoundError as error:
        errors.print(f"error: `bench` needs {error.name}\nnext: pip install -e '.[bench]' in a clone", highlight=False)
        return 3
    verdicts = []
    for verdict in correctness.check(wanted, seed=seed):
        verdicts.append(verdict)
        if not as_json and verdict.status != "UNAVAILABLE":
            console.print(
                f"{verdict.status:<8} {verdict.definition} {verdict.case} {verdict.implementation}", markup=False
            )
    counts = Counter(verdict.status for verdict in verdicts)
    failed = [verdict for verdict in verdicts if verdict.status not in ("PASSED", "UNAVAILABLE")]
    if as_json:
        told = {"timing": correctness.SKIPPED, "source": device.source_hash(), "verdicts": [v.row() for v in verdicts]}
        print(json.dumps(told, indent=1))
        return 1 if failed else 0
    absent = Counter((v.implementation, v.why) for v in verdicts if v.status == "UNAVAILABLE")
    table = Table("implementation", "cases", "why it did not run")
    for (name, why), count in sorted(absent.items()):
        table.add_row(name, str(count), why)
    console.print(table)
    for verdict in failed:
        console.print(f"{verdict.definition} {verdict.case} {verdict.implementation}: {verdict.why}", markup=False)
    console.print(f"{counts['PASSED']} right, {len(failed)} wrong; {correctness.SKIPPED}", highlight=False)
    console.print("next: run the same command on a machine with a GPU to measure")
    return 1 if failed else 0
