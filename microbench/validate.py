"""`blackwell-kernels validate`: from a new chip to measured tables in one command that may be interrupted.

Steps run in order, each a command of its own with a log; what passed with this source is not run again. The tables that
switch the plugin on for the chip are written last, and only where tests, benchmark and equality passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from blackwell_kernels.common.tables import replace_text
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import device, report, results, scores
from blackwell_kernels.microbench.tuning import SPACES

Status = Literal["passed", "failed", "skipped"]
CHECKOUT = Path(__file__).resolve().parent.parent
MODELS = ("qwen3-next", "deepseek-v3.2")
_SMI = (
    "name",
    "driver_version",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.applications.graphics",
    "memory.total",
    "ecc.mode.current",
    "mig.mode.current",
)


@dataclass(frozen=True)
class Step:
    """command: what runs. gates: the tables are written only where it passed. skipped: why it cannot run here.

    always: it is cheap and follows from what other steps stored, so that having passed before says nothing.
    """

    name: str
    command: tuple[str, ...]
    gates: bool = False
    skipped: str = ""
    always: bool = False


class Outcome(BaseModel):
    """How a step ended, for which source."""

    model_config = ConfigDict(extra="forbid")

    status: Status
    source: str
    why: str = ""
    command: str = ""
    seconds: float = 0.0
    log: str = ""


class State(BaseModel):
    """What is kept between runs: step -> outcome."""

    model_config = ConfigDict(extra="forbid")

    steps: dict[str, Outcome] = {}


def plan(
    folder: Path, gpu: str, *, sets: Sequence[str], commit: str | None = None, checkout: Path = CHECKOUT
) -> list[Step]:
    """The steps in order, the tables apart. commit: to record where there is no checkout."""
    us = (sys.executable, "-m", "blackwell_kernels")
    of = ("--commit", commit) if commit else ()
    tests = checkout / "kernels" / "gdn" / "tests"
    chosen = [option for name in sets for option in ("--set", name)]
    pytest = (sys.executable, "-m", "pytest", "-q")
    absent = "" if tests.is_dir() else "an installation has no tests: run this in a clone"
    steps = [
        Step("tests", (*pytest, str(checkout / "kernels")), gates=True, skipped=absent),
        # the benchmark's own that need a GPU: cheats, honest solutions, traces
        Step("guards", (*pytest, str(checkout / "microbench" / "tests"), "-m", "gpu"), gates=True, skipped=absent),
        Step("tune", (*us, "tune", *SPACES, *of)),
        Step("bench", (*us, "bench", "--resume", *chosen, *of), gates=True),
    ]
    steps += [
        Step("audit", (*us, "bench", "--audit"), gates=True, always=True),
        Step("profile", (*us, "profile", "--all", *of)),
        Step("bounds", (*us, "bench", "bounds", gpu), always=True),
    ]
    for model in MODELS:
        out = str(folder / f"equal-{model}")
        steps.append(Step(f"equality {model}", (*us, "e2e", "equal", model, "--out", out, *of), gates=True))
    return [*steps, Step("pages", (*us, "bench", "report", gpu, "--write"), always=True)]


def tables_step(gpu: str) -> Step:
    """Stored results become the tables by which the plugin decides."""
    return Step("tables", (sys.executable, "-m", "blackwell_kernels", "bench", "dispatch", gpu))


def read_state(folder: Path) -> State:
    """Raises: TableError when the file is there and is none of ours."""
    path = folder / "state.json"
    if not path.exists():
        return State()
    try:
        return State.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise TableError(f"{path}: {str(error).splitlines()[0]}; remove it to start anew") from None


def write_state(folder: Path, state: State) -> None:
    """At once or not at all."""
    replace_text(folder / "state.json", state.model_dump_json(indent=1) + "\n")


def execute(command: Sequence[str], log: Path) -> int:
    """Run a command into its log; its exit status."""
    with log.open("wb") as out:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT).returncode


def run(
    steps: Sequence[Step],
    tables: Step,
    folder: Path,
    *,
    source: str,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
    execute: Callable[[Sequence[str], Path], int] = execute,
) -> State:
    """Run what has not passed with this source; a failure does not keep the later steps from running.

    only: names or beginnings of names of the steps to run; the tables are written all the same where their gates hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = read_state(folder)
    chosen = [step for step in steps if not only or any(step.name.startswith(name) for name in only)]
    for number, step in enumerate(chosen, 1):
        before = state.steps.get(step.name)
        if _holds(before, source) and not step.always:
            say(f"[{number}/{len(chosen)}] {step.name}: passed before with this source")
            continue
        say(f"[{number}/{len(chosen)}] {step.name}: {step.skipped or ' '.join(step.command)}")
        state.steps[step.name] = _outcome(step, folder, source, execute)
        write_state(folder, state)
        say(f"[{number}/{len(chosen)}] {step.name}: {_told(state.steps[step.name])}")
    owed = [step.name for step in steps if step.gates and not _holds(state.steps.get(step.name), source)]
    if owed:
        why = f"not written: {', '.join(owed)} did not pass with this source"
        state.steps[tables.name] = Outcome(status="skipped", source=source, why=why)
    else:
        state.steps[tables.name] = _outcome(tables, folder, source, execute)
    write_state(folder, state)
    say(f"{tables.name}: {_told(state.steps[tables.name])}")
    return state


def _holds(outcome: Outcome | None, source: str) -> bool:
    return outcome is not None and outcome.status == "passed" and outcome.source == source


def _outcome(step: Step, folder: Path, source: str, execute: Callable[[Sequence[str], Path], int]) -> Outcome:
    if step.skipped:
        return Outcome(status="skipped", source=source, why=step.skipped)
    log, started = folder / f"{step.name.replace(' ', '-')}.log", time.monotonic()
    status = execute(step.command, log)
    return Outcome(
        status="passed" if status == 0 else "failed",
        source=source,
        why="" if status == 0 else f"exit status {status}: {_last_line(log)}",
        command=" ".join(step.command),
        seconds=round(time.monotonic() - started, 1),
        log=log.name,
    )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def _told(outcome: Outcome) -> str:
    return f"{outcome.status}{f': {outcome.why}' if outcome.why else ''}"


def machine() -> dict[str, str]:
    """Facts of the machine that results depend on; what cannot be read says so."""
    found = {"python": sys.version.split()[0], "CPUs": str(os.cpu_count())}
    found |= {package: device.version(package) for package in ("torch", "triton", "vllm", "flashinfer-python")}
    query = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return found | {"nvidia-smi": f"not read: {type(error).__name__}"}
    return found | dict(zip(_SMI, (part.strip() for part in line.split(",")), strict=True))


def summary(state: State, facts: dict[str, str], gpu: str, root: Path) -> dict[str, Any]:
    """Everything in one piece: what the report and --json show."""
    rows = [row for path in sorted((root / gpu).glob("*.json")) for row in results.load(path).rows]
    return {
        "schema": 1,
        "gpu": gpu,
        "machine": facts,
        "steps": {name: outcome.model_dump() for name, outcome in state.steps.items()},
        "scores": [score.told() for score in scores.by_op(rows)],
        "contest": scores.contests(rows),
    }


def markdown(state: State, facts: dict[str, str], gpu: str, root: Path) -> str:
    """One report: the machine, the steps, the operators."""
    rows = [row for path in sorted((root / gpu).glob("*.json")) for row in results.load(path).rows]
    steps = "".join(
        f"| {name} | {o.status} | {o.seconds:.0f} | {o.log or '–'} | {o.why or o.command} |\n"
        for name, o in state.steps.items()
    )
    machine_rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    table = report.markdown_table(
        report.SCORE_HEAD, (line for score in scores.by_op(rows) for line in report.score_cells(score))
    )
    return (
        f"# Validation on {gpu}\n\n| machine | |\n|---|---|\n{machine_rows}\n"
        f"| step | status | s | log | |\n|---|---|---|---|---|\n{steps}\n{table}"
        + "".join(f"\n- {line}" for line in report.contest_lines(rows))
        + "\n"
    )


def failed(state: State) -> bool:
    """Whether anything failed, or the tables were not written."""
    return any(o.status == "failed" for o in state.steps.values()) or state.steps["tables"].status != "passed"


def write_report(state: State, facts: dict[str, str], gpu: str, root: Path, folder: Path) -> None:
    """report.md and report.json in the folder."""
    (folder / "report.md").write_text(markdown(state, facts, gpu, root), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(summary(state, facts, gpu, root), indent=1) + "\n", encoding="utf-8")
