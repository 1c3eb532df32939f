"""Memory that tells: poisoned outputs show what was never written, guard bands what was written or read astray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch

# signed integers: not -1, which index outputs use as padding on purpose
_INTEGER_BYTE = 0xA5
# floats and raw bytes: 0xFF.. is NaN in float32, bfloat16, float16 and both FP8 types
_FLOAT_BYTE = 0xFF
_BAND = 1024


def poison(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A tensor full of NaN (floating point), 0xFF (uint8, bool) or 0xA5A5... (other integers)."""
    return poison_(torch.empty(tuple(shape), dtype=dtype, device=device))


def poison_(x: torch.Tensor) -> torch.Tensor:
    """Overwrite `x`, of any stride, by what `poison` holds; return it."""
    return x.copy_(_filled(x.shape, x.dtype, x.device))


def _poison_byte(dtype: torch.dtype) -> int:
    return _FLOAT_BYTE if dtype.is_floating_point or dtype in (torch.uint8, torch.bool) else _INTEGER_BYTE


def _filled(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.ones(tuple(shape), dtype=dtype, device=device)
    raw = torch.full((prod(shape) * dtype.itemsize,), _poison_byte(dtype), dtype=torch.uint8, device=device)
    return raw.view(dtype).view(tuple(shape))


class Canaries:
    """Hands out tensors between guard bands and checks afterwards that nothing outside them changed.

    Bands, and the gaps of strided tensors, hold poison: a stray read shows as NaN, a stray write in `check`.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._guarded: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []

    def output(
        self, shape: Sequence[int], dtype: torch.dtype, *, strides: Sequence[int] | None = None, name: str = "output"
    ) -> torch.Tensor:
        """A poisoned tensor; `strides` (in elements) may leave gaps, which are guarded too."""
        return self._guard(name, shape, dtype, strides, None)

    def input(self, x: torch.Tensor, *, strides: Sequence[int] | None = None, name: str = "input") -> torch.Tensor:
        """A guarded copy of `x` (contiguous unless `strides` are given) that must still hold the same bytes later."""
        return self._guard(name, x.shape, x.dtype, strides, x)

    def inout(self, x: torch.Tensor, *, strides: Sequence[int] | None = None, name: str = "inout") -> torch.Tensor:
        """A guarded copy of `x` whose own elements may change."""
        return self._guard(name, x.shape, x.dtype, strides, None).copy_(x)

    def _guard(
        self,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        strides: Sequence[int] | None,
        frozen: torch.Tensor | None,
    ) -> torch.Tensor:
        shape = tuple(shape)
        strides = tuple(strides) if strides is not None else torch.empty(shape, device="meta").stride()
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if prod(shape) else 0
        band = _BAND // dtype.itemsize
        buffer = _filled((extent + 2 * band,), dtype, self.device)
        view = buffer.as_strided(shape, strides, band)
        if frozen is not None:
            view.copy_(frozen)
            frozen = view.clone()
        self._guarded.append((name, buffer, view, frozen))
        return view

    def check(self) -> None:
        """Raise AssertionError naming the tensors with a changed band, gap or frozen element."""
        for name, buffer, view, frozen in self._guarded:
            inside = torch.zeros(buffer.shape, dtype=torch.bool, device=self.device)
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
            before = _filled(buffer.shape, buffer.dtype, self.device)
            changed = _bytes_differ(buffer, before) & ~inside
            if changed.any():
                where = (changed.nonzero().flatten() - int(view.storage_offset())).tolist()
                raise AssertionError(
                    f"{name}: {len(where)} elements outside the tensor were written, first at element offset "
                    f"{where[0]} of {str(view.dtype).removeprefix('torch.')}{list(view.shape)}, strides {view.stride()}"
                )
            if frozen is not None and _bytes_differ(view.contiguous(), frozen.contiguous()).any():
                raise AssertionError(f"{name}: an input was written")


def _bytes_differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two contiguous tensors differ bit for bit (NaN equals itself), as bool of their shape."""
    if a.numel() == 0:
        return torch.zeros(a.shape, dtype=torch.bool, device=a.device)
    size = a.dtype.itemsize
    return (a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).view(-1, size).any(-1).view(a.shape)


@contextmanager
def canaries(device: torch.device | str = "cpu") -> Iterator[Canaries]:
    """`with canaries(device) as guard:` — hand out tensors, run the operator, checked on leaving without an error."""
    guard = Canaries(device)
    yield guard
    guard.check()
