"""From raw request records to figures: TTFT, ITL, TPOT, end to end, tokens per second, goodput, prefix hits, errors.

Definitions, all from the client's clock and all in seconds:
  TTFT  first token − scheduled start      (queueing anywhere is part of it)
  ITL   gap between consecutive tokens of one answer
  TPOT  (last token − first token) / (tokens − 1) of one answer
  E2E   end − scheduled start
  late  sent − scheduled start             (the client's own delay: large values invalidate the run)
  session completion   end of the last turn − scheduled start of the first, of sessions played whole
  turn goodput         turns within the SLO / turns judged: TTFT at most slo.ttft_s and TPOT at most slo.itl_s. Failed
                       turns miss it; turns cut off by the end of the load are judged only if they had missed it by then
  session goodput      sessions all of whose judged turns were within the SLO / sessions with a judged turn
  output tokens/s      tokens that arrived in the measured window / its length; total adds the prompts (cached tokens
                       included) of requests whose first token arrived in it
Requests count if they were scheduled in the measured window (from warm-up to the end of sending; all, if none is
given). Requests that the client dropped on purpose count as such and give TTFT and ITL only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field

from blackwell_kernels.e2e import stats
from blackwell_kernels.e2e.prometheus import parse_prometheus, server_side
from blackwell_kernels.e2e.stats import PERCENTILES, Sample, Share, distribution
from blackwell_kernels.e2e.stream import CUT_OFF

__all__ = [
    "CUT_OFF",
    "PERCENTILES",
    "Slo",
    "distribution",
    "frame",
    "inter_token",
    "parse_prometheus",
    "server_side",
    "summarise",
]
LATE_S = 0.1  # a client this late at p90 was saturated
STUCK_S = 120.0  # of a request that the end of the load cut off: it may never have ended
CPU_SHARE = 0.8  # of one core: a load process is one thread


class Slo(BaseModel):
    """What a turn must keep to count as good: seconds to the first token, mean seconds between tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ttft_s: float = Field(default=2.0, gt=0)
    itl_s: float = Field(default=0.05, gt=0)


def read_records(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows, complaints) of JSONL files; a torn last line, or anything else unreadable, is named and left out.

    Token times that were saved of requests which never ended (the load process was killed) become requests cut off.
    """
    rows: list[dict[str, Any]] = []
    complaints: list[str] = []
    for path in paths:
        running: dict[str, dict[str, Any]] = {}
        with path.open() as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                    kind = row["kind"]
                except (ValueError, KeyError, TypeError):
                    complaints.append(f"{path.name}:{number} is no record and was left out")
                    continue
                if kind == "partial":
                    known = running.setdefault(row["id"], {**row, "kind": "request", "tokens": []})
                    known["tokens"] += row["tokens"]
                    continue
                if kind == "start":
                    rows += _cut_off(running)
                if kind == "request":
                    running.pop(row.get("id", ""), None)
                rows.append(row)
        rows += _cut_off(running)
    return rows, complaints


def _cut_off(running: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = [{**row, "end": row["tokens"][-1]} for row in running.values() if "scheduled" in row and row["tokens"]]
    running.clear()
    return found


def frame(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One line per request with ttft, tpot, e2e, late (seconds), tokens_out, error_kind (None when fine).

    `itl` is the mean gap so far, also of answers that did not end well; `served_ttft` counts from sending.
    """
    table = []
    for row in rows:
        if row["kind"] != "request":
            continue
        tokens, fine, aborted = row["tokens"], row["error"] is None, bool(row.get("aborted"))
        whole = fine and not aborted
        mean_gap = (tokens[-1] - tokens[0]) / (len(tokens) - 1) if len(tokens) > 1 else np.nan
        table.append(
            {
                "key": f"{row['session']}",
                "session": row["session"],
                "agent": row.get("agent"),
                "turn": row["turn"],
                "turns": row.get("turns", row["turn"] + 1),
                "first_turn": row.get("first_turn", 0),
                "scheduled": row["scheduled"],
                "sent": row["sent"],
                "end": row["end"],
                "first": tokens[0] if tokens else np.nan,
                "prompt_tokens": row["prompt_tokens"],
                "reusable_tokens": row["reusable_tokens"],
                "tokens_out": len(tokens),
                "ttft": tokens[0] - row["scheduled"] if tokens else np.nan,
                "served_ttft": tokens[0] - row["sent"] if tokens else np.nan,
                "tpot": mean_gap if whole else np.nan,
                "itl": mean_gap,
                "e2e": row["end"] - row["scheduled"] if whole else np.nan,
                "late": row["sent"] - row["scheduled"],
                "aborted": aborted,
                "error_kind": None if fine else row["error"]["kind"],
                "error": None if fine else row["error"]["message"],
            }
        )
    return pd.DataFrame(table, columns=_COLUMNS)


_COLUMNS = (
    *("key", "session", "agent", "turn", "turns", "first_turn", "scheduled", "sent", "end", "first"),
    *("prompt_tokens", "reusable_tokens", "tokens_out", "ttft", "served_ttft", "tpot", "itl", "e2e", "late"),
    *("aborted", "error_kind", "error"),
)


def inter_token(rows: Iterable[dict[str, Any]]) -> np.ndarray:
    """All gaps between consecutive tokens of one answer, seconds."""
    gaps = [np.diff(row["tokens"]) for row in rows if row["kind"] == "request" and len(row["tokens"]) > 1]
    return np.concatenate(gaps) if gaps else np.empty(0)


class Run:
    """The records of one run, cut to its measured window: what figures and their intervals are computed from."""

    def __init__(
        self,
        rows: list[dict[str, Any]],
        *,
        slo: Slo | None = None,
        window: tuple[float, float] | None = None,
    ) -> None:
        self.slo = slo or Slo()
        table = frame(rows)
        requests = [row for row in rows if row["kind"] == "request"]
        times = np.array([t for row in requests for t in row["tokens"]])
        owner = np.repeat(np.arange(len(requests)), [len(row["tokens"]) for row in requests])
        if window is None:  # from the first scheduled start to the last token or end: idle time at the start counts
            begin = float(table.scheduled.min()) if len(table) else np.nan
            last = [float(table.end.max())] if len(table) else []
            finish = max([*last, *([float(times.max())] if times.size else [])], default=np.nan)
            inside = np.ones(len(table), bool)
        else:
            begin, finish = window
            inside = ((table.scheduled >= begin) & (table.scheduled < finish)).to_numpy(bool)
        self.begin, self.finish, self.seconds = begin, finish, finish - begin
        self.keys, codes = np.unique(table.key.to_numpy(str), return_inverse=True)
        self.everything = table.assign(owner=codes)
        self.table = self.everything[inside]
        here = (times >= begin) & (times <= finish) if window else np.ones(times.size, bool)
        self.tokens_out = np.bincount(codes[owner[here]], minlength=len(self.keys)).astype(float)
        answered = self.everything[(table["first"] >= begin) & (table["first"] <= finish)]
        self.tokens_in = np.bincount(
            answered.owner.to_numpy(int), answered.prompt_tokens.to_numpy(float), minlength=len(self.keys)
        )
        # gaps within one answer, of the requests that count
        same = (owner[1:] == owner[:-1]) & inside[owner[1:]] if times.size else np.zeros(0, bool)
        self.itl = Sample.of(np.diff(times)[same], codes[owner[1:]][same] if times.size else [])

    def sample(self, column: str) -> Sample:
        """A latency by session: ttft, tpot, itl, e2e, completion."""
        if column == "itl":
            return self.itl
        if column == "completion":
            done = self.completions()
            return Sample.of(done.to_numpy(float), done.index.to_numpy(int))
        return Sample.of(self.table[column], self.table.owner)

    def judged(self) -> pd.DataFrame:
        """The turns that the SLO is held against, with a column `good`."""
        t = self.table[~self.table.aborted.astype(bool)]
        cut = t.error_kind == CUT_OFF
        waited = t.ttft.fillna(t.end - t.scheduled)
        missed = (waited > self.slo.ttft_s) | (t.itl > self.slo.itl_s)
        good = t.error_kind.isna() & ~missed
        return t.assign(good=good)[~cut | missed]

    def completions(self) -> pd.Series:
        """Seconds of each session that was played from its first turn to its last, by owner."""
        t = self.everything[self.everything.agent.isna() & self.everything.error_kind.isna()]
        begun = t[t.turn == t.first_turn].groupby("owner").scheduled.min()
        ended = t[t.turn == t.turns - 1].groupby("owner").end.max()
        both = pd.concat([begun.rename("begun"), ended.rename("ended")], axis=1, join="inner")
        if not np.isnan(self.begin):
            both = both[both.begun >= self.begin]
        return both.ended - both.begun

    def running(self, at: float) -> tuple[int, int]:
        """(sessions, requests) at a time: begun before it, ended after it. A session thinks between its requests."""
        t = self.everything
        begun = t.groupby("owner").scheduled.min()
        last = t[t.agent.isna() & t.error_kind.isna() & (t.turn == t.turns - 1)].groupby("owner").end.max()
        ended = last.reindex(begun.index).fillna(np.inf)
        return int(((begun <= at) & (ended > at)).sum()), int(((t.scheduled <= at) & (t.end > at)).sum())

    def turn_goodput(self) -> Share:
        """Good turns over judged turns, by session."""
        judged = self.judged()
        return Share(self._sum(judged.owner, judged.good), self._sum(judged.owner, np.ones(len(judged))))

    def session_goodput(self) -> Share:
        """Sessions without a bad turn over sessions with a judged turn."""
        judged = self.judged().groupby("owner").good.all()
        return Share(self._sum(judged.index, judged), self._sum(judged.index, np.ones(len(judged))))

    def throughput(self, which: str = "output") -> Share:
        """Tokens per second, by session: output, or total with the prompts'."""
        return Share(self.tokens_out + (self.tokens_in if which == "total" else 0), self.seconds)

    def _sum(self, owners: Any, values: Any) -> np.ndarray:
        o, v = np.asarray(owners, dtype=np.int64), np.asarray(values, dtype=float)
        return np.bincount(o, v, minlength=len(self.keys))


def client_load(rows: Iterable[dict[str, Any]], run: Run) -> dict[str, Any]:
    """Whether the load generator kept up: its lateness, the CPU share of its busiest process, and what is wrong."""
    late = distribution(run.table.late)
    busy: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == "client" and (np.isnan(run.begin) or run.begin <= row["time"] <= run.finish):
            busy.setdefault(row["worker"], []).append(row["cpu"])
    cpu = max((float(np.mean(values)) for values in busy.values()), default=None)
    why = []
    if late["n"] and late["p90"] > LATE_S:
        behind = f"a tenth of the requests was sent {late['p90']:.2f} s or more after its time"
        why.append(f"{behind}: give more --users or --processes")
    if cpu is not None and cpu > CPU_SHARE:
        why.append(f"a load process used {cpu:.0%} of a core: give more --processes, or hosts")
    return {"late_s": late, "cpu": cpu if cpu is not None else "not measured: no sample", "saturated": why}


def traffic(run: Run) -> dict[str, Any]:
    """What was asked: tokens of a turn's prompt, those of it that are new, those of its answer; what ran when."""
    t = run.table
    at = [run.running(time) for time in (run.begin, run.finish)]
    return {
        "prompt_tokens": distribution(t.prompt_tokens),
        "fresh_tokens": distribution(t.prompt_tokens - t.reusable_tokens),
        "answer_tokens": distribution(t.tokens_out),
        "sessions_at": [sessions for sessions, _ in at],
        "requests_at": [requests for _, requests in at],
    }


def summarise(
    rows: list[dict[str, Any]],
    *,
    slo: Slo | None = None,
    window: tuple[float, float] | None = None,
    gpus: int = 1,
    intervals: bool = False,
) -> dict[str, Any]:
    """Every figure of a run as JSON. Works on a run that was cut short, and on one with nothing in it.

    intervals: with `figures`, each of FIGURES and its 95 % interval.
    """
    run = Run(rows, slo=slo, window=window)
    table = run.table
    failed = table[table.error_kind.notna() & (table.error_kind != CUT_OFF)]
    client = client_load(rows, run)
    own = run.seconds > 0
    output, whole = run.throughput().value() if own else None, run.throughput("total").value() if own else None
    found = {
        "requests": len(table),
        "completed": int((table.error_kind.isna() & ~table.aborted.astype(bool)).sum()),
        "aborted": int(table.aborted.astype(bool).sum()),
        "unfinished": int((table.error_kind == CUT_OFF).sum()),
        "sessions": int(table.key.nunique()),
        "turns_per_session": distribution(table.groupby("key").size()),
        "traffic": traffic(run),
        "stuck": int(((table.error_kind == CUT_OFF) & (table.end - table.scheduled > STUCK_S)).sum()),
        "errors": dict(Counter(failed.error_kind)),
        "error_examples": failed.drop_duplicates("error_kind").set_index("error_kind").error.to_dict(),
        "seconds": None if np.isnan(run.seconds) else run.seconds,
        "output_tokens": int(run.tokens_out.sum()),
        "prompt_tokens": int(table.prompt_tokens.sum()),
        "output_tokens_per_s": output,
        "total_tokens_per_s": whole,
        "output_tokens_per_s_per_gpu": output / gpus if output is not None else None,
        "ttft_s": distribution(table.ttft),
        "itl_s": distribution(run.itl.values),
        "tpot_s": distribution(table.tpot),
        "e2e_s": distribution(table.e2e),
        "session_completion_s": distribution(run.completions()),
        "slo": run.slo.model_dump(),
        "turn_goodput": _number(run.turn_goodput().value()),
        "session_goodput": _number(run.session_goodput().value()),
        "late_s": client["late_s"],
        "client_cpu": client["cpu"],
        "client_saturated": bool(client["saturated"]),
        "client_why": client["saturated"],
        "reusable_prompt_share": float(table.reusable_tokens.sum() / max(1, table.prompt_tokens.sum())),
        # as the server counts them: from sending, over every request of the run
        "as_the_server_sees": {
            "ttft_mean_s": _mean(run.everything.served_ttft),
            "itl_mean_s": _mean(np.concatenate([np.diff(r["tokens"]) for r in rows if _answered(r)] or [np.empty(0)])),
            "e2e_mean_s": _mean((run.everything.end - run.everything.sent)[run.everything.e2e.notna()]),
            "output_tokens": int(run.everything.tokens_out.sum()),
        },
    }
    if intervals:
        found["figures"] = {key: _told(run, key) for key in FIGURES}
    return found


# figure: (what it is of, which percentile; None for a ratio)
FIGURES: dict[str, tuple[str, float | None]] = {
    "output_tokens_per_s": ("output", None),
    "total_tokens_per_s": ("total", None),
    "turn_goodput": ("turn_goodput", None),
    "session_goodput": ("session_goodput", None),
    **{f"ttft_p{p:g}": ("ttft", p) for p in (50, 95, 99)},
    **{f"itl_p{p:g}": ("itl", p) for p in (50, 95, 99, 99.9)},
    **{f"tpot_p{p:g}": ("tpot", p) for p in (50, 99)},
    **{f"e2e_p{p:g}": ("e2e", p) for p in (50, 99)},
    "completion_p50": ("completion", 50),
}
HIGHER_IS_BETTER = {key for key, (_, p) in FIGURES.items() if p is None}


def figure(run: Any, key: str) -> tuple[Any, int]:
    """(weights -> figure, values it looks at) of one of FIGURES, of a Run or of several pooled."""
    what, p = FIGURES[key]
    if p is not None:
        sample = run.sample(what)
        return (lambda weights: sample.percentile(p, weights)), sample.values.size
    share = run.throughput(what) if what in ("output", "total") else getattr(run, what)()
    return share.value, len(run.keys)


def _told(run: Run, key: str) -> dict[str, Any]:
    """A figure with its interval, how many values (of a ratio: sessions) it is of, and whether they are enough."""
    function, size = figure(run, key)
    between = stats.interval(function, np.zeros(len(run.keys), int), size=size)
    value, p = function(np.ones(len(run.keys))), FIGURES[key][1]
    interval = list(between) if between else None
    return {"value": _number(value), "interval": interval, "n": size, "enough": stats.enough(size, p)}


def _answered(row: dict[str, Any]) -> bool:
    return row["kind"] == "request" and len(row["tokens"]) > 1


def _mean(values: Any) -> float | None:
    x = np.asarray(values, dtype=float)
    x = x[~np.isnan(x)]
    return float(x.mean()) if x.size else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
