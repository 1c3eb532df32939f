"""Agent sessions: when they arrive, how many turns they take, what each turn sends. Standard library only.

Fitted to 710 recorded coding-agent sessions with 48,658 requests (public traces of callanjfox/kv-cache-tester, commit
94f6046, Apache-2.0): turns per session, fresh tokens per turn, output tokens and think gaps follow the published
quantiles; input tokens per request then follow from growth, a shared prefix of tools and system prompt, and compaction
when a session's context is full, and land within 30 % of the recorded quantiles (43k, 105k, 236k, 500k).

A turn's prompt is the previous prompt, the recorded answer and fresh tokens, all as token ids drawn from (seed, what
they are): equal prefixes are equal tokens, in every process and every run, so prefix caching behaves as it would.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count, islice
from typing import Any

PROBABILITIES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
# value at each probability; p10 to p99 as published, the ends continue the neighbouring slope moderately
TURNS = (3.0, 7.0, 45.0, 156.0, 330.0, 420.0)
FRESH = (64.0, 192.0, 704.0, 4032.0, 65856.0, 85000.0)
OUTPUT = (30.0, 105.0, 216.0, 899.0, 3663.0, 4800.0)
GAP_S = (1.0, 4.0, 10.0, 166.0, 3027.0, 3600.0)
SHARED_TOKENS = 15000
CONTEXT_LIMITS = ((160e3, 0.45), (260e3, 0.35), (560e3, 0.20))  # tokens at which a session compacts, share of sessions
SUMMARY_SHARE = 0.1  # of the limit, what a compaction leaves of the conversation


@dataclass(frozen=True)
class Scenario:
    """What traffic to make. Scales shrink the published quantities; gaps are capped after scaling."""

    seed: int = 0
    sessions_per_s: float = 0.5
    context_scale: float = 1.0  # shared prefix, fresh tokens and context limits
    output_scale: float = 1.0
    turns_scale: float = 1.0
    gap_scale: float = 1.0
    gap_cap_s: float = 60.0
    max_context: int = 1 << 20  # prompt and output together never exceed it
    min_tokens: int = 4  # fewest fresh tokens and output tokens of a turn
    join_midway: bool = False  # start 25-75 % through each session, as in a system that has been running
    first_token: int = 3  # token ids are drawn from [first_token, vocab)
    vocab: int = 1024

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scenario:
        """From JSON. Raises ValueError for a name that does not exist."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown scenario settings {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return cls(**values)


SCENARIOS = {
    "agent": Scenario(),
    # a minute on a laptop: contexts of a few hundred tokens, answers of a dozen, several turns
    "demo": Scenario(
        sessions_per_s=0.4,
        context_scale=1 / 256,
        output_scale=1 / 16,
        turns_scale=1 / 6,
        gap_scale=1 / 20,
        gap_cap_s=2.0,
        max_context=1000,
    ),
}


@dataclass(frozen=True)
class Turn:
    """One request: fresh prompt tokens, output tokens, seconds of thinking before it, whether history was compacted."""

    fresh: int
    output: int
    gap_s: float
    compacted: bool


@dataclass(frozen=True)
class Session:
    """One agent's conversation."""

    id: int
    start_s: float
    scenario: Scenario = field(repr=False)
    summary_tokens: int = 0
    turns: tuple[Turn, ...] = ()
    first_turn: int = 0

    def prompt(self, turn: int) -> list[int]:
        """Token ids of the prompt of one turn."""
        begin = max((i for i in range(turn + 1) if self.turns[i].compacted), default=0)
        ids = self._tokens("shared", shared_tokens(self.scenario))
        if self.turns[begin].compacted:
            ids += self._tokens(f"{self.id}/{begin}/summary", self.summary_tokens)
        for i in range(begin, turn + 1):
            ids += self._tokens(f"{self.id}/{i}/fresh", self.turns[i].fresh)
            if i < turn:
                ids += self._tokens(f"{self.id}/{i}/answer", self.turns[i].output)
        return ids

    def _tokens(self, key: str, n: int) -> list[int]:
        s = self.scenario
        draw = array("I", random.Random(f"{s.seed}/{key}").randbytes(4 * n))
        return [s.first_token + x % (s.vocab - s.first_token) for x in draw]


def shared_tokens(scenario: Scenario) -> int:
    """Length of the prefix (tools and system prompt) that all sessions share."""
    return max(scenario.min_tokens, round(SHARED_TOKENS * scenario.context_scale))


def quantile(table: tuple[float, ...], u: float) -> float:
    """Value at probability u: log-linear between the published quantiles."""
    i = min(bisect_right(PROBABILITIES, u), len(PROBABILITIES) - 1)
    lo, hi = PROBABILITIES[i - 1], PROBABILITIES[i]
    share = (u - lo) / (hi - lo)
    return math.exp(math.log(table[i - 1]) * (1 - share) + math.log(table[i]) * share)


def session(scenario: Scenario, number: int, start_s: float) -> Session:
    """The session of a given number: depends on the scenario's seed and the number alone."""
    s, rng = scenario, random.Random(f"{scenario.seed}/session/{number}")
    shared = shared_tokens(s)
    limits, weights = zip(*CONTEXT_LIMITS, strict=True)
    limit = min(s.max_context, round(rng.choices(limits, weights)[0] * s.context_scale))
    summary = round(limit * SUMMARY_SHARE)
    turns: list[Turn] = []
    context = shared
    for i in range(max(2, round(quantile(TURNS, rng.random()) * s.turns_scale))):
        output = max(s.min_tokens, round(quantile(OUTPUT, rng.random()) * s.output_scale))
        output = min(output, max(s.min_tokens, limit // 4))
        fresh = max(s.min_tokens, round(quantile(FRESH, rng.random()) * s.context_scale))
        fresh = max(s.min_tokens, min(fresh, limit - shared - summary - output))
        gap = min(s.gap_cap_s, quantile(GAP_S, rng.random()) * s.gap_scale) if i else 0.0
        compacted = context + fresh + output > limit
        if compacted:
            context = shared + summary
        turns.append(Turn(fresh, output, gap, compacted))
        context += fresh + output
    first = int(len(turns) * rng.uniform(0.25, 0.75)) if s.join_midway else 0
    return Session(number, start_s, s, summary, tuple(turns), first)


def sessions(scenario: Scenario, worker: int = 0, workers: int = 1) -> Iterator[Session]:
    """Sessions in order of arrival (Poisson), without end; several load processes share them out by number."""
    rng = random.Random(f"{scenario.seed}/arrivals")
    now = 0.0
    for number in count():
        if number % workers == worker:
            yield session(scenario, number, now)
        now += rng.expovariate(scenario.sessions_per_s)


def preview(scenario: Scenario, n: int) -> list[Session]:
    """The first n sessions."""
    return list(islice(sessions(scenario), n))


def named(name: str, **changes: Any) -> Scenario:
    """A scenario by name with some settings changed. Raises ValueError for an unknown name."""
    if name not in SCENARIOS:
        raise ValueError(f"unknown scenario {name!r}; there are {', '.join(SCENARIOS)}")
    return replace(SCENARIOS[name], **changes)
