"""Hard gates on compiled kernels: each refuses a kernel that compiles and yet cannot launch, or not as it was meant.

They show neither that barriers and asynchronous copies are right, nor that nothing hangs, nor any speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from blackwell_kernels.common.testing.statistics import Statistics

T = TypeVar("T")

ARCHS = (90, 100)
MAX_SHARED = 232_448
MAX_TMEM = 512
MAX_REGISTERS = 65_536
MAX_GRID = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True)
class AotCase:
    """One call of an operator's Triton path whose kernels must compile and pass the gates on every arch in `archs`.

    run: calls `<op>_triton(...)` on CPU or meta tensors of a shipped shape; contents do not matter, nothing runs.
    mma: "none" (no tensor-core instruction), "required" (some, and none of them mma.sync), or kernel name -> kinds
        that must be there, no others, joined by +: `{"moe_gemm": "fp8"}`, `{"solve": "tf32+mma.sync"}`; kernels that
        are not named must have none. Kinds are those of `Statistics.mma`.
    spill_allowance: kernel name -> bytes of stack a thread may have; a recorded exception, else 0.
    tma: kernels that must copy through tensor descriptors; device_descriptors: kernels that may build them on device.
    loop_limit: kernel name -> SASS instructions the innermost tensor-core loop may have; a ratchet.
    A key `name@100` is for that arch alone and wins over `name`.
    """

    name: str
    run: Callable[[], object]
    mma: str | Mapping[str, str] = "none"
    spill_allowance: Mapping[str, int] = field(default_factory=dict)
    tma: frozenset[str] = frozenset()
    device_descriptors: frozenset[str] = frozenset()
    loop_limit: Mapping[str, int] = field(default_factory=dict)
    archs: tuple[int, ...] = ARCHS


def gates(compiled: Sequence[Statistics], expect: AotCase) -> list[str]:
    """What is wrong with the kernels that one case compiled for one arch; empty when they pass."""
    if not compiled:
        return [f"{expect.name}: no kernel was launched"]
    problems = [f"{s.kernel} (sm_{s.arch}a): {problem}" for s in compiled for problem in _problems(s, expect)]
    names = {s.kernel for s in compiled}
    for what, named in (
        ("mma", [] if isinstance(expect.mma, str) else expect.mma),
        ("spill_allowance", expect.spill_allowance),
        ("tma", expect.tma),
        ("device_descriptors", expect.device_descriptors),
        ("loop_limit", expect.loop_limit),
    ):
        unknown = {name.partition("@")[0] for name in named} - names
        if unknown:
            problems.append(f"{expect.name}: {what} names kernels that were not launched: {', '.join(sorted(unknown))}")
    if expect.mma == "required" and not any(s.mma for s in compiled):
        problems.append(f"{expect.name}: no kernel uses tensor cores")
    return problems


def _problems(s: Statistics, expect: AotCase) -> list[str]:
    threads = 32 * s.warps
    allowed_stack = _of(expect.spill_allowance, s, 0)
    loop_limit = _of(expect.loop_limit, s, s.mma_loop)
    checks = [
        (s.target == f"sm_{s.arch}a", f"compiled for {s.target or 'an unknown target'}"),
        (s.shared <= MAX_SHARED, f"shared memory {s.shared:,} B over {MAX_SHARED:,}"),
        (s.tmem <= MAX_TMEM, f"tensor memory {s.tmem} columns over {MAX_TMEM}"),
        (s.traps == 0, "its code traps: some resource does not fit"),
        (s.stack <= allowed_stack, f"stack {s.stack} B a thread (spills), allowed {allowed_stack}"),
        (
            s.registers * threads <= MAX_REGISTERS,
            f"{s.registers} registers x {threads} threads over {MAX_REGISTERS:,}",
        ),
        (_grid_fits(s.grid), f"grid {s.grid} over {MAX_GRID}"),
        (s.tma > 0 or s.kernel not in expect.tma, "no TMA copy"),
        (
            s.tensormap_replace == 0 or s.kernel in expect.device_descriptors,
            f"{s.tensormap_replace} tensormap.replace: a descriptor is built on the device",
        ),
        (not s.unwritten, f"reads {', '.join(s.unwritten)}, which nothing writes: the assembler's mistake"),
        (s.mma_loop <= loop_limit, f"{s.mma_loop} instructions in the innermost MMA loop, limit {loop_limit}"),
    ]
    return [message for passes, message in checks if not passes] + _mma_problems(s, expect.mma)


def _mma_problems(s: Statistics, expect: str | Mapping[str, str]) -> list[str]:
    found = " + ".join(s.mma) or "none"
    if expect == "required":
        return [f"falls back to mma.sync ({found})"] if "mma.sync" in s.mma else []
    kinds = expect if isinstance(expect, str) else _of(expect, s, "none")
    wanted = set() if kinds == "none" else set(kinds.split("+"))
    return [] if wanted == set(s.mma) else [f"tensor-core instructions {found}, expected {kinds}"]


def _of(table: Mapping[str, T], s: Statistics, default: T) -> T:
    return table.get(f"{s.kernel}@{s.arch}", table.get(s.kernel, default))


def _grid_fits(grid: tuple[int, ...]) -> bool:
    return len(grid) <= 3 and all(0 <= n <= limit for n, limit in zip(grid, MAX_GRID, strict=False))
