"""Percentiles with their n, and bootstrap intervals that resample whole sessions.

Requests of one session share its context and its luck: resampling requests as if they were independent makes
intervals too narrow. A resample draws sessions with replacement (after drawing runs, where there are several) and
takes all of their requests with them. Percentiles are numpy's (linear between order statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99, 99.9)
# below this many values a percentile is not given: fewer than ten would lie beyond it
NEEDED = {99.9: 10_000}
RESAMPLES = 1000
WORK = 40_000_000  # values looked at for one interval: larger samples get fewer resamples, never fewer than 100
LEVEL = 95


def name(p: float) -> str:
    """The key of a percentile: p50, p99.9."""
    return f"p{p:g}"


def distribution(values: Iterable[float]) -> dict[str, Any]:
    """n, mean, percentiles and max. None: there is no value, or n is too small for that percentile."""
    x = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, dtype=np.float64)
    x = x[~np.isnan(x)]
    if x.size == 0:
        return {"n": 0, "mean": None, **dict.fromkeys(map(name, PERCENTILES)), "max": None}
    found = dict(zip(map(name, PERCENTILES), np.percentile(x, PERCENTILES).tolist(), strict=True))
    found |= {name(p): None for p, n in NEEDED.items() if x.size < n}
    return {"n": int(x.size), "mean": float(x.mean()), **found, "max": float(x.max())}


@dataclass(frozen=True)
class Sample:
    """Values and the session (0 ... n-1) that each belongs to; sorted by value on creation through `of`."""

    values: np.ndarray
    owners: np.ndarray

    @classmethod
    def of(cls, values: Any, owners: Any) -> Sample:
        """From parallel sequences; NaN is left out."""
        v, o = np.asarray(values, dtype=np.float64), np.asarray(owners, dtype=np.int64)
        keep = ~np.isnan(v)
        order = np.argsort(v[keep], kind="stable")
        return cls(v[keep][order], o[keep][order])

    def percentile(self, p: float, weights: np.ndarray | None = None) -> float:
        """The percentile when session s counts weights[s] (whole) times; NaN when n is too small or nothing is left."""
        if self.values.size < max(1, NEEDED.get(p, 1)):
            return float("nan")
        if weights is None:
            return float(np.percentile(self.values, p))
        reach = np.cumsum(weights[self.owners])
        if reach[-1] < 1:
            return float("nan")
        place = (reach[-1] - 1) * p / 100
        low, high = self.values[np.searchsorted(reach, [np.floor(place), np.ceil(place)], side="right")]
        return float(low + (high - low) * (place - np.floor(place)))


@dataclass(frozen=True)
class Share:
    """A ratio of sums over sessions: tokens per second, a goodput. `below` may be one number (seconds)."""

    above: np.ndarray
    below: np.ndarray | float

    def value(self, weights: np.ndarray | None = None) -> float:
        """The ratio when session s counts weights[s] times; NaN without a denominator."""
        w = np.ones(len(self.above)) if weights is None else weights
        below = float((self.below * w).sum()) if isinstance(self.below, np.ndarray) else self.below
        return float((self.above * w).sum()) / below if below > 0 else float("nan")


def draws(runs: np.ndarray, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Weights [sessions] of each resample. `runs[s]` is the run that session s belongs to.

    With several runs, runs are drawn first: what differs between restarts is part of the spread.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(runs == run) for run in np.unique(runs)]
    for _ in range(resamples):
        weights = np.zeros(len(runs))
        for run, times in enumerate(np.bincount(rng.integers(len(members), size=len(members)), minlength=len(members))):
            own = members[run]
            weights[own] += np.bincount(rng.integers(len(own), size=times * len(own)), minlength=len(own))
        yield weights


def interval(
    figure: Callable[[np.ndarray], float], runs: np.ndarray, *, size: int = 1, seed: int = 0
) -> tuple[float, float] | None:
    """The 95 % percentile-bootstrap interval of a figure of the weights; None with fewer than two sessions.

    `size` is how many values one evaluation looks at.
    """
    if len(runs) < 2:
        return None
    resamples = int(np.clip(WORK / max(1, size), 100, RESAMPLES))
    found = np.array([figure(weights) for weights in draws(runs, resamples, seed)])
    found = found[~np.isnan(found)]
    if found.size < resamples / 2:
        return None
    low, high = np.percentile(found, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def verdict(between: tuple[float, float] | None, *, lower_is_better: bool) -> str:
    """What the interval of a ratio (ours / theirs) says: gain, loss, no difference, or unknown without one."""
    if between is None:
        return "unknown"
    low, high = between
    if low <= 1 <= high:
        return "no difference"
    return "gain" if (high < 1) == lower_is_better else "loss"
