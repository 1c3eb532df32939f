"""Measures cases on a GPU: inputs, correctness of each implementation, then all of them in turns; row by row.

A row is written as soon as it is measured, so a run that dies keeps what it had. An implementation that is missing,
wrong, out of memory or cannot be launched becomes an entry that says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels.common import arch
from blackwell_kernels.errors import BlackwellKernelsError
from blackwell_kernels.microbench import bounds, dispatch, references, results
from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.compare import compare
from blackwell_kernels.microbench.implementations import OURS, Implementation, implementations, stock
from blackwell_kernels.microbench.ours import Inputs
from blackwell_kernels.microbench.results import Impl, Row
from blackwell_kernels.microbench.spec import Spec, shape_of
from blackwell_kernels.microbench.timing import Call, Engine, Timing, measure
from blackwell_kernels.microbench.workloads import generate

MAX_SETS = 64
CHECKED_ROWS = 48
MEMORY_SHARE = 0.3  # of free memory, for rotated sets
_WEIGHTS, _PAIR = ("w13", "w2", "gemm1_weights", "gemm2_weights"), ("", "_scale")


class ContextLost(BlackwellKernelsError, RuntimeError):
    """An implementation broke the CUDA context: nothing more can be measured in this process."""


@dataclass
class Bench:
    """One run's settings. `head`: facts of the machine as in a results file; `rates`: ceilings for floors."""

    device: torch.device
    engines: Sequence[Engine]
    head: dict[str, Any]
    rates: dict[str, float]
    rounds: int = 15
    seed: int = 0
    only: tuple[str, ...] = ()
    l2_bytes: int = 50 << 20
    fib_timer: Callable[[Call], float] | None = None
    root: Path = results.ROOT
    _files: list[Path] = field(default_factory=list)
    _weights: tuple[str, Inputs] = ("", {})

    def run(self, cases: Iterable[Case]) -> Iterator[Row]:
        """Measure and store case by case."""
        for case in cases:
            lost: list[ContextLost] = []
            row = self.row(case, lost)
            path = results.path_of(arch.gpu_slug(self.head["gpu"]), case.spec.op, self.root)
            results.merge(path, self.head, [row])
            if path not in self._files:
                self._files.append(path)
            yield row
            if lost:
                raise lost[0]

    def files(self) -> list[results.Results]:
        """The results files this run wrote to."""
        return [results.load(path) for path in self._files]

    def row(self, case: Case, lost: list[ContextLost]) -> Row:
        """One case measured. `lost` receives the implementation's error that ended the process's CUDA context."""
        first = self._first(case)
        work = bounds.cost(case, first)
        floor_us, bound = bounds.floor(work, **self.rates)
        impls: dict[str, Impl] = {}
        chosen = implementations(case.spec.name)
        ready: list[Implementation] = []
        expected = None
        accuracy: dict[str, float] = {}
        for item in chosen:
            why = item.unavailable(case, self.device)
            if why is None and self.only and item.name not in (OURS, *self.only):
                why = "left out of this run"
            if why is None and lost:
                why = f"not run: {lost[0]}"
            if why is None:
                if expected is None:
                    expected = _expected(case.spec, first, self.seed)
                why, error = self._check(item, case, first, expected, lost)
                accuracy[item.name] = error
            if why is None:
                ready.append(item)
            else:
                impls[item.name] = Impl(error=why, accuracy=_finite(accuracy.get(item.name)))
        sets = [first]
        if not lost:
            sets += self._more_sets(case, first, work.bytes)
            impls |= self._time(case, ready, sets, accuracy, lost)
        else:
            impls |= {item.name: Impl(error=f"not timed: {lost[0]}") for item in ready}
        impls = {item.name: impls[item.name] for item in chosen}
        standard = stock(case, self.head["sm"])
        peer = results.best_peer(impls)
        gpu = arch.gpu_slug(self.head["gpu"])
        row = Row(
            op=case.spec.op,
            definition=case.spec.name,
            case=case.name,
            axes=case.full_axes(),
            floor_us=floor_us,
            bound=bound,
            impls=impls,
            stock=standard,
            best_peer=peer,
            ratio_stock=results.ratio(impls, standard),
            ratio_best_peer=results.ratio(impls, peer),
            dispatched=standard,
            sets=len(sets),
            rotated_bytes=len(sets) * work.bytes,
            commit=self.head["commit"],
            source=self.head["source"],
            date=self.head["date"],
        )
        return row.model_copy(update={"dispatched": dispatch.by_tables(row, gpu)})

    def _first(self, case: Case) -> Inputs:
        """The first input set; expert weights are kept for the next case of the same layer."""
        axes = {k: v for k, v in case.axes.items() if k != case.spec.tokens}
        layer = f"{case.spec.name} {axes}"
        if layer != self._weights[0]:
            self._weights = ("", {})  # released before the new ones are made
            self._release()
        first = generate(case, seed=self.seed, device=self.device, reuse=self._weights[1])
        kept = {f"{name}{suffix}": first[f"{name}{suffix}"] for name in _WEIGHTS if name in first for suffix in _PAIR}
        self._weights = (layer, kept)
        return first

    def _check(
        self, item: Implementation, case: Case, first: Inputs, expected: Any, lost: list[ContextLost]
    ) -> tuple[str | None, float]:
        """(why it cannot be timed, or None; its error). Runs on clones of what it may change."""
        spec, (wanted, rows) = case.spec, expected
        try:
            outputs = item.bind(_protected(spec, first, item))()
            self._synchronize()
            named = dict(zip(spec.outputs, outputs, strict=True))
            compared = compare(spec, _subset(spec, first, rows), _subset_outputs(spec, named, rows), wanted)
        except Exception as error:
            return self._failed(item, case, error, lost), float("nan")
        if not compared:
            return "wrong: it gives no output that could be compared", float("nan")
        problems = [c.problem for c in compared.values() if c.problem]
        return ("wrong: " + "; ".join(problems) if problems else None), max(c.error for c in compared.values())

    def _more_sets(self, case: Case, first: Inputs, touched: int) -> list[Inputs]:
        """Further input sets, until those touched exceed twice the L2 cache or memory runs short."""
        own = sum(x.numel() * x.element_size() for name, x in first.items() if isinstance(x, torch.Tensor))
        wanted = min(MAX_SETS, max(2, -(-2 * self.l2_bytes // max(touched, 1)) + 1))
        room = self._free_bytes() * MEMORY_SHARE / max(own - _reused(first), 1)
        count = max(1, min(wanted, int(room)))
        return [generate(case, seed=self.seed + i, device=self.device, reuse=first) for i in range(1, count)]

    def _time(
        self,
        case: Case,
        ready: list[Implementation],
        sets: list[Inputs],
        accuracy: dict[str, float],
        lost: list[ContextLost],
    ) -> dict[str, Impl]:
        bound: dict[str, list[Call]] = {}
        made: dict[str, Impl] = {}
        for item in ready:
            shared: dict[str, Any] = {}
            try:
                calls = [item.bind(inputs, shared) for inputs in sets]
                for call in calls:  # everything compiles and every workspace has its size before the first capture
                    call()
                self._synchronize()
                bound[item.name] = calls
            except Exception as error:
                made[item.name] = Impl(error=self._failed(item, case, error, lost))
        if lost:
            return made | {name: Impl(error=f"not timed: {lost[0]}") for name in bound}
        for name, timing in measure(self.engines, bound, self.rounds).items():
            if isinstance(timing, str):
                made[name] = Impl(error=timing, accuracy=_finite(accuracy[name]))
                continue
            fib_us = None
            if self.fib_timer and not lost:
                try:
                    fib_us = self.fib_timer(bound[name][0])
                except Exception as error:
                    self._failed(next(item for item in ready if item.name == name), case, error, lost)
            made[name] = _impl(timing, accuracy[name], fib_us)
        return made

    def _failed(self, item: Implementation, case: Case, error: Exception, lost: list[ContextLost]) -> str:
        """What happened, in a line; notes in `lost` when the CUDA context went with it."""
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        try:
            self._synchronize()
        except Exception:
            lost.append(ContextLost(f"{item.name} broke the CUDA context on {case.name}: {text}"))
        self._release()
        return text

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _release(self) -> None:
        if self.device.type == "cuda":
            # where the context is gone this fails too; the caller finds out at its next synchronisation
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()

    def _free_bytes(self) -> int:
        if self.device.type != "cuda":
            return 1 << 30
        return torch.cuda.mem_get_info(self.device)[0]


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def _impl(timing: Timing, error: float, fib_us: float | None) -> Impl:
    return Impl(
        us=timing.us,
        p10=timing.p10,
        p90=timing.p90,
        n=len(timing.samples_us),
        samples_us=list(timing.samples_us),
        method=timing.method,
        accuracy=_finite(error),
        fib_us=fib_us,
    )


def _reused(first: Inputs) -> int:
    """Bytes of expert weights, which further sets share."""
    return sum(first[name].numel() for name in _WEIGHTS if name in first)


def _protected(spec: Spec, inputs: Inputs, item: Implementation) -> Inputs:
    """The inputs with clones of what the implementation may change."""
    touched = {*spec.mutates.values(), *item.overwrites}
    return {name: x.clone() if name in touched else x for name, x in inputs.items()}


def _sampled(spec: Spec, inputs: Inputs, seed: int) -> torch.Tensor | None:
    """Rows the reference checks, None for all: it is slow, and rows are independent where the spec says so."""
    if spec.rows is None:
        return None
    lead = next(x for name, x in inputs.items() if (shape_of(spec.inputs[name]) or ("",))[0] == spec.rows)
    if len(lead) <= CHECKED_ROWS:
        return None
    order = torch.randperm(len(lead), generator=torch.Generator().manual_seed(seed))[:CHECKED_ROWS]
    return order.sort().values.to(lead.device)


def _subset(spec: Spec, inputs: Inputs, rows: torch.Tensor | None) -> Inputs:
    return inputs if rows is None else _select(spec.inputs, spec.rows, inputs, rows)


def _subset_outputs(spec: Spec, outputs: dict[str, Any], rows: torch.Tensor | None) -> dict[str, Any]:
    return outputs if rows is None else _select(spec.outputs, spec.rows, outputs, rows)


def _select(tensors: dict[str, str], axis: str | None, values: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {
        name: x[rows] if x is not None and (shape_of(tensors[name]) or ("",))[0] == axis else x
        for name, x in values.items()
    }


def _expected(spec: Spec, inputs: Inputs, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    rows = _sampled(spec, inputs, seed)
    run = getattr(references, f"run_{spec.reference}")
    with torch.no_grad():
        made = run(*_subset(spec, inputs, rows).values())
    return dict(zip(spec.outputs, made if isinstance(made, tuple) else (made,), strict=True)), rows
