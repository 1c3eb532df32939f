"""Measures cases on a GPU: inputs, correctness of each implementation, then all of them in turns; row by row.

A row is written as soon as it is measured, so a run that dies keeps what it had. An implementation that is missing,
wrong, out of memory or cannot be launched becomes an entry that says so; one that breaks the CUDA context ends this
process (`ContextLost`), and `supervise.py` goes on in another one without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blackwell_kernels.common import arch, tables
from blackwell_kernels.errors import BlackwellKernelsError
from blackwell_kernels.microbench import bounds, dispatch, guards, launched, references, results
from blackwell_kernels.microbench.cases import Case
from blackwell_kernels.microbench.compare import compare
from blackwell_kernels.microbench.implementations import OURS, Implementation, implementations, stock
from blackwell_kernels.microbench.ours import Inputs
from blackwell_kernels.microbench.results import Impl, Row
from blackwell_kernels.microbench.spec import Spec, shape_of
from blackwell_kernels.microbench.timing import Call, Engine, Timing, measure, quantile
from blackwell_kernels.microbench.workloads import generate

MAX_SETS = 64
SETS_OF_OTHERS = 8  # at least, where a third party's solution might remember what it was given
CHECKED_ROWS = 48
HOST_WARMUP = 3
MEMORY_SHARE = 0.3  # of free memory, for rotated sets
_WEIGHTS, _PAIR = ("w13", "w2", "gemm1_weights", "gemm2_weights"), ("", "_scale")


class ContextLost(BlackwellKernelsError, RuntimeError):
    """`implementation` broke what measuring depends on, the CUDA context above all: this process measures no more."""

    def __init__(self, implementation: str, why: str) -> None:
        super().__init__(f"{implementation}: {why}")
        self.implementation, self.why = implementation, why


@dataclass(frozen=True)
class Checked:
    """What the check of an implementation found: why it cannot be timed, its error, how it is less accurate than ours
    may be, and the most bytes it allocated beside its inputs."""

    problem: str | None
    error: float | None = None
    flag: str | None = None
    peak_bytes: int | None = None

    def impl(self, **more: Any) -> Impl:
        """The entry of a results row."""
        return Impl(**{"error": self.problem, "accuracy": self.error, "peak_bytes": self.peak_bytes, **more})


@dataclass
class Bench:
    """One run's settings. `head`: facts of the machine as in a results file; `rates`: ceilings for floors.

    extra: implementations beside those of this package (third parties' solutions), measured where they apply.
    skip: (definition, case, implementation) -> why it is not run, the case "*" standing for all.
    on_step: told the implementation ("" for none) and what it is about to do. host_timer: µs until a call returns.
    """

    device: torch.device
    engines: Sequence[Engine]
    head: dict[str, Any]
    rates: dict[str, float]
    rounds: int = 15
    seed: int = 0
    only: tuple[str, ...] = ()
    extra: tuple[Implementation, ...] = ()
    skip: dict[tuple[str, str, str], str] = field(default_factory=dict)
    on_step: Callable[[str, str], None] = lambda implementation, phase: None
    l2_bytes: int = 50 << 20
    fib_timer: Callable[[Call], float] | None = None
    host_timer: Callable[[Call], float] | None = None
    root: Path = results.ROOT
    tables_root: Path = tables.ROOT
    _weights: tuple[str, Inputs] = ("", {})
    _world: dict[str, Any] = field(default_factory=guards.world)

    def run(self, cases: Iterable[Case]) -> Iterator[Row]:
        """Measure and store case by case.

        Raises: ContextLost, before the row of that case is stored.
        """
        for case in cases:
            row = self.row(case)
            self.on_step("", "storing")  # whoever was timed last is not to blame for a full disk
            path = results.path_of(arch.gpu_slug(self.head["gpu"]), case.spec.op, self.root)
            results.merge(path, self.head, [row])
            yield row

    def row(self, case: Case) -> Row:
        """One case measured."""
        self.on_step("", "inputs")
        gpu = arch.gpu_slug(self.head["gpu"])
        first = self._first(case)
        impls: dict[str, Impl] = {}
        extra = [item for item in self.extra if item.definition in (case.definition, case.spec.name)]
        chosen = [*implementations(case.spec.name), *extra]
        ready: dict[Implementation, Checked] = {}
        expected = None
        for item in chosen:
            checked = Checked(self._not_run(item, case))
            if checked.problem is None:
                if expected is None:
                    self.on_step("", "reference")
                    expected = reference_outputs(case.spec, first, self.seed)
                self.on_step(item.name, "check")
                checked = self._check(item, case, first, expected)
            if checked.problem is None:
                ready[item] = checked
            else:
                impls[item.name] = checked.impl()
        self.on_step("", "inputs")
        sets = [first, *self._more_sets(case, first, bounds.cost(case, first).bytes)]
        work = bounds.mean([bounds.cost(case, one) for one in sets])
        floor_us, bound = bounds.floor(work, **self.rates)
        impls |= self._time(case, ready, sets)
        impls = results.reviewed(impls, [item.name for item in extra], floor_us)
        impls |= self._second_check(case, [item for item in extra if impls[item.name].us is not None], first)
        impls = {item.name: impls[item.name] for item in chosen}
        standard = stock(case, self.head["sm"])
        peer = results.best_peer(impls)
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
            bytes=work.bytes,
            flops=work.flops,
            commit=self.head["commit"],
            source=self.head["source"],
            kernels=launched.of(case, gpu),
            date=self.head["date"],
        )
        return row.model_copy(update={"dispatched": dispatch.by_tables(row, gpu, self.tables_root)})

    def _second_check(self, case: Case, items: list[Implementation], first: Inputs) -> dict[str, Impl]:
        """Entries of those that are no longer right after they were timed, on inputs they never saw."""
        found: dict[str, Impl] = {}
        if items:
            seed = self.seed + MAX_SETS
            fresh = generate(case, seed=seed, device=self.device, reuse=first)
            expected = reference_outputs(case.spec, fresh, seed)
            for item in items:
                self.on_step(item.name, "second check")
                again = self._check(item, case, fresh, expected)
                if again.problem:
                    found[item.name] = again.impl(error=f"after timing, {again.problem}")
                if changes := guards.patched(self._world):  # whatever was measured beside it is in doubt too
                    raise ContextLost(item.name, "; ".join(changes))
        return found

    def _not_run(self, item: Implementation, case: Case) -> str | None:
        why = self.skip.get((case.definition, case.name, item.name)) or self.skip.get((case.definition, "*", item.name))
        if why is None:
            why = item.unavailable(case, self.device)
        listed = self.only and item.name not in (OURS, *self.only) and item not in self.extra
        return "left out of this run" if why is None and listed else why

    def _first(self, case: Case) -> Inputs:
        """The first input set; expert weights are kept for the next case of the same layer."""
        axes = {k: v for k, v in case.axes.items() if k != case.spec.tokens}
        layer = f"{case.spec.name} {axes}"
        if layer != self._weights[0] and self._weights[1]:
            self._weights = ("", {})  # released before the new ones are made
            self._release()
        first = generate(case, seed=self.seed, device=self.device, reuse=self._weights[1])
        kept = {f"{name}{suffix}": first[f"{name}{suffix}"] for name in _WEIGHTS if name in first for suffix in _PAIR}
        self._weights = (layer, kept)
        return first

    def _check(self, item: Implementation, case: Case, first: Inputs, expected: Any) -> Checked:
        """Run once on clones of what it may change; its inputs must be what they were, its outputs right."""
        spec, (wanted, rows) = case.spec, expected
        try:
            given = _protected(spec, first, item)
            kept = {name: x for name, x in given.items() if name not in {*spec.mutates.values(), *item.overwrites}}
            before = guards.fingerprints(kept)
            with self._peak() as peak:
                outputs = item.bind(given)()
                self._synchronize()
            problems = [f"input {name} was changed" for name in guards.changed(kept, before)]
            problems += guards.strange(dict(zip(spec.outputs, outputs, strict=True)))
            if problems:
                return Checked("wrong: " + "; ".join(problems))
            named = subset_outputs(spec, dict(zip(spec.outputs, outputs, strict=True)), rows)
            peer = item.name != OURS and item not in self.extra
            compared = compare(spec, subset(spec, first, rows), named, wanted, peer=peer)
        except Exception as error:
            return Checked(self._failed(item, error))
        if not compared:
            return Checked("wrong: it gives no output that could be compared")
        problems = [c.problem for c in compared.values() if c.problem]
        return Checked(
            "wrong: " + "; ".join(problems) if problems else None,
            _finite(max(c.error for c in compared.values())),
            "; ".join(c.flag for c in compared.values() if c.flag) or None,
            peak[0],
        )

    @contextlib.contextmanager
    def _peak(self) -> Iterator[list[int | None]]:
        """One number: bytes allocated at the worst moment inside, above those before; None without a GPU."""
        found: list[int | None] = [None]
        if self.device.type != "cuda":
            yield found
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield found
        found[0] = torch.cuda.max_memory_allocated(self.device) - before

    def _more_sets(self, case: Case, first: Inputs, touched: int) -> list[Inputs]:
        """Further input sets, until those touched exceed twice the L2 cache or memory runs short."""
        own = sum(x.numel() * x.element_size() for name, x in first.items() if isinstance(x, torch.Tensor))
        least = SETS_OF_OTHERS if self.extra else 2
        wanted = min(MAX_SETS, max(least, -(-2 * self.l2_bytes // max(touched, 1)) + 1))
        room = self._free_bytes() * MEMORY_SHARE / max(own - _reused(first), 1)
        count = max(1, min(wanted, int(room)))
        return [generate(case, seed=self.seed + i, device=self.device, reuse=first) for i in range(1, count)]

    def _time(self, case: Case, ready: dict[Implementation, Checked], sets: list[Inputs]) -> dict[str, Impl]:
        bound: dict[str, list[Call]] = {}
        made: dict[str, Impl] = {}
        for item in ready:
            shared: dict[str, Any] = {}
            self.on_step(item.name, "first calls")
            try:
                calls = [item.bind(inputs, shared) for inputs in sets]
                for call in calls:  # everything compiles and every workspace has its size before the first capture
                    call()
                self._synchronize()
                bound[item.name] = calls
            except Exception as error:
                made[item.name] = ready[item].impl(error=self._failed(item, error))
        timings = measure(self.engines, bound, self.rounds, on_turn=lambda name: self.on_step(name, "timing"))
        timed = {item: bound[item.name][0] for item in ready if isinstance(timings.get(item.name), Timing)}
        hosts = self._host(timed) if self.alive() else {}
        for item, checked in ready.items():
            timing = timings.get(item.name)
            if isinstance(timing, str):
                made[item.name] = checked.impl(error=timing)
                if not self.alive():
                    raise ContextLost(item.name, f"it broke the CUDA context: {timing}")
            elif timing is not None:
                made[item.name] = _impl(timing, checked, self._fib(item, timed[item]), hosts.get(item))
        return made

    def _host(self, calls: dict[Implementation, Call]) -> dict[Implementation, float]:
        """Median µs until a call returns; implementations take turns here too. Who fails has none."""
        if self.host_timer is None:
            return {}
        samples: dict[Implementation, list[float]] = {item: [] for item in calls}
        for _ in range(HOST_WARMUP + self.rounds):
            for item in list(samples):
                self.on_step(item.name, "host time")
                try:
                    samples[item].append(self.host_timer(calls[item]))
                except Exception as error:
                    self._failed(item, error)
                    del samples[item]
        return {item: quantile(found[HOST_WARMUP:], 0.5) for item, found in samples.items()}

    def _fib(self, item: Implementation, call: Call) -> float | None:
        if self.fib_timer is None:
            return None
        self.on_step(item.name, "FlashInfer-Bench's timing")
        try:
            return self.fib_timer(call)
        except Exception as error:
            self._failed(item, error)
            return None

    def _failed(self, item: Implementation, error: Exception) -> str:
        """What happened, in a line.

        Raises: ContextLost when the CUDA context went with it.
        """
        text = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        if not self.alive():
            raise ContextLost(item.name, f"it broke the CUDA context: {text}")
        self._release()
        return text

    def alive(self) -> bool:
        """Whether the CUDA context still answers."""
        try:
            self._synchronize()
        except Exception:
            return False
        return True

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _release(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _free_bytes(self) -> int:
        if self.device.type != "cuda":
            return 1 << 30
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None


def _impl(timing: Timing, checked: Checked, fib_us: float | None, host_us: float | None) -> Impl:
    return checked.impl(
        us=timing.us,
        p10=timing.p10,
        p90=timing.p90,
        n=len(timing.samples_us),
        samples_us=list(timing.samples_us),
        method=timing.method,
        fib_us=fib_us,
        host_us=host_us,
        flag=checked.flag,
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


def subset(spec: Spec, inputs: Inputs, rows: torch.Tensor | None) -> Inputs:
    """The inputs of some rows."""
    return inputs if rows is None else _select(spec.inputs, spec.rows, inputs, rows)


def subset_outputs(spec: Spec, outputs: dict[str, Any], rows: torch.Tensor | None) -> dict[str, Any]:
    """The outputs of some rows."""
    return outputs if rows is None else _select(spec.outputs, spec.rows, outputs, rows)


def _select(tensors: dict[str, str], axis: str | None, values: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    return {
        name: x[rows] if x is not None and (shape_of(tensors[name]) or ("",))[0] == axis else x
        for name, x in values.items()
    }


def reference_outputs(spec: Spec, inputs: Inputs, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """(outputs by name, the rows they are for; None for all)."""
    rows = _sampled(spec, inputs, seed)
    run = getattr(references, f"run_{spec.reference}")
    with torch.no_grad():
        made = run(*subset(spec, inputs, rows).values())
    return dict(zip(spec.outputs, made if isinstance(made, tuple) else (made,), strict=True)), rows
