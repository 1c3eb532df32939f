"""Compile kernels before they are launched, on all cores, in processes that never touch a GPU.

`planned` makes calls whose launches it notes instead: each distinct kernel becomes a `Kernel`, which knows whether
Triton's disk cache holds it and compiles under the very key that the launch will ask for. `in_processes` runs jobs in
processes of their own, so that a compiler that dies or hangs costs its job.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch

from blackwell_kernels.common import arch
from blackwell_kernels.common.arch import Arch


@dataclass(frozen=True)
class Kernel:
    """One kernel as Triton will compile it: `triton.compiler.ASTSource`, target and options."""

    source: Any
    target: Any
    options: Any

    @property
    def name(self) -> str:
        return self.source.fn.__name__

    def key(self) -> str:
        """What Triton keeps it under: the hash of source, arguments, options, compilers and environment."""
        return cache_key(self.source, self.target, self.options)

    def arguments(self) -> tuple[str, ...]:
        """Types of what a launch passes, constants among them: all that the C code of a launch depends on."""
        return tuple(map(str, self.source.signature.values()))

    def compile(self, *, launcher: bool) -> None:
        """Put it into Triton's cache; with `launcher`, also the C code that launches kernels of these arguments.

        Raises: what the compilers raise.
        """
        import triton

        compiled = triton.compile(self.source, target=self.target, options=self.options.__dict__)
        if launcher:
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(self.source, compiled.metadata)


def cache_key(source: Any, target: Any, options: Any = None) -> str:
    """Triton's key of a source (whatever has `hash()`); options: by default those of a launch that gives none."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler.compiler import get_cache_key, make_backend

    backend = make_backend(target)
    options = backend.parse_options({}) if options is None else options
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def is_cached(key: str, name: str) -> bool:
    """Whether Triton's cache holds the kernel `name` under `key`, whole."""
    from triton.runtime.cache import get_cache_manager

    described = f"{name[:150]}.json"  # as Triton names it
    return described in (get_cache_manager(key).get_group(described) or {})


def target_of(chip: Arch) -> Any:
    """What Triton compiles for on a GPU of that generation."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", chip.sm, 32)


def planned(calls: Iterable[Callable[[], None]], gpu: str, chip: Arch) -> list[Kernel]:
    """The kernels that these calls would launch on a GPU with this slug, each once, in the order they are met.

    The calls reach Triton implementations with CPU or meta tensors. Nothing is compiled or launched.
    """
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    found: dict[tuple[Any, str], Kernel] = {}
    launch, compile_now, active = JITFunction.run, JITFunction._do_compile, triton.runtime.driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    def note(
        self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        if (self, key) not in found:
            found[self, key] = Kernel(ASTSource(self, signature, constants, attributes), target_of(chip), options)

    triton.runtime.driver.set_active(driver_of(chip))
    JITFunction.run, JITFunction._do_compile = run, note
    try:
        with arch.pretend(gpu, chip):
            for call in calls:
                call()
    finally:
        JITFunction.run, JITFunction._do_compile = launch, compile_now
        triton.runtime.driver.set_active(active)
    return list(found.values())


def driver_of(chip: Arch) -> Any:
    """As much of a CUDA driver as compilation for a chip asks for."""
    from triton.backends.driver import DriverBase

    class Utilities:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {
                "max_shared_mem": chip.smem_bytes,
                "multiprocessor_count": chip.sms,
                "warpSize": 32,
                "max_num_regs": 65_536,
            }

    class NoDeviceDriver(DriverBase):
        utils = Utilities

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is timed")

        def get_current_target(self) -> Any:
            return target_of(chip)

        def get_current_device(self) -> int:
            # kernels are cached by device: one number for two chips would hand the second the first one's
            return chip.sm

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    return NoDeviceDriver()


@dataclass(frozen=True)
class Lost:
    """A job that gave no answer: its process died or was stopped."""

    why: str


def in_processes(
    context: Any, child: Callable[..., None], jobs: Sequence[tuple[Any, ...]], processes: int, limit_s: float
) -> Iterator[tuple[int, Any]]:
    """(index of a job, what `child(send, *job)` sent or a Lost), as they end; `processes` at once, a process each.

    context: of `multiprocessing`; one that forks asks for a caller that is not in the middle of anything.
    limit_s: how long one job may take. Leaving the loop early stops what still runs.
    """
    waiting = deque(enumerate(jobs))
    running: dict[Any, tuple[int, Any, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                index, job = waiting.popleft()
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=child, args=(send, *job), daemon=True)
                process.start()
                send.close()
                running[receive] = index, process, time.monotonic() + limit_s
            first = min(until for _, _, until in running.values())
            ready = connection.wait([*running], max(0.0, first - time.monotonic()))
            late = [receive for receive, (_, _, until) in running.items() if until <= time.monotonic()]
            for receive in dict.fromkeys([*ready, *late]):
                index, process, _ = running.pop(receive)
                yield index, _answer(receive, process, limit_s)
    finally:
        for receive, (_, process, _) in running.items():
            _stop(receive, process)


def _answer(receive: Any, process: Any, limit_s: float) -> Any:
    try:
        if not receive.poll():
            return Lost(f"no end of the compilation after {limit_s:.0f} s")
        return receive.recv()
    except EOFError:
        process.join()
        return Lost(f"the compiler died with exit status {process.exitcode}")
    finally:
        _stop(receive, process)


def _stop(receive: Any, process: Any) -> None:
    process.kill()
    process.join()
    receive.close()


def compile_all(kernels: Sequence[Kernel], processes: int, limit_s: float) -> Iterator[tuple[Kernel, str]]:
    """(kernel, why it is not in Triton's cache now or ""), as they end. Forks: for processes made for this alone."""
    import multiprocessing

    launchers: set[tuple[str, ...]] = set()
    jobs = []
    for kernel in kernels:
        jobs.append((kernel, kernel.arguments() not in launchers))
        launchers.add(kernel.arguments())
    for index, answer in in_processes(multiprocessing.get_context("fork"), _compile, jobs, processes, limit_s):
        yield kernels[index], answer.why if isinstance(answer, Lost) else answer


def _compile(send: Any, kernel: Kernel, launcher: bool) -> None:
    try:
        kernel.compile(launcher=launcher)
    except Exception as error:
        send.send(in_a_line(error))
    else:
        send.send("")


def in_a_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def cores(most: int) -> int:
    """As many processes as this one may use cores, `most` at most."""
    with suppress(AttributeError):  # not on every system
        return min(len(os.sched_getaffinity(0)), most)
    return min(os.cpu_count() or 1, most)
