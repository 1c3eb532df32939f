"""Input checks shared by all operators: they run before any launch and name what was asked and what is supported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from blackwell_kernels.errors import UnsupportedInputError

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")
_MOST_LAYOUTS = 256  # a check's: the layers of a step ask again, new prompts hardly ever


def describe(x: torch.Tensor | None) -> str:
    """`bfloat16[4, 128] on cuda:0` for error messages."""
    if x is None:
        return "None"
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"


def require(condition: bool, op: str, asked: str, supported: str, fix: str) -> None:
    """Raise UnsupportedInputError unless `condition`."""
    if not condition:
        raise UnsupportedInputError(op, asked, supported, fix)


def check_tensor(
    op: str,
    name: str,
    x: torch.Tensor,
    *,
    shape: Sequence[int | None] | None = None,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    last_dim_contiguous: bool = True,
    contiguous: bool = False,
) -> None:
    """Check one tensor argument; None in `shape` matches any size.

    Raises: UnsupportedInputError naming the argument, what it is and what it must be.
    """
    if dtype is not None:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
        names = " or ".join(str(d).removeprefix("torch.") for d in allowed)
        require(x.dtype in allowed, op, f"{name} = {describe(x)}", f"{name} of dtype {names}", f"convert {name}")
    if shape is not None:
        wanted = ["*" if s is None else str(s) for s in shape]
        fits = x.dim() == len(shape) and all(s is None or s == n for s, n in zip(shape, x.shape, strict=True))
        require(fits, op, f"{name} = {describe(x)}", f"{name} of shape [{', '.join(wanted)}]", f"reshape {name}")
    if device is not None:
        require(x.device == device, op, f"{name} on {x.device}", f"all tensors on {device}", f"move {name}")
    if contiguous:
        ok = x.is_contiguous()
        require(ok, op, f"{name} with strides {x.stride()}", f"contiguous {name}", f"call {name}.contiguous()")
    elif last_dim_contiguous and x.dim() > 0 and x.numel() > 0:
        ok = x.stride(-1) == 1 or x.shape[-1] == 1
        require(ok, op, f"{name} with strides {x.stride()}", f"{name} with last stride 1", f"call {name}.contiguous()")


def once_per_layout(check: Callable[_Inputs, _Result]) -> Callable[_Inputs, _Result]:
    """Remember what a check returned, by the shapes, strides, dtypes, devices and alignment (offset modulo 16 elements)
    of its tensors and by its other arguments: all that it may look at. What raises is checked again.

    A full check takes 70 to 160 µs of host time, more than a step can spare in each of dozens of layers.
    """
    passed: dict[object, _Result] = {}

    @wraps(check)
    def checked(*args: _Inputs.args, **kwargs: _Inputs.kwargs) -> _Result:
        if kwargs:
            raise TypeError(f"{check.__name__} takes positional arguments only")
        key = tuple(
            (x.shape, x.stride(), x.storage_offset() % 16, x.dtype, x.device) if isinstance(x, torch.Tensor) else x
            for x in args
        )
        if key not in passed:
            if len(passed) >= _MOST_LAYOUTS:
                passed.clear()
            passed[key] = check(*args, **kwargs)
        return passed[key]

    return checked
