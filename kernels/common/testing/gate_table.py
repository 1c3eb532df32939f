"""`blackwell-kernels compile`: what kernels compile to for a chip that need not be here, and whether they could launch.

Cases are compiled in parallel by subprocesses of `compile.py`; a compiler that aborts costs its case.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing.compile import CaseResult
from blackwell_kernels.common.testing.gates import ARCHS
from blackwell_kernels.common.testing.statistics import Statistics

FAMILIES = ("moe", "dsa", "gdn")
HEAD = [
    "kernel",
    "arch",
    "cases",
    "warps",
    "registers",
    "spills B",
    "shared B",
    "TMEM",
    "MMA",
    "TMA",
    "SASS",
    "verdict",
]
_CHUNK = 6  # cases a process: starting one costs seconds, and its progress shows when it ends
_VARIANT = re.compile(r"[_ ]?(tp\d+|ep\d+|[thn]=?\d+|bf16|f32|\d+)", re.IGNORECASE)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# into files and pipes the table is written whole
console = Console(soft_wrap=True, width=None if os.isatty(1) else 200)
errors = Console(stderr=True, soft_wrap=True)


def names(family: str, *, everything: bool, part: str = "") -> list[str]:
    """Cases of a family: all of them, or the first of each kind (names that differ in sizes and types alone)."""
    known = [case.name for case in importlib.import_module(f"blackwell_kernels.{family}.aot").CASES]
    chosen = [name for name in known if part in name]
    if everything or part:
        return chosen
    return list({_VARIANT.sub("", name): name for name in reversed(chosen)}.values())[::-1]


def compile_all(
    chosen: dict[str, list[str]], archs: Sequence[int], jobs: int
) -> Iterator[tuple[str, list[CaseResult]]]:
    """(family, results) of each group of cases, as it ends; `chosen`: family -> names of cases."""
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(aot.run, f"blackwell_kernels.{family}.aot", (arch,), found[start : start + _CHUNK]): family
            for family, found in chosen.items()
            for arch in archs
            for start in range(0, len(found), _CHUNK)
        }
        for future in as_completed(running):
            yield running[future], future.result()


def cells(results: Iterable[CaseResult]) -> list[list[str]]:
    """One line for each distinct compilation of a kernel, failures first; a case that compiled nothing has its own."""
    found: dict[Statistics, list[CaseResult]] = {}
    lost = []
    for result in results:
        for kernel in result.kernels:
            found.setdefault(_shape(kernel), []).append(result)
        lost += [
            [result.case, f"sm_{result.arch}a", "1", *["–"] * 8, problem]
            for problem in result.problems
            if not any(problem.startswith(f"{kernel.kernel} (") for kernel in result.kernels)
        ]
    lines = []
    for s, where in sorted(found.items(), key=lambda item: (item[0].kernel, item[0].arch, item[0].registers)):
        mine = (problem for result in where for problem in result.problems if problem.startswith(f"{s.kernel} ("))
        verdict = "; ".join(dict.fromkeys(problem.partition("): ")[2] for problem in mine)) or "ok"
        numbers = [s.warps, s.registers, s.stack, f"{s.shared:,}", s.tmem, "+".join(s.mma) or "none", s.tma]
        lines.append([s.kernel, f"sm_{s.arch}a", str(len(where)), *map(str, numbers), str(s.instructions), verdict])
    return lost + sorted(lines, key=lambda line: line[-1] == "ok")


def _shape(s: Statistics) -> Statistics:
    """The same without its grid: cases that differ in sizes alone share their code."""
    return Statistics(**{**asdict(s), "grid": (), "mma": s.mma})


def _archs(asked: list[str] | None) -> tuple[int, ...]:
    made = []
    for name in asked or [f"sm_{arch}a" for arch in ARCHS]:
        match = re.fullmatch(r"(?:sm_?)?(\d+)a?", name)
        if match is None or int(match[1]) not in ARCHS:
            known = ", ".join(f"sm_{arch}a" for arch in ARCHS)
            errors.print(f"error: no arch is named {name!r}; there are {known}", highlight=False)
            raise typer.Exit(2)
        made.append(int(match[1]))
    return tuple(dict.fromkeys(made))


@app.command()
def compile_command(
    arch: Annotated[list[str] | None, typer.Option("--arch", help="sm_90a or sm_100a; repeatable, both.")] = None,
    family: Annotated[list[str] | None, typer.Option("--family", help="moe, dsa, gdn; repeatable, all.")] = None,
    case: Annotated[str, typer.Option("--case", help="A part of cases' names.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Every shipped configuration, not only one case of each kind.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Compilers at a time.")] = os.cpu_count() or 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile kernels for chips that are not here and hold them to the gates; exit code 1 where one fails.

    It shows that a kernel fits and what it uses, not that its barriers are right nor how fast it is.
    """
    archs = _archs(arch)
    for name in family or ():
        if name not in FAMILIES:
            errors.print(f"error: no family is named {name!r}; there are {', '.join(FAMILIES)}", highlight=False)
            raise typer.Exit(2)
    chosen = {name: names(name, everything=everything, part=case) for name in family or FAMILIES}
    total = len(archs) * sum(map(len, chosen.values()))
    if not total:
        errors.print(f"error: no case has {case!r} in its name", highlight=False)
        raise typer.Exit(2)
    results: list[CaseResult] = []
    for name, made in compile_all(chosen, archs, jobs):
        results += made
        failed = sum(bool(result.problems) for result in results)
        errors.print(f"[{len(results)}/{total}] {name}: {failed} failed so far", markup=False, highlight=False)
    _show(results, as_json)
    raise typer.Exit(1 if any(result.problems for result in results) else 0)


def _show(results: list[CaseResult], as_json: bool) -> None:
    ordered = sorted(results, key=lambda result: (result.module, result.arch, result.case))
    if as_json:
        told: list[dict[str, Any]] = [{**asdict(r), "verdict": "failed" if r.problems else "ok"} for r in ordered]
        print(json.dumps({"schema": 1, "cases": told}, indent=1))
        return
    table = Table(*HEAD, box=None, pad_edge=False)
    for line in cells(ordered):
        table.add_row(*line)
    console.print(table)
    failed = [result for result in ordered if result.problems]
    console.print(f"{len(ordered) - len(failed)} cases pass, {len(failed)} fail", highlight=False)
    console.print("next: blackwell-kernels bench")
