"""`blackwell-kernels profile`: why an operator takes the time it takes, and what to try next."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from blackwell_kernels.common import arch
from blackwell_kernels.common.testing import compile as aot
from blackwell_kernels.common.testing.statistics import Statistics
from blackwell_kernels.errors import did_you_mean
from blackwell_kernels.microbench import counters, precompile, profile_report, profiling, results, supervise
from blackwell_kernels.microbench.cases import SETS, Case, select
from blackwell_kernels.microbench.implementations import OURS, find
from blackwell_kernels.microbench.profiling import Facts, Profile
from blackwell_kernels.microbench.specs import OPS
from blackwell_kernels.microbench.worker import Job

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
    shares = {(row.definition, row.case): share for row in stored if (share := _share(row)) is not None}
    known = [case for case in found if (case.definition, case.name) in shares]
    if known:
        return min(known, key=lambda case: shares[case.definition, case.name])
    return max(found, key=lambda case: case.tokens)


def _share(row: results.Row) -> float | None:
    us = row.impls[OURS].us
    return None if us is None else row.floor_us / us


def compiled(case: Case, sm: int) -> tuple[list[Statistics], str]:
    """(what the call's kernels compile to, or why there is nothing to tell)."""
    if sm not in aot.ARCHS:
        return [], f"there is no ahead-of-time target for sm{sm}"
    inputs = precompile.meta_inputs(case)
    if case.spec.op == "gdn_core":
        # meta tensors share one address, which its checks against overlap do not allow; untouched zeros cost no memory
        inputs = {k: torch.zeros_like(x, device="cpu") if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    try:
        with aot.compile_only(sm) as launches, precompile._CallTriton(case.spec.op.split("_")[0]):
            find(case.spec.name, OURS).bind(inputs)()
    except Exception as error:
        return [], f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    distinct = {(one.kernel.hash, one.grid): one for one in launches}
    return [one.statistics() for one in distinct.values()], ""


def _allowed(family: str) -> dict[str, int]:
    """Kernel -> bytes of stack that its ahead-of-time cases record as allowed."""
    found: dict[str, int] = {}
    for case in importlib.import_module(f"blackwell_kernels.{family}.aot").CASES:
        for name, allowed in case.spill_allowance.items():
            name = name.partition("@")[0]
            found[name] = max(found.get(name, 0), allowed)
    return found


def _measured(case: Case, gpu: str) -> tuple[results.Row | None, results.Results | None, str]:
    """(row, its file, why there is none), measured now in a process of its own, ours alone."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(cases=[(case.definition, case.name)], only=("nobody",), root=Path(folder))
        why = ""
        for message in supervise.run(job):
            if "failed" in message:
                why = message["failed"][1]
        path = results.path_of(gpu, case.spec.op, Path(folder))
        if not path.exists():
            return None, None, why or "the measuring process gave no row"
        found = results.load(path)
        return found.rows[-1], found, ""


@app.command()
def profile(
    op: Annotated[str, typer.Argument(help=f"One of {', '.join(OPS)}.")],
    case: Annotated[str | None, typer.Option("--case", help="A part of a case's name, or a glob.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also the instruction mix: more passes of ncu.")] = False,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="An earlier profile's JSON: what changed; exit 1 if it fell by 5 %."),
    ] = None,
    chip: Annotated[str, typer.Option(help="The chip to compile for where there is no GPU: h200, b200.")] = "h200",
    output: Annotated[Path | None, typer.Option("--output", help="Write the profile's JSON.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write Markdown.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write HTML with the roofline point.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    root: Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")] = results.ROOT,
) -> None:
    """A checklist for one operator on one case; exit 1 on spills, a fall-back, or a share of the bound that fell."""
    if op not in OPS:
        raise _usage(f"no operator is named {op!r}{did_you_mean(op, OPS)}; there are {', '.join(OPS)}")
    if chip not in _SM:
        raise _usage(f"no chip is named {chip!r}; there are {', '.join(_SM)}")
    then = profiling.read(against) if against is not None else None
    here = torch.cuda.is_available()
    gpu = arch.gpu_slug(torch.cuda.get_device_name()) if here else chip
    path = results.path_of(gpu, op, root)
    stored = results.load(path) if path.exists() else None
    chosen = choose(op, case, stored.rows if stored else [])
    facts = _facts(chosen, gpu, stored, deep)
    found = _profile(chosen, gpu, facts)
    changes, lost = profiling.differences(found, then) if then is not None else ([], [])
    failed = [*found.failures, *lost]
    text = found.model_dump_json(indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if markdown is not None:
        markdown.write_text(profile_report.markdown(found, changes), encoding="utf-8")
    if page is not None:
        page.write_text(profile_report.page(found, facts.ceilings, changes), encoding="utf-8")
    if as_json:
        print(json.dumps({**json.loads(text), "changes": changes, "failures": failed}, indent=1))
    else:
        console.print(f"{found.definition} {found.case} on {gpu}", highlight=False, markup=False)
        console.print(profile_report.terminal(found))
        for i, line in enumerate(profile_report.finding_lines(found), 1):
            console.print(f"{i}. {line}", highlight=False, markup=False)
        for line in changes:
            console.print(f"changed: {line}", highlight=False, markup=False)
    for line in failed:
        errors.print(f"failed: {line}", highlight=False, markup=False)
    if not as_json:
        console.print(f"next: blackwell-kernels bench --op {op}", highlight=False)
    raise typer.Exit(1 if failed else 0)


def _facts(case: Case, gpu: str, stored: results.Results | None, deep: bool) -> Facts:
    here = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if here else divmod(_SM[gpu], 10)
    kernels, no_kernels = compiled(case, 10 * major + minor)
    rows = stored.rows if stored else []
    row = next((r for r in rows if (r.definition, r.case) == (case.spec.name, case.name)), None)
    source, why = stored, "no GPU is here, and no result of this case is stored"
    if here:
        row, source, why = _measured(case, gpu)
    launches, no_counters = [], "no GPU is here"
    if here:
        try:
            launches, no_counters = counters.collect(case.definition, case.name, deep=deep), ""
        except ValueError as error:
            no_counters = str(error)
    return Facts(
        kernels=kernels,
        no_kernels=no_kernels,
        row=row,
        no_row=why,
        launches=launches,
        no_counters=no_counters,
        ceilings=source.ceilings if source and row else None,
        shares={f"{r.definition} {r.case}": share for r in rows if (share := _share(r)) is not None},
        allowed=_allowed(case.spec.op.split("_")[0]),
        fresh=here,
    )


def _profile(case: Case, gpu: str, facts: Facts) -> Profile:
    checks = profiling.checklist(facts)
    row = facts.row
    us = row.impls[OURS].us if row else None
    has_flops = row is not None and row.flops and row.bytes
    return Profile(
        op=case.spec.op,
        definition=case.spec.name,
        case=case.name,
        gpu=gpu,
        bound=row.bound if row else None,
        share=row.floor_us / us if row and us else None,
        intensity=row.flops / row.bytes if row and has_flops and row.flops and row.bytes else None,
        tflops=row.flops / us / 1e6 if row and has_flops and row.flops and us else None,
        checks=checks,
        failures=profiling.failures(facts, checks),
        facts={
            "command": " ".join(["blackwell-kernels", *sys.argv[1:]]),
            **({"commit": row.commit, "source": row.source, "date": row.date} if row else {}),
        },
    )
