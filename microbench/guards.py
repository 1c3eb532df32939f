"""What an implementation may not do to look fast or right: change inputs, return what is not a finished tensor."""

from __future__ import annotations

import builtins
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

_WORDS = 1 << 24  # of one chunk: large inputs (expert weights) are read piece by piece


def fingerprint(x: torch.Tensor) -> int:
    """A number that depends on every byte of `x` and on its place; float NaNs count by their bits."""
    raw = x.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 4:  # a slice of bytes, which cannot be read as words
        raw = raw.clone()
    words = raw[: raw.numel() // 4 * 4].view(torch.int32)
    total = int(raw[words.numel() * 4 :].long().sum())
    for start in range(0, words.numel(), _WORDS):
        chunk = words[start : start + _WORDS].long()
        places = torch.arange(start, start + chunk.numel(), device=x.device) * 2 + 1  # odd: no word is multiplied away
        total = (total * 31 + int((chunk * places).sum())) & (1 << 64) - 1
    return total


def fingerprints(inputs: Mapping[str, Any]) -> dict[str, int]:
    """Name -> fingerprint of each tensor."""
    return {name: fingerprint(x) for name, x in inputs.items() if isinstance(x, torch.Tensor)}


def changed(inputs: Mapping[str, Any], before: Mapping[str, int]) -> list[str]:
    """Names of tensors that are not what they were when `before` was taken."""
    return [name for name, mark in before.items() if fingerprint(inputs[name]) != mark]


def strange(outputs: Mapping[str, Any]) -> list[str]:
    """One message for each output that is not a plain tensor: a lazy subclass computes when it is looked at, which is
    after the clock was stopped."""
    return [
        f"{name} is a {type(out).__module__}.{type(out).__qualname__}, not a plain tensor"
        for name, out in outputs.items()
        if out is not None and type(out) is not torch.Tensor
    ]


# a factor of more than this over the best known is looked at by a person before it is believed
REVIEW = 3.0
_SETTINGS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("torch.get_default_dtype()", torch.get_default_dtype),
    ("torch.get_float32_matmul_precision()", torch.get_float32_matmul_precision),
    ("torch.are_deterministic_algorithms_enabled()", torch.are_deterministic_algorithms_enabled),
    ("torch.backends.cuda.matmul.allow_tf32", lambda: torch.backends.cuda.matmul.allow_tf32),
)
_LAZY = {"torch.manual_seed"}  # torch wraps it itself when its compiler is imported


def world() -> dict[str, Any]:
    """What clocks, comparisons and arithmetic depend on: every function of this package's modules, which measure and
    judge, and what it consists of; torch's settings. Compare two of them with `patched`."""
    places = {
        "time": time,
        "builtins": builtins,
        "torch": torch,
        "torch.cuda": torch.cuda,
        "torch.Tensor": torch.Tensor,
    }
    places |= {"torch.cuda.Event": torch.cuda.Event, "torch.cuda.CUDAGraph": torch.cuda.CUDAGraph}
    package = __name__.rpartition(".")[0] + "."
    for full, module in list(sys.modules.items()):
        if full.startswith(package):
            name = full.removeprefix(package)
            places |= {name: module} | {
                f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, type)
            }
    found = {
        f"{place}.{key}": value
        for place, owner in places.items()
        for key, value in list(vars(owner).items())
        if callable(value) or isinstance(value, property | staticmethod | classmethod)
    }
    found = {name: value for name, value in found.items() if name not in _LAZY}
    inside = {f"{name}.__code__": code for name, value in found.items() if (code := getattr(value, "__code__", None))}
    found |= {name: code for name, code in inside.items() if name.removesuffix(".__code__") not in _LAZY}
    return found | {name: read() for name, read in _SETTINGS}


def patched(before: Mapping[str, Any], look: Callable[[], dict[str, Any]] = world) -> list[str]:
    """One message for each function or setting that is not what it was; what came in addition is nobody's business.

    look: bound when this was defined, so that another `world` does not answer for it.
    """
    now = look()
    return [f"it changed {name}" for name, value in before.items() if _differs(value, now.get(name))]


def _differs(was: Any, now: Any) -> bool:
    return was is not now and not (isinstance(was, str | bool | torch.dtype) and was == now)


def implausible(us: float, floor_us: float, physics: float) -> str | None:
    """Why a time cannot be true, or None. physics: the share of the floor below which nothing is believed."""
    if us >= physics * floor_us:
        return None
    return f"faster than physics: {us:.2f} µs where bytes and products alone take {floor_us:.2f}: something is not done"


def for_review(us: float, best_us: float | None) -> str | None:
    """A flag for a time that beats the best known one by more than REVIEW."""
    if best_us is None or best_us <= REVIEW * us:
        return None
    return f"to be reviewed: {best_us / us:.1f}x as fast as the best known"


class TorchWork:
    """Inside, notes the operators of torch that do what a kernel was asked to do: products, attention, softmax,
    sorting; and what those are made of, over `many` elements or more. In every thread, and in whatever mode.
    """

    _WORK = re.compile(
        r"^aten::(mm|bmm|addmm|baddbmm|_scaled_mm|_softmax|convolution|_?scaled_dot_product\w*|topk|sort|kthvalue)$"
    )
    _PARTS = re.compile(r"^aten::(exp|exp2|sigmoid|silu|softplus|logsumexp|sum|amax|max|cumsum|cumprod)_?$")

    def __init__(self, many: int) -> None:
        self.many = many
        self.done: set[str] = set()
        # private, but what sees the operators of every thread
        everywhere = _ExperimentalConfig(profile_all_threads=True)
        self._profile = profile(
            activities=[ProfilerActivity.CPU], record_shapes=True, experimental_config=everywhere, acc_events=True
        )

    def __enter__(self) -> TorchWork:
        self._profile.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._profile.__exit__(*exc)
        for event in self._profile.events():
            sizes = [math.prod(shape) for shape in event.input_shapes or () if shape]
            large = max(sizes, default=0) >= self.many
            if self._WORK.match(event.name) or (large and self._PARTS.match(event.name)):
                self.done.add(event.name.replace("::", "."))
