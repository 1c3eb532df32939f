"""What the host did while a step's kernels did not run: from a profiler's trace, by the host's own events.

The device idles where nothing was launched in time. Each idle stretch between two kernels of a step is laid beside the
annotations, operators and runtime calls of the host in the same time (one clock in a trace); what overlaps it longest
names it. Under the profiler the host is slower than without: shares say more than times.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

LONGEST = 12  # idle stretches that are kept, and pairs of kernels between which the device waits
MOST = 2000  # that are named
SHORTEST = 5.0  # µs: what lies between two kernels that wait for each other
RUNTIME = ("cuda_runtime", "cuda_driver")
NOTHING = "no event of the host"
_LAUNCH, _GRAPH = re.compile(r"LaunchKernel|LaunchCooperative"), re.compile(r"GraphLaunch")
_SYNC, _COPY = re.compile(r"Synchronize|StreamWait|EventQuery"), re.compile(r"Memcpy|Memset")
_LOAD = re.compile(r"ModuleLoad|LibraryLoad")  # of what was compiled just now, or met for the first time
Event = dict[str, Any]


def digest(events: Iterable[Event], steps: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """{kernels, launches, driver_launches, graphs, span_us, idle_us, between_us, ops_us, runtime_us, sync_us, ...}.

    `steps` are the kernels of each step; figures are medians over them. `launches` are those of its kernels by
    the host one by one, `driver_launches` of them by the driver's API, which is Triton's; `graphs` those of whole
    graphs. `span_us` is from the first kernel's begin to the last one's end, `idle_us` what of it no kernel ran,
    `between_us` from there to the next step's first kernel; `ops_us`, `runtime_us` and
    `sync_us` the time within it in which an operator, a runtime call or a synchronisation was on the host.
    `longest`: [µs, after which kernel, annotation, operator, call] of the longest idle stretches of all steps;
    `causes`: {what the host did: idle µs a step}, of stretches from SHORTEST on.
    `pairs`: [idle µs a step, times a step, kernel before, kernel behind], however short: what a graph's kernels lose.
    """
    host = _host(events)
    named_by = [_Spans(host[kind]) for kind in ("note", "op", "call")]
    found: dict[str, list[float]] = defaultdict(list)
    stretches: list[tuple[float, float, str]] = []
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernels in steps:
        begin = min(k["ts"] for k in kernels)
        end = max(k["ts"] + k["dur"] for k in kernels)
        waits = list(_idle(kernels))
        for since, to, before, behind in waits:
            pairs[before[:120], behind[:120]].append(to - since)
        idle = [(since, to, before) for since, to, before, _ in waits]
        stretches += idle
        ids = {(kernel.get("args") or {}).get("correlation", -1) for kernel in kernels}
        calls = [event for event in host["call"] if (event.get("args") or {}).get("correlation") in ids]
        launched = [event for event in calls if _LAUNCH.search(event["name"])]
        found["kernels"].append(len(kernels))
        found["launches"].append(len(launched))
        found["driver_launches"].append(sum(event["cat"] == "cuda_driver" for event in launched))
        found["graphs"].append(sum(bool(_GRAPH.search(event["name"])) for event in calls))
        found["span_us"].append(end - begin)
        found["idle_us"].append(sum(to - since for since, to, _ in idle))
        found["ops_us"].append(_within(host["op"], begin, end))
        found["runtime_us"].append(_within(host["call"], begin, end))
        found["sync_us"].append(_within([e for e in host["call"] if _SYNC.search(e["name"])], begin, end))
    for one, following in pairwise(sorted(steps, key=lambda kernels: min(k["ts"] for k in kernels))):
        last = max(one, key=lambda k: k["ts"] + k["dur"])
        end, begin = last["ts"] + last["dur"], min(k["ts"] for k in following)
        found["between_us"].append(max(0.0, begin - end))
        stretches += [(end, begin, last["name"])] if begin > end else []
    found["between_us"] = found["between_us"] or [0.0]
    longest = sorted(stretches, key=lambda s: s[0] - s[1])[:MOST]
    named = [
        (to - since, after[:120], [spans.doing(since, to) for spans in named_by])
        for since, to, after in longest
        if to - since >= SHORTEST
    ]
    causes: dict[str, float] = defaultdict(float)
    for us, _, doing in named:
        causes[_cause(*doing)] += us / len(steps)
    ordered = dict(sorted(causes.items(), key=lambda item: -item[1]))
    most = sorted(pairs.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        **{key: median(values) for key, values in found.items()},
        "longest": [[us, after, *doing] for us, after, doing in named[:LONGEST]],
        "causes": ordered,
        "pairs": [[sum(us) / len(steps), len(us) / len(steps), *names] for names, us in most],
    }


def _host(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Host events by kind: note, op, call."""
    kinds = {"user_annotation": "note", "cpu_op": "op", "python_function": "op", **dict.fromkeys(RUNTIME, "call")}
    found: dict[str, list[Event]] = {"note": [], "op": [], "call": []}
    for event in events:
        if event.get("ph") == "X" and (kind := kinds.get(event.get("cat", ""))):
            found[kind].append(event)
    return found


def _idle(kernels: Sequence[Event]) -> Iterable[tuple[float, float, str, str]]:
    """(begin, end, kernel before it, kernel behind it) of each stretch without a kernel."""
    last: Event | None = None
    for event in sorted(kernels, key=lambda event: event["ts"]):
        if last is not None and event["ts"] > (reach := last["ts"] + last["dur"]):
            yield reach, event["ts"], last["name"], event["name"]
        if last is None or event["ts"] + event["dur"] > last["ts"] + last["dur"]:
            last = event


def _within(events: Sequence[Event], begin: float, end: float) -> float:
    """The length of the union of events, clipped."""
    spans = sorted((max(e["ts"], begin), min(e["ts"] + e["dur"], end)) for e in events)
    total, reach = 0.0, begin
    for since, to in spans:
        total += max(0.0, to - max(since, reach))
        reach = max(reach, to)
    return total


class _Spans:
    """Events of the host, to be asked what was going on."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.names = [event["name"][:120] for event in events]
        self.begins = np.array([event["ts"] for event in events], float)
        self.lengths = np.array([event["dur"] for event in events], float)

    def doing(self, begin: float, end: float) -> str | None:
        """The event that overlaps a stretch longest; of those that cover it alike the innermost: the shortest."""
        if not self.names:
            return None
        overlap = np.minimum(self.begins + self.lengths, end) - np.maximum(self.begins, begin)
        best = int(np.lexsort((-self.lengths, overlap))[-1])
        return self.names[best] if overlap[best] > 0 else None


def _cause(note: str | None, op: str | None, call: str | None) -> str:
    """One name for what the host did."""
    if call and _LOAD.search(call):
        return "loading a kernel"
    if call and _SYNC.search(call):
        return "synchronisation"
    if call and _COPY.search(call):
        return "copies"
    if op:
        return f"operator {op}"
    if call:
        return "launches"
    return f"within {note}" if note else NOTHING
