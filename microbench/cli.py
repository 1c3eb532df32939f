"""`blackwell-kernels bench`: correctness anywhere, timing where there is a GPU, audits of what is stored."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import BlackwellKernelsError, did_you_mean
from blackwell_kernels.microbench import cases as case_index
from blackwell_kernels.microbench import device, dispatch, report, results
from blackwell_kernels.microbench.specs import OPS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, invoke_without_command=True)
console = Console(soft_wrap=True)
errors = Console(stderr=True, soft_wrap=True)

Op = Annotated[str | None, typer.Option("--op", help=f"One of {', '.join(OPS)}.")]
CaseName = Annotated[str | None, typer.Option("--case", help="A part of case names, or a glob.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="contest, model, agent, cpu; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Root = Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")]

Tables = Annotated[Path, typer.Option("--tables", show_default=False, help="Where the plugin's tables are kept.")]


def _usage(message: str) -> typer.Exit:
    errors.print(f"error: {message}", highlight=False)
    return typer.Exit(2)


def _chosen(
    op: str | None, case: str | None, sets: list[str] | None, default: tuple[str, ...]
) -> list[case_index.Case]:
    if op is not None and op not in OPS:
        raise _usage(f"no operator is named {op!r}{did_you_mean(op, OPS)}; there are {', '.join(OPS)}")
    for name in sets or ():
        if name not in case_index.SETS:
            raise _usage(f"no set is named {name!r}{did_you_mean(name, case_index.SETS)}")
    found = case_index.select(sets=tuple(sets) if sets else default, op=op, case=case)
    if not found:
        raise _usage(f"no case matches --op {op} --case {case}; `blackwell-kernels bench cases` lists all")
    return found


@app.callback()
def bench(
    context: typer.Context,
    op: Op = None,
    case: CaseName = None,
    sets: Sets = None,
    as_json: AsJson = False,
    audit: Annotated[bool, typer.Option("--audit", help="Recompute stored medians and ratios from samples.")] = False,
    write_dispatch: Annotated[
        bool, typer.Option("--write-dispatch", help="Write the plugin's tables from what was measured.")
    ] = False,
    impl: Annotated[list[str] | None, typer.Option("--impl", help="Peers to run, ours always; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Samples an implementation.")] = 15,
    seed: Annotated[int, typer.Option(help="Seed of all inputs.")] = 0,
    fib: Annotated[bool, typer.Option(help="Also time FlashInfer-Bench's way.")] = True,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown report.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write an HTML report.")] = None,
    root: Root = results.ROOT,
    table_root: Tables = tables.ROOT,
) -> None:
    """Measure our operators against stock vLLM's and other kernels; without a GPU, check that they are right."""
    if context.invoked_subcommand is not None:
        return
    if audit:
        raise typer.Exit(_audit(root, table_root, as_json))
    if not as_json:
        console.print(f"source {device.source_hash()}, commit {commit or device.commit()}", highlight=False)
    if not torch.cuda.is_available():
        raise typer.Exit(_correctness(_chosen(op, case, sets, ("cpu",)), as_json, seed))
    wanted = _chosen(op, case, sets, ("model", "agent", "contest"))
    settings = {"rounds": rounds, "seed": seed, "only": tuple(impl or ()), "root": root}
    measured, failure = _measure(wanted, settings, as_json, fib, commit)
    if write_dispatch and measured:
        _apply(arch.gpu_slug(measured[0].gpu), root, table_root)
    if markdown is not None:
        markdown.write_text(report.markdown(measured), encoding="utf-8")
    if page is not None:
        page.write_text(report.page(measured), encoding="utf-8")
    if as_json:
        print(json.dumps([json.loads(found.model_dump_json(by_alias=True)) for found in measured], indent=1))
    if failure is not None:
        errors.print(f"error: {failure}\nnext: run the remaining cases without it: --impl NAME", highlight=False)
        raise typer.Exit(1)
    if not as_json:
        console.print("next: blackwell-kernels bench --audit")


def _measure(
    wanted: list[case_index.Case], settings: dict[str, Any], as_json: bool, fib: bool, commit: str | None
) -> tuple[list[results.Results], BlackwellKernelsError | None]:
    """Results files written, and what ended the run early."""
    from blackwell_kernels.microbench.runner import Bench
    from blackwell_kernels.microbench.timing import EagerEngine, GraphEngine

    here = torch.device("cuda", torch.cuda.current_device())
    ceilings = device.measure_ceilings()
    command = "blackwell-kernels bench " + " ".join(sys.argv[2:])
    run = Bench(
        device=here,
        engines=(GraphEngine(here), EagerEngine(here)),
        head={**device.facts(command.strip(), commit), "ceilings": ceilings.model_dump()},
        rates=device.best_known(ceilings),
        l2_bytes=torch.cuda.get_device_properties(here).L2_cache_size,
        fib_timer=device.fib_timer(here) if fib else None,
        **settings,
    )
    rows, failure = [], None
    try:
        for number, row in enumerate(run.run(wanted), 1):
            rows.append(row)
            # to stderr, so that --json stays alone on stdout; a line each, so that logs stay readable
            errors.print(f"[{number}/{len(wanted)}] " + " | ".join(report.cells(row)), markup=False, highlight=False)
    except BlackwellKernelsError as error:
        failure = error
    if not as_json:
        console.print(report.terminal(rows))
        for line in [report.summary(rows), *report.notes(rows)]:
            console.print(line, highlight=False, markup=False)
    return run.files(), failure


def _correctness(wanted: list[case_index.Case], as_json: bool, seed: int) -> int:
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


def _apply(gpu: str, root: Path, table_root: Path) -> None:
    for path in dispatch.apply(gpu, results_root=root, root=table_root):
        errors.print(f"wrote {path}", highlight=False)


def _audit(root: Path, table_root: Path, as_json: bool) -> int:
    found = {}
    for path in sorted(root.glob("*/*.json")):
        stored = results.load(path)
        found[path] = results.audit(stored) + dispatch.audit(stored, table_root)
    if as_json:
        print(json.dumps({str(path.relative_to(root)): problems for path, problems in found.items()}, indent=1))
    else:
        for path, problems in found.items():
            console.print(f"{path.relative_to(root)}: {'; '.join(problems) or 'every number follows from its samples'}")
        if not found:
            console.print(f"no results are stored under {root.name}")
        console.print("next: blackwell-kernels bench")
    return 1 if any(found.values()) else 0


@app.command()
def cases(op: Op = None, case: CaseName = None, sets: Sets = None, as_json: AsJson = False) -> None:
    """List the cases."""
    chosen = _chosen(op, case, sets, case_index.SETS)
    if as_json:
        print(
            json.dumps([{"definition": c.spec.name, "case": c.name, "axes": c.full_axes()} for c in chosen], indent=1)
        )
        return
    for item in chosen:
        console.print(f"{item.spec.op:<15} {item.spec.name} {item.name}", highlight=False, markup=False)
    console.print(f"{len(chosen)} cases\nnext: blackwell-kernels bench --op {chosen[0].spec.op}", highlight=False)


@app.command("dispatch")
def dispatch_command(
    gpu: Annotated[str, typer.Argument(help="A folder of results: h200, b200, ...")],
    root: Root = results.ROOT,
    table_root: Tables = tables.ROOT,
) -> None:
    """Write the plugin's tables from stored results; needs no GPU."""
    if not list((root / gpu).glob("*.json")):
        raise _usage(f"no results are stored under {root / gpu}")
    _apply(gpu, root, table_root)
    console.print("next: blackwell-kernels info")


@app.command()
def definitions(write: Annotated[bool, typer.Option("--write", help="Renew the files.")] = False) -> None:
    """Compare the checked-in FlashInfer-Bench definitions and solutions with what the sources give."""
    from blackwell_kernels.microbench import generate

    stale = generate.write() if write else generate.stale()
    for name in stale:
        console.print(f"{'wrote' if write else 'stale'} {name}", highlight=False)
    if stale and not write:
        console.print("next: blackwell-kernels bench definitions --write")
        raise typer.Exit(1)
    console.print("definitions and solutions match their sources")


@app.command()
def dataset(
    out: Annotated[Path, typer.Argument(help="Directory for definitions, solutions, workloads and blobs.")],
    op: Op = None,
    case: CaseName = None,
    sets: Sets = None,
    seed: Annotated[int, typer.Option(help="Seed of all inputs.")] = 0,
) -> None:
    """Write a FlashInfer-Bench data set with seeded safetensors."""
    from blackwell_kernels.microbench.dataset import materialize

    chosen = _chosen(op, case, sets, ("cpu",))
    materialize(out, chosen, seed=seed)
    console.print(f"{len(chosen)} workloads in {out}\nnext: flashinfer-bench run --local {out}", highlight=False)
