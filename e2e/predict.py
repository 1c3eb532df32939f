"""What a comparison should find: stock's measured step, with our operators' share of it at their measured ratios.

A step is predicted by taking from stock's time what each operator of ours would save: its kernels' time × (1 − ours /
stock's), the ratio read from `microbench/results/<gpu>/` at the step's number of tokens (between two measured counts by
the logarithm; beyond them the nearest). An operator that was never measured, or that the measured tables leave to
stock, saves nothing. Written before the plugin is measured, so that it can turn out wrong.

A step lasts as long as the slower of the host, which issues it, and the device, which runs it. Where the device idles
for more than IDLE of stock's step, the host is the slower one: the step is predicted to stay as it is, whatever kernels
save (`device_us` is what it would be if the device alone counted). Idling of kernels that wait for each other within a
graph counts as well, which is why some is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from blackwell_kernels.e2e.kernel_time import GAPS, mistimed
from blackwell_kernels.e2e.report import read_json
from blackwell_kernels.e2e.sessions import Scenario, preview

OURS, TUNED = "ours", "[tuned]"
TABLES = "VLLM_TUNED_CONFIG_FOLDER"  # of vLLM: where it looks for tables of its Triton experts before its own
APART = ("/routing=", "/requests=")  # cases of other data than a profiled step's: uneven experts, several requests
IDLE = 0.2  # of a step without any kernel: more, and the host binds it
SESSIONS = 200  # of the scenario, for its mean turn
Blocks = Sequence[Sequence[float]]  # (values, their sum)
# results file: the groups of a step that it stands for, by kind of step, and the hook that must be ours
_OPERATORS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    "decode": {
        "moe": ("moe", ("moe",)),
        "moe_routing": ("moe_routing", ("moe_routing",)),
        "gdn_core": ("gdn_decode", ("gdn_decode", "gdn_conv")),  # with its convolution, as it is served
        "dsa_indexer": ("dsa_indexer", ("dsa_indexer",)),
        "dsa_topk": ("dsa_topk", ("dsa_topk",)),
        "dsa_sparse_mla": ("dsa_sparse_mla", ("dsa_sparse_mla",)),
    },
    "prefill": {
        "moe": ("moe", ("moe",)),
        "moe_routing": ("moe_routing", ("moe_routing",)),
        "gdn_prefill": ("gdn_prefill", ("gdn_prefill",)),
        "dsa_indexer": ("dsa_indexer", ("dsa_indexer",)),
        "dsa_topk": ("dsa_topk", ("dsa_topk",)),
        "dsa_sparse_mla": ("dsa_sparse_mla", ("dsa_sparse_mla",)),
    },
}
_TOKENS = ("num_tokens", "batch_size", "num_rows", "total_seq_len")
# what is predicted: lower is better but for the first
GAINS = {
    "capacity": "output tokens/s where the server is full",
    "tpot_1": "time per token of one request alone",
    "ttft": "time to the first token, without queueing",
}


@dataclass(frozen=True)
class Served:
    """What decides which measured rows hold: the model and its split, the types, which operators are ours anyway."""

    gpu: str
    model: str
    tp: int = 1
    ep: int = 1
    kv_dtype: str = "bfloat16"
    state_dtype: str = "bfloat16"
    forced: frozenset[str] = frozenset()  # BLACKWELL_KERNELS_FORCE
    tuned: bool = False  # stock has searched tables (TABLES)
    chosen: Mapping[str, str] = field(default_factory=dict)  # op: what its arguments make stock run, if not its default


def make(profile: dict[str, Any], served: Served, measured: Path, scenario: Scenario) -> dict[str, Any]:
    """{date, steps: {name: ...}, gains: {name: plugin / stock}, operators, turn, why}; gains are None where unknown."""
    files, head = results(measured, served.gpu)
    steps = {name: step(found, served, files) for name, found in profile.items() if timed(found)}
    turn = mean_turn(scenario)
    why = None if files else f"no results of {served.gpu or 'a CPU'} under {measured}: nothing is predicted to change"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "measured": {"folder": str(measured), **head},
        "forced": sorted(served.forced),
        "turn": turn,
        "steps": steps,
        "gains": gains(steps, turn),
        "why": why,
    }


def timed(found: dict[str, Any]) -> bool:
    """Whether a step was measured, and its time can be right."""
    return not (found["why"] or mistimed(found))


def results(measured: Path, gpu: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """({operator: results file} of one chip, {operator: commit}); empty when nothing of it was stored."""
    found = {}
    for path in sorted(measured.glob("*/*.json")):
        data = read_json(path)
        if data.get("gpu") == gpu and "rows" in data:
            found[path.stem] = data
    return found, {"commits": {name: sorted({row["commit"] for row in data["rows"]}) for name, data in found.items()}}


def searched_tables(measured: Path, gpu: str) -> Path | None:
    """The folder of tables that a search for vLLM's Triton experts stored for this GPU (`microbench.moe_search`)."""
    for folder in sorted(measured.glob("*/tune/vllm")):
        ours = next(iter(sorted(folder.parent.parent.glob("*.json"))), None)
        if ours is not None and read_json(ours).get("gpu") == gpu and any(folder.glob("*.json")):
            return folder.absolute()
    return None


def step(found: dict[str, Any], served: Served, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One step: {stock_us, idle, bound, device_us, predicted_us, operators: [{operator, stock_us, ratio, ours, why}]}.

    `idle` is the share of stock's step in which no kernel ran; `bound` is host or device.
    """
    stock = found["seconds"] * 1e6
    rows, saved = [], 0.0
    for name, (hook, groups) in _OPERATORS[found["kind"]].items():
        us = sum(found["groups"].get(group, {"us": 0.0})["us"] for group in groups)
        if us == 0:
            continue
        ratio, ours, why = _ratio(files.get(name), hook, found, served)
        saved += us * (1 - ratio) if ours else 0.0
        rows.append({"operator": name, "stock_us": us, "ratio": ratio, "ours": ours, "why": why})
    kind = {key: found[key] for key in ("kind", "tokens", "requests")}
    idle = found["groups"].get(GAPS, {"us": 0.0})["us"] / stock
    by_host = idle > IDLE
    times = {"stock_us": stock, "device_us": stock - saved, "predicted_us": stock if by_host else stock - saved}
    return {**kind, **times, "idle": idle, "bound": "host" if by_host else "device", "operators": rows}


def _ratio(data: dict[str, Any] | None, hook: str, found: dict[str, Any], served: Served) -> tuple[float, bool, str]:
    """(ours / stock's time, whether ours would serve, why)."""
    from blackwell_kernels import select

    rows = [row for row in data["rows"] if _fits(row, found, served)] if data else []
    elsewhere = ""
    if not rows and data and hook == "moe":
        # fewer experts of the same shape, each with as many tokens: EP leaves the ratio as it is
        rows = [row for row in data["rows"] if _fits(row, found, replace(served, ep=row["axes"]["ep"]))]
        elsewhere = f", measured where EP is {rows[0]['axes']['ep']}" if rows else ""
    points: dict[int, tuple[float, bool, str]] = {}
    for row in rows:
        ours, peer = row["impls"][OURS]["us"], _peer(row, served)
        if ours and peer:
            tokens = next(row["axes"][axis] for axis in _TOKENS if axis in row["axes"])
            points[tokens] = (ours / row["impls"][peer]["us"], row["dispatched"] == OURS, peer)
    if not points:
        return 1.0, False, "not measured against stock for this shape"
    tokens = found["tokens"]
    ratio = between({count: ratio for count, (ratio, _, _) in points.items()}, tokens)
    nearest = min(points, key=lambda count: abs(math.log2(count / tokens)))
    _, chosen, peer = points[nearest]
    if hook in served.forced:
        return ratio, True, f"forced; against {peer}{elsewhere}"
    if tokens > select.BEYOND * max(points):
        return ratio, False, f"at most {max(points)} tokens were measured"
    why = f"against {peer}" if chosen else f"the measured table leaves it to stock ({peer})"
    return ratio, chosen, why + elsewhere


def _fits(row: dict[str, Any], found: dict[str, Any], served: Served) -> bool:
    axes = row["axes"]
    if (axes["model"], axes["tp"], axes["ep"]) != (served.model, served.tp, served.ep):
        return False
    if any(part in row["case"] for part in APART):
        return False
    if row["op"] == "dsa_sparse_mla":
        return axes["dtype"] == served.kv_dtype
    if row["op"] in ("gdn_core", "gdn_decode", "gdn_prefill") and axes["dtype"] != served.state_dtype:
        return False
    return row["op"] != "gdn_prefill" or axes["num_seqs"] == 1


def _peer(row: dict[str, Any], served: Served) -> str | None:
    """What stock runs; where that was not measured the fastest of vLLM's own that was, else the fastest peer."""
    times = {name: found["us"] for name, found in row["impls"].items() if name != OURS and found["us"]}
    stock = served.chosen.get(row["op"], row["stock"])
    if served.tuned and f"{stock}{TUNED}" in times:
        return f"{stock}{TUNED}"
    if stock in times:
        return stock
    return min(times, key=lambda name: (not name.startswith("vllm."), times[name]), default=None)


def between(ratios: dict[int, float], tokens: int) -> float:
    """The ratio at a number of tokens: linear in its logarithm between two measured ones, else the nearest one."""
    counts = sorted(ratios)
    for low, high in pairwise(counts):
        if low <= tokens <= high:
            share = math.log(tokens / low) / math.log(high / low)
            return ratios[low] ** (1 - share) * ratios[high] ** share
    return ratios[counts[0] if tokens < counts[0] else counts[-1]]


def mean_turn(scenario: Scenario) -> dict[str, float]:
    """{fresh, output}: tokens that an average turn of the scenario prefills (all else is cached) and decodes."""
    turns = [turn for session in preview(scenario, SESSIONS) for turn in session.turns[session.first_turn :]]
    return {
        "fresh": sum(turn.fresh for turn in turns) / len(turns),
        "output": sum(turn.output for turn in turns) / len(turns),
    }


def gains(steps: dict[str, Any], turn: dict[str, float]) -> dict[str, float | None]:
    """plugin / stock of each of GAINS.

    Capacity: a full server spends on a turn its fresh tokens' share of prefill steps, as long as were profiled, and its
    answer's of decode steps.
    """
    kinds = {kind: [s for s in steps.values() if s["kind"] == kind] for kind in ("decode", "prefill")}
    found: dict[str, float | None] = dict.fromkeys(GAINS)
    alone = next((s for s in kinds["decode"] if s["requests"] == 1), None)
    full = max((s for s in kinds["decode"] if s["requests"] > 1), key=lambda s: s["requests"], default=None)
    prefill = max(kinds["prefill"], key=lambda s: s["tokens"], default=None)
    if alone:
        found["tpot_1"] = alone["predicted_us"] / alone["stock_us"]
    if prefill:
        found["ttft"] = prefill["predicted_us"] / prefill["stock_us"]
    if full and prefill:
        cost = {
            key: turn["fresh"] * prefill[key] / prefill["tokens"] + turn["output"] * full[key] / full["requests"]
            for key in ("stock_us", "predicted_us")
        }
        found["capacity"] = cost["stock_us"] / cost["predicted_us"]
    return found


def alone_ratio(stock: dict[str, Any] | None, plugin: dict[str, Any] | None) -> dict[str, Any] | None:
    """{ratio, interval, n, clock} of the time per token of one request alone, from the arms' profiles.

    Of the engines' own clocks where both have one; of the client's where neither has. None: a step was not timed right,
    or the arms have no clock in common. Profiles from before `server_blocks` have a mean an arm: a ratio, no interval.
    """
    steps = [alone(profile) if profile else None for profile in (stock, plugin)]
    both = [step for step in steps if step and not mistimed(step)]
    by_engine = [bool(step.get("server_s")) for step in both]
    if len(both) < 2 or any(by_engine) != all(by_engine):
        return None
    if all(by_engine):
        a, b = (step.get("server_blocks") or [(1.0, step["server_s"])] for step in both)
    else:
        a, b = ([(1.0, s) for s in step["samples_s"]] for step in both)
    return mean_ratio(a, b) | {"clock": "engine" if all(by_engine) else "client"}


def mean_ratio(stock: Blocks, plugin: Blocks, resamples: int = 1000) -> dict[str, Any]:
    """{ratio, interval, n} of two means over blocks (values, their sum), bootstrapped by block.

    Means, because tokens arrive in bursts: most blocks of a burst last nothing, and one as long as all of them. No
    interval of fewer than two blocks.
    """
    a, b = np.array(stock, float), np.array(plugin, float)
    n = min(len(a), len(b))
    rng = np.random.default_rng(0)

    def drawn(x: np.ndarray) -> np.ndarray:
        values, seconds = np.moveaxis(x[rng.integers(len(x), size=(resamples, len(x)))].sum(axis=1), -1, 0)
        return seconds / values

    def mean(x: np.ndarray) -> float:
        return float(x[:, 1].sum() / x[:, 0].sum())

    interval = np.percentile(drawn(b) / drawn(a), [2.5, 97.5]).tolist() if n > 1 else None
    return {"ratio": mean(b) / mean(a), "interval": interval, "n": n}


def alone(profile: dict[str, Any]) -> dict[str, Any] | None:
    """The step of one request alone."""
    return next((s for s in profile.values() if s["kind"] == "decode" and s["requests"] == 1), None)


def share_reached(predicted: float, measured: float, *, higher_is_better: bool) -> float:
    """How much of a predicted gain was found: 1 is all of it, below 0 a loss."""
    if higher_is_better:
        return (measured - 1) / (predicted - 1)
    return (1 - measured) / (1 - predicted)
