"""Compile kernels for chips that are not here, as a real launch would, and hold them to the gates.

    python -m blackwell_kernels.common.testing.compile --family gdn [--case NAME] [--arch 90] [--json]

Cases are `CASES` of `blackwell_kernels.<family>.aot`. Each arch runs in its own process: a compiler that aborts costs
its case, not the run. Compiled kernels are kept in Triton's cache, whose key covers source, options and compiler.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blackwell_kernels.common import ahead
from blackwell_kernels.common import arch as archs
from blackwell_kernels.common.testing import statistics
from blackwell_kernels.common.testing.gates import ARCHS, AotCase, gates
from blackwell_kernels.common.testing.statistics import Statistics

__all__ = ["ARCHS", "AotCase", "CaseResult", "Compiled", "compile_only", "gates", "run"]

# not __name__, which is __main__ under `python -m`
_MODULE = "blackwell_kernels.common.testing.compile"
_CHIP = {90: "h200", 100: "b200"}
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Compiled:
    """One launch that was compiled instead: kernel name, evaluated grid, `triton.compiler.CompiledKernel`."""

    name: str
    grid: tuple[int, ...]
    kernel: Any

    def statistics(self) -> Statistics:
        return statistics.of(self.kernel, self.name, self.grid)


@contextmanager
def compile_only(arch: int) -> Iterator[list[Compiled]]:
    """Inside, every launch `kernel[grid](...)` compiles for sm_<arch>a and is added to the list yielded.

    Arguments may be CPU or meta tensors: specialisation on alignment, on 1 and on divisibility by 16 is the launcher's
    own. `common.arch.current_arch` is the chip of that arch, so that operators select the configuration shipped for it.

    Raises: RuntimeError when Triton is interpreted; ValueError for an arch other than 90 and 100.
    """
    if arch not in _CHIP:
        raise ValueError(f"no chip of arch {arch}; supported: {', '.join(map(str, _CHIP))}")
    import triton
    from triton.runtime.jit import JITFunction

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is interpreted in this process; unset TRITON_INTERPRET or use `run`")
    compiled: list[Compiled] = []
    launch, active = JITFunction.run, triton.runtime.driver._active

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        bound = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        sizes = grid(bound) if callable(grid) else grid
        compiled.append(Compiled(self.__name__, tuple(int(n) for n in sizes), kernel))
        return kernel

    triton.runtime.driver.set_active(_driver(arch))
    JITFunction.run = compile_instead
    try:
        with archs.pretend(_CHIP[arch]):
            yield compiled
    finally:
        JITFunction.run = launch
        triton.runtime.driver.set_active(active)


def _driver(arch: int) -> Any:
    return ahead.driver_of(archs.ARCHS[_CHIP[arch]])


@dataclass(frozen=True)
class CaseResult:
    """What one case came to on one arch."""

    module: str
    case: str
    arch: int
    kernels: tuple[Statistics, ...]
    problems: tuple[str, ...]


def run(
    module: str, archs: Sequence[int] = ARCHS, cases: Sequence[str] | None = None, *, path: Path | None = None
) -> list[CaseResult]:
    """Compile `module.CASES` (all, or the named ones) for each arch in fresh processes and gate what they compiled.

    path: folder to import `module` from, when it is not installed.
    """
    return [result for arch in archs for result in _run_arch(module, arch, cases, path)]


def _run_arch(module: str, arch: int, cases: Sequence[str] | None, path: Path | None) -> list[CaseResult]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), environment.get("PYTHONPATH")]))
    results: list[CaseResult] = []
    pending = cases
    while pending is None or pending:
        with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as report:
            command = [sys.executable, "-m", _MODULE, "--module", module, "--arch", str(arch), "--report", report.name]
            for name in pending or ():
                command += ["--case", name]
            end = _run_child(command, environment)
            lines = [json.loads(line) for line in report.read().splitlines()]
        if not lines:
            return [*results, CaseResult(module, "(import)", arch, (), (end or "reported no cases",))]
        pending, finished = lines[0]["cases"], [_parse(line) for line in lines[1:]]
        results += finished
        pending = pending[len(finished) :]
        if pending:
            # the process died in this case; go on behind it
            results.append(CaseResult(module, pending[0], arch, (), (f"the compiler died: {end}",)))
            pending = pending[1:]
    return results


def _run_child(command: list[str], environment: dict[str, str]) -> str:
    try:
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no end after {_TIMEOUT_S} s"
    return "" if child.returncode == 0 else f"exit status {child.returncode}: {child.stderr.strip()[-2000:]}"


def _parse(line: dict[str, Any]) -> CaseResult:
    sequences = ("grid", "mma", "unwritten")
    kernels = tuple(Statistics(**{**k, **{name: tuple(k[name]) for name in sequences}}) for k in line["kernels"])
    return CaseResult(**{**line, "kernels": kernels, "problems": tuple(line["problems"])})


def _child(module: str, arch: int, names: Sequence[str], report: Path) -> None:
    """Run in a process of its own: one line of JSON with the cases to run, then one a case as it ends."""
    known = {case.name: case for case in importlib.import_module(module).CASES}
    missing = set(names) - known.keys()
    if missing:
        raise SystemExit(f"{module} has no case {', '.join(sorted(missing))}; it has: {', '.join(known)}")
    todo = [known[name] for name in names or known if arch in known[name].archs]
    with report.open("a") as lines:
        print(json.dumps({"cases": [case.name for case in todo]}), file=lines, flush=True)
        for case in todo:
            result = _run_case(module, case, arch)
            print(json.dumps(asdict(result)), file=lines, flush=True)


def _run_case(module: str, case: AotCase, arch: int) -> CaseResult:
    with compile_only(arch) as compiled:
        try:
            case.run()
        except Exception as error:
            return CaseResult(module, case.name, arch, (), (_locate(error),))
    distinct = {(c.kernel.hash, c.grid): c for c in compiled}
    kernels = tuple(c.statistics() for c in distinct.values())
    return CaseResult(module, case.name, arch, kernels, tuple(gates(kernels, case)))


def _locate(error: Exception) -> str:
    """The error and the line that launched the kernel it came from, or else that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    before_triton = list(itertools.takewhile(lambda frame: "/triton/" not in frame.filename, frames))
    where = before_triton[-1]
    return f"{where.filename}:{where.lineno}: {type(error).__name__}: {error}"


def _describe(result: CaseResult) -> Iterator[str]:
    yield f"{'FAIL' if result.problems else 'ok':4} {result.case} sm_{result.arch}a"
    for s in result.kernels:
        yield (
            f"     {s.kernel}: {s.registers} registers, {s.stack} B stack, {s.shared} B shared, {s.tmem} TMEM, "
            f"{s.warps} warps, MMA {'+'.join(s.mma) or 'none'} ({s.mma_loop} in loop), TMA {s.tma}, "
            f"{s.instructions} instructions"
        )
    for problem in result.problems:
        yield f"     ! {problem}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: all gates pass; 1: some do not."""
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=(__doc__ or "").splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--family", choices=["moe", "dsa", "gdn"])
    which.add_argument("--module", help="a module with CASES")
    parser.add_argument("--case", action="append", default=[], help="only this case (may be repeated)")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="only this arch (may be repeated)")
    parser.add_argument("--json", action="store_true", help="print the statistics as JSON")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    module = options.module or f"blackwell_kernels.{options.family}.aot"
    if options.report:
        _child(module, options.arch[0], options.case, options.report)
        return 0
    results = run(module, options.arch or ARCHS, options.case or None)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        print("\n".join(line for result in results for line in _describe(result)))
    return 1 if any(result.problems for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
