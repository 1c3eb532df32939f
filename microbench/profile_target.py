"""What is profiled: one call of ours on each case, after one that warmed everything up.

python -m blackwell_kernels.microbench.profile_target OUT DEFINITION CASE [DEFINITION CASE ...]

With OUT `-` each call runs once, marked, for Nsight Compute: `begin_case` separates the cases. Else traces of CUPTI go
to the file OUT, a line of JSON a case: {"trace": ...}, or {"error": why not}.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from blackwell_kernels.microbench import traces
from blackwell_kernels.microbench.cases import Case, all_cases
from blackwell_kernels.microbench.implementations import OURS, find
from blackwell_kernels.microbench.workloads import generate


@triton.jit
def begin_case(unused):
    """Nothing, in a kernel whose name separates one case's launches from the next one's."""


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def _warm(case: Case) -> Callable[[], Any]:
    call = find(case.spec.name, OURS).bind(generate(case, seed=0, device=torch.device("cuda")))
    call()
    torch.cuda.synchronize()
    return call


def _calls(cases: list[Case]) -> Iterator[tuple[Callable[[], Any] | None, str]]:
    """(call, why there is none) of each case; the memory of one is given back before the next."""
    for case in cases:
        try:
            yield _warm(case), ""
        except Exception as error:  # a case that does not run costs its own figures
            yield None, _line(error)
        gc.collect()
        torch.cuda.empty_cache()


def mark(cases: list[Case]) -> None:
    """Run every call once between the profiler's start and stop."""
    nothing = torch.zeros(1, device="cuda")
    begin_case[(1,)](nothing)
    for call, why in _calls(cases):
        torch.cuda.profiler.start()
        begin_case[(1,)](nothing)
        if call is not None:
            call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        if why:
            print(why, file=sys.stderr)
        del call  # so that two cases never share the memory


def trace(cases: list[Case], out: Path) -> None:
    """Trace every call."""
    traces.warm_up()
    with out.open("w", encoding="utf-8") as lines:
        for call, why in _calls(cases):
            told: dict[str, Any] = {"error": why}
            if call is not None:
                try:
                    told = {"trace": traces.record(call).model_dump()}
                except Exception as error:
                    told = {"error": _line(error)}
            print(json.dumps(told), file=lines, flush=True)
            del call  # so that two cases never share the memory


def main(out: str, *names: str) -> None:
    """Profile the cases named."""
    known = {(case.definition, case.name): case for case in all_cases()}
    cases = [known[pair] for pair in zip(names[::2], names[1::2], strict=True)]
    if out == "-":
        mark(cases)
    else:
        trace(cases, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
