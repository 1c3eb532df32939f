"""One torch.library namespace, `torch.ops.blackwell_kernels`, and one way to register an operator in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

NAMESPACE = "blackwell_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # kept alive: operators vanish with their library


def register_op(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Callable[..., None]:
    """Register a destination-passing operator `name(Tensor x, ..., Tensor(a!) out) -> ()` and return its overload.

    `cpu` and `cuda` validate, select and launch; both write the mutated arguments and return None, so the fake
    implementation has nothing to allocate. Every tensor an implementation writes must be marked `(x!)`.
    """
    name = schema.split("(", 1)[0].strip()
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, _on_its_device(cuda), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _on_its_device(cuda: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors: the first one's."""

    @wraps(cuda)
    def run(*args: Any, **kwargs: Any) -> Any:
        index = args[0].get_device()
        if index == torch.cuda.current_device():
            return cuda(*args, **kwargs)
        with torch.cuda.device(index):
            return cuda(*args, **kwargs)

    return run
