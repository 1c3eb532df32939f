"""Plugin over stock: every figure at every rate, with paired bootstrap intervals and a verdict."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from blackwell_kernels.e2e import metrics, stats
from blackwell_kernels.e2e.stats import Sample, Share

ARMS = ("stock", "plugin")


class Pool:
    """The same rate, measured in several runs of one arm, over a list of (run, session) that both arms share."""

    def __init__(self, runs: dict[int, metrics.Run], keys: dict[tuple[int, str], int]) -> None:
        self.runs, self.keys = runs, keys
        self.places = {
            number: np.array([keys[number, key] for key in run.keys], dtype=np.int64) for number, run in runs.items()
        }

    def sample(self, column: str) -> Sample:
        """A latency by session."""
        parts = [(run.sample(column), self.places[number]) for number, run in self.runs.items()]
        values = np.concatenate([part.values for part, _ in parts])
        return Sample.of(values, np.concatenate([places[part.owners] for part, places in parts]))

    def turn_goodput(self) -> Share:
        """Good turns over judged turns."""
        return self._share(lambda run: run.turn_goodput())

    def session_goodput(self) -> Share:
        """Sessions without a bad turn over sessions with a judged turn."""
        return self._share(lambda run: run.session_goodput())

    def throughput(self, which: str = "output") -> Share:
        """Tokens per second of measured time."""
        above = self._share(lambda run: run.throughput(which)).above
        return Share(above, sum(run.seconds for run in self.runs.values()))

    def _share(self, of: Any) -> Share:
        above, below = np.zeros(len(self.keys)), np.zeros(len(self.keys))
        for number, run in self.runs.items():
            share, places = of(run), self.places[number]
            above[places] += share.above
            below[places] += share.below if isinstance(share.below, np.ndarray) else 0.0
        return Share(above, below)


def compare(stock: dict[int, metrics.Run], plugin: dict[int, metrics.Run]) -> dict[str, dict[str, Any]]:
    """Each of metrics.FIGURES at one rate, from the runs (by number) that both arms have.

    Rows: stock, plugin, their intervals and n, ratio = plugin / stock, its interval, by run, and `noise`: the same
    figure of two runs of one arm, over each other. Resamples draw the same runs and sessions for both arms: they
    played the same traffic.
    """
    both = sorted(stock.keys() & plugin.keys())
    names = [(number, key) for number in both for key in np.union1d(stock[number].keys, plugin[number].keys).tolist()]
    if not names:
        return {}
    keys = {name: place for place, name in enumerate(names)}
    pools = {"stock": Pool({n: stock[n] for n in both}, keys), "plugin": Pool({n: plugin[n] for n in both}, keys)}
    runs, sessions = np.array([number for number, _ in names]), np.array([key for _, key in names])
    return {key: _row(key, pools, runs, sessions) for key in metrics.FIGURES}


def _row(key: str, pools: dict[str, Pool], runs: np.ndarray, sessions: np.ndarray) -> dict[str, Any]:
    made = {arm: metrics.figure(pool, key) for arm, pool in pools.items()}
    n = {arm: size for arm, (_, size) in made.items()}
    p = metrics.FIGURES[key][1]
    if p is None:
        n = {arm: len(np.unique(sessions)) for arm in ARMS}

    def ratio(weights: np.ndarray) -> float:
        below = made["stock"][0](weights)
        return made["plugin"][0](weights) / below if below > 0 else float("nan")

    whole = ratio(np.ones(len(runs)))
    # without a figure for the whole there is no interval of it either
    between = None if np.isnan(whole) else stats.interval(ratio, runs, sessions=sessions, size=sum(n.values()))
    single = [(runs == run).astype(float) for run in np.unique(runs)]
    by_run = [value for value in map(ratio, single) if value > 0]
    noise = [
        a / b
        for function, _ in made.values()
        for a, b in combinations([function(weights) for weights in single], 2)
        if a > 0 and b > 0
    ]
    better = key in metrics.HIGHER_IS_BETTER
    decided = stats.verdict(between, by_run, noise, lower_is_better=not better)
    return {
        **{arm: _number(made[arm][0](np.ones(len(runs)))) for arm in ARMS},
        **{f"{arm}_interval": stats.interval(made[arm][0], runs, sessions=sessions, size=n[arm]) for arm in ARMS},
        **{f"{arm}_n": int(n[arm]) for arm in ARMS},
        "ratio": _number(whole),
        "interval": between,
        "by_run": by_run,
        "noise": noise,
        "higher_is_better": better,
        "verdict": decided if stats.enough(min(n.values()), p) else "n too small",
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
