"""The command around `validate.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from blackwell_kernels.common import arch
from blackwell_kernels.errors import MissingRequirementError
from blackwell_kernels.microbench import device, results, validate
from blackwell_kernels.microbench.cases import SETS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def validate_command(
    folder: Annotated[Path, typer.Option(help="Logs, state and the report.")] = Path("out/validate"),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="tests, tune, bench, audit, profile, bounds, equality, pages.")
    ] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="Sets of cases to measure; repeatable.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record where there is no checkout.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Test, tune, measure, profile and compare on this GPU, then write the tables that switch the plugin on for it.

    After an interruption or a repair, give the same command: what passed with the same source is not run again.
    """
    unknown = [name for name in sets or () if name not in SETS]
    if unknown:
        print(f"error: no set is named {unknown[0]!r}; there are {', '.join(SETS)}", file=sys.stderr)
        raise typer.Exit(2)
    if not torch.cuda.is_available():
        raise MissingRequirementError("validate measures, and no CUDA device is here; `blackwell-kernels bench` checks")
    gpu = arch.gpu_slug(torch.cuda.get_device_name())
    steps = validate.plan(folder, gpu, sets=sets or ("model", "agent", "contest"), commit=commit)
    if only and not any(step.name.startswith(name) for step in steps for name in only):
        print(f"error: no step begins with {', '.join(only)}", file=sys.stderr)
        raise typer.Exit(2)
    facts = validate.machine()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    state = validate.run(
        steps, validate.tables_step(gpu), folder, source=device.source_hash(), only=only or (), say=say
    )
    validate.write_report(state, facts, gpu, results.ROOT, folder)
    if as_json:
        print(json.dumps(validate.summary(state, facts, gpu, results.ROOT), indent=1))
    else:
        print(f"report: {folder / 'report.md'}\nnext: blackwell-kernels info")
    raise typer.Exit(1 if validate.failed(state) else 0)
