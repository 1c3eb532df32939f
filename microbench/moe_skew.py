"""`python -m blackwell_kernels.microbench.moe_skew`: what uneven routing costs the experts, beside an even one.

Every case of the benchmark is routed in four ways (`workloads.KINDS`). They take turns in one run, each over rotated
inputs of its own, and each result is checked first. How much an uneven one costs is its time over its own floor (the
bytes of active experts, or the products: `bounds.py`), over the same of the even one. Times and ratios go to
`results/<gpu>/limits/moe_skew.json`. Beside peers, and for the tables, Zipf's law is in cases of the benchmark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import bounds, device, results
from blackwell_kernels.microbench.cases import Case, select
from blackwell_kernels.microbench.implementations import OURS, find
from blackwell_kernels.microbench.runner import Bench, reference_outputs
from blackwell_kernels.microbench.timing import GraphEngine, measure
from blackwell_kernels.microbench.workloads import KINDS, routed

DEFINITIONS = ("moe_fp8_block", "moe_fp8_block_ep")
CASES = ("model/qwen3-next/num_tokens=*", "model/deepseek-v3.2/ep8/*")
ALLOWED = 1.3  # times the even routing's, per active byte or product


def measured(bench: Bench, case: Case) -> list[dict[str, Any]]:
    """A row for each kind.

    Raises: RuntimeError where a result is wrong or cannot be timed.
    """
    ours, first = find(case.spec.name, OURS), bench._first(case)
    calls, floors = {}, {}
    for kind in KINDS:
        x = routed(first, kind, bench.seed)
        problem = bench._check(ours, case, x, reference_outputs(case.spec, x, bench.seed)).problem
        if problem:
            raise RuntimeError(f"{case.name}, {kind}: {problem}")
        more = bench._more_sets(case, first, bounds.cost(case, x).bytes)
        sets = [x, *(routed(one, kind, bench.seed + i) for i, one in enumerate(more, 1))]
        floors[kind] = bounds.floor(bounds.mean([bounds.cost(case, one) for one in sets]), **bench.rates)
        calls[kind] = [ours.bind(one) for one in sets]
        for call in calls[kind]:  # everything compiles before the first capture
            call()
    rows: list[dict[str, Any]] = []
    for kind, one in measure(bench.engines, calls, bench.rounds).items():
        if isinstance(one, str):
            raise RuntimeError(f"{case.name}, {kind}: {one}")
        floor_us, bound = floors[kind]
        row: dict[str, Any] = {"definition": case.definition, "case": case.name, "kind": kind, "us": one.us}
        row |= {"p10": one.p10, "p90": one.p90, "floor_us": floor_us, "bound": bound, "samples_us": one.samples_us}
        even = rows[0] if rows else row
        row |= {"time": one.us / even["us"], "per_floor": one.us / floor_us / (even["us"] / even["floor_us"])}
        rows.append(row)
    return rows


def run(
    cases: Annotated[list[str], typer.Option("--case", help="A part of case names, or a glob; repeatable.")] = [*CASES],  # noqa: B006  typer's way
    tokens: Annotated[list[int], typer.Option(help="Sizes; repeatable.")] = [16, 64, 256, 1024, 8192],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=3, help="Samples of each.")] = 15,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    root: Annotated[Path, typer.Option("--results", show_default=False, help="Where results are kept.")] = results.ROOT,
) -> None:
    """Time uneven routing beside even routing of the same experts."""
    chosen = [case for name in cases for case in select(sets=("model",), case=name)]
    chosen = [case for case in chosen if case.definition in DEFINITIONS and case.tokens in tokens]
    if not chosen:
        raise typer.BadParameter(
            f"no case of moe matches {', '.join(cases)}; `blackwell-kernels bench cases` lists all"
        )
    if not torch.cuda.is_available():
        raise MissingRequirementError("routing is timed on a GPU, and there is none here")
    here = torch.device("cuda", torch.cuda.current_device())
    head = device.facts(device.command("python -m blackwell_kernels.microbench.moe_skew"), commit)
    bench = Bench(
        device=here,
        engines=(GraphEngine(here),),
        head=head,
        rates=device.best_known(device.measure_ceilings()),
        rounds=rounds,
        l2_bytes=torch.cuda.get_device_properties(here).L2_cache_size,
    )
    path = root / arch.gpu_slug(head["gpu"]) / "limits" / "moe_skew.json"
    rows: list[dict[str, Any]] = []
    shown = Table("case", "routing", "µs", "p10–p90", "of floor", "time / even", "per floor / even")
    for case in chosen:
        rows += measured(bench, case)
        tables.replace_text(path, json.dumps({**head, "allowed": ALLOWED, "rows": rows}, indent=1) + "\n")
    for row in rows:
        share = f"{row['floor_us'] / row['us']:.0%} ({row['bound']})"
        verdict = f"{row['per_floor']:.2f}x" + (f", above {ALLOWED}" if row["per_floor"] > ALLOWED else "")
        spread = f"{row['p10']:.2f}–{row['p90']:.2f}"
        shown.add_row(row["case"], row["kind"], f"{row['us']:.2f}", spread, share, f"{row['time']:.2f}x", verdict)
    Console(soft_wrap=True).print(shown)


if __name__ == "__main__":
    try:
        typer.run(run)
    except MissingRequirementError as error:
        raise SystemExit(f"error: {error}") from None
