"""Correctness without a GPU: every definition's reference against every implementation that runs on a CPU, through
FlashInfer-Bench's own data set, builders, evaluator registry and traces. Nothing is timed, and the traces say so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashinfer_bench.bench.config import BenchmarkConfig
from flashinfer_bench.bench.evaluators import resolve_evaluator
from flashinfer_bench.bench.utils import make_eval
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.compile.builder import BuildError
from flashinfer_bench.data import EvaluationStatus, Performance, Trace

from blackwell_kernels.microbench import evaluator
from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.dataset import cache_dir, materialize
from blackwell_kernels.microbench.implementations import implementations

SKIPPED = "timing skipped: no CUDA device"


@dataclass(frozen=True)
class Verdict:
    """One implementation on one case. status: PASSED, a failure of FlashInfer-Bench's, or UNAVAILABLE; `why` if so."""

    op: str
    definition: str
    case: str
    implementation: str
    status: str
    why: str
    error: float | None
    trace: Trace | None = None

    def row(self) -> dict[str, object]:
        """What `bench --json` prints."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "trace"}


def check(cases: Iterable[Case], *, root: Path | None = None, seed: int = 0) -> Iterator[Verdict]:
    """Verdicts case by case, as they come; traces are appended to the data set under `root`."""
    evaluator.register()
    root = root or cache_dir()
    # FlashInfer-Bench keeps built solutions in its own cache; ours are two lines each
    os.environ.setdefault("FIB_CACHE_PATH", str(root / "flashinfer_bench"))
    cases = list(cases)
    data = materialize(root, cases, seed=seed)
    config = BenchmarkConfig(num_trials=1, profile_baseline=False, log_dir=str(root / "logs"))
    builders = BuilderRegistry.get_instance()
    workloads = {(name, t.workload.uuid): t.workload for name, traces in data.workloads.items() for t in traces}
    for case in cases:
        definition = data.definitions[case.spec.name]
        workload = workloads[definition.name, f"{case.uuid}-s{seed}"]
        judge = resolve_evaluator(definition)
        baseline = judge.build_baseline(definition, workload, config, "cpu", root)
        for item in implementations(definition.name):
            head = (case.spec.op, definition.name, case.name, item.name)
            if why := item.unavailable(case, "cpu"):
                yield Verdict(*head, "UNAVAILABLE", why, None)
                continue
            solution = data.get_solution(f"{definition.name}__{item.name}")
            assert solution is not None, f"{definition.name} has no solution {item.name}"
            try:
                runnable = builders.build(definition, solution)
            except BuildError as failure:
                yield Verdict(*head, EvaluationStatus.COMPILE_ERROR.value, str(failure), None)
                continue
            correctness, failed = judge.check_correctness(
                definition, runnable, baseline.inputs, baseline.outputs, config, "", "cpu"
            )
            evaluation = failed or make_eval(
                # FlashInfer-Bench wants a performance in every passed trace: zeros, and the log says why
                EvaluationStatus.PASSED, "cpu", "", correctness, Performance(), SKIPPED
            )  # fmt: skip
            trace = Trace(definition=definition.name, workload=workload, solution=solution.name, evaluation=evaluation)
            data.add_traces([trace])
            error = max(correctness.extra["error"].values()) if correctness and correctness.extra else None
            yield Verdict(*head, evaluation.status.value, evaluation.log, error, trace)
