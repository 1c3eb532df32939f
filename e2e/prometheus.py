"""vLLM's /metrics: what grew between two pages, and whether the server's own times agree with ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Samples = list[tuple[str, dict[str, str], float]]
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
# the server's clock starts when a request reaches it and stops when a token leaves it: ours contains that, and the way
SLACK_S, SLACK_SHARE = 0.02, 0.2
# histograms of seconds; the second name is what older versions call it
ITL = ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds")
TTFT = ("vllm:time_to_first_token_seconds",)


def parse_prometheus(text: str) -> Samples:
    """(name, labels, value) of every sample of a /metrics page."""
    samples = []
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            name, labels, value = match.groups()
            samples.append((name, dict(_LABEL.findall(labels or "")), float(value)))
    return samples


def total(samples: Samples, name: str) -> float:
    """The sum over all label sets of one name; 0 when it is absent."""
    return sum(v for n, _, v in samples if n == name)


def gauge(samples: Samples, name: str) -> float | None:
    """The sum over all label sets, None when the server does not export it."""
    return total(samples, name) if any(n == name for n, _, _ in samples) else None


def taken_in(before: Samples, after: Samples, names: Sequence[str]) -> tuple[float, float]:
    """(values, their sum) that a histogram took in between two pages: the first of `names` that took any, or (0, 0)."""
    for name in names:
        if n := total(after, f"{name}_count") - total(before, f"{name}_count"):
            return n, total(after, f"{name}_sum") - total(before, f"{name}_sum")
    return 0.0, 0.0


def server_side(before: str, after: str) -> dict[str, Any]:
    """What the server counted between two /metrics pages: tokens, prefix hits, times, the plugin's metrics."""
    first, last = parse_prometheus(before), parse_prometheus(after)

    def grown(name: str) -> float:
        return total(last, name) - total(first, name)

    def mean(*names: str) -> float | None:
        n, seconds = taken_in(first, last, names)
        return seconds / n if n else None

    queries, hits = grown("vllm:prefix_cache_queries_total"), grown("vllm:prefix_cache_hits_total")
    ours = [(n, labels, v) for n, labels, v in last if n.startswith("blackwell_kernels_")]
    return {
        "generation_tokens": grown("vllm:generation_tokens_total"),
        "prompt_tokens": grown("vllm:prompt_tokens_total"),
        "preemptions": grown("vllm:num_preemptions_total"),
        "prefix_queries": queries,
        "prefix_hits": hits,
        "prefix_hit_share": hits / queries if queries else None,
        "ttft_mean_s": mean(*TTFT),
        "itl_mean_s": mean(*ITL),
        "e2e_mean_s": mean("vllm:e2e_request_latency_seconds"),
        "ops": [labels for n, labels, _ in ours if n == "blackwell_kernels_op_info"],
        "fallbacks": [{**labels, "count": v} for n, labels, v in ours if n == "blackwell_kernels_fallback_total" and v],
        "jit_after_warmup": total(last, "blackwell_kernels_jit_after_warmup_total"),
        "jit_now": grown("blackwell_kernels_jit_after_warmup_total"),
    }


def cross_check(server: dict[str, Any], ours: dict[str, Any]) -> list[dict[str, Any]]:
    """Server's figures beside ours over the same requests: rows {figure, server, client, agrees}.

    Ours may be longer by the way there and back (20 ms and 20 % are allowed), never shorter than theirs by more than
    2 %: that would mean that one of the clocks is wrong, or that the two looked at different requests.
    """
    rows = []
    for figure in ("ttft_mean_s", "itl_mean_s", "e2e_mean_s"):
        theirs, mine = server.get(figure), ours.get(figure)
        if theirs is None or mine is None:
            continue
        agrees = theirs * 0.98 - 0.001 <= mine <= theirs * (1 + SLACK_SHARE) + SLACK_S
        rows.append({"figure": figure, "server": theirs, "client": mine, "agrees": agrees})
    theirs, mine = server.get("generation_tokens"), ours.get("output_tokens")
    if theirs is not None and mine is not None:
        # requests dropped by us go on for some tokens: the server may count more
        agrees = mine <= theirs <= mine + ours.get("tokens_not_awaited", 0)
        rows.append({"figure": "output_tokens", "server": theirs, "client": mine, "agrees": agrees})
    return rows
