"""What our call of a case launches, as twelve hex digits.

A time is of the kernels, the configuration and the grid that were measured. While a case launches the same it holds,
whatever else of the family changed since: another operator's kernel, a heuristic for other shapes, a table's row.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from blackwell_kernels.common import ahead, arch, tables
from blackwell_kernels.microbench import precompile
from blackwell_kernels.microbench.cases import Case

_OURS = "blackwell_kernels"


def of(case: Case, gpu: str) -> str:
    """12 hex digits over the launches of our call on the GPU with this slug, in their order: source of each kernel and
    of all of ours that it calls, its constants, options, grid and numbers, the types of its tensors. Triton's own code
    is not in them, nor what torch does between launches.

    For a GPU that `arch.ARCHS` does not know, `tables.kernels_of` the family. An error has digits, too: of its text.
    """
    if gpu not in arch.ARCHS:
        return tables.kernels_of(case.spec.op.split("_")[0])
    try:
        with noted(gpu) as launches:
            precompile.call(case)
        told = "\n".join(launches)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return hashlib.sha256(told.encode()).hexdigest()[:12]


@contextmanager
def noted(gpu: str) -> Iterator[list[str]]:
    """Inside, every launch is a line of the list yielded instead, as on the GPU with this slug."""
    launches: list[str] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        sizes = grid(bound) if callable(grid) else grid
        told = [f"{name}={_value(value)}" for name, value in sorted(bound.items())]
        launches.append(" ".join([self.__name__, _digits(self), str(tuple(map(int, sizes))), *told]))

    triton.runtime.driver.set_active(ahead.driver_of(arch.ARCHS[gpu]))
    JITFunction.run = note
    try:
        with arch.pretend(gpu):
            yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver.set_active(active)


def _value(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if value is None or isinstance(value, (bool, int, float, str, triton.language.dtype)):
        return repr(value)
    raise TypeError(f"what a launch got has no digits: {type(value).__name__}")


@cache
def _digits(kernel: JITFunction) -> str:
    return hashlib.sha256("\n".join(sorted(set(_source(kernel, set())))).encode()).hexdigest()[:12]


def _source(function: Any, met: set[str]) -> Iterator[str]:
    """Lines of a function, comments apart, of all of ours that it calls, and the constants they name."""
    plain = getattr(function, "fn", function)
    name = f"{plain.__module__}.{plain.__qualname__}"
    if name in met:
        return
    met.add(name)
    lines = [line.rstrip() for line in inspect.getsource(plain).splitlines()]
    yield "\n".join([name, *(line for line in lines if line.strip() and not line.lstrip().startswith("#"))])
    names = _names(plain.__code__)
    for used in names:
        if used in plain.__globals__:
            yield from _used(f"{plain.__module__}.{used}", plain.__globals__[used], names, met)


def _used(name: str, value: Any, names: list[str], met: set[str]) -> Iterator[str]:
    """What a global of a function adds to its source. names: all that the function names, attributes included."""
    if isinstance(value, ModuleType):
        if value.__name__.startswith(_OURS):
            for attribute in names:
                if attribute in vars(value):
                    yield from _used(f"{value.__name__}.{attribute}", vars(value)[attribute], names, met)
    elif isinstance(value, triton.language.constexpr):
        yield f"{name} = {value.value!r}"
    elif isinstance(value, (bool, int, float, str, tuple, dict)):
        yield f"{name} = {value!r}"
    elif getattr(value, "__module__", "").startswith(_OURS):
        yield from _source(value, met)


def _names(code: Any) -> list[str]:
    """What a function's code names, functions inside it included."""
    inner = [name for one in code.co_consts if hasattr(one, "co_names") for name in _names(one)]
    return sorted({*code.co_names, *inner})
