"""Run the PTX of a kernel in Python: what the interpreter cannot, inline assembly and what threads say to each other.

    kernel = Kernel(Source.of(compiled))  # of compile.compile_only
    launch(kernel, (rows,), {"x_ptr": x, "y_ptr": y, "columns": 100}, outputs={"y_ptr"}, seed=0)

Modelled: threads that run in any order (`seed`) from one instruction at which they meet to the next; their registers;
global memory, which is the elements of the tensors passed and nothing between them; shared memory of a program and of
its cluster, one program after the other exiting; bar.sync, barriers of a cluster, collectives of full warps, waits for
the kernel before. Clusters run one after the other, in any order. Not modelled: time, caches, words of other than 32
bits, what ptxas makes of it.

Whatever is wrong is a PtxError, in most cases whatever the order happens to be: an instruction or form that is not
known here; a register or word read that nobody wrote; an access outside of all tensors, out of line, of an input to
write; two accesses to a word, one of them a write, that no barrier orders; shared memory of a program that may not have
begun or may be gone; lanes and threads that wait at different instructions, or for those that exited; global memory
touched before griddepcontrol.wait in a kernel that is launched early. Barriers order memory, a shuffle does not.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch

from blackwell_kernels.common.testing.ptx_code import COLLECTIVES, LANES, WINDOW, WORD, Kernel, PtxError, Source, Wait

__all__ = ["Kernel", "PtxError", "Source", "launch"]

_GLOBAL = 1 << 40  # where global memory begins, and how far tensors lie apart


class _Word:
    """32 bits of memory, and who touched them since the last write that is ordered behind all before it."""

    __slots__ = ("constant", "touched", "value")

    def __init__(self, value: int | None = None, constant: bool = False):
        self.value, self.constant = value, constant
        self.touched: dict[tuple[str, _Epoch], _Thread | None] = {}  # None: several threads

    def touch(self, thread: _Thread, kind: str) -> None:
        if self.constant:
            if kind != "read":
                raise PtxError("writes an input")
            return
        for (other, epoch), by in self.touched.items():
            if (other != kind or kind == "write") and by is not thread and not thread.follows(epoch):
                raise PtxError(f"a {kind} that no barrier orders after a {other} by another thread")
        if kind != "write" and self.value is None:
            raise PtxError("reads memory that nobody wrote")
        if kind == "write":
            self.touched = {}
        key = (kind, thread.epoch)
        self.touched[key] = thread if self.touched.get(key, thread) is thread else None


class _Epoch(NamedTuple):
    """When something happened: between barriers of a program, and of a cluster."""

    program: _Program
    barriers: int
    arrivals: int


@dataclass(eq=False)
class _Program:
    index: tuple[int, ...]  # in the grid
    rank: int  # in the cluster
    cluster: list[_Program]
    memory: dict[int, _Word]  # shared
    tensors: dict[int, _Word]  # global
    threads: list[_Thread] = field(default_factory=list)
    barriers: int = 0
    visited: int = -1  # arrivals of the last thread of another program to touch this one's shared memory
    exited: bool = False


class _Thread:
    def __init__(self, kernel: Kernel, program: _Program, tid: int):
        self.registers: list[Any] = [None] * kernel.register_count
        self.arguments: list[int] = []
        self.program, self.tid, self.ntid = program, tid, LANES * kernel.source.warps
        self.next = 0
        self.wait: Wait | None = None
        self.arrivals = self.waits = 0
        self.may_touch = not kernel.source.early
        self.epoch = _Epoch(program, 0, 0)

    def follows(self, epoch: _Epoch) -> bool:
        """Whether all that happened then happened before what this thread does now."""
        mine, its = self.program, epoch.program
        same_program = its is mine and mine.barriers > epoch.barriers
        return same_program or (its.cluster is mine.cluster and self.waits > epoch.arrivals)

    def arrive(self) -> None:
        if self.arrivals != self.waits:
            raise PtxError("arrives twice at a barrier of the cluster")
        self.arrivals += 1
        self.new_epoch()

    def new_epoch(self) -> None:
        self.epoch = _Epoch(self.program, self.program.barriers, self.arrivals)

    def depend(self) -> None:
        self.may_touch = True

    def words(self, space: str, address: int, count: int) -> Iterator[_Word]:
        if address % (WORD * count):
            raise PtxError(f"address {address:#x} is not a multiple of {WORD * count}")
        program = self.program
        if space == "global":
            if not self.may_touch:
                raise PtxError("touches global memory before griddepcontrol.wait")
            memory = program.tensors
        else:
            if space == "shared::cluster" and address >> WINDOW:
                program = self.other((address >> WINDOW) - 1)
                address &= (1 << WINDOW) - 1
            memory = program.memory
        for i in range(count):
            word = memory.get(address + WORD * i)
            if word is None:
                raise PtxError(f"{space} address {address + WORD * i:#x} is out of bounds")
            yield word

    def other(self, rank: int) -> _Program:
        if not 0 <= rank < len(self.program.cluster):
            raise PtxError(f"the cluster has no program {rank}")
        program = self.program.cluster[rank]
        if program is not self.program:
            if not self.waits:
                raise PtxError(f"program {rank} may not have begun")
            if program.exited:
                raise PtxError(f"program {rank} has exited")
            program.visited = max(program.visited, self.arrivals)
        return program

    def load(self, space: str, address: int, count: int) -> list[int]:
        found = []
        for word in self.words(space, address, count):
            word.touch(self, "read")
            found.append(word.value)
        return found  # type: ignore[return-value]

    def store(self, space: str, address: int, *values: int) -> None:
        for word, value in zip(self.words(space, address, len(values)), values, strict=True):
            word.touch(self, "write")
            word.value = value + 0  # an unwritten register raises

    def atomic(self, space: str, address: int, operation: str, value: int) -> int:
        (word,) = self.words(space, address, 1)
        word.touch(self, "atomic")
        old: int = word.value  # type: ignore[assignment]
        word.value = (old + value) & 0xFFFFFFFF if operation == "add" else old | value
        return old


def launch(
    kernel: Kernel, grid: Sequence[int], arguments: Mapping[str, Any], outputs: Collection[str], seed: int = 0
) -> None:
    """Run all programs of a grid (for a cluster, of clusters).

    arguments: by name, tensors of 32-bit numbers or ints. Words of `outputs` count as unwritten, those that stay so
    keep what the tensor had; other tensors are inputs. seed: the order of clusters and threads.

    Raises: PtxError; ValueError for tensors that are not modelled; KeyError for an argument that is not there.
    """
    rng = random.Random(seed)
    memory: dict[int, _Word] = {}
    places: list[tuple[torch.Tensor, list[int]]] = []
    values: list[int] = []
    for i, name in enumerate(kernel.source.arguments):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            start = _GLOBAL * (i + 1)
            elements = _elements(value, start)
            memory |= {at: _Word() if name in outputs else _Word(bits, True) for at, bits in elements}
            places += [(value, [at for at, _ in elements])] * (name in outputs)
            value = start
        values.append(value)
    values += [0] * (len(kernel.parameters) - len(values))  # Triton's own memory, of which there is none
    clusters = list(product(*(range(n) for n in grid)))
    rng.shuffle(clusters)
    for index in clusters:
        _run(kernel, _cluster(kernel, index, memory, values), rng)
    for tensor, addresses in places:
        bits = tensor.view(torch.int32)
        found = [memory[at].value for at in addresses]
        kept = bits.flatten().tolist()
        signed = [old if new is None else new - (new >> 31 << 32) for new, old in zip(found, kept, strict=True)]
        bits.copy_(torch.tensor(signed, dtype=torch.int32).reshape(bits.shape))


def _elements(tensor: torch.Tensor, start: int) -> list[tuple[int, int]]:
    """(address, bits) of a tensor's elements, by row."""
    if tensor.element_size() != WORD:
        raise ValueError(f"{tensor.dtype} is not modelled; supported: 32-bit numbers")
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    addresses = (start + WORD * offsets).flatten().tolist()
    bits = (tensor.view(torch.int32).long() & 0xFFFFFFFF).flatten().tolist()
    return list(zip(addresses, bits, strict=True))


def _cluster(kernel: Kernel, index: tuple[int, ...], tensors: dict[int, _Word], values: list[int]) -> list[_Program]:
    programs: list[_Program] = []
    for rank in range(kernel.source.programs):
        spans = (range(address, address + size, WORD) for address, size in kernel.arrays.values())
        program = _Program(index, rank, programs, {address: _Word() for span in spans for address in span}, tensors)
        program.threads = [_Thread(kernel, program, tid) for tid in range(LANES * kernel.source.warps)]
        for thread in program.threads:
            thread.arguments = values
        programs.append(program)
    return programs


def _run(kernel: Kernel, programs: list[_Program], rng: random.Random) -> None:
    threads = [thread for program in programs for thread in program.threads]
    # warps of different pace: some wait while others go on from meeting to meeting
    paces = [rng.choice((4, 16, 64)) for _ in range(len(threads) // LANES)]
    while not all(program.exited for program in programs):
        ready = [i for i, thread in enumerate(threads) if thread.wait is None]
        rng.shuffle(ready)
        for i in ready:
            _advance(kernel, threads[i], paces[i // LANES])
        met = [_meet(program) for program in programs]
        if not (ready or any(met)) and not _meet_cluster(threads):
            waiting = {kernel.statements[thread.wait.at] for thread in threads if thread.wait}
            raise PtxError(f"nobody can go on: {', '.join(sorted(waiting))}")


def _advance(kernel: Kernel, thread: _Thread, blocks: int) -> None:
    """Run a thread until it waits, or for so many blocks."""
    try:
        for _ in range(blocks):
            end = kernel.blocks[thread.next](thread.registers, thread)
            if not isinstance(end, int):
                thread.wait = end
                return
            thread.next = end
    except (PtxError, TypeError) as error:
        frame = error.__traceback__.tb_next  # type: ignore[union-attr]
        what = "reads a register that nobody wrote" if isinstance(error, TypeError) else str(error)
        where = f"thread {thread.tid} of program {thread.program.rank} of cluster {thread.program.index}"
        raise PtxError(f"{where}: {kernel.place(frame.tb_lineno)}: {what}") from error  # type: ignore[union-attr]


def _meet(program: _Program) -> bool:
    """Let warps, or all threads, on that have met; whether there were any, or the program has come to its end."""
    met = False
    for i in range(0, len(program.threads), LANES):
        waits = _together(program.threads[i : i + LANES])
        if waits and waits[0].kind in COLLECTIVES:
            met = True
            results = COLLECTIVES[waits[0].kind]([wait.given for wait in waits])
            for thread, wait, result in zip(program.threads[i : i + LANES], waits, results, strict=True):
                for to, value in zip(wait.to, result, strict=False):
                    thread.registers[to] = value
                _go_on(thread)
    waits = _together(program.threads)
    if waits and waits[0].kind == "bar":
        met = True
        program.barriers += 1
        for thread in program.threads:
            _go_on(thread)
    if not program.exited and all(t.wait and t.wait.kind == "ret" for t in program.threads):
        program.exited = met = True
        if max(t.waits for t in program.threads) <= program.visited:
            raise PtxError(f"program {program.rank} may exit before another touches its shared memory")
    return met


def _together(threads: list[_Thread]) -> list[Wait]:
    """What threads wait for, if all do at the same instruction."""
    waits = [t.wait for t in threads if t.wait]
    return waits if len(waits) == len(threads) and all(wait.at == waits[0].at for wait in waits) else []


def _meet_cluster(threads: list[_Thread]) -> bool:
    """Let threads on that wait for arrivals of all that have not exited; whether there were any."""
    arrived = min((t.arrivals for t in threads if not (t.wait and t.wait.kind == "ret")), default=0)
    waiting = [t for t in threads if t.wait and t.wait.kind == "cluster"]
    if any(t.arrivals == t.waits for t in waiting):
        raise PtxError("waits for the cluster without having arrived")
    waiting = [t for t in waiting if t.arrivals <= arrived]
    for thread in waiting:
        thread.waits += 1
        _go_on(thread)
    return bool(waiting)


def _go_on(thread: _Thread) -> None:
    assert thread.wait is not None
    thread.next, thread.wait = thread.wait.then, None
    thread.new_epoch()
