"""Percentiles with their n, and bootstrap intervals that resample whole sessions.

Requests of one session share its context and its luck: resampling requests as if they were independent makes
intervals too narrow. A resample draws sessions with replacement (and runs, where there are several) and takes all of
their requests with them. Percentiles are numpy's (linear between order statistics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 95, 99, 99.9)
# below this many values a percentile is not given: fewer than ten would lie beyond it
NEEDED = {99.9: 10_000}
RESAMPLES = 1000
WORK = 40_000_000  # values looked at for one interval: larger samples get fewer resamples, never fewer than 100
LEVEL = 95
MATERIAL = 0.01  # smaller differences are none: many figures are compared, and a server is restarted in between


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


def draws(runs: np.ndarray, resamples: int, seed: int = 0, sessions: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """Weights [n] of each resample of n pairs (runs[i], sessions[i]); without `sessions` each pair is its own.

    Runs and sessions are drawn with replacement, independently: a session counts as often as it was drawn, in every
    run as often as that was. What differs between restarts and between sessions are both part of the spread.
    """
    rng = np.random.default_rng(seed)
    _, run = np.unique(runs, return_inverse=True)
    _, session = np.unique(np.arange(len(runs)) if sessions is None else sessions, return_inverse=True)
    n_runs, n_sessions = run.max() + 1, session.max() + 1
    for _ in range(resamples):
        of_run = np.bincount(rng.integers(n_runs, size=n_runs), minlength=n_runs)
        of_session = np.bincount(rng.integers(n_sessions, size=n_sessions), minlength=n_sessions)
        yield (of_run[run] * of_session[session]).astype(float)


def interval(
    figure: Callable[[np.ndarray], float],
    runs: np.ndarray,
    *,
    sessions: np.ndarray | None = None,
    size: int = 1,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The 95 % percentile-bootstrap interval of a figure of the weights; None with fewer than two sessions.

    `size` is how many values one evaluation looks at.
    """
    if len(runs if sessions is None else np.unique(sessions)) < 2:
        return None
    resamples = int(np.clip(WORK / max(1, size), 100, RESAMPLES))
    found = np.array([figure(weights) for weights in draws(runs, resamples, seed, sessions)])
    found = found[~np.isnan(found)]
    if found.size < resamples / 2:
        return None
    low, high = np.percentile(found, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def enough(n: int, p: float | None) -> bool:
    """Whether n values say something about a percentile (ten beyond it) or, for a ratio of sums, n sessions do."""
    return n >= 10 if p is None else n * (100 - p) / 100 >= 10 - 1e-9


def verdict(
    between: tuple[float, float] | None,
    by_run: Sequence[float],
    noise: Sequence[float] = (),
    *,
    lower_is_better: bool,
) -> str:
    """What a ratio (ours / theirs) says: gain, loss, no difference, or unknown without an interval.

    A difference must show in its interval, in the same direction in every run (`by_run`), be larger than 1 %, and
    larger than what two runs of one and the same arm differed by (`noise`): figures are many, and some intervals miss
    1 by chance.
    """
    if between is None or not by_run:
        return "unknown"
    low, high = between
    up = low > 1 and min(by_run) > 1
    if not up and not (high < 1 and max(by_run) < 1):
        return "no difference"
    middle = abs(float(np.mean(np.log(by_run))))
    if middle <= max(MATERIAL, *np.abs(np.log(noise)), 0.0):
        return "no difference"
    return "loss" if up == lower_is_better else "gain"
