"""The bounds model against what was measured: no time may lie below its floor, and how far above they lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.profiling import Profile
from blackwell_kernels.microbench.results import Row
from blackwell_kernels.microbench.specs import OPS
from blackwell_kernels.microbench.timing import quantile

# how much faster than its floor a kernel may be, by what bounds it. Memory's ceiling is a copy's, and a copy turns the
# bus around: streams of weights, which only read, were up to 3.2 % faster on an H200 (1,520 of 1,568 µs, 4.43 TB/s
# where a copy has 4.3 and the data sheet 4.8). A launch's is the smallest plain kernel's: one launched while the kernel
# before it ends was 7 % faster (1.06 of 1.14)
FASTER = {"memory": 1.05, "launch": 1.08}

HEAD = ["operator", "cases", "bound by", "ours: worst", "median", "best", "any implementation: median", "best"]


@dataclass(frozen=True)
class Shares:
    """One operator's floor over times: of ours, and of the fastest implementation of each case. 1 is the floor."""

    op: str
    cases: int
    bounds: dict[str, int]
    ours: tuple[float, ...]
    fastest: tuple[float, ...]

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def cells(self) -> list[str]:
        """A line under `HEAD`."""
        if not self.fastest:
            return [self.op, "not measured", *["–"] * (len(HEAD) - 2)]
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.bounds.items()))
        ours = [f"{quantile(self.ours, q):.0%}" for q in (0.0, 0.5, 1.0)] if self.ours else ["–"] * 3
        return [
            self.op, str(self.cases), kinds, *ours, f"{quantile(self.fastest, 0.5):.0%}", f"{max(self.fastest):.0%}",
        ]  # fmt: skip


def shares(rows: Iterable[Row]) -> list[Shares]:
    """One entry for every operator there is, measured or not."""
    rows = list(rows)
    made = []
    for op in OPS:
        mine = [row for row in rows if row.op == op]
        times = [[impl.us for impl in row.impls.values() if impl.us is not None] for row in mine]
        ours = [row.floor_us / us for row in mine if (us := row.impls[OURS].us) is not None]
        fastest = [row.floor_us / min(some) for row, some in zip(mine, times, strict=True) if some]
        made.append(Shares(op, len(mine), dict(Counter(row.bound for row in mine)), tuple(ours), tuple(fastest)))
    return made


def below(rows: Iterable[Row]) -> list[str]:
    """One message for each time below its floor, ours or a peer's: then the model is wrong, or the work not done.

    By so much that it is not `FASTER`.
    """
    return [
        f"{row.definition} {row.case}, {name}: {impl.us:.2f} µs, below the floor of {row.floor_us:.2f} µs ({row.bound})"
        for row in rows
        for name, impl in row.impls.items()
        if impl.us is not None and impl.us < row.floor_us / FASTER.get(row.bound, 1.0)
    ]


def below_their_launches(profiles: Sequence[Profile]) -> list[str]:
    """The same for profiles, whose bound also counts the launches and the multiprocessors their grids can fill."""
    found = []
    for profile in profiles:
        us = next((check.value for check in profile.checks if check.id == "duration"), None)
        needed = profile.own_bound_us
        if us is not None and needed is not None and us < needed:
            where, limit = f"{profile.definition} {profile.case}", profile.own_bound
            found.append(f"{where}: {us:.2f} µs, below the {needed:.2f} µs that its own launches need ({limit})")
    return found
