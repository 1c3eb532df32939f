"""Fill Triton's cache with what a warm-up will launch, on all cores, before it does: while a model loads, say.

`start` answers from a list kept in that cache if everything is there already. Otherwise a process of its own, which
sees no GPU, finds the kernels by the warm-up's plan on meta tensors and compiles those that are missing, several at
once. What it fails at costs nothing else: a kernel that is not there compiles when it is called.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from blackwell_kernels import dsa, gdn, moe
from blackwell_kernels.common import ahead
from blackwell_kernels.common.arch import Arch
from blackwell_kernels.model_patches import indexer

PROCESSES = 8  # at most: the longest kernel takes a tenth of all of them together
KERNEL_S = 60.0  # for one kernel, thirty times what the longest takes
LOCK_S = 120.0  # to wait for another rank, which compiles the same
SILENT_S = 180.0  # without a word from the process, which is longer than anything above
_LIST, _LOCK = "warm-up.json", "blackwell_kernels.lock"
_LEAD = "from blackwell_kernels import compile_ahead; compile_ahead.lead()"


@dataclass(frozen=True)
class Request:
    """A model's config and how it is served (a `warmup.Deployment` as JSON data), the operators, the GPU."""

    config: dict[str, Any]
    served: dict[str, Any]
    ops: list[str]
    gpu: str
    chip: Arch

    def key(self) -> str:
        """What the list of its kernels is kept under: changes with all that could make other kernels of it."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for path in _sources(self.gpu):
            digest.update(path.read_bytes())
        return ahead.cache_key(SimpleNamespace(hash=digest.hexdigest), ahead.target_of(self.chip))


def _sources(gpu: str) -> Iterator[Path]:
    """All that decides which kernels a plan meets; Triton hashes the kernels themselves."""
    yield from (Path(__file__).with_name("warmup.py"), Path(__file__), Path(str(indexer.__file__)))
    for family in (dsa, gdn, moe, ahead):
        folder = Path(str(family.__file__)).parent
        yield from sorted([*folder.glob("*.py"), *folder.glob(f"configs/{gpu}/*.json")])


class Ahead:
    """Compilation that is under way, or none; as a context manager it ends with its block."""

    def __init__(self, request: Request, key: str) -> None:
        self.compiled = 0
        self.failed: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        if not request.ops or _listed(key):
            return
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LEAD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # outcomes() tells of its end
            self._process.stdin.write(json.dumps({"key": key, **asdict(request)}).encode() + b"\n")

    def outcomes(self) -> Iterator[tuple[int, int]]:
        """(kernels done, of how many that were missing), again after each, until the process has finished."""
        missing, finished = 0, self._process is None
        for told in self._told():
            if "kernel" in told and told["why"]:
                self.failed.append(f"{told['kernel']}: {told['why']}")
            elif "kernel" in told:
                self.compiled += 1
            missing, finished = told.get("missing", missing), told.get("finished", False)
            if finished:
                break
            yield self.compiled + len(self.failed), missing
        if not finished:
            self.failed.append("the process that compiles ahead stopped before its end")

    def _told(self) -> Iterator[dict[str, Any]]:
        if self._process is None:
            return
        lines: Any = self._process.stdout
        while select.select([lines], [], [], SILENT_S)[0]:
            line = lines.readline()
            if not line:
                return
            yield json.loads(line)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # it is not waited for yet, so the number of its group is nobody else's
        with process, suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def start(config: Mapping[str, Any], served: Any, ops: Collection[str], gpu: str, chip: Arch) -> Ahead:
    """Begin with what a `warmup.Deployment` of a model needs of `ops` on the GPU with this slug."""
    state = str(served.state_dtype).removeprefix("torch.")
    plain = json.loads(json.dumps(dict(config), default=str))
    request = Request(plain, {**asdict(served), "state_dtype": state}, sorted(ops), gpu, chip)
    return Ahead(request, request.key())


def _listed(key: str) -> bool:
    """Whether the kernels of a plan are known, and all in Triton's cache."""
    from triton.runtime.cache import get_cache_manager

    path = get_cache_manager(key).get_file(_LIST)
    return path is not None and all(ahead.is_cached(*kernel) for kernel in json.loads(Path(path).read_text()))


def lead() -> None:
    """The process's life: a request as a line on stdin, what is done as lines on stdout; it dies when stdin ends."""
    asked = json.loads(sys.stdin.readline())
    # whatever else prints must not be taken for an answer
    answers = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    key = asked.pop("key")
    asked["chip"] = Arch(**asked["chip"])
    _lead(Request(**asked), key, lambda told: os.write(answers, json.dumps(told).encode() + b"\n"))


def _die_with_parent() -> None:
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)


def _lead(request: Request, key: str, say: Callable[[dict[str, Any]], object]) -> None:
    from triton.runtime.cache import get_cache_manager

    kernels = kernels_of(request)
    with _alone():
        missing = [kernel for kernel in kernels if not ahead.is_cached(kernel.key(), kernel.name)]
        say({"missing": len(missing)})
        failed = False
        for kernel, why in ahead.compile_all(missing, ahead.cores(PROCESSES), KERNEL_S):
            failed = failed or bool(why)
            say({"kernel": kernel.name, "why": why})
    if not failed:
        get_cache_manager(key).put(json.dumps([(k.key(), k.name) for k in kernels]), _LIST, binary=False)
    say({"finished": True})


def kernels_of(request: Request) -> list[ahead.Kernel]:
    """The kernels that a warm-up meets, found by its own plan. It changes this process: what `warmup` calls stays
    the Triton implementations, which meta tensors would not reach."""
    import torch

    from blackwell_kernels import warmup
    from blackwell_kernels.dsa import op as dsa_op
    from blackwell_kernels.gdn import op as gdn_op
    from blackwell_kernels.moe import op as moe_op

    torch.set_num_threads(1)
    implementations = {**vars(dsa_op), **vars(gdn_op), **vars(moe_op)}
    suffix = "_triton"
    warmup.ops = SimpleNamespace(
        **{n.removesuffix(suffix): f for n, f in implementations.items() if n.endswith(suffix)}
    )
    served = warmup.Deployment(**{**request.served, "state_dtype": getattr(torch, request.served["state_dtype"])})
    steps = warmup.plan(request.config, served, torch.device("meta"))
    return ahead.planned([step.run for step in steps if step.op in request.ops], request.gpu, request.chip)


@contextmanager
def _alone() -> Iterator[None]:
    """One process of a machine at a time: the ranks of a server need the same kernels, and the others find them."""
    import fcntl

    from triton import knobs

    until = time.monotonic() + LOCK_S
    Path(knobs.cache.dir).mkdir(parents=True, exist_ok=True)
    with open(Path(knobs.cache.dir) / _LOCK, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.1)
                    continue
            except OSError:  # a file system without locks: the worst is work done twice
                pass
            break
        yield
