"""What a compiled Triton kernel is made of, read from its metadata, PTX and SASS; no GPU is needed.

SASS and resources come from the cuobjdump that Triton's wheel bundles.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from blackwell_kernels.common.testing import sass

_INSTRUCTION_BYTES = 16
# PTX of one kind each; anchored, since `mma.sync` also ends `wgmma.mma_async.sync`
_TCGEN05 = re.compile(r"\btcgen05\.mma(?:\.sp)?\.cta_group::\d\.kind::(\w+)")
_WGMMA = re.compile(r"\bwgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)\.")
_MMA_SYNC = re.compile(r"^\s*mma\.sync\.", re.MULTILINE)
# names shared by both generations: what the operands are, not what the instruction is called
_KINDS = {
    "f8f6f4": "fp8",
    "e4m3": "fp8",
    "e5m2": "fp8",
    "f16": "f16",
    "bf16": "f16",
    "tf32": "tf32",
    "i8": "int8",
    "s8": "int8",
    "u8": "int8",
    "mxf8f6f4": "mxfp8",
    "mxf4": "mxfp4",
    "mxf4nvf4": "mxfp4",
}


@dataclass(frozen=True)
class Statistics:
    """One compiled kernel. shared, stack: bytes a block, bytes a thread; tmem: columns; the rest are counts.

    mma: kinds of tensor-core instructions: `fp8`, `f16` (bf16 too), `tf32`, ... for tcgen05 and wgmma, and `mma.sync`
    for the older, slower kind of any type. stack holds what registers could not: spills and local arrays.
    mma_loop: SASS instructions of the longest innermost loop with a tensor-core instruction; 0 without one.
    unwritten: registers of a kernel with tensor-core instructions that its SASS reads and never writes.
    """

    kernel: str
    arch: int
    target: str
    grid: tuple[int, ...]
    warps: int
    registers: int
    stack: int
    shared: int
    tmem: int
    traps: int
    mma: tuple[str, ...]
    tma: int
    tensormap_replace: int
    instructions: int
    mma_loop: int
    unwritten: tuple[str, ...] = ()


def of(kernel: Any, name: str, grid: tuple[int, ...]) -> Statistics:
    """Statistics of a `triton.compiler.CompiledKernel` launched as `name` with `grid`."""
    ptx, meta = kernel.asm["ptx"], kernel.metadata
    cubin, kinds = kernel.asm["cubin"], mma_kinds(ptx)
    usage = _resources(cubin)
    # disassembling is by far the slowest part
    code = sass.parse(_cuobjdump("-sass", cubin)) if kinds else []
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    return Statistics(
        kernel=name,
        arch=meta.target.arch,
        target=target.group(1) if target else "",
        grid=grid,
        warps=meta.num_warps,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=meta.shared,
        tmem=getattr(meta, "tmem_size", None) or 0,
        traps=len(re.findall(r"^\s*trap;", ptx, re.MULTILINE)),
        mma=kinds,
        tma=len(re.findall(r"\bcp\.async\.bulk\.tensor\b", ptx)),
        tensormap_replace=len(re.findall(r"\btensormap\.replace\b", ptx)),
        instructions=code_bytes(cubin) // _INSTRUCTION_BYTES,
        mma_loop=sass.innermost_mma_loop(code),
        unwritten=sass.unwritten(code),
    )


def mma_kinds(ptx: str) -> tuple[str, ...]:
    """Sorted kinds of the tensor-core instructions in a PTX text."""
    found = {_KINDS.get(kind, kind) for kind in _TCGEN05.findall(ptx) + _WGMMA.findall(ptx)}
    if _MMA_SYNC.search(ptx):
        found.add("mma.sync")
    return tuple(sorted(found))


def code_bytes(cubin: bytes) -> int:
    """Bytes of machine code in an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry, count = struct.unpack_from("<HH", cubin, 0x3A)
    # of each section header: flags at 8, size at 32; flag 4 marks code
    headers = [struct.unpack_from("<8xQ16xQ", cubin, table + i * entry) for i in range(count)]
    return sum(size for flags, size in headers if flags & 4)


def _resources(cubin: bytes) -> dict[str, int]:
    text = _cuobjdump("-res-usage", cubin)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if usage.keys() != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    return usage


# cases of one family share most of their kernels
@lru_cache(maxsize=64)
def _cuobjdump(option: str, cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
