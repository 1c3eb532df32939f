"""`blackwell-kernels tune OP`: find the fastest launch configurations on this GPU and give them to the plugin."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from blackwell_kernels.common import tables
from blackwell_kernels.errors import MissingRequirementError, did_you_mean
from blackwell_kernels.microbench import device, precompile, results, tuning
from blackwell_kernels.microbench.runner import ContextLost
from blackwell_kernels.microbench.timing import GraphEngine
from blackwell_kernels.microbench.tuned import Row

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)
SETS = ("model", "agent")


def _usage(message: str) -> typer.Exit:
    errors.print(f"error: {message}", highlight=False)
    return typer.Exit(2)


@app.command()
def tune(
    ops: Annotated[list[str], typer.Argument(metavar="OP...", help=f"Of {', '.join(tuning.SPACES)}.")],
    case: Annotated[str | None, typer.Option("--case", help="A part of case names, or a glob.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="model, agent; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Only these sizes; repeatable.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes that compile; by default a core each, 16.")] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Leave the GPU to others: fill Triton's cache and stop.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=3, help="Samples a finalist.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of all inputs.")] = 0,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    root: Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")] = results.ROOT,
    table_root: Annotated[
        Path, typer.Option("--tables", show_default=False, help="Where the plugin's tables are kept.")
    ] = tables.ROOT,
) -> None:
    """Compile every candidate on all cores, time them in turns, and write the winners into the plugin's tables.

    What is stored is not measured again: after an interruption, give the same command.
    """
    planned = [group for op in ops for group in _planned(op, case, sets, tokens)]
    if not torch.cuda.is_available():
        raise MissingRequirementError("tuning measures on a GPU, and no CUDA device is visible here: tune on one")
    here = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(here)
    sm = 10 * properties.major + properties.minor
    compiling = lambda batch: _compile(batch, sm, jobs or precompile.default_jobs())  # noqa: E731
    run = tuning.Tuner(
        device=here,
        engines=(GraphEngine(here),),
        head=device.facts(device.command(), commit),
        rates={},
        seed=seed,
        samples=rounds,
        l2_bytes=properties.L2_cache_size,
        root=root,
        table_root=table_root,
        compile=compiling,
    )
    if compile_only:
        run.ready(planned)
        console.print("next: the same command without --compile-only")
        return
    found: list[Row] = []
    try:
        with _progress("tuning", len(planned)) as advance:
            for rows in run.tune(planned):
                found += rows
                advance("; ".join(" | ".join(cells(row)) for row in rows))
    except ContextLost as lost:
        # CUDA is gone in this process; the candidate is stored as a failure, so the same command goes on behind it
        errors.print(f"{lost}; going on in a new process", highlight=False, markup=False)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if as_json:
        print(json.dumps([row.model_dump() for row in found], indent=1))
        return
    console.print(_table(found))
    console.print("next: blackwell-kernels bench --write-dispatch")


def _planned(op: str, case: str | None, sets: list[str] | None, tokens: list[int] | None) -> list[tuning.Group]:
    if op not in tuning.SPACES:
        raise _usage(
            f"nothing to tune is named {op!r}{did_you_mean(op, tuning.SPACES)}; there are {', '.join(tuning.SPACES)}"
        )
    for name in sets or ():
        if name not in SETS:
            raise _usage(f"no set is named {name!r}{did_you_mean(name, SETS)}; there are {', '.join(SETS)}")
    found = tuning.groups(op, tuple(sets or SETS), case, tuple(tokens or ()))
    if not found:
        raise _usage(f"no case of {op} matches --case {case}; `blackwell-kernels bench cases` lists all")
    return found


def _compile(batch: list[precompile.Job], sm: int, processes: int) -> list[precompile.Failure | None]:
    with _progress("compiling", len(batch), step=50) as advance:
        failures = precompile.compile_all(batch, sm, processes, lambda job: advance(job.op))
    for why in sorted({failure.why for failure in failures if failure is not None}):
        errors.print(f"not compiled ahead: {why}", highlight=False, markup=False)
    return failures


@contextmanager
def _progress(what: str, total: int, step: int = 1) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, elsewhere a line each `step`, so that logs stay readable; on stderr, as JSON has stdout."""
    done = 0
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            if not errors.is_terminal and (done % step == 0 or done == total):
                errors.print(f"[{done}/{total}] {what} {text}", markup=False, highlight=False)

        yield advance


def cells(row: Row) -> list[str]:
    """Case, the heuristic's µs, the best µs, gain, what the best configuration changes."""
    base, best = row.times()
    gain = f"{base / best:.2f}x" if base and best else "-"
    changed = {name: value for name, value in (row.best or {}).items() if row.heuristic.get(name) != value}
    config = tuning.label_of(changed) or "heuristic"
    return [f"{row.definition} {row.case}", *(f"{us:.2f}" if us else "-" for us in (base, best)), gain, config]


def _table(rows: list[Row]) -> Table:
    table = Table("case", "heuristic µs", "best µs", "gain", "configuration")
    for row in rows:
        table.add_row(*cells(row))
    return table
