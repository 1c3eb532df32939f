"""Requests before those that count: what a server compiles when it first meets a size is then compiled.

Kernels are compiled for a class of sizes, and a start meets few of them: prompts of many lengths, several at once, some
continuing others, go on in rounds until one of them compiles nothing, or until time is up.
"""

from __future__ import annotations

import concurrent.futures
import math
import random
import re
import time
from typing import Any

from blackwell_kernels.e2e import probe, prometheus
from blackwell_kernels.e2e.console import Steps
from blackwell_kernels.e2e.points import JIT_LINE
from blackwell_kernels.e2e.server import Server

REQUESTS, AT_ONCE = 12, 4  # of a round
FEWEST_ROUNDS = 2
LIMIT_S = 60.0
LONGEST = 16384  # tokens of a request that a long-context server is sent: two chunks of a prefill and more
_TOKENS = 24  # of the longest answer
_OURS = re.compile(r"([\w.<>]+) was compiled after the warm-up")


def run(server: Server, vocab: int, longest: int, steps: Steps, *, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Send rounds of requests of at most `longest` tokens; {requests, seconds, compiled, settled}.

    `compiled` names every kernel as often as the log does since the server's start; `settled`: whether the last round
    compiled none, by the log and, of ours, by /metrics. Raises ServerError when a request fails.
    """
    rng, started = random.Random(0), time.monotonic()
    found: dict[str, Any] = {"requests": 0, "seconds": 0.0, "compiled": compilations(server), "settled": False}
    rounds, count = 0, _count(server)
    pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
    try:
        with steps.waiting("requests to warm up") as wait:
            while not found["settled"] and found["seconds"] < limit_s:
                prompts = one_round(rng, vocab, longest - _TOKENS)
                asked = [
                    pool.submit(probe.complete, server.base_url, prompt, 60.0, max_tokens=rng.randint(1, _TOKENS))
                    for prompt in prompts
                ]
                for answer in asked:
                    answer.result()
                    wait.update()
                rounds += 1
                named, before, count = compilations(server), count, _count(server)
                found = {
                    "requests": found["requests"] + len(asked),
                    "seconds": time.monotonic() - started,
                    "compiled": named,
                    "settled": rounds >= FEWEST_ROUNDS and (len(named), count) == (len(found["compiled"]), before),
                }
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def _count(server: Server) -> float:
    """Kernels of ours compiled since the start, as /metrics has it: whatever level the log has; 0 of stock."""
    return prometheus.total(prometheus.parse_prometheus(server.metrics()), "blackwell_kernels_jit_after_warmup_total")


def one_round(rng: random.Random, vocab: int, longest: int) -> list[list[int]]:
    """Prompts from 8 to `longest` tokens, as many short as long; every third goes on from an earlier one's tokens."""
    made: list[list[int]] = []
    for i in range(REQUESTS):
        length = round(math.exp(rng.uniform(math.log(8), math.log(longest))))
        kept = rng.choice(made)[: length - 1] if i % 3 == 2 else []
        made.append([*kept, *(rng.randrange(3, vocab) for _ in range(length - len(kept)))])
    return made


def compilations(server: Server) -> list[str]:
    """Kernels that the log says were compiled while requests waited; vLLM's monitor names each once, ours too."""
    text = server.log.read_text(errors="replace")
    ours = _OURS.findall(text)
    short = {name.rsplit(".", 1)[-1] for name in ours}
    return [*ours, *(name for pair in JIT_LINE.findall(text) for name in pair if name and name not in short)]
