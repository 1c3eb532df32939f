"""The process that measures. `supervise.py` starts it, hears what it is about to do, and outlives it.

    python -m blackwell_kernels.microbench.worker 7 4242 < job.json

Messages go to the file descriptor named first, one line of JSON each, until the process named second is gone:
{"head": ...} once, {"step": [case, implementation, phase]}, {"row": ..., "seconds": {what was done: how long}},
{"failed": [case, why]} for a case without a row, {"lost": [implementation, why]} before an end with a broken CUDA
context. Standard output and error belong to whatever is measured.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from blackwell_kernels.common import tables
from blackwell_kernels.errors import TableError
from blackwell_kernels.microbench import results
from blackwell_kernels.microbench.cases import Case, all_cases

Message = dict[str, Any]
Send = Callable[[Message], None]
NOT_BEGUN = "not begun: they would have lasted beyond --time-limit"


class Job(BaseModel):
    """What to measure and how. cases: (definition, case). only: peers to run. peers: with one of these not set up a row
    counts as none (`running.without_stored`). skip: (definition, case or "*", implementation, why).

    head: of the first worker of a run, so that all rows of the run have the same floors. factory: `module:function`
    that makes a `Bench` of a job. until: when the run is to be over (seconds since the epoch).
    """

    cases: list[tuple[str, str]]
    skip: list[tuple[str, str, str, str]] = []
    head: dict[str, Any] | None = None
    factory: str = "blackwell_kernels.microbench.worker:on_gpu"
    rounds: int = 15
    seed: int = 0
    only: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    fib: bool = True
    commit: str | None = None
    command: str = "blackwell-kernels bench"
    root: Path = results.ROOT
    tables_root: Path = tables.ROOT
    solutions: tuple[Path, ...] = ()
    until: float | None = None

    def late(self, seconds: float = 0.0) -> bool:
        """Whether what takes so long would last beyond `until`."""
        return self.until is not None and time.time() + seconds > self.until

    def chosen(self) -> list[Case]:
        """The cases themselves."""
        known = {(case.definition, case.name): case for case in all_cases()}
        return [known[key] for key in self.cases]


def on_gpu(job: Job) -> Any:
    """A `Bench` on the current CUDA device."""
    # its notices about every layer would bury ours; before vLLM is imported, and the user's own setting wins
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import torch

    from blackwell_kernels.common.arch import gpu_slug
    from blackwell_kernels.microbench import device
    from blackwell_kernels.microbench.runner import Bench
    from blackwell_kernels.microbench.timing import EagerEngine, GraphEngine, host_us

    here = torch.device("cuda", torch.cuda.current_device())
    results.check_place(gpu_slug(torch.cuda.get_device_name()), {case.spec.op for case in job.chosen()}, job.root)
    extra: tuple[Any, ...] = ()
    if job.solutions:
        from blackwell_kernels.microbench import third_party

        extra = tuple(third_party.load(path) for path in job.solutions)
    head = job.head
    if head is None:
        head = {**device.facts(job.command, job.commit), "ceilings": device.measure_ceilings().model_dump()}
    return Bench(
        device=here,
        engines=(GraphEngine(here), EagerEngine(here)),
        head=head,
        rates=device.best_known(results.Ceilings.model_validate(head["ceilings"])),
        rounds=job.rounds,
        seed=job.seed,
        only=job.only,
        extra=extra,
        l2_bytes=torch.cuda.get_device_properties(here).L2_cache_size,
        fib_timer=device.fib_timer(here) if job.fib else None,
        host_timer=lambda call: host_us(call, lambda: torch.cuda.synchronize(here)),
        root=job.root,
        tables_root=job.tables_root,
    )


def messages(job: Job, on_step: Send = lambda message: None) -> Iterator[Message]:
    """Measure; the messages of this module's page, steps through `on_step`. Ends after a lost context."""
    from blackwell_kernels.microbench.runner import ContextLost

    on_step({"step": ["", "", "start"]})
    module, _, name = job.factory.partition(":")
    bench = getattr(importlib.import_module(module), name)(job)
    bench.skip = {(definition, case, item): why for definition, case, item, why in job.skip}
    yield {"head": bench.head}
    longest: defaultdict[bool, float] = defaultdict(float)  # of a deployment's first cases, which compile; of others
    met: set[tuple[str, str, int, int]] = set()
    for number, case in enumerate(job.chosen()):
        deployment = case.definition, case.model, case.tp, case.ep
        first = deployment not in met
        if job.late(longest[first]):
            yield from not_begun(job.cases[number : number + 1])
            continue
        met.add(deployment)
        at, began, clock = [""], time.monotonic(), _Clock()

        def step(item: str, phase: str, case: Case = case, at: list[str] = at, clock: _Clock = clock) -> None:
            at[0] = item
            clock.turn(f"{phase} {item}".strip())
            on_step({"step": [case.name, item, phase]})

        bench.on_step = step
        try:
            for row in bench.run([case]):
                clock.turn("")
                yield {"row": row.model_dump(), "seconds": clock.seconds}
        except ContextLost as lost:
            yield {"lost": [lost.implementation, lost.why]}
            return
        # memory for its inputs, a generator that does not know the shape, a full disk
        except (RuntimeError, ValueError, TableError) as error:
            why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            if not bench.alive():
                yield {"lost": [at[0], f"it broke the CUDA context: {why}"]}
                return
            yield {"failed": [case.name, why]}
        if number:  # the first one also pays for imports
            longest[first] = max(longest[first], time.monotonic() - began)


class _Clock:
    """Seconds by what was done in them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._doing, self._since = "", 0.0

    def turn(self, to: str) -> None:
        """What was done until now has ended; "" is nothing."""
        now = time.monotonic()
        if self._doing:
            self.seconds[self._doing] += now - self._since
        self._doing, self._since = to, now


def not_begun(cases: Sequence[tuple[str, str]]) -> Iterator[Message]:
    """What is said of each case that there is no time for."""
    yield from ({"failed": [name, NOT_BEGUN]} for _, name in cases)


def _end_with(parent: int) -> None:
    """A supervisor that is killed cannot kill its worker, which would hold the GPU."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Read a job from standard input, send messages to the descriptor given, end with the supervisor."""
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    job = Job.model_validate_json(sys.stdin.buffer.read())
    with open(int(sys.argv[1]), "w", encoding="utf-8") as out:

        def send(message: Message) -> None:
            print(json.dumps(message), file=out, flush=True)

        for message in messages(job, send):
            send(message)
        # modules that were loaded may hang or fail at exit; all that counts is written
        out.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
