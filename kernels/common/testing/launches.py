"""Compiled Triton without a GPU and without a compiler: every specialisation is a function of its own, whose launches
are noted at the C launcher. For tests of replayed launches, on hosts with a GPU and without: tensors are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from blackwell_kernels import env
from blackwell_kernels.common import launch
from blackwell_kernels.common.testing import compile as aot

if TYPE_CHECKING:
    import pytest

DEVICES = count(7000)  # no GPU's numbers: Triton keeps compiled kernels by device


class Address(int):
    """What a kernel takes as a pointer: by its value it could be a number, the heap of many Pythons starts low."""


class Launched:
    """Launches as the driver would get them; `long`: how many went through Triton's launcher."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.long = 0
        self.device = next(DEVICES)
        self.functions: dict[Any, int] = {}
        # of kernels compiled from here on
        self.scratch = 0  # bytes they want
        self.launcher = CudaLauncher

    def take(self) -> list[tuple[Any, ...]]:
        seen, self.seen = self.seen, []
        return seen


def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """Replays are on, as they are by default, and every specialisation is compiled to nothing but a number."""
    log, numbers = Launched(), count(1000)

    class Kernel(CompiledKernel):
        def __init__(self, function: Any, signature: dict[str, Any], options: Any) -> None:
            self.function, self.packed_metadata, self.src = next(numbers), (options.num_warps, 1, 0), None
            names = [p.name for p in function.params if not p.is_constexpr]
            places = [i for i, p in enumerate(function.params) if not p.is_constexpr]
            pointers = {name for name, kind in signature.items() if str(kind).startswith("*")}

            def plain(name: str, x: Any) -> Any:
                x = x.data_ptr() if isinstance(x, torch.Tensor) else x
                return Address(x) if name in pointers else x

            def take(*arguments: Any) -> None:
                if isinstance(arguments[7], tuple):  # 3.7: metadata before scratch memory, inputs in one
                    head, metadata, inputs = arguments[:7] + arguments[11:13], arguments[7], arguments[15]
                else:
                    head, metadata, inputs = arguments[:9], arguments[9], arguments[13:]
                values = {name: plain(name, inputs[i]) for name, i in zip(names, places, strict=True)}
                log.seen.append((function.__name__, head, metadata, values))

            launcher = log.launcher.__new__(log.launcher)
            launcher.global_scratch_size, launcher.profile_scratch_size = log.scratch, 0
            launcher.global_scratch_align = launcher.profile_scratch_align = launcher.num_ctas = 1
            launcher.launch_cooperative_grid, launcher.launch_pdl = False, options.launch_pdl
            launcher.arg_annotations = launcher.kernel_signature = None
            launcher.launch, self.launcher = take, launcher

        @property
        def run(self) -> Any:
            return self.launcher

        def launch_metadata(self, *arguments: Any) -> None:
            return None

    def compile_nothing(self: Any, key: str, signature: Any, device: int, constants: Any, options: Any, *more: Any):
        return self.device_caches[device][0].setdefault(key, Kernel(self, signature, options))

    run, driver = JITFunction.run, aot._driver(90)

    @wraps(run)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        log.long += 1
        return run(self, *args, **kwargs)

    del counted.__wrapped__  # stands for the one that was imported, and is no patch
    driver.get_current_device = lambda: log.device  # type: ignore[method-assign]
    driver.get_current_stream = lambda device: 77  # type: ignore[method-assign]
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.delenv(env.REPLAY.name, raising=False)
    launch._triton.cache_clear()
    launch.forget()
    yield log
    launch._triton.cache_clear()
    launch.forget()


def copies(op: Callable[..., None], make: Callable[[], Any], launched: Launched, kept: bool = True) -> list[Any]:
    """What four calls with new tensors launch: alike, the last two without Triton's launcher if `kept`."""
    seen = []
    for i in range(4):
        long, (args, kwargs) = launched.long, make()
        op(*args, **kwargs)
        found = launched.take()
        seen.append(normal(found, [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]))
        if i > 1 or not kept:
            assert launched.long - long == (0 if kept else len(found))
    assert seen[0]
    assert seen == seen[:1] * 4
    return seen[0]


def normal(found: list[Any], tensors: list[torch.Tensor]) -> list[Any]:
    """Launches with addresses as places: argument and offset, or workspace in order of appearance and offset."""
    spaces: list[int] = []

    def place(value: Any) -> Any:
        if not isinstance(value, Address) or not value:
            return value
        for i, x in enumerate(tensors):
            if x.data_ptr() == value:
                return "argument", i
        for i, x in enumerate(tensors):
            storage = x.untyped_storage()
            if storage.data_ptr() <= value < storage.data_ptr() + storage.nbytes():
                return "argument", i, value - x.data_ptr()
        if value not in spaces:
            spaces.append(value)
        return "workspace", spaces.index(value), value % 16

    return [(*head, {name: place(x) for name, x in inputs.items()}) for *head, inputs in found]


def f32(*shape: int) -> torch.Tensor:
    """As it comes."""
    return torch.empty(shape, dtype=torch.float32)
