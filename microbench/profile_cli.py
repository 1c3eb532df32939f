"""`blackwell-kernels profile`: why an operator takes the time it takes, and what to try next."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import did_you_mean
from blackwell_kernels.microbench import counters, device, profile_report, profile_run, profiling, results
from blackwell_kernels.microbench.cases import SETS, Case, select
from blackwell_kernels.microbench.profiling import Facts, Profile
from blackwell_kernels.microbench.specs import OPS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# into files and pipes the table is written whole
console = Console(soft_wrap=True, width=None if os.isatty(1) else 220)
errors = Console(stderr=True, soft_wrap=True)
_SM = {"h200": 90, "b200": 100}


def _usage(message: str) -> typer.Exit:
    errors.print(f"error: {message}", highlight=False)
    return typer.Exit(2)


def choose(op: str, part: str | None, stored: list[results.Row]) -> Case:
    """The case named; else the stored one that is furthest from its floor, or the largest there is."""
    found = select(sets=tuple(name for name in SETS if name != "cpu"), op=op, case=part)
    if not found:
        raise _usage(f"no case of {op} matches {part}; `blackwell-kernels bench cases --op {op}` lists all")
    shares = {(row.definition, row.case): share for row in stored if (share := profile_run.share(row)) is not None}
    known = [case for case in found if (case.definition, case.name) in shares]
    if known:
        return min(known, key=lambda case: shares[case.definition, case.name])
    return max(found, key=lambda case: case.tokens)


@app.command()
def profile(
    ops: Annotated[list[str] | None, typer.Argument(help=f"One of {', '.join(OPS)}; with --all any, or none.")] = None,
    all_ops: Annotated[
        bool, typer.Option("--all", help="Cases in which every kernel runs, of all or the named operators.")
    ] = False,
    owed: Annotated[
        bool, typer.Option("--owed", help="With --all: leave out what has a profile of what it launches now.")
    ] = False,
    case: Annotated[str | None, typer.Option("--case", help="A part of a case's name, or a glob.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also the instruction mix: more passes of ncu.")] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An earlier profile, or with --all a folder of them; exit 1 if it fell by 5 %."),
    ] = None,
    chip: Annotated[str, typer.Option(help="The chip to compile for where there is no GPU: h200, b200.")] = "h200",
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--folder", help="With --all: where JSON and Markdown go; on a GPU beside the stored results."),
    ] = None,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds that tracing and reading counters may take each; then: not measured.")
    ] = counters.LIMIT_S,
    time_limit: Annotated[
        float | None, typer.Option("--time-limit", min=1, help="Seconds for everything: tools that are late say so.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the profile's JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write HTML with the roofline point.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    root: Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")] = results.ROOT,
) -> None:
    """A checklist for one operator on one case, or for all; exit 1 on spills, a fall-back, or a bound's share lost."""
    until = None if time_limit is None else time.time() + time_limit
    named = ops or []
    if not all_ops and len(named) != 1:
        raise _usage(f"name one operator of {', '.join(OPS)}, or --all")
    for op in named:
        if op not in OPS:
            raise _usage(f"no operator is named {op!r}{did_you_mean(op, OPS)}; there are {', '.join(OPS)}")
    if owed and not all_ops:
        raise _usage("--owed goes with --all")
    if all_ops and (case or output or markdown or page):
        raise _usage("--all goes through cases of its own and writes to --folder")
    if chip not in _SM:
        raise _usage(f"no chip is named {chip!r}; there are {', '.join(_SM)}")
    here = torch.cuda.is_available()
    gpu = arch.gpu_slug(torch.cuda.get_device_name()) if here else chip
    major, minor = torch.cuda.get_device_capability() if here else divmod(_SM[chip], 10)
    if all_ops:
        cases = [one for one in profiling.cases() if not named or one.spec.op in named]
        folder = folder or (root / gpu / "profile" if here else None)
        if owed:
            known = {
                profiling.name_of(one) for one in profiling.stored(folder or root / gpu / "profile") if one.holds()
            }
            cases = [one for one in cases if profiling.name_of(one) not in known]
            if not cases:
                console.print("every case has a profile of what it launches", highlight=False)
                raise typer.Exit
    else:
        path = results.path_of(gpu, named[0], root)
        cases = [choose(named[0], case, results.load(path).rows if path.exists() else [])]
    then = [_then(against, one, all_ops) for one in cases]
    found: list[Profile] = []
    changes: list[list[str]] = []
    failed: list[list[str]] = []
    for facts in profile_run.gather(
        cases,
        gpu,
        10 * major + minor,
        root=root,
        here=here,
        deep=deep,
        commit=commit,
        limit_s=limit,
        until=until,
        say=_say(as_json),
    ):
        found = [profiling.profile(one, gpu, known, device.command()) for one, known in zip(cases, facts, strict=True)]
        changes, failed = [], []
        for now, before in zip(found, then, strict=True):
            changed, lost = profiling.differences(now, before) if before is not None else ([], [])
            changes.append(changed)
            failed.append([*now.failures, *lost])
        for path, text in _files(found, facts, changes, folder, output, markdown, page):
            tables.replace_text(path, text)  # at once: another run may be reading the folder
        if folder is not None:
            tables.replace_text(folder / "README.md", profile_report.index(profiling.stored(folder)))
    if as_json:
        told = [
            {**json.loads(one.model_dump_json()), "changes": changed, "failures": problems}
            for one, changed, problems in zip(found, changes, failed, strict=True)
        ]
        print(json.dumps(told if all_ops else told[0], indent=1))
    elif all_ops:
        console.print(profile_report.overview(found))
    else:
        _show(found[0], changes[0])
    for one, problems in zip(found, failed, strict=True):
        for line in problems:
            where = f"{one.definition} {one.case}: " if all_ops else ""
            errors.print(f"failed: {where}{line}", highlight=False, markup=False)
    if not as_json:
        written = f"; reports are in {folder}" if all_ops and folder else ""
        options = "".join(f" --op {op}" for op in named)
        console.print(f"next: blackwell-kernels bench{options}{written}", highlight=False)
    raise typer.Exit(1 if any(failed) else 0)


def _say(as_json: bool):
    def say(line: str) -> None:
        if not as_json:
            errors.print(line, highlight=False, markup=False)

    return say


def _then(against: Path | None, case: Case, many: bool) -> Profile | None:
    """The earlier profile to compare with; in a folder a case may have none yet."""
    if against is None:
        return None
    path = against / f"{profiling.name_of(case)}.json" if many else against
    return None if many and against.is_dir() and not path.exists() else profiling.read(path)


def _files(
    found: list[Profile],
    facts: list[Facts],
    changes: list[list[str]],
    folder: Path | None,
    output: Path | None,
    markdown: Path | None,
    page: Path | None,
) -> list[tuple[Path, str]]:
    """(path, contents) of what was asked for."""
    wanted: list[tuple[Path, str]] = []
    if folder is not None:
        for one, changed in zip(found, changes, strict=True):
            wanted.append((folder / f"{profiling.name_of(one)}.json", one.model_dump_json(indent=1) + "\n"))
            wanted.append((folder / f"{profiling.name_of(one)}.md", profile_report.markdown(one, changed)))
    if output is not None:
        wanted.append((output, found[0].model_dump_json(indent=1) + "\n"))
    if markdown is not None:
        wanted.append((markdown, profile_report.markdown(found[0], changes[0])))
    if page is not None:
        wanted.append((page, profile_report.page(found[0], facts[0].ceilings, changes[0])))
    return wanted


def _show(found: Profile, changes: list[str]) -> None:
    console.print(f"{found.definition} {found.case} on {found.gpu}", highlight=False, markup=False)
    console.print(profile_report.terminal(found))
    for kernel in found.trace.kernels if found.trace else ():
        console.print(f"{kernel.us:8.2f} µs, {kernel.blocks} blocks of {kernel.threads}: {kernel.name}", markup=False)
    for i, line in enumerate(profile_report.finding_lines(found), 1):
        console.print(f"{i}. {line}", highlight=False, markup=False)
    for line in changes:
        console.print(f"changed: {line}", highlight=False, markup=False)
