"""What a set of rows comes to: ratios per operator, the contest's score, the best published latencies."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from blackwell_kernels.microbench.cases import all_cases
from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.results import Row
from blackwell_kernels.microbench.specs import OPS, SPECS
from blackwell_kernels.microbench.timing import quantile

PUBLISHED = Path(__file__).with_name("published.json")
CLEAR = 1.05


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
    """One operator. cases: how many rows; timed: how many of them ours has a time for. share: the floor over ours,
    median and worst. peak_bytes: the most memory ours allocated in any call. accuracy: its largest error."""

    op: str
    cases: int
    timed: int
    stock: Ratios | None
    peer: Ratios | None
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
    known = [(case, ratio) for case, ratio in pairs if ratio is not None]
    if not known:
        return None
    values = [ratio for _, ratio in known]
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


def contest(rows: Iterable[Row]) -> dict[str, float | None]:
    """Contest definition -> mean over its workloads of baseline / ours, 0 where ours fails on any; `overall`: the mean.

    The baseline is stock, or where that has no time the fastest peer. None: a workload is not measured, or has no
    baseline. A shape that the contest has several times counts as often.
    """
    measured = {(row.definition, row.case): row for row in rows}
    made: dict[str, float | None] = {}
    for name in (name for name, spec in SPECS.items() if "contest" in spec.tags):
        cases = [case for case in all_cases() if case.definition == name and case.set == "contest"]
        found = [(case.count, measured.get((name, case.name))) for case in cases]
        made[name] = _contest_score([(count, row) for count, row in found])
    known = [value for value in made.values() if value is not None]
    overall = sum(known) / len(known) if len(known) == len(made) else None
    return {**made, "overall": overall}


def _contest_score(found: list[tuple[int, Row | None]]) -> float | None:
    total = weight = 0.0
    for count, row in found:
        if row is None:
            return None
        if row.impls[OURS].us is None:
            return 0.0
        ratio = row.ratio_stock or row.ratio_best_peer
        if ratio is None:
            return None
        total, weight = total + count * ratio, weight + count
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
