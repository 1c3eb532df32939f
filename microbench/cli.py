"""`blackwell-kernels bench`: correctness anywhere, timing where there is a GPU, audits of what is stored."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import did_you_mean
from blackwell_kernels.microbench import cases as case_index
from blackwell_kernels.microbench import (
    device,
    dispatch,
    regressions,
    report,
    results,
    running,
    scores,
    supervise,
    tuned,
    tuning,
    worker,
)
from blackwell_kernels.microbench.implementations import SPECS_BY_ANY_NAME, implementations
from blackwell_kernels.microbench.running import console, errors, usage
from blackwell_kernels.microbench.specs import OPS
from blackwell_kernels.microbench.worker import Job

MEASURED = ("model", "agent", "contest")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, invoke_without_command=True)

Op = Annotated[list[str] | None, typer.Option("--op", help=f"One of {', '.join(OPS)}; repeatable.")]
CaseName = Annotated[str | None, typer.Option("--case", help="A part of case names, or a glob.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="contest, model, agent, cpu; repeatable.")]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", help="With --owed: also cases in whose row this peer was not set up; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Root = Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")]

Tables = Annotated[Path, typer.Option("--tables", show_default=False, help="Where the plugin's tables are kept.")]


def _chosen(
    ops: list[str] | None, case: str | None, sets: list[str] | None, default: tuple[str, ...]
) -> list[case_index.Case]:
    for op in ops or ():
        if op not in OPS:
            raise usage(f"no operator is named {op!r}{did_you_mean(op, OPS)}; there are {', '.join(OPS)}")
    for name in sets or ():
        if name not in case_index.SETS:
            raise usage(f"no set is named {name!r}{did_you_mean(name, case_index.SETS)}")
    found = case_index.select(sets=tuple(sets) if sets else default, case=case)
    found = [one for one in found if not ops or one.spec.op in ops]
    if not found:
        asked = f"--op {' '.join(ops or ['any'])} --case {case or 'any'}"
        raise usage(f"no case matches {asked}; `blackwell-kernels bench cases` lists all")
    return found


def _check_peers(names: list[str]) -> None:
    known = {item.name for name in SPECS_BY_ANY_NAME for item in implementations(name)}
    for name in set(names) - known:
        raise usage(f"no peer is named {name!r}{did_you_mean(name, known)}; there are {', '.join(sorted(known))}")


def _with_owed(peers: list[str] | None, owed: bool | str | None) -> list[str]:
    if peers and not owed:
        raise usage("--peer says what else is owed: give --owed too (--impl chooses the peers that run)")
    return peers or []


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
    seed: Annotated[
        int | None, typer.Option(show_default="0; with --solution a secret one", help="Seed of all inputs.")
    ] = None,
    fib: Annotated[bool, typer.Option(help="Also time FlashInfer-Bench's way.")] = True,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out cases that this source has already stored a row for.")
    ] = False,
    owed: Annotated[
        bool,
        typer.Option("--owed", help="Leave out cases that have a row of these kernels, with what else is asked for."),
    ] = False,
    peer: Peers = None,
    against: Annotated[
        Path | None,
        typer.Option("--compare", help="An earlier results file or folder; exit code 1 on a regression beyond noise."),
    ] = None,
    solution: Annotated[
        list[Path] | None,
        typer.Option("--solution", help="A FlashInfer-Bench solution to examine and time beside ours; repeatable."),
    ] = None,
    isolate: Annotated[
        bool, typer.Option(help="Measure in a process of its own, which may hang or crash without ending the run.")
    ] = True,
    limit: Annotated[float, typer.Option(min=1, help="Seconds without a sign of life that count as a hang.")] = 600.0,
    time_limit: Annotated[
        float | None,
        typer.Option("--time-limit", min=1, help="Seconds after which no case is begun; nor one that would last over."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown report.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write an HTML report.")] = None,
    root: Root = results.ROOT,
    table_root: Tables = tables.ROOT,
) -> None:
    """Measure our operators against stock vLLM's and other kernels; without a GPU, check that they are right."""
    if context.invoked_subcommand is not None:
        return
    if seed is None:  # known inputs have known outputs, which a solution could bring along
        seed = secrets.randbelow(1 << 30) if solution else 0
    until = None if time_limit is None else time.time() + time_limit
    if audit:
        raise typer.Exit(_audit(root, table_root, as_json))
    if not as_json:
        console.print(f"source {device.source_hash()}, commit {commit or device.commit()}", highlight=False)
    _check_peers([*(impl or ()), *_with_owed(peer, owed)])
    theirs = tuple(path.resolve() for path in solution or ())
    if theirs:
        running.check_files(theirs)
    then = regressions.read(against) if against is not None else None  # before this run may overwrite it
    if not torch.cuda.is_available():
        if then is not None:
            raise typer.Exit(running.compare(regressions.read(root), then, as_json))
        chosen = _chosen(op, case, sets, ("cpu",))
        if theirs:
            raise typer.Exit(1 if running.examine(Job(cases=_keys(chosen), solutions=theirs), limit, as_json) else 0)
        raise typer.Exit(running.check_correctness(chosen, as_json, seed))
    job = Job(
        cases=_keys(_chosen(op, case, sets, MEASURED)),
        rounds=rounds,
        seed=seed,
        only=tuple(impl or ()),
        peers=tuple(peer or ()),
        fib=fib,
        commit=commit,
        command=device.command(),
        root=root,
        tables_root=table_root,
        solutions=theirs,
        until=until,
    )
    if resume or owed:
        job = running.without_stored(job, same_kernels=owed)
    caught = running.examine(job, limit, as_json) if theirs else []
    job = job.model_copy(update={"skip": caught})
    if isolate:
        rows, measured, failed = running.measure(supervise.run(job, quiet_s=limit), job, as_json)
    else:
        rows, measured, failed = running.measure(worker.messages(job), job, as_json)
    gpu = arch.gpu_slug(torch.cuda.get_device_name())
    if write_dispatch:  # from all that is stored: with --resume there may have been nothing to measure
        _apply(gpu, root, table_root)
    _write_reports(measured, markdown, page)
    if as_json:
        print(json.dumps([json.loads(found.model_dump_json(by_alias=True)) for found in measured], indent=1))
    slower = running.compare({gpu: rows}, then, as_json) if then is not None else 0
    if failed:
        errors.print("next: run these cases again: --resume, or without a peer: --impl NAME", highlight=False)
    elif not as_json:
        console.print("next: blackwell-kernels bench --audit")
    raise typer.Exit(1 if failed or slower or caught else 0)


def _keys(chosen: list[case_index.Case]) -> list[tuple[str, str]]:
    return [(c.definition, c.name) for c in chosen]


def _apply(gpu: str, root: Path, table_root: Path) -> None:
    for path in dispatch.apply(gpu, results_root=root, root=table_root):
        errors.print(f"wrote {path}", highlight=False)


def _audit(root: Path, table_root: Path, as_json: bool) -> int:
    found = {}
    for path in sorted(root.glob("*/*.json")):
        stored = results.load(path)
        found[path] = results.audit(stored) + dispatch.audit(stored, table_root)
    if not found:  # nothing that was looked at is no pass
        raise usage(f"no results are stored under {root}")
    if as_json:
        print(json.dumps({str(path.relative_to(root)): problems for path, problems in found.items()}, indent=1))
    else:
        for path, problems in found.items():
            console.print(f"{path.relative_to(root)}: {'; '.join(problems) or 'every number follows from its samples'}")
        console.print("next: blackwell-kernels bench")
    return 1 if any(found.values()) else 0


@app.command()
def cases(
    op: Op = None,
    case: CaseName = None,
    sets: Sets = None,
    owed: Annotated[
        str | None, typer.Option(help="A folder of results (h200, ...): only what `bench --owed` would measure there.")
    ] = None,
    peer: Peers = None,
    as_json: AsJson = False,
    root: Root = results.ROOT,
) -> None:
    """List the cases."""
    _check_peers(_with_owed(peer, owed))
    chosen = _chosen(op, case, sets, MEASURED if owed else case_index.SETS)
    if owed:
        job = Job(cases=_keys(chosen), peers=tuple(peer or ()), root=root)
        left = set(running.without_stored(job, same_kernels=True, gpu=owed).cases)
        stored = [results.load(path) for path in sorted((root / owed).glob("*.json"))]
        for name, count in results.not_set_up(row for one in stored for row in one.rows).items():
            errors.print(f"{name} was not set up for {count} rows: --peer '{name}'", highlight=False, markup=False)
        chosen = [one for one in chosen if (one.definition, one.name) in left]
    if as_json:
        print(
            json.dumps([{"definition": c.spec.name, "case": c.name, "axes": c.full_axes()} for c in chosen], indent=1)
        )
        return
    for item in chosen:
        console.print(f"{item.spec.op:<15} {item.spec.name} {item.name}", highlight=False, markup=False)
    console.print(f"{len(chosen)} cases", highlight=False)
    if chosen:
        more = " --owed" + "".join(f" --peer '{name}'" for name in peer or ()) if owed else ""
        console.print(f"next: blackwell-kernels bench --op {chosen[0].spec.op}{more}", highlight=False)


def _write_reports(found: list[results.Results], markdown: Path | None, page: Path | None) -> None:
    for path, made in ((markdown, report.markdown), (page, report.page)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(made(found), encoding="utf-8")


@app.command("report")
def report_command(
    gpu: Annotated[str, typer.Argument(help="A folder of results: h200, b200, ...")],
    write: Annotated[
        bool, typer.Option("--write", help="Renew the summary and the technical report beside the results.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 where those pages are not up to date.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Write a Markdown report.")] = None,
    page: Annotated[Path | None, typer.Option("--html", help="Write an HTML report.")] = None,
    as_json: AsJson = False,
    root: Root = results.ROOT,
) -> None:
    """Report stored results: scores of every operator, the contest's score, pages with plots; needs no GPU."""
    found = _stored(gpu, root)
    _write_reports(found, markdown, page)
    rows = [row for one in found for row in one.rows]
    if as_json:
        told = {"scores": [score.told() for score in scores.by_op(rows)], "contest": scores.contests(rows)}
        print(json.dumps(told | {"peers": [peer.told() for peer in scores.peers(rows)]}, indent=1))
    else:
        console.print(report.terminal_scores(rows))
        console.print(report.terminal_peers(rows))
        for line in [*report.contest_lines(rows), report.timings(rows)]:
            console.print(line, highlight=False)
    if write or check:
        from blackwell_kernels.microbench import overview, pages

        made = pages.write(root / gpu) if write else pages.stale(root / gpu)
        changed = [f"{root.name}/{gpu}/{name}" for name in made]
        if root == results.ROOT:
            changed += overview.stale(found, write=write)
        for name in changed:
            errors.print(f"{'wrote' if write else 'stale'} {name}", highlight=False)
        if changed and not write:
            errors.print(f"next: blackwell-kernels bench report {gpu} --write", highlight=False)
            raise typer.Exit(1)
    if not as_json:
        console.print(f"next: blackwell-kernels bench dispatch {gpu}")


def _stored(gpu: str, root: Path) -> list[results.Results]:
    found = [results.load(path) for path in sorted((root / gpu).glob("*.json"))]
    if not found:
        raise usage(f"no results are stored under {root / gpu}")
    return found


@app.command("bounds")
def bounds_command(
    gpu: Annotated[str, typer.Argument(help="A folder of results: h200, b200, ...")],
    as_json: AsJson = False,
    root: Root = results.ROOT,
) -> None:
    """Hold stored times against the bounds model: shares of the floor, exit code 1 where a time lies below it."""
    from rich.table import Table

    from blackwell_kernels.microbench import floors, profiling

    rows = [row for one in _stored(gpu, root) for row in one.rows]
    profiles = [profiling.read(path) for path in sorted((root / gpu).glob("profile/*.json"))]
    shares, below = floors.shares(rows), [*floors.below(rows), *floors.below_their_launches(profiles)]
    if as_json:
        print(json.dumps({"shares": [one.told() for one in shares], "below": below}, indent=1))
    else:
        table = Table(*floors.HEAD, box=None, pad_edge=False)
        for one in shares:
            table.add_row(*one.cells())
        console.print(table)
        timed = sum(impl.us is not None for row in rows for impl in row.impls.values())
        console.print(
            f"{timed} times of {len(rows)} cases and {len(profiles)} profiles, {len(below)} below their bound",
            highlight=False,
        )
        console.print(f"next: blackwell-kernels bench report {gpu}")
    for line in below:
        errors.print(f"error: {line}", highlight=False, markup=False)
    raise typer.Exit(1 if below else 0)


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(help="A folder as --results had it on another machine.")],
    root: Root = results.ROOT,
    table_root: Tables = tables.ROOT,
) -> None:
    """Take in what another machine stored: rows replace those of the same case, other files those of the same name.

    What a search there found goes into the plugin's tables, as it did there.
    """
    taken = []
    for path in sorted(source.glob("*/*.json")):
        found = results.load(path)
        head = found.model_dump(by_alias=True, exclude={"rows"})
        taken.append(
            f"{len(results.merge(root / path.relative_to(source), head, found.rows).rows)} rows in {path.stem}"
        )
    for path in sorted(source.glob("*/tune/*.json")):
        rows = tuning.merge(path, root / path.relative_to(source), table_root)
        where = ", and in the plugin's table" if path.stem in tuning.SPACES else ""
        taken.append(f"tuning of {path.stem}: {len(rows)} cases are new{where}")
    for path in sorted(source.glob("*/tune/vllm/*.json")):
        tuned.into_vllm_table(root / path.relative_to(source), json.loads(path.read_text(encoding="utf-8")))
        taken.append(f"vLLM's table {path.name}")
    for path in sorted(one for part in ("profile", "limits") for one in source.glob(f"*/{part}/*")):
        (root / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(source)).write_bytes(path.read_bytes())
        taken.append(f"{path.parent.name} {path.name}")
    if not taken:
        raise usage(f"no results are stored under {source}")
    for line in taken:
        console.print(line, highlight=False)
    console.print(f"next: blackwell-kernels bench report {next(source.glob('*/')).name} --write", highlight=False)


@app.command("dispatch")
def dispatch_command(
    gpu: Annotated[str, typer.Argument(help="A folder of results: h200, b200, ...")],
    root: Root = results.ROOT,
    table_root: Tables = tables.ROOT,
) -> None:
    """Write the plugin's tables from stored results; needs no GPU."""
    if not list((root / gpu).glob("*.json")):
        raise usage(f"no results are stored under {root / gpu}")
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
