"""Repairs of Triton's interpreter (3.6 and 3.7): right bf16 and FP8 numbers, no silent reads of undefined memory.

Stock, it multiplies the bits of bf16 numbers as integers in `tl.dot`, `*` and `+`, truncates where hardware rounds to
nearest even, and overflows where `cvt.satfinite` saturates. Repaired:
- casts, arithmetic, fma, dot and reductions of bf16 and FP8; TF32 rounding of float32 dots; min/max that drop NaN;
- masked-off lanes of a load without `other` hold 0xFF bytes (NaN, -1), since hardware leaves them undefined;
- an access outside the tensors passed to the kernel raises instead of reading or writing foreign memory;
- scans and reductions with a user's combine function run once per position, not once per element (sort: 10x faster).
Still unsupported, and loudly so: inline assembly, libdevice, bf16 atomics, `dot_scaled`, autotuned launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

TensorHandle = stock.TensorHandle

# Triton's carrier of these types in numpy is an unsigned integer of the same width
_CARRIED = {
    tl.bfloat16: (torch.bfloat16, torch.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8),
}


def repair() -> None:
    """Replace the interpreter's builder, reductions, scans and executor by repaired ones; idempotent.

    Raises: RuntimeError when triton was imported in compiled mode.
    """
    if isinstance(stock.interpreter_builder, RepairedBuilder):
        return
    if not isinstance(tl.standard.sum, stock.InterpretedFunction):
        raise RuntimeError("triton was imported in compiled mode; set TRITON_INTERPRET=1 before its first import")
    stock.interpreter_builder.__class__ = RepairedBuilder
    stock.InterpreterBuilder = RepairedBuilder
    stock.ReduceOps = RepairedReduce
    stock.ScanOps = RepairedScan
    stock.GridExecutor = BoundedExecutor
    stock._patch_lang_tensor = _patch_lang_tensor


def decode(data: np.ndarray, dtype: Any) -> np.ndarray:
    """The values held by a carrier: exact float32 for bf16 and FP8, the data themselves for any other type."""
    if dtype.scalar not in _CARRIED:
        return data
    return torch.from_numpy(np.array(data)).view(_CARRIED[dtype.scalar][0]).float().numpy()


def encode(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Values in the carrier of `dtype`, rounded to nearest even; FP8 saturates (infinity too) as `cvt.satfinite`."""
    if dtype.scalar not in _CARRIED:
        return values.astype(stock._get_np_dtype(dtype))
    low, carrier = _CARRIED[dtype.scalar]
    x = torch.from_numpy(np.array(values))
    x = x if x.is_floating_point() else x.float()
    if carrier is torch.uint8:
        limit = torch.finfo(low).max
        x = x.clamp(-limit, limit)
    return x.to(low).view(carrier).numpy()


def _is_low(handle: Any) -> bool:
    return handle.dtype.scalar in _CARRIED


def _round_to_tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


class RepairedBuilder(stock.InterpreterBuilder):
    """The interpreter's operations, with bf16 and FP8 computed in float32 and rounded once, as hardware does."""

    # [n, 2] first and last-plus-one byte of every tensor of the running kernel; None outside a launch
    allocations: np.ndarray | None = None

    def get_bf16(self, value: float) -> Any:
        return TensorHandle(encode(np.array([value], dtype=np.float32), tl.bfloat16), tl.bfloat16)

    def get_all_ones_value(self, type: Any) -> Any:
        np_type = stock._get_np_dtype(type)
        # numpy >= 2 refuses -1 as an unsigned integer
        ones = np.iinfo(np_type).max if np_type.kind == "u" else -1
        return TensorHandle(np.full(1, True if np_type.kind == "b" else ones, dtype=np_type), type.scalar)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return TensorHandle(encode(decode(src.data, src.dtype), dst_type), dst_type.scalar)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if rounding_mode == ir.ROUNDING_MODE.RTZ:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not _is_low(lhs) or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            result = super().binary_op(lhs, rhs, op)
        else:
            out = op(decode(lhs.data, lhs.dtype), decode(rhs.data, rhs.dtype))
            result = TensorHandle(out if out.dtype == np.bool_ else encode(out, lhs.dtype), lhs.dtype.scalar)
        if result.data.dtype == np.bool_:
            # stock leaves comparisons the type of what was compared: broadcast, they turn into integers
            result.dtype = tl.int1
        return result

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        if not _is_low(z):
            return super().create_fma(x, y, z)
        product = decode(x.data, x.dtype).astype(np.float64) * decode(y.data, y.dtype)
        return TensorHandle(encode(product + decode(z.data, z.dtype), z.dtype), z.dtype.scalar)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b = (self._dot_operand(x, input_precision) for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    @staticmethod
    def _dot_operand(x: Any, input_precision: Any) -> Any:
        if _is_low(x):
            return TensorHandle(decode(x.data, x.dtype), tl.float32)
        if x.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            return TensorHandle(_round_to_tf32(x.data), tl.float32)
        return x

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        mask = self._check_bounds("load", ptrs, mask)
        if other is None:
            np_type = stock._get_np_dtype(ptrs.get_element_ty())
            undefined = np.frombuffer(b"\xff" * np_type.itemsize, dtype=np_type)[0]
            other = TensorHandle(np.full(ptrs.data.shape, undefined), ptrs.get_element_ty())
        return super().create_masked_load(ptrs, mask, other, *args, **kwargs)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        mask = self._check_bounds("store", ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *args, **kwargs)

    def create_atomic_rmw(self, rmw_op: Any, ptr: Any, val: Any, mask: Any, *args: Any) -> Any:
        if _is_low(val):
            raise NotImplementedError(f"atomics of {val.dtype.scalar} are not supported in the interpreter")
        return super().create_atomic_rmw(rmw_op, ptr, val, self._check_bounds("atomic", ptr, mask), *args)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *args: Any) -> Any:
        self._check_bounds("atomic", ptr, np.ones(ptr.data.shape, dtype=bool))
        return super().create_atomic_cas(ptr, cmp, val, *args)

    def _check_bounds(self, what: str, ptrs: Any, mask: Any) -> Any:
        """Raise IndexError if an active lane leaves the tensors passed to the kernel; return the mask as a handle."""
        # block pointers hand over a bare array
        mask = mask if isinstance(mask, TensorHandle) else TensorHandle(mask, tl.int1)
        if self.allocations is None:
            return mask
        # integers would index instead of select
        addresses = ptrs.data[np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)]
        if addresses.size == 0:
            return mask
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        starts, ends = self.allocations[:, 0], self.allocations[:, 1]
        # one allocation around the extremes is the common case and cheap to see
        low, high = addresses.min(), addresses.max() + np.uint64(size)
        if np.any((starts <= low) & (high <= ends)):
            return mask
        home = np.searchsorted(starts, addresses, side="right") - 1
        inside = (home >= 0) & (addresses + np.uint64(size) <= ends[np.maximum(home, 0)])
        if not inside.all():
            raise IndexError(
                f"{what} outside the tensors passed to the kernel: {int((~inside).sum())} of {addresses.size} active "
                f"lanes of program {self.grid_idx}, element type {ptrs.get_element_ty()}; "
                f"{_nearest(int(addresses[~inside][0]), self.allocations)}; mask these lanes or widen the tensor"
            )
        return mask


def _nearest(address: int, allocations: np.ndarray) -> str:
    """Where a stray address lies, as seen from the closest allocation."""
    if not len(allocations):
        return "the kernel was passed no tensor"
    spans = [(int(a), int(b)) for a, b in allocations]
    start, end = min(spans, key=lambda s: min(abs(address - s[0]), abs(address - s[1])))
    past, before = address - end, start - address
    where = f"{past} bytes past its end" if past >= 0 else f"{before} bytes before its start"
    return f"closest tensor holds {end - start} bytes, first stray address {where}"


class BoundedExecutor(stock.GridExecutor):
    """Tells the builder which memory the launched kernel may touch, and keeps the names of launched kernels."""

    launched: ClassVar[set[str]] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.launched.add(self.fn.__name__)
        try:
            # overflow and NaN are silent on a GPU
            with np.errstate(all="ignore"):
                return super().__call__(*args, **kwargs)
        finally:
            stock.interpreter_builder.allocations = None

    def _init_args_hst(self, args_dev: Any, kwargs: Any) -> Any:
        args_hst, kwargs_hst = super()._init_args_hst(args_dev, kwargs)
        spans = sorted(set(_spans([*args_hst, *kwargs_hst.values()])))
        stock.interpreter_builder.allocations = np.array(spans, dtype=np.uint64).reshape(-1, 2)
        return args_hst, kwargs_hst


def _spans(args: Iterable[Any]) -> Iterable[tuple[int, int]]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _spans(arg)
        elif isinstance(arg, stock.TensorDescriptor):
            yield from _spans([arg.base])
        elif hasattr(arg, "data_ptr"):
            storage = stock._unwrap_tensor(arg).untyped_storage()
            yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _fold(op: Any, inputs: Any, axis: int) -> list[list[np.ndarray]]:
    """Running results of `op.combine_fn` along `axis`: out[input][position] is an array over the other axes."""
    arrays = [np.moveaxis(x.handle.data, axis, 0) for x in inputs]
    dtypes = [x.dtype for x in inputs]
    running = [a[0] for a in arrays]
    out = [[r] for r in running]
    for position in range(1, arrays[0].shape[0]):
        left = [op.to_tensor(r, t) for r, t in zip(running, dtypes, strict=True)]
        right = [op.to_tensor(a[position], t) for a, t in zip(arrays, dtypes, strict=True)]
        combined = op.combine_fn.fn(*left, *right)
        combined = combined if isinstance(combined, tuple) else (combined,)
        running = [np.reshape(c.handle.data, r.shape) for c, r in zip(combined, running, strict=True)]
        for column, value in zip(out, running, strict=True):
            column.append(value)
    return out


class RepairedReduce(stock.ReduceOps):
    """Reductions: bf16 and FP8 through their combine function, and that one vectorised over the kept axes."""

    def apply_impl(self, input: Any) -> Any:
        return self.generic_reduce(input) if any(_is_low(x.handle) for x in input) else super().apply_impl(input)

    def generic_reduce(self, input: Any) -> list[Any]:
        rank = len(input[0].handle.data.shape)
        inputs, axis = self.unravel(input, self.axis)
        results = []
        for x, steps in zip(input, _fold(self, inputs, axis), strict=True):
            data = steps[-1]
            if self.keep_dims:
                data = np.expand_dims(data, axis) if self.axis is not None else np.reshape(data, (1,) * rank)
            results.append(self.to_tensor(data, x.dtype))
        return results


class RepairedScan(stock.ScanOps):
    """Scans: bf16 and FP8 through their combine function, and that one vectorised over the other axes."""

    def cumsum(self, input: Any) -> Any:
        return self.generic_scan((input,)) if _is_low(input.handle) else super().cumsum(input)

    def cumprod(self, input: Any) -> Any:
        return self.generic_scan((input,)) if _is_low(input.handle) else super().cumprod(input)

    def generic_scan(self, input: Any) -> list[Any]:
        columns = _fold(self, input, self.axis)
        return [self.to_tensor(np.stack(c, axis=self.axis), x.dtype) for c, x in zip(columns, input, strict=True)]


_stock_patch_lang_tensor = stock._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _stock_patch_lang_tensor(tensor, scope)
    # triton 3.6 converts size-1 arrays with int(), which numpy >= 2.4 refuses
    scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))
