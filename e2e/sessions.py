"""Agent sessions: when they arrive, how many turns they take, what each turn sends. Standard library only.

Fitted to 710 recorded coding-agent sessions with 48,658 requests (public traces of callanjfox/kv-cache-tester, commit
94f6046, Apache-2.0): turns per session, fresh tokens per turn, output tokens and think gaps follow the published
quantiles; input tokens per request then follow from growth, a shared prefix of tools and system prompt, and compaction
when a session's context is full, and land within 30 % of the recorded quantiles (43k, 105k, 236k, 500k).

A turn's prompt is the previous prompt, the recorded answer and fresh tokens, all as token ids drawn from (seed, what
they are): equal prefixes are equal tokens, in every process and every run, so prefix caching behaves as it would.
Before a turn, a parent may wait for 2-4 sub-agents: short sessions of their own, shaped like the 63 recorded ones.
Recorded sessions, played instead of made ones, come from `sources`.
"""

from __future__ import annotations

import math
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import count, islice
from typing import Any, Protocol

PROBABILITIES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
# value at each probability; p10 to p99 as published, the ends continue the neighbouring slope moderately
TURNS = (3.0, 7.0, 45.0, 156.0, 330.0, 420.0)
FRESH = (64.0, 192.0, 704.0, 4032.0, 65856.0, 85000.0)
OUTPUT = (30.0, 105.0, 216.0, 899.0, 3663.0, 4800.0)
GAP_S = (1.0, 4.0, 10.0, 166.0, 3027.0, 3600.0)
SHARED_TOKENS = 15000
CONTEXT_LIMITS = ((160e3, 0.45), (260e3, 0.35), (560e3, 0.20))  # tokens at which a session compacts, share of sessions
SUMMARY_SHARE = 0.1  # of the limit, what a compaction leaves of the conversation
# sub-agents: p10, p50, p90 of the 63 in those traces
AGENTS = (2, 4)
AGENT_TURNS = (2.0, 4.0, 10.0, 17.0, 24.0, 24.0)
AGENT_FRESH = (64.0, 250.0, 2260.0, 13050.0, 24000.0, 30000.0)
AGENT_OUTPUT = (60.0, 131.0, 235.0, 542.0, 1000.0, 1500.0)
AGENT_SHARED_TOKENS = 9000
ARRIVALS = ("poisson", "gamma", "trace")


@dataclass(frozen=True)
class Scenario:
    """What traffic to make. Scales shrink the published quantities; gaps are capped after scaling."""

    seed: int = 0
    arrivals: str = "poisson"  # poisson, gamma, or trace: the recorded times of a source
    sessions_per_s: float = 0.5  # mean rate; with trace arrivals, 0 keeps the recorded pace
    burstiness: float = 1.0  # gamma arrivals: the distribution's shape; 1 is Poisson, less is burstier
    context_scale: float = 1.0  # shared prefix, fresh tokens and context limits
    output_scale: float = 1.0
    turns_scale: float = 1.0  # of made sessions; recorded ones keep their turns
    gap_scale: float = 1.0
    gap_cap_s: float = 60.0
    max_context: int = 1 << 20  # prompt and output together never exceed it
    min_tokens: int = 4  # fewest fresh tokens and output tokens of a turn
    fanout_share: float = 0.0  # of turns that wait for 2-4 sub-agents (recorded sessions: as recorded)
    abort_share: float = 0.0  # of requests that the client drops in the middle of the answer
    join_midway: bool = False  # start 25-75 % through each session, as in a system that has been running
    first_token: int = 3  # token ids are drawn from [first_token, vocab)
    vocab: int = 1024

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise ValueError(f"unknown arrivals {self.arrivals!r}; there are {', '.join(ARRIVALS)}")
        if self.burstiness <= 0 or self.sessions_per_s < 0 or (self.sessions_per_s == 0 and self.arrivals != "trace"):
            raise ValueError("sessions_per_s and burstiness must be above 0 (sessions_per_s=0 only for trace arrivals)")
        if not 0 <= self.fanout_share <= 1 or not 0 <= self.abort_share <= 1:
            raise ValueError("fanout_share and abort_share are shares, between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scenario:
        """From JSON. Raises ValueError for a name that does not exist or a value that means nothing."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown scenario settings {', '.join(unknown)}; there are {', '.join(sorted(known))}")
        return cls(**values)


_SMALL: dict[str, Any] = {"context_scale": 1 / 256, "output_scale": 1 / 16, "turns_scale": 1 / 6, "gap_scale": 1 / 20}
MIXED: dict[str, Any] = {"arrivals": "gamma", "burstiness": 0.25, "fanout_share": 0.05, "abort_share": 0.05}
SCENARIOS = {
    "agent": Scenario(),
    # a quarter of the context and a fifth of the thinking, joined midway: steady from the first minute on one GPU
    "agent64k": Scenario(context_scale=1 / 4, gap_scale=1 / 5, gap_cap_s=10.0, max_context=65536, join_midway=True),
    # what half a minute can hold: the same prompts, a quarter of the answers, hardly a pause, from each session's start
    "short": Scenario(context_scale=1 / 4, output_scale=1 / 4, gap_scale=1 / 5, gap_cap_s=1.0, max_context=65536),
    # many turns wait for sub-agents
    "fanout": Scenario(fanout_share=0.05),
    # sessions come in clusters
    "bursty": Scenario(arrivals="gamma", burstiness=0.25),
    # a minute on a laptop: contexts of a few hundred tokens, answers of a dozen, several turns
    "demo": Scenario(sessions_per_s=0.4, gap_cap_s=2.0, max_context=1000, **_SMALL),
    # everything at once: bursts, sub-agents, requests dropped half-way, long and short
    "soak": Scenario(**MIXED),
}


@dataclass(frozen=True)
class Turn:
    """One request: fresh prompt tokens, output tokens, seconds of thinking before it, whether history was compacted.

    `agents` are sub-agents that the parent starts together and waits for before it thinks and sends this turn;
    `abort_after`: the client drops the request after so many tokens.
    """

    fresh: int
    output: int
    gap_s: float
    compacted: bool = False
    agents: tuple[Session, ...] = ()
    abort_after: int | None = None


@dataclass(frozen=True)
class Session:
    """One agent's conversation. A subclass says what its prompts are made of."""

    id: int | str
    start_s: float
    scenario: Scenario = field(repr=False)
    turns: tuple[Turn, ...] = ()
    first_turn: int = 0

    def parts(self, turn: int) -> list[tuple[str, int]]:
        """(what it is, tokens) of each part of the prompt of one turn; equal names are equal tokens."""
        raise NotImplementedError

    def reusable(self, turn: int) -> int:
        """Leading prompt tokens that a prefix cache that forgets nothing can have seen."""
        raise NotImplementedError

    def prompt(self, turn: int) -> list[int]:
        """Token ids of the prompt of one turn."""
        return [token for key, n in self.parts(turn) for token in tokens(self.scenario, key, n)]

    def prompt_tokens(self, turn: int) -> int:
        """Their number."""
        return sum(n for _, n in self.parts(turn))


@dataclass(frozen=True)
class Made(Session):
    """A session of the generator."""

    summary_tokens: int = 0
    shared: tuple[str, int] = ("shared", 0)

    def parts(self, turn: int) -> list[tuple[str, int]]:
        """The shared prefix, a summary after a compaction, then fresh tokens and answers in turn."""
        begin = max((i for i in range(turn + 1) if self.turns[i].compacted), default=0)
        parts = [self.shared]
        if self.turns[begin].compacted:
            parts.append((f"{self.id}/{begin}/summary", self.summary_tokens))
        for i in range(begin, turn + 1):
            parts.append((f"{self.id}/{i}/fresh", self.turns[i].fresh))
            if i < turn:
                parts.append((f"{self.id}/{i}/answer", self.turns[i].output))
        return parts

    def reusable(self, turn: int) -> int:
        """The previous prompt, or what all sessions share. The served answer is not the recorded one: not counted."""
        if turn == self.first_turn or self.turns[turn].compacted:
            return self.shared[1]
        return self.prompt_tokens(turn - 1)


class Source(Protocol):
    """Where recorded sessions come from."""

    def session(self, number: int, start_s: float) -> Session:
        """The session that arrives as the number-th."""

    def arrivals(self) -> Iterator[float]:
        """Seconds at which sessions arrive, as recorded, without end."""


def tokens(scenario: Scenario, key: str, n: int) -> list[int]:
    """n token ids that depend on the seed and the key alone."""
    draw = array("I", random.Random(f"{scenario.seed}/{key}").randbytes(4 * n))
    first, span = scenario.first_token, scenario.vocab - scenario.first_token
    return [first + x % span for x in draw]


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
    extras = random.Random(f"{scenario.seed}/extras/{number}")
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
        agents: tuple[Session, ...] = ()
        if i and extras.random() < s.fanout_share:
            agents = tuple(sub_agent(s, f"{number}/{i}.{k}", limit) for k in range(extras.randint(*AGENTS)))
        turns.append(Turn(fresh, output, gap, compacted, agents, abort(s, extras, output)))
        context += fresh + output
    first = int(len(turns) * rng.uniform(0.25, 0.75)) if s.join_midway else 0
    return Made(number, start_s, s, tuple(turns), first, summary, ("shared", shared))


def sub_agent(scenario: Scenario, name: str, limit: int) -> Session:
    """A sub-agent: its own tools and system prompt, shared by all sub-agents, and a few turns without thinking."""
    s, rng = scenario, random.Random(f"{scenario.seed}/agent/{name}")
    context = shared = min(limit // 2, max(s.min_tokens, round(AGENT_SHARED_TOKENS * s.context_scale)))
    turns: list[Turn] = []
    for _ in range(max(1, round(quantile(AGENT_TURNS, rng.random()) * s.turns_scale))):
        output = max(s.min_tokens, round(quantile(AGENT_OUTPUT, rng.random()) * s.output_scale))
        output = min(output, max(s.min_tokens, limit // 4))
        fresh = max(s.min_tokens, round(quantile(AGENT_FRESH, rng.random()) * s.context_scale))
        fresh = max(1, min(fresh, limit - shared - output))
        context += fresh + output
        if turns and context > limit:
            break
        turns.append(Turn(fresh, output, 0.0))
    return Made(name, 0.0, s, tuple(turns), shared=("shared by sub-agents", shared))


def abort(scenario: Scenario, rng: random.Random, output: int) -> int | None:
    """After how many tokens the client drops a request, or None for one that it reads to its end."""
    return rng.randint(1, max(1, output // 2)) if rng.random() < scenario.abort_share else None


def arrivals(scenario: Scenario, source: Source | None = None) -> Iterator[float]:
    """Seconds at which sessions arrive, the first at 0, without end. Raises ValueError when there are none recorded."""
    if scenario.arrivals == "trace":
        if source is None:
            raise ValueError("trace arrivals need a source with recorded times: --source FILE")
        yield from source.arrivals()
        return
    rng = random.Random(f"{scenario.seed}/arrivals")
    shape = scenario.burstiness
    now = 0.0
    while True:
        yield now
        if scenario.arrivals == "gamma":
            now += rng.gammavariate(shape, 1 / (shape * scenario.sessions_per_s))
        else:
            now += rng.expovariate(scenario.sessions_per_s)


def sessions(scenario: Scenario, worker: int = 0, workers: int = 1, source: Source | None = None) -> Iterator[Session]:
    """Sessions in order of arrival, without end; several load processes share them out by number."""
    for number, start_s in zip(count(), arrivals(scenario, source), strict=False):
        if number % workers == worker:
            yield source.session(number, start_s) if source else session(scenario, number, start_s)


def preview(scenario: Scenario, n: int, source: Source | None = None) -> list[Session]:
    """The first n sessions."""
    return list(islice(sessions(scenario, source=source), n))


def named(name: str, **changes: Any) -> Scenario:
    """A scenario by name with some settings changed. Raises ValueError for an unknown name."""
    if name not in SCENARIOS:
        raise ValueError(f"unknown scenario {name!r}; there are {', '.join(SCENARIOS)}")
    return replace(SCENARIOS[name], **changes)
