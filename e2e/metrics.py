"""From raw request records to figures: TTFT, ITL, TPOT, end to end, tokens per second, prefix hits, errors.

Definitions, all from the client's clock and all in seconds:
  TTFT  first token − scheduled start      (queueing anywhere is part of it)
  ITL   gap between consecutive tokens of one answer
  TPOT  (last token − first token) / (tokens − 1) of one answer
  E2E   end − scheduled start
  late  sent − scheduled start             (the client's own delay: large values invalidate the run)
Percentiles interpolate linearly between order statistics (numpy's default) and come with their n.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

PERCENTILES = (50, 90, 99)
CUT_OFF = "unfinished"  # a request still running when the load ended: no error of the server
LATE_S = 0.1  # a client this late at p90 was saturated


def read_records(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, complaints) of JSONL files; a torn last line, or anything else unreadable, is named and left out."""
    rows: list[dict[str, Any]] = []
    complaints: list[str] = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                row["kind"]
            except (ValueError, KeyError, TypeError):
                complaints.append(f"{path.name}:{number} is no record and was left out")
                continue
            rows.append(row)
    return rows, complaints


def frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One line per request with ttft, tpot, e2e, late (seconds), tokens_out, error_kind (None when fine)."""
    table = []
    for row in rows:
        if row["kind"] != "request":
            continue
        tokens = row["tokens"]
        fine = row["error"] is None
        table.append(
            {
                "session": row["session"],
                "turn": row["turn"],
                "scheduled": row["scheduled"],
                "sent": row["sent"],
                "end": row["end"],
                "first": tokens[0] if tokens else np.nan,
                "prompt_tokens": row["prompt_tokens"],
                "reusable_tokens": row["reusable_tokens"],
                "tokens_out": len(tokens),
                "ttft": tokens[0] - row["scheduled"] if tokens else np.nan,
                "tpot": (tokens[-1] - tokens[0]) / (len(tokens) - 1) if fine and len(tokens) > 1 else np.nan,
                "e2e": row["end"] - row["scheduled"] if fine else np.nan,
                "late": row["sent"] - row["scheduled"],
                "error_kind": None if fine else row["error"]["kind"],
                "error": None if fine else row["error"]["message"],
            }
        )
    columns = (
        "session turn scheduled sent end first prompt_tokens reusable_tokens tokens_out ttft tpot e2e late "
        "error_kind error"
    )
    return pd.DataFrame(table, columns=columns.split())


def inter_token(rows: Iterable[dict[str, Any]]) -> np.ndarray:
    """All gaps between consecutive tokens of one answer, seconds."""
    gaps = [np.diff(row["tokens"]) for row in rows if row["kind"] == "request" and len(row["tokens"]) > 1]
    return np.concatenate(gaps) if gaps else np.empty(0)


def distribution(values: Iterable[float]) -> dict[str, Any]:
    """n, mean, percentiles and max; every figure is None when there is no value."""
    x = np.asarray(list(values), dtype=np.float64)
    x = x[~np.isnan(x)]
    names = [f"p{p}" for p in PERCENTILES]
    if x.size == 0:
        return {"n": 0, "mean": None, **dict.fromkeys(names), "max": None}
    percentiles = dict(zip(names, np.percentile(x, PERCENTILES).tolist(), strict=True))
    return {"n": int(x.size), "mean": float(x.mean()), **percentiles, "max": float(x.max())}


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Every figure of a run as JSON. Works on a run that was cut short, and on one with nothing in it."""
    table = frame(rows)
    failed = table[table.error_kind.notna() & (table.error_kind != CUT_OFF)]
    times = np.array([t for row in rows if row["kind"] == "request" for t in row["tokens"]])
    # from the first scheduled start to the last token or end: idle time at the start of a run counts
    begin = float(table.scheduled.min()) if len(table) else np.nan
    finish = float(max(table.end.max(), times.max() if times.size else -np.inf)) if len(table) else np.nan
    seconds = finish - begin
    late = distribution(table.late)
    return {
        "requests": len(table),
        "completed": int(table.error_kind.isna().sum()),
        "unfinished": int((table.error_kind == CUT_OFF).sum()),
        "sessions": int(table.session.nunique()),
        "turns_per_session": distribution(table.groupby("session").size()),
        "errors": dict(Counter(failed.error_kind)),
        "error_examples": failed.drop_duplicates("error_kind").set_index("error_kind").error.to_dict(),
        "seconds": None if np.isnan(seconds) else seconds,
        "output_tokens": int(times.size),
        "prompt_tokens": int(table.prompt_tokens.sum()),
        "output_tokens_per_s": times.size / seconds if seconds > 0 else None,
        "ttft_s": distribution(table.ttft),
        "itl_s": distribution(inter_token(rows)),
        "tpot_s": distribution(table.tpot),
        "e2e_s": distribution(table.e2e),
        "late_s": late,
        "client_saturated": bool(late["n"] and late["p90"] > LATE_S),
        "reusable_prompt_share": float(table.reusable_tokens.sum() / max(1, table.prompt_tokens.sum())),
    }


_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def parse_prometheus(text: str) -> list[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every sample of a /metrics page."""
    samples = []
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            name, labels, value = match.groups()
            samples.append((name, dict(_LABEL.findall(labels or "")), float(value)))
    return samples


def server_side(before: str, after: str) -> dict[str, Any]:
    """What the server counted between two /metrics pages: tokens, prefix-cache hits, and the plugin's own metrics."""
    first, last = parse_prometheus(before), parse_prometheus(after)

    def grown(name: str) -> float:
        return sum(v for n, _, v in last if n == name) - sum(v for n, _, v in first if n == name)

    queries, hits = grown("vllm:prefix_cache_queries_total"), grown("vllm:prefix_cache_hits_total")
    ours = [(n, labels, v) for n, labels, v in last if n.startswith("blackwell_kernels_")]
    return {
        "generation_tokens": grown("vllm:generation_tokens_total"),
        "prompt_tokens": grown("vllm:prompt_tokens_total"),
        "preemptions": grown("vllm:num_preemptions_total"),
        "prefix_queries": queries,
        "prefix_hits": hits,
        "prefix_hit_share": hits / queries if queries else None,
        "ops": [labels for n, labels, _ in ours if n == "blackwell_kernels_op_info"],
        "fallbacks": [{**labels, "count": v} for n, labels, v in ours if n == "blackwell_kernels_fallback_total" and v],
        "jit_after_warmup": sum(v for n, _, v in ours if n == "blackwell_kernels_jit_after_warmup_total"),
    }
