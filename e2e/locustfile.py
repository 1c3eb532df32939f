"""Locust users that are agents: sessions of streamed completions with growing prefixes, every token's time kept.

    locust -f e2e/locustfile.py --host http://127.0.0.1:8000 --headless --users 16 --run-time 60s

works by itself against any OpenAI-compatible server that takes token ids (vLLM does): with the web UI (leave
--headless out), in several processes (--processes 4), or over hosts (--master, --worker --master-host NAME; their
clocks must agree). Sessions arrive on their own schedule, whether or not the server keeps up; latency counts from the
scheduled time, so queueing is not hidden. Give more users than sessions that overlap, or the lateness column of the
report grows.

--records receives one JSON line per request the moment it ends, however it ends, and each second the token times of
those still running; each process writes a file of its own. Locust's own percentiles are rounded to two digits; compute
them from these lines (`blackwell-kernels e2e report FILE`).
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
import psutil
import requests
from locust import HttpUser, constant, events, task
from locust.runners import MasterRunner, WorkerRunner

try:
    from blackwell_kernels.e2e.records import RecordFile
    from blackwell_kernels.e2e.sessions import SCENARIOS, Scenario, Session, Source, named, sessions, tokens
    from blackwell_kernels.e2e.stream import CUT_OFF, LEAD_S, Refused, collect, wrong_length
except ModuleNotFoundError:  # Locust in its own environment: its loader puts this file's folder on the path
    from records import RecordFile  # type: ignore[import-not-found,no-redef]
    from sessions import (  # type: ignore[import-not-found,no-redef]
        SCENARIOS,
        Scenario,
        Session,
        Source,
        named,
        sessions,
        tokens,
    )
    from stream import CUT_OFF, LEAD_S, Refused, collect, wrong_length  # type: ignore[import-not-found,no-redef]

SCHEMA = 2
RETRY_S = 1.0  # after a failed turn, before the next session
CLIENT_S = 1.0  # between looks at this process's own load
TEXTS = 50_000  # rendered parts of prompts that are kept: a growing prompt renders only what is new
# perf_counter is monotonic; one offset makes it comparable between processes
EPOCH = time.time() - time.perf_counter()


def now() -> float:
    """Seconds since the epoch, monotonic within this process."""
    return EPOCH + time.perf_counter()


class Load:
    """What the users of one process share: the sessions still to come and the file of records."""

    def __init__(
        self,
        scenario: Scenario,
        path: Path,
        *,
        worker: int = 0,
        workers: int = 1,
        source: Source | None = None,
        started: float | None = None,
        seconds: float | None = None,
    ) -> None:
        self.scenario, self.worker, self.started = scenario, worker, started or now() + LEAD_S
        self.ends = self.started + seconds if seconds else float("inf")
        self.sessions: Iterator[Session] = sessions(scenario, worker, workers, source)
        self.model: str | None = None
        self.file = RecordFile(path)
        self.ids = (f"{worker}.{number}" for number in itertools.count())
        self.text = lru_cache(TEXTS)(self._text)
        start = {"kind": "start", "schema": SCHEMA, "time": now(), "scenario": scenario.to_dict(), "worker": worker}
        about: dict[str, Any] = {
            "started": self.started,
            "seconds": seconds,
            "source": getattr(source, "describe", dict)(),
        }
        self.write({**start, **about})
        self.meter = gevent.spawn(self._meter)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self.file.write(row)

    def body(self, session: Session, turn: int) -> bytes:
        """The JSON of a request. Its tokens are rendered once a part: a long prompt must not hold up others' tokens."""
        planned = session.turns[turn]
        settings = {
            "model": self.model,
            "max_tokens": planned.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        prompt = ", ".join(self.text(key, n) for key, n in session.parts(turn) if n)
        return f'{json.dumps(settings)[:-1]}, "prompt": [{prompt}]}}'.encode()

    def close(self) -> None:
        """The load is over."""
        self.meter.kill()
        self.write({"kind": "stop", "time": now()})
        self.file.close()

    def _text(self, key: str, n: int) -> str:
        return ", ".join(map(str, tokens(self.scenario, key, n)))

    def _meter(self) -> None:
        process = psutil.Process()
        process.cpu_percent()
        while True:
            due = now() + CLIENT_S
            gevent.sleep(CLIENT_S)
            woke = now()
            # a greenlet that wakes late is what every token's time suffers from as well
            cpu = process.cpu_percent() / 100
            self.write({"kind": "client", "time": woke, "worker": self.worker, "cpu": cpu, "late": woke - due})


load: Load | None = None


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    group = parser.add_argument_group("agent sessions")
    group.add_argument("--scenario", default="agent", help=f"one of {', '.join(SCENARIOS)}")
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a scenario setting")
    group.add_argument("--source", default="", metavar="FILE", help="play the recorded sessions of this file")
    group.add_argument("--records", default="out/records.jsonl", help="file of raw records, one JSON line a request")
    group.add_argument("--send-for", type=float, default=0.0, metavar="S", help="send no turn later than this")
    # the master fills these in: its options travel to the workers
    group.add_argument("--shares", type=int, default=0, help="load processes that share the sessions; 0: find out")
    group.add_argument("--start-at", type=float, default=0.0, help="epoch second of the first arrival; 0: soon")


@events.test_start.add_listener
def _start(environment: Any, **_: Any) -> None:
    global load
    options, runner = environment.parsed_options, environment.runner
    if isinstance(runner, MasterRunner):
        options.shares, options.start_at = runner.worker_count, now() + LEAD_S
        return
    scenario = parse_scenario(options.scenario, options.set)
    path, worker, workers = Path(options.records), 0, 1
    if isinstance(runner, WorkerRunner):
        worker, workers = runner.worker_index, max(1, options.shares)
        path = path.with_stem(f"{path.stem}-{worker}")
    load = Load(
        scenario,
        path,
        worker=worker,
        workers=workers,
        source=open_source(options.source, scenario),
        started=options.start_at or None,
        seconds=options.send_for or None,
    )


@events.test_stop.add_listener
def _stop(environment: Any, **_: Any) -> None:
    global load
    if load is not None:
        load.close()
    load = None


def parse_scenario(name: str, settings: Iterable[str]) -> Scenario:
    """A named scenario with NAME=VALUE changes. Raises ValueError for what does not exist."""
    changes = {}
    for item in settings:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, not {item!r}")
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value  # a bare word
    return Scenario.from_dict({**named(name).to_dict(), **changes})


def open_source(path: str, scenario: Scenario) -> Source | None:
    """The recorded sessions of a file; None for no file, which means made ones."""
    if not path:
        return None
    try:
        from blackwell_kernels.e2e.sources import load as load_source
    except ModuleNotFoundError:
        from sources import load as load_source  # type: ignore[import-not-found,no-redef]
    return load_source(Path(path), scenario)


class Agent(HttpUser):
    """Takes the next session when it is due and plays its turns."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Learn the name of the served model once a process."""
        if load is not None and load.model is None:
            reply = self.client.get("/v1/models")
            load.model = reply.json()["data"][0]["id"] if reply.ok else "unknown"

    @task
    def play(self) -> None:
        """One session."""
        assert load is not None
        session = next(load.sessions)
        if not self._converse(load, session, load.started + session.start_s, session.id, None):
            gevent.sleep(RETRY_S)

    def _converse(
        self, load: Load, session: Session, scheduled: float, root: int | str, agent: int | str | None
    ) -> bool:
        """Play a session, or a sub-agent's; whether all of it went well."""
        for number in range(session.first_turn, len(session.turns)):
            turn = session.turns[number]
            if number > session.first_turn:
                if turn.agents and not self._agents(load, turn.agents, root):
                    return False
                scheduled = now() + turn.gap_s
            if scheduled > load.ends:
                gevent.sleep(max(0.0, load.ends - now()) + RETRY_S)
                return True
            body = load.body(session, number)  # before its time: rendering is not latency
            gevent.sleep(max(0.0, scheduled - now()))
            if not self._complete(load, session, number, body, scheduled, root, agent):
                return False
        return True

    def _agents(self, load: Load, agents: tuple[Session, ...], root: int | str) -> bool:
        group = gevent.pool.Group()
        try:
            playing = [group.spawn(self._converse, load, one, now(), root, one.id) for one in agents]
            gevent.joinall(playing)
        finally:
            group.kill()  # when Locust ends the parent
        return all(greenlet.value for greenlet in playing)

    def _complete(
        self,
        load: Load,
        session: Session,
        number: int,
        body: bytes,
        scheduled: float,
        root: int | str,
        agent: int | str | None,
    ) -> bool:
        turn = session.turns[number]
        row: dict[str, Any] = {
            "kind": "request",
            "id": next(load.ids),
            "session": root,
            "agent": agent,
            "turn": number,
            "turns": len(session.turns),
            "first_turn": session.first_turn,
            "scheduled": round(scheduled, 6),
            "sent": round(now(), 6),
            "prompt_tokens": session.prompt_tokens(number),
            "reusable_tokens": session.reusable(number),
            "expected_tokens": turn.output,
            "tokens": [],
            "end": None,
            "usage": None,
            "aborted": False,
            "error": {"kind": CUT_OFF, "message": "still running when the load ended"},
        }
        try:
            self._stream(load, body, row, turn.abort_after)
            row["error"] = None if row["aborted"] else wrong_length(row)
        except Refused as error:
            row["error"] = {"kind": error.kind, "message": str(error)[:300]}
        except requests.exceptions.RequestException as error:
            kind = "broken stream" if row["tokens"] else "connection"
            row["error"] = {"kind": kind, "message": str(error)[:300]}
        except (KeyError, ValueError, TypeError) as error:
            row["error"] = {"kind": "malformed reply", "message": f"{type(error).__name__}: {error}"[:300]}
        finally:  # also when Locust ends this greenlet in the middle of a stream
            row["end"] = round(now(), 6)
            load.write(row)
            self._tell_locust(row)
        return row["error"] is None

    def _stream(self, load: Load, body: bytes, row: dict[str, Any], abort_after: int | None) -> None:
        headers = {"Content-Type": "application/json"}
        with self.client.post("/v1/completions", data=body, headers=headers, stream=True, catch_response=True) as reply:
            if reply.status_code == 0:  # no answer: Locust keeps the reason in its place
                reply.failure(str(reply.error))
                raise reply.error
            if reply.status_code != 200:
                reply.failure(f"HTTP {reply.status_code}")
                raise Refused(f"HTTP {reply.status_code}", reply.text)
            collect(reply.iter_lines(), row, clock=now, keep=load.write, abort_after=abort_after)
            reply.success()
            if row["aborted"]:
                reply.close()  # the server sees its client go

    def _tell_locust(self, row: dict[str, Any]) -> None:
        tokens, error = row["tokens"], row["error"]
        if row["aborted"] or (error and error["kind"] == CUT_OFF):
            return
        failed = RuntimeError(error["kind"]) if error else None
        figures = {"E2E": row["end"] - row["scheduled"]}
        if tokens:
            figures["TTFT"] = tokens[0] - row["scheduled"]
        if len(tokens) > 1:
            figures["TPOT"] = (tokens[-1] - tokens[0]) / (len(tokens) - 1)
        for name, seconds in figures.items():
            self.environment.events.request.fire(
                request_type="SSE",
                name=name,
                response_time=seconds * 1e3,
                response_length=len(tokens),
                exception=failed,
                context={},
            )
