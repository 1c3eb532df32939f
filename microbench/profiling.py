"""The profile of an operator on one case: a checklist in fixed order, each row with its value or why it has none.

Rules are data (`profile_rules.json`). Facts come from three places that need not all be there: the compiler (always),
the benchmark's row (a GPU, or stored results), hardware counters (ncu).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from blackwell_kernels.common.testing.statistics import Statistics
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import bounds, counters, launched
from blackwell_kernels.microbench.cases import Case, all_cases
from blackwell_kernels.microbench.counters import Launch
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Ceilings, Row
from blackwell_kernels.microbench.traces import Trace

RULES = Path(__file__).with_name("profile_rules.json")
REGRESSION = 0.05  # of the share of the bound
_SMALL = 4.0  # a floor below so many launches is one of launches
Verdict = Literal["ok", "finding", "failed", "excepted", "not measured"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Rule(_Strict):
    """One row of the checklist; the file says what each key means."""

    id: str
    title: str
    unit: str
    advice: str
    gain: Literal["time", "launch", "none"]
    at_most: float | None = None
    at_least: float | None = None
    fatal: bool = False
    only: Literal["memory", "compute"] | None = None
    exceptions: dict[str, str] = Field(default={}, alias="except")

    def threshold(self) -> str:
        """For people."""
        if self.at_most is not None:
            return f"≤ {self.at_most:,.0f} {self.unit}".strip()
        return "–" if self.at_least is None else f"≥ {self.at_least:,.0f} {self.unit}".strip()

    def broken(self, value: float) -> bool:
        """Whether a value is beyond the threshold."""
        too_much = self.at_most is not None and value > self.at_most
        return too_much or (self.at_least is not None and value < self.at_least)


class Check(_Strict):
    """One row for one kernel, or for the whole call (`kernel` empty). gain: share of the time it may cost, at most."""

    id: str
    title: str
    kernel: str
    value: float | None
    unit: str
    threshold: str
    verdict: Verdict
    why: str
    how: str
    gain: float | None = None
    detail: dict[str, float] = {}


class Profile(_Strict):
    """What `profile` writes and `--against` reads. own_bound: what limits the launches it makes (`bounds.own`).

    kernels: `launched.of` the case where it ran; none where only its compilation is known.
    """

    schema_version: Literal[1] = 1
    op: str
    definition: str
    case: str
    gpu: str
    bound: str | None
    share: float | None
    intensity: float | None
    tflops: float | None
    own_bound_us: float | None = None
    own_bound: str | None = None
    checks: list[Check]
    failures: list[str]
    trace: Trace | None = None
    facts: dict[str, Any] = {}
    kernels: str = ""

    def holds(self) -> bool:
        """Whether the case launches what was profiled."""
        case = self.source_case()
        return case is not None and self.kernels == launched.of(case, self.gpu)

    def source_case(self) -> Case | None:
        """The case that was profiled, if there still is one of that name."""
        return {(case.definition, case.name): case for case in all_cases()}.get((self.definition, self.case))

    def findings(self) -> list[Check]:
        """What is beyond its threshold: what fails first, then by what it may gain."""
        found = [check for check in self.checks if check.verdict in ("finding", "failed")]
        return sorted(found, key=lambda c: (c.verdict != "failed", -(c.gain or 0.0)))


@dataclass(frozen=True)
class Facts:
    """Everything known about one case. no_row, no_counters, no_trace: why there is none. row: what was measured.

    kernels: what the compiler said, by launch; no_kernels: why it said nothing. allowed: kernel -> recorded spills.
    shares: share of the bound of the operator's stored cases. fresh: whether the row was measured just now.
    sms: multiprocessors of the chip. machine: GPU, driver and versions it was measured with. graphed: vLLM serves it
    from a CUDA graph.
    """

    kernels: Sequence[Statistics] = ()
    no_kernels: str = ""
    row: Row | None = None
    no_row: str = ""
    launches: Sequence[Launch] = ()
    no_counters: str = ""
    trace: Trace | None = None
    no_trace: str = ""
    ceilings: Ceilings | None = None
    shares: dict[str, float] = field(default_factory=dict)
    allowed: dict[str, int] = field(default_factory=dict)
    fresh: bool = False
    sms: int = 0
    graphed: bool = False
    machine: dict[str, str] = field(default_factory=dict)


@cache
def cases() -> tuple[Case, ...]:
    """One or two cases of every operator: what `profile --all` goes through."""
    known = {(case.definition, case.name): case for case in all_cases()}
    return tuple(known[definition, name] for definition, name in json.loads(RULES.read_text("utf-8"))["cases"])


def name_of(case: Case | Profile) -> str:
    """A profile's file name without its suffix: the definition and the case."""
    definition = case.definition if isinstance(case, Profile) else case.spec.name
    name = case.case if isinstance(case, Profile) else case.name
    return f"{definition}-{name}".replace("/", "-")


def stored(folder: Path) -> list[Profile]:
    """All of a folder, in the order of `cases`: another run, on another card, may have written some."""
    found = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    names = [name for case in cases() if (name := name_of(case)) in found]
    return [found[name] for name in dict.fromkeys([*names, *found])]


@cache
def rules() -> tuple[Rule, ...]:
    """The checklist."""
    rows = json.loads(RULES.read_text(encoding="utf-8"))["rows"]
    return tuple(Rule.model_validate(row) for row in rows)


def checklist(facts: Facts) -> list[Check]:
    """Every rule in its order, for every kernel where it is one of kernels."""
    return _capped([check for rule in rules() for check in _check(rule, facts)], facts.trace)


def failures(facts: Facts, checks: Sequence[Check]) -> list[str]:
    """Why the command ends with 1: fatal findings, and a call that ours did not serve."""
    found = [f"{c.title} of {c.kernel or 'the call'}: {c.why}" for c in checks if c.verdict == "failed"]
    if facts.no_kernels:
        found.append(f"no kernel of ours: {facts.no_kernels}")
    elif not facts.kernels:
        found.append("fall-back: the call launches no Triton kernel")
    if facts.row is not None and facts.row.impls[OURS].us is None:
        found.append(f"ours does not run: {facts.row.impls[OURS].error}")
    return found


def own_bound(facts: Facts) -> tuple[float, str] | None:
    """(µs, what limits) of the launches that were traced; None where something of it was not measured."""
    row, trace, ceilings = facts.row, facts.trace, facts.ceilings
    if row is None or trace is None or ceilings is None or row.bytes is None or row.flops is None or not facts.sms:
        return None
    blocks = [kernel.blocks for kernel in trace.kernels if kernel.threads > 1]  # copies and fills aside
    rates = {"fp8_tflops": ceilings.fp8_tflops, "launch_us": ceilings.launch_us}
    return bounds.own(row.floor_us, row.bytes, row.flops, blocks, sms=facts.sms, **rates)


def profile(case: Case, gpu: str, facts: Facts, command: str) -> Profile:
    """The checklist of a case and what follows from it. command: what was asked for, to repeat it."""
    checks = checklist(facts)
    row = facts.row
    us = row.impls[OURS].us if row else None
    work = (row.flops, row.bytes) if row is not None and row.flops and row.bytes else None
    own = own_bound(facts)
    provenance = {"commit": row.commit, "source": row.source, "date": row.date} if row else {}
    return Profile(
        op=case.spec.op,
        definition=case.spec.name,
        case=case.name,
        gpu=gpu,
        bound=row.bound if row else None,
        share=row.floor_us / us if row and us else None,
        intensity=work[0] / work[1] if work else None,
        tflops=work[0] / us / 1e6 if work and us else None,
        own_bound_us=own[0] if own else None,
        own_bound=own[1] if own else None,
        checks=checks,
        failures=failures(facts, checks),
        trace=facts.trace,
        facts={"command": command, **provenance, **facts.machine},
        kernels=launched.of(case, gpu) if facts.fresh else "",
    )


def judged_again(found: Profile) -> Profile:
    """A stored profile by the rules of today: exceptions of what graphs replay, and what a finding may gain."""
    case, known = found.source_case(), {rule.id: rule for rule in rules()}
    checks = []
    for check in found.checks:
        exceptions = known[check.id].exceptions if check.id in known else {}
        if check.verdict == "finding" and case is not None and case.graphed and "graphed" in exceptions:
            check = check.model_copy(update={"verdict": "excepted", "why": exceptions["graphed"], "gain": None})
        checks.append(check)
    return found.model_copy(update={"checks": _capped(checks, found.trace)})


def _capped(checks: Sequence[Check], trace: Trace | None) -> list[Check]:
    """What concerns one kernel gains no more than the kernel takes."""
    taken: dict[str, float] = {}
    for kernel in trace.kernels if trace else ():
        taken[kernel.name] = taken.get(kernel.name, 0.0) + kernel.us
    whole = sum(taken.values())
    return [
        check
        if check.gain is None or check.kernel not in taken
        else check.model_copy(update={"gain": min(check.gain, taken[check.kernel] / whole)})
        for check in checks
    ]


def _check(rule: Rule, facts: Facts) -> list[Check]:
    made = getattr(_Values(facts), rule.id)()
    return [_judge(rule, facts, *value) for value in made]


Value = tuple[str, float | None, str, str, dict[str, float]]


def _judge(rule: Rule, facts: Facts, kernel: str, value: float | None, how: str, why: str, detail: Any) -> Check:
    verdict: Verdict = "ok"
    gain = None
    bound = facts.row.bound if facts.row else None
    if value is None:
        verdict, why = "not measured", f"not measured: {why}"
    elif rule.only is not None and bound not in (None, rule.only):
        verdict, why = "excepted", f"the case is bound by {bound}"
    else:
        limit = rule.at_most
        if rule.id == "spills" and facts.allowed.get(kernel):
            limit = facts.allowed[kernel]
            why = f"{limit:.0f} B are a recorded allowance"
        if rule.model_copy(update={"at_most": limit}).broken(value):
            trait = next((t for t in _traits(facts, kernel) if t in rule.exceptions), None)
            if trait is not None:
                verdict, why = "excepted", rule.exceptions[trait]
            else:
                verdict = "failed" if rule.fatal else "finding"
                gain, why = _gain(rule, facts), "; ".join(text for text in (rule.advice, why) if text)
    return Check(
        id=rule.id, title=rule.title, kernel=kernel, value=value, unit=rule.unit, threshold=rule.threshold(),
        verdict=verdict, why=why, how=how, gain=gain, detail=detail,
    )  # fmt: skip


def _traits(facts: Facts, kernel: str) -> list[str]:
    mine = [s for s in facts.kernels if kernel in ("", s.kernel)]
    traits = ["tensor"] * any(s.mma for s in mine) + ["tma"] * any(s.tma for s in mine)
    row, ceilings = facts.row, facts.ceilings
    small = row is not None and ceilings is not None and row.floor_us < _SMALL * ceilings.launch_us
    return [*traits, *(["small"] if small else []), *(["graphed"] if facts.graphed else [])]


def _gain(rule: Rule, facts: Facts) -> float | None:
    us = facts.row.impls[OURS].us if facts.row else None
    if facts.row is None or us is None or rule.gain == "none":
        return None
    if rule.gain == "launch":
        overhead = facts.trace.overhead_us if facts.trace else 0.0
        return overhead / (us + overhead)
    return max(0.0, 1.0 - facts.row.floor_us / us)


class _Values:
    """For each rule: (kernel, value, how it was measured, why there is none or what it means, detail)."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.us = facts.row.impls[OURS].us if facts.row else None
        self.names = list(dict.fromkeys(s.kernel for s in facts.kernels)) or [
            launch.kernel for launch in facts.launches
        ]

    def _static(self, read: Any, note: str) -> list[Value]:
        if not self.facts.kernels:
            return [("", None, "compiler", self.facts.no_kernels or "no kernel was launched", {})]
        worst = {name: max(read(s) for s in self.facts.kernels if s.kernel == name) for name in self.names}
        return [(name, float(value), "compiler", note, {}) for name, value in worst.items()]

    def _counter(self, names: tuple[str, ...], combine: Any) -> list[Value]:
        made: list[Value] = []
        for kernel in self.names or [""]:
            found = counters.of(self.facts.launches, kernel)
            known = {name: found[name] for name in names if name in found}
            if len(known) == len(names):
                made.append((kernel, float(combine(*known.values())), "ncu", "", known))
            else:
                lacking = ", ".join(name for name in names if name not in found)
                why = self.facts.no_counters or f"ncu has no {lacking} for it"
                made.append((kernel, None, "ncu", why, {}))
        return made

    def _row(self, value: Any, how: str, why: str = "", **detail: float) -> list[Value]:
        if self.us is None:
            error = self.facts.row.impls[OURS].error if self.facts.row else self.facts.no_row
            return [("", None, how, error or "no time", {})]
        return [("", value, how, why, detail)]

    def duration(self) -> list[Value]:
        impl = self.facts.row.impls[OURS] if self.facts.row else None
        told = {} if impl is None or impl.p10 is None or impl.p90 is None else {"p10": impl.p10, "p90": impl.p90}
        source = "CUDA-graph replay" if self.facts.fresh else "CUDA-graph replay, stored"
        return self._row(self.us, source, f"n={impl.n}" if impl else "", **told)

    def occupancy(self) -> list[Value]:
        return self._counter(("occupancy_pct",), lambda x: x)

    def registers(self) -> list[Value]:
        return self._static(lambda s: s.registers, "")

    def shared(self) -> list[Value]:
        return self._static(lambda s: s.shared, "")

    def spills(self) -> list[Value]:
        """Of the compiler; where ncu counted accesses to local memory they stand beside it."""
        return [
            (kernel, value, how, why, {name: found[name] for name in ("local_loads", "local_stores") if name in found})
            for kernel, value, how, why, _ in self._static(lambda s: s.stack, "")
            for found in [counters.of(self.facts.launches, kernel)]
        ]

    def tensor(self) -> list[Value]:
        return self._counter(("tensor_pct",), lambda x: x)

    def memory(self) -> list[Value]:
        row, ceilings = self.facts.row, self.facts.ceilings
        if self.us is None or row is None or row.bytes is None or ceilings is None:
            return self._row(None, "bytes / duration", "the row is of an early run and has no bytes")
        share = 100.0 * row.bytes / self.us / 1e6 / ceilings.copy_tbps
        moved = [counters.dram_bytes(launch) for launch in self.facts.launches]
        counted = {"DRAM bytes by ncu": sum(x for x in moved if x is not None)} if moved and None not in moved else {}
        how = "least bytes / duration, against a large copy"
        return self._row(share, how, "", **{"least bytes": float(row.bytes), **counted})

    def l2(self) -> list[Value]:
        return self._counter(("l2_hit_pct",), lambda x: x)

    def loads(self) -> list[Value]:
        return self._counter(("load_efficiency_pct", "store_efficiency_pct"), min)

    def divergence(self) -> list[Value]:
        return self._counter(("threads_per_instruction",), lambda x: x)

    def mix(self) -> list[Value]:
        made: list[Value] = []
        for kernel in self.names or [""]:
            found = {k: v for k, v in counters.of(self.facts.launches, kernel).items() if k.startswith("pipe_")}
            loop = max((s.mma_loop for s in self.facts.kernels if s.kernel == kernel), default=0)
            size = max((s.instructions for s in self.facts.kernels if s.kernel == kernel), default=0)
            static = {"instructions": float(size), "in the MMA loop": float(loop)} if size else {}
            if found or static:
                made.append(
                    (kernel, float(size) if size else None, "ncu --deep" if found else "SASS", "", found or static)
                )
            else:
                made.append((kernel, None, "ncu --deep", self.facts.no_counters or "only with --deep", {}))
        return made

    def launch(self) -> list[Value]:
        trace, how = self.facts.trace, "host time of an eager call minus its kernels' time by CUPTI (torch.profiler)"
        if trace is None:
            return [("", None, how, self.facts.no_trace or "no trace was taken", {})]
        count = len(trace.kernels)
        told = {
            "launches": count,
            "host µs a launch": trace.host_us / count,
            "kernels µs": trace.busy_us,
            "launch function µs": trace.launch_us,
            "gap µs, eager": trace.gap_us,
            "gap µs, in a graph": trace.graph_gap_us,
        }
        known = {name: float(value) for name, value in told.items() if value is not None}
        return [("", trace.overhead_us, how, f"no graph: {trace.no_graph}" if trace.no_graph else "", known)]

    def bound(self) -> list[Value]:
        row, own = self.facts.row, own_bound(self.facts)
        if self.us is None or row is None:
            return self._row(None, "floor / duration")
        told = {"floor µs": row.floor_us, **({f"bound of its launches µs ({own[1]})": own[0]} if own else {})}
        return self._row(100.0 * row.floor_us / self.us, f"{row.bound} floor / duration", "", **told)

    def spread(self) -> list[Value]:
        if not self.facts.shares:
            return [("", None, "stored results", "no results of this operator are stored for this GPU", {})]
        worst = min(self.facts.shares, key=lambda name: self.facts.shares[name])
        note = f"the worst of {len(self.facts.shares)} cases is {worst}"
        return [("", 100.0 * self.facts.shares[worst], "stored results", note, {})]


def read(path: Path) -> Profile:
    """Raises: TableError naming the file."""
    try:
        return Profile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise TableError(f"{path}: not a profile: {str(error).splitlines()[0]}; write one with --output") from None


def differences(now: Profile, then: Profile) -> tuple[list[str], list[str]]:
    """(what changed by more than 1 %, what of it is a regression of the share of the bound)."""
    before = {(check.id, check.kernel): check.value for check in then.checks}
    changed = []
    for check in now.checks:
        old = before.get((check.id, check.kernel))
        if check.value is None or old is None or abs(check.value - old) <= 0.01 * max(abs(old), 1e-9):
            continue
        where = f" of {check.kernel}" if check.kernel else ""
        changed.append(f"{check.title}{where}: {old:,.2f} -> {check.value:,.2f} {check.unit}".rstrip())
    lost = []
    if now.share is not None and then.share is not None and now.share < (1 - REGRESSION) * then.share:
        lost.append(f"share of the bound fell from {then.share:.1%} to {now.share:.1%}")
    return changed, lost
