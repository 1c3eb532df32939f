"""Chip facts that heuristics and bounds use, and the short name (slug) under which a GPU's measurements are kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from blackwell_kernels.common import launch


@dataclass(frozen=True)
class Arch:
    """What one chip can do.

    sm: 90, 100, ...; 0 is a CPU. sms: multiprocessors. smem_bytes: shared memory one thread block may use.
    copy_tbps: memory traffic of a large copy, read + write, TB/s. fp8_tflops, bf16_tflops: dense matrix products.
    launch_us: one smallest kernel in a CUDA graph.
    measured: whether these four were measured on the chip; else they are estimates, from data sheets or a kin.
    """

    sm: int
    sms: int
    smem_bytes: int
    copy_tbps: float
    fp8_tflops: float
    bf16_tflops: float
    launch_us: float
    measured: bool


ARCHS = {
    # measured: large device-to-device copy, cuBLAS 8192 cubed, the quickest of seven runs' smallest kernels
    "h200": Arch(90, 132, 232_448, 4.3, 1310.0, 790.0, 1.14, measured=True),
    # data sheet; matrix rates are peaks, which nothing reaches
    "b200": Arch(100, 148, 232_448, 7.7, 4500.0, 2250.0, 1.14, measured=False),
}
CPU = Arch(0, 1, 0, 0.05, 0.5, 0.5, 1.0, measured=False)
_pretended: list[tuple[str, Arch]] = []


def gpu_slug(device_name: str) -> str:
    """`NVIDIA H200` -> `h200`, `NVIDIA H100 80GB HBM3` -> `h100-80gb-hbm3`: variants do not share measurements."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    return "-".join(w for w in words if w != "nvidia") or "unknown"


def current_arch(device: torch.device | str | None = None) -> Arch:
    """The chip of a device; by default the current CUDA device, or the CPU where there is none.

    A GPU that is not in `ARCHS` gets its own counts and the rates of the known chip of its generation, scaled by its
    number of multiprocessors, as estimates.
    """
    if _pretended:
        return _pretended[-1][1]
    index = _cuda_index(device)
    return CPU if index is None else _of_cuda_device(index)


def current_gpu(device: torch.device | str | None = None) -> str | None:
    """The slug under which tables of that device are kept; None for a CPU."""
    if _pretended:
        return _pretended[-1][0]
    index = _cuda_index(device)
    return None if index is None else _slug_of_cuda_device(index)


def _cuda_index(device: torch.device | str | None) -> int | None:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


@contextmanager
def pretend(gpu: str, chip: Arch | None = None) -> Iterator[None]:
    """Inside, every device is the chip with this slug, by default that of `ARCHS`: to compile for what is not here."""
    _pretended.append((gpu, chip or ARCHS[gpu]))
    launch.forget()
    try:
        yield
    finally:
        _pretended.pop()
        launch.forget()


@lru_cache
def _slug_of_cuda_device(index: int) -> str:
    return gpu_slug(torch.cuda.get_device_name(index))


@lru_cache
def _of_cuda_device(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    return arch_of(
        properties.name,
        sm=properties.major * 10 + properties.minor,
        sms=properties.multi_processor_count,
        smem_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def arch_of(device_name: str, *, sm: int, sms: int, smem_bytes: int) -> Arch:
    """Facts of the named chip: those of `ARCHS` if known and whole, else scaled from the newest known older one."""
    known = ARCHS.get(gpu_slug(device_name))
    if known is not None and (known.sm, known.sms) == (sm, sms):
        return known
    older = [arch for arch in ARCHS.values() if arch.sm <= sm] or [min(ARCHS.values(), key=lambda arch: arch.sm)]
    kin = max(older, key=lambda arch: arch.sm)
    share = sms / kin.sms
    rates = (kin.copy_tbps * share, kin.fp8_tflops * share, kin.bf16_tflops * share)
    return Arch(sm, sms, smem_bytes, *rates, kin.launch_us, measured=False)
