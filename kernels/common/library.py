"""One torch.library namespace, `torch.ops.blackwell_kernels`, and one way to register an operator in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "blackwell_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # kept alive: operators vanish with their library


def register_op(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any]) -> Callable[..., None]:
    """Register a destination-passing operator `name(Tensor ..., Tensor(a!) out) -> ()` and return its overload.

    `cpu` and `cuda` validate, select and launch; both write the mutated arguments and return None, so the fake
    implementation has nothing to allocate. Every tensor an implementation writes must be marked `(x!)`.
    """
    name = schema.split("(", 1)[0].strip()
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
