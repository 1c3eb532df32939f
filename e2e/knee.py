"""The largest rate a server keeps up with: found by doubling, then by halving the gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

GOODPUT = 0.9  # of the turns must be within the SLO
GROWTH = 0.25  # of what more load would bring if nothing were full: less, and throughput no longer grows
FACTOR = 2.0
FEWEST, MOST = 1 / 64, 1024.0  # sessions per second


@dataclass(frozen=True)
class Reading:
    """What one rate gave: share of turns within the SLO (None: nothing to judge), output tokens per second."""

    rate: float
    goodput: float | None
    tokens_per_s: float | None

    def keeps_up(self, below: Reading | None) -> bool:
        """Whether it meets the goodput, and throughput still grew since the next lower rate."""
        if self.goodput is None or not self.tokens_per_s or self.goodput < GOODPUT:
            return False
        if below is None or not below.tokens_per_s:
            return True
        return self.tokens_per_s >= below.tokens_per_s * (1 + GROWTH * (self.rate / below.rate - 1))


def search(measure: Callable[[float], Reading], first: float = 0.25, halvings: int = 2) -> dict[str, Any]:
    """{knee, readings, why}: the knee is None when no rate keeps up.

    Doubles from `first` while the server keeps up (or goes down until it does), then halves the gap, geometrically,
    `halvings` times. Each rate is measured once.
    """
    readings: dict[float, Reading] = {}

    def good(rate: float) -> bool:
        if rate not in readings:
            readings[rate] = measure(rate)
        lower = max((r for r in readings if r < rate and readings[r].keeps_up(None)), default=None)
        return readings[rate].keeps_up(readings[lower] if lower is not None else None)

    low, high = first, first
    while not good(low) and low / FACTOR >= FEWEST:
        high, low = low, low / FACTOR
    if not good(low):
        return _result(None, readings, f"even {low:g} sessions/s miss the SLO in more than {1 - GOODPUT:.0%} of turns")
    if high == low:
        high = low * FACTOR
        while high <= MOST and good(high):
            low, high = high, high * FACTOR
        if high > MOST:
            return _result(low, readings, f"{low:g} sessions/s is as far as the search goes")
    for _ in range(halvings):
        middle = float(f"{math.sqrt(low * high):.3g}")
        low, high = (middle, high) if good(middle) else (low, middle)
    return _result(low, readings, f"{high:g} sessions/s no longer keeps up")


def around(knee: float) -> list[float]:
    """Three load points up to the knee, where latency is told apart, and one far beyond it: only there do tokens/s say
    what a server can do, for up to the knee it answers what is asked."""
    return [float(f"{knee * share:.3g}") for share in (0.5, 0.75, 1.0, 2.0)]


def _result(knee: float | None, readings: dict[float, Reading], why: str) -> dict[str, Any]:
    return {"knee": knee, "why": why, "readings": [asdict(readings[rate]) for rate in sorted(readings)]}
