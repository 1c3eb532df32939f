"""Recorded sessions to play instead of made ones: three formats, told apart by their content.

sessions  `{id, block, tools, system, turns: [[t, in, out, kept_blocks, blocks, think, api], ...]}`, one a line
          (.jsonl, .jsonl.gz): coding-agent sessions re-encoded to what a replay needs.
trace     `{id, block_size, tool_tokens, system_tokens, requests: [{t, type, in, out, hash_ids, think_time}, ...]}`,
          one a .json file (or a folder of them, or one a line): the traces of callanjfox/kv-cache-tester, as its
          docs/trace_replay_tester.md and the files themselves have them. A request of type "subagent" holds requests
          of its own; neighbours start together and the parent waits for them.
mooncake  `{timestamp, input_length, output_length, hash_ids}`, one request a line, milliseconds, 512-token blocks:
          each line is a session of one turn.

Equal block ids are equal tokens, so a prefix cache hits where it hit when recorded. Block ids of the first two formats
mean something within a session only; sessions whose tools and system prompt have the same lengths are taken to share
them. A context scale shortens every block alike. Turns beyond `max_context` end their session.
"""

from __future__ import annotations

import gzip
import json
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

try:
    from blackwell_kernels.e2e.sessions import Scenario, Session, Turn, abort
except ModuleNotFoundError:  # beside the Locust file, in an environment of its own
    from sessions import Scenario, Session, Turn, abort  # type: ignore[import-not-found,no-redef]

MOONCAKE_BLOCK = 512
FORMATS = "re-encoded sessions (.jsonl), kv-cache-tester traces (.json) and Mooncake requests (.jsonl), also .gz"
Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]


class SourceError(ValueError):
    """A file of recorded sessions is missing, corrupt, or holds nothing that can be played."""


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Encoded(_Row):
    id: str
    block: Size
    tools: Count
    system: Count
    turns: Annotated[list[Annotated[list[float], Field(min_length=7, max_length=7)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _blocks_fit(self) -> _Encoded:
        before = 0
        for i, (_, tokens_in, out, kept, blocks, think, _) in enumerate(self.turns):
            if any(int(x) != x or x < 0 for x in (tokens_in, out, kept, blocks)) or think < 0 or tokens_in < 1:
                raise ValueError(f"turn {i}: in, out, kept_blocks, blocks must be whole numbers, think at least 0")
            if kept > min(before, blocks):
                raise ValueError(f"turn {i} keeps {kept:.0f} blocks; it has {blocks:.0f}, the turn before {before:.0f}")
            if blocks * self.block >= tokens_in + self.block:
                raise ValueError(
                    f"turn {i}: {blocks:.0f} blocks of {self.block} are more than its {tokens_in:.0f} tokens"
                )
            before = int(blocks)
        return self


class _Request(_Row):
    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)
    t: float
    type: Literal["n", "s"]
    tokens_in: Annotated[int, Field(alias="in", gt=0)]
    out: Count
    hash_ids: list[Count]
    think_time: Seconds | None = None
    api_time: Seconds | None = None


class _Agent(_Row):
    t: float
    type: Literal["subagent"]
    requests: list[Annotated[_Request | _Agent, Field(discriminator="type")]]
    tool_tokens: Count = 0
    system_tokens: Count = 0
    duration_ms: Seconds = 0


class _Trace(_Row):
    id: str
    block_size: Size
    tool_tokens: Count
    system_tokens: Count
    requests: Annotated[list[Annotated[_Request | _Agent, Field(discriminator="type")]], Field(min_length=1)]


class _Mooncake(_Row):
    timestamp: Seconds
    input_length: Size
    output_length: Count
    hash_ids: list[Count]

    @model_validator(mode="after")
    def _blocks_fit(self) -> _Mooncake:
        if not self.input_length // MOONCAKE_BLOCK <= len(self.hash_ids) <= -(-self.input_length // MOONCAKE_BLOCK):
            raise ValueError(
                f"{len(self.hash_ids)} hash_ids for {self.input_length} tokens; blocks have {MOONCAKE_BLOCK} tokens"
            )
        return self


@dataclass(frozen=True)
class _Step:
    """A recorded request, before any scale."""

    length: int
    output: int
    gap_s: float
    blocks: Sequence[int]
    known: int  # leading blocks that an earlier request of its scope had in the same place
    agents: tuple[_Recording, ...] = ()


@dataclass(frozen=True)
class _Recording:
    """A recorded session. `scope` starts the names of its blocks; tools and system are tokens of its shared prefix."""

    id: str
    block: int
    steps: tuple[_Step, ...]
    scope: str
    tools: int = 0
    system: int = 0
    time_s: float | None = None
    common_blocks: bool = False  # block ids mean the same in every session


@dataclass(frozen=True)
class Recorded(Session):
    """A recorded session as it is played."""

    recording: _Recording | None = None
    scope: str = ""

    def parts(self, turn: int) -> list[tuple[str, int]]:
        """One part a block, and the tokens after the last whole block."""
        assert self.recording is not None
        r, step, scale = self.recording, self.recording.steps[turn], self.scenario.context_scale
        parts = []
        for i, block in enumerate(step.blocks):
            begin, end = i * r.block, min((i + 1) * r.block, step.length)
            if end <= r.tools:
                name = f"tools {r.tools}/{i}"
            elif end <= r.tools + r.system:
                name = f"system {r.tools} {r.system}/{i}"
            else:
                name = f"{self.scope}/{block}"
            if n := round(end * scale) - round(begin * scale):
                parts.append((name, n))
        end = min(len(step.blocks) * r.block, step.length)
        if n := round(step.length * scale) - round(end * scale):
            parts.append((f"{self.scope}/{self.id}/{turn}/rest", n))
        return parts or [(f"{self.scope}/{self.id}/{turn}/rest", 1)]

    def reusable(self, turn: int) -> int:
        """Blocks that the session (Mooncake: any request) had before, at least those of tools and system prompt."""
        assert self.recording is not None
        r, step = self.recording, self.recording.steps[turn]
        shared = (r.tools + r.system) // r.block
        known = step.known if turn > self.first_turn or r.common_blocks else 0
        blocks = min(max(known, shared), len(step.blocks))
        return min(round(min(blocks * r.block, step.length) * self.scenario.context_scale), self.prompt_tokens(turn))


class Recordings:
    """Recorded sessions, in the order of a scenario's seed (trace arrivals: as recorded), again and again.

    Each pass renames the blocks, so a second pass does not hit what the first left in a cache.
    """

    def __init__(self, recordings: list[_Recording], scenario: Scenario, name: str, kind: str) -> None:
        self.scenario, self.name, self.kind = scenario, name, kind
        kept = [cut for r in recordings if (cut := _within(r, scenario)).steps]
        if not kept:
            raise SourceError(
                f"{name}: no session fits max_context={scenario.max_context} at context_scale="
                f"{scenario.context_scale:g}: raise the one or lower the other"
            )
        self.dropped_turns = sum(len(r.steps) for r in recordings) - sum(len(r.steps) for r in kept)
        if scenario.arrivals == "trace":
            if any(r.time_s is None for r in kept):
                raise SourceError(f"{name}: {kind} have no arrival times: use poisson or gamma arrivals")
            kept.sort(key=lambda r: r.time_s or 0.0)
        else:
            random.Random(f"{scenario.seed}/order").shuffle(kept)
        self.recordings = kept

    def describe(self) -> dict[str, Any]:
        """What is played, for the record."""
        turns = sum(len(r.steps) for r in self.recordings)
        found = {"file": self.name, "format": self.kind, "sessions": len(self.recordings), "turns": turns}
        return {**found, "turns_beyond_max_context": self.dropped_turns}

    def session(self, number: int, start_s: float) -> Session:
        """The session that arrives as the number-th."""
        again, which = divmod(number, len(self.recordings))
        suffix = f"#{again}" if again else ""
        recording = self.recordings[which]
        rng = random.Random(f"{self.scenario.seed}/session/{number}")
        played = self._play(recording, f"{recording.id}{suffix}", suffix, rng, start_s)
        if self.scenario.join_midway:
            return replace(played, first_turn=int(len(played.turns) * rng.uniform(0.25, 0.75)))
        return played

    def arrivals(self) -> Iterator[float]:
        """Recorded times from 0, stretched to the scenario's rate unless that is 0."""
        times = [r.time_s or 0.0 for r in self.recordings]
        span = times[-1] - times[0] + (times[-1] - times[0]) / max(1, len(times) - 1) if len(times) > 1 else 1.0
        rate = self.scenario.sessions_per_s
        stretch = len(times) / (span * rate) if rate and span else 1.0
        again = 0
        while True:
            yield from ((again * span + t - times[0]) * stretch for t in times)
            again += 1

    def _play(self, r: _Recording, name: str, suffix: str, rng: random.Random, start_s: float = 0.0) -> Session:
        s = self.scenario
        turns = []
        for i, step in enumerate(r.steps):
            agents = tuple(
                self._play(agent, f"{name}/{i}.{k}", suffix, rng) for k, agent in enumerate(step.agents) if agent.steps
            )
            output = max(1, round(step.output * s.output_scale))
            gap = min(s.gap_cap_s, step.gap_s * s.gap_scale) if i else 0.0
            turns.append(Turn(round(step.length * s.context_scale), output, gap, False, agents, abort(s, rng, output)))
        return Recorded(name, start_s, s, tuple(turns), recording=r, scope=r.scope + suffix)


def load(path: Path, scenario: Scenario) -> Recordings:
    """Read a file, or a folder of .json files. Raises SourceError: which file and line, what is wrong, what to do."""
    try:
        paths = sorted(path.glob("*.json*")) if path.is_dir() else [path]
        if not paths:
            raise SourceError(f"{path} holds no .json or .jsonl file: name a file with one of {FORMATS}")
        found = [item for p in paths for item in _read(p)]
    except FileNotFoundError as error:
        raise SourceError(f"{path} does not exist: --source takes a file of {FORMATS}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read: {error}; if it is compressed, it may be cut short") from error
    kinds = {type(row) for _, row in found}
    if len(kinds) != 1:
        raise SourceError(f"{path} {'mixes formats' if kinds else 'is empty'}: give {FORMATS}, one at a time")
    kind = kinds.pop()
    if kind is _Mooncake:
        return Recordings(_requests(row for _, row in found), scenario, path.name, "Mooncake requests")
    if kind is _Encoded:
        return Recordings([_encoded(row) for _, row in found], scenario, path.name, "re-encoded sessions")
    return Recordings([_trace(row) for _, row in found], scenario, path.name, "kv-cache-tester traces")


_KEYS: dict[str, type[BaseModel]] = {"turns": _Encoded, "requests": _Trace, "input_length": _Mooncake}


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of one file."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        text = file.read()
    if path.name.endswith((".json", ".json.gz")):  # a whole document, which may span lines
        yield 1, _parse(path, 1, text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, _parse(path, number, line)


def _parse(path: Path, line: int, text: str) -> Any:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise SourceError(
            f"{path}:{line}: this is no JSON ({error}); fetch the file again, or remove the line"
        ) from error
    cls = next((cls for key, cls in _KEYS.items() if isinstance(row, dict) and key in row), None)
    if cls is None:
        raise SourceError(f"{path}:{line}: unknown format, none of the keys {', '.join(_KEYS)}; supported: {FORMATS}")
    try:
        return TypeAdapter(cls).validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value, more = repr(first["input"]), error.error_count() - 1
        shown = f" (it is {value[:80]}{'…' if len(value) > 80 else ''})" if where else ""
        others = f" and {more} more" if more else ""
        raise SourceError(
            f"{path}:{line}: {where + ': ' if where else ''}{first['msg']}{shown}{others}; correct or remove the line"
        ) from error


class _Seen:
    """Block sequences that came by, as a tree: how far the start of a new one is known."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[int, int], int] = {}

    def add(self, blocks: Iterable[int]) -> int:
        node, known, on = 0, 0, True
        for block in blocks:
            following = self.nodes.get((node, block))
            on = on and following is not None
            known += on
            if following is None:
                following = self.nodes[(node, block)] = len(self.nodes) + 1
            node = following
        return known


def _encoded(row: _Encoded) -> _Recording:
    steps, blocks, fresh = [], array("q"), 0
    for _, length, out, kept, n, think, _ in row.turns:
        made = int(n) - int(kept)
        blocks = blocks[: int(kept)] + array("q", range(fresh, fresh + made))
        fresh += made
        steps.append(_Step(int(length), int(out), think, blocks, int(kept)))
    return _Recording(row.id, row.block, tuple(steps), row.id, row.tools, row.system)


def _trace(row: _Trace) -> _Recording:
    steps = _steps(row.requests, row.id, row.block_size, _Seen())
    return _Recording(row.id, row.block_size, steps, row.id, row.tool_tokens, row.system_tokens)


def _steps(requests: Sequence[_Request | _Agent], name: str, block: int, seen: _Seen) -> tuple[_Step, ...]:
    steps: list[_Step] = []
    agents: list[_Recording] = []
    waited = 0.0
    before: _Request | None = None
    for number, request in enumerate(requests):
        if isinstance(request, _Agent):
            inner = _steps(request.requests, name, block, seen)
            agents.append(
                _Recording(f"{name}/{number}", block, inner, name, request.tool_tokens, request.system_tokens)
            )
            waited = max(waited, request.duration_ms / 1000)
            continue
        think = request.think_time
        if think is None:  # older traces: from the times, less what the server took
            think = max(0.0, request.t - before.t - (before.api_time or 0.0)) if before else 0.0
        # the recorded gap contains the time that sub-agents took
        gap = max(0.0, think - waited)
        blocks = array("q", request.hash_ids)
        steps.append(_Step(request.tokens_in, request.out, gap, blocks, seen.add(blocks), tuple(agents)))
        agents, waited, before = [], 0.0, request
    return tuple(steps)


def _requests(rows: Iterable[_Mooncake]) -> list[_Recording]:
    seen, found = _Seen(), []
    for number, row in enumerate(rows):
        blocks = array("q", row.hash_ids)
        step = _Step(row.input_length, row.output_length, 0.0, blocks, seen.add(blocks))
        found.append(
            _Recording(
                f"line {number + 1}", MOONCAKE_BLOCK, (step,), "block", time_s=row.timestamp / 1000, common_blocks=True
            )
        )
    return found


def _within(r: _Recording, s: Scenario) -> _Recording:
    """The session up to the first turn that does not fit the context."""
    steps = []
    for step in r.steps:
        if round(step.length * s.context_scale) + max(1, round(step.output * s.output_scale)) > s.max_context:
            break
        steps.append(replace(step, agents=tuple(_within(agent, s) for agent in step.agents)))
    return replace(r, steps=tuple(steps))
