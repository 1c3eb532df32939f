"""Timing that a sceptic can redo: CUDA-graph replays over rotated buffers, implementations taking turns in one run.

A sample is the time of one replay divided by the calls in it, so launch gaps of the host are not in it. The engine is
behind an interface: everything but the two engines is tested without a GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

Call = Callable[[], Any]
Method = Literal["graph", "eager"]
# long enough that an event's own cost (about 2 µs) vanishes, short enough for 15 turns of six implementations
TARGET_US = 400.0
MAX_CALLS = 256


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Timing:
    """Samples of one implementation in µs a call, and how they were taken: `graph` or `eager`."""

    samples_us: tuple[float, ...]
    method: Method

    @property
    def us(self) -> float:
        """Median."""
        return quantile(self.samples_us, 0.5)

    @property
    def p10(self) -> float:
        """10th percentile."""
        return quantile(self.samples_us, 0.1)

    @property
    def p90(self) -> float:
        """90th percentile."""
        return quantile(self.samples_us, 0.9)


class Engine(Protocol):
    """Turns a list of calls, one for each rotated input set, into something that gives one sample at a time."""

    method: Method

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Capture the calls; the result runs them once and returns µs a call."""


def measure(
    engines: Sequence[Engine],
    bound: Mapping[str, Sequence[Call]],
    rounds: int,
    warmup: int = 3,
    on_turn: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing | str]:
    """Timing of each implementation, or why it has none. Implementations take turns, and who goes first changes.

    engines: tried in order; the first that can prepare an implementation's calls times it. on_turn: told whose turn it
    is, so that a hang has a culprit.
    """
    results: dict[str, Timing | str] = {}
    samplers: dict[str, tuple[Callable[[], float], Method]] = {}
    for name, calls in bound.items():
        problems = []
        on_turn(name)
        for engine in engines:
            try:
                sampler = engine.prepare(calls)
                for _ in range(warmup):
                    sampler()
                samplers[name] = (sampler, engine.method)
                break
            except Exception as error:
                problems.append(f"{engine.method}: {type(error).__name__}: {error}")
        else:
            results[name] = "; ".join(problems)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order = list(samplers)
    for turn in range(rounds):
        shift = turn % max(1, len(order))
        for name in order[shift:] + order[:shift]:
            on_turn(name)
            samples[name].append(samplers[name][0]())
    results |= {name: Timing(tuple(samples[name]), samplers[name][1]) for name in order}
    return {name: results[name] for name in bound}


def host_us(call: Call, synchronize: Callable[[], None]) -> float:
    """µs until an eager call returns, nothing queued before it: Python and launches, and the device only where the call
    waits for it."""
    synchronize()
    start = time.perf_counter_ns()
    kept = call()  # to be freed after the clock was read
    us = (time.perf_counter_ns() - start) / 1000.0
    del kept
    return us


def repeats(calls: int, us_of_all: float) -> int:
    """How often the whole list of calls goes into one graph so that a replay takes about TARGET_US."""
    wanted = math.ceil(TARGET_US / max(us_of_all, 1e-3))
    return max(1, min(wanted, MAX_CALLS // max(1, calls)))


class GraphEngine:
    """Captures the calls in a CUDA graph and times replays with events."""

    method: Method = "graph"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Capture once to learn the duration, then with as many repeats as make a replay long enough."""
        sample = self._capture(calls)
        sample()
        again = repeats(len(calls), sample() * len(calls))
        return sample if again == 1 else self._capture(list(calls) * again)

    def _capture(self, calls: Sequence[Call]) -> Callable[[], float]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        distinct = len(set(map(id, calls)))
        outputs = []
        with torch.cuda.graph(graph):
            for i, call in enumerate(calls):
                out = call()
                if i < distinct:  # kept alive, so that rotated calls do not all write one warm buffer
                    outputs.append(out)
        torch.cuda.synchronize(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample(kept: Any = outputs) -> float:
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1000.0 / len(calls)

        return sample


class EagerEngine:
    """For calls that cannot be captured: the same loop without a graph, so host launches count."""

    method: Method = "eager"

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Run all calls once per sample."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            torch.cuda.synchronize(self.device)
            start.record()
            for call in calls:
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1000.0 / len(calls)

        sample()
        return sample
