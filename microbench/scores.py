"""What a set of rows comes to: ratios per operator, the contest's score, the best published latencies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from blackwell_kernels.microbench.cases import all_cases
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Row, Timer, best_peer, ratio
from blackwell_kernels.microbench.specs import OPS, SPECS
from blackwell_kernels.microbench.timing import quantile

PUBLISHED = Path(__file__).with_name("published.json")
CLEAR = 1.05
Baseline = Literal["stock", "best_peer"]


@dataclass(frozen=True)
class Ratios:
    """Theirs / ours over cases that have both: 2 is twice as fast. win: share of cases above 1, clear: above 1.05."""

    n: int
    median: float
    geomean: float
    worst: float
    worst_case: str
    win: float
    clear: float


@dataclass(frozen=True)
class Score:
    """One operator. cases: how many rows; timed: how many of them ours has a time for. stock_fib: against stock by
    FlashInfer-Bench's timing. share: the floor over ours, median and worst. peak_bytes: the most memory ours allocated
    in any call. accuracy: its largest error.
    """

    op: str
    cases: int
    timed: int
    stock: Ratios | None
    peer: Ratios | None
    stock_fib: Ratios | None
    share: float | None
    share_worst: float | None
    peak_bytes: int | None
    peer_peak_bytes: int | None
    accuracy: float | None

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def ratios(pairs: Iterable[tuple[str, float | None]]) -> Ratios | None:
    """Of (case, ratio); None where no case has a ratio."""
    known = [(case, value) for case, value in pairs if value is not None]
    if not known:
        return None
    values = [value for _, value in known]
    worst_case, worst = min(known, key=lambda pair: pair[1])
    return Ratios(
        n=len(values),
        median=quantile(values, 0.5),
        geomean=math.exp(sum(map(math.log, values)) / len(values)),
        worst=worst,
        worst_case=worst_case,
        win=sum(value > 1.0 for value in values) / len(values),
        clear=sum(value > CLEAR for value in values) / len(values),
    )


def score(op: str, rows: list[Row]) -> Score:
    """Of the rows of one operator."""
    ours = [row.impls[OURS] for row in rows]
    shares = [row.floor_us / impl.us for row, impl in zip(rows, ours, strict=True) if impl.us is not None]
    peaks = [impl.peak_bytes for impl in ours if impl.peak_bytes is not None]
    others = [row.impls[row.best_peer].peak_bytes for row in rows if row.best_peer]
    errors = [impl.accuracy for impl in ours if impl.accuracy is not None]
    return Score(
        op=op,
        cases=len(rows),
        timed=len(shares),
        stock=ratios((_name(row), row.ratio_stock) for row in rows),
        peer=ratios((_name(row), row.ratio_best_peer) for row in rows),
        stock_fib=ratios((_name(row), ratio(row.impls, row.stock, "fib_us")) for row in rows),
        share=quantile(shares, 0.5) if shares else None,
        share_worst=min(shares, default=None),
        peak_bytes=max(peaks, default=None),
        peer_peak_bytes=max((peak for peak in others if peak is not None), default=None),
        accuracy=max(errors, default=None),
    )


def by_op(rows: Iterable[Row]) -> list[Score]:
    """One score for every operator there is, in the project's order; those without a row say so by their zeros."""
    rows = list(rows)
    return [score(op, [row for row in rows if row.op == op]) for op in OPS]


@dataclass(frozen=True)
class PeerScore:
    """One peer of an operator, over the rows that name it. ratios: peer / ours by graph replays.

    fastest: rows in which no peer is faster; faster: than ours; flagged: less accurate than ours may be. not_set_up:
    rows without a time for want of a package, a compilation, a search, or by choice; no_time: for any other reason.
    """

    op: str
    name: str
    cases: int
    ratios: Ratios | None
    fastest: int
    faster: int
    flagged: int
    not_set_up: int
    no_time: int

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def peers(rows: Iterable[Row]) -> list[PeerScore]:
    """Every peer of every operator: operators in the project's order, peers in that of the rows."""
    rows = list(rows)
    named = {op: dict.fromkeys(name for row in rows if row.op == op for name in row.impls) for op in OPS}
    return [_peer(op, name, rows) for op, names in named.items() for name in names if name != OURS]


def _peer(op: str, name: str, rows: list[Row]) -> PeerScore:
    mine = [row for row in rows if row.op == op and name in row.impls]
    impls = [row.impls[name] for row in mine]
    compared = [(_name(row), ratio(row.impls, name)) for row in mine]
    return PeerScore(
        op=op,
        name=name,
        cases=len(mine),
        ratios=ratios(compared),
        fastest=sum(row.best_peer == name for row in mine),
        faster=sum(value is not None and value < 1.0 for _, value in compared),
        flagged=sum(impl.flag is not None for impl in impls),
        not_set_up=sum(not impl.set_up for impl in impls),
        no_time=sum(impl.us is None and impl.set_up for impl in impls),
    )


@dataclass(frozen=True)
class Verdicts:
    """Of n rows with both timings of ours and stock: in how many ours is ahead by each, in how many they disagree."""

    n: int
    graph: int
    fib: int
    apart: int


def verdicts(rows: Iterable[Row]) -> Verdicts:
    """Graph replays against FlashInfer-Bench's timing."""
    pairs = [(ratio(row.impls, row.stock), ratio(row.impls, row.stock, "fib_us")) for row in rows]
    ahead = [(graph > 1.0, fib > 1.0) for graph, fib in pairs if graph is not None and fib is not None]
    return Verdicts(
        n=len(ahead),
        graph=sum(graph for graph, _ in ahead),
        fib=sum(fib for _, fib in ahead),
        apart=sum(graph != fib for graph, fib in ahead),
    )


def contests(rows: Iterable[Row]) -> dict[Baseline, dict[Timer, dict[str, float | None]]]:
    """The contest's score against each baseline by each timing."""
    rows, timers = list(rows), get_args(Timer)
    return {baseline: {by: contest(rows, baseline, by) for by in timers} for baseline in get_args(Baseline)}


def contest(rows: Iterable[Row], baseline: Baseline = "stock", by: Timer = "us") -> dict[str, float | None]:
    """Contest definition -> mean over its workloads of baseline / ours, 0 where ours fails on any; `overall`: the mean.

    Where stock has no time the fastest peer stands in for it. None: a workload is not measured, or has no baseline. A
    shape that the contest has several times counts as often.
    """
    measured = {(row.definition, row.case): row for row in rows}
    made: dict[str, float | None] = {}
    for name in (name for name, spec in SPECS.items() if "contest" in spec.tags):
        cases = [case for case in all_cases() if case.definition == name and case.set == "contest"]
        found = [(case.count, measured.get((name, case.name))) for case in cases]
        made[name] = _contest_score(found, baseline, by)
    known = [value for value in made.values() if value is not None]
    overall = sum(known) / len(known) if len(known) == len(made) else None
    return {**made, "overall": overall}


def _contest_score(found: list[tuple[int, Row | None]], baseline: Baseline, by: Timer) -> float | None:
    total = weight = 0.0
    for count, row in found:
        if row is None:
            return None
        if row.impls[OURS].us is None:
            return 0.0
        standard = ratio(row.impls, row.stock, by) if baseline == "stock" else None
        value = standard or ratio(row.impls, best_peer(row.impls, by), by)
        if value is None:
            return None
        total, weight = total + count * value, weight + count
    return total / weight


@cache
def _published() -> dict[tuple[str, str], float]:
    found = {}
    for name, entry in json.loads(PUBLISHED.read_text(encoding="utf-8"))["definitions"].items():
        for *shape, us in entry["us"]:
            case = "/".join(["contest", *(f"{axis}={n}" for axis, n in zip(entry["axes"], shape, strict=True))])
            found[name, case] = float(us)
    return found


def published_us(row: Row) -> float | None:
    """The best published B200 latency of a contest workload in µs, None for other cases."""
    return _published().get((row.definition, row.case))


def _name(row: Row) -> str:
    return f"{row.definition} {row.case}"
