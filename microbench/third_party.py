"""Solutions of others, in FlashInfer-Bench's format: examined in a process of their own, then timed beside ours.

The examination needs no GPU. Inputs are secret and new in every run, and the reference is computed after the solution
ran, so there is nothing to look up, to remember or to find in freed memory.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from flashinfer_bench.compile import BuilderRegistry
from flashinfer_bench.data import Definition
from flashinfer_bench.data import Solution as Source
from pydantic import BaseModel, ValidationError

from blackwell_kernels.common.testing.poison import Canaries
from blackwell_kernels.errors import BlackwellKernelsError
from blackwell_kernels.microbench import generate as formats
from blackwell_kernels.microbench import guards, runner
from blackwell_kernels.microbench.cases import Case, all_cases
from blackwell_kernels.microbench.compare import compare
from blackwell_kernels.microbench.implementations import SPECS_BY_ANY_NAME, Implementation
from blackwell_kernels.microbench.ours import Call, Inputs
from blackwell_kernels.microbench.workloads import generate

REPEATS = 24  # calls between two checks: a solution may be right for as long as it believes to be warmed up
_SLEEP_CYCLES = 20_000_000  # about 10 ms of a GPU that has nothing to do yet


class SolutionError(BlackwellKernelsError, ValueError):
    """A solution's file cannot be read, or is for no definition of ours."""


@dataclass(frozen=True)
class ThirdParty(Implementation):
    """A solution's file as an implementation: `bind` builds it with FlashInfer-Bench's own builders."""

    source: Source = field(kw_only=True, hash=False)

    @property
    def compiled(self) -> bool:
        """Whether it says to be more than Python."""
        return self.source.spec.language.value != "python"

    def unavailable(self, case: Case, device: torch.device | str) -> str | None:
        """Why it cannot run this case on this device, or None."""
        kind, targets = torch.device(device).type, [target.lower() for target in self.source.spec.target_hardware]
        if kind == "cpu" and "cpu" not in targets:
            return f"made for {', '.join(targets)}, this is a CPU"
        return None

    def bind(self, inputs: Inputs, shared: dict[str, Any] | None = None) -> Call:
        """The call. Without `shared`, outputs that it is to write are poisoned and guarded; with it they are plain."""
        definition = _definition(self.definition)
        arguments = [inputs[name] for name in definition.inputs]
        runnable = BuilderRegistry.get_instance().build(definition, self.source)
        if not self.source.spec.destination_passing_style:
            return lambda: _all(runnable(*arguments), len(definition.outputs))
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        guard = Canaries(device)
        shapes = definition.get_output_shapes(definition.get_axes_values_from_inputs(arguments))
        wanted = list(zip(definition.outputs, shapes, definition.torch_output_dtypes, strict=True))
        if shared is None:
            buffers = [guard.output(shape, dtype, name=name) for name, shape, dtype in wanted]
        else:
            buffers = [torch.empty(shape, dtype=dtype, device=device) for _, shape, dtype in wanted]

        def call() -> tuple[torch.Tensor, ...]:
            runnable(*arguments, *buffers)
            if shared is None and not _capturing():
                guard.check()
            return tuple(buffers)

        return call


@cache
def _definition(name: str) -> Definition:
    return Definition.model_validate(formats.definition(SPECS_BY_ANY_NAME[name]))


def _all(outputs: Any, count: int) -> tuple[torch.Tensor, ...]:
    made = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
    if len(made) != count:
        raise ValueError(f"{len(made)} outputs returned, the definition has {count}")
    return made


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def load(path: Path) -> ThirdParty:
    """Raises: SolutionError saying what is wrong with the file."""
    try:
        source = Source.model_validate_json(path.read_bytes())
    except OSError as error:
        raise SolutionError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise SolutionError(f"{path}: no solution of FlashInfer-Bench: {place}: {first['msg']}") from None
    if source.definition not in SPECS_BY_ANY_NAME:
        raise SolutionError(f"{path}: for {source.definition!r}, which is none of {', '.join(SPECS_BY_ANY_NAME)}")
    return ThirdParty(source.name, source.definition, "", "", source=source)


class Verdict(BaseModel):
    """What the examination of one solution on one case found; nothing when it is honest and right there."""

    definition: str
    case: str
    solution: str
    problems: list[str]


@dataclass
class Examination:
    """Examines solutions case by case; has the worker's interface of a `Bench`. draw: gives the secret seeds."""

    solutions: tuple[ThirdParty, ...]
    device: torch.device
    head: dict[str, Any] = field(default_factory=dict)
    skip: dict[tuple[str, str, str], str] = field(default_factory=dict)
    on_step: Callable[[str, str], None] = lambda implementation, phase: None
    draw: Callable[[int], int] = secrets.randbelow

    def run(self, cases: Iterable[Case]) -> Iterator[Verdict]:
        """One verdict a case for the solution that is for its definition."""
        for case in cases:
            for item in self.solutions:
                if item.definition not in (case.definition, case.spec.name):
                    continue
                why = self.skip.get((case.definition, case.name, item.name))
                why = why or self.skip.get((case.definition, "*", item.name)) or item.unavailable(case, self.device)
                problems = [why] if why else self._examined(item, case)
                yield Verdict(definition=case.spec.name, case=case.name, solution=item.name, problems=problems)

    def alive(self) -> bool:
        """Whether the device still answers."""
        try:
            self._synchronize()
        except RuntimeError:
            return False
        return True

    def _examined(self, item: ThirdParty, case: Case) -> list[str]:
        self.on_step(item.name, "examination")
        before, patched = guards.world(), guards.patched  # held: the solution may put another in its place
        problems: list[str] = []
        try:
            for found in self._trials(item, case):
                problems += found
        except Exception as error:
            problems.append(f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}")
            if not self.alive():
                raise runner.ContextLost(item.name, f"it broke the CUDA context: {problems[-1]}") from None
        return list(dict.fromkeys(problems + patched(before)))

    def _trials(self, item: ThirdParty, case: Case) -> Iterator[list[str]]:
        buffers = self._inputs(case)
        trial = _Trial(item, self.device)
        first = trial.run(buffers)
        yield trial.judge(case, buffers, "")
        kept = {name: out for name, out in first.items() if name not in case.spec.mutates}
        as_returned = {name: out.clone() for name, out in kept.items()}

        # other contents at the same addresses, ordered by the stream alone
        others = self._inputs(case)
        trial.run(buffers, becoming=others)
        yield trial.judge(case, buffers, " when its inputs changed in place")
        _nudge(case, others)
        trial.run(buffers, becoming=others)
        yield trial.judge(case, buffers, " when a part of one input changed")
        yield [
            f"{name}: a later call wrote to the output of an earlier one"
            for name, out in kept.items()
            if guards.fingerprint(out) != guards.fingerprint(as_returned[name])
        ]
        call = item.bind(_protected(case, buffers))
        for _ in range(REPEATS):
            call()
        fresh = self._inputs(case)
        trial.run(fresh)
        yield trial.judge(case, fresh, f" after {REPEATS} calls")
        if (other := _other_shape(case)) is not None:
            fresh = self._inputs(other)
            trial.run(fresh)
            yield trial.judge(other, fresh, f" on {other.name}, which was not asked for")
        if self.device.type == "cuda":
            yield self._captured(item, case, trial)
        if item.compiled and trial.work:
            yield [f"its {item.source.spec.language.value} source leaves the work to torch: {', '.join(trial.work)}"]

    def _captured(self, item: ThirdParty, case: Case, trial: _Trial) -> list[str]:
        """Whether it computes the same while it is captured, as it is when timed."""
        buffers, others = self._inputs(case), self._inputs(case)
        given = _protected(case, buffers)
        call, graph = item.bind(given, {}), torch.cuda.CUDAGraph()
        call()
        self._synchronize()
        try:
            with torch.cuda.graph(graph):
                outputs = call()
        except Exception as error:
            self._synchronize()
            return ["it leaves work on another stream"] if "unjoined" in str(error) else []  # timed eagerly then
        _become(given, others)
        graph.replay()
        self._synchronize()
        trial.seen = {name: out.clone() for name, out in zip(case.spec.outputs, outputs, strict=True)}
        trial.found = []
        return trial.judge(case, others, " in a CUDA graph")

    def _inputs(self, case: Case) -> Inputs:
        return generate(case, seed=self.draw(1 << 30), device=self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class _Trial:
    """One run at a time: what the stream that it was called on saw, and what was odd about it."""

    item: ThirdParty
    device: torch.device
    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)
    work: list[str] = field(default_factory=list)

    def run(self, inputs: Inputs, becoming: Inputs | None = None) -> dict[str, torch.Tensor]:
        """The outputs. `becoming`: contents that `inputs` take on right before the call, on its stream."""
        spec = SPECS_BY_ANY_NAME[self.item.definition]
        marks = guards.fingerprints({k: v for k, v in (becoming or inputs).items() if k not in spec.mutates.values()})
        given = {name: x.clone() if name in spec.mutates.values() else x for name, x in inputs.items()}
        call = self.item.bind(given)
        threads = set(threading.enumerate())
        largest = max(x.numel() for x in given.values() if isinstance(x, torch.Tensor))
        with guards.TorchWork(max(1, largest // 2)) as torch_work:
            if becoming is not None:
                if self.device.type == "cuda":  # who does not wait for the stream reads what was there before
                    torch.cuda._sleep(_SLEEP_CYCLES)
                _become(inputs, becoming)
                _become(given, becoming)
            outputs = call()
        self.work = sorted({*self.work, *torch_work.done})
        named = dict(zip(spec.outputs, outputs, strict=True))
        self.found = guards.strange(named)
        self.seen = {name: out.clone() for name, out in named.items() if type(out) is torch.Tensor}
        later = [thread for thread in threading.enumerate() if thread not in threads]
        if later:
            self.found.append("it returns while a thread of its own still runs")
            for thread in later:
                thread.join(timeout=5.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.found += [f"input {name} was changed" for name in guards.changed(inputs, marks)]
        return {name: out for name, out in named.items() if type(out) is torch.Tensor}

    def judge(self, case: Case, inputs: Inputs, when: str) -> list[str]:
        """Messages about the last run, whose inputs these are."""
        found = [f"{problem}{when}" for problem in self.found]
        if len(self.seen) == len(case.spec.outputs):
            spec = case.spec
            expected, rows = runner.reference_outputs(spec, inputs, 0)
            made = runner.subset_outputs(spec, dict(self.seen), rows)
            compared = compare(spec, runner.subset(spec, inputs, rows), made, expected)
            found += [f"wrong{when}: {c.problem}" for c in compared.values() if c.problem]
        return found


def _protected(case: Case, inputs: Inputs) -> Inputs:
    return {name: x.clone() if name in case.spec.mutates.values() else x for name, x in inputs.items()}


def _become(inputs: Inputs, others: Inputs) -> None:
    for name, x in inputs.items():
        if isinstance(x, torch.Tensor) and x is not others[name]:
            x.copy_(others[name])


def _nudge(case: Case, inputs: Inputs) -> None:
    """Negate the last half of the first tensor of numbers: shapes, beginnings, sums of squares stay as they are."""
    name = next(name for name in case.spec.inputs if isinstance(inputs[name], torch.Tensor))
    flat = inputs[name].view(-1)
    half = flat[flat.numel() // 2 :]
    if half.dtype.itemsize == 1:
        half.view(torch.uint8).bitwise_xor_(0x80)
    else:
        half.neg_()


def _other_shape(case: Case) -> Case | None:
    """The smallest other case of the definition and set: shapes are not for the solution to choose."""
    others = [
        c for c in all_cases() if c.definition == case.definition and c.set == case.set and c.tokens != case.tokens
    ]
    return min(others, key=lambda c: sum(c.axes.values()), default=None)


def examination(job: Any) -> Examination:
    """What a worker runs to examine a job's solutions (`Job.factory`)."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Examination(tuple(load(path) for path in job.solutions), device)
