"""Locust users that are agents: sessions of streamed completions with growing prefixes, every token's time kept.

    locust -f e2e/locustfile.py --host http://127.0.0.1:8000 --headless --users 16 --run-time 60s

works by itself against any OpenAI-compatible server that takes token ids (vLLM does). Sessions arrive on their own
schedule, whether or not the server keeps up; latency counts from the scheduled time, so queueing is not hidden. Give
more users than sessions that overlap, or the lateness column of the report grows.

One JSON line per request is appended to --records the moment the request ends, however it ends. Locust's own
percentiles are rounded to two digits; compute them from these lines (`blackwell-kernels e2e report FILE`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import gevent
import requests
from locust import HttpUser, constant, events, task
from locust.runners import MasterRunner, WorkerRunner

try:
    from blackwell_kernels.e2e.sessions import Scenario, Session, named, sessions, shared_tokens
except ModuleNotFoundError:  # Locust in its own environment: its loader puts this file's folder on the path
    from sessions import Scenario, Session, named, sessions, shared_tokens  # type: ignore[import-not-found,no-redef]

SCHEMA = 1
CUT_OFF = "unfinished"
LEAD_S = 1.0  # from Locust's start to the first arrival: users are spawned meanwhile
RETRY_S = 1.0  # after a failed turn, before the next session
# perf_counter is monotonic; one offset makes it comparable between processes
EPOCH = time.time() - time.perf_counter()


def now() -> float:
    """Seconds since the epoch, monotonic within this process."""
    return EPOCH + time.perf_counter()


class Load:
    """What the users of one process share: the sessions still to come and the file of records."""

    def __init__(self, scenario: Scenario, path: Path, worker: int, workers: int) -> None:
        self.started = now() + LEAD_S
        self.sessions: Iterator[Session] = sessions(scenario, worker, workers)
        self.model: str | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: TextIO = path.open("a", buffering=1)
        self.write({"kind": "start", "schema": SCHEMA, "time": now(), "scenario": scenario.to_dict(), "worker": worker})

    def write(self, row: dict[str, Any]) -> None:
        """Append one line; a full disk must not end the run, the lines so far are kept."""
        try:
            self.file.write(json.dumps(row) + "\n")
        except OSError as error:
            print(f"cannot write a record: {error}")


load: Load | None = None


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    group = parser.add_argument_group("agent sessions")
    group.add_argument("--scenario", default="agent", help="named scenario: agent, demo")
    group.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a scenario setting")
    group.add_argument("--records", default="out/records.jsonl", help="file of raw records, one JSON line a request")


@events.test_start.add_listener
def _start(environment: Any, **_: Any) -> None:
    global load
    if isinstance(environment.runner, MasterRunner):
        return
    options = environment.parsed_options
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in options.set)}
    scenario = Scenario.from_dict({**named(options.scenario).to_dict(), **changes})
    path, worker, workers = Path(options.records), 0, 1
    if isinstance(environment.runner, WorkerRunner):
        worker, workers = environment.runner.worker_index, max(1, options.processes or options.expect_workers or 1)
        path = path.with_stem(f"{path.stem}-{worker}")
    load = Load(scenario, path, worker, workers)


@events.test_stop.add_listener
def _stop(environment: Any, **_: Any) -> None:
    if load is not None:
        load.write({"kind": "stop", "time": now()})


class Refused(Exception):
    """The server said no, or gave up in the middle of an answer."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


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
        scheduled = load.started + session.start_s
        reusable = shared_tokens(session.scenario)
        for number in range(session.first_turn, len(session.turns)):
            if number > session.first_turn:
                scheduled = now() + session.turns[number].gap_s
            gevent.sleep(max(0.0, scheduled - now()))
            prompt = session.prompt(number)
            if session.turns[number].compacted:
                reusable = shared_tokens(session.scenario)
            if not self._complete(session, number, prompt, scheduled, reusable):
                gevent.sleep(RETRY_S)
                return
            reusable = len(prompt)

    def _complete(self, session: Session, number: int, prompt: list[int], scheduled: float, reusable: int) -> bool:
        assert load is not None
        turn = session.turns[number]
        row: dict[str, Any] = {
            "kind": "request",
            "session": session.id,
            "turn": number,
            "turns": len(session.turns),
            "scheduled": scheduled,
            "sent": now(),
            "prompt_tokens": len(prompt),
            "reusable_tokens": reusable,
            "expected_tokens": turn.output,
            "tokens": [],
            "end": None,
            "usage": None,
            "error": {"kind": CUT_OFF, "message": "still running when the load ended"},
        }
        body = {
            "model": load.model,
            "prompt": prompt,
            "max_tokens": turn.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        try:
            self._stream(body, row)
            row["error"] = _wrong_length(row)
        except Refused as error:
            row["error"] = {"kind": error.kind, "message": str(error)[:300]}
        except requests.exceptions.RequestException as error:
            kind = "broken stream" if row["tokens"] else "connection"
            row["error"] = {"kind": kind, "message": str(error)[:300]}
        except (KeyError, ValueError, TypeError) as error:
            row["error"] = {"kind": "malformed reply", "message": f"{type(error).__name__}: {error}"[:300]}
        finally:  # also when Locust ends this greenlet in the middle of a stream
            row["end"] = now()
            load.write(row)
            self._tell_locust(row)
        return row["error"] is None

    def _stream(self, body: dict[str, Any], row: dict[str, Any]) -> None:
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as reply:
            if reply.status_code != 200:
                reply.failure(f"HTTP {reply.status_code}")
                raise Refused(f"HTTP {reply.status_code}", reply.text)
            for line in reply.iter_lines():
                if not line.startswith(b"data: ") or line == b"data: [DONE]":
                    continue
                arrived = now()
                data = json.loads(line[6:])
                if "error" in data:
                    raise Refused("error in the stream", str(data["error"]))
                if data.get("usage"):
                    row["usage"] = data["usage"]
                for choice in data["choices"]:
                    # a chunk is one token, unless the server says how many it carries
                    row["tokens"] += [arrived] * len(choice.get("token_ids") or (0,))
            reply.success()

    def _tell_locust(self, row: dict[str, Any]) -> None:
        tokens, error = row["tokens"], row["error"]
        if error and error["kind"] == CUT_OFF:
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


def _wrong_length(row: dict[str, Any]) -> dict[str, str] | None:
    got = row["usage"]["completion_tokens"] if row["usage"] else len(row["tokens"])
    if got == row["expected_tokens"]:
        return None
    return {"kind": "wrong length", "message": f"asked for {row['expected_tokens']} tokens, got {got}"}
