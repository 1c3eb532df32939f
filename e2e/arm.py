"""One arm of a comparison, in its own process: load the model once, do every task, write each result as it comes.

    python -m blackwell_kernels.e2e.arm SPEC.json

With several ranks the process is started once per rank (torchrun's variables); rank 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blackwell_kernels.e2e import plan

SCHEMA = 1


@dataclass(frozen=True)
class Spec:
    """What an arm is and does. `tasks`: compose:A, compose:B, trace, counters, corrupt:<op>."""

    name: str
    folder: str
    out: str
    vocab: int
    settings: dict[str, Any]
    tasks: tuple[str, ...]
    seed: int = 0
    requests: int = plan.REQUESTS
    forced: int = 48
    scale: float = 1.0
    greedy: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def json_path(self) -> Path:
        """Where results go."""
        return Path(self.out, f"arm-{self.name}.json")

    @property
    def array_path(self) -> Path:
        """Where log-probabilities go: one vector per composition or corruption."""
        return Path(self.out, f"arm-{self.name}.npz")

    def key(self) -> dict[str, Any]:
        """What must agree for earlier results to be of use: everything but the tasks and where things lie."""
        return {k: v for k, v in asdict(self).items() if k not in ("tasks", "out", "folder")}


def load_results(spec: Spec) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Results of an earlier process with the same key, else empty ones."""
    blank = {"schema": SCHEMA, "key": spec.key(), "tasks": {}, "load_s": None, "error": None}
    try:
        found = json.loads(spec.json_path.read_text())
        with np.load(spec.array_path) as arrays:
            samples = dict(arrays)
    except (OSError, ValueError):
        return blank, {}
    # JSON has lists where the key has tuples
    if found.get("schema") != SCHEMA or found["key"] != json.loads(json.dumps(spec.key())):
        return blank, {}
    return {**found, "error": None}, samples


def last_error(spec: Spec) -> str:
    """What the arm's latest process wrote down before it ended."""
    try:
        return json.loads(spec.json_path.read_text())["error"] or "no error was written down"
    except (OSError, ValueError, KeyError):
        return "before it wrote anything"


def save_results(spec: Spec, results: dict[str, Any], samples: dict[str, np.ndarray]) -> None:
    """Write both files, each whole or not at all; the arrays first, since the JSON says what they hold."""
    from blackwell_kernels.e2e.report import write_atomic

    part = spec.array_path.with_suffix(".tmp.npz")
    part.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(part, **samples)  # type: ignore[arg-type]
    os.replace(part, spec.array_path)
    write_atomic(spec.json_path, json.dumps(results, indent=1))


class Arm:
    """The running arm."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.rank = spec, int(os.environ.get("RANK", "0"))
        self.results, self.samples = load_results(spec)
        self.made = plan.requests(spec.vocab, seed=spec.seed, n=spec.requests, forced=spec.forced, scale=spec.scale)
        self.engine: Any = None

    def run(self) -> None:
        """Every task that has no result yet; an error is written down and ends the process with it."""
        todo = [task for task in self.spec.tasks if task not in self.results["tasks"]]
        if not todo:
            return
        try:
            self.say(f"loading the model for {', '.join(todo)}")
            self.load()
            for task in todo:
                start = time.monotonic()
                kind, _, argument = task.partition(":")
                tasks: dict[str, Callable[[str], dict[str, Any]]] = {
                    "compose": self.compose,
                    "trace": self.trace,
                    "counters": self.counters,
                    "corrupt": self.corrupt,
                }
                found = tasks[kind](argument)
                self.results["tasks"][task] = {**found, "seconds": round(time.monotonic() - start, 1)}
                self.save()
                self.say(f"{task} done in {time.monotonic() - start:.0f} s")
        except BaseException as error:
            self.results["error"] = f"{type(error).__name__}: {error}"
            self.save()
            traceback.print_exc()
            raise

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[arm {self.spec.name}] {text}", flush=True)

    def save(self) -> None:
        if self.rank == 0:
            save_results(self.spec, self.results, self.samples)

    def load(self) -> None:
        from blackwell_kernels.e2e.demo import versions
        from blackwell_kernels.e2e.engine import Engine

        start = time.monotonic()
        self.engine = Engine(Path(self.spec.folder), self.spec.settings, force=not self.spec.greedy)
        self.results["load_s"] = round(time.monotonic() - start, 1)
        self.results["versions"] = versions()
        self.results["device"], self.results["memory_gib"] = _device(), _memory_gib()
        self.save()
        self.say(f"ready after {self.results['load_s']:.0f} s")

    def compose(self, composition: str) -> dict[str, Any]:
        """Score every request in one composition."""
        return self._score(composition, composition)

    def corrupt(self, op: str) -> dict[str, Any]:
        """Composition A with one operator made wrong."""
        from blackwell_kernels.e2e import corrupt

        with corrupt.corrupted(op) as calls:
            found = self._score("A", f"corrupt-{op}")
        return {**found, "wrong_calls": dict(calls)}

    def _score(self, composition: str, key: str) -> dict[str, Any]:
        # the same start for every run: what an earlier one left in the prefix cache would change the batches
        self.engine.engine.reset_prefix_cache()
        self.engine.take_counts()
        self.engine.limit_step(composition)
        greedy = self.spec.forced if self.spec.greedy else 0
        done = self.engine.run(plan.arrivals(self.made, composition), greedy_tokens=greedy)
        self.engine.limit_step("A")
        self.samples[key] = plan.flatten(self.made, done)
        found = self.engine.take_counts()
        if self.spec.greedy:
            self.samples[f"{key}-tokens"] = np.array([done[r.name]["tokens"] for r in self.made], dtype=np.int32)
        return found

    def counters(self, _: str) -> dict[str, Any]:
        """Tokens that each implementation handled, by operator, layer and kind of batch: the growth over the phases."""
        from blackwell_kernels import status
        from blackwell_kernels.e2e import trace

        before = _counts(status.snapshot())
        trace.run_phases(self.engine, self.spec.vocab, self.spec.scale, _nothing)
        found = status.snapshot()
        grown = {key: tokens - before.get(key, 0) for key, tokens in _counts(found).items()}
        rows = [
            dict(zip(("op", "layer", "impl", "phase"), key, strict=True), tokens=n) for key, n in grown.items() if n
        ]
        return {"counts": rows, "activation": status.activation_rows(found), "fallbacks": found["fallbacks"]}

    def trace(self, _: str) -> dict[str, Any]:
        """Kernels by phase, from the profiler."""
        from blackwell_kernels.e2e import trace

        return {"phases": trace.profile_phases(self.engine, self.spec.vocab, self.spec.scale)}


def _counts(snapshot: dict[str, Any]) -> dict[tuple[str, str, str, str], int]:
    return {(r["op"], r["layer"], r["impl"], r["phase"]): r["tokens"] for r in snapshot["counts"]}


def _nothing(_: str) -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _memory_gib() -> dict[str, float] | None:
    """Peaks of this process so far, None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    peaks = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return {name: round(size / 2**30, 1) for name, size in peaks.items()}


def main() -> None:
    """Run the arm that a file describes."""
    values = json.loads(Path(sys.argv[1]).read_text())
    spec = Spec(**{**values, "tasks": tuple(values["tasks"])})
    Arm(spec).run()


if __name__ == "__main__":
    main()
