"""What an implementation may not do to look fast or right: change inputs, return what is not a finished tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_WORDS = 1 << 24  # of one chunk: large inputs (expert weights) are read piece by piece


def fingerprint(x: torch.Tensor) -> int:
    """A number that depends on every byte of `x` and on its place; float NaNs count by their bits."""
    raw = x.detach().contiguous().flatten().view(torch.uint8)
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
